"""The public names of the packages: defined where the table says, explained, and free until they are used."""

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest

from tests.invariant.house.test_imports import MAY_IMPORT, ROOT, sources

PACKAGES = [*MAY_IMPORT]
TABLES = {name: importlib.import_module(name).PUBLIC for name in PACKAGES}
NAMES = [(package, file, name) for package, table in TABLES.items() for file, names in table.items() for name in names]
OPENERS = re.compile(r"(Of|As|What|Where|How|Whether|Which)\b")
# Words of our own, for which the field has other names.
OLD_WORDS = set(
    "Before Plan Memory STRETCHES lay_out spread kept_local put_on narrow kept apart Watch IN_PARTS seal point say enter leave "
    "around Whole double share".split()
)


def test_packages_import_nothing_heavy():
    code = f"import sys, {', '.join(PACKAGES)}; [dir(sys.modules[name]) for name in {PACKAGES}]; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_table_is_sorted_out(package):
    table, files = TABLES[package], {path.stem for path in (ROOT / package).iterdir()}
    names = [name for each in table.values() for name in each]
    assert len(names) == len(set(names)) > 5
    assert not set(names) & files, "`from package import name` would give the file"
    for file in table:
        assert (ROOT / package / f"{file.replace('.', '/')}.py").is_file()
    module = importlib.import_module(package)
    assert set(names) <= set(dir(module)) and module.__all__ == sorted(names)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        module.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("package, file, name", NAMES)
def test_a_public_name_is_defined_in_its_file_and_explained(package, file, name):
    value = getattr(importlib.import_module(package), name)
    module = f"{package}.{file}"
    assert value is getattr(importlib.import_module(module), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == module, "the table names the file that defines it"
        assert value.__doc__ and not OPENERS.match(inspect.cleandoc(value.__doc__))
        assert not value.__doc__.startswith(f"{value.__name__}("), "a docstring of its own, not the one that a NamedTuple gets"


def definitions(tree: ast.Module) -> set[str]:
    """Names that a file defines: functions, classes, arguments, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


@pytest.mark.parametrize("file", [*sources(), "touchstone.py"])
def test_the_field_has_words_for_it(file):
    """Neither old identifiers, nor docstrings that open with a question."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert definitions(tree) & OLD_WORDS == set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    assert [text.split("\n")[0] for text in texts if OPENERS.match(text)] == []


def test_the_mutants_are_caught():
    code = "def put_on(share):\n    self.kept = say = 1\nclass Whole:\n    double: int"
    assert definitions(ast.parse(code)) == {"put_on", "share", "kept", "say", "Whole", "double"}
    assert OPENERS.match("What a run is told") and not OPENERS.match("Assert that") and not OPENERS.match("Offsets")


def test_names_that_moved_are_forwarded_for_one_version():
    code = """
import train, train.schedule
from train.clip import clip_grad_norm_
from train.loss.cross_entropy import linear_cross_entropy
from train.optim import AdamW, build_optimizer
from train.precision import PRECISIONS, GradScaler
from data.corpus import find_corpus, read_corpus
from data.tokenizer import Tokenizer, load_tokenizer
from eval.answers import answers
from eval.bertscore import bertscore
from eval.bootstrap import bootstrap
from eval.calibration import calibration
from eval.classification import classification
from eval.entities import entities
from eval.meteor import meteor
from eval.perplexity import perplexity
from eval.rouge import rouge
from lora.merge_folder import merge_folder
from lora.peft_io import load, save
assert (AdamW, GradScaler, clip_grad_norm_) == (train.AdamW, train.GradScaler, train.clip_grad_norm_)
assert callable(build_optimizer) and callable(linear_cross_entropy) and "bf16" in PRECISIONS
assert train.schedule.cosine is train.SCHEDULES["cosine"]
"""
    line = [sys.executable, "-W", "always::DeprecationWarning", "-c", code]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for name in ("clip", "loss", "optim", "precision"):
        assert f"DeprecationWarning: train.{name} is now train." in shown.stderr
