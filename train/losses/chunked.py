"""Cross-entropy from hidden states and the head's matrix, a chunk of rows at a time: N × V logits are never in memory at once.

For 8,192 rows and Llama 3's 128,256 tokens those are 4.2 GB in float32, three times over at the peak of the reference
implementation. Here the logits of one chunk of rows are computed, replaced by their own gradient in place, multiplied into the
gradients of hidden states and matrix, and overwritten by the next chunk. The gradient of a sum needs nothing from other rows
but a factor, which the backward pass brings. So gradients are computed in the forward pass, with the three products that the
reference implementation takes; recomputing the logits in the backward pass would be a fourth.

Source: Wijmans et al. 2024, arXiv 2411.09009 (which recomputes), and Hsu et al. 2024, arXiv 2410.10989, section 3.2 (gradients
in the forward pass). Unlike there, the gradient of the matrix is summed in float32 in every number format.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from data.transforms.causal import IGNORE
from train.losses.cross_entropy import flatten_rows

CHUNK_BYTES = 2**25  # float32 logits of a chunk; more than a CPU's cache holds make it slower, not faster
CHUNK_ROWS = {"cpu": 512, "cuda": 1024}  # at least: each chunk reads and writes the whole gradient of the matrix
FP16_SCALE = 2.0**12  # float16 ends at 6e-8, above most probabilities; a logit's gradient is at most 1 + 2 z lse


def row_loss_(logits_RV: Tensor, labels_R: Tensor, *, smoothing: float, z_loss: float, scale: float | None) -> Tensor:
    """Return each row's loss in float32 or wider; with a `scale`, replace the logits by scale × their gradient, in place.

        ∂loss / ∂logit_v = p_v (1 + 2 z_loss lse) - smoothing / V - (1 - smoothing) [v = y]

    Without a scale the logits are undefined afterwards. See `cross_entropy_reference` for the loss.
    """
    x_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    label_R = x_RV.gather(-1, labels_R[:, None])[:, 0]
    mean_R = x_RV.mean(-1) if smoothing else 0.0
    max_R1 = x_RV.amax(-1, keepdim=True)
    sum_R1 = x_RV.sub_(max_R1).exp_().sum(-1, keepdim=True)
    lse_R1 = sum_R1.log() + max_R1
    lse_R = lse_R1[:, 0]
    loss_R = lse_R - (1 - smoothing) * label_R - smoothing * mean_R + z_loss * lse_R.square()
    if scale is not None:
        x_RV.mul_(scale * (1 + 2 * z_loss * lse_R1) / sum_R1)
        if smoothing:
            x_RV.sub_(scale * smoothing / x_RV.size(-1))
        x_RV[torch.arange(len(labels_R), device=labels_R.device), labels_R] -= scale * (1 - smoothing)
        logits_RV.copy_(x_RV)  # no work where they are the same tensor
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
    row_loss_: Callable[..., Tensor] = row_loss_,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy as `linear_cross_entropy` does, `chunk_rows` rows of logits at a time.

    Returns (sum, number of scored labels); shapes, labels and units are those of `linear_cross_entropy`. `chunk_rows`: by
    default 32 MiB of logits, at least 512 rows (GPU: 1,024). Under autocast the products are in its dtype, as the reference
    implementation's are. Gradients are in float32 or wider until the backward pass has multiplied them by the upstream
    gradient, so that none is lost before float16's loss scale. A second backward pass through one call (retain_graph)
    recomputes them.

    Errors: `chunk_rows` below 1, shapes that do not match (ValueError); hidden states and a matrix of different dtypes without
    autocast (TypeError); gradients of gradients (RuntimeError).
    """
    if chunk_rows is None:
        chunk_rows = max(CHUNK_ROWS.get(hidden.device.type, 1024), CHUNK_BYTES // (4 * weight_VD.size(0)))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1")
    hidden_ND, labels_N = flatten_rows(hidden, labels)
    inputs = hidden_ND, weight_VD, labels_N, bias_V
    options = {"smoothing": smoothing, "z_loss": z_loss, "chunk_rows": chunk_rows, "row_loss_": row_loss_}
    options["dtype"] = matmul_dtype(hidden, weight_VD)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        total = ChunkedCrossEntropy.apply(*inputs, options)
    else:
        loss_N, _ = loss_and_gradients(*inputs, needs_grad=(False, False, False), **options)
        total = loss_N.sum()
    return total, (labels_N != IGNORE).sum()


def triton_linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Run `chunked_linear_cross_entropy` with Triton's kernel for the rows of a chunk; needs a GPU."""
    from train.losses.kernels.cross_entropy import row_loss_  # here: triton is imported when a kernel is first used

    return chunked_linear_cross_entropy(hidden, weight_VD, labels, bias_V, row_loss_=row_loss_, **options)


def matmul_dtype(hidden: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on, which leaves float64 alone; else the dtype of both."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight_VD.dtype:
        raise TypeError(f"hidden states in {hidden.dtype} and a matrix in {weight_VD.dtype} are multiplied under autocast only")
    return hidden.dtype


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of losses; its gradients are computed in the forward by `loss_and_gradients`."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, bias_V, options):
        needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, bias_V)
        ctx.options = options | {"needs_grad": needs_grad}
        loss_N, ctx.gradients = loss_and_gradients(hidden_ND, weight_VD, labels_N, bias_V, **ctx.options)
        return loss_N.sum()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph: the gradients would be taken for constants
            raise RuntimeError("the chunked loss has no gradients of its gradients; the plain one has")
        gradients, ctx.gradients = ctx.gradients, None  # dropped, since they are scaled in place
        hidden_ND, weight_VD, labels_N, bias_V = ctx.saved_tensors
        if gradients is None:
            _, gradients = loss_and_gradients(hidden_ND, weight_VD, labels_N, bias_V, **ctx.options)
        hidden, weight, bias = (
            None if gradient is None else gradient.mul_(upstream).to(x.dtype)
            for gradient, x in zip(gradients, (hidden_ND, weight_VD, bias_V), strict=True)
        )
        return hidden, weight, None, bias, None


@torch.no_grad()
def loss_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None,
    *,
    needs_grad: tuple[bool, bool, bool],
    dtype: torch.dtype,
    chunk_rows: int,
    row_loss_: Callable[..., Tensor],
    smoothing: float,
    z_loss: float,
    upstream_N: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return the loss of each scored row, and the gradients of Σ upstream · loss by hidden states, matrix and bias, float32 or
    wider; None where not needed. upstream_N: a factor of each row, scored or not; None: 1."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = hidden_ND, weight_VD, bias_V
    gradients = [torch.zeros_like(x, dtype=wide) if need else None for x, need in zip(inputs, needs_grad, strict=True)]
    dhidden_ND, dweight_VD, dbias_V = gradients
    scale = None if not any(needs_grad) else FP16_SCALE if dtype == torch.float16 else 1.0
    weight_VD, bias_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)  # once, not chunk by chunk
    rows_N = (labels_N != IGNORE).nonzero()[:, 0]
    loss_N = hidden_ND.new_empty(len(rows_N), dtype=wide)
    buffer_RV = hidden_ND.new_empty(min(chunk_rows, len(rows_N)), len(weight_VD), dtype=dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for rows_R, loss_R in zip(rows_N.split(chunk_rows), loss_N.split(chunk_rows), strict=True):
            chunk_RD, labels_R = hidden_ND[rows_R].to(dtype), labels_N[rows_R]
            logits_RV = linear_into(chunk_RD, weight_VD, bias_V, out=buffer_RV[: len(rows_R)])
            loss_R.copy_(row_loss_(logits_RV, labels_R, smoothing=smoothing, z_loss=z_loss, scale=scale))
            if dhidden_ND is not None:
                dhidden_ND[rows_R] = wide_matmul(logits_RV, weight_VD) / scale
            if upstream_N is not None:  # on R × D numbers, of which there are fewer than logits
                upstream_R1 = upstream_N[rows_R, None]
                chunk_RD = (chunk_RD * upstream_R1).to(dtype)
                if dhidden_ND is not None:
                    dhidden_ND[rows_R] *= upstream_R1
            if dweight_VD is not None:
                add_matmul_(dweight_VD, logits_RV, chunk_RD)
            if dbias_V is not None:
                dbias_V += logits_RV.sum(0, dtype=wide) if upstream_N is None else upstream_N[rows_R] @ logits_RV.to(wide)
    if scale not in (None, 1.0):
        for gradient in (dweight_VD, dbias_V):
            if gradient is not None:
                gradient /= scale
    return loss_N, (dhidden_ND, dweight_VD, dbias_V)


def linear_into(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor) -> Tensor:
    """Compute F.linear into `out`; in 16 bits it rounds once, after the bias."""
    if bias_V is None:
        return torch.mm(x_RD, weight_VD.T, out=out)
    return torch.addmm(bias_V, x_RD, weight_VD.T, out=out)


def add_matmul_(sum_VD: Tensor, a_RV: Tensor, b_RD: Tensor) -> None:
    """Compute sum += aᵀ b; from 16 bits to a wider sum by blocks of V, since the product needs memory of its own there."""
    if a_RV.dtype == sum_VD.dtype:
        sum_VD.addmm_(a_RV.T, b_RD)
        return
    block = max(1, CHUNK_BYTES // (4 * b_RD.size(1)))
    for sum_KD, a_RK in zip(sum_VD.split(block), a_RV.split(block, dim=1), strict=True):
        sum_KD += wide_matmul(a_RK.T, b_RD)


def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 or wider. Every product accumulates in float32 or wider, but a 16-bit one on a CPU rounds its
    result, and float16 would overflow: there the factors are converted to float32 first."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else (a @ b).float()
