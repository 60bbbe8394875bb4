"""--reward tests: what a reply's code does ends in its sandbox, counts 0 and leaves nothing; without bubblewrap it refuses.

Where bwrap is missing or may make no namespaces, each test of what is run asserts that the feature refuses instead.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

import train.rewards.sandbox as sandbox
import train.start
from tests.policy_runs import prompts, write_place
from tests.records import write_rows
from tests.runs import ROOT, arguments, command, metrics, stopped_at
from train.config import RewardConfig
from train.rewards.code import CodeRunner, last_code, read_tests
from train.rewards.open import Rewards, open_rewards
from train.rewards.sample import Sample
from train.runs.errors import TrainError

SECONDS = 5.0  # of right code on a busy machine
ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(2, 2) == 4"]
RIGHT = "def add(a, b):\n    return a + b\n"


def sample(code: str, tests: object = ADD, name: str = "rows.jsonl:1", **columns: object) -> Sample:
    return Sample("Add.", code, {"tests": tests} | columns, True, 9, name)


def opened(*texts: str, seconds: float = SECONDS, workers: int = 2) -> Rewards:
    """Rewards with permission."""
    asked = RewardConfig(texts or ("tests",), reward_workers=workers, reward_timeout=seconds, allow_code_rewards=True)
    return open_rewards(asked)


def refusal() -> str:
    """What this machine refuses with; "" if it has sandboxes."""
    try:
        opened().start()
    except TrainError as error:
        return str(error)
    return ""


REFUSAL = refusal()


def judged(*samples: Sample, texts: tuple[str, ...] = ("tests",), **settings: object) -> list[list[float]] | None:
    """The values of samples; None where nothing is run, as is asserted then."""
    rewards = opened(*texts, **settings)
    if not REFUSAL:
        return rewards(samples).tolist()
    assert REFUSAL.startswith("--reward tests: ") and "apt install bubblewrap" in REFUSAL and "user namespaces" in REFUSAL
    with pytest.raises(TrainError, match=r"--reward tests: .*Nothing is run without it"):
        rewards(samples)
    return None


def values(*codes: str, tests: object = ADD, **settings: object) -> list[float] | None:
    found = judged(*(sample(code, tests) for code in codes), **settings)
    return None if found is None else [value for (value,) in found]


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path, monkeypatch):
    """After each test no process has the program of its sandboxes, which is marked, on its command line."""
    mark = f"# {tmp_path.name} {os.getpid()} {time.monotonic_ns()}"
    marked = tmp_path / "harness.py"
    marked.write_text(f"{sandbox.HARNESS.read_text()}\n{mark}\n")
    monkeypatch.setattr(sandbox, "HARNESS", marked)
    yield
    marked.unlink()
    assert not running(mark)


def running(mark: str) -> list[str]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(each)] if mark.encode() in each.read_bytes() else []
        except OSError:  # it has ended
            continue
    return found


# ---- what counts

def test_right_code_counts_1_and_the_share_is_of_assertions():
    block = f"Here:\n```python\n{RIGHT}```\nSo `add(1, 2)` gives\n```\n3\n```\n"
    shares = {
        RIGHT: 1, block: 1, "def add(a, b):\n    return abs(a) + abs(b)\n": 2 / 3, "def add(a, b): return 3": 1 / 3, "": 0,
        "It is easy: add them.": 0, "def add(a, b):\n    return a +": 0, "def plus(a, b): return a + b": 0,
        f"{RIGHT}\nprint(add('x'))": 0, "import numpy\n" + RIGHT: 0, "\0": 0,
        "\udce9": 0, RIGHT + "# \U0001f600": 1, "(" * 5000: 0, "x = " + "-" * 50000 + "1": 0,
    }  # fmt: skip
    found = judged(*map(sample, shares), texts=("tests", "tests:share"))
    assert found in (None, [[float(share == 1), share] for share in shares.values()])


def test_setup_comes_before_and_names_are_shared():
    columns = {"setup": "import math\nHALF = 0.5", "tests": "assert half(3) == 1.5\nassert math.isclose(half(1), HALF)"}
    codes = ("def half(x): return x * HALF", "def half(x): return math.floor(x / 2)")
    found = judged(*(sample(code, **columns) for code in codes))
    assert found in (None, [[1], [0]])


def test_several_in_parallel_keep_their_order():
    codes = [f"import time\ntime.sleep({0.3 * (number % 2)})\ndef add(a, b): return {number}" for number in range(8)]
    start = time.monotonic()
    found = values(*codes, tests=["assert add(0, 0) % 3 == 0"], workers=4, seconds=5)
    assert found in (None, [1, 0, 0, 1, 0, 0, 1, 0]) and time.monotonic() - start < 0.3 * 8
    assert values(workers=4) in (None, [])


def test_results_do_not_depend_on_the_seed_of_hashes():
    if not REFUSAL:
        code = "order = [*{str(each) for each in range(40)}]"
        program = sandbox.Program("", code, [f"assert order[{each}] < order[{each + 1}]" for each in range(12)])
        first = sandbox.run_tests(program, SECONDS)
        assert set(first) == {True, False} and all(sandbox.run_tests(program, SECONDS) == first for _ in range(2))


# ---- what ends in 0

HOME, PYTHON = os.path.expanduser("~"), Path(os.path.realpath(sys._base_executable))
ENDS = {  # code of a reply, after which its assertions would pass
    "an endless loop": "while True: pass",
    "an endless loop that catches": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "an endless loop in the function": "def add(a, b):\n    while True: pass",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a patient fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a child": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', '1'])",
    "a thread": "import threading\nthreading.Thread(target=print).start()",
    "10 GB": "x = bytearray(10 * 2 ** 30)",
    "10 GB by and by": "x = []\nwhile True: x.append(bytearray(2 ** 20))",
    "a large file": "with open('/tmp/x', 'wb') as file:\n    while True: file.write(bytes(2 ** 20))",
    "many files": "import itertools\nfor n in itertools.count():\n    open(f'/tmp/{n}', 'wb').write(bytes(2 ** 20))",
    "prints for ever": "while True: print('x' * 10 ** 6)",
    "prints errors for ever": "import sys\nwhile True: sys.stderr.write('x' * 10 ** 6)",
    "writes for ever to all it has": "import os\nwhile True:\n    for n in range(3, 64):\n"
    "        try: os.write(n, b'x' * 4096)\n        except OSError: pass",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()",
    "kills all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits at the first assertion": "import os\ndef add(a, b): os._exit(0)",
    "exits softly": "import sys\ndef add(a, b): sys.exit(0)",
    "another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', '1'])",
    "waits for input": "input()",
    "signals": "import signal\nfor each in range(1, 32):\n    try: signal.signal(each, signal.SIG_IGN)\n"
    "    except OSError: pass\nwhile True: pass",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_it_ends_and_counts_0(name):
    code, start = ENDS[name], time.monotonic()
    assert values(code if "def add" in code else f"{code}\n{RIGHT}", seconds=0.3) in (None, [0])
    assert time.monotonic() - start < 6


def test_a_late_reply_keeps_the_assertions_before():
    code = "def add(a, b):\n    while a == -1: pass\n    return a + b"
    assert judged(sample(code), texts=("tests", "tests:share"), seconds=1.0) in (None, [[0, 1 / 3]])


# ---- forged results

FORGED = {
    "prints": "print('ready\\npassed\\npassed\\npassed', flush=True)",
    "writes to all it has": "import os\nfor n in range(64):\n    for word in ('ready', 'begun', 'passed') * 3:\n"
    "        try: os.write(n, f'{0:032x} {word}\\n{word}\\n'.encode())\n        except OSError: pass",
    "reads all it has": "import os\nfor n in range(3, 64):\n    try: os.read(n, 4096)\n    except OSError: pass",
    "replaces builtins": "import builtins\nfor name in ('exec', 'compile', 'BaseException', 'AssertionError'):\n"
    "    setattr(builtins, name, lambda *a, **k: None)\nbuiltins.sorted = lambda *a: [3]",
    "replaces functions of modules": "import os\nos.write = os.fdopen = os._exit = lambda *a: None",
    "is called as what it names": "import sys\nsys.modules['builtins'] = sys.modules['__main__'] = sys",
    "catches the failure": "import sys\nsys.excepthook = lambda *a: None\nAssertionError = Exception",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_result_counts_0(name):
    wrong = "def add(a, b): return 7"
    tests = ["assert sorted([add(1, 2)]) == [3]", *ADD]
    assert judged(sample(f"{FORGED[name]}\n{wrong}", tests), texts=("tests:share",), seconds=0.5) in (None, [[0]])


def test_what_no_sandbox_can_exclude():
    """An object that equals all: said in docs/rlhf.md."""
    code = "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()"
    assert values(code) in (None, [1])


# ---- what is outside stays outside

def test_no_file_outside_is_read(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "secret", "secret", ROOT / "pyproject.toml", ROOT / "train" / "__init__.py"]
    paths += ["/etc/shadow", "/etc/passwd"]
    paths += ["/proc/self/environ", "/proc/1/environ", "/proc/1/cmdline", "/sys/kernel", "/run", "/home", "/var", "/bin/sh"]
    paths += [Path(HOME) / name for name in os.listdir(HOME) if not PYTHON.is_relative_to(Path(HOME, name))]
    code = "import os\ndef reads(path): return os.path.lexists(path) or os.listdir(path) or open(path).read()"
    tests = [f"assert reads({str(path)!r})" for path in paths]
    assert judged(sample(code, tests), texts=("tests:share",)) in (None, [[0]])


def test_folders_inside_what_is_mounted_are_empty(monkeypatch):
    """Installed packages; and the repository, the working directory and the home, wherever they are."""
    library = Path(os.__file__).resolve().parent
    monkeypatch.setattr(sandbox, "REPOSITORY", library / "wsgiref")
    monkeypatch.chdir(library / "xmlrpc")
    paths = [library / "wsgiref", library / "xmlrpc", library / "site-packages"]
    tests = [f"assert not os.path.exists({str(path)!r}) or os.listdir({str(path)!r}) == []" for path in paths]
    assert judged(sample("import os", [*tests, "import json; assert json.loads('1') == 1"])) in (None, [[1]])


def test_no_file_outside_is_written(tmp_path):
    folders = [tmp_path, ROOT, HOME, "/", "/etc", "/usr", "/usr/lib", "/dev", "/dev/shm", "/var/tmp", PYTHON.parent]
    folders += [Path(os.__file__).parent, Path.cwd()]
    name = f"written-{os.getpid()}-{time.monotonic_ns()}"
    code = "def writes(path):\n    open(path, 'w').write('x')\n    return True"
    tests = [f"assert writes({str(Path(each, name))!r})" for each in folders]
    assert judged(sample(code, tests), texts=("tests:share",)) in (None, [[0]])
    assert not [each for each in folders if Path(each, name).exists()]
    code = f"import os\nos.makedirs({str(tmp_path)!r}, exist_ok=True)\n{code}"  # a /tmp of its own
    assert values(code, tests=tests[:1]) in (None, [1]) and not (tmp_path / name).exists()


def test_no_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 0.2)\n"
        assert values(code + RIGHT) in (None, [0])
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("TOKEN_OF_MINE", "secret")
    code = "import os\nfound = {name: os.environ[name] for name in os.environ}"
    tests = ["assert 'TOKEN_OF_MINE' in found", "assert 'secret' in str(found)", f"assert {str(ROOT)!r} in str(found)"]
    assert judged(sample(code, tests), texts=("tests:share",)) in (None, [[0]])


def test_it_is_an_unprivileged_user():
    code = "import os\nids = os.getresuid() + os.getresgid()\ndef root(): os.setuid(0); return True"
    tests = ["assert set(ids) == {65534} and len(ids) == 6", "assert root()"]
    assert judged(sample(code, tests), texts=("tests:share",)) in (None, [[0.5]])


# ---- refused

def test_it_needs_permission():
    for text in ("tests", "tests:share"):
        with pytest.raises(TrainError) as caught:
            open_rewards(RewardConfig(("exact", text)))
        assert str(caught.value).startswith(f"--reward {text} runs the code that the network writes, in a sandbox of ")
        assert str(caught.value).endswith("add --allow-code-rewards")
    with pytest.raises(TrainError, match="--reward-workers 0: --reward tests runs code in sandboxes alone"):
        opened(workers=0)
    with pytest.raises(TrainError, match=r"--reward tests:most: 'most' is not known: all .* or share"):
        opened("tests:most")
    assert opened(seconds=2).describe().endswith("run by bubblewrap, in 2 sandboxes at a time, at most 2 s a reply")
    assert RewardConfig().test_seconds == 5 and RewardConfig().function_seconds == 30


def write_bwrap(folder: Path, script: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "bwrap").chmod(0o755)


def test_without_bubblewrap_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = tmp_path / "ran"
    with pytest.raises(TrainError) as caught:
        opened()([sample(f"open({str(ran)!r}, 'w')")])
    assert "is run only by bubblewrap, and there is no bwrap on the PATH" in str(caught.value)
    assert "apt install bubblewrap" in str(caught.value) and not ran.exists()


def test_a_machine_that_forbids_namespaces_is_refused(tmp_path, monkeypatch):
    said = "bwrap: No permissions to create new namespace, likely because the kernel does not allow them"
    write_bwrap(tmp_path, f"echo '{said}' >&2\nexit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for own in (True, False):  # of root and of others
        monkeypatch.setattr(sandbox, "switches_user", lambda own=own: own)
        with pytest.raises(TrainError) as caught:
            opened().check([sample("")])
        assert f"--reward tests: bubblewrap cannot start a sandbox here: {said}. It needs" in str(caught.value)


def test_a_sandbox_that_does_not_hold_is_refused(tmp_path, monkeypatch):
    write_bwrap(tmp_path, 'while [ "$1" != -- ]; do shift; done\nshift\nexec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "switches_user", lambda: False)
    with pytest.raises(TrainError, match=r"--reward tests: no sandbox here .*, as a trial has shown: nothing is run"):
        opened().start()


RECORDS = {  # columns of a record: what is said
    "no tests": ({"answer": "3"}, "the record has no column 'tests'; it has 'answer'"),
    "no list": ({"tests": 3}, "the record's column 'tests' holds 3: a list of assertions or a text is expected"),
    "empty": ({"tests": []}, "the record's column 'tests' holds []: "),
    "no text": ({"tests": ["assert f()", 3]}, "the record's column 'tests' holds ['assert f()', 3]: "),
    "no Python": ({"tests": ["assert f()", "assert f("]}, "the record's column tests, number 2, is no Python (line 1: '(' was"),
    "no assertion": ({"tests": ["f() == 3"]}, "the record's column 'tests', number 1, asserts nothing"),
    "lines": ({"tests": "x = f()\nassert x"}, "the record's column 'tests', number 1, asserts nothing"),
    "setup": ({"tests": ["assert f()"], "setup": "import"}, "the record's column setup, is no Python (line 1: "),
    "no code": ({"tests": ["assert f()"], "setup": 3}, "the record's column 'setup' holds a int; code as text"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_broken_record_is_named_at_the_start(name):
    columns, said = RECORDS[name]
    with pytest.raises(TrainError) as caught:
        opened().check([sample(""), Sample("Add.", "", columns, True, 1, "rows.jsonl:7")])
    assert str(caught.value).startswith(f"--reward tests: {said}"), caught.value
    assert str(caught.value).endswith("; rows.jsonl:7, prompt 'Add.', reply ''")


def test_a_setup_that_fails_is_named_and_is_no_reply():
    if REFUSAL:
        return
    for setup, said in (("import numpy", "raises ModuleNotFoundError: \"No module named 'numpy'"), ("f()", "raises NameError")):
        with pytest.raises(TrainError) as caught:
            opened()([sample(RIGHT, setup=setup)])
        assert f"--reward tests: the record's setup {said}" in str(caught.value) and "rows.jsonl:1" in str(caught.value)
    with pytest.raises(TrainError, match="the record's setup does not come to its end within 60 s and 512 MiB"):
        opened()([sample(RIGHT, setup="import os; os._exit(0)")])


# ---- the code of a reply

CODES = {
    "x = 1": "x = 1",
    "```\na\n```\n```\nb\n```": "b\n",
    "```python\na\n```\n```\nb\n```": "a\n",
    "```py\na\n```\n```Python3\nb\n```\n```sh\nc\n```": "b\n",
    "text\n```python\na\n  b": "a\n  b\n",
    "````python\na\n```\nb\n````": "a\n```\nb\n",
    "~~~\na\n```\n~~~": "a\n```\n",
    "```python\n```": "",
    "one ``` two": "one ``` two",
    "```x`\na": "```x`\na",
}


@pytest.mark.parametrize("reply", CODES)
def test_the_code_of_a_reply(reply):
    assert last_code(reply) == CODES[reply]


def test_one_text_of_tests_is_its_statements():
    text = "\n  assert f(1)\n\n  assert (f(\n    2))\n  # no\n  for x in (1, 2): assert f(x)"
    assert read_tests({"tests": text, "setup": None}) == (
        "", ["assert f(1)", "assert (f(\n  2))", "for x in (1, 2): assert f(x)"],
    )  # fmt: skip


# ---- runs

@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = write_place(tmp_path_factory.mktemp("code"))
    for name, count, seed in (("train", 8, 0), ("held_out", 4, 1)):
        rows = [row | {"tests": ["assert 1 + 1 == 2", "assert f()"]} for row in prompts(count, seed)]
        write_rows(place / f"{name}.jsonl", rows)
    return place


def options(place: Path, *more: str) -> list[str]:
    settings = {
        "objective": "grpo", "init": place / "base", "corpus": place / "train.jsonl", "validation": place / "held_out.jsonl",
        "batch-size": 8, "context": 128, "threads": 1, "device": "cpu", "precision": "fp32", "sample-every": 0, "steps": 2,
        "save-every": 1, "eval-every": 2, "optimizer": "adamw", "grpo.group": 4, "grpo.max-reply": 8,
        "grpo.validation-prompts": 2,
    }  # fmt: skip
    return [*arguments(settings), *more]


def test_a_run_of_grpo_and_its_resume(place, tmp_path):
    run, asked = tmp_path / "run", ("--reward", "tests:share", "length_target:4", "--reward-timeout", "2")
    said = command(*options(place, *asked), "--out", run)
    assert said.code == 2 and "add --allow-code-rewards" in said.err and not run.exists()
    if REFUSAL:
        said = command(*options(place, *asked, "--allow-code-rewards"), "--out", run)
        assert said.code == 2 and said.err == f"error: {REFUSAL}\n"
        return
    stopped = stopped_at(1, *options(place, *asked, "--allow-code-rewards"), "--out", run)
    assert stopped.code == 130 and "the code of replies is run by bubblewrap, in 1 sandbox, at most 2 s a reply" in stopped.out
    assert "allow_code_rewards" not in (run / "config.toml").read_text()
    said = command("--resume", run)
    assert said.code == 2 and f"train --resume {run} --allow-code-rewards" in said.err
    assert f"train --resume {run} --allow-code-rewards" in stopped.out
    assert command("--resume", run, "--allow-code-rewards").code == 0
    steps = [row for row in metrics(run) if row["split"] == "train"]
    assert [row["step"] for row in steps] == [1, 2] and all(0 <= row["reward_tests"] <= 1 for row in steps)
    written = (run / "config.toml").read_text()
    (run / "config.toml").write_text(written.replace("[rewards]\n", "[rewards]\nallow_code_rewards = true\n"))
    said = command("--resume", run)
    assert said.code == 2 and "config.toml: allow_code_rewards is no setting of a file: remove it" in said.err


def test_a_recipe_cannot_allow_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr(train.start, "start", lambda config: pytest.fail("the run began"))
    recipe = tmp_path / "own.toml"
    recipe.write_text("[rewards]\nreward = ['tests']\nallow_code_rewards = true\n")
    said = command(*options(place, "--recipe", recipe, "--allow-code-rewards"))
    assert said.code == 2 and "own.toml: allow_code_rewards is no setting of a file" in said.err
    recipe.write_text("[rewards]\nreward = ['tests']\n")
    assert "add --allow-code-rewards" in command(*options(place, "--recipe", recipe)).err


def test_a_record_without_tests_ends_a_run_at_its_start(place, tmp_path):
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "rows.jsonl", [*rows[:3], {name: value for name, value in rows[3].items() if name != "tests"}])
    said = command(*options(place, "--reward", "tests", "--allow-code-rewards", "--corpus", tmp_path / "rows.jsonl"))
    assert said.code == 2 and "rows.jsonl:4" in said.err and "tests" in said.err


def test_the_number_of_sandboxes_is_that_of_workers():
    assert CodeRunner(RewardConfig(("tests",), reward_workers=3, allow_code_rewards=True)).count == 3
