"""Normalization of the last axis, D: each position by itself."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm_reference(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance, over the last axis.

    Source: Ba et al. 2016, arXiv 1607.06450.
    """
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D
    return y if bias_D is None else y + bias_D


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight, over the last axis.

    The statistics are taken in float32 or wider, then cast back to x's dtype before the weight, as LLaMA's own code
    does. transformers takes them in float32 even where x is float64; this does not.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight_D


class LayerNorm(nn.Module):
    """`layer_norm_reference` by torch's fused kernel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """`rms_norm_reference` by torch's own operator (fused on a GPU); the result has the weight's dtype.

    (A residual stream that is wider than the weights, as T5's in float16, is narrowed here.)
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
