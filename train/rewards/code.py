"""Code rewards: the code in a reply, the assertions of a record, and sandboxes in parallel (--reward tests)."""

import ast
import re
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.messages import quote_names
from train.config import RewardConfig
from train.rewards.names import require_permission
from train.rewards.sample import Sample, describe_sample
from train.rewards.sandbox import REPOSITORY, Program, SandboxError, run_tests
from train.runs.errors import TrainError

FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})[ \t]*([\w+.-]*)[^`]*")
PYTHON = ("python", "python3", "py")
TRIAL_SECONDS = 30
TRIAL = """
import os, socket

def raises(function, *arguments):
    try:
        function(*arguments)
    except (OSError, MemoryError):
        return True

def start():
    if os.fork() == 0:
        os._exit(0)
"""
TRIALS = {  # what a sandbox is to do: an assertion that shows it
    "runs code": "assert sorted([2, 1]) == [1, 2]",
    "makes it an unprivileged user": "assert os.getuid() == os.geteuid() == os.getgid() == 65534",
    "lets it start no process": "assert raises(start)",
    "limits its memory": "assert raises(bytearray, 2 ** 30)",
    "gives it no network": "assert {name for _, name in socket.if_nameindex()} <= {'lo'}",
    "lets it write to /tmp alone": "assert [each for each in ('/', '/dev', '/tmp') if os.access(each, os.W_OK)] == ['/tmp']",
    "hides files": f"assert not any(map(os.path.exists, ('/etc/passwd', '/proc', {str(REPOSITORY / 'train')!r})))",
}


def last_code(reply: str) -> str:
    r"""Return the last fenced block of Python in a reply, else its last fenced block, else the reply.

    A block that is not closed goes to the end of the text, as in CommonMark.

    >>> last_code("So:\n```python\nx = 1\n```\nIt prints\n```\n1\n```\n"), last_code("```\nx = 1"), last_code("x = 1")
    ('x = 1\n', 'x = 1\n', 'x = 1')
    """
    blocks: list[tuple[bool, list[str]]] = []
    fence = ""
    for line in reply.splitlines():
        found = FENCE.fullmatch(line)
        if fence:
            if found and found[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
            else:
                blocks[-1][1].append(line)
        elif found:
            fence = found[1]
            blocks.append((found[2].lower() in PYTHON, []))
    if not blocks:
        return reply
    lines = next((lines for is_python, lines in reversed(blocks) if is_python), blocks[-1][1])
    return "".join(f"{line}\n" for line in lines)


def read_tests(record: Mapping[str, object]) -> tuple[str, list[str]]:
    """Return (setup, assertions) of a record: its columns `setup`, text, and `tests`, a list of texts or one of statements.

    Errors (TrainError): no `tests`; another type; a text that is no Python; a test that asserts nothing.

    >>> read_tests({"tests": "assert f(1) == 2\\nassert f(2) == 3"})
    ('', ['assert f(1) == 2', 'assert f(2) == 3'])
    """
    tests, setup = record.get("tests"), record.get("setup")
    if tests is None:
        raise TrainError(f"the record has no column 'tests'; it has {quote_names(record)}")
    setup = "" if setup is None else setup
    if not isinstance(setup, str):
        raise TrainError(f"the record's column 'setup' holds a {type(setup).__name__}; code as text is expected")
    _parse(setup, "setup")
    if isinstance(tests, str):
        text = textwrap.dedent(tests)
        tests = [ast.get_source_segment(text, each) for each in _parse(text, "tests").body]
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(each, str) for each in tests):
        raise TrainError(f"the record's column 'tests' holds {tests!r:.60}: a list of assertions or a text is expected")
    for number, test in enumerate(tests, 1):
        if not any(isinstance(node, ast.Assert) for node in ast.walk(_parse(test, f"tests, number {number}"))):
            raise TrainError(f"the record's column 'tests', number {number}, asserts nothing: {test!r:.60}")
    return setup, list(tests)


def _parse(text: str, where: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        raise TrainError(f"the record's column {where}, is no Python ({said}): {text!r:.60}") from None


class CodeRunner:
    """Sandboxes, `reward_workers` at a time, that run the code of replies against the tests of their records.

    Errors (TrainError): the configuration does not allow it.
    """

    def __init__(self, config: RewardConfig):
        require_permission(config)
        self.count, self.seconds, self.is_tried = config.reward_workers, config.test_seconds, False

    def start(self) -> None:
        """Run a trial, which shows that the sandbox holds on this machine. Errors (TrainError): it does not."""
        if self.is_tried:
            return
        try:
            results = run_tests(Program("", TRIAL, list(TRIALS.values())), max(self.seconds, TRIAL_SECONDS))
        except SandboxError as error:
            raise TrainError(f"--reward tests: {error}") from None
        if failed := [what for what, passed in zip(TRIALS, results, strict=True) if not passed]:
            raise TrainError(f"--reward tests: no sandbox here {failed[0]}, as a trial has shown: nothing is run")
        self.is_tried = True

    def __call__(self, samples: Sequence[Sample]) -> list[list[bool]]:
        """Return for each sample whether each of its record's assertions passes.

        Errors (TrainError): those of `read_tests`; the record's setup fails; no sandbox can be started.
        """
        self.start()
        with ThreadPoolExecutor(self.count, "sandbox") as pool:
            try:
                return list(pool.map(self._judge, samples))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _judge(self, sample: Sample) -> list[bool]:
        try:
            setup, tests = read_tests(sample.record)
            code = last_code(sample.reply)
            return run_tests(Program(setup, code, tests), self.seconds) if code.strip() else [False] * len(tests)
        except TrainError as error:
            raise TrainError(f"--reward tests: {error}; {describe_sample(sample)}") from None

    def describe(self) -> str:
        """Describe what is run, for the introduction of a run."""
        number: Any = "1 sandbox" if self.count == 1 else f"{self.count} sandboxes at a time"
        return f"the code of replies is run by bubblewrap, in {number}, at most {self.seconds:g} s a reply"
