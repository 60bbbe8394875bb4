"""The batches of reinforcement learning: prompts -> sampled replies -> rewards -> advantages -> micro-batches."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.transforms.causal import IGNORE
from model.rollouts import SampledReply, sample_replies
from train.parallel.parallelize import unwrapped
from train.parallel.ranks import own_rows
from train.policy_objective import ADVANTAGES, GROUPS, OLD, PROMPTS, REFERENCE, RETURNS, SAMPLER, VALUES, PolicyObjective
from train.rollout import (
    Reply,
    Rollout,
    RolloutSizes,
    choose_more,
    choose_prompts,
    draw_uniforms,
    gather_replies,
    has_agreed,
    micro_batches,
    reply_metrics,
)
from train.rollout_advantages import AdvantageTask, fill_advantages
from train.runs.errors import CheckpointError
from train.shared_prompt import can_share

if TYPE_CHECKING:
    from train.chat_data import ChatData
    from train.loop import Run
    from train.prompt_task import PromptIds
    from train.rewards.sample import Sample

LOGGED_REPLIES = 64  # at most, of a rollout in samples.jsonl


class RewardedTask(AdvantageTask, Protocol):
    """The parts of a task that its rollouts need."""

    data: "ChatData"  # of PromptIds
    pad_id: int
    compares_group: bool

    def stop_ids(self, network: nn.Module) -> list[int]: ...

    def text_of(self, ids: list[int], has_ended: bool) -> str: ...

    def sample_of(self, prompt: "PromptIds", reply: SampledReply) -> "Sample": ...


class RolloutSource:
    """Micro-batches from what the policy writes: `batches` generates and scores, `complete` adds what the loss needs.

    A rollout serves `sizes.steps` optimizer steps and is saved with each checkpoint between them.
    """

    is_on_policy = True

    def __init__(self, task: "RewardedTask", sizes: RolloutSizes):
        self.task, self.sizes = task, sizes
        self.rollout: Rollout | None = None
        self.run: Run | None = None  # set by `begin`
        self.tokens_per_s: float | None = None
        self.step_began = 0.0

    def begin(self, run: "Run") -> None:
        """Get the run, whose ranks, phases and objective a rollout needs."""
        self.run = run

    @property
    def prompts(self) -> "list[PromptIds]":
        return self.task.data.train.values

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of the prompt of each group of the present rollout, P."""
        return np.array([len(self.prompts[index].ids) for index in self.rollout.prompt_P])

    # ---- batches

    def batches(self, step: int, policy: nn.Module | None = None) -> list[dict[str, Tensor]]:
        """Return the micro-batches of a step; its rollout is generated and scored by its first step."""
        number, place = divmod(step, self.sizes.steps)
        if self.rollout is None or self.rollout.number != number:
            if place:
                raise CheckpointError(f"step {step} is inside rollout {number}, which the checkpoint does not have")
            self.rollout = self.generate(number, policy)
        return self.step_batches(step)

    def step_batches(self, step: int) -> list[dict[str, Tensor]]:
        """Return the micro-batches of a step of the present rollout."""
        return [self.batch(rows) for rows in self.micro_batches(step % self.sizes.steps)]

    def micro_batches(self, place: int) -> list[np.ndarray]:
        """Return the replies of each micro-batch of a step of the present rollout."""
        by_group = can_share(self.run.engine.network.config)
        seed, lengths_P = self.task.config.run.seed, self.prompt_lengths
        return micro_batches(seed, self.sizes, self.rollout, place, lengths_P, by_group=by_group)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return replies as rows of a batch: prompt and reply, padded on the right.

        labels[t] is the token after position t: the first label of a reply stands at the last token of its prompt. A reply
        that is not learned from has no label.
        """
        rollout, slices = self.rollout, self.rollout.slices()
        prompts = [self.prompts[rollout.prompt_P[rollout.group_N[n]]].ids for n in rows]
        replies = [rollout.ids_M[slices[n]] for n in rows]
        width = max(len(prompt) + len(reply) - 1 for prompt, reply in zip(prompts, replies, strict=True))
        shape = (len(rows), width)
        ids_BT, mask_BT = np.full(shape, self.task.pad_id), np.zeros(shape, dtype=np.int64)
        labels_BT = np.full(shape, IGNORE)
        per_token = {SAMPLER: rollout.sampler_M, OLD: rollout.old_M, REFERENCE: rollout.reference_M}
        per_token |= {VALUES: rollout.values_M, RETURNS: rollout.returns_M, ADVANTAGES: rollout.advantage_M}
        values = {name: np.zeros(shape) for name, value_M in per_token.items() if value_M is not None}
        for i, (n, prompt, reply) in enumerate(zip(rows, prompts, replies, strict=True)):
            first, end = len(prompt) - 1, len(prompt) + len(reply) - 1
            ids_BT[i, : first + 1], ids_BT[i, first + 1 : end] = prompt, reply[:-1]
            mask_BT[i, :end] = 1
            if rollout.is_learned_N is None or rollout.is_learned_N[n]:
                labels_BT[i, first:end] = reply
            for name, value_BT in values.items():
                value_BT[i, first:end] = per_token[name][slices[n]]
        advantage_N = np.zeros(len(rollout.length_N)) if rollout.advantage_N is None else rollout.advantage_N
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, ADVANTAGES: advantage_N[rows], **values}
        batch |= {GROUPS: rollout.group_N[rows], PROMPTS: np.array([len(prompt) for prompt in prompts])}
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def origin(self, step: int) -> list[str]:
        """Name the prompts of a step."""
        if self.rollout is None:
            return []
        batches = self.micro_batches(step % self.sizes.steps)
        groups = sorted({int(group) for rows in batches for group in self.rollout.group_N[rows]})
        names = [self.task.data.train.names[self.rollout.prompt_P[group]] for group in groups]
        return [f"{name} (rollout {self.rollout.number})" for name in dict.fromkeys(names)]

    # ---- a rollout

    def generate(self, number: int, policy: nn.Module) -> Rollout:
        """Sample replies and score them; with --NAME.resample again for groups whose rewards agree."""
        seed, wanted, available = self.task.config.run.seed, self.sizes.prompts, len(self.prompts)
        prompts, groups, other_prompts, other_groups = [], [], [], []
        written, agreed, seen, seconds = 0, 0, 0, 0.0
        for attempt in range(1 + self.task.settings.resample):
            missing = wanted - len(prompts)
            if attempt == 0:
                asked = choose_prompts(seed, number, wanted, available)
            else:
                taken = {*prompts, *other_prompts}
                asked = choose_more(seed, number, attempt, missing, available, taken)
            began = time.perf_counter()
            with self.run.phases("rollout"):
                sampled = self.sample(policy, number, attempt, asked)
            seconds += time.perf_counter() - began
            written += sum(len(reply.ids) for group in sampled for reply in group)
            with self.run.phases("scoring"):
                scored = self.score(asked, sampled)
            seen += len(scored)
            for prompt, group in zip(asked, scored, strict=True):
                agrees = has_agreed(group, self.task.rewards.weights, self.task.settings.normalize)
                agreed += agrees
                wants = not (agrees and self.task.settings.resample)
                (prompts if wants else other_prompts).append(prompt)
                (groups if wants else other_groups).append(group)
            if len(prompts) >= wanted:
                break
        missing = wanted - len(prompts)
        prompts, groups = prompts + other_prompts[:missing], groups + other_groups[:missing]
        rollout = Rollout.from_groups(number, prompts, groups)
        self.tokens_per_s = written / max(seconds, 1e-9)
        rewards = self.task.rewards
        rollout.metrics |= reply_metrics(rollout, rewards.names, rewards.weights)
        if self.task.compares_group:
            rollout.metrics["agreed"] = agreed / seen
        if self.task.settings.resample:
            rollout.metrics["sampled_groups"] = seen
        return rollout

    def sample(self, policy: nn.Module, number: int, attempt: int, prompts: Sequence[int]) -> list[list[SampledReply]]:
        """Sample a group of replies to each prompt; each rank writes its part of them. A sharded network must be called alike
        on all ranks, which then all write all."""
        run, group, settings = self.run, self.sizes.group, self.task.settings
        places = list(range(len(prompts)))
        is_split = run.ranks.world > 1 and run.engine.mesh.shard == 1
        if is_split:
            places = own_rows({"place": torch.arange(len(prompts))}, run.ranks)["place"].tolist()
        ids = [list(map(int, self.prompts[prompts[place]].ids)) for place in places for _ in range(group)]
        sampled: list[SampledReply] = []
        if ids:
            uniforms_NT = draw_uniforms(self.task.config.run.seed, number, attempt, places, group, settings.max_reply)
            with progress_bar(len(ids), run) as progress, run.engine.autocast():
                sampled = sample_replies(
                    policy,
                    ids,
                    uniforms_NT=uniforms_NT.to(run.device),
                    stop_ids=self.task.stop_ids(policy),
                    temperature=settings.temperature,
                    pad_id=self.task.pad_id,
                    context=self.task.config.network.context,
                    on_progress=progress,
                )
        if is_split:
            sampled = gather_replies(sampled, run.ranks, settings.max_reply)
        return [sampled[first : first + group] for first in range(0, len(sampled), group)]

    def score(self, prompts: Sequence[int], groups: Sequence[Sequence[SampledReply]]) -> list[list[Reply]]:
        """Return the replies with their rewards, which rank 0 computes for all."""
        pairs = ((self.prompts[p], reply) for p, group in zip(prompts, groups, strict=True) for reply in group)
        samples = [self.task.sample_of(prompt, reply) for prompt, reply in pairs]
        rewards = iter(self.run.ranks.from_main(lambda: self.task.rewards(samples).tolist()))
        return [[Reply(r.ids, r.log_probs, r.has_ended, next(rewards)) for r in group] for group in groups]

    def complete(self, step: int) -> list[dict[str, Tensor]]:
        """Add old and reference log-probabilities and advantages to a new rollout; return the step's micro-batches.

        Old log-probabilities are computed by the training forward in the micro-batches of the first epoch: in these the ratio
        is then exactly 1 before the first update.
        """
        if self.rollout.advantage_N is None:
            self.finish()
        self.step_began = time.perf_counter()
        return self.step_batches(step)

    def finish(self) -> None:
        """Compute log-probabilities and advantages of a new rollout."""
        objective = unwrapped(self.run.engine.objective)
        old, reference = self.sizes.steps > 1 or self.task.kl_in_reward, objective.reference is not None
        if old or reference:
            self.collect_log_probs(objective, old=old, reference=reference)
        fill_advantages(self.rollout, self.task, self.prompt_lengths)

    def collect_log_probs(self, objective: PolicyObjective, *, old: bool, reference: bool) -> None:
        """Fill the rollout's log-probabilities of policy and reference."""
        engine = self.run.engine
        options = {"old": old, "reference": reference}
        with self.run.phases("log-probs"):
            found = self.collect(
                engine.objective,
                lambda batch: objective.collect(engine.objective, batch, engine.autocast, **options),
                old + reference,
            )
        self.rollout.old_M = found[0] if old else None
        self.rollout.reference_M = found[-1] if reference else None

    def collect(self, objective: nn.Module, compute: Callable[[dict], Tensor], count: int) -> list[np.ndarray]:
        """Return values of all tokens, `count` arrays M: compute(this rank's rows) is count B T, in the micro-batches of the
        first epoch. objective: wrapped for its ranks; it is in training mode meanwhile."""
        rollout, run, slices = self.rollout, self.run, self.rollout.slices()
        found, lengths_P = [np.zeros(len(rollout.ids_M)) for _ in range(count)], self.prompt_lengths
        was_training = objective.training
        objective.train()
        for place in range(self.sizes.minibatches):
            for rows in self.micro_batches(place):
                values_CBT = compute(run.own_part(self.batch(rows)))
                values_CTB, _ = run.ranks.gather(values_CBT.mT.contiguous())
                values_CBT = values_CTB.mT.double().cpu().numpy()
                for i, n in enumerate(rows):
                    first = lengths_P[rollout.group_N[n]] - 1
                    for value_M, value_BT in zip(found, values_CBT, strict=True):
                        value_M[slices[n]] = value_BT[i, first : first + rollout.length_N[n]]
        objective.train(was_training)
        return found

    # ---- reports and state

    def logged(self, step: int) -> dict[str, float]:
        """Return the values of the present rollout, for a line of metrics.jsonl after `step` steps."""
        if self.rollout is None:
            return {}
        found = {"rollout": self.rollout.number, **self.rollout.metrics}
        if self.tokens_per_s is not None:
            found["rollout_tokens_per_s"] = round(self.tokens_per_s, 1)
        tokens = self.rollout.length_N.sum() / self.sizes.minibatches
        found["update_tokens_per_s"] = round(tokens / max(time.perf_counter() - self.step_began, 1e-9), 1)
        return found

    def samples(self) -> list[dict]:
        """Return the first replies of the present rollout, for samples.jsonl."""
        rollout, task, slices = self.rollout, self.task, self.rollout.slices()
        rows = []
        for n in range(min(LOGGED_REPLIES, len(slices))):
            prompt = self.prompts[rollout.prompt_P[rollout.group_N[n]]]
            reply = task.text_of(rollout.ids_M[slices[n]].tolist(), bool(rollout.has_ended_N[n]))
            rewards = dict(zip(task.rewards.names, map(float, rollout.rewards_NK[n]), strict=True))
            rows.append(
                {
                    "prompt": prompt.text,
                    "reply": reply,
                    "has_ended": bool(rollout.has_ended_N[n]),
                    "rewards": {name: None if value != value else value for name, value in rewards.items()},
                    "advantage": float(rollout.advantage_N[n]),
                }
            )
        return rows

    def state_dict(self) -> dict:
        return {"rollout": None if self.rollout is None else self.rollout.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.rollout = None if state["rollout"] is None else Rollout.from_state_dict(state["rollout"])


@contextmanager
def progress_bar(count: int, run: "Run") -> Iterator[Callable[[int], object]]:
    """A block with a bar of finished replies, for rollouts that take long enough to be seen."""
    is_quiet = not (run.config.report.verbose and run.ranks.is_main and sys.stderr.isatty())
    with tqdm(total=count, desc="rollout", unit=" replies", disable=is_quiet, leave=False, delay=2) as bar:
        yield bar.update
