"""Muon: orthogonalised momentum, for the hidden matrices of a network.

`orthogonalize` is the reference implementation, one matrix at a time; `orthogonalize_batch` processes all matrices of one
shape together.
"""

import math

import torch
from torch import Tensor

from train.optimizers.adamw import AdamW
from train.optimizers.groups import at_rate, select_parameters
from train.optimizers.named_optimizer import NamedOptimizer
from train.optimizers.registry import BuildSettings, OptimizerEntry
from train.parallel.shard import full_tensor, shard_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest slope at 0 whose iterates stay near 1 (Jordan et al. 2024)
NORM_FLOOR = 1e-7  # a zero matrix stays zero
BATCH_ELEMENTS = 1 << 27  # elements of one stack of matrices; some five stacks exist at a time, each 0.25 GiB in bf16


def orthogonalize(update_OI: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Push every singular value of a matrix towards 1 by Newton-Schulz iteration, without computing an SVD.

        X = G / ||G||_F,   `steps` times:  X = a X + (b X X' + c (X X')^2) X,   (a, b, c) = `COEFFICIENTS`

    If G = U S V', the result is U p(S) V', where p applies s -> a s + b s^3 + c s^5 `steps` times to S / ||G||_F: after
    5 steps 0.68 to 1.14 for singular values above 0.03 of the norm (these coefficients trade exactness for speed).
    Any O x I. `dtype` is that of the computation and of the result (default: the input's).
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. As there and in torch.optim.Muon, a tall
    matrix is transposed first, so that X X' is the small square.
    """
    a, b, c = COEFFICIENTS
    x_OI = update_OI.to(dtype or update_OI.dtype)
    if x_OI.size(0) > x_OI.size(1):
        return orthogonalize(update_OI.mT, steps, dtype).mT
    x_OI = x_OI / x_OI.norm().clamp(min=NORM_FLOOR)
    for _ in range(steps):
        gram_OO = x_OI @ x_OI.mT
        x_OI = a * x_OI + (b * gram_OO + c * gram_OO @ gram_OO) @ x_OI
    return x_OI


def orthogonalize_batch(update_BOI: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Orthogonalize B matrices of one shape (`orthogonalize`), with batched and fused multiply-adds.

    The order of operations is torch.optim.Muon's (`addmm` with the additions inside), so bfloat16 rounds as there.
    """
    a, b, c = COEFFICIENTS
    x_BOI = update_BOI.to(dtype or update_BOI.dtype)
    if x_BOI.size(1) > x_BOI.size(2):
        return orthogonalize_batch(update_BOI.mT, steps, dtype).mT
    x_BOI = x_BOI / torch.linalg.vector_norm(x_BOI, dim=(1, 2), keepdim=True).clamp(min=NORM_FLOOR)
    for _ in range(steps):
        gram_BOO = x_BOI @ x_BOI.mT
        polynomial_BOO = torch.baddbmm(gram_BOO, gram_BOO, gram_BOO, beta=b, alpha=c)
        x_BOI = torch.baddbmm(x_BOI, polynomial_BOO, x_BOI, beta=a)
    return x_BOI


# The learning rate's factor by a matrix's shape. "original" (Jordan) takes larger steps in tall matrices; "match_rms_adamw"
# (Liu et al. 2025, arXiv 2502.16982, section 2.2) gives the step the root mean square that AdamW's usually has, so that
# AdamW's learning rate and weight decay can be used.
LR_ADJUSTMENTS = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class Muon(NamedOptimizer):
    """MomentUm Orthogonalized by Newton-Schulz, for 2-D parameters.

        M = momentum M + (1 - momentum) G
        update = (1 - momentum) G + momentum M      (Nesterov; without it: M)
        W = W - lr weight_decay W - lr adjust(O, I) orthogonalize(update)

    `params` are parameters, (name, parameter) pairs or groups; `adjust_lr` is a name of `LR_ADJUSTMENTS`.
    Slot: `momentum`, in the parameter's dtype. `ns_dtype` is the dtype of the iteration; None: bfloat16 on CUDA
    (Jordan), elsewhere float32, or the parameter's own where that is wider (bfloat16 products are slow on many CPUs).
    `batched=False` takes the reference implementation. Errors (ValueError): a parameter that is not a matrix; settings out of
    range. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The paper's momentum sums gradients (no
    1 - momentum); the orthogonalised update is the same, as it does not depend on the scale. torch.optim.Muon, and
    Jordan's code, average as here. A fused projection (GPT-2's `c_attn`) is orthogonalised as the one matrix it is.
    """

    slots = ("momentum",)

    def __init__(
        self,
        params,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        adjust_lr: str = "original",
        batched: bool = True,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1):
            raise ValueError(
                f"need lr, weight_decay >= 0 and momentum in [0, 1): lr={lr}, weight_decay={weight_decay}, momentum={momentum}"
            )
        if adjust_lr not in LR_ADJUSTMENTS:
            raise ValueError(f"unknown adjust_lr {adjust_lr!r}; known: {sorted(LR_ADJUSTMENTS)}")
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        )
        self.ns_steps, self.ns_dtype = ns_steps, ns_dtype
        self.lr_adjustment = LR_ADJUSTMENTS[adjust_lr]
        self.update = self._update_batched if batched else self._update_plain

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.ndim != 2:
                raise ValueError(f"Muon is for matrices; got a parameter of shape {tuple(param.shape)}")

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(param)}

    def iteration_dtype(self, param: Tensor) -> torch.dtype:
        if self.ns_dtype is not None:
            return self.ns_dtype
        return torch.bfloat16 if param.is_cuda else torch.promote_types(param.dtype, torch.float32)

    # The iteration needs the whole matrix. Where it is sharded, the momentum, which is elementwise, is updated on this rank's
    # rows; then the update is all-gathered, every rank orthogonalises all of it, and each applies its own rows. So a step
    # sends every such matrix once, as gathering the weights for one forward does, and the iteration is repeated on each rank:
    # it does not get faster with more ranks.

    def _update_plain(self, params, grads, states, group, network_params) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for param, grad, state, network_param in zip(params, grads, states, network_params, strict=True):
            average = state["momentum"]
            average.lerp_(grad, 1 - momentum)
            update = grad.lerp(average, momentum) if group["nesterov"] else average
            direction = orthogonalize(full_tensor(update, network_param), self.ns_steps, self.iteration_dtype(param))
            param.mul_(1 - lr * group["weight_decay"])
            param.add_(shard_of(direction, network_param), alpha=-lr * self.lr_adjustment(*network_param.shape))

    def _update_batched(self, params, grads, states, group, network_params) -> None:
        lr, momentum = group["lr"], group["momentum"]
        averages = [state["momentum"] for state in states]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, averages, momentum) if group["nesterov"] else averages
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        by_shape: dict[tuple, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for param, update, network_param in zip(params, updates, network_params, strict=True):
            by_shape.setdefault((network_param.shape, param.dtype, param.device), []).append((param, update, network_param))
        for (shape, _, _), rows in by_shape.items():
            rate = -lr * self.lr_adjustment(*shape)
            size = max(1, BATCH_ELEMENTS // shape.numel())
            for start in range(0, len(rows), size):
                same_params, same_updates, same_network_params = zip(*rows[start : start + size], strict=True)
                update_BOI = torch.stack(list(map(full_tensor, same_updates, same_network_params)))
                direction_BOI = orthogonalize_batch(update_BOI, self.ns_steps, self.iteration_dtype(same_params[0]))
                shards = list(map(shard_of, direction_BOI.unbind(), same_network_params))
                torch._foreach_add_(list(same_params), shards, alpha=rate)


def build(groups: list[dict], settings: BuildSettings) -> list[NamedOptimizer]:
    """Muon for the 2-D weights of role "matrix", AdamW for all others; one without parameters is left out."""
    if settings.matrix_lr is None:
        raise ValueError('the "muon" optimizer needs matrix_lr, the rate of the weights of role "matrix"')

    def is_hidden_matrix(name: str, param: Tensor) -> bool:
        return settings.role_of(name) == "matrix" and param.ndim == 2

    matrices = select_parameters(groups, is_hidden_matrix)
    others = select_parameters(groups, lambda name, param: not is_hidden_matrix(name, param))
    optimizers: list[NamedOptimizer] = []
    if matrices:
        groups, lr = at_rate(matrices, settings.matrix_lr), settings.matrix_lr
        optimizers.append(Muon(groups, lr, momentum=settings.momentum, adjust_lr=settings.adjust_lr))
    if others:
        optimizers.append(AdamW(at_rate(others, settings.lr), settings.lr, settings.betas, settings.eps, fused=settings.fused))
    return optimizers


OPTIMIZER = OptimizerEntry(build)
