"""A run with quantization-aware training: the weights are trained as numbers, and every step computes with what they will
be as whole numbers. A checkpoint's model.safetensors holds these, raw.safetensors what is trained."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.weights import role_of
from quant.config import QuantError
from quant.qat import prepare, qat_layers
from train.config import TrainConfig, TrainError
from train.parallel.ranks import Ranks

BITS = {"int8": 8, "int4": 4}


def put_on(config: TrainConfig, network: nn.Module) -> nn.Module:
    """The network with layers that round as was asked for."""
    try:
        return prepare(network, config.qat, BITS[config.run.qat])
    except QuantError as error:
        raise TrainError(f"--qat {config.run.qat}: {str(error).replace('--skip', '--qat.skip')}") from None


def role(network: nn.Module, name: str) -> str:
    """Learned scales do not decay."""
    return "bias" if name.rpartition(".")[2] in ("weight_log_scale", "input_log_scale") else role_of(network.config, name)


def kept(network: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold beside the parameters: ranges, zero points, and whether they change."""
    layers = qat_layers(network).items()
    return {f"{path}.{name}": buffer for path, layer in layers for name, buffer in layer.named_buffers()}


class Observers:
    """Of static inputs: each optimizer step's numbers, of all micro-batches and ranks, move the ranges once, until `freeze`."""

    def __init__(self, network: nn.Module, freeze: int, ranks: Ranks):
        self.layers, self.freeze, self.ranks = list(qat_layers(network).values()), freeze, ranks

    @torch.no_grad()
    def begin(self, forward: Callable[[], object], context: Callable[[], AbstractContextManager]) -> None:
        """A forward of what is the same batch on all ranks: the first ranges. Dropout is off, so that all see one."""
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
        """step: how many there were before this one."""
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
        """Of a step that moved nothing, ranges learn nothing either."""
        for layer in self.layers:
            layer.pending = None


def observers(config: TrainConfig, network: nn.Module, ranks: Ranks) -> Observers | None:
    if config.run.qat == "none":
        return None
    return Observers(network, round(config.qat.freeze * (config.recorded.scheduled_steps or config.run.steps)), ranks)
