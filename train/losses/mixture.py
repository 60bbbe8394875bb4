"""The preference losses that a run minimises, read from text: one by its name, or several with weights. Without torch."""

import ast
import functools
import math
from pathlib import Path

from train.runs.errors import TrainError

SFT = "sft"  # the cross-entropy of the chosen reply, a term of the training loop's own


@functools.cache
def preference_loss_names() -> tuple[str, ...]:
    """Return the names in `PREFERENCE_LOSSES`, read from the functions' files without importing them."""
    files = sorted(Path(__file__).parent.glob("preference*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return tuple(each.name for each in functions if any(is_registration(line) for line in each.decorator_list))


def is_registration(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "preference_loss"


def parse_losses(text: str) -> tuple[tuple[str, float], ...]:
    """Return ((name, weight), …) of "name" or of "name=weight,name=weight"; a name alone weighs 1.

    Names are those of `PREFERENCE_LOSSES`, and `sft`, the cross-entropy of the chosen reply.
    Errors (TrainError): an unknown name, with the list; a name given twice; a weight that is no finite number above 0.

    >>> parse_losses("sigmoid"), parse_losses("sigmoid=0.8, bco_pair=0.2, sft=1")  # the second is MPO, arXiv 2411.10442
    ((('sigmoid', 1.0),), (('sigmoid', 0.8), ('bco_pair', 0.2), ('sft', 1.0)))
    """
    known = (*preference_loss_names(), SFT)
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (each.strip() for each in part.partition("="))
        if name not in known:
            raise TrainError(f"loss {text!r}: {name!r} is not known; one of {', '.join(known)}, or several: sigmoid=1,sft=0.2")
        if name in found:
            raise TrainError(f"loss {text!r}: {name} is given twice")
        found[name] = read_weight(text, name, number) if equals else 1.0
    return tuple(found.items())


def read_weight(text: str, name: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise TrainError(f"loss {text!r}: {name}={number}: expected a finite weight above 0")
    return weight
