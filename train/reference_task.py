"""Objectives on preferences whose loss compares the policy with a reference: dpo and kto."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.shell import command
from train.preference_task import Compared, PreferenceSettings, PreferenceTask
from train.runs.errors import TrainError
from train.task import Totals

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model.config import ModelConfig
    from train.chat_data import ChatData
    from train.chat_replies import Prompt, Reply
    from train.config import TrainConfig
    from train.loop import Run
    from train.parallel.ranks import Ranks
    from train.reference import Reference


@dataclass(frozen=True)
class ReferenceSettings(PreferenceSettings):
    """Options of objectives with a reference."""

    reference: Literal["auto", "copy", "adapter-off", "precomputed"] = "auto"
    """The reference: a frozen copy of --init; with --adapter the network without it (auto chooses of these two); or
    log-probabilities that are computed once before the first step and kept in a file."""
    reference_file: Path | None = None
    """The file of a precomputed reference; other runs of the same data and --init may name it too. Default:
    RUN/reference.safetensors."""
    replies: int = 16
    """Validation generates replies (greedily) to so many held-out prompts; 0: none."""
    max_reply: int = 128
    """Maximal tokens of such a reply."""

    def check(self, objective: str) -> None:
        """Raise TrainError for a number that cannot be."""
        for name, least in (("replies", 0), ("max_reply", 1)):
            if not getattr(self, name) >= least:
                raise TrainError(f"--{objective}.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise TrainError(f"--{objective}.beta {self.beta}: must be finite and above 0")


class ReferenceTask(PreferenceTask):
    """A task with a policy and, unless no loss needs it, a reference; and with replies in validation."""

    settings: ReferenceSettings

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "ChatData") -> "ModelConfig":
        """Refuse a network that writes no text, such as a reward model (TrainError)."""
        import model.hub
        from train.runs.open import resolve

        found = model.hub.read_config(resolve(config.run.init), any_head=True).head
        if found != "lm":
            raise TrainError(f"--init {config.run.init} has the head {found!r} and writes no replies: name one that answers")
        return base

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def reference_kind(self) -> str | None:
        """The name of the reference in `REFERENCES`; None where no loss needs one. Errors (TrainError): no adapter to switch
        off."""
        if not self.needs_reference:
            return None
        kind = self.settings.reference
        if kind == "adapter-off" and self.config.method is None:
            raise TrainError(
                f"{self.option}.reference adapter-off: there is no adapter to switch off: add --adapter lora, or leave the "
                "option out, for a frozen copy"
            )
        usual = "copy" if self.config.method is None else "adapter-off"
        return usual if kind == "auto" else kind

    @property
    def option(self) -> str:
        """The prefix of the objective's options."""
        return f"--{self.config.run.objective}"

    def describe_reference(self) -> str:
        """Return a line about the reference, for the introduction."""
        what = {
            None: "none: the loss needs none",
            "copy": f"a frozen copy of {self.config.run.init}",
            "adapter-off": f"{self.config.run.init}, the network without its adapter",
            "precomputed": f"{self.config.run.init}, by log-probabilities that are computed once",
        }
        return f"reference {what[self.reference_kind]}"

    # ---- learning

    def networks(self, network: "nn.Module", initial: "Callable[[], nn.Module]") -> "nn.Module | Mapping[str, nn.Module]":
        from train.reference import COPY, frozen_copy

        self.initial = initial
        if self.reference_kind != "copy":
            return network
        return {"policy": network, COPY: frozen_copy(network, initial)}

    def build_reference(self) -> "Reference | None":
        from train.reference import REFERENCES

        kind = self.reference_kind
        return None if kind is None else REFERENCES[kind]()

    def begin(self, run: "Run") -> None:
        """Compare the reference's weights with the run's note of them; compute its log-probabilities, where a file has them."""
        from train.reference_file import check_reference, note_reference, open_table

        if (kind := self.reference_kind) is not None:
            sha256 = check_reference(run)
            if kind == "precomputed":
                open_table(run, self, self.settings.reference_file, sha256)
            note_reference(run, sha256)

    def begin_trial(self, run: "Run") -> None:
        """Put zeros in the place of log-probabilities that a run computes first."""
        if self.reference_kind == "precomputed":
            from train.reference_file import fill_zeros

            fill_zeros(run, self)

    # ---- evaluation

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        """Score replies. Every rank writes all of them: a sharded network must be called alike on all ranks."""
        asked = self.prompts(self.settings.replies)
        if not asked:
            return {}
        found = self.write_replies(network, device, asked)
        return {"ended": (float(sum(reply.has_ended for reply in found)), len(found))}

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str] | None:
        from train.chat_replies import describe_reply

        asked = self.prompts(1)
        if not asked:
            return None
        text = describe_reply(self.tokenizer, asked[0], self.write_replies(network, device, asked)[0])
        return "a held-out prompt, a reply of the data and the greedy reply", text

    def prompts(self, most: int) -> "list[Prompt]":
        """Return held-out prompts, each once, with the first reply of their first record."""
        from train.chat_replies import Prompt

        first = {}
        for each in self.held_out_records():
            first.setdefault(each.prompt.tobytes(), each)
        return [
            Prompt(each.prompt.tolist(), self.tokenizer.decode(each.replies[0].tolist()).strip())
            for each in list(first.values())[:most]
        ]

    def held_out_records(self) -> "Iterable[Compared]":
        return self.data.validation.values

    def write_replies(self, network: "nn.Module", device: "torch.device", prompts: "list[Prompt]") -> "list[Reply]":
        """Write the greedy replies to prompts."""
        from train.chat_replies import write_replies

        sizes = {"batch_size": self.config.optimizer.batch_size, "context": self.config.network.context}
        options = sizes | {"max_new_tokens": self.settings.max_reply, "pad_id": self.pad_id}
        return write_replies(network, self.tokenizer, [prompt.ids for prompt in prompts], device=device, **options)

    def example_command(self, folder: Path) -> str:
        return command("model", "chat", folder)
