"""Calibrate static scales for the inputs of a network's linear layers, on representative text."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from quant.config import QuantError
from quant.int8 import AFFINE, Grid
from quant.int8_linear import StaticInput
from quant.linear import quantizable_layers
from quant.nf4 import describe_non_finite
from quant.observe import OBSERVERS, Observer

Batch = TypeVar("Batch")


@torch.no_grad()
def observe(
    network: nn.Module,
    batches: Iterable[Batch],
    run: Callable[[nn.Module, Batch], object] = lambda network, batch: network(**batch),
    *,
    observer: str = "histogram",
    grid: Grid = AFFINE,
    skip: Iterable[str] = ("lm_head",),
) -> dict[str, StaticInput]:
    """Observe the input of each of the `quantizable_layers` over all batches: return path → its scale and zero point.

    run(network, batch) is one forward; padding is observed too. observer: one of `quant.observe.OBSERVERS`. An input that is
    always 0 gets the least scale, 2^-23. The network is in eval mode meanwhile, and is unchanged afterwards.

    Errors (QuantError): no batch, or only empty ones; a layer that no batch reached, or whose weight or input is inf or NaN, by
    name.
    """
    if observer not in OBSERVERS:
        raise QuantError(f"unknown observer {observer!r}; observers: {', '.join(OBSERVERS)}")
    names = network.published() if hasattr(network, "published") else {}
    layers = quantizable_layers(network, skip, names)
    if not layers:
        raise QuantError(f"no linear layer to observe in a {type(network).__name__}, with skip={tuple(skip)}")
    for path, layer in layers.items():  # before the forwards, or the next layer's input would be named
        if not bool(layer.weight.isfinite().all()):
            raise QuantError(f"{names.get(path, path)}.weight: {describe_non_finite(layer.weight.detach())}")
    watched = {path: OBSERVERS[observer](grid) for path in layers}
    modes, seen = {module: module.training for module in network.modules()}, 0
    with ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(observing_hook(path, watched[path])).remove)
        network.eval()
        try:
            for batch in batches:
                run(network, batch)
                seen += 1
        finally:
            for module, training in modes.items():
                module.training = training
    if not seen:
        raise QuantError("the calibration set is empty")
    return {path: to_static_input(path, each, grid) for path, each in watched.items()}


def observing_hook(path: str, observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a forward pre-hook that observes the layer's input."""
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        try:
            observer.observe(inputs[0].detach())
        except QuantError as error:
            raise QuantError(f"the input of {path}: {error}") from None

    return hook


def to_static_input(path: str, observer: Observer, grid: Grid) -> StaticInput:
    """Return the static input of an observed range."""
    try:
        scale, zero = observer.scales()
    except QuantError as error:
        raise QuantError(f"the input of {path}: {error}") from None
    return StaticInput(scale, zero, grid)


observe_inputs = observe  # its name in `from quant import …`
