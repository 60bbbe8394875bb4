"""A reward model: one score for a prompt and reply, higher for replies that are preferred."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.shell import command
from train.command_line import Needs
from train.preference_task import Compared, PreferenceSettings, PreferenceTask
from train.runs.errors import TrainError
from train.task import Defaults, Scores, Totals

if TYPE_CHECKING:
    import numpy as np

    from data.chat.preferences import Preference
    from data.example import Example
    from data.sources.records import Row, Rows
    from model.config import ModelConfig
    from model.network import Network
    from model.reward import MeanScore
    from train.chat_data import ChatData
    from train.config import TrainConfig
    from train.loop import Run
    from train.objective import Objective

HEAD = "head.out.weight"


@dataclass(frozen=True)
class Settings(PreferenceSettings):
    """Reward model (--objective reward)."""

    margins: bool = False
    """Ask for a difference of at least each pair's margin (the column margin, or the difference of its scores)."""
    centering: float = 0.01
    """Weight of (score of chosen + score of rejected)², which holds the mean of all scores near 0; 0: off."""

    def __post_init__(self) -> None:
        if not 0 <= self.centering < float("inf"):
            raise TrainError(f"--reward.centering {self.centering}: must be finite and at least 0")


class Prompt(NamedTuple):
    """All pairs of one prompt."""

    pairs: list[Compared]


class RewardTask(PreferenceTask):
    """A reward model, scored by the pairs that it orders right and by the calibration of its probabilities.

    All pairs of one prompt are in one batch, so that none of its replies is learned several times.
    """

    Settings = Settings
    head = "sequence"
    room = 0
    needs = (Needs(("loss", "label_smoothing", "z_loss"), lambda config: False, "the loss is that of pairs of scores"),)
    defaults = Defaults("tiny", 3e-3)
    best, higher_is_better = "loss", False

    settings: Settings

    # ---- data

    @classmethod
    def read(cls, row: "Row") -> "list[Preference]":
        from data.chat.preferences import read_preference

        return [read_preference(row)]

    @classmethod
    def records_of(cls, value: "Row | Prompt") -> "list[Preference]":
        return [pair.record for pair in value.pairs] if isinstance(value, Prompt) else cls.read_or_none(value)

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "ChatData") -> "ModelConfig":
        """Give the network one label, as transformers' sequence classifiers have it, read at the last token."""
        from train.label_config import with_labels

        return with_labels(base.replace(pool="last"), ("reward",), "regression")

    @classmethod
    def adapt_network(cls, config: "TrainConfig", network: "Network", data: "ChatData") -> "Network":
        """Initialize a new head by N(0, 1 / (D + 1)), so that scores begin near 0; choose a pad that ends no text.

        Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.1.
        """
        import torch

        from data.transforms.framing import choose_pad_id
        from model.init import parameter_generator

        own_pad, is_new_head = network.config.pad_id, HEAD in network.new_weights
        network = super().adapt_network(config, network, data)
        first, *ends = cls.find_reply_ends(data)
        if any(isinstance(record.prompt, str) for row in data.train.values for record in cls.records_of(row)):
            ends.append(data.tokenizer.eos_id)  # ends strings
        pad_id = choose_pad_id(data.tokenizer, first, known=[own_pad], ends=ends)
        network.config = network.config.replace(pad_id=pad_id)
        if is_new_head:
            weight = network.head.out.weight
            generator = parameter_generator(config.run.seed, HEAD)
            drawn = torch.randn(weight.shape, generator=generator) / (network.config.width + 1) ** 0.5
            with torch.no_grad():
                weight.copy_(drawn)
        return network

    def __init__(self, config: "TrainConfig", data: "ChatData"):
        self.mean_score: MeanScore | None = None  # of the last validation
        self.run: Run | None = None
        super().__init__(config, data)

    def _encode(self, rows: "Rows") -> "Rows":
        """Encode records, and join those of one prompt."""
        from data.sources.records import Rows

        found = super()._encode(rows)
        prompts: dict[tuple, Prompt] = {}
        names: dict[tuple, list[str]] = {}
        for each, name, source in zip(found.values, found.names, found.sources, strict=True):
            key = (source, each.prompt.tobytes())
            prompts.setdefault(key, Prompt([])).pairs.append(each)
            names.setdefault(key, []).append(name)
        if self.settings.margins:
            missing = [n for each, n in zip(found.values, found.names, strict=True) if each.record.margin is None]
            against = [n for each, n in zip(found.values, found.names, strict=True) if (each.record.margin or 0) < 0]
            if against:
                raise TrainError(f"--reward.margins: {against[0]} has one below 0: its rejected reply has the higher score")
            if missing:
                raise TrainError(f"--reward.margins: {missing[0]} has no margin, and no score_chosen and score_rejected")
        return Rows(list(prompts.values()), [", ".join(each) for each in names.values()], [key[0] for key in prompts])

    def transform(self, prompt: Prompt, random: "np.random.Generator") -> "list[Example]":
        """Return the rows of all pairs of a prompt: chosen, rejected, chosen …"""
        import numpy as np

        from data.example import Example
        from train.reward_objective import MARGIN

        rows = []
        for pair in prompt.pairs:
            extra = {MARGIN: np.array(pair.record.margin)} if self.settings.margins else {}
            for reply in pair.replies:
                rows.append(Example(np.concatenate([pair.prompt, reply]), np.array(0), extra=extra, group=1))
        return rows

    @property
    def first_record(self) -> Compared:
        return self.data.train.values[0].pairs[0]

    def per_step(self) -> str:
        from data.messages import format_count

        optimizer = self.config.optimizer
        return format_count(optimizer.batch_size * optimizer.accumulate, "prompt")

    def describe_replies(self, compared: Compared) -> list[str]:
        pairs = sum(len(prompt.pairs) for prompt in self.data.train.values)
        lines = [f"{name:9}{self.decode(ids)}" for name, ids in zip(("chosen", "rejected"), compared.replies, strict=True)]
        return [*lines, f"pairs    {pairs:,} of {len(self.data.train):,} prompts"]

    # ---- learning

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.reward_objective import RewardObjective

        return RewardObjective(networks, centering=self.settings.centering)

    def begin(self, run: "Run") -> None:
        """Read the mean score of the checkpoint that a run goes on from."""
        from model.reward import read_mean_score

        self.run = run
        if run.step:
            self.mean_score = read_mean_score(run.out / "checkpoints" / f"step-{run.step}")

    def save_files(self, folder: Path, network: "Network") -> None:
        """Write also the mean score of preferred replies in the last validation: rewards are scores minus it.

        Source: Huang et al. 2024, arXiv 2403.17031, detail 12, and Ziegler et al. 2019, arXiv 1909.08593.
        """
        from model.reward import write_mean_score

        super().save_files(folder, network)
        if self.mean_score is not None:
            write_mean_score(folder, self.mean_score)

    # ---- evaluation

    def scores(self, totals: Totals) -> Scores:
        from model.reward import MeanScore
        from train.reward_objective import CALIBRATION

        sums_K = totals.pop("calibration")[0]
        scores = super().scores(totals) | {"ece": CALIBRATION.score(sums_K[None].round().long()).parts["ece"]}
        self.mean_score = MeanScore(scores["score_chosen"], None if self.run is None else self.run.step)
        return scores

    def score_line(self, scores: Scores) -> str:
        return (
            f"loss of held-out pairs {scores['loss']:.4f} · {scores['accuracy']:.1%} ordered right · difference of scores "
            f"{scores['difference']:.3f} · calibration error {scores['ece']:.3f}"
        )

    def verdict(self, scores: Scores) -> str:
        return self.score_line(scores).replace("loss of held-out pairs", "held-out pairs: loss")

    def example_command(self, folder: Path) -> str:
        return command("eval", "reward", folder, "FILE")


TASK = RewardTask
