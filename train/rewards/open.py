"""The reward functions of a run, and the matrix of their values."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.messages import format_count
from train.config import RewardConfig
from train.rewards.code import CodeRunner, read_tests
from train.rewards.named import open_named
from train.rewards.names import is_function, is_model, metric_names, runs_code
from train.rewards.reward_model import ModelReward
from train.rewards.sample import Sample, describe_sample, split_groups
from train.rewards.user import UserReward, call, load_functions, read_user_reward
from train.rewards.workers import Workers
from train.runs.errors import TrainError

if TYPE_CHECKING:
    from train.prompt_task import PromptIds


class Rewards:
    """K reward functions: samples -> values N K in float64, NaN where a function gave None (the reply is left out).

    names: K unique names for metrics. weights: K factors of --reward-weights. Named rewards are computed in this process;
    functions of a user's file in worker processes, which begin with `start` or the first call and end with `close`; the code of
    replies in sandboxes, which end with the call; reward models on `device`, loaded by `start`.
    """

    def __init__(self, config: RewardConfig, device: str = "cpu"):
        self.config, self.texts, self.device = config, config.reward, device
        self.names, self.weights = metric_names(self.texts), list(config.weights)
        self.models = {k: ModelReward(text) for k, text in enumerate(self.texts) if is_model(text)}
        self.named = {k: open_named(text) for k, text in enumerate(self.texts) if not (is_function(text) or is_model(text))}
        self.user = {k: read_user_reward(text) for k, text in enumerate(self.texts) if is_function(text)}
        self.functions: list[Callable] = []
        self.workers = Workers(list(self.user.values()), config.reward_workers, config.function_seconds)
        self.code = CodeRunner(config) if any(map(runs_code, self.texts)) else None

    def start(self) -> None:
        """Import the user's files, in the worker processes if there are any; load reward models; try a sandbox.

        Errors (TrainError): a file does not import; those of `CodeRunner.start`.
        """
        if self.code is not None:
            self.code.start()
        for judge in self.models.values():
            judge.start(self.device)
        if self.user and self.config.reward_workers:
            self.workers.start()
        elif not self.functions:
            self.functions = load_functions(list(self.user.values()))

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """Return values N K. A user's function is called with the consecutive replies to one prompt at a time.

        Errors (TrainError), each with the function, the record and the reply: those of the functions, of `user.call` and of
        `Workers`; those of `CodeRunner`.
        """
        self.start()
        samples = list(samples)
        values_NK = torch.full((len(samples), len(self.texts)), math.nan, dtype=torch.float64)
        passed = None if self.code is None else self.code(samples)
        for k, function in self.named.items():
            more = [{"passed": each} for each in passed] if runs_code(self.texts[k]) else [{}] * len(samples)
            values = [self._value(k, function, *each) for each in zip(samples, more, strict=True)]
            values_NK[:, k] = torch.tensor(values, dtype=torch.float64)
        for k, judge in self.models.items():
            values_NK[:, k] = torch.tensor(judge(samples), dtype=torch.float64)
        groups = split_groups(samples)
        tasks = [(index, group) for group in groups for index in range(len(self.user))]
        results = iter(self._compute(tasks))
        row = 0
        for group in groups:
            for k in self.user:
                values_NK[row : row + len(group), k] = torch.tensor(next(results), dtype=torch.float64)
            row += len(group)
        return values_NK

    def check(self, samples: Sequence[Sample]) -> None:
        """Call the named functions with samples of all records; for those that run code, read the records and try a sandbox.

        Errors (TrainError): a record lacks what a function needs; those of `CodeRunner.start`.
        """
        for k, function in self.named.items():
            for sample in samples:
                self._value(k, _read_only if runs_code(self.texts[k]) else function, sample, {})
        if self.code is not None:
            self.code.start()

    @property
    def model_folders(self) -> list[Path]:
        """The folders of reward models."""
        return [judge.folder for judge in self.models.values()]

    def check_models(self, prompts: "Sequence[PromptIds]", ends: Sequence[int], context: int, vocab_size: int) -> None:
        """Compare what reward models read with what the policy writes. Errors (TrainError): those of `ModelReward.check`."""
        for judge in self.models.values():
            judge.check(prompts, ends, context, vocab_size)

    def _value(self, k: int, function: Callable[..., float], sample: Sample, more: dict) -> float:
        try:
            return function(sample, **more)
        except TrainError as error:
            raise TrainError(f"--reward {self.texts[k]}: {error}; {describe_sample(sample)}") from None

    def _compute(self, tasks: list[tuple[int, list[Sample]]]) -> list[list[float]]:
        if self.config.reward_workers:
            return self.workers(tasks) if tasks else []
        rewards: list[UserReward] = list(self.user.values())
        return [call(rewards[index], self.functions[index], group) for index, group in tasks]

    def describe(self) -> str:
        """Describe the functions and weights, and the code that is run, for the introduction of a run."""
        weighted = [f"{weight:g} × {text}" for weight, text in zip(self.weights, self.texts, strict=True)]
        lines = [" + ".join(weighted)]
        for path, sha256 in dict.fromkeys((reward.path, reward.sha256) for reward in self.user.values()):
            lines.append(f"the code in {path} is run (SHA-256 {sha256})")
        if self.user and self.config.reward_workers:
            count = format_count(self.config.reward_workers, "worker process", "worker processes")
            lines.append(f"in {count}, at most {self.config.function_seconds:g} s for the replies to a prompt")
        elif self.user:
            lines.append("in this process, without a timeout (--reward-workers 0)")
        if self.code is not None:
            lines.append(self.code.describe())
        lines += [judge.describe() for judge in self.models.values()]
        return "; ".join(lines)

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_only(sample: Sample) -> None:
    read_tests(sample.record)


def open_rewards(config: RewardConfig, device: str = "cpu") -> Rewards:
    """Open the functions of --reward; a user's file is read, and run only by `Rewards.start` or the first call.

    Errors (TrainError): none is named; a name, value, file or function that does not exist; code without permission; a folder
    that holds no reward model.
    """
    if not config.reward:
        raise TrainError("no reward is named: --reward NAME, PATH.py:FUNCTION or a reward model's folder, one or several")
    return Rewards(config, device)
