"""Log-probabilities and entropies of tokens from hidden states and the head's matrix, at a temperature.

The logits of all rows are never in memory at once where they are large. The forward pass works on chunks of rows; the backward
pass computes each chunk's logits again, or finds them kept where all of them are small.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from data.transforms.causal import IGNORE
from train.losses.chunked import CHUNK_BYTES, FP16_SCALE, add_matmul_, matmul_dtype, wide_matmul
from train.losses.cross_entropy import flatten_rows
from train.losses.sequence import CHUNK_ROWS
from train.runs.errors import TrainError

KEPT_BYTES = 128 << 20  # of all rows' log-probabilities that stay for the backward pass: its products are a third less then


def token_log_probs_and_entropy_reference(
    hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, bias_V: Tensor | None = None, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log p of each label and the entropy of its distribution, B T, 0 where it is -100, from all B × T × V logits."""
    logits_BTV = F.linear(hidden_BTD, weight_VD, bias_V)
    log_p_BTV = (logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)) / temperature).log_softmax(-1)
    is_scored_BT = labels_BT != IGNORE
    log_p_BT = log_p_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    entropy_BT = -(log_p_BTV.exp() * log_p_BTV).sum(-1)
    return log_p_BT.where(is_scored_BT, 0), entropy_BT.where(is_scored_BT, 0)


def token_log_probs_and_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    bias_V: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log p of each label, and the entropy of the distribution that it is drawn from, `chunk_rows` rows at a time.

        p = softmax((W h + bias) / temperature)      log p_label      H = −Σ_v p_v log p_v

    hidden B T D, weight V D, labels B T in int64, already shifted. Returns (log p, H), B T each, in nats, in float32 or wider;
    0 where the label is -100, whose rows are not read. The temperature is that of sampling: otherwise the ratio of the first
    step is not 1. Gradients of both by hidden states, matrix and bias; none of their gradients. Values have the same bits with
    a gradient and without. Under autocast the products are in its dtype. chunk_rows: by default 32 MiB of logits, at least 64
    rows (GPU: 1,024).

    Errors (ValueError): a temperature that is not above 0; chunk_rows below 1; shapes that do not match, labels not in int64;
    (TypeError): dtypes that differ without autocast.
    """
    if not 0 < temperature < math.inf:
        raise TrainError(f"temperature={temperature}: expected a finite number above 0, that of sampling")
    hidden_ND, labels_N = flatten_rows(hidden_BTD, labels_BT)
    if chunk_rows is None:  # the same with a gradient and without, so that the ratio of policy and old policy is exactly 1
        chunk_rows = max(CHUNK_ROWS.get(hidden_BTD.device.type, 1024), CHUNK_BYTES // (4 * weight_VD.size(0)))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1")
    options = {"temperature": temperature, "chunk_rows": chunk_rows, "dtype": matmul_dtype(hidden_BTD, weight_VD)}
    options["is_learned"] = torch.is_grad_enabled()  # inside a Function it never is
    log_p_N, entropy_N = ChunkedEntropy.apply(hidden_ND, weight_VD, labels_N, bias_V, options)
    return log_p_N.view(labels_BT.shape), entropy_N.view(labels_BT.shape)


def log_softmax_rows(chunk_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) of a chunk, R V, in float32 or wider."""
    logits_RV = F.linear(chunk_RD, weight_VD, bias_V)
    x_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).div_(temperature)
    return x_RV.sub_(x_RV.logsumexp(-1, keepdim=True))


class ChunkedEntropy(torch.autograd.Function):
    """log p of each label and entropy of each row, N; both 0 where the label is -100."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, bias_V, options):
        ctx.set_materialize_grads(False)
        ctx.options, ctx.log_p_chunks = options, []  # R V each, where they stay
        dtype, temperature, chunk_rows = options["dtype"], options["temperature"], options["chunk_rows"]
        matrix_VD, shift_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)  # once, not chunk by chunk
        rows_N = (labels_N != IGNORE).nonzero()[:, 0]
        log_p_N = hidden_ND.new_zeros(len(labels_N), dtype=torch.promote_types(dtype, torch.float32))
        entropy_N = torch.zeros_like(log_p_N)
        size = len(rows_N) * len(weight_VD) * log_p_N.element_size()
        keeps = options["is_learned"] and any(ctx.needs_input_grad) and (len(rows_N) <= chunk_rows or size <= KEPT_BYTES)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows_R in rows_N.split(chunk_rows):
                log_p_RV = log_softmax_rows(hidden_ND[rows_R].to(dtype), matrix_VD, shift_V, temperature)
                log_p_N[rows_R] = log_p_RV.gather(-1, labels_N[rows_R, None])[:, 0]
                entropy_N[rows_R] = -log_p_RV.exp().mul_(log_p_RV).sum(-1)
                if keeps:
                    ctx.log_p_chunks.append(log_p_RV)
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, bias_V, rows_N, entropy_N)
        return log_p_N, entropy_N

    @staticmethod
    def backward(ctx, dlog_p_N, dentropy_N):
        if torch.is_grad_enabled():  # create_graph: the gradients would be taken for constants
            raise RuntimeError("chunked log-probabilities and entropies have no gradients of their gradients")
        hidden_ND, weight_VD, labels_N, bias_V, rows_N, entropy_N = ctx.saved_tensors
        dtype, temperature, chunk_rows = ctx.options["dtype"], ctx.options["temperature"], ctx.options["chunk_rows"]
        matrix_VD, shift_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        inputs, needs = (hidden_ND, weight_VD, bias_V), (ctx.needs_input_grad[place] for place in (0, 1, 3))
        wide = entropy_N.dtype
        gradients = [torch.zeros_like(x, dtype=wide) if need else None for x, need in zip(inputs, needs, strict=True)]
        dhidden_ND, dweight_VD, dbias_V = gradients
        factors = [each_N.abs() for each_N in (dlog_p_N, dentropy_N) if each_N is not None]
        unit = torch.cat([*factors, entropy_N.new_full((1,), torch.finfo(wide).tiny)]).amax()  # 16 bits hold factors up to 1
        unit = unit / FP16_SCALE if dtype == torch.float16 else unit
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for number, rows_R in enumerate(rows_N.split(chunk_rows)):
                chunk_RD = hidden_ND[rows_R].to(dtype)
                if not ctx.log_p_chunks:
                    log_p_RV = log_softmax_rows(chunk_RD, matrix_VD, shift_V, temperature)
                elif dentropy_N is not None:  # is written into, and a second backward pass reads it again
                    log_p_RV = ctx.log_p_chunks[number].clone()
                else:
                    log_p_RV = ctx.log_p_chunks[number]
                upstream = (None if each_N is None else each_N[rows_R, None] / unit for each_N in (dlog_p_N, dentropy_N))
                dlogits_RV = logits_gradient_(log_p_RV, labels_N[rows_R], entropy_N[rows_R, None], *upstream).to(dtype)
                if dhidden_ND is not None:
                    dhidden_ND[rows_R] = wide_matmul(dlogits_RV, matrix_VD)
                if dweight_VD is not None:
                    add_matmul_(dweight_VD, dlogits_RV, chunk_RD)
                if dbias_V is not None:
                    dbias_V += dlogits_RV.sum(0, dtype=wide)
        hidden, weight, bias = (
            None if gradient is None else gradient.mul_(unit / temperature).to(x.dtype)
            for gradient, x in zip(gradients, inputs, strict=True)
        )
        return hidden, weight, None, bias, None


def logits_gradient_(
    log_p_RV: Tensor, labels_R: Tensor, entropy_R1: Tensor, of_log_p_R1: Tensor | None, of_entropy_R1: Tensor | None
) -> Tensor:
    """Return the gradient by logits / temperature, R V, from those by log p of the label and by H; with the latter in place of
    `log_p_RV`.

        ∂ log p_y / ∂ x_v = [v = y] − p_v          ∂H / ∂ x_v = −p_v (log p_v + H)
    """
    p_RV = log_p_RV.exp()
    if of_entropy_R1 is None:
        gradient_RV = p_RV.mul_(-of_log_p_R1)
    else:
        factor_RV = log_p_RV.add_(entropy_R1).mul_(of_entropy_R1)
        factor_RV = factor_RV if of_log_p_R1 is None else factor_RV.add_(of_log_p_R1)
        gradient_RV = factor_RV.mul_(p_RV).neg_()
    if of_log_p_R1 is not None:
        gradient_RV[torch.arange(len(labels_R), device=labels_R.device), labels_R] += of_log_p_R1[:, 0]
    return gradient_RV
