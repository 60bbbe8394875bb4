"""The reference of a preference objective: log-probabilities of the network as it was before the first step.

    copy         a frozen copy of the network of --init
    adapter-off  the policy with its adapter inactive: no second network in memory
    precomputed  computed once before the first step, and kept in a file (`train.reference_file`): no second forward
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora.installed import without_adapters
from model.folders import HubError
from train.losses.sequence import sequence_log_probs
from train.runs.errors import CheckpointError
from train.shared_prompt import Read, read_rows

T = TypeVar("T")
COPY = "reference"  # name of the frozen network
ROW_IDS = "row_ids"  # key of a batch: the number of each row among all rows of the data, for a table
DROPOUTS = ("dropout", "output_dropout")  # attributes of modules


def reply_log_probs(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    labels_BT: Tensor,
    token_weights_BT: Tensor | None = None,
    read: Read = read_rows,
) -> Tensor:
    """Return Σ_t log π(label_t) over the labelled tokens of each row, B, in float32 or wider."""
    head = network.head
    features = head.features(read(network, inputs, labels_BT))
    return sequence_log_probs(features, head.weight, labels_BT, head.bias, token_weights_BT=token_weights_BT)


def remove_dropout(network: nn.Module) -> nn.Module:
    """Set the dropout of all layers and adapters to 0: with it the policy would differ from its reference at step 0."""
    for module in network.modules():
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


def read_reference(read: Callable[[], T]) -> T:
    """Return read(), of what --init names. Errors (CheckpointError): it cannot be read, as in a resumed run whose --init is
    gone."""
    try:
        return read()
    except (OSError, HubError, CheckpointError) as error:
        raise CheckpointError(
            f"the reference, which --init names, cannot be read: {error}. Bring it back, or begin a new run from this run's "
            "weights, --init RUN"
        ) from error


def frozen_copy(network: nn.Module, initial: Callable[[], nn.Module]) -> nn.Module:
    """Return the network of step 0, on the device and in the attention of `network`, in eval mode.

    Errors (CheckpointError): those of `read_reference`.
    """
    copy = read_reference(initial)
    return copy.to(next(network.parameters()).device).requires_grad_(False).eval()


class Reference(nn.Module):
    """forward(policy, batch, inputs, labels B T, token weights) -> log-probabilities B of the reference, without gradient."""

    read: Read = staticmethod(read_rows)  # as the policy's rows are read

    def forward(self, policy, frozen, batch, inputs, labels_BT, token_weights_BT=None) -> Tensor:
        raise NotImplementedError


class CopyReference(Reference):
    """A frozen copy, one of the objective's networks."""

    @torch.no_grad()
    def forward(self, policy, frozen, batch, inputs, labels_BT, token_weights_BT=None) -> Tensor:
        return reply_log_probs(frozen[COPY], inputs, labels_BT, token_weights_BT, self.read)


class AdapterOffReference(Reference):
    """The policy without its adapter."""

    @torch.no_grad()
    def forward(self, policy, frozen, batch, inputs, labels_BT, token_weights_BT=None) -> Tensor:
        with without_adapters(policy):
            return reply_log_probs(policy, inputs, labels_BT, token_weights_BT, self.read)


class StoredReference(Reference):
    """A table of log-probabilities by row number. `fill` sets it, before the first step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table_N", None, persistent=False)

    def fill(self, table_N: Tensor) -> None:
        self.table_N = table_N

    def forward(self, policy, frozen, batch, inputs, labels_BT, token_weights_BT=None) -> Tensor:
        if self.table_N is None:
            raise RuntimeError("the reference's log-probabilities have not been computed yet")
        return self.table_N[batch[ROW_IDS]]


REFERENCES = {"copy": CopyReference, "adapter-off": AdapterOffReference, "precomputed": StoredReference}
