"""The tool that breaks the code on purpose: what it changes, what it leaves alone, which tests it runs, and its verdicts."""

import json
from collections import Counter
from itertools import islice

import pytest

from tests.mutants.__main__ import main
from tests.mutants.cover import Cover
from tests.mutants.draw import draw, source_files
from tests.mutants.edits import find_edits
from tests.mutants.trial import Copy, Ran, Result
from tests.runs import ROOT

CASES = {  # kind, source: every mutant of that kind
    ("arithmetic", "y = (a + b) * c  # a * b"): ["y = (a - b) * c  # a * b", "y = (a + b) / c  # a * b"],
    ("arithmetic", "y = a // b - a % c"): ["y = a % b - a % c", "y = a // b + a % c", "y = a // b - a // c"],
    ("arithmetic", "y = a + b @ c.mT"): ["y = a - b @ c.mT", "y = a + c.mT @ b"],
    ("arithmetic", "n *= 2"): ["n /= 2"],
    ("arithmetic", "s = 'a' + b + c; t = [0] * n; u = '%d' % n"): [],
    ("comparison", "y = 0 < a <= b"): ["y = 0 <= a <= b", "y = 0 < a < b"],
    ("comparison", "y = (a) >= (b) or a == b"): ["y = (a) > (b) or a == b", "y = (a) >= (b) or a != b"],
    ("boolean", "y = a and b or not (c)"): ["y = a or b or not (c)", "y = a and b and not (c)", "y = a and b or (c)"],
    ("boolean", "y = m & ~k"): ["y = m | ~k", "y = m & k"],
    ("constant", "y = f(x[-1], 0, k=True)"): ["y = f(x[-2], 0, k=True)", "y = f(x[-1], 1, k=True)", "y = f(x[-1], 0, k=False)"],
    ("constant", "y = 1e-5; z = 0.5; w = 0.0"): [
        "y = 0.001; z = 0.5; w = 0.0",
        "y = 1e-5; z = 1.0; w = 0.0",
        "y = 1e-5; z = 0.5; w = 1.0",
    ],
    ("cast", "y = x.to(q.dtype).float() / float(a + b)"): [
        "y = x.float() / float(a + b)",
        "y = x.to(q.dtype) / float(a + b)",
        "y = x.to(q.dtype).float() / (a + b)",
    ],
    ("cast", "y = x.to(device); z = x.to(y.device, non_blocking=True)"): [],
    ("clamp", "y = (a + b).clamp(min=0)"): ["y = (a + b)"],
    ("clamp", "y = max(1, a - b); z = max(x)"): ["y = 1; z = max(x)", "y = (a - b); z = max(x)"],
    ("arguments", "y = f(a, (b), *c, d=e) + isinstance(a, b)"): [],
    ("arguments", "y = f(a, b, *c, d=e)"): ["y = f(b, a, *c, d=e)"],
    ("gradient", "y = x.detach().norm()"): ["y = x.norm()"],
    ("gradient", "@torch.no_grad()\ndef f(): ..."): ["def f(): ..."],
    ("statement", "if a: n += 1"): ["if a: pass"],
    ("statement", "reduce(x); x.mul_(2); print(x)"): ["pass; x.mul_(2); print(x)", "reduce(x); pass; print(x)"],
}
UNCHANGED = '''
"""1 + 1"""
import torch
from typing import TYPE_CHECKING
__all__ = ["a"] + ["b"] * 2
SHOWN = 3  # of an error message
if TYPE_CHECKING:
    A = f(1)
@dataclass(frozen=True)
class C:
    """not 1 < 2"""
    a: Literal[1, 2]
    def f(self, a: Annotated[int, 3 + 4]) -> f(5, 6):
        first = [*a][:SHOWN]
        if a:
            raise ValueError(f"{a + 1} is not {first}", 1 + 2)
        print(f"{1 + 1}", a < 2)
        self.console.info("said", 3 * a)
        warnings.warn(str(a + 1), stacklevel=2)
        return f"{a:>{3 + 4}}"
@triton.jit
def kernel(x, n: tl.constexpr):
    x += n + 1
if __name__ == "__main__":
    main(1, 2)
'''


@pytest.mark.parametrize("kind, source", CASES)
def test_a_kind_changes_one_place(kind, source):
    data = f"ε = é  # ü\n{source}\n".encode()  # columns are counted in bytes
    edits = [edit for edit in find_edits(data) if edit.kind == kind]
    assert sorted(edit.apply(data).decode() for edit in edits) == sorted(f"ε = é  # ü\n{new}\n" for new in CASES[kind, source])


def test_messages_annotations_and_kernels_are_left_alone():
    assert [edit for edit in find_edits(UNCHANGED.encode()) if edit.line < 24] == []
    assert find_edits(UNCHANGED.replace("@triton.jit\n", "").encode()), "the mutant: a kernel that is a function"


def test_the_draw_is_a_function_of_the_seed():
    sources = {"a.py": b"x = a + 1\n" * 300, "b.py": b"'''Say.\n\nMore.'''\n# why\n\n" + b"x = f(a, b)\n" * 100}
    first, again, other = ([*islice(draw(sources, seed), 80)] for seed in (0, 0, 1))
    assert first == again != other and len({*first}) == 80
    assert [*islice(draw(sources, 0), 7)] == first[:7]
    assert 50 <= sum(mutant.file == "a.py" for mutant in first) <= 70, "as their code lines, 300 and 100"
    assert source_files(ROOT, ["train/st", "eval/re"]) == ["eval/report.py", "train/start.py", "train/step.py"]


def test_kinds_are_equally_likely_within_a_file():
    sources = {"a.py": b"x = f(a, b)\n" * 300 + b"y = a + 1 < -b and c\n" * 40}
    kinds = Counter(mutant.edit.kind for mutant in islice(draw(sources, 0), 100))
    assert {*kinds} == {"arguments", "arithmetic", "constant", "comparison", "boolean"}
    assert all(10 <= number <= 30 for number in kinds.values()), "a fifth each, though 300 of 460 edits are swapped arguments"


def test_all_mutants_compile():
    sources = {"a.py": b"def f(a, b):\n    a += 1\n    return g(1, *a), -b @ (a if b else 2) @ c\n"}
    mutants = [*draw(sources, 0)]
    assert len(mutants) > 5 and len({mutant.edit for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        compile(mutant.edit.apply(sources["a.py"]), "a.py", "exec")


# ---- A toy project

TOY = {
    "model/__init__.py": "PUBLIC = {'sums': ('total',)}\n__all__ = ['total']\nfrom model.sums import total\n",
    "model/sums.py": "def total(x):\n    \"\"\"\n    >>> total([])\n    0\n    \"\"\"\n    return 0 + sum(x)\n",
    "model/equal.py": "def largest(a, b):\n    return a if a > b else b\n",
    "model/__main__.py": "",
    "tests/invariant/model/test_sums.py": "from model import total\ndef test():\n    assert total([3, 4]) == 7\n",
    "tests/invariant/model/test_equal.py": "import model.equal\ndef test():\n    assert model.equal.largest(1, 2) == 2\n",
    "tests/invariant/model/test_other.py": "from model.equal import largest\ndef test():\n    assert largest(2, 1) == 2\n",
    "tests/fault/test_command.py": "LINE = ['-m', 'model']\n",
}


@pytest.fixture
def toy(tmp_path):
    for file, text in TOY.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def test_tests_are_found_by_imports(toy):
    cover = Cover(toy)
    sums, equal, other = (f"tests/invariant/model/test_{name}.py" for name in ("sums", "equal", "other"))
    assert cover.tests("model/sums.py") == ["model/sums.py", sums, equal, other]
    assert cover.tests("model/equal.py") == [equal, other, sums]
    assert cover.tests("model/__init__.py")[0] == sums
    assert cover.tests("model/__main__.py")[0] == "tests/fault/test_command.py"


def test_the_map_of_this_project():
    places = ("oracle/train", "invariant/house", "fault", "gpu", "bench")
    tests = [file for place in places for file in source_files(ROOT, packages=(f"tests/{place}",))]
    tests.append("tests/runs.py")
    cover = Cover(ROOT, [*source_files(ROOT, packages=("train",)), *tests])
    nearest = cover.tests("train/optimizers/clip.py")
    assert nearest[:2] == ["tests/oracle/train/test_clip.py", "tests/oracle/train/test_scaler.py"]
    assert not [file for file in nearest if "/gpu/" in file or "/bench/" in file]
    assert "tests/fault/test_ranks.py" in cover.tests("train/__main__.py")
    by_way_of_runs = {"tests/fault/test_nonfinite.py", "tests/invariant/house/test_file_names.py"}
    assert by_way_of_runs <= {*cover.tests("train/loop.py")}


def run(toy, capsys, *options: str) -> tuple[dict[str, Result], str]:
    """The changed line -> its result; and what was printed."""
    main(["--list", *options], toy)
    lines = [line.removeprefix("  + ") for line in capsys.readouterr().out.splitlines() if line.startswith("  + ")]
    return dict(zip(lines, main([*options], toy), strict=True)), capsys.readouterr().out


def test_a_mutant_is_killed_and_an_equivalent_one_survives(toy, capsys):
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    out = toy.with_suffix(".json")
    found, shown = run(toy, capsys, "--only", "model/equal.py", "model/sums.py", "--count", "9", "--out", str(out))
    assert {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()} == before
    assert {line: (result.status, result.by, result.passed) for line, result in found.items()} == {
        "return a if a >= b else b": ("survived", "", 3),
        "return 1 + sum(x)": ("killed", "model/sums.py::model.sums.total", 0),
        "return 0 - sum(x)": ("killed", "tests/invariant/model/test_sums.py::test", 1),
    }
    assert "mutation score 2/3" in shown and "model/equal.py:2  comparison\n  - return a if a > b else b" in shown
    assert [row["status"] for row in json.loads(out.read_text())["mutants"]] == [result.status for result in found.values()]


WRONG = {
    "--only model/ nope.py": "--only nope.py: no Python file of model/, data/, train/, eval/, lora/, quant/ begins with it",
    "--count 0": "argument --count: '0' is not an integer of at least 1",
    "--count -3": "argument --count: '-3' is not an integer of at least 1",
    "--jobs 0": "argument --jobs: '0' is not an integer of at least 1",
    "--out nowhere/a.json": "--out nowhere/a.json: there is no folder nowhere",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_option_is_an_error(line, toy, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(line.split(), toy)
    assert WRONG[line] in capsys.readouterr().err


def test_a_list_is_written_and_a_short_one_is_said(toy, tmp_path, capsys):
    assert main(["--only", "model/sums.py", "--count", "9", "--list", "--out", str(tmp_path / "list.json")], toy) == []
    assert capsys.readouterr().out.startswith("2 mutants instead of 9: model/sums.py has no more\n")
    rows = json.loads((tmp_path / "list.json").read_text())["mutants"]
    assert [row["lines"][1] for row in rows] == ["return 0 - sum(x)", "return 1 + sum(x)"]
    assert {row["tests"][0] for row in rows} == {"model/sums.py"}
    main(["--only", "model/sums.py", "--count", "2", "--list"], toy)
    assert "instead of" not in capsys.readouterr().out


# ---- Verdicts, on made-up runs of pytest

FIRST, SECOND = "tests/a.py::first", "tests/a.py::second"
BAD, GOOD = Ran(1, 9, 2, (FIRST,), None, 0), Ran(0, 9, 3, (), None, 0)
STUCK = Ran(None, 100, 2, (), SECOND, 60)
VERDICTS = {
    "killed": ([BAD, GOOD], "killed", FIRST),
    "survived": ([GOOD], "survived", ""),
    "a test that fails by itself is left out": ([BAD, BAD, BAD, GOOD], "survived", ""),
    "a file that fails by itself is left out": ([BAD._replace(failed=("tests/a.py",)), BAD, BAD, GOOD], "survived", ""),
    "crashed": ([BAD._replace(code=-11, failed=(), running=SECOND), GOOD], "killed", SECOND),
    "not even collected": ([BAD._replace(code=4, failed=()), GOOD], "killed", "pytest's start, exit code 4"),
    "one test loops": ([STUCK, GOOD], "killed", f"{SECOND} (time limit)"),
    "one test is slow": ([STUCK, GOOD._replace(seconds=26)], "timeout", f"{SECOND} (time limit)"),
    "many tests": ([STUCK._replace(running_for=40)], "timeout", f"{SECOND} (time limit)"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name, toy, monkeypatch):
    runs, status, by = VERDICTS[name]
    left = iter(runs)
    monkeypatch.setattr(Copy, "pytest", lambda *_: next(left))
    (mutant, *_) = draw({"model/equal.py": TOY["model/equal.py"].encode()}, 0)
    copy = Copy(toy, limit=100)
    try:
        result = copy.try_mutant(mutant, ["tests/a.py", "tests/b.py"])
    finally:
        copy.close()
    assert (result.status, result.by, [*left]) == (status, by, []) and not copy.folder.exists()


def test_tests_that_never_run_are_an_error(toy, monkeypatch):
    monkeypatch.setattr(Copy, "pytest", lambda *_: BAD._replace(code=4, failed=()))
    with pytest.raises(RuntimeError, match=r"test_equal\.py fails without a mutant too, with exit code 4"):
        main(["--only", "model/equal.py"], toy)


def test_the_limit_ends_a_process(toy):
    copy = Copy(toy, limit=9)
    try:
        assert copy.pytest(["tests"], limit=0.05).code is None
        assert copy.process is None
    finally:
        copy.close()
