"""AdamW with 8-bit moments: two bytes a parameter, and eight for each block of 256; AdamW has eight bytes a parameter.

A moment is stored as codes of `quant.blockwise`'s dynamic map, signed for the first moment, unsigned for the second, and one
scale per block. A step dequantizes both, updates in float32, and quantizes again; a large tensor is updated in chunks, so its
moments are never in float32 as a whole.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quant.blockwise import BLOCK, dequantize_8bit, dynamic_map, quantize_8bit
from train.optimizers.groups import at_rate
from train.optimizers.named_optimizer import NamedOptimizer
from train.optimizers.registry import BuildSettings, OptimizerEntry
from train.runs.sharded import is_sharded

MIN_8BIT_SIZE = 4096  # elements of the smallest tensor with 8-bit moments: norms and biases have nothing to save
# Elements updated at a time, whole blocks: as many as a core's cache holds; on a GPU enough to fill it.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}


def adamw_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update by one step of `adamw_update`, in place, in bitsandbytes' order of operations.

    Float32, any shape; `step` counts from 1.
    """
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))


@cache
def dynamic_map_on(device: torch.device, signed: bool) -> Tensor:
    return dynamic_map(signed).to(device)


@cache
def nearest_table(code: Tensor) -> tuple[Tensor, Tensor]:
    """Return (`nearest` index of the lowest float32 with each upper 16 bits, int32; upper bound of each index).

    The 65,536 intervals of one upper half are so narrow that each holds at most one bound between two indices.
    """
    bounds = torch.cat(((code[:-1] + code[1:]) / 2, code.new_tensor([torch.inf])))
    lowest = torch.arange(1 << 16, dtype=torch.int32, device=code.device) << 16
    lowest = torch.where(lowest < 0, lowest | 0xFFFF, lowest).view(torch.float32)  # of negative numbers the largest magnitude
    return torch.bucketize(lowest, bounds[:-1], out_int32=True), bounds


def nearest_by_table(z: Tensor, code: Tensor) -> Tensor:
    """Return `quant.blockwise.nearest`, bit for bit, by two look-ups instead of a search in 256 values.

    `code` is a tensor of `dynamic_map_on`.
    """
    first, bounds = nearest_table(code)
    z = z.flatten()
    index = first.index_select(0, (z.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
    return (index + (z > bounds.index_select(0, index))).to(torch.uint8)


class AdamW8bit(NamedOptimizer):
    """Adam with decoupled weight decay (`train.optimizers.adamw.adamw_update`) and 8-bit moments.

        m, v = dequantize(exp_avg), dequantize(exp_avg_sq);   adamw_update in float32;   quantize m and v, block by block

    Called as AdamW: parameters, (name, parameter) pairs or groups, of any shape and floating dtype.
    Slots: `exp_avg` and `exp_avg_sq`, uint8 codes in the parameter's shape; `exp_avg_scale` and `exp_avg_sq_scale`, float32,
    the largest magnitude of each block of 256 elements of the flattened parameter, shaped rows x blocks where a row is whole
    blocks; `step`, float32. Before the first step all are zeros: code 0 is -0.993 in the signed map, which times a scale of 0
    is 0. A parameter of fewer than 4,096 elements has float32 moments and no scales; so has a sharded one whose rows are not
    whole blocks, because ranks hold rows and would have to share blocks. (The state of such a parameter does not load from one
    process into ranks or back: it raises.) The update is in float32, whatever format the parameter has.

    `decide` rounds to a value of the map. `nearest_by_table`: an exact zero stays zero. `quant.blockwise.nearest_on_grid`: as
    bitsandbytes on a CPU, where zero becomes 2.1e-5 of the block's scale, so that a weight whose gradient is zero drifts (the
    embedding of a token that does not occur, if it shares a block with one that does). A second moment above zero never gets
    the code of zero: a weight whose gradient ends would move by lr exp_avg / eps. (That is exp_avg_sq / scale below 1.6e-7, so
    gradients below 4e-4 of the largest in their block. With `nearest_on_grid` it does not occur.)

    Errors (ValueError): settings out of range.
    Source: Dettmers et al. 2022, arXiv 2110.02861, sections 2.1 and 2.2; its stable embedding layer is not part of this.
    """

    slots = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "step")

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        decide: Callable[[Tensor, Tensor], Tensor] = nearest_by_table,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(
                f"need lr, eps, weight_decay >= 0 and betas in [0, 1): "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.decide = decide

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)

        param, step = param.detach(), torch.zeros(())
        has_whole_blocks = param.ndim > 1 and math.prod(param.shape[1:]) % BLOCK == 0  # in each row
        if param.numel() < MIN_8BIT_SIZE or (is_sharded(param) and not has_whole_blocks):
            return {"exp_avg": zeros(param, torch.float32), "exp_avg_sq": zeros(param, torch.float32), "step": step}
        block_starts = param.flatten(1)[:, ::BLOCK] if has_whole_blocks else param.flatten()[::BLOCK]
        return {
            "exp_avg": zeros(param, torch.uint8),
            "exp_avg_sq": zeros(param, torch.uint8),
            "exp_avg_scale": zeros(block_starts, torch.float32),
            "exp_avg_sq_scale": zeros(block_starts, torch.float32),
            "step": step,
        }

    def update(self, params, grads, states, group, network_params) -> None:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for param, grad, state in zip(params, grads, states, strict=True):
            state["step"] += 1
            dense = param.contiguous()
            if state["exp_avg"].dtype == torch.uint8:
                self._update_8bit(dense, grad, state, settings)
            else:
                wide = dense.float()
                adamw_update_(wide, grad.float(), state["exp_avg"], state["exp_avg_sq"], int(state["step"]), **settings)
                dense.copy_(wide)
            if dense is not param:
                param.copy_(dense)

    def _update_8bit(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], settings: dict) -> None:
        signed, unsigned = (dynamic_map_on(param.device, sign) for sign in (True, False))
        size, step = CHUNK_ELEMENTS[param.device.type], int(state["step"])
        elements = [tensor.reshape(-1).split(size) for tensor in (param, grad, state["exp_avg"], state["exp_avg_sq"])]
        scales = [state[slot].view(-1).split(size // BLOCK) for slot in ("exp_avg_scale", "exp_avg_sq_scale")]
        for param_chunk, grad_chunk, mean_code, square_code, mean_scale, square_scale in zip(*elements, *scales, strict=True):
            mean = dequantize_8bit(mean_code, mean_scale, signed)
            square = dequantize_8bit(square_code, square_scale, unsigned)
            wide = param_chunk.float()
            adamw_update_(wide, grad_chunk.float(), mean, square, step, **settings)
            param_chunk.copy_(wide)
            self._quantize_(mean_code, mean_scale, mean, signed)
            self._quantize_(square_code, square_scale, square, unsigned)
            torch.maximum(square_code, square > 0, out=square_code)

    def _quantize_(self, code: Tensor, scale: Tensor, moment: Tensor, values: Tensor) -> None:
        new_code, new_scale = quantize_8bit(moment, values, decide=self.decide)
        code.copy_(new_code)
        scale.copy_(new_scale)


def build(groups: list[dict], settings: BuildSettings) -> list[NamedOptimizer]:
    return [AdamW8bit(at_rate(groups, settings.lr), settings.lr, settings.betas, settings.eps)]


OPTIMIZER = OptimizerEntry(build)
