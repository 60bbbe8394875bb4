"""The objective of preference pairs: a loss of the log-probabilities of two replies to one prompt, and of a reference's."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.transforms.causal import IGNORE
from train.losses.divergence import transform_log_ratios
from train.losses.pair_weights import ld_token_weights, wpo_weights
from train.losses.preference import PREFERENCE_DETAILS, PREFERENCE_LOSSES
from train.losses.preference_sorted import aot_pairs
from train.losses.sequence import sequence_log_probs, token_log_probs
from train.objective import Metric, Objective, Result, Term
from train.parallel.ranks import Ranks
from train.reference import ROW_IDS, Reference, remove_dropout
from train.shared_prompt import choose_read

TEXT_NLL, REPLY_NLL = "text_nll", "nll"  # terms beside the loss of pairs


@dataclass(frozen=True)
class PairLoss:
    """The loss of a pair: Σ over losses of weight · loss, as `--dpo.loss sigmoid=1,sft=0.2` names them.

        settings      (name, keyword settings) of each loss of PREFERENCE_LOSSES
        divergence    the f-divergence whose log-ratios take the place of log π - log π_ref, with its alpha
        is_weighted   WPO: each pair weighs exp(mean log-probability of its tokens), detached
        ld_alpha      LD-DPO: weight of the tokens past the shorter reply
        nll_weight    of the cross-entropy that cpo and orpo add
    """

    weights: Mapping[str, float]
    beta: float
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    is_weighted: bool = False
    ld_alpha: float = 1.0
    nll_weight: float = 1.0

    @property
    def names(self) -> list[str]:
        """The losses of pairs, without `sft`."""
        return [name for name in self.weights if name != "sft"]

    @property
    def needs_reference(self) -> bool:
        return any(PREFERENCE_DETAILS[name].needs_reference for name in self.names)

    @property
    def sees_step(self) -> bool:
        return any(PREFERENCE_DETAILS[name].sees_batch for name in self.names)

    @property
    def averages(self) -> bool:
        """True where every loss divides log-probabilities by the number of tokens."""
        return all(PREFERENCE_DETAILS[name].averages for name in self.names)

    @property
    def nll_weights(self) -> dict[str, float]:
        """Return the weights of the chosen reply's cross-entropy: over its tokens, and over those of prompt and reply."""
        found = {REPLY_NLL: self.weights.get("sft", 0.0), TEXT_NLL: 0.0}
        for name in self.names:
            detail = PREFERENCE_DETAILS[name]
            if detail.nll != "none":
                found[REPLY_NLL if detail.nll == "reply" else TEXT_NLL] += self.weights[name] * self.nll_weight
        return {name: weight for name, weight in found.items() if weight}


class Pairs(NamedTuple):
    """Log-probabilities of pairs of replies, each B, summed over the reply's tokens, and the numbers of tokens.

    LD-DPO weighs the tokens of the first four. The whole sums are the policy's, with the weight 1 of each token.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    whole_chosen: Tensor
    whole_rejected: Tensor


class PairObjective(Objective):
    """forward(batch) -> the loss of the pairs whose rows alternate: chosen, rejected, chosen …

    labels B T: the tokens of each reply with its terminator; a pair without labels only fills a batch up. Terms: "loss", a mean
    over the pairs of the step, and where asked "nll" (sft, cpo) or "text_nll" (orpo), token means of the chosen replies.
    Metrics: rewards β (log π - log π_ref) of both, over the number of tokens where all losses average; their margin, accuracy
    (margin above 0), log-probabilities, lengths, and "kl": the mean over tokens of log π_ref - log π, an estimate of
    KL(π_ref ‖ π) where the replies are the reference's.

    Losses that compare pairs (aot) do so over all pairs of the optimizer step, of all micro-batches and ranks: `begin_step`
    collects their values. A row's loss then has its partners as constants, and each is differentiated in its own row's.
    P: pairs, half of the B rows. labels[t] is the target of position t: the first is at the prompt's last token.
    """

    uses = ("labels", ROW_IDS)

    def __init__(self, networks: nn.Module | Mapping[str, nn.Module], loss: PairLoss, reference: Reference | None):
        super().__init__(networks)
        remove_dropout(self.network)
        self.loss_of_pairs, self.reference = loss, reference
        self.read = choose_read(self.network.config)
        if reference is not None:
            reference.read = self.read
        self.sees_step = loss.sees_step
        self.step_values: Tensor | None = None  # of all pairs of the step, 4 P: the first four of `Pairs`
        self.first = 0  # index of the next micro-batch's first pair in it
        self.collected: list[Tensor] | None = None

    def forward(self, batch: dict[str, Tensor]) -> Result:
        loss, scored_P = self.loss_of_pairs, scored_pairs(batch)
        pairs, features_BTD = self.pairs(batch, scored_P)
        if self.collected is not None:
            self.collected.append(torch.stack(pairs[:4]))
            return Result({})
        loss_P = sum(weight * self.one_loss(name, pairs) for name, weight in loss.weights.items() if name != "sft")
        if loss.is_weighted:
            means = (pairs.whole_chosen / pairs.chosen_length, pairs.whole_rejected / pairs.rejected_length)
            loss_P = loss_P * wpo_weights(*means)
        self.first += len(pairs.policy_chosen)
        counts = self.counts(batch)
        terms = {"loss": Term(torch.as_tensor(loss_P).sum(), counts["loss"])}
        for name, weight in loss.nll_weights.items():
            nats = -pairs.whole_chosen.sum() if name == REPLY_NLL else self.text_nats(features_BTD, batch)
            terms[name] = Term(nats, counts[name], weight)
        return Result(terms, self.metrics(pairs, counts["loss"]))

    def pairs(self, batch: Mapping[str, Tensor], scored_P: Tensor) -> tuple[Pairs, Tensor]:
        """Return the log-probabilities of the scored pairs, by one forward of policy and one of reference, and the policy's
        features. The two replies of a pair read their prompt once (`train.shared_prompt`)."""
        labels_BT, inputs = batch["labels"], self.inputs_of(batch)
        weights_BT = self.token_weights(labels_BT)
        reference_B = None
        if self.reference is not None:  # first: an adapter is switched off for it, before the policy's graph exists
            reference_B = self.reference(self.network, self.frozen, batch, inputs, labels_BT, weights_BT)
        head = self.network.head
        features_BTD = head.features(self.read(self.network, inputs, labels_BT))
        log_p_BT = token_log_probs(features_BTD, head.weight, labels_BT, head.bias)
        whole_B = log_p_BT.sum(-1)
        policy_B = whole_B if weights_BT is None else (log_p_BT * weights_BT.to(log_p_BT.dtype)).sum(-1)
        reference_B = torch.zeros_like(policy_B) if reference_B is None else reference_B.to(policy_B.dtype)
        length_B = (labels_BT != IGNORE).sum(-1).to(policy_B.dtype)
        columns = (in_pairs(values)[scored_P].unbind(-1) for values in (policy_B, reference_B, length_B, whole_B))
        return Pairs(*(column for both in columns for column in both)), features_BTD

    def token_weights(self, labels_BT: Tensor) -> Tensor | None:
        """Return LD-DPO's weights of tokens, B T; None: 1."""
        alpha = self.loss_of_pairs.ld_alpha
        return None if alpha == 1 else long_reply_weights(labels_BT, alpha)

    def one_loss(self, name: str, pairs: Pairs) -> Tensor:
        """Return one loss of each pair."""
        loss, values = self.loss_of_pairs, pairs[:4]
        options = {"beta": loss.beta, **loss.settings.get(name, {})}
        if loss.divergence != "reverse_kl":
            values = transform_log_ratios(*values, kind=loss.divergence, alpha=loss.divergence_alpha)
        if PREFERENCE_DETAILS[name].sees_batch and self.step_values is not None:
            partners = aot_pairs(*self.step_values, unpaired=name == "aot_unpaired")
            options["partners"] = tuple(each[self.first : self.first + len(values[0])] for each in partners)
        lengths = {"chosen_length": pairs.chosen_length, "rejected_length": pairs.rejected_length}
        return PREFERENCE_LOSSES[name](*values, **lengths, **options)

    def text_nats(self, features_BTD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return Σ -log π of prompts and chosen replies."""
        chosen, head = slice(0, None, 2), self.network.head
        labels_BT = text_labels(batch)[chosen]
        return -sequence_log_probs(features_BTD[chosen], head.weight, labels_BT, head.bias).sum()

    def metrics(self, pairs: Pairs, count: Tensor) -> dict[str, Metric]:
        """Return the values of a step that are logged."""
        policy_c, policy_r, reference_c, reference_r, length_c, length_r, whole_c, whole_r = (each.detach() for each in pairs)
        beta = self.loss_of_pairs.beta
        chosen, rejected = beta * (policy_c - reference_c), beta * (policy_r - reference_r)
        if self.loss_of_pairs.averages:
            chosen, rejected = chosen / length_c, rejected / length_r
        margin = chosen - rejected
        named = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "margin": margin,
            "accuracy": (margin > 0).to(margin.dtype),
            "log_prob_chosen": whole_c,
            "log_prob_rejected": whole_r,
            "length_chosen": length_c,
            "length_rejected": length_r,
        }
        found = {name: Metric(values.sum(), count) for name, values in named.items()}
        if self.reference is not None:
            nats = (reference_c - policy_c + reference_r - policy_r).sum()
            found["kl"] = Metric(nats, (length_c + length_r).sum())
        return found

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Count the pairs, and the tokens of the further terms."""
        wanted = {"loss": scored_pairs(batch).sum()}
        for name in self.loss_of_pairs.nll_weights:
            labels_BT = batch["labels"] if name == REPLY_NLL else text_labels(batch)
            wanted[name] = (labels_BT[::2] != IGNORE).sum()
        return wanted

    # ---- losses that compare the pairs of a step

    def begin_step(
        self,
        objective: nn.Module,
        micro_batches: Sequence[dict[str, Tensor]],
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """Collect the log-probabilities of all pairs of the step, where a loss compares them and one forward has not all."""
        self.step_values, self.first = None, 0
        if not self.sees_step or (len(micro_batches) == 1 and ranks.world == 1):
            return
        self.collected = []
        try:
            with torch.no_grad():
                for batch in micro_batches:
                    with autocast():
                        objective(batch)
            self.step_values, self.first = ranks.gather(torch.cat(self.collected, dim=1))
        finally:
            self.collected = None


def in_pairs(values_B: Tensor) -> Tensor:
    """Return the values of rows as P 2: chosen, rejected. A rank may have no row."""
    return values_B.view(len(values_B) // 2, 2)


def scored_pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which pairs of a batch are scored, P: both replies have labels."""
    return in_pairs((batch["labels"] != IGNORE).any(-1)).all(-1)


def text_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of all tokens of a row but the first, B T: of its prompt and its reply. Rows without labels: none."""
    labels_BT, ids_BT, mask_BT = batch["labels"], batch["input_ids"], batch["attention_mask"].bool()
    next_BT = torch.cat((ids_BT[:, 1:], labels_BT[:, -1:]), dim=1)
    has_next_BT = torch.cat((mask_BT[:, 1:], mask_BT.new_zeros(len(mask_BT), 1)), dim=1)
    full_BT = torch.where(has_next_BT, next_BT, torch.where(mask_BT, labels_BT, IGNORE))
    return full_BT.masked_fill((labels_BT == IGNORE).all(-1, keepdim=True), IGNORE)


def long_reply_weights(labels_BT: Tensor, alpha: float) -> Tensor:
    """Return the weight of each token for LD-DPO, B T: alpha past the length of the pair's shorter reply, else 1."""
    scored_BT = labels_BT != IGNORE
    return torch.stack(ld_token_weights(scored_BT[::2], scored_BT[1::2], alpha, dtype=torch.float64), dim=1).flatten(0, 1)
