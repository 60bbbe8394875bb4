"""Normalization over the last axis, D."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm_reference(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis: y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance.

    x … D, weight and bias D → … D; any dtype.
    Source: Ba et al. 2016, arXiv 1607.06450.
    """
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D
    return y if bias_D is None else y + bias_D


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis: y = x / sqrt(mean(x²) + eps) * weight; x … D, weight D → … D.

    The statistics are computed in float32 or wider, and the result is cast back to x's dtype before the weight, as in LLaMA's
    own code. transformers computes them in float32 even for a float64 x; this does not.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight_D


class LayerNorm(nn.Module):
    """Layer norm by torch's fused kernel; equation, shapes and source: `layer_norm_reference`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm by torch's own operator (fused on a GPU); equation, shapes and source: `rms_norm_reference`.

    The result has the weight's dtype. (T5's residual stream in float16 is wider than the weights: it is cast down here.)
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, None, self.eps).to(self.weight.dtype) * self.weight


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
