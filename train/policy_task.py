"""Objectives of reinforcement learning: prompts, sampled replies, rewards. Shared by grpo and rloo."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data.messages import format_count
from data.shell import command
from train.policy_settings import RolloutSettings
from train.prompt_task import PromptIds, PromptTask
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import EvalCorpus, Info, Scores, Totals

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model.rollouts import SampledReply
    from train.chat_data import ChatData
    from train.config import TrainConfig
    from train.loop import Run
    from train.objective import Objective
    from train.parallel.ranks import Ranks
    from train.policy_objective import PolicyLoss
    from train.rewards.open import Rewards
    from train.rewards.sample import Sample
    from train.rollout_source import RolloutSource

# Where rewards agree gradients are noise, and small: Muon would make an update of full size of them.
ADAMW = (("optimizer", "adamw"), ("weight_decay", 0.0), ("betas", (0.9, 0.99)))
OPTIMIZER = (*ADAMW, ("batch_size", 64), ("schedule", "constant"))


class PolicyTask(PromptTask):
    """A task whose replies are sampled from the network that it trains, and judged by reward functions."""

    architectures, head, unit = ("decoder",), "lm", "replies"
    needs_init, needs_rewards, has_memory_estimate, can_mix = True, True, False, False
    best, higher_is_better, log_every, has_dropout = "reward", True, 1, False
    baseline: ClassVar[str] = "mean"  # of a group's advantages
    kl_in_reward: ClassVar[bool] = False  # the KL term is a part of the reward, else of the loss
    compares_group: ClassVar[bool] = True  # replies to one prompt with each other

    settings: RolloutSettings
    data: "ChatData"
    rewards: "Rewards"

    def __init__(self, config: "TrainConfig", data: "ChatData"):
        from data.chat.encode import terminators
        from train.rewards.open import open_rewards
        from train.rewards.sample import Sample
        from train.rollout import RolloutSizes

        self.config, self.tokenizer, self.settings, self.template = config, data.tokenizer, settings_of(config), data.template
        self.left_out: list[str] = []
        train, held_out = self._encode(data.train), self._encode(data.validation)
        self.data = replace(data, train=train, validation=held_out)
        optimizer, asked = config.optimizer, self.settings
        sizes = (optimizer.batch_size, optimizer.accumulate, asked.group, asked.minibatches, asked.rollout_epochs)
        self.sizes = RolloutSizes(*sizes)
        self.source = self.open_source()
        self.validation = []  # generated: `generation_totals`
        self.rewards = open_rewards(config.rewards, config.run.device)
        if not any(self.rewards.weights):
            raise TrainError("--reward-weights: all are 0, and nothing is learned: one above 0 at least")
        every = (*train.values, *held_out.values)
        self.rewards.check([Sample(each.text, "", each.record.columns, True, 1, each.name) for each in every])
        ends = terminators(self.tokenizer, self.template)
        self.rewards.check_models(every[:CHECKED], ends, config.network.context, self.tokenizer.vocab_size)
        self.policy_loss = self.build_loss()
        self.is_warned = False

    def open_source(self) -> "RolloutSource":
        """Return the source of batches."""
        from train.rollout_source import RolloutSource

        return RolloutSource(self, self.sizes)

    @property
    def max_lengths(self) -> tuple[int, ...]:
        return (self.config.network.context,)

    def transform(self, row, random):
        raise NotImplementedError("rows of this objective are sampled")

    def identity(self) -> dict:
        import hashlib

        return super().identity() | {"template_sha256": hashlib.sha256(self.template.source.encode()).hexdigest()}

    def epochs(self, steps: int) -> float:
        return steps / self.sizes.steps * self.sizes.prompts / len(self.data.train)

    def drawn(self, step: int) -> Scores:
        return {}

    def per_step(self) -> str:
        return format_count(self.sizes.rows, "reply", "replies")

    def introduction(self) -> str:
        from train.policy_report import introduce

        return introduce(self)

    @abstractmethod
    def describe_loss(self) -> str:
        """Return the loss in words."""

    def save_files(self, folder: Path, network: "nn.Module") -> None:
        """Write the template, and the ids that end a reply, beside an adapter too."""
        from train.chat_data import save_chat_files

        save_chat_files(self.template, folder, network)

    # ---- learning

    @abstractmethod
    def build_loss(self) -> "PolicyLoss":
        """Return the loss. Errors (TrainError): settings that do not go together."""

    @property
    def scale(self) -> str:
        """The divisor of a group's advantages: "group", "batch" (a standard deviation) or "none"."""
        return "none"

    @property
    def reference_kind(self) -> str | None:
        """The name of the reference in `REFERENCE_LOG_PROBS`; None where β is 0. Errors (TrainError): no adapter to switch
        off."""
        if not self.settings.beta:
            return None
        kind = self.settings.reference
        if kind == "adapter-off" and self.config.method is None:
            raise TrainError(
                f"{self.option}.reference adapter-off: there is no adapter to switch off: add --adapter lora, or leave the "
                "option out, for a frozen copy"
            )
        usual = "copy" if self.config.method is None else "adapter-off"
        return usual if kind == "auto" else kind

    def networks(self, network: "nn.Module", initial: "Callable[[], nn.Module]") -> "nn.Module | Mapping[str, nn.Module]":
        from train.reference import COPY, frozen_copy

        if self.reference_kind != "copy":
            return network
        return {"policy": network, COPY: frozen_copy(network, initial)}

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.policy_objective import REFERENCE_LOG_PROBS, PolicyObjective

        kind = self.reference_kind
        return PolicyObjective(networks, self.policy_loss, None if kind is None else REFERENCE_LOG_PROBS[kind])

    def begin(self, run: "Run") -> None:
        """Give the source its run; compare the reference's weights with the run's note of them."""
        from train.reference_file import check_reference, note_reference

        self.source.begin(run)
        with run.ranks.together():
            if run.ranks.is_main:
                self.rewards.start()
        if self.reference_kind is not None:
            note_reference(run, check_reference(run))

    def begin_trial(self, run: "Run") -> None:
        self.source.begin(run)
        self.rewards.start()

    def close(self) -> None:
        self.rewards.close()

    def complete(self, run: "Run", step: int, batches: "list[dict[str, torch.Tensor]]") -> "list[dict[str, torch.Tensor]]":
        batches = self.source.complete(step)
        if not self.is_warned and not self.source.rollout.has_ended_N.any():
            self.is_warned = True
            run.console.info(
                f"note: all replies of rollout {self.source.rollout.number} were cut at {self.settings.max_reply} tokens: "
                f"raise {self.option}.max-reply, or teach stopping first (--objective sft)"
            )
        return batches

    def logged(self, run: "Run", step: int) -> Scores:
        """Return the rollout's values and the step's extremes; write its replies into samples.jsonl."""
        import torch

        from train.parallel.parallelize import unwrapped

        every = self.settings.samples_every
        if every and (step % every == 0 or step == 1):
            run.metrics.write_rows(step, "rollout", self.source.samples())
        found = self.source.logged(step)
        extremes = unwrapped(run.engine.objective).extremes
        own = [math.inf, -math.inf, 0.0] if extremes is None else extremes.tolist()  # a rank may have nothing to learn
        least, most, gap = run.ranks.gather(torch.tensor(own, dtype=torch.float64)[:, None])[0].unbind(0)
        if math.isinf(least.min()):
            return found
        return found | {"ratio_min": float(least.min()), "ratio_max": float(most.max()), "sampler_gap_max": float(gap.max())}

    def stop_ids(self, network: "nn.Module") -> list[int]:
        """Return the ids that end a reply."""
        return [id for id in dict.fromkeys((network.config.eos_id, *network.config.stop_ids)) if id is not None]

    def text_of(self, ids: list[int], has_ended: bool) -> str:
        """Return the text of a reply, without its stop id."""
        return self.tokenizer.decode(ids[:-1] if has_ended else ids)

    def sample_of(self, prompt: PromptIds, reply: "SampledReply") -> "Sample":
        """Return what reward functions get of a reply."""
        from train.rewards.sample import Sample

        text = self.text_of(list(reply.ids), reply.has_ended)
        ids, columns = (*prompt.ids, *reply.ids), prompt.record.columns
        return Sample(prompt.text, text, columns, reply.has_ended, len(reply.ids), prompt.name, ids)

    # ---- evaluation

    def open_eval_corpus(self, data: "ChatData", name: str, paths: tuple[str, ...], info: Info) -> EvalCorpus:
        """Open prompts of --eval-corpus, judged by this task's functions: one set of worker processes serves all."""
        corpus = super().open_eval_corpus(data, name, paths, info)
        corpus.scored.rewards = self.rewards
        return corpus

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Score a sampled and a greedy reply to held-out prompts: the same prompts and the same noise each time. Every rank
        writes all of them: a sharded network must be called alike on all ranks."""
        import math as m

        prompts = self.scored_prompts()
        totals: Totals = {}
        for suffix, temperature in (("", self.settings.temperature), ("_greedy", 0.0)):
            replies = self.write_replies(network, device, prompts, temperature)
            samples = [self.sample_of(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
            rewards = ranks.from_main(lambda samples=samples: self.rewards(samples).tolist())
            total = [weighted(each, self.rewards.weights) for each in rewards]
            valued = [each for each in total if not m.isnan(each)]
            totals[f"reward{suffix}"] = (float(sum(valued)), len(valued))
            if len(self.rewards.names) > 1:
                for k, name in enumerate(self.rewards.names):
                    values = [each[k] for each in rewards if not m.isnan(each[k])]
                    totals[f"reward_{name}{suffix}"] = (float(sum(values)), len(values))
            if not suffix:
                totals["ended"] = (float(sum(reply.has_ended for reply in replies)), len(replies))
                totals["reply_length"] = (float(sum(len(reply.ids) for reply in replies)), len(replies))
        return totals

    def scored_prompts(self) -> list[PromptIds]:
        """Return the held-out prompts that are scored: a draw that is always the same, where there are more than asked for."""
        import numpy as np

        every, most = self.data.validation.values, self.settings.validation_prompts
        if len(every) <= most:
            return list(every)
        return [every[index] for index in sorted(np.random.default_rng(0).permutation(len(every))[:most])]

    def write_replies(self, network, device, prompts, temperature: float) -> "list[SampledReply]":
        """Write a reply to each prompt; the noise of a prompt is a function of its number, the same in all runs."""
        from model.rollouts import sample_replies
        from train.rollout import draw_uniforms

        places = list(range(len(prompts)))
        uniforms_NT = draw_uniforms(0, VALIDATION, 0, places, 1, self.settings.max_reply)
        return sample_replies(
            network,
            [each.ids for each in prompts],
            uniforms_NT=uniforms_NT.to(device),
            stop_ids=self.stop_ids(network),
            temperature=temperature,
            pad_id=self.pad_id,
            context=self.config.network.context,
        )

    def scores(self, totals: Totals) -> Scores:
        """Return the means; "loss" is the reward of sampled replies with the other sign: what is minimised."""
        means = {name: total / count for name, (total, count) in totals.items() if count}
        if "reward" not in means:
            raise TrainError("the reward functions left out the replies to every held-out prompt (they returned None)")
        return {"loss": -means["reward"], **means}

    def score_line(self, scores: Scores) -> str:
        parts = [f"{name} {scores[f'reward_{name}']:.4f}" for name in self.rewards.names if f"reward_{name}" in scores]
        rest = f" ({', '.join(parts)})" if parts else ""
        return (
            f"reward of sampled replies {scores['reward']:.4f}{rest} · greedy {scores['reward_greedy']:.4f} · "
            f"{scores['ended']:.0%} end by themselves · {scores['reply_length']:.1f} tokens"
        )

    def verdict(self, scores: Scores) -> str:
        return self.score_line(scores)

    def conclusion(self, run: "Run") -> list[str]:
        """Return the shares of time, and the name of the picture of all curves."""
        from train.policy_report import describe_phases
        from train.reports.rollouts import plot_rollouts

        return [describe_phases(run.phases.seconds()), plot_rollouts(run.out)]

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str] | None:
        prompt = self.data.validation.values[0]
        (reply,) = self.write_replies(network, device, [prompt], 0.0)
        text = self.text_of(list(reply.ids), reply.has_ended) + " […]" * (not reply.has_ended)
        rewards = self.rewards([self.sample_of(prompt, reply)]).tolist()[0]
        values = ", ".join(f"{name} {value:g}" for name, value in zip(self.rewards.names, rewards, strict=True))
        parts = {"prompt": prompt.text, "reply": text, "rewards": values}
        lines = [f"{name:9}{' '.join(part.split())}" for name, part in parts.items()]
        return "a held-out prompt and the greedy reply", "\n".join(lines)

    def example_command(self, folder: Path) -> str:
        return command("model", "chat", folder)


CHECKED = 100  # prompts that reward models must encode as the policy does
VALIDATION = 1 << 32  # stands for the number of a rollout in the noise of validation


def weighted(rewards: list[float], weights: list[float]) -> float:
    """Return Σ weight · reward over the rewards that are there; NaN where none is."""
    values = [weight * value for weight, value in zip(weights, rewards, strict=True) if weight and not math.isnan(value)]
    return sum(values) if values else math.nan
