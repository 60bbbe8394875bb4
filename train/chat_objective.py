"""Cross-entropy of replies: a mean over tokens or over records, with noise on the embeddings (NEFTune)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data.packing.collate import PADDING_DOCUMENT
from data.transforms.causal import IGNORE
from train.objective import MaskedObjective, Result, Term

WEIGHTS = "loss_weights"


class ChatObjective(MaskedObjective):
    """`MaskedObjective`, with a mean over records where the batch has weights, and with NEFTune in training.

        token    loss = Σ nats of learned tokens / their number, in the whole step
        record   loss = Σ over records of (Σ its nats / its learned tokens) / number of records

    loss_weights B T: 1 / (learned tokens of the record) at each of them. In eval mode the loss is the mean over tokens.
    NEFTune: in training, each embedding gets noise uniform in ±α / √(L D), L tokens of its record (without padding), width D.
    Source: Jain et al. 2023, arXiv 2310.05914, algorithm 1.
    """

    uses = ("labels", WEIGHTS)

    def __init__(
        self,
        networks: nn.Module | Mapping[str, nn.Module],
        loss: Callable,
        held_out: Callable | None = None,
        *,
        weighted_loss: Callable | None = None,
        neftune: float = 0.0,
    ):
        super().__init__(networks, loss, held_out)
        self.weighted_loss, self.neftune = weighted_loss, neftune

    def forward(self, batch: dict[str, Tensor]) -> Result:
        with embedding_noise(self.network.body.embedding, batch, self.neftune if self.training else 0.0):
            output = self.network.body(**self.inputs_of(batch))
        if self.weighted_loss is None or not self.training:
            return self.result(output.hidden, batch["labels"])
        head, labels_BT = self.network.head, batch["labels"]
        features = head.features(output.hidden)
        weighted, plain = self.weighted_loss(features, head.weight, labels_BT, batch[WEIGHTS], head.bias)
        counts = self.counts(batch)
        return Result({"tokens": Term(plain, counts["tokens"], 0.0), "loss": Term(weighted, counts["loss"])})

    @staticmethod
    def counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the learned tokens; with weights also the records."""
        scored = (batch["labels"] != IGNORE).sum()
        if WEIGHTS not in batch:
            return {"loss": scored}
        return {"tokens": scored, "loss": batch[WEIGHTS].sum()}


@contextmanager
def embedding_noise(embedding: nn.Module, batch: Mapping[str, Tensor], alpha: float) -> Iterator[None]:
    """Add noise to the output of an embedding in this block. alpha 0: none."""
    if not alpha:
        yield
        return
    length_BT = record_lengths(batch)

    def add(module: nn.Module, inputs: object, embedded_BTD: Tensor) -> Tensor:
        scale_BT1 = alpha / (length_BT * embedded_BTD.size(-1)).sqrt()[..., None]
        return embedded_BTD + ((2 * torch.rand_like(embedded_BTD) - 1) * scale_BT1).to(embedded_BTD.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def record_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Return for each position the tokens of its record, without padding, B T; 1 in padding.

    >>> record_lengths({"input_ids": torch.ones(1, 5), "document_ids": torch.tensor([[0, 0, 0, 1, -2]])}).tolist()
    [[3.0, 3.0, 3.0, 1.0, 1.0]]
    """
    if "document_ids" not in batch:
        mask_BT = batch["attention_mask"]
        return mask_BT.sum(-1, keepdim=True).expand(mask_BT.shape).double()
    document_BT = batch["document_ids"]
    is_real_BT = document_BT != PADDING_DOCUMENT
    count_BT = torch.zeros(document_BT.shape, dtype=torch.float64, device=document_BT.device)
    count_BT.scatter_add_(1, document_BT.clamp(min=0), is_real_BT.double())
    return count_BT.gather(1, document_BT.clamp(min=0)).masked_fill(~is_real_BT, 1)
