"""Cross-entropy from hidden states and the head's matrix, a few rows at a time: N × V logits never stand in memory.

For 8,192 rows and Llama 3's 128,256 words those are 4.2 GB in float32, three times over at the peak of the plain twin. Here
one chunk of rows has its logits made, turned into their own gradient in place, multiplied into the gradients of hidden states
and matrix, and overwritten by the next: the gradient of a sum needs nothing from other rows but a factor, which the
backward pass brings. So gradients are made in the forward pass, with the three products that the plain twin takes; making the
logits again in the backward pass would be a fourth.

After the idea of Wijmans et al. 2024, arXiv 2411.09009 (which recomputes), and Hsu et al. 2024, arXiv 2410.10989, section 3.2
(gradients in the forward pass). Unlike there, the gradient of the matrix is summed in float32 in every number format.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from data.transforms.causal import IGNORE
from train.losses.cross_entropy import flattened

CHUNK_BYTES = 2**25  # of float32 logits; more of them than a CPU's cache holds make a chunk slower, not faster
CHUNK_ROWS = {"cpu": 512, "cuda": 1024}  # but never fewer: each chunk reads and writes the whole gradient of the matrix
FP16_SCALE = 2.0**12  # float16 has nothing below 6e-8, where most probabilities are; a logit's gradient is at most 1 + 2 z lse


def score_rows(logits_RV: Tensor, labels_R: Tensor, *, smoothing: float, z_loss: float, scale: float | None) -> Tensor:
    """Each row's loss in float32 or wider; `scale` given, the logits become scale × their gradient, in place:

        ∂loss / ∂logit_v = p_v (1 + 2 z_loss lse) - smoothing / V - (1 - smoothing) [v = y]

    Without a scale what is left in the logits means nothing. See `cross_entropy_reference` for the loss.
    """
    x_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    label_R = x_RV.gather(-1, labels_R[:, None])[:, 0]
    mean_R = x_RV.mean(-1) if smoothing else 0.0
    top_R1 = x_RV.amax(-1, keepdim=True)
    total_R1 = x_RV.sub_(top_R1).exp_().sum(-1, keepdim=True)
    lse_R1 = total_R1.log() + top_R1
    lse_R = lse_R1[:, 0]
    loss_R = lse_R - (1 - smoothing) * label_R - smoothing * mean_R + z_loss * lse_R.square()
    if scale is not None:
        x_RV.mul_(scale * (1 + 2 * z_loss * lse_R1) / total_R1)
        if smoothing:
            x_RV.sub_(scale * smoothing / x_RV.size(-1))
        x_RV[torch.arange(len(labels_R), device=labels_R.device), labels_R] -= scale * (1 - smoothing)
        logits_RV.copy_(x_RV)  # nothing to do where they are the same
    return loss_R


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    bias_V: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    score: Callable[..., Tensor] = score_rows,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with `chunk_rows` rows of logits at a time: 32 MiB of them by default, or 512 rows (GPU: 1,024).

    Under autocast the products are in its dtype, as the plain twin's are. Gradients are kept in float32 or wider until the
    backward pass has multiplied them by the factor that comes from above, so that none is lost before float16's loss scale.
    A second backward pass through one call (retain_graph) computes them anew; gradients of gradients there are none.
    """
    if chunk_rows is None:
        chunk_rows = max(CHUNK_ROWS.get(hidden.device.type, 1024), CHUNK_BYTES // (4 * weight_VD.size(0)))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} is not a number of rows")
    hidden_ND, labels_N = flattened(hidden, labels)
    inputs = hidden_ND, weight_VD, labels_N, bias_V
    options = {"smoothing": smoothing, "z_loss": z_loss, "chunk_rows": chunk_rows, "score": score}
    options["dtype"] = product_dtype(hidden, weight_VD)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        total = _Chunked.apply(*inputs, options)
    else:
        total, _ = walk(*inputs, wanted=(False, False, False), **options)
    return total, (labels_N != IGNORE).sum()


def triton_linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """`chunked_linear_cross_entropy` with Triton's kernel for the rows of a chunk; needs a GPU."""
    from train.losses.kernels.cross_entropy import score_rows  # here: triton is imported when a kernel is first wanted

    return chunked_linear_cross_entropy(hidden, weight_VD, labels, bias_V, score=score_rows, **options)


def product_dtype(hidden: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Autocast's where it is on, which leaves float64 alone; else that of both."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight_VD.dtype:
        raise TypeError(f"hidden states in {hidden.dtype} and a matrix in {weight_VD.dtype} have a product under autocast only")
    return hidden.dtype


class _Chunked(torch.autograd.Function):
    """The sum alone; `walk` with what autograd wants of it."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, bias_V, options):
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, bias_V)
        ctx.options = options | {"wanted": wanted}
        total, ctx.gradients = walk(hidden_ND, weight_VD, labels_N, bias_V, **ctx.options)
        return total

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph: what follows would pass for a constant
            raise RuntimeError("the chunked loss has no gradients of its gradients; the plain one has")
        gradients, ctx.gradients = ctx.gradients, None  # taken, since they are scaled in place
        hidden_ND, weight_VD, labels_N, bias_V = ctx.saved_tensors
        if gradients is None:
            _, gradients = walk(hidden_ND, weight_VD, labels_N, bias_V, **ctx.options)
        hidden, weight, bias = (
            None if gradient is None else gradient.mul_(upstream).to(x.dtype)
            for gradient, x in zip(gradients, (hidden_ND, weight_VD, bias_V), strict=True)
        )
        return hidden, weight, None, bias, None


@torch.no_grad()
def walk(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None,
    *,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    chunk_rows: int,
    score: Callable[..., Tensor],
    smoothing: float,
    z_loss: float,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(sum of losses, its gradients by hidden states, matrix and bias, each None where not wanted), float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = hidden_ND, weight_VD, bias_V
    gradients = [torch.zeros_like(x, dtype=wide) if want else None for x, want in zip(inputs, wanted, strict=True)]
    dhidden_ND, dweight_VD, dbias_V = gradients
    scale = None if not any(wanted) else FP16_SCALE if dtype == torch.float16 else 1.0
    weight_VD, bias_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)  # once, not chunk by chunk
    rows_N = (labels_N != IGNORE).nonzero()[:, 0]
    loss_N = hidden_ND.new_empty(len(rows_N), dtype=wide)
    buffer_RV = hidden_ND.new_empty(min(chunk_rows, len(rows_N)), len(weight_VD), dtype=dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for rows_R, loss_R in zip(rows_N.split(chunk_rows), loss_N.split(chunk_rows), strict=True):
            chunk_RD, labels_R = hidden_ND[rows_R].to(dtype), labels_N[rows_R]
            logits_RV = linear(chunk_RD, weight_VD, bias_V, out=buffer_RV[: len(rows_R)])
            loss_R.copy_(score(logits_RV, labels_R, smoothing=smoothing, z_loss=z_loss, scale=scale))
            if dhidden_ND is not None:
                dhidden_ND[rows_R] = product(logits_RV, weight_VD) / scale
            if dweight_VD is not None:
                add_product_(dweight_VD, logits_RV, chunk_RD)
            if dbias_V is not None:
                dbias_V += logits_RV.sum(0, dtype=wide)
    if scale not in (None, 1.0):
        for gradient in (dweight_VD, dbias_V):
            if gradient is not None:
                gradient /= scale
    return loss_N.sum(), (dhidden_ND, dweight_VD, dbias_V)


def linear(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor) -> Tensor:
    """F.linear into memory that is there; in 16 bits it rounds once, after the bias."""
    if bias_V is None:
        return torch.mm(x_RD, weight_VD.T, out=out)
    return torch.addmm(bias_V, x_RD, weight_VD.T, out=out)


def add_product_(sum_VD: Tensor, a_RV: Tensor, b_RD: Tensor) -> None:
    """sum += aᵀ b. From 16 bits to a wider sum by blocks of V, for there the product stands by itself first."""
    if a_RV.dtype == sum_VD.dtype:
        sum_VD.addmm_(a_RV.T, b_RD)
        return
    block = max(1, CHUNK_BYTES // (4 * b_RD.size(1)))
    for sum_KD, a_RK in zip(sum_VD.split(block), a_RV.split(block, dim=1), strict=True):
        sum_KD += product(a_RK.T, b_RD)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 or wider. Sums are wide inside every product; that of 16 bits on a CPU gives them back rounded, which
    float16 would overflow in: there the factors are widened instead."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else (a @ b).float()
