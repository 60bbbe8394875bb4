"""Log-probabilities of whole sequences from hidden states and the head's matrix: never N × V logits.

The gradient of such a sum depends on what the loss makes of it (of a pair, on the other reply), which is known in the backward
pass alone. Where the head's matrix is trained, each chunk's logits are therefore computed a second time there. Where it is
frozen (an adapter), the forward pass keeps the gradient by the hidden states, and the backward pass multiplies its rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from data.transforms.causal import IGNORE
from train.losses.chunked import CHUNK_BYTES, loss_and_gradients, matmul_dtype, row_loss_
from train.losses.cross_entropy import flatten_rows

CHUNK_ROWS = {"cpu": 64, "cuda": 1024}  # at least: replies of a batch are few, and their logits all that is large


def sequence_log_probs_reference(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    bias_V: Tensor | None = None,
    *,
    token_weights_BT: Tensor | None = None,
) -> Tensor:
    """Return Σ_t w_bt log p(label_bt) of each row over its labels other than -100, B, from all B × T × V logits."""
    logits_BTV = F.linear(hidden_BTD, weight_VD, bias_V)
    log_p_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).log_softmax(-1)
    scored_BT = labels_BT != IGNORE
    log_p_BT = log_p_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0].masked_fill(~scored_BT, 0)
    return (log_p_BT if token_weights_BT is None else log_p_BT * token_weights_BT).sum(-1)


def sequence_log_probs(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    bias_V: Tensor | None = None,
    *,
    token_weights_BT: Tensor | None = None,
    chunk_rows: int | None = None,
    row_loss_=row_loss_,
) -> Tensor:
    """Compute `sequence_log_probs_reference`, `chunk_rows` rows of logits at a time.

        s_b = Σ_t w_bt log softmax(W h_bt + bias)[label_bt]      over labels other than -100

    hidden B T D, weight V D, labels B T in int64, already shifted; token_weights B T, None: 1. Returns B, nats, in float32 or
    wider; 0 for a row without a label. Gradients by hidden states, matrix and bias, none of their gradients. Under autocast
    the products are in its dtype. chunk_rows: by default 32 MiB of logits, at least 64 rows (GPU: 1,024).

    Errors (ValueError): shapes that do not match, labels not in int64; (TypeError): dtypes that differ without autocast.
    """
    options = {"chunk_rows": chunk_rows, "row_loss_": row_loss_}
    log_p_BT = token_log_probs(hidden_BTD, weight_VD, labels_BT, bias_V, **options)
    return (log_p_BT if token_weights_BT is None else log_p_BT * token_weights_BT.to(log_p_BT.dtype)).sum(-1)


def token_log_probs(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    bias_V: Tensor | None = None,
    *,
    chunk_rows: int | None = None,
    row_loss_=row_loss_,
) -> Tensor:
    """Return log p of each label, B T, 0 where it is -100: the terms of `sequence_log_probs`, with its arguments and errors."""
    hidden_ND, labels_N = flatten_rows(hidden_BTD, labels_BT)
    if chunk_rows is None:  # the same with a gradient and without: policy and reference are equal at step 0
        chunk_rows = max(CHUNK_ROWS.get(hidden_BTD.device.type, 1024), CHUNK_BYTES // (4 * weight_VD.size(0)))
    dtype = matmul_dtype(hidden_BTD, weight_VD)
    options = {"smoothing": 0.0, "z_loss": 0.0, "chunk_rows": chunk_rows, "row_loss_": row_loss_, "dtype": dtype}
    log_p_N = ChunkedLogProbs.apply(hidden_ND, weight_VD, labels_N, bias_V, options)
    return log_p_N.view(labels_BT.shape)


class ChunkedLogProbs(torch.autograd.Function):
    """log p of each label, N; 0 where it is -100."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, bias_V, options):
        ctx.needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        keeps = ctx.needs_grad == (True, False, False)
        inputs = hidden_ND, weight_VD, labels_N, bias_V
        ctx.save_for_backward(*inputs)
        ctx.options = options
        loss_M, gradients = loss_and_gradients(*inputs, needs_grad=(keeps, False, False), **options)
        ctx.dhidden_ND = gradients[0]
        log_p_N = loss_M.new_zeros(len(labels_N))
        log_p_N[labels_N != IGNORE] = -loss_M
        return log_p_N

    @staticmethod
    def backward(ctx, upstream_N):
        if torch.is_grad_enabled():  # create_graph: the gradients would be taken for constants
            raise RuntimeError("chunked log-probabilities have no gradients of their gradients")
        inputs = hidden_ND, weight_VD, _, bias_V = ctx.saved_tensors
        if ctx.dhidden_ND is not None:
            return (ctx.dhidden_ND * -upstream_N[:, None]).to(hidden_ND.dtype), None, None, None, None
        highest = torch.cat((upstream_N.abs(), upstream_N.new_full((1,), torch.finfo(upstream_N.dtype).tiny))).amax()
        upstream_N = -upstream_N / highest  # 16 bits hold factors up to 1
        _, gradients = loss_and_gradients(*inputs, needs_grad=ctx.needs_grad, upstream_N=upstream_N, **ctx.options)
        hidden, weight, bias = (
            None if gradient is None else gradient.mul_(highest).to(x.dtype)
            for gradient, x in zip(gradients, (hidden_ND, weight_VD, bias_V), strict=True)
        )
        return hidden, weight, None, bias, None
