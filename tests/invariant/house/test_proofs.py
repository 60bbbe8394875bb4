"""Each public name has a test, and docs/proofs.md names it."""

import ast
from functools import cache

from tests.proofs import ROOT, page, proofs, uses

found = cache(proofs)


def test_every_public_name_has_a_test():
    without = [name for name, tests in found().items() if not tests]
    assert not without, "no test uses them, nor has their docstring an example"


def test_the_page_is_that_of_these_tests():
    written = (ROOT / "docs" / "proofs.md").read_text(encoding="utf-8")
    assert written == page(found()), "write it anew: python -m tests.proofs"


def test_uses_are_seen_through_helpers_and_aliases():
    tree = ast.parse(
        "from eval.bleu import corpus_bleu as score\n"
        "import quant.nf4\n"
        "from model import mlp\n"
        "def helper(x): return score(x)\n"
        "CASES = [mlp.Mlp]\n"
        "def test_one(): helper(1)\n"
        "def test_two(fixture): quant.nf4.quantize(CASES)\n"
        "def test_none(): unknown.quantize()\n"
    )
    names = {test: {getattr(value, "__name__", "") for value in used} for test, used in uses(tree).items()}
    assert "corpus_bleu" in names["test_one"] and "Mlp" not in names["test_one"]
    assert {"quantize", "Mlp"} <= names["test_two"] and not names["test_none"] & {"quantize", "Mlp", "corpus_bleu"}
