"""Quantization-aware training: a linear layer that computes in training, bit for bit, what its quantized form will compute.

    y = x̂ Ŵᵀ + b        dx̂ = dy Ŵ        dŴ = dyᵀ x̂        db = Σ dy

x̂ and Ŵ are x and W rounded to integers times a scale. y is the product of the integers themselves (`quant.int8_product`). Its
gradient passes straight through the roundings to x and W (`quant.fake`), and is 0 where a number was clipped. W stays a
parameter in its own dtype, which small steps can change.

    weights    symmetric. The scale follows from the present largest magnitude, which itself counts as clipped where it rounds
               to high + 1 (as in torch.ao); or it is learned, and starts at 2 mean|w| / √high of the weights that share it
    inputs     INT8. dynamic: symmetric, one scale for each row from the row itself. The scale moves with the row's largest
               number, so x has a gradient everywhere, as in `Int8Linear`. static: affine, from an observed range; or learned:
               it starts there and keeps the zero point

The learned parameter is the logarithm of a scale: Adam's steps all have one size, which is then relative to the scale. Its
gradient is multiplied by 1/√(n high), n the weights that share it, or the numbers of a row of x. A scale below EPS counts as
EPS, and `commit` raises it to twice that.
Source: Jacob et al. 2018, arXiv 1712.05877, section 3; Esser et al. 2020, arXiv 1902.08153, section 2; the logarithm: Jain et
al. 2020, arXiv 1903.08066.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.config import QatConfig, QuantError
from quant.fake import fake_quantize
from quant.int8 import AFFINE, EPS, Codes, Grid, Int8Tensor, check, min_max, scales_for
from quant.int8_linear import DynamicInput, Input, Int8Linear, StaticInput, with_non_finite_rows
from quant.int8_product import multiply_int8
from quant.linear import quantizable_layers
from quant.nf4 import describe_non_finite
from quant.observe import OBSERVERS
from quant.product import compute_dtype

Network = TypeVar("Network", bound=nn.Module)
LEAST_LOG_SCALE = math.log(2 * EPS)  # twice EPS: exp rounds, and the scale must stay above EPS


class QatLinear(nn.Module):
    """A linear layer in quantization-aware training. `weight`, O × I, and `bias` are the parameters of `linear`.

    weight_log_scale: float32, 1 × 1, O × 1 or O × G, and input_log_scale: float32, 1 × 1, are parameters, or None where they
    are not learned. Static inputs only: input_zero: int32, 1 × 1, the learned scale's zero point; observer; frozen: a bool
    buffer. pending: (minimum, maximum) of the inputs since the last `commit`; not a buffer: it is neither saved nor shared
    among ranks.
    """

    def __init__(self, linear: nn.Linear, settings: QatConfig, bits: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features, self.in_features = self.weight.shape
        self.bits, self.grid, self.granularity = bits, Grid.of(bits), settings.granularity
        self.kind = {"dtype": self.weight.dtype, "bits": bits, "granularity": settings.granularity}
        self.groups = check(self.weight, settings.granularity, settings.group_size)
        self.rounded_input, static = INPUTS[settings.inputs], settings.inputs == "static"
        device = self.weight.device
        self.weight_log_scale = nn.Parameter(self.first_scale().log()) if settings.learned else None
        self.input_log_scale = nn.Parameter(torch.zeros(1, 1, device=device)) if settings.learned and static else None
        self.register_buffer("input_zero", None if self.input_log_scale is None else torch.zeros(1, 1, device=device).int())
        self.observer = OBSERVERS[settings.observer](AFFINE).to(device) if static else None
        self.register_buffer("frozen", torch.tensor(False, device=device) if static else None)
        self.pending: tuple[Tensor, Tensor] | None = None
        self.train(linear.training)

    @torch.compiler.disable  # as in Int8Linear.multiply
    def forward(self, x: Tensor) -> Tensor:
        if x.size(-1) != self.in_features:
            raise ValueError(f"x of {tuple(x.shape)} does not go with a weight of {tuple(self.weight.shape)}")
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            near_NI, codes = self.rounded_input(self, x.reshape(-1, x.size(-1)))
            near_OI, w = self.rounded_weight()
            y_NO = QatProduct.apply(near_NI, near_OI, None if self.bias is None else self.bias.float(), codes, w)
            return y_NO.to(dtype).view(*x.shape[:-1], self.out_features)

    # ---- the weight

    def rounded_weight(self) -> tuple[Tensor, Int8Tensor]:
        """Return (Ŵ with its gradient, Ŵ in integers)."""
        scale, zero = self.weight_scales()
        factor = scale_gradient_factor(self.weight.numel() // scale.numel(), self.grid)
        grouped = self.weight.unflatten(1, (self.groups, -1))
        near, codes = fake_quantize(grouped, scale[:, :, None], zero[:, :, None], self.grid, factor)
        codes = codes.flatten(1).to(torch.int8)
        return near.flatten(1), Int8Tensor(codes, scale.detach(), **self.kind)

    def weight_scales(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero point): learned, or as `quant.int8.quantize` computes them."""
        if self.weight_log_scale is not None:
            scale = self.weight_log_scale.float().exp().clamp(min=EPS)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        low, high = min_max(self.weight.detach(), self.groups)
        if self.granularity == "tensor":
            low, high = low.amin().view(1, 1), high.amax().view(1, 1)
        return scales_for(low, high, self.grid)

    @torch.no_grad()
    def first_scale(self) -> Tensor:
        mean = self.weight.float().abs().unflatten(1, (self.groups, -1)).mean(2)
        mean = mean.mean().view(1, 1) if self.granularity == "tensor" else mean
        return (2 * mean / math.sqrt(self.grid.high)).clamp(min=EPS)

    # ---- static inputs

    @property
    def is_observed(self) -> bool:
        """True once a range was observed."""
        return bool(self.observer.low <= self.observer.high)

    def input_scales(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero point), both 1 × 1. Errors (QuantError): nothing was observed."""
        if not self.is_observed:
            raise QuantError(NOT_OBSERVED)
        if self.input_log_scale is not None:
            return self.input_log_scale.float().exp().clamp(min=EPS), self.input_zero
        scale, zero = self.observer.scales()
        return scale.view(1, 1), zero.view(1, 1)

    @torch.no_grad()
    def observe(self, x_NI: Tensor) -> None:
        """Record the minimum and maximum of x for `commit`. A recomputed forward changes nothing."""
        low, high = x_NI.float().aminmax()
        if not self.is_observed:
            self.begin(low, high)
        if not self.frozen:
            before = self.pending or (low, high)
            self.pending = torch.minimum(before[0], low), torch.maximum(before[1], high)

    def begin(self, low: Tensor, high: Tensor) -> None:
        """Set the range from the first input, and a learned scale's first value from that."""
        if not bool(low.isfinite() & high.isfinite()):
            raise QuantError(f"the first input, which sets the range, holds numbers from {low:g} to {high:g}")
        self.observer.update(low, high)
        if self.input_log_scale is not None:
            scale, zero = self.observer.scales()
            self.input_log_scale.copy_(scale.log())
            self.input_zero.copy_(zero)

    # ---- between steps

    @torch.no_grad()
    def commit(self) -> None:
        """Update the observer with the inputs since the last call, and clamp learned scales above EPS; call it after each step.

        A minimum or maximum that is inf or NaN is dropped: no optimizer uses such a step.
        """
        pending, self.pending = self.pending, None
        if pending is not None and bool(torch.stack(pending).isfinite().all()):
            self.observer.update(*pending)
        for log_scale in (self.weight_log_scale, self.input_log_scale):
            if log_scale is not None:
                log_scale.clamp_(min=LEAST_LOG_SCALE)

    def freeze(self) -> None:
        """Stop observing: the range stays."""
        self.pending = None
        if self.frozen is not None:
            self.frozen.fill_(True)

    @torch.no_grad()
    def converted(self) -> Int8Linear:
        """Return the quantized layer. Errors (QuantError): static inputs that were never observed."""
        input: Input = DynamicInput() if self.observer is None else StaticInput(*(part.clone() for part in self.input_scales()))
        return Int8Linear(self.rounded_weight()[1], self.bias, input).train(self.training)

    def extra_repr(self) -> str:
        kind = f"int{self.bits}, a scale for each {self.granularity}"
        inputs = "dynamic" if self.observer is None else "static"
        learned = "" if self.weight_log_scale is None else ", learned scales"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}, {inputs} inputs{learned}"


NOT_OBSERVED = "no input was observed yet, so a static one has no range: run forwards in training mode first"


def scale_gradient_factor(shared: int, grid: Grid) -> float:
    """Return the factor of a learned scale's gradient."""
    return 1 / math.sqrt(shared * grid.high)


def dynamic(layer: QatLinear, x_NI: Tensor) -> tuple[Tensor, Codes]:
    return x_NI, DynamicInput()(x_NI.detach())


def static(layer: QatLinear, x_NI: Tensor) -> tuple[Tensor, Codes]:
    if layer.training and x_NI.numel():
        layer.observe(x_NI.detach())
    scale, zero = layer.input_scales()
    near_NI, codes = fake_quantize(x_NI, scale, zero, AFFINE, scale_gradient_factor(layer.in_features, AFFINE))
    return near_NI, Codes(codes.to(torch.int8), with_non_finite_rows(scale.detach(), x_NI.detach()), zero)


# layer, x: N × I → (x̂, or x to pass the gradient of x̂ on; x̂ in integers)
INPUTS: dict[str, Callable[[QatLinear, Tensor], tuple[Tensor, Codes]]] = {"dynamic": dynamic, "static": static}


class QatProduct(torch.autograd.Function):
    """The integer product, with the gradient of x̂ Ŵᵀ + b. It saves a byte for each number."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, near_NI: Tensor, near_OI: Tensor, b_O: Tensor | None, x: Codes, w: Int8Tensor
    ) -> Tensor:
        ctx.save_for_backward(*x, w.codes, w.scale)  # x̂ and Ŵ are four times as large
        ctx.bits = w.code_bits
        return multiply_int8(x, w, b_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        q_NI, s_N1, z_N1, p_OI, t_OG = ctx.saved_tensors
        dx_NI = dw_OI = db_O = None
        if ctx.needs_input_grad[0]:
            dx_NI = dy_NO @ Int8Tensor(p_OI, t_OG, dtype=torch.float32, bits=ctx.bits).dequantize()
        if ctx.needs_input_grad[1]:
            whole_NI = q_NI.float() if z_N1 is None else q_NI.float() - z_N1
            dw_OI = dy_NO.T @ (whole_NI * s_N1)
        if ctx.needs_input_grad[2]:
            db_O = dy_NO.sum(0)
        return dx_NI, dw_OI, db_O, None, None


# ---- in a network


def qat_layers(network: nn.Module) -> dict[str, QatLinear]:
    """Return path → layer, for all layers of a network that quantization-aware training rounds (`prepare_qat`)."""
    return {path: module for path, module in network.named_modules() if isinstance(module, QatLinear)}


def prepare(network: Network, settings: QatConfig, bits: int = 8, published: Mapping[str, str] | None = None) -> Network:
    """Replace each of the `quant.linear.quantizable_layers` by a `QatLinear`. Returns the network.

    published: our name of a layer → its family's, which `settings.skip` is matched against too; None: the network's own table.
    Errors (QuantError), which leave the network unchanged: it has adapters; nothing to quantize; groups that do not divide a
    layer's rows; inf or NaN in a weight, with the layer's name and the index.
    """
    if getattr(network, "adapters", None):
        raise QuantError("the network has adapters: quantization-aware training trains its own weights")
    if published is None and hasattr(network, "published"):
        published = network.published()
    layers = quantizable_layers(network, settings.skip, published)
    if not layers:
        raise QuantError(f"no linear layer to quantize in a {type(network).__name__}, with skip={settings.skip}")
    for path, layer in layers.items():
        try:
            check(layer.weight, settings.granularity, settings.group_size)
        except QuantError as error:
            raise QuantError(f"{path}.weight: {error}; to leave it as it is: --skip '{re.escape(path)}'") from None
        if layer.weight.is_meta:
            raise QuantError(f"{path}.weight: it has no values yet")
        if not bool(layer.weight.isfinite().all()):
            raise QuantError(f"{path}.weight: {describe_non_finite(layer.weight.detach())}")
    made = {path: QatLinear(layer, settings, bits) for path, layer in layers.items()}
    for path, layer in made.items():
        network.set_submodule(path, layer)
    return network


def convert(network: Network) -> Network:
    """Replace each `QatLinear` by its `Int8Linear`: in eval mode the network's outputs stay the same, bit for bit.

    Errors (QuantError), which leave the network unchanged: a layer whose input was never observed, by name.
    """
    made = {}
    for path, layer in qat_layers(network).items():
        try:
            made[path] = layer.converted()
        except QuantError as error:
            raise QuantError(f"{path}: {error}") from None
    for path, layer in made.items():
        network.set_submodule(path, layer)
    return network


@contextmanager
def converted(network: Network) -> Iterator[Network]:
    """Convert the network's layers within a `with` block, to save it."""
    layers = qat_layers(network)
    try:
        yield convert(network)
    finally:
        for path, layer in layers.items():
            network.set_submodule(path, layer)


prepare_qat, convert_qat = prepare, convert  # their names in `from quant import …`
