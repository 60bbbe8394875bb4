"""The command `touchstone`, a user's files with the names of our packages, and the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import touchstone
from tests.runs import ROOT, SETTINGS, arguments, write_corpus

INSTALLED = Path(sys.executable).with_name("touchstone")
COMMAND = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, str(ROOT / "touchstone.py")]
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def shown(words: list, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    line = [*map(str, words)]
    return subprocess.run(line, cwd=cwd, env=CLEAN | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def own_files(tmp_path) -> Path:
    """A folder with files of a user, each of which would end in an error if it ran."""
    for name in touchstone.PACKAGES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user\'s file has run')\n", encoding="utf-8")
    return tmp_path


def test_trains_in_a_folder_with_files_of_the_same_names(own_files):
    options = {**SETTINGS, "steps": 5, "cache": own_files / "cache", "out": "run"}
    done = shown([*COMMAND, "train", *arguments(options), "--corpus", write_corpus(own_files / "corpus")], own_files)
    assert done.returncode == 0 and "done at step 5" in done.stdout, done.stderr
    assert "touchstone generate run" in done.stdout.replace("touchstone model generate", "touchstone generate")
    assert "python -m" not in done.stdout, "commands to go on with begin as this one did"
    done = shown([*COMMAND, "generate", "run", "--prompt", "the", "--max-new-tokens", 3], own_files)
    assert done.returncode == 0 and done.stdout.startswith("the"), done.stderr


@pytest.mark.parametrize("name", touchstone.PACKAGES)
def test_a_file_that_hides_a_package_is_named(name, tmp_path):
    """It lies in a folder of PYTHONPATH, which `touchstone` reads too, or in the folder where `python -m` is called."""
    hiding = tmp_path / f"{name}.py"
    hiding.write_text("raise SystemExit('the user\'s file has run')\n", encoding="utf-8")
    other = "data" if name == "model" else "model"
    empty = tmp_path / "empty"
    empty.mkdir()
    for module, cwd, path in (("touchstone", empty, f"{tmp_path}{os.pathsep}{ROOT}"), (other, tmp_path, str(ROOT))):
        done = shown([sys.executable, "-m", module, "train", "--help"], cwd, PYTHONPATH=path)
        assert done.returncode == 2 and str(hiding) in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert ("unset it" if module == "touchstone" else "use the command `touchstone`") in done.stderr


def test_wrong_words_and_help():
    assert "touchstone COMMAND" in shown([*COMMAND]).stdout
    done = shown([*COMMAND, "trian"])
    assert done.returncode == 2 and "trian" in done.stderr and "train" in done.stderr
    for name in (*touchstone.PACKAGES, *touchstone.OF_MODEL):
        done = shown([*COMMAND, name, "--help"])
        assert done.returncode == 0 and "usage: touchstone" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_wheel_installs_alone_and_trains(tmp_path):
    """Built, installed into a new environment that sees this one's libraries and no file of the checkout, and run."""
    source = tmp_path / "source"  # a build leaves files beside what it builds
    source.mkdir()
    for name in touchstone.PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("touchstone.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    shutil.copytree(ROOT / "tests" / "seam", source / "tests" / "seam")  # which must not be in the wheel
    done = shown([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source])
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("touchstone-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names if not name.startswith("touchstone")}
    assert folders == set(touchstone.PACKAGES), "no tests, nothing else"
    assert {f"{name}/py.typed" for name in touchstone.PACKAGES} <= set(names) and "train/recipes/qlora.toml" in names
    assert shown([sys.executable, "-m", "venv", tmp_path / "venv"]).returncode == 0
    binaries = tmp_path / "venv" / "bin"
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    libraries = [folder for folder in sys.path if folder.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    done = shown([binaries / "pip", "install", "-q", "--no-deps", wheel])
    assert done.returncode == 0, done.stderr
    options = {**SETTINGS, "steps": 5, "cache": tmp_path / "cache", "out": tmp_path / "run"}
    line = [binaries / "touchstone", "train", *arguments(options), "--corpus", write_corpus(tmp_path / "corpus")]
    done = shown(line, tmp_path)
    assert done.returncode == 0 and "done at step 5" in done.stdout, done.stderr
    where = shown([binaries / "python", "-c", "import train, touchstone; print(train.__file__, touchstone.__file__)"], tmp_path)
    assert all(place.startswith(str(packages)) for place in where.stdout.split()), where.stdout
