"""Write the table of preference losses in docs/preferences.md: their details, and what each gives at step 0, computed.

`python -m tests.preference_table` prints it.
"""

import torch

from train.losses.preference import PREFERENCE_DETAILS, PREFERENCE_LOSSES

TOKENS, NATS = 10, -2.0  # a reply, and the log-probability of each of its tokens
TITLES = "name", "loss of a pair", "convention", "source", "β", "step 0", "∂ log π_c", "∂ log π_r"


def step_0(name: str, **changes: float) -> tuple[float, float, float]:
    """(loss, its gradients by the policy's two log-probabilities) where policy and reference are one, with the defaults."""
    details = PREFERENCE_DETAILS[name]
    policy = [torch.tensor([TOKENS * NATS], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    reference = [each.detach() for each in policy] if details.needs_reference else [None, None]
    lengths = dict.fromkeys(("chosen_length", "rejected_length"), torch.tensor([TOKENS])) if details.needs_lengths else {}
    loss = PREFERENCE_LOSSES[name](*policy, *reference, **{"beta": details.beta} | lengths | changes)
    return loss.item(), *(each.item() for each in torch.autograd.grad(loss.sum(), policy))


def variant_table() -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(TITLES)} |", f"|{'---|' * len(TITLES)}"]
    for name, details in PREFERENCE_DETAILS.items():
        settings = "".join(f"; `{key}` {value:g}" for key, value in details.settings.items())
        numbers = (f"{number:.6g}".replace("-", "−") for number in (details.beta, *step_0(name)))
        cells = f"`{name}`", details.formula, details.convention + settings, details.source, *numbers
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(variant_table(), end="")
