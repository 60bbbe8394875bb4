"""Write the table of policy losses in docs/reinforcement.md: their details, and what each gives before any update, computed.

`python -m tests.policy_table` prints it.
"""

import torch

from train.losses.policy import POLICY_DETAILS, POLICY_LOSSES

LENGTHS, LIMIT, NATS = (1, 9), 16, -2.0  # tokens of two replies, the most of a reply, and the log-probability of each token
TITLES = "name", "loss of a step", "ratio of a", "settings", "count", "convention", "source", "step 0", "a token of 1", "of 9"


def step_0(name: str) -> tuple[float, float, float]:
    """(loss, its gradient by the log-probability of the token of the first reply, of each of the second) of replies of 1 and 9
    tokens with advantages ½ and −½, where policy and old policy are one."""
    mask_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    old_BT = torch.full(mask_BT.shape, NATS, dtype=torch.float64)
    logps_BT, advantages_B = old_BT.clone().requires_grad_(), torch.tensor([0.5, -0.5], dtype=torch.float64)
    settings = {"max_length": LIMIT} if "max_length" in POLICY_DETAILS[name].settings else {}
    total, count = POLICY_LOSSES[name](logps_BT, old_BT, advantages_B, mask_BT, **settings)
    (gradient_BT,) = torch.autograd.grad(total / count, logps_BT)
    return (total / count).item(), gradient_BT[0, 0].item(), gradient_BT[1, 0].item()


def variant_table() -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(TITLES)} |", f"|{'---|' * len(TITLES)}"]
    for name, details in POLICY_DETAILS.items():
        known = (f"`{key}` {'must be given' if value is None else f'{value:g}'}" for key, value in details.settings.items())
        ratio = {"token": "token", "sequence": "reply"}[details.level]
        numbers = (f"{number + 0.0:.4g}".replace("-", "−") for number in step_0(name))
        facts = details.formula, ratio, ", ".join(known), details.unit, details.convention, details.source
        lines.append(f"| {' | '.join((f'`{name}`', *facts, *numbers))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(variant_table(), end="")
