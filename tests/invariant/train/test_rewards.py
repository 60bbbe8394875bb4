"""Reward functions: the named ones case by case, a user's by keyword, their order whatever the workers do."""

import itertools
import math
import os
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT
from train import Rewards, Sample, open_rewards
from train.config import RewardConfig
from train.options import read_options
from train.rewards.extract import evaluate, is_solution, last_boxed, last_number, last_tagged
from train.rewards.named import REWARDS, exact, number
from train.rewards.names import metric_names
from train.runs.errors import TrainError

OWN = """
import time
print("imported")

def numbers(completions, answer, **kwargs):
    return [None if text == "skip" else len(text) + float(number) for text, number in zip(completions, answer)]

def slow_first(completions):
    time.sleep(0.2 if completions[0] == "0" else 0)
    return [float(text) for text in completions]

def of_all(**kwargs):
    assert list(kwargs) == ["prompts", "completions", "has_ended", "token_counts", "answer", "level"], list(kwargs)
    assert kwargs["prompts"] == ["p"] * 2 and kwargs["level"] == [3, 3] and kwargs["has_ended"] == [True, False]
    return [count / 2 for count in kwargs["token_counts"]]

def a_default(completions, level=7):
    return [level] * len(completions) if isinstance(level, int) else [each * 10 for each in level]
"""
WITH_TORCH = """
import os
import torch

class Kinds:
    def __call__(self, completions):
        return (True, 2, torch.tensor(3.5))

kinds = Kinds()

def array(completions):
    import numpy
    return numpy.array([1, 0, 1]) > 0

def where(completions):
    print("in the worker")
    threads = {os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return [os.getpid(), float(torch.get_num_threads()), float(threads == {"1"})]
"""


def sample(reply: str, name: str = "a", prompt: str = "p", ended: bool = True, tokens: int = 4, **record) -> Sample:
    return Sample(prompt, reply, record or {"answer": "4"}, ended, tokens, name)


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own rewards") / "mine.py"
    path.write_text(OWN)
    (path.parent / "tensors.py").write_text(WITH_TORCH)
    return path


def opened(*texts: object, **settings) -> Rewards:
    return open_rewards(RewardConfig(tuple(map(str, texts)), **settings))


VALUES = [  # an entry, reply, record, value
    ("exact", "\n4 ", {"answer": 4}, 1),
    ("exact", "4.0", {"answer": 4}, 0),
    ("exact", "", {"answer": "4"}, 0),
    ("answer", "<answer>3</answer> no, <answer>\n4</answer>", {"answer": "4"}, 1),
    ("answer", "<answer>4</answer> no, <answer>3</answer>", {"answer": "4"}, 0),
    ("answer", r"\boxed{4}", {"answer": "4"}, 1),
    ("answer", r"<answer>3</answer> \boxed{4}", {"answer": "4"}, 0),
    ("answer", "4", {"answer": "4"}, 0),
    ("answer", "<answer></answer>", {"answer": "4"}, 0),
    ("number", "I paid $1,234.50.", {"answer": "1234.5"}, 1),
    ("number", "none", {"answer": "0"}, 0),
    ("number", "0.1", {"answer": 0.1}, 1),
    ("number", "0.1000000000000000055", {"answer": 0.1}, 0),  # of decimals, not of doubles
    ("number", "-4", {"answer": 4}, 0),
    ("format", " <think>a</think> <answer>b</answer>\n", {}, 1),
    ("format", "<think></think><answer></answer>", {}, 1),
    ("format", "<think>a</think> so <answer>b</answer>", {}, 0),
    ("format", "<think>a</think><answer>b</answer> end", {}, 0),
    ("format", "I <think>a</think><answer>b</answer>", {}, 0),
    ("format", "<think>a<think></think><answer>b</answer>", {}, 0),
    ("format", "<answer>b</answer><think>a</think>", {}, 0),
    ("format", "<think><answer>a</think>b</answer>", {}, 0),
    ("format", "a</think><answer>b</answer>", {}, 0),
    ("length:4", "", {}, 1),
    ("length:3", "", {}, 2 - 4 / 3),
    ("length:1", "", {}, 0),
    ("length_target:4", "", {}, 0),
    ("length_target:5", "", {}, -0.2),
    ("length_target:2", "", {}, -1),
    ("regex:a.py:b", "a.py:b", {}, 1),
    ("regex:[0-9]+", "12 ", {}, 0),
    ("regex:.*b", "a\nb", {}, 0),
    ("regex:(?s).*b", "a\nb", {}, 1),
    (r"regex:\p{Lu}+", "ÄB", {}, 1),
    ("arithmetic", "(6 - 4) * 3", {"nums": [3, 4, 6], "target": 6}, 1),
    ("arithmetic", "8 / (3 - 8/3)", {"numbers": [3, 3, 8, 8], "target": 24}, 1),  # exact: fractions
    ("arithmetic", "(6 - 4) * 3 = 6", {"numbers": [3, 4, 6], "target": 6}, 0),
    ("arithmetic", "6 * (4 - 3)", {"numbers": [3, 4, 6], "target": 7}, 0),
    ("arithmetic", "6 * (4 - 3) * 3 / 3", {"numbers": [3, 4, 6], "target": 6}, 0),  # 3 thrice
    ("arithmetic", "__import__('os').getpid()", {"numbers": [3], "target": 3}, 0),
]


@pytest.mark.parametrize("text, reply, record, value", VALUES)
def test_named_rewards(text, reply, record, value):
    assert opened(text)([Sample("", reply, record, True, 4, "a")]).tolist() == [[pytest.approx(value, abs=1e-15)]]


def test_every_named_reward_is_tried_and_told():
    elsewhere = {"tests"}  # tests/fault/test_code_rewards.py
    assert {text.partition(":")[0] for text, *_ in VALUES} | elsewhere == set(REWARDS)
    options = RewardConfig.__dataclass_fields__
    told = (ROOT / "train" / "config.py").read_text(encoding="utf-8")
    names = [f"{name}:" if kind.setting else f"{name}," for name, kind in REWARDS.items()]
    assert all(name.rstrip(",") in told for name in names) and len(options) == 5
    assert all(kind.summary.startswith("Return") for kind in REWARDS.values())


def test_a_thought_that_the_prompt_has_opened():
    prompts = ("user: hi\nassistant: <think>\n", "<think> is a tag")
    samples = [sample("a</think><answer>b</answer>", prompt=prompt) for prompt in prompts]
    assert opened("format")(samples).flatten().tolist() == [1, 0]
    assert opened("format")([sample("<think>a</think><answer>b</answer>", prompt=prompts[0])]).item() == 1


NUMBERS = {"x2": 2, "a-1": 1, "(3)-2": 2, "= -2": -2, "-.5": "-0.5", "1,000,000": 1000000, "12,34": 34, "1e3": 1000, "2.": 2}
NUMBERS |= {"7 − −3": -3, "10-12": 12, "v1.2.3": "0.3", "": None, "−": None, "1,2,3": 3, "٣": None}


@pytest.mark.parametrize("text", NUMBERS)
def test_last_number(text):
    wanted = NUMBERS[text]
    assert last_number(text) == (None if wanted is None else Decimal(wanted))


def test_extraction_of_odd_text():
    assert last_tagged("<answer>a<answer>b</answer>") == "b" and last_tagged("</answer><answer>") is None
    assert last_boxed(r"\boxed{a}} \boxed{b{") == "a" and last_boxed(r"\boxed{}") == ""
    assert last_boxed("\\boxed{" * 2000) is None  # quickly


def expressions(numbers: list[int]) -> list[str]:
    """Every expression that pairs neighbours of some order, in Python's own notation."""
    if len(numbers) == 1:
        return [str(numbers[0])]
    found = []
    for cut in range(1, len(numbers)):
        for left, right in itertools.product(expressions(numbers[:cut]), expressions(numbers[cut:])):
            found += [f"({left} {sign} {right})" for sign in "+-*/"]
    return found


def test_expressions_have_the_value_that_python_gives():
    for numbers in ([3, 3, 8], [2, 5, 0], [7, 1, 12, 4]):
        for text in expressions(numbers)[:: len(numbers) ** 2 // 5]:
            try:
                wanted = eval(re.sub(r"[0-9]+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
            except ZeroDivisionError:
                assert evaluate(text) is None
                continue
            assert evaluate(text) == (wanted, Counter(numbers)), text
            assert is_solution(text, numbers, wanted) and not is_solution(text, numbers, wanted + 1)
            assert not is_solution(text, [*numbers, 1], wanted) and not is_solution(text, numbers[1:], wanted)


NO_VALUE = ["2**3", "7//2", "1(2)", "+1", "1 2", "", "()", "1.5", "0x1", "1_0", "1+" * 150 + "1", "01", "1,2"]
NO_VALUE += ["(" * 99 + "1" + ")" * 98, "(" * 110 + "1" + ")" * 89]


@pytest.mark.parametrize("text", NO_VALUE)
def test_no_other_expression_has_a_value(text, recwarn):
    assert evaluate(text) is None and not recwarn.list


# ---- all functions of a run


def test_columns_in_order_and_none_is_nan(mine):
    samples = [sample("skip"), sample("4"), sample("444", "b")]
    texts = ("exact", f"{mine}:numbers", "length:2", f"{mine}:slow_first")
    with opened(*texts[:3], reward_weights=(1, 0.5, -2), reward_workers=0) as rewards:
        values_NK = rewards(samples)
        assert rewards.names == ["exact", "numbers", "length"] and rewards.weights == [1, 0.5, -2]
    assert values_NK.dtype == torch.float64 and values_NK.shape == (3, 3)
    assert values_NK[:, [0, 2]].tolist() == [[0, 0], [1, 0], [0, 0]]
    assert math.isnan(values_NK[0, 1]) and values_NK[1:, 1].tolist() == [5, 7]
    assert opened(*texts).weights == [1, 1, 1, 1] and opened("exact")([]).shape == (0, 1)


def test_the_result_does_not_depend_on_the_workers(mine, capfd):
    """Two functions, five groups of three replies, the first group slow: rows and columns stay where they belong."""
    samples = [sample(f"{5 * group + reply}", f"{group % 2}") for group in range(5) for reply in range(3)]
    texts = (f"{mine}:slow_first", "length:3", f"{mine}:numbers")
    results = []
    for count in (0, 1, 3):
        with opened(*texts, reward_workers=count) as rewards:
            results.append(rewards(samples))
            assert len(rewards.workers.workers) == count
            assert rewards(samples[:2]).equal(results[0][:2]), "a second call"
    assert results[0][:, 0].tolist() == [float(each.reply) for each in samples] and not results[0].isnan().any()
    assert all(each.equal(results[0]) for each in results)
    assert capfd.readouterr().out.count("imported") == 5, "a file is imported once a process"


def test_a_function_gets_what_it_takes(mine):
    record = {"answer": "4", "level": 3}
    samples = [sample("x", tokens=4, **record), sample("y", ended=False, tokens=6, **record)]
    with opened(f"{mine}:of_all", f"{mine}:a_default", reward_workers=0) as rewards:
        assert rewards(samples).tolist() == [[2, 30], [3, 30]]
        with pytest.raises(TrainError, match=r"raised AssertionError: \['prompts', 'completions', .* \(line 13\); a, prompt"):
            rewards([sample("x")])  # of_all: another record
    with opened(f"{mine}:a_default", reward_workers=0) as rewards:
        assert rewards([sample("x", answer="4")]).tolist() == [[7]], "a column that is not there has its default"


def test_kinds_of_numbers(mine):
    three = [sample(text) for text in "abc"]
    tensors = mine.with_name("tensors.py")
    with opened(f"{tensors}:kinds", f"{tensors}:array", reward_workers=0) as rewards:
        assert rewards(three).tolist() == [[1, 1], [2, 0], [3.5, 1]]


def test_a_worker_has_one_thread_and_prints(mine, capfd):
    with opened(f"{mine.with_name('tensors.py')}:where") as rewards:
        rewards.start()
        (worker,) = rewards.workers.workers
        pid, threads, environment = rewards([sample(text) for text in "abc"]).flatten().tolist()
    assert pid == worker.process.pid != os.getpid() and threads == environment == 1
    assert "in the worker" in capfd.readouterr().out and not worker.process.is_alive()


def test_the_introduction_says_what_is_run(mine):
    rewards = opened("exact", f"{mine}:numbers", f"{mine}:of_all", reward_weights=(1, 0.5, 2), reward_workers=2)
    sha256 = rewards.user[1].sha256
    assert rewards.describe() == (
        f"1 × exact + 0.5 × {mine}:numbers + 2 × {mine}:of_all; the code in {mine} is run (SHA-256 {sha256}); "
        "in 2 worker processes, at most 30 s for the replies to a prompt"
    )
    assert "in this process, without a timeout (--reward-workers 0)" in opened(f"{mine}:numbers", reward_workers=0).describe()
    assert opened("exact").describe() == "1 × exact"


def test_options_are_read_as_they_are_written():
    line = "--reward exact regex:^a.py:b$ my.py:f --reward-weights 1 -.5 2 --reward-workers 3 --reward-timeout 5"
    asked = read_options(line.split()).rewards
    assert asked == RewardConfig(("exact", "regex:^a.py:b$", "my.py:f"), (1.0, -0.5, 2.0), 3, 5.0)
    assert asked.weights == (1, -0.5, 2) and RewardConfig(("a", "b")).weights == (1, 1)


def test_answers_of_tables_and_expressions():
    """A column of integers with a gap is one of floats; an expression is no number."""
    assert exact("", "18", {"answer": 18.0}) == 1 and exact("", "18.5", {"answer": 18.5}) == 1
    assert number("", "18", {"answer": "5 and 13 #### 18"}) == 1 and number("", "3", {"answer": "2 and 3"}) == 1
    for answer in ("3/4", "10^3", "2 * 3"):
        with pytest.raises(TrainError, match="is an expression: write its value"):
            number("", "4", {"answer": answer})


def test_names_of_other_metrics_are_not_taken():
    assert metric_names(["exact", "mine.py:std", "mine.py:greedy"]) == ["exact", "std_2", "greedy_2"]
