"""KTO: replies that are good or bad, each by itself, without the other reply of a pair."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from train.command_line import Needs
from train.preference_task import Compared
from train.reference_task import ReferenceSettings, ReferenceTask
from train.runs.errors import TrainError
from train.task import Defaults, Scores

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from data.chat.preferences import Rated
    from data.example import Example
    from data.sources.records import Row, Rows
    from train.chat_data import ChatData
    from train.config import TrainConfig
    from train.objective import Objective


ORDER = 0x6B746F  # "kto", part of a seed


class Rating(NamedTuple):
    """A rated reply, and the ids of a reply to another prompt."""

    own: Compared
    other: "np.ndarray"


@dataclass(frozen=True)
class Settings(ReferenceSettings):
    """KTO (--objective kto)."""

    beta: float | None = None
    """β, the strength of the pull to the reference. Default: 0.1."""
    desirable_weight: float = 1.0
    """λ_D, the weight of good replies: where they are rarer, as many times more."""
    undesirable_weight: float = 1.0
    """λ_U, the weight of bad replies."""
    z: Literal["step", "micro-batch"] = "step"
    """The reference point z over all rows of the optimizer step; or over each micro-batch of a rank, as TRL."""

    def __post_init__(self) -> None:
        self.check("kto")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainError(f"--kto.{name.replace('_', '-')} {getattr(self, name)}: must be finite and above 0")


class KtoTask(ReferenceTask):
    """Rated replies, scored by the loss, and by how many good ones are above and bad ones below the reference point."""

    Settings = Settings
    unit = "replies"
    needs = (
        Needs(
            ("kto.reference_file",),
            lambda config: config.kto.reference == "precomputed",
            "it is of --kto.reference precomputed",
        ),
        Needs(("kto.max_reply",), lambda config: config.kto.replies, "--kto.replies 0 generates none"),
        Needs(("loss", "label_smoothing", "z_loss"), lambda config: False, "the loss is KTO's"),
    )
    defaults = Defaults("tiny", 4e-4, {"lora": 3e-4}, matrix_lr=4e-3)  # 45 steps: docs/LOG.md

    settings: Settings

    def __init__(self, config: "TrainConfig", data: "ChatData"):
        if config.optimizer.batch_size * config.optimizer.accumulate < 2:
            raise TrainError("--objective kto compares the replies of a step with their mean, and needs two: --batch-size 2")
        super().__init__(config, data)

    @classmethod
    def read(cls, row: "Row") -> "list[Rated]":
        from data.chat.preferences import read_rated_all

        return read_rated_all(row)

    def _encode(self, rows: "Rows") -> "Rows":
        """Encode records, and give each the reply to another prompt: of the record before it in a random order."""
        import numpy as np

        found = super()._encode(rows)
        values, is_train = found.values, not hasattr(self, "others")
        if is_train:
            self.others = values  # for held-out records of one prompt
            check_rated(values)
        order = np.random.Generator(np.random.PCG64([self.config.run.seed, ORDER])).permutation(len(values))
        ranked = [values[index] for index in order]
        ratings: dict[int, Rating] = {}
        for place, index in enumerate(order.tolist()):
            other = mismatched(ranked, place) or mismatched([*self.others, values[index]], len(self.others))
            ratings[index] = Rating(values[index], other.replies[0])
        return replace(found, values=[ratings[index] for index in range(len(values))])

    @classmethod
    def records_of(cls, value: "Row | Compared | Rating") -> "list[Rated]":
        return [value.own.record] if isinstance(value, Rating) else super().records_of(value)

    def transform(self, rating: Rating, random: "np.random.Generator") -> "list[Example]":
        """Return two rows: the rated reply, and its prompt with the reply to another prompt."""
        import numpy as np

        from data.chat.encode_preference import pair_examples
        from train.rated_objective import IS_GOOD
        from train.reference import ROW_IDS

        own, extra = rating.own, {IS_GOOD: np.array(int(rating.own.record.is_good))}
        other = rating.other[: self.config.network.context + self.room - len(own.prompt)]
        pair = [pair_examples(own.prompt, reply, group=1) for reply in (own.replies[0], other)]
        return [row._replace(extra=extra | {ROW_IDS: np.array(own.row_id + i)}) for i, row in enumerate(pair)]

    @property
    def first_record(self) -> Compared:
        return self.data.train.values[0].own

    def describe_replies(self, compared: Compared) -> list[str]:
        good = sum(rating.own.record.is_good for rating in self.data.train.values)
        count, beta = len(self.data.train), self.beta
        return [
            f"{'good' if compared.record.is_good else 'bad':9}{self.decode(compared.replies[0])}",
            f"labels   {good:,} good, {count - good:,} bad",
            f"loss     kto, β {beta:g}",
            self.describe_reference(),
        ]

    @property
    def beta(self) -> float:
        return 0.1 if self.settings.beta is None else self.settings.beta

    # ---- learning

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.rated_objective import RatedObjective

        asked = self.settings
        weights = {"desirable_weight": asked.desirable_weight, "undesirable_weight": asked.undesirable_weight}
        is_local = asked.z == "micro-batch"
        return RatedObjective(networks, self.build_reference(), beta=self.beta, is_local=is_local, **weights)

    # ---- evaluation

    def held_out_records(self) -> "Iterable[Compared]":
        return (rating.own for rating in self.data.validation.values)

    def score_line(self, scores: Scores) -> str:
        ended = f" · {scores['ended']:.0%} of its replies end by themselves" if "ended" in scores else ""
        kinds = [kind for kind in ("good", "bad") if f"reward_{kind}" in scores]
        rewards = " · ".join(f"reward of {kind} replies {scores[f'reward_{kind}']:.3f}" for kind in kinds)
        return (
            f"loss of held-out replies {scores['loss']:.4f} · {scores['accuracy']:.1%} on their side of z · {rewards} · KL "
            f"{scores['kl']:.3f} nats a token{ended}"
        )

    def verdict(self, scores: Scores) -> str:
        return self.score_line(scores).replace("loss of held-out replies", "held-out replies: loss")


def check_rated(values: "list[Compared]") -> None:
    """Raise TrainError where all labels are alike, or all prompts are one."""
    if len({each.record.is_good for each in values}) == 1:
        kind = "good" if values[0].record.is_good else "bad"
        raise TrainError(f"all {len(values):,} labels are {kind}, and KTO needs both; good replies alone are --objective sft")
    if len({each.prompt.tobytes() for each in values}) == 1:
        raise TrainError(f"all {len(values):,} records have one prompt, and KTO compares with replies to other prompts")


def mismatched(values: "list[Compared]", place: int) -> "Compared | None":
    """Return the last record before a place, and behind it from the end on, that has another prompt; None if there is none."""
    own = values[place].prompt.tobytes()
    earlier = (values[(place - distance) % len(values)] for distance in range(1, len(values)))
    return next((each for each in earlier if each.prompt.tobytes() != own), None)


TASK = KtoTask
