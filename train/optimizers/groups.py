"""Parameter groups: which weights decay, and which learn at a rate of their own.

A weight's role, which its family's table knows, decides its decay.
"""

from collections.abc import Callable, Iterable

from torch import Tensor

# The published recipes agree: nanoGPT decays all 2-D weights, the Hugging Face Trainer all but norms and biases; both
# sets hold the embeddings. A norm's gain has 1 as its neutral value, so pulling it to 0 is not regularisation.
DECAYED_ROLES = frozenset({"embedding", "position", "matrix", "head"})
ROLES = DECAYED_ROLES | {"norm", "bias"}


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], role_of: Callable[[str], str], weight_decay: float
) -> list[dict]:
    """Split trainable parameters by role into a decayed and an undecayed group; an empty group is left out.

    `role_of(name)` is one of `ROLES`; `DECAYED_ROLES` decay. A tensor under two names (tied weights) is taken once, under
    the first; one that needs no gradient is left out. Each group has `params`, `names` and `weight_decay`.
    Errors: an unknown role (ValueError).
    """
    decayed = {"params": [], "names": [], "weight_decay": weight_decay}
    undecayed = {"params": [], "names": [], "weight_decay": 0.0}
    seen: set[int] = set()
    for name, param in named_parameters:
        if id(param) in seen or not param.requires_grad:
            continue
        seen.add(id(param))
        group = decayed if checked_role(role_of, name) in DECAYED_ROLES else undecayed
        group["params"].append(param)
        group["names"].append(name)
    return [group for group in (decayed, undecayed) if group["params"]]


def checked_role(role_of: Callable[[str], str], name: str) -> str:
    role = role_of(name)
    if role not in ROLES:
        raise ValueError(f"parameter {name!r} has the unknown role {role!r}; roles: {sorted(ROLES)}")
    return role


def split_by_rate(groups: list[dict], lr_multiple_of: Callable[[str], float]) -> list[dict]:
    """Split groups further by `lr_multiple_of(name)`, which each group then has as `lr_multiple`."""
    split = []
    for group in groups:
        for multiple in dict.fromkeys(map(lr_multiple_of, group["names"])):
            part = select_parameters([group], lambda name, param, multiple=multiple: lr_multiple_of(name) == multiple)
            split += [{**each, "lr_multiple": multiple} for each in part]
    return split


def at_rate(groups: list[dict], lr: float) -> list[dict]:
    """Give each group of `split_by_rate` its learning rate: `lr` times its multiple."""
    return [{**group, "lr": lr * group["lr_multiple"]} for group in groups]


def select_parameters(groups: list[dict], is_selected: Callable[[str, Tensor], bool]) -> list[dict]:
    """Return the groups with only the parameters that `is_selected(name, parameter)`; an empty group is left out."""
    selected = []
    for group in groups:
        pairs = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if is_selected(n, p)]
        if pairs:
            selected.append({**group, "names": [n for n, _ in pairs], "params": [p for _, p in pairs]})
    return selected
