"""Mutants in a temporary copy of the work tree, one after the other, and what pytest says of them.

A test that fails kills a mutant, if it passes without the mutant; so does a process that crashes. At the time limit a mutant is
killed too if one test had been running for half of it that takes less than a quarter without the mutant: it waits or loops.
Else the result is "timeout": all tests that ran passed, and some are left.
"""

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import cache_from_source
from pathlib import Path
from typing import NamedTuple

from tests.mutants.draw import Mutant

PYTEST = ["-m", "pytest", "-v", "--color=no", "--tb=line", "-p", "no:cacheprovider", "--doctest-modules"]
SHARED_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}  # by content: no mutant spoils them
MEMORY = 12 << 30  # bytes of address space: a mutant that allocates without end ends itself alone
PASSED = (0, 5)  # pytest's exit codes: all passed, no tests
DONE = re.compile(r"(\S.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]")
BEGUN = re.compile(r"(\S+::.*\S) *")
OVER = re.compile(r"=+ (FAILURES|ERRORS|warnings summary|short test summary info) =+")
UNCOLLECTED = re.compile(r"_* ERROR collecting (.*\S) _*")


class Ran(NamedTuple):
    """A run of pytest."""

    code: int | None  # None: it was stopped at the limit
    seconds: float
    passed: int
    failed: tuple[str, ...]  # tests, and files that could not be imported
    running: str | None  # the test that was running when the process ended
    running_for: float


class Result(NamedTuple):
    status: str  # killed, survived, timeout
    by: str  # the test that killed it
    seconds: float
    passed: int  # tests before the end


class Copy:
    """A copy of a work tree: tracked and new files, without those that git ignores."""

    def __init__(self, root: Path, limit: float):
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        self.tree, self.limit = self.folder / "tree", limit
        self.unchanged: dict[str, float] = {}  # a test -> its seconds without a mutant
        self.broken: set[str] = set()  # tests that fail without a mutant too
        self.process: subprocess.Popen | None = None
        self.is_closed = False
        for file in tracked(root):
            target = self.tree / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, target)

    def close(self) -> None:
        self.is_closed = True
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """End pytest and the processes that tests have started."""
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        path = self.tree / mutant.file
        data = path.read_bytes()
        try:
            self.write(path, mutant.edit.apply(data))
            yield
        finally:
            self.write(path, data)

    def write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        Path(cache_from_source(str(path))).unlink(missing_ok=True)  # Python compares seconds and sizes, which may be the same

    def pytest(self, options: Sequence[str], limit: float) -> Ran:
        home = Path(tempfile.mkdtemp(dir=self.folder))  # what a mutant stores, no other finds
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environment |= {"PYTHONPATH": str(self.tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(home)}
        environment |= {"TMPDIR": str(home), "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environment |= {name: str(self.folder / folder) for name, folder in SHARED_CACHES.items()}
        begun, log = time.time(), home / "log"
        with open(log, "wb") as file:
            self.process = process = subprocess.Popen(
                [sys.executable, *PYTEST, *options],
                cwd=self.tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            if hasattr(resource, "prlimit"):
                resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                self.stop()
        if self.is_closed:
            raise RuntimeError("the run was interrupted")
        ended, last = time.time(), log.stat().st_mtime
        said = log.read_text(encoding="utf-8", errors="replace")
        shutil.rmtree(home, ignore_errors=True)
        return Ran(code, ended - begun, *read_log(said), ended - last)

    def try_mutant(self, mutant: Mutant, tests: list[str]) -> Result:
        """Run the tests on a mutant. Tests that fail without the mutant too are left out, and it is tried again."""
        while sound := [test for test in tests if test not in self.broken]:
            left_out = [f"--deselect={test}" for test in sorted(self.broken)]
            with self.changed(mutant):
                ran = self.pytest(["-x", *sound, *left_out], self.limit)
            test = ran.failed[0] if ran.failed else ran.running
            if ran.code in PASSED:
                return Result("survived", "", ran.seconds, ran.passed)
            if ran.code is None:
                is_stuck = test and ran.running_for > self.limit / 2 and self.seconds_unchanged(test) < self.limit / 4
                return Result("killed" if is_stuck else "timeout", f"{test} (time limit)", ran.seconds, ran.passed)
            if self.seconds_unchanged(test or sound[0]) < math.inf:
                return Result("killed", test or f"pytest's start, exit code {ran.code}", ran.seconds, ran.passed)
            if not test or test in self.broken:
                raise RuntimeError(f"{sound[0]} fails without a mutant too, with exit code {ran.code}")
            whole_file = self.pytest([test.partition("::")[0]], self.limit)
            self.broken |= {test, *whole_file.failed}
        return Result("survived", "", 0, 0)

    def seconds_unchanged(self, test: str) -> float:
        """The time that a test takes without a mutant; inf where it does not pass. Of a whole file, that of its import."""
        if test not in self.unchanged:
            ran = self.pytest([test] if "::" in test else ["--collect-only", test], self.limit)
            self.unchanged[test] = ran.seconds if ran.code in PASSED else math.inf
        return self.unchanged[test]


def tracked(root: Path) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, capture_output=True)
    if listed.returncode:
        files = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if "__pycache__" not in path.parts]
    else:
        files = listed.stdout.decode().split("\0")
    return [file for file in files if (root / file).is_file()]


def read_log(said: str) -> tuple[int, tuple[str, ...], str | None]:
    """Read pytest's lines: how many tests passed, which failed, which had no result yet.

    >>> read_log("a.py::f PASSED [ 33%]\\na.py::g[1 - 2] FAILED [ 66%]\\n")
    (1, ('a.py::g[1 - 2]',), None)
    >>> read_log("a.py::f PASSED [ 33%]\\na.py::g[1 - 2] ")
    (1, (), 'a.py::g[1 - 2]')
    """
    passed, failed, running, is_over = 0, [], None, False
    for line in said.splitlines():
        is_over = is_over or OVER.fullmatch(line) is not None
        if done := DONE.fullmatch(line):
            running = None
            passed += done[2] == "PASSED"
            failed += [done[1]] if done[2] in ("FAILED", "ERROR") else []
        elif uncollected := UNCOLLECTED.fullmatch(line):
            failed.append(uncollected[1])
        elif not is_over and (begun := BEGUN.fullmatch(line)):
            running = begun[1]
    return passed, tuple(failed), running
