"""Runs with quantization-aware training: floating-point weights are trained, and every step computes with them rounded to
integers. A checkpoint's model.safetensors holds the integer weights, raw.safetensors the trained ones."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.weights import role_of
from quant.config import QuantError
from quant.qat import prepare, qat_layers
from train.config import QAT_BITS, TrainConfig
from train.parallel.ranks import Ranks
from train.runs.errors import TrainError


def prepare_network(config: TrainConfig, network: nn.Module) -> nn.Module:
    """Replace the network's linear layers by layers that round by --qat. Errors (TrainError): a layer that cannot."""
    try:
        return prepare(network, config.qat, QAT_BITS[config.run.qat])
    except QuantError as error:
        raise TrainError(f"--qat {config.run.qat}: {str(error).replace('--skip', '--qat.skip')}") from None


def role(network: nn.Module, name: str) -> str:
    """The role that decides weight decay: "bias", without decay, for learned scales."""
    return "bias" if name.rpartition(".")[2] in ("weight_log_scale", "input_log_scale") else role_of(network.config, name)


def buffers(network: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds beside the parameters: ranges, zero points, and whether they are frozen."""
    layers = qat_layers(network).items()
    return {f"{path}.{name}": buffer for path, layer in layers for name, buffer in layer.named_buffers()}


class Observers:
    """Ranges of statically quantized inputs. The inputs of an optimizer step, over all micro-batches and ranks, update each
    range once, until step `freeze`."""

    def __init__(self, network: nn.Module, freeze: int, ranks: Ranks):
        self.layers, self.freeze, self.ranks = list(qat_layers(network).values()), freeze, ranks

    @torch.no_grad()
    def begin(self, forward: Callable[[], object], context: Callable[[], AbstractContextManager]) -> None:
        """Initialise the ranges by a forward of one batch, the same on all ranks, without dropout."""
        if all(layer.observer is None for layer in self.layers):
            return
        for layer in self.layers:
            layer.training = True
        with context():
            forward()
        for layer in self.layers:
            layer.training, layer.pending = False, None

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Update the ranges; `step` counts the steps before this one."""
        if step >= self.freeze:  # the step that should have frozen them was skipped, or there was none
            for layer in self.layers:
                layer.freeze()
        watched = [layer for layer in self.layers if layer.pending is not None]
        if self.ranks.world > 1 and watched:
            ends = torch.stack([torch.stack((-layer.pending[0], layer.pending[1])) for layer in watched])
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            for layer, (low, high) in zip(watched, ends, strict=True):
                layer.pending = -low, high
        for layer in self.layers:
            layer.commit()
            if step + 1 >= self.freeze:
                layer.freeze()

    def after_skip(self) -> None:
        """Discard the inputs of a skipped step."""
        for layer in self.layers:
            layer.pending = None


def observers(config: TrainConfig, network: nn.Module, ranks: Ranks) -> Observers | None:
    """The observers of a run; None without --qat."""
    if config.run.qat == "none":
        return None
    return Observers(network, round(config.qat.freeze * (config.recorded.scheduled_steps or config.run.steps)), ranks)
