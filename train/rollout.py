"""Rollouts: replies that the policy writes, their rewards and advantages, and the optimizer steps that learn from them.

    rollout      P prompts, G replies to each, sampled from the policy as it is at that step
    minibatch    a part of a rollout's replies: one optimizer step, of `accumulate` micro-batches
    epoch        a pass over a rollout's minibatches; from the second on in another order

Prompts are a function of (seed, rollout), the noise of a reply of (seed, rollout, prompt's place, reply's place): neither of
batches, ranks nor the other replies. A checkpoint inside a rollout has all of it, since the policy has moved on since.
"""

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch

from data.messages import format_count
from model.rollouts import SampledReply
from train.parallel.ranks import Ranks
from train.runs.errors import TrainError

STREAM = 0x726F6C6C  # "roll", half of the key: separates these random numbers from other uses of the seed
Array = np.ndarray


@dataclass(frozen=True)
class RolloutSizes:
    """Sizes of a rollout: steps of `batch_size` × `accumulate` replies, `minibatches` of them in each of `epochs` passes."""

    batch_size: int
    accumulate: int
    group: int
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        """Raise TrainError where groups do not fill the steps of a rollout."""
        if self.replies % self.group:
            parts = format_count(self.minibatches, "minibatch", "minibatches")
            raise TrainError(
                f"{parts} of {self.rows} replies (--batch-size times --accumulate): {self.replies}, which is no multiple of "
                f"the group of {self.group} replies to a prompt: --batch-size {self.group} fits"
            )

    @property
    def rows(self) -> int:
        """Replies of an optimizer step."""
        return self.batch_size * self.accumulate

    @property
    def replies(self) -> int:
        """Replies of a rollout, N."""
        return self.rows * self.minibatches

    @property
    def prompts(self) -> int:
        """Prompts of a rollout, P."""
        return self.replies // self.group

    @property
    def steps(self) -> int:
        """Optimizer steps of a rollout."""
        return self.minibatches * self.epochs


class Reply(NamedTuple):
    """A sampled reply: its ids with the stop id, their log-probabilities by the sampler, rewards K (NaN: left out)."""

    ids: list[int]
    log_probs: list[float]
    has_ended: bool
    rewards: list[float]


@dataclass
class Rollout:
    """The replies of a rollout, N = P · G, as flat arrays. M: tokens of all replies, one reply behind the other."""

    number: int
    prompt_P: Array  # the number of each group's prompt
    length_N: Array
    has_ended_N: Array
    ids_M: Array
    sampler_M: Array  # log-probabilities by the sampler
    rewards_NK: Array
    old_M: Array | None = None  # by the policy before the first step; None: the first step is the only one
    reference_M: Array | None = None
    values_M: Array | None = None  # by a critic, of the state before each token; with its returns and advantages: of PPO
    returns_M: Array | None = None
    advantage_M: Array | None = None
    reward_N: Array | None = None  # the sum that advantages are made of
    advantage_N: Array | None = None
    is_learned_N: Array | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_groups(cls, number: int, prompts: Sequence[int], groups: Sequence[Sequence[Reply]]) -> "Rollout":
        """Join the replies of groups."""
        replies = [reply for group in groups for reply in group]
        return cls(
            number,
            np.array(prompts, dtype=np.int64),
            np.array([len(reply.ids) for reply in replies], dtype=np.int64),
            np.array([reply.has_ended for reply in replies]),
            np.array([id for reply in replies for id in reply.ids], dtype=np.int64),
            np.array([value for reply in replies for value in reply.log_probs], dtype=np.float64),
            np.array([reply.rewards for reply in replies], dtype=np.float64),
        )

    @property
    def group_N(self) -> Array:
        """The group of each reply."""
        return np.repeat(np.arange(len(self.prompt_P)), len(self.length_N) // len(self.prompt_P))

    def slices(self) -> list[slice]:
        """Return each reply's place in the arrays of tokens."""
        ends = self.length_N.cumsum()
        return [slice(int(end - length), int(end)) for end, length in zip(ends, self.length_N, strict=True)]

    def state_dict(self) -> dict:
        """Return the rollout as JSON types, exactly: arrays as their bytes in base64."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: pack_array(value) if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping) -> "Rollout":
        """
        >>> rollout = Rollout.from_groups(3, [7], [[Reply([5, 2], [-0.1, -0.2], True, [1.0])]])
        >>> Rollout.from_state_dict(rollout.state_dict()).sampler_M.tolist()
        [-0.1, -0.2]
        """
        unpacked = {name: unpack_array(v) if isinstance(v, dict) and "base64" in v else v for name, v in state.items()}
        return cls(**unpacked)


def pack_array(array: Array) -> dict:
    """Return an array as JSON types: dtype, shape and bytes (little-endian)."""
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder("<"))
    return {"dtype": array.dtype.str, "shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def unpack_array(packed: Mapping) -> Array:
    """Return the array of `pack_array`."""
    return np.frombuffer(base64.b64decode(packed["base64"]), dtype=packed["dtype"]).reshape(packed["shape"]).copy()


def choose_prompts(seed: int, rollout: int, count: int, available: int) -> list[int]:
    """Return the prompts of a rollout: each once in an epoch, which has an order of its own.

    >>> sorted(choose_prompts(0, 0, 3, 6) + choose_prompts(0, 1, 3, 6))
    [0, 1, 2, 3, 4, 5]
    """
    places = np.arange(rollout * count, (rollout + 1) * count)
    orders = {epoch: np.random.default_rng((STREAM, seed, int(epoch))).permutation(available) for epoch in places // available}
    return [int(orders[place // available][place % available]) for place in places]


def choose_more(
    seed: int, rollout: int, attempt: int, count: int, available: int, taken: Collection[int] = ()
) -> list[int]:
    """Return prompts in place of groups that agreed: drawn apart from the epochs, others than the rollout's own and none twice
    where there are enough."""
    random = np.random.default_rng((STREAM, seed, rollout, attempt))
    others = np.setdiff1d(np.arange(available), np.array(sorted(taken), dtype=np.int64))
    pool = others if len(others) >= count else np.arange(available)
    return random.choice(pool, count, replace=count > len(pool)).tolist()


def draw_uniforms(seed: int, rollout: int, attempt: int, places: Sequence[int], group: int, count: int) -> torch.Tensor:
    """Return the noise of replies, N × count in float64: a function of the reply's own numbers.

    places: the places of groups in the rollout.
    """
    rows = [
        np.random.default_rng((STREAM, seed, rollout, attempt, place, number)).random(count)
        for place in places
        for number in range(group)
    ]
    return torch.from_numpy(np.stack(rows))


def order_replies(seed: int, rollout: Rollout, epoch: int) -> Array:
    """Return the order of the replies in an epoch of a rollout: that of writing, then a drawn one each."""
    count = len(rollout.length_N)
    if not epoch:
        return np.arange(count)
    return np.random.default_rng((STREAM, seed, rollout.number, 0, 0, 0, epoch)).permutation(count)


def micro_batches(
    seed: int, sizes: RolloutSizes, rollout: Rollout, place: int, prompt_lengths: Array, *, by_group: bool = False
) -> list[Array]:
    """Return the replies of each micro-batch of a step, the `place`-th of a rollout: similar lengths together; by_group:
    those to one prompt, which is then read once."""
    epoch, minibatch = divmod(place, sizes.minibatches)
    rows = order_replies(seed, rollout, epoch)[minibatch * sizes.rows : (minibatch + 1) * sizes.rows]
    group = rollout.group_N[rows]
    length = prompt_lengths[group] + rollout.length_N[rows]
    rows = rows[np.lexsort((length, group) if by_group else (length,))]
    return [rows[first : first + sizes.batch_size] for first in range(0, len(rows), sizes.batch_size)]


def describe_sizes(sizes: RolloutSizes) -> str:
    """Return the sizes in words."""
    text = f"{format_count(sizes.prompts, 'prompt')} × {format_count(sizes.group, 'reply', 'replies')} in a rollout"
    steps = format_count(sizes.minibatches, "step")
    passes = f", {sizes.epochs} epochs over it" if sizes.epochs > 1 else ""
    return f"{text}, {steps} of {format_count(sizes.rows, 'reply', 'replies')} from it{passes}"


def has_agreed(group: Sequence[Reply], weights: Sequence[float], normalize: str = "sum") -> bool:
    """Return True if the rewards of a group are equal, their weighted sums or each: it has no advantages to learn from.

    >>> group = [Reply([1], [0.0], True, [1.0, 0.0]), Reply([2], [0.0], True, [0.0, 1.0])]
    >>> has_agreed(group, [1.0, 1.0]), has_agreed(group, [1.0, 1.0], "each")
    (True, False)
    """
    rewards_GK = np.array([reply.rewards for reply in group])
    columns = [column_G[~np.isnan(column_G)] for column_G, weight in zip(rewards_GK.T, weights, strict=True) if weight]
    columns = columns if normalize == "each" else [sum_rewards(rewards_GK, weights)]
    return all(not len(values) or bool((values == values[0]).all()) for values in columns)


def sum_rewards(rewards_NK: Array, weights: Sequence[float]) -> Array:
    """Return Σ weight · reward of the replies that have a reward of a weight other than 0."""
    weights_K = np.array(weights)
    used_NK = rewards_NK[:, weights_K != 0]
    total_N = np.nansum(used_NK * weights_K[weights_K != 0], axis=-1)
    return total_N[~np.isnan(used_NK).all(-1)]


def reply_metrics(rollout: Rollout, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Return the metrics of replies and rewards."""
    total, lengths_N = sum_rewards(rollout.rewards_NK, weights), rollout.length_N
    found = {"reward": float(total.mean()), "reward_std": float(total.std())} if len(total) else {}
    for name, rewards_N in zip(names, rollout.rewards_NK.T, strict=True) if len(names) > 1 else ():
        given = rewards_N[~np.isnan(rewards_N)]
        found |= {f"reward_{name}": float(given.mean())} if len(given) else {}
    lengths = {"reply_length": float(lengths_N.mean()), "reply_length_max": float(lengths_N.max())}
    return found | lengths | {"ended": float(rollout.has_ended_N.mean())}


def gather_replies(replies: Sequence[SampledReply], ranks: Ranks, most: int) -> list[SampledReply]:
    """Join the replies of all ranks, in the order of ranks. A rank may have none."""
    ids_TN = torch.zeros(most, len(replies), dtype=torch.int64)
    log_p_TN = torch.zeros(most, len(replies), dtype=torch.float64)
    for n, reply in enumerate(replies):
        ids_TN[: len(reply.ids), n] = torch.tensor(reply.ids)
        log_p_TN[: len(reply.ids), n] = torch.tensor(reply.log_probs, dtype=torch.float64)
    about_2N = torch.tensor([[len(r.ids), r.has_ended] for r in replies], dtype=torch.int64).view(-1, 2).T.contiguous()
    (ids_TN, _), (log_p_TN, _), (about_2N, _) = (ranks.gather(each) for each in (ids_TN, log_p_TN, about_2N))
    return [
        SampledReply(ids[:length], log_p[:length], bool(has_ended))
        for ids, log_p, (length, has_ended) in zip(ids_TN.T.tolist(), log_p_TN.T.tolist(), about_2N.T.tolist(), strict=True)
    ]
