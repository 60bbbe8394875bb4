"""Each public name has a test, and docs/proofs.md names it."""

import ast
import os
import subprocess
import sys
from functools import cache

import pytest

import tests.proofs
from tests.proofs import COMPARISONS, PAGE, PARITY, ROOT, Proof, is_of_bad_input, main, page, proofs, recorded, shown_name, uses

found = cache(proofs)


def test_every_public_name_has_a_test():
    without = [name for name, tests in found().items() if not tests]
    assert not without, "no test uses them, nor has their docstring an example"


def test_the_page_is_that_of_these_tests():
    assert PAGE.read_text(encoding="utf-8") == page(found()), "write it anew: python -m tests.proofs"


def test_the_parity_table_names_tests_that_are_there():
    for test in recorded(PARITY.read_text(encoding="utf-8")):
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"docs/parity.md names {test}: write it anew"
    with pytest.raises(SystemExit, match=r"docs/parity\.md has no table with the columns \| part \| .* write it anew: python"):
        recorded(PARITY.read_text(encoding="utf-8").replace(COMPARISONS, COMPARISONS.removesuffix(" test |")))


def row(name: str) -> list[str]:
    """The cells of a public name's row: name, tests, against, of."""
    package = page(found()).partition(f"## {name.partition('.')[0]}\n")[2]
    (line,) = [line for line in package.partition("\n## ")[0].splitlines() if line.startswith(f"| `{name.partition('.')[2]}`")]
    return line.strip("| ").split(" | ")


def test_a_name_is_beside_what_its_tests_record():
    against = {name: row(f"train.{name}")[2] for name in ("clip_grad_norm_", "EMA", "SGD", "Muon")}
    assert against["clip_grad_norm_"].startswith("torch clip_grad_norm_; ") and against["Muon"].startswith("torch Muon; ")
    assert (against["EMA"], against["SGD"]) == ("torch AveragedModel", "torch SGD")
    assert row("data.deduplicate")[2] == "", "what a fixture prepares is not compared"
    assert row("data.deduplicate")[1].startswith("`tests/invariant/data/test_corpus.py::"), "nor shown first"
    assert row("model.ConfigError")[2] == "" and row("model.LayerNorm")[2] == "torch"


def test_comparisons_come_first_and_bad_input_last():
    first = "tests/oracle/eval/test_bleu.py::test_the_functions_are_sacrebleus"
    assert row("eval.corpus_bleu")[1].startswith(f"`{first}`<br>") and row("eval.corpus_bleu")[2].startswith("sacrebleu; ")
    bleu = [proof.test for proof in found()["eval.corpus_bleu"]]
    example, bad = "eval/bleu.py::eval.bleu.corpus_bleu", "tests/oracle/eval/test_bleu.py::test_bad_input_is_refused"
    assert bleu.index(example) < bleu.index(bad)
    for name, each in found().items():
        rows = [bool(proof.oracles) for proof in each]
        assert name.endswith("Error") or rows == sorted(rows, reverse=True), name
    assert found()["model.HubError"][0].test == "tests/oracle/model/test_folders.py::test_git_lfs_pointers"
    raises = "def test_one():\n    with pytest.raises(ValueError):\n        f()"
    for source, bad in ((raises, True), (f"{raises}\n    assert f(1)", False), ("def test_errors(): assert f()", True)):
        assert is_of_bad_input(ast.parse(source).body[0]) == bad


def test_a_test_can_be_pasted_and_its_row_names_it(tmp_path):
    example = row("eval.bleu_reference")[1].split("<br>")[-1].strip("`")
    test = row("eval.edit_distance")[1].split("<br>")[0].strip("`")
    words = ["-q", "-p", "no:cacheprovider", f"--parity={tmp_path / 'parity.md'}", example, test]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # not a worker of this run
    run = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, env=alone, capture_output=True)
    assert example == "eval/bleu.py::eval.bleu.bleu_reference" and b"2 passed" in run.stdout, run.stdout
    assert recorded((tmp_path / "parity.md").read_text(encoding="utf-8")) == {test: ["our plain twin"]}


def test_a_function_of_another_name_is_shown_with_it():
    assert row("quant.quantize_4bit")[0] == "`quantize_4bit` = `quant.nf4.quantize`"
    assert shown_name("train.SCHEDULES", {}) == "`SCHEDULES`"


def test_the_command_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tests.proofs, "proofs", lambda: {"eval.corpus_bleu": [Proof("tests/a.py::test", ("sacrebleu",), True)]})
    path = tmp_path / "proofs.md"
    for words, status in (["--help"], 0), (["docs/other.md"], 2):
        with pytest.raises(SystemExit, match=str(status)):
            main(words, path)
    assert not path.exists() and "unrecognized arguments: docs/other.md" in capsys.readouterr().err
    said = []
    for _ in range(2):
        main([], path)
        said.append(capsys.readouterr().out)
    rows = "1 public names, 1 of them with a row in docs/parity.md\n"
    assert said == [f"{path} is written: {rows}", f"{path} is up to date: {rows}"]
    assert "| `corpus_bleu` | `tests/a.py::test` | sacrebleu | 1 |" in path.read_text()


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


def test_a_fixture_is_told_from_a_helper():
    tree = ast.parse("from eval.bleu import corpus_bleu\ndef texts(): return corpus_bleu\ndef test_one(texts): f(texts)\n")
    assert len(uses(tree)["test_one"]) == 1 and uses(tree, fixtures=False)["test_one"] == []
