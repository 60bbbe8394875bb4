"""Faults of reward functions: one error that names the function, the record, the reply; and no process stays."""

import os
import py_compile
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train.__main__
import train.start
from tests.runs import ROOT, command
from train.config import RewardConfig, TrainConfig
from train.config_toml import from_plain, to_plain, with_absolute_paths
from train.needs import NEEDS
from train.overrides import OVERRIDES
from train.rewards.given import check_given_again, reward_hashes
from train.rewards.open import open_rewards
from train.rewards.sample import Sample
from train.rewards.user import read_user_reward
from train.rewards.workers import Workers
from train.runs.errors import TrainError
from train.tasks.clm import CausalTask

FUNCTIONS = """
import os, time
import numpy, asyncio
LIMIT = 3

def nan(completions):
    return [float("nan") if text == "b" else 1 for text in completions]

def infinite(completions):
    return [10 ** 400 if text == "b" else 1 for text in completions]

def text(completions):
    return ["good" if text == "b" else 1 for text in completions]

def raises(completions):
    return [1 / (text != "b") for text in completions]

def raises_together(completions):
    return [1 / (len(completions) == 1)]

def leaves(completions):
    raise SystemExit(3)

def short(completions):
    return [1.0]

def scalar(completions):
    return 1.0

def generator(completions):
    return (1.0 for _ in completions)

async def waits(completions):
    return [1.0]

def awaits(completions):
    async def inside(): pass
    return inside()

def sleeps(completions):
    time.sleep("b" in completions and 60)
    return [0.0] * len(completions)

def spins(completions):  # and never lets go of Python's lock
    import re
    re.fullmatch("(a+)+c", "a" * 60)

def dies(completions):
    os._exit(7) if "b" in completions else None
    return [0.0] * len(completions)

def is_killed(completions):
    os.kill(os.getpid(), 9)

def wants(completions, solution):
    return [1.0] * len(completions)

def positional(completions, /):
    return []

def all_of_it(**kwargs):
    return [1.0] * len(kwargs["completions"])
"""
ONE = "row.jsonl:2, prompt 'Say b', reply 'b'"
GROUP = "2 replies to a prompt, the first: row.jsonl:2, prompt 'Say b', reply 'c'"
CALLS = {  # a function: what is said
    "nan": (f"returned nan for {ONE}", "or None, which leaves the reply out"),
    "infinite": ("returned 1000", f"for {ONE}"),
    "text": (f"returned 'good', not a number, for {ONE}",),
    "raises": (f"raised ZeroDivisionError: division by zero (line 16); {ONE}",),
    "raises_together": ("raised ZeroDivisionError", "2 replies to row.jsonl:2 together, and none alone"),
    "leaves": ("raised SystemExit: 3", "row.jsonl:1"),
    "short": ("returned 1 value for 2 replies to row.jsonl:2: one a reply",),
    "scalar": ("returned 1.0 for 1 reply to row.jsonl:1; a list of numbers",),
    "generator": ("returned <generator object", "a list of numbers is expected"),
    "awaits": ("awaits is async",),
    "wants": ("takes 'solution', which is no column of row.jsonl:1; it has 'answer'",),
}
FILES = {  # PATH.py:FUNCTION: what is said before anything is run
    "mine.py:waits": "waits is async",
    "mine.py:infinit": "has no function 'infinit'; it has 'infinite'",
    "absent.py:f": "absent.py cannot be read (No such file or directory)",
    "broken.py:f": "line 2: ",
}
LOADED = {  # what is said when the file is imported
    "mine.py:LIMIT": "LIMIT is a int, not a function",
    "mine.py:positional": "'completions' has none",
    "fails.py:f": "the file does not import: KeyError: 'no' (line 3)",
    "quits.py:f": "the file does not import: SystemExit: 0 (line 1)",
}


def sample(reply: str, name: str = "row.jsonl:2", **columns) -> Sample:
    return Sample("Say b", reply, columns or {"answer": "b"}, True, 1, name)


SAMPLES = [sample("a", "row.jsonl:1"), sample("c"), sample("b")]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "fails.py").write_text("def f(completions):\n    pass\n{}['no']\n")
    (tmp_path / "quits.py").write_text("raise SystemExit(0)\ndef f(): pass\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewards(*texts: str, **settings):
    return open_rewards(RewardConfig(texts, **settings))


def refused(*texts: str, samples=SAMPLES, **settings) -> str:
    with pytest.raises(TrainError) as caught, rewards(*texts, **settings) as opened:
        opened(samples)
    return str(caught.value)


@pytest.mark.parametrize("function", CALLS)
def test_a_bad_result_names_the_reply(function, place):
    said = refused(f"mine.py:{function}", reward_workers=0)
    assert said.startswith(f"--reward mine.py:{function}") and all(part in said for part in CALLS[function]), said


@pytest.mark.parametrize("text", FILES)
def test_a_bad_file_is_refused_before_it_is_run(text, place):
    with pytest.raises(TrainError) as caught:
        rewards(text)
    assert str(caught.value).startswith(f"--reward {text}: ") and FILES[text] in str(caught.value)


@pytest.mark.parametrize("text", LOADED)
def test_a_file_that_does_not_load(text, place):
    assert (said := refused(text, reward_workers=0)).startswith(f"--reward {text}: ") and LOADED[text] in said, said


def test_a_column_may_not_have_the_name_of_an_argument(place):
    assert "has a column 'has_ended'" in refused("mine.py:all_of_it", samples=[sample("b", has_ended=1)], reward_workers=0)
    with rewards("mine.py:short", reward_workers=0) as opened:  # it does not take it
        assert opened([sample("b", has_ended=1)]).tolist() == [[1.0]]


def test_a_file_that_changes_while_the_run_begins(place):
    opened = rewards("mine.py:short", reward_workers=0)
    (place / "mine.py").write_text(FUNCTIONS.replace("LIMIT = 3", "LIMIT = 4"))
    with pytest.raises(TrainError, match=r"mine\.py has changed since the command began \(SHA-256 "):
        opened.start()


def test_the_code_is_the_file_of_the_hash_and_no_older_pyc(place):
    """One of the same size and second, as of an edit that a cache of bytecode does not see."""
    path, times = place / "mine.py", (1e9, 1e9)
    path.write_text("def f(completions):\n    return [1]\n")
    os.utime(path, times)
    py_compile.compile(str(path))
    path.write_text("def f(completions):\n    return [2]\n")
    os.utime(path, times)
    assert rewards("mine.py:f", reward_workers=0)(SAMPLES[:1]).tolist() == [[2.0]]


def test_workers_say_the_same(place):
    """An error of a function, and of an import, crosses the pipe."""
    said = refused("mine.py:short", "mine.py:raises", reward_workers=2)
    assert said in (refused("mine.py:raises", reward_workers=0), refused("mine.py:short", reward_workers=0))
    assert LOADED["fails.py:f"] in refused("fails.py:f")
    assert "a record cannot be sent to a worker process" in (
        unsent := refused("mine.py:short", samples=[sample("b", key=lambda: 1)])
    )
    assert "row.jsonl:2 with key: function" in unsent and "--reward-workers 0" in unsent


@pytest.mark.parametrize("function", ["sleeps", "spins"])
def test_a_late_worker_is_killed(function, place):
    texts = (f"mine.py:{function}",)
    samples = SAMPLES if function == "sleeps" else SAMPLES[1:]
    opened = rewards(*texts, reward_timeout=0.3)
    opened.start()
    processes = [worker.process for worker in opened.workers.workers]
    with pytest.raises(TrainError) as caught:
        opened(samples)
    assert str(caught.value) == f"--reward {texts[0]}: no result after 0.3 s for {GROUP} (--reward-timeout)"
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] and not opened.workers.workers


@pytest.mark.parametrize("function, how", [("dies", "exit code 7"), ("is_killed", "SIGKILL, perhaps for want of memory")])
def test_a_worker_that_ends(function, how, place):
    assert refused(f"mine.py:{function}", samples=SAMPLES[1:]) == (
        f"--reward mine.py:{function}: its worker process ended while it judged {GROUP} ({how})"
    )


def test_a_worker_that_was_killed_between_two_calls(place):
    with rewards("mine.py:short") as opened:
        assert opened(SAMPLES[:1]).tolist() == [[1.0]]
        opened.workers.workers[0].process.kill()
        opened.workers.workers[0].process.join()
        with pytest.raises(TrainError, match=r"has ended \(SIGKILL.*\) before|ended while it judged .* \(SIGKILL"):
            opened(SAMPLES[:1])


RUN = """
import sys, time
from train.rewards.sample import Sample
from train.rewards.user import read_user_reward
from train.rewards.workers import Workers
opened = Workers([read_user_reward(sys.argv[1])], 2, 30)
opened.start()
print(*(worker.process.pid for worker in opened.workers), flush=True)
if sys.argv[2] != "ends":
    opened([(0, [Sample("", "b", {}, True, 1, "row")])])
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_its_run(place):
    """No process stays: a run ends by itself, by Ctrl-C in the terminal (to all processes), by kill -9 with one at work."""
    (place / "run.py").write_text("if __name__ == '__main__':" + RUN.rstrip().replace("\n", "\n    "))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kills = {"ends": None, "interrupted": signal.SIGINT, "killed": signal.SIGKILL}
    began = {}
    for name in kills:
        line = [sys.executable, "run.py", "mine.py:sleeps", name]
        began[name] = subprocess.Popen(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    try:
        for name, process in began.items():
            workers = [int(pid) for pid in process.stdout.readline().split()]
            assert len(workers) == 2 and (name == "ends" or all(map(is_alive, workers)))
            if kills[name] is not None:
                time.sleep(0.2)
                (os.killpg if name == "interrupted" else os.kill)(process.pid, kills[name])
            _, said = process.communicate(timeout=20)
            assert (process.returncode == 0) == (name == "ends")
            assert "Traceback" not in said or said.count("Traceback") == 1, "the workers are silent"
            until = time.monotonic() + 5
            while any(map(is_alive, workers)) and time.monotonic() < until:
                time.sleep(0.05)
            assert not any(map(is_alive, workers)), name
    finally:
        for process in began.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# ---- named rewards

NAMED = {  # an entry, columns: what is said
    ("exact", "question"): "the record has no column 'answer'; it has 'question'",
    ("number", "answer"): "the record's column 'answer', 'b', has no number",
    ("arithmetic", "target"): "the record has no column 'numbers'; it has 'target'",
    ("regex:(a|aa)+", "answer"): "the pattern '(a|aa)+' has no result after 0.1 s: it backtracks",
}


@pytest.mark.parametrize("text, column", NAMED)
def test_a_record_or_pattern_that_a_named_reward_cannot_use(text, column):
    began = time.monotonic()
    said = refused(text, samples=[sample("a" * 70 + "b", **{column: "b"})])
    assert said.startswith(f"--reward {text}: {NAMED[text, column]}") and time.monotonic() - began < 5
    assert said.endswith(f"; row.jsonl:2, prompt 'Say b', reply {'a' * 60!r} …")


# ---- options

REFUSED = {  # options of an objective with rewards: what is said
    "--reward exakt": "--reward exakt: 'exakt' is not known; one of exact, answer,",
    "--reward exact:3": "--reward exact:3: exact takes no value",
    "--reward length": "--reward length: length needs a value, length:MOST",
    "--reward length:0": "--reward length:0: '0' is no number of tokens",
    "--reward regex:(": "--reward regex:(: the pattern '(' is not a regular expression: missing )",
    "--reward mine.py": "--reward mine.py: which function of the file? Write mine.py:FUNCTION",
    "--reward mine.py:": "--reward mine.py:: '' is no function's name",
    "--reward=": "--reward '': an empty name",
    "--reward exact exact": "--reward exact is given twice",
    "--reward exact format --reward-weights 1": "--reward-weights has 1 values for 2 rewards",
    "--reward exact --reward-weights nan": "--reward-weights nan: finite numbers are expected",
    "--reward exact --reward-weights 0": "--reward-weights 0: finite numbers are expected, one of them at least not 0",
    "--reward mine.py:f --reward-workers -1": "--reward-workers -1: from 0 to 256",
    "--reward mine.py:f --reward-timeout 0": "--reward-timeout 0.0: above 0",
    "--reward-weights 1": "--reward-weights would have no effect: no reward is named",
    "--reward": "--reward would have no effect: no reward is named",
    "--reward-workers 2 --reward exact": "--reward-workers would have no effect: they are of functions of your own",
    "--reward-timeout 2 --reward mine.py:f --reward-workers 0": "--reward-timeout would have no effect: --reward-workers 0",
}


@pytest.mark.parametrize("line", REFUSED)
def test_options_are_refused_before_anything_is_read(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CausalTask, "needs_rewards", True)
    monkeypatch.setattr(train.start, "start", lambda config: pytest.fail("the run began"))
    said = command(*line.split())
    assert said.code == 2 and said.err.startswith(f"error: {REFUSED[line]}"), said.err
    assert len(said.err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_objective_with_rewards_needs_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CausalTask, "needs_rewards", True)
    said = command("--device", "cpu").err
    assert "--objective clm needs a judge: --reward NAME, PATH.py:FUNCTION or a reward model's folder" in said
    with pytest.raises(TrainError, match="no reward is named"):
        open_rewards(RewardConfig())
    assert {name for rule in NEEDS for name in rule.options} >= set(RewardConfig.__dataclass_fields__)


# ---- a path in a file is never run


def test_a_recipe_with_code_is_refused(place, monkeypatch):
    monkeypatch.setattr(CausalTask, "needs_rewards", True)
    monkeypatch.setattr(train.start, "start", lambda config: pytest.fail("the run began"))
    for entry, refuses in (("./mine.py:short", True), ("length:3", False)):
        (place / "own.toml").write_text(f'[rewards]\nreward = ["exact", "{entry}"]\n')
        said = command("--recipe", "own.toml", "--reward", "format", "--dropout", 2)
        assert ("own.toml: reward = './mine.py:short' is code, which no recipe runs" in said.err) == refuses
        assert refuses or "--dropout 2.0" in said.err


def began_with(*texts: str) -> TrainConfig:
    """Settings as a run's config.toml gives them back."""
    config = replace(TrainConfig(), rewards=RewardConfig(texts))
    recorded = replace(config.recorded, reward_sha256=reward_hashes(texts))
    return from_plain(TrainConfig, to_plain(with_absolute_paths(replace(config, recorded=recorded))), "config.toml")


def test_a_resume_runs_only_what_is_named_again_and_unchanged(place):
    run = Path("my run")
    stored = began_with("exact", "mine.py:short", "mine.py:nan")
    assert stored.rewards.reward[1] == f"{place}/mine.py:short" and len(stored.recorded.reward_sha256) == 2
    with pytest.raises(TrainError) as caught:
        check_given_again(stored, None, run)
    assert f"--resume 'my run' --reward exact {place}/mine.py:short {place}/mine.py:nan" in str(caught.value)
    (place / "moved").mkdir()
    (place / "mine.py").rename(place / "moved" / "other.py")
    again = ("exact", "moved/other.py:short", "moved/other.py:nan")
    check_given_again(stored, again, run)
    for wrong in (again[:2], ("exact", again[2], again[1]), ("format", *again[1:]), ("exact", "short", "nan")):
        with pytest.raises(TrainError, match=r"the run in my run has --reward exact .*, in this order"):
            check_given_again(stored, wrong, run)
    (place / "moved" / "other.py").write_text(FUNCTIONS + "\n")
    with pytest.raises(TrainError, match=r"other\.py:short is not the file that my run began with"):
        check_given_again(stored, again, run)


def test_a_resume_without_code_needs_no_more(place):
    assert began_with("exact").recorded.reward_sha256 is None
    check_given_again(began_with("exact"), None, Path("run"))
    check_given_again(began_with("exact"), ("exact",), Path("run"))
    check_given_again(TrainConfig(), None, Path("run"))
    with pytest.raises(TrainError, match="the run in run has --reward exact"):
        check_given_again(began_with("exact"), ("mine.py:short",), Path("run"))
    altered = replace(began_with("mine.py:short"), recorded=TrainConfig().recorded)  # a config.toml without the hash
    with pytest.raises(TrainError, match="is not the file"):
        check_given_again(altered, ("mine.py:short",), Path("run"))
    assert set(OVERRIDES["rewards"]) == {"reward", "reward_workers", "reward_timeout", "allow_code_rewards"}, "not the weights"


def test_reading_runs_nothing(place):
    (place / "quits.py").write_text("open('ran', 'w')\nif 1:\n    from os import path as f\ntry:\n    g = 1\nfinally: pass\n")
    assert read_user_reward("quits.py:f").sha256 == reward_hashes(["exact", "quits.py:g"])[0]
    rewards("quits.py:f").describe()
    assert not (place / "ran").exists()


def test_a_second_interrupt_stops_the_workers(place, monkeypatch):
    workers = Workers([read_user_reward("mine.py:sleeps")], 1, 30)
    workers.start()
    process = workers.workers[0].process
    monkeypatch.setattr(workers, "_refuse_late", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        workers([(0, SAMPLES[:1])])
    assert process.exitcode is not None and torch.get_num_threads() > 0
