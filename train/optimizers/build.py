"""The optimizers of a run, by name: parameters into groups by their roles, groups to optimizers."""

from collections.abc import Callable, Iterable

from torch import Tensor

from train.optimizers.groups import parameter_groups, split_by_rate
from train.optimizers.named_optimizer import Optimizers
from train.optimizers.registry import BuildSettings, load_optimizer


def build_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, Tensor]],
    role_of: Callable[[str], str],
    *,
    lr: float,
    matrix_lr: float | None = None,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
    adjust_lr: str = "original",
    fused: bool | None = None,
    lr_multiple_of: Callable[[str], float] = lambda name: 1.0,
) -> Optimizers:
    """Build the optimizers of a run: `name` is a file of this folder with an `OPTIMIZER`.

    "muon" gives 2-D weights of role "matrix" to Muon at `matrix_lr`. Embeddings, positions, the head, norms and biases then
    stay with AdamW at `lr` (Jordan et al. 2024: Muon is for hidden layers). The others train all parameters at `lr`.
    Weight decay follows `parameter_groups`. `lr_multiple_of(name)` is a parameter's learning rate as a multiple of `lr`,
    with Muon of `matrix_lr` (LoRA+, --layer-rate). `betas` and `eps` are AdamW's, `momentum` Muon's and SGD's.

    Errors (ValueError): an unknown name or role; "muon" without `matrix_lr`.
    """
    groups = split_by_rate(parameter_groups(named_parameters, role_of, weight_decay), lr_multiple_of)
    settings = BuildSettings(role_of, lr, matrix_lr, betas, eps, momentum, adjust_lr, fused)
    return Optimizers(load_optimizer(name).build(groups, settings))
