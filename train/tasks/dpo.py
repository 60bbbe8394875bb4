"""Direct preference optimisation: of two replies to a prompt the chosen one becomes likelier than the rejected one."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from train.command_line import Needs
from train.losses.mixture import SFT, parse_losses
from train.preference_task import Compared
from train.reference_task import ReferenceSettings, ReferenceTask
from train.runs.errors import TrainError
from train.task import Defaults, Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from data.chat.preferences import Preference
    from data.example import Example
    from data.sources.records import Row
    from train.config import TrainConfig
    from train.objective import Objective
    from train.preference_objective import PairLoss

LOSS_SETTINGS = ("label_smoothing", "gamma", "tau", "dpop_lambda")  # options that settings of losses are


@dataclass(frozen=True)
class Settings(ReferenceSettings):
    """Direct preference optimisation (--objective dpo) and its relatives."""

    loss: str = "sigmoid"
    """The loss of a pair: sigmoid (DPO), conservative, robust, hinge, ipo, simpo, orpo … (docs/preferences.md lists them with
    formulas), or several by weight: sigmoid=1,sft=0.2, where sft is the cross-entropy of the chosen reply."""
    beta: float | None = None
    """β, the strength of the pull to the reference. Default: the loss's own (0.1; simpo 2,
    sigmoid_norm 5)."""
    label_smoothing: float | None = None
    """ε of conservative, robust, exo_pair, aot and aot_unpaired: the share of pairs that are labelled wrongly."""
    gamma: float | None = None
    """γ of simpo: the margin that it asks for."""
    tau: float | None = None
    """τ of discopop."""
    dpop_lambda: float | None = None
    """λ of dpop: the weight of a chosen reply that becomes less likely."""
    nll_weight: float = 1.0
    """Weight of the cross-entropy that cpo (of the chosen reply) and orpo (of prompt and chosen reply) add."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """The f-divergence that keeps the policy near its reference."""
    divergence_alpha: float = 0.5
    """α of --dpo.divergence alpha."""
    wpo: bool = False
    """WPO: weight each pair by the probability that the policy itself would write it."""
    ld_alpha: float = 1.0
    """LD-DPO: weight of the tokens past the length of the shorter reply; 1: DPO."""

    def __post_init__(self) -> None:
        if "kto" in self.weights:
            raise TrainError("--dpo.loss kto: --objective kto reads pairs too, each reply by itself")
        if not [name for name in self.weights if name != SFT]:
            raise TrainError("--dpo.loss sft: it goes beside a loss of pairs; alone it is --objective sft on chosen replies")
        self.check("dpo")
        if not 0 <= self.nll_weight < math.inf:
            raise TrainError(f"--dpo.nll-weight {self.nll_weight}: must be finite and at least 0")
        if not math.isfinite(self.divergence_alpha):
            raise TrainError(f"--dpo.divergence-alpha {self.divergence_alpha}: must be finite")
        if not 0 <= self.ld_alpha <= 1:
            raise TrainError(f"--dpo.ld-alpha {self.ld_alpha}: must be between 0 and 1")

    @property
    def weights(self) -> dict[str, float]:
        """Return {loss: weight}. Errors (TrainError): an unknown loss."""
        return dict(parse_losses(self.loss))


def uses(option: str) -> "Callable[[TrainConfig], bool]":
    """Return a condition: one of the losses has the setting."""

    def condition(config: "TrainConfig") -> bool:
        from train.losses.preference import PREFERENCE_DETAILS

        return any(option in PREFERENCE_DETAILS[name].settings for name in config.dpo.weights if name != SFT)

    return condition


def has_nll(config: "TrainConfig") -> bool:
    from train.losses.preference import PREFERENCE_DETAILS

    return any(PREFERENCE_DETAILS[name].nll != "none" for name in config.dpo.weights if name != SFT)


def has_reference(config: "TrainConfig") -> bool:
    from train.losses.preference import PREFERENCE_DETAILS

    return any(PREFERENCE_DETAILS[name].needs_reference for name in config.dpo.weights if name != SFT)


def check_settings(loss: str, settings: "Mapping[str, float]") -> None:
    """Raise TrainError with the option that a loss refuses, which it does when it is called."""
    import torch

    from train.losses.preference import PREFERENCE_LOSSES

    pair = [torch.zeros(1)] * 4
    for name, value in settings.items():
        try:
            PREFERENCE_LOSSES[loss](*pair, beta=1.0, chosen_length=pair[0] + 1, rejected_length=pair[0] + 1, **{name: value})
        except ValueError as error:
            expected = str(error).partition("expected ")[2]
            raise TrainError(f"--dpo.{name.replace('_', '-')} {value}: --dpo.loss {loss} takes {expected}") from None


class DpoTask(ReferenceTask):
    """Preference pairs, scored by the loss, accuracy and margin of held-out pairs, and by replies that the network writes."""

    Settings = Settings
    needs = (
        *(Needs((f"dpo.{name}",), uses(name), f"the losses of --dpo.loss have no {name}") for name in LOSS_SETTINGS),
        Needs(("dpo.nll_weight",), has_nll, "it is of --dpo.loss cpo and orpo"),
        Needs(("dpo.divergence_alpha",), lambda config: config.dpo.divergence == "alpha", "it is of --dpo.divergence alpha"),
        Needs(("dpo.reference",), has_reference, "the losses of --dpo.loss have no reference"),
        Needs(
            ("dpo.reference_file",),
            lambda config: config.dpo.reference == "precomputed",
            "it is of --dpo.reference precomputed",
        ),
        Needs(("dpo.max_reply",), lambda config: config.dpo.replies, "--dpo.replies 0 generates none"),
        Needs(("loss", "label_smoothing", "z_loss"), lambda config: False, "--dpo.loss chooses the loss of pairs"),
    )
    defaults = Defaults("tiny", 4e-4, {"lora": 3e-4}, matrix_lr=4e-3)  # 45 steps: docs/LOG.md

    settings: Settings

    def __init__(self, config: "TrainConfig", data):
        super().__init__(config, data)
        self.pair_loss = self.build_loss()

    @classmethod
    def read(cls, row: "Row") -> "list[Preference]":
        from data.chat.preferences import read_preference

        return [read_preference(row)]

    def transform(self, compared: Compared, random: "np.random.Generator") -> "list[Example]":
        """Return the rows of a pair: the chosen reply, then the rejected one."""
        import numpy as np

        from data.chat.encode_preference import pair_examples
        from train.reference import ROW_IDS

        rows = [pair_examples(compared.prompt, reply, group=1) for reply in compared.replies]
        return [row._replace(extra={ROW_IDS: np.array(compared.row_id + i)}) for i, row in enumerate(rows)]

    def describe_replies(self, compared: Compared) -> list[str]:
        lines = [f"{name:9}{self.decode(ids)}" for name, ids in zip(("chosen", "rejected"), compared.replies, strict=True)]
        return [*lines, f"loss     {self.settings.loss}, β {self.pair_loss.beta:g}", self.describe_reference()]

    # ---- learning

    def build_loss(self) -> "PairLoss":
        """Return the loss of pairs. Errors (TrainError): settings that do not go together."""
        from train.losses.preference import PREFERENCE_DETAILS
        from train.preference_objective import PairLoss

        asked = self.settings
        names = [name for name in asked.weights if name != SFT]
        given = {name: getattr(asked, name) for name in LOSS_SETTINGS if getattr(asked, name) is not None}
        settings = {name: {k: v for k, v in given.items() if k in PREFERENCE_DETAILS[name].settings} for name in names}
        for name, options in settings.items():
            check_settings(name, options)
        betas = {PREFERENCE_DETAILS[name].beta for name in names}
        if asked.beta is None and len(betas) > 1:
            raise TrainError(f"--dpo.loss {asked.loss}: these have different β by default ({sorted(betas)}): give --dpo.beta")
        refused = [name for name in names if not PREFERENCE_DETAILS[name].takes_divergence]
        if asked.divergence != "reverse_kl" and refused:
            takes = ", ".join(name for name, detail in PREFERENCE_DETAILS.items() if detail.takes_divergence)
            raise TrainError(
                f"--dpo.divergence {asked.divergence} goes with losses of the difference of two log-ratios ({takes}), not with "
                f"--dpo.loss {refused[0]}"
            )
        averaging = [name for name in names if PREFERENCE_DETAILS[name].averages]
        if asked.ld_alpha != 1 and averaging:
            raise TrainError(f"--dpo.ld-alpha {asked.ld_alpha}: --dpo.loss {averaging[0]} divides by the number of tokens")
        rows = self.config.optimizer.batch_size * self.config.optimizer.accumulate
        if rows < 2 and any(PREFERENCE_DETAILS[name].sees_batch for name in names):
            raise TrainError(f"--dpo.loss {asked.loss} compares the pairs of a step, and needs two of them: --batch-size 2")
        return PairLoss(
            asked.weights,
            beta=betas.pop() if asked.beta is None else asked.beta,
            settings=settings,
            divergence=asked.divergence,
            divergence_alpha=asked.divergence_alpha,
            is_weighted=asked.wpo,
            ld_alpha=asked.ld_alpha,
            nll_weight=asked.nll_weight,
        )

    @property
    def needs_reference(self) -> bool:
        return has_reference(self.config)

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.preference_objective import PairObjective

        return PairObjective(networks, self.pair_loss, self.build_reference())

    # ---- evaluation

    def scores(self, totals: dict) -> Scores:
        """Return the means; the loss is the one that training minimises, and "pair_loss" its part without cross-entropies."""
        found, weights = super().scores(totals), self.pair_loss.nll_weights
        for name in [name for name in found if weights and (name == "loss" or name.startswith("loss_"))]:
            source = name.removeprefix("loss")
            found["pair_loss" + source] = found[name]
            found[name] += sum(weight * found.get(term + source, 0.0) for term, weight in weights.items())
        return found

    def score_line(self, scores: Scores) -> str:
        kl = f" · KL {scores['kl']:.3f} nats a token" if "kl" in scores else ""
        ended = f" · {scores['ended']:.0%} of its replies end by themselves" if "ended" in scores else ""
        return (
            f"loss of held-out pairs {scores['loss']:.4f} · {scores['accuracy']:.1%} ordered right · margin "
            f"{scores['margin']:.3f}{kl}{ended}"
        )

    def verdict(self, scores: Scores) -> str:
        return self.score_line(scores).replace("loss of held-out pairs", "held-out pairs: loss")


TASK = DpoTask
