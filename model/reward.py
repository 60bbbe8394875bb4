"""Scores and rewards of replies by a reward model, in batches of similar length.

    score    the one logit of the sequence head, read at the last token of prompt and reply
    reward   score - mean score of preferred replies, so that 0 is the reward of a usual good reply

The Bradley-Terry loss fixes differences of scores alone. A checkpoint of `--objective reward` has the mean in its reward.json.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from model.config import ConfigError, ModelConfig
from model.folders import HubError
from model.network import Network
from model.predict import Text, numbers
from model.weights import pool_of

FILE = "reward.json"


class MeanScore(NamedTuple):
    """Mean score of preferred held-out replies, and the step of the validation that measured it."""

    value: float
    step: int | None = None


def write_mean_score(folder: Path, mean: MeanScore) -> None:
    """Write reward.json."""
    (folder / FILE).write_text(json.dumps({"mean_score": mean.value, "step": mean.step}) + "\n", encoding="utf-8")


def read_mean_score(folder: Path) -> MeanScore | None:
    """Return the mean score in a folder's reward.json; None without that file. Errors: HubError."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return MeanScore(float(found["mean_score"]), found.get("step"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{path} cannot be read: {error!r}") from None


def check_reward_model(config: ModelConfig, name: str) -> None:
    """Raise ConfigError where a network is no reward model: a decoder with one number a text, read at its last token."""
    has = None
    if config.architecture != "decoder":
        has = f"is an {config.architecture}"
    elif config.head != "sequence":
        has = f"has the head {config.head!r}"
    elif config.labels != 1:
        has = f"has a head of {config.labels} labels"
    elif pool_of(config) != "last":
        has = f"has a head that pools {pool_of(config)!r}"
    if has is not None:
        raise ConfigError(
            f"{name} {has}, and a reward model is a decoder with one score, read at the last token: train one by "
            "--objective reward"
        )


def reward_scores(
    network: Network,
    replies: Sequence[Sequence[int]],
    *,
    mean_score: float = 0.0,
    batch_size: int = 32,
    progress: Callable[[list], Iterable] = iter,
) -> Tensor:
    """Return the reward of each reply, N in float32 at least, on the CPU: score - mean_score.

        replies     the ids of each prompt with its reply, its terminator last; of any lengths
        mean_score  of `read_mean_score`; 0: the scores themselves

    Results do not depend on batch_size. Errors (ConfigError): a network that is no reward model.
    """
    check_reward_model(network.config, "the network")
    texts = [Text(ids) for ids in replies]
    return numbers(network, texts, batch_size=batch_size, progress=progress) - mean_score
