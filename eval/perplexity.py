"""Perplexity of a language model per token, byte, character and word, in strided windows; pseudo-perplexity of a masked model.

    perplexity = exp(1/n Σ -log p(target | the preceding tokens))        over the n targets of all documents

A network reads windows of at most `context` tokens that advance by `stride`. A window scores the targets that no earlier window
has scored, so each counts once. With context 5 and stride 3:

    document        a b c d e f g h i        i is only a target; without a bos, a is no target
    first window    a b c d e                scores b c d e f
    second                d e f g h          scores g h i, each after at least context - stride + 1 = 3 tokens

A bos is an ordinary token at the start of the document. A bos in every window replaces the first token of each window, so
windows and targets are the same, and all targets but those of the first window see one token less:

    document        <s> a b c d e f g h i
    first window    <s> a b c d              scores a b c d e
    second                <s> d e f g        scores f g h, each after <s> and at least context - stride = 2 tokens
    third                       <s> g h      scores i

Perplexity per token compares models with the same tokenizer; per byte, character or word it compares any models.
Source: Jelinek et al. 1977; for masked language models Salazar et al. 2020, arXiv 1910.14659.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from eval.score import Score, corpus_value, exact_sum, signature_of
from eval.targets import IGNORE, SIZES, Ids, Row, TargetScorer, add_special_tokens, evaluation_mode, row_batches, with_sizes

ROWS = 1024  # rows read ahead and sorted by length, so that batches have little padding
BOS_AT = ("document", "every-window")


@dataclass(frozen=True, kw_only=True)
class TokenScores(ABC):
    """Base of `Perplexity` and `PseudoPerplexity`: sums over the targets of documents; subclasses define the rows.

    Statistics of an example, float64: references (1), nats, targets, bytes, characters, words, documents; correct targets for
    each k of `top_k` (from 1); then per confidence bin the targets, Σ confidence, and the targets that are the best guess. All
    but nats and confidences are integers.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    top_k: Sequence[int] = (1, 5)
    bins: int = 15
    dtype: str = ""  # the network's, for the signature; log-probabilities are computed in float32 or higher

    name: ClassVar[str]
    is_mean: ClassVar[bool] = False
    architecture: ClassVar[str]  # the network's, for which the metric is defined
    is_padded: ClassVar[bool]  # rows of different lengths may share a batch

    def __post_init__(self) -> None:
        if self.bins < 1 or min(self.top_k, default=1) < 1:
            raise ValueError(f"top_k={self.top_k} and bins={self.bins} must be at least 1")
        object.__setattr__(self, "top_k", tuple(sorted({1, *self.top_k})))

    @abstractmethod
    def rows(self, id_M: np.ndarray) -> Iterator[Row]:
        """Yield the rows of a document, given its ids with bos and eos."""

    def statistics(
        self, network: Callable, documents: Iterable[Ids], *, texts: Iterable[str] | None = None,
        bytes: Iterable[int] | None = None, characters: Iterable[int] | None = None, words: Iterable[int] | None = None,
        unit: str | None = None, batch_size: int | None = None, device: str | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Compute the statistics (B, K) of documents of token ids; `documents` may be a generator.

        `network(input_ids)` maps (B, T) ids to logits (B, T, V), or returns an object with `.logits`. `bytes` (UTF-8),
        `characters` (code points) and `words` (between whitespace) are given, or counted from `texts`. Examples are documents,
        or windows with `unit` "window", the default for a single document, since a bootstrap needs several examples. A document
        without a target (empty, or one token without bos) has all zeros, its sizes too. Statistics of subsets sum to those of
        the set up to rounding in the network; with `batch_size` 1 exactly.

        Errors: non-integer ids (TypeError); ids outside the vocabulary, a document that already has bos or eos, unequal numbers
        of documents and texts, a target with a non-finite log-probability (ValueError with document and token). A logit of
        -inf is allowed for tokens that are not targets.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if unit not in (None, "document", "window"):
            raise ValueError(f"unit={unit!r}: one of 'document', 'window'")
        config = getattr(network, "config", None)
        if (kind := getattr(config, "architecture", self.architecture)) != self.architecture:
            raise ValueError(f"{self.name} needs a network of architecture {self.architecture!r}, this is {kind!r}")
        from tqdm import tqdm

        counts = {name: values for name, values in zip(SIZES, (bytes, characters, words), strict=True) if values is not None}
        first_WK, parts = None, [torch.zeros(0, 7 + len(self.top_k) + 3 * self.bins, dtype=torch.float64)]
        with evaluation_mode(network), tqdm(unit=" targets", unit_scale=True, leave=False, disable=not progress) as bar:
            scorer = TargetScorer(network, device, getattr(config, "vocab_size", None))
            for rows in self._row_groups(with_sizes(documents, texts, counts), scorer.vocabulary):
                statistics_WK = self._row_statistics(scorer, rows, batch_size, bar.update)
                first_WK = statistics_WK if first_WK is None else first_WK
                parts.append(statistics_WK if unit == "window" else sum_by_document(statistics_WK, rows))
        statistics_BK = torch.cat(parts)
        return first_WK if unit is None and len(statistics_BK) == 1 else statistics_BK

    def _row_groups(self, documents: Iterable[tuple[Ids, Sequence[int]]], vocabulary: int) -> Iterator[list[Row]]:
        """Yield groups of at least `ROWS` rows, a document never split, so its rows are always summed in the same order."""
        for name, value in vars(self).items():
            if name.endswith("_id") and value is not None and not 0 <= value < vocabulary:
                raise ValueError(f"{name}={value} is outside the vocabulary of {vocabulary}")
        rows = []
        for place, (document, size) in enumerate(documents):
            if len(rows) >= ROWS:
                yield rows
                rows = []
            id_M = add_special_tokens(document, place, vocabulary, self.bos_id, self.eos_id)
            found = list(self.rows(id_M)) or [Row(0, id_M[:0], id_M[:0])]
            done_W = np.cumsum([0, *((row.label_T != IGNORE).sum() for row in found)])
            size_W3 = np.diff(np.array(size) * done_W[:, None] // max(1, done_W[-1]), axis=0)
            rows += [row._replace(document=place, size=size_W3[i], is_first=i == 0) for i, row in enumerate(found)]
        if rows:
            yield rows

    def _row_statistics(
        self, scorer: TargetScorer, rows: Sequence[Row], batch_size: int | None, advance: Callable[[int], object]
    ) -> Tensor:
        """Compute the statistics (W, K) of W rows."""
        edges = torch.arange(1, self.bins, dtype=torch.float64) / self.bins  # a bin is (low, high], as in eval/calibration.py
        found_WK = torch.zeros(len(rows), 2 + len(self.top_k) + 3 * self.bins, dtype=torch.float64)
        for batch in row_batches(rows, scorer.vocabulary, batch_size, padded=self.is_padded):
            row_N, place_N, nll_N, rank_N, confidence_N = scorer([rows[i] for i in batch])
            for n in (~nll_N.isfinite()).nonzero()[:1, 0].tolist():
                where = f"document {rows[batch[int(row_N[n])]].document}, token {int(place_N[n])}"
                raise ValueError(f"{where}: -log p = {float(nll_N[n])} is not finite")
            cell_N, one_N = row_N * self.bins + torch.bucketize(confidence_N, edges), torch.ones_like(nll_N)
            sums = [row_N.bincount(value, len(batch)) for value in (nll_N, one_N, *((rank_N < k).double() for k in self.top_k))]
            bins = [cell_N.bincount(value, len(batch) * self.bins) for value in (one_N, confidence_N, (rank_N == 0).double())]
            found_WK[batch] = torch.cat([torch.stack(sums, 1), *(value.view(-1, self.bins) for value in bins)], 1)
            advance(len(row_N))
        size_W5 = torch.tensor(np.array([(1, *row.size, row.is_first) for row in rows]))
        return torch.cat([size_W5[:, :1], found_WK[:, :2], size_W5[:, 1:], found_WK[:, 2:]], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        """Perplexity per token of each row, (..., K) to (...,); infinite beyond float64, NaN without a target."""
        return (statistics_XK[..., 1] / statistics_XK[..., 2]).exp()

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: loss (nats per token), bits_per_token, accuracy, top_k_accuracy {k: …}, the expected
        calibration_error (0 to 1); targets, documents, skipped (documents without a target); and for known bytes, characters
        and words their number, bits_per_byte … and perplexity_per_byte …. Errors: no target at all (ValueError).
        """
        sums_K = exact_sum(statistics_BK)
        _, nats, targets, *sizes, documents = sums_K[:7].tolist()
        if not targets:
            raise ValueError(f"there is no target in {int(documents)} documents")
        correct = dict(zip(self.top_k, (sums_K[7 : -3 * self.bins] / targets).tolist(), strict=True))
        _, confidence, guessed = sums_K[-3 * self.bins :].view(3, -1)
        skipped = (statistics_BK[:, 2] == 0) & (statistics_BK[:, 6] == 1)
        parts = {
            "loss": nats / targets,
            "bits_per_token": nats / math.log(2) / targets,
            "accuracy": correct[1],
            "top_k_accuracy": correct,
            "calibration_error": float((guessed - confidence).abs().sum() / targets),
        } | {"targets": int(targets), "documents": int(documents), "skipped": int(skipped.sum())}
        for name, size in zip(SIZES, sizes, strict=True):
            if size:
                per = f"per_{name.removesuffix('s')}"
                perplexity_per_unit = torch.tensor(nats / size, dtype=torch.float64).exp()
                parts |= {name: int(size), f"bits_{per}": nats / math.log(2) / size}
                parts[f"perplexity_{per}"] = float(perplexity_per_unit)
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {name.removesuffix("_id"): value for name, value in vars(self).items()}
        if settings.get("bos_at") == "document":  # the default
            del settings["bos_at"]
        del settings["dtype"]
        settings = {"per": "token"} | resampling | settings | {"top_k": ",".join(map(str, self.top_k))}
        settings |= {"dtype": self.dtype} if self.dtype else {}
        return signature_of({name: "none" if value is None else value for name, value in settings.items()})


@dataclass(frozen=True, kw_only=True)
class Perplexity(TokenScores):
    """Perplexity of a causal language model. N tokens have N - 1 targets, one more with a bos, one more with an eos.

    `stride` is half the context by default: every target except the first ones of a document sees at least context / 2 tokens,
    at twice the cost of stride = context. The bos is at the start of the document, or with `bos_at` "every-window" in place of
    the first token of every window. Validation during training also keeps targets within their document, but cuts blocks of
    `context` tokens at fixed positions of the stream (`sequential` in data's packing of blocks), not at document starts: at
    stride = context the values differ slightly.
    Errors: context below 2, stride outside 1 … context, an unknown `bos_at`, every-window without a bos_id (ValueError).
    """

    context: int
    stride: int | None = None
    bos_at: str = "document"

    name: ClassVar[str] = "perplexity"
    architecture: ClassVar[str] = "decoder"
    is_padded: ClassVar[bool] = True  # on the right, which no target attends to

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 2:
            raise ValueError(f"context={self.context} must be at least 2")
        if self.stride is None:
            object.__setattr__(self, "stride", self.context // 2)
        if not 1 <= self.stride <= self.context:
            raise ValueError(f"stride={self.stride} must be from 1 to context={self.context}")
        if self.bos_at not in BOS_AT:
            raise ValueError(f"bos_at={self.bos_at!r}: one of {', '.join(BOS_AT)}")
        if self.bos_at == "every-window" and self.bos_id is None:
            raise ValueError("bos_at='every-window' without a bos_id: which token is it?")

    def rows(self, id_M: np.ndarray) -> Iterator[Row]:
        end = 0
        for start in range(0, len(id_M) - 1, self.stride):
            if end == len(id_M) - 1:
                return
            scored, end = end, min(start + self.context, len(id_M) - 1)
            label_T = id_M[start + 1 : end + 1].copy()
            label_T[: scored - start] = IGNORE
            input_T = id_M[start:end]
            if self.bos_at == "every-window":
                input_T = np.concatenate([[self.bos_id], input_T[1:]])
            yield Row(start + 1 - (self.bos_id is not None), input_T, label_T)


@dataclass(frozen=True, kw_only=True)
class PseudoPerplexity(TokenScores):
    """Pseudo-perplexity of a masked language model: each token except bos and eos is predicted from all others.

    A document of N tokens is read N times, with one token masked each time: the cost is N². It must fit into the context.
    Source: Salazar et al. 2020, arXiv 1910.14659, section 2.
    """

    mask_id: int

    name: ClassVar[str] = "pseudo-perplexity"
    architecture: ClassVar[str] = "encoder"
    is_padded: ClassVar[bool] = False  # every token attends to all others

    def rows(self, id_M: np.ndarray) -> Iterator[Row]:
        first = int(self.bos_id is not None)
        for place in range(first, len(id_M) - (self.eos_id is not None)):
            input_T, label_T = id_M.copy(), np.full_like(id_M, IGNORE)
            input_T[place], label_T[place] = self.mask_id, id_M[place]
            yield Row(-first, input_T, label_T)


def sum_by_document(statistics_WK: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sum the statistics of each document's rows, in order."""
    index_W = torch.tensor([row.is_first for row in rows]).cumsum(0) - 1
    summed_BK = statistics_WK.new_zeros(int(index_W[-1]) + 1, statistics_WK.size(1)).index_add_(0, index_W, statistics_WK)
    summed_BK[:, 0] = 1
    return summed_BK


def perplexity_score(
    network: Callable, documents: Iterable[Ids], *, context: int, stride: int | None = None, bos_id: int | None = None,
    bos_at: str = "document", eos_id: int | None = None, top_k: Sequence[int] = (1, 5), bins: int = 15, **reading: object,
) -> Score:  # fmt: skip
    """Perplexity per token of a causal language model: exp(1/n Σ -log p(target | the preceding tokens)).

    `network` maps ids (B, T) to logits (B, T, V) or an object with `.logits`; `documents` are sequences of ids. Settings are
    those of `Perplexity`; `reading` are arguments of its `statistics`: texts or bytes, characters, words; unit, batch_size,
    device, progress. Parts: loss (nats), bits_per_token, accuracy, top_k_accuracy, calibration_error, and per byte, character
    and word bits and perplexity. Errors: those of both.
    Source: Jelinek et al. 1977.

    >>> coin = lambda input_ids: torch.zeros(*input_ids.shape, 2, dtype=torch.float64)
    >>> score = perplexity_score(coin, [[0, 1, 1]], context=2, texts=["abba"])
    >>> print(score, score.bits_per_character)
    perplexity = 2.0000 per:token|bos:none|eos:none|top_k:1,5|bins:15|context:2|stride:1 0.5
    """
    settings = {"context": context, "stride": stride, "bos_id": bos_id, "bos_at": bos_at, "eos_id": eos_id}
    metric = Perplexity(**settings, top_k=top_k, bins=bins)
    return metric.score(metric.statistics(network, documents, **reading))


def pseudo_perplexity(
    network: Callable, documents: Iterable[Ids], *, mask_id: int, bos_id: int | None = None, eos_id: int | None = None,
    top_k: Sequence[int] = (1, 5), bins: int = 15, **reading: object,
) -> Score:  # fmt: skip
    """Pseudo-perplexity per token of a masked language model: exp(1/n Σ -log p(token | all other tokens of its document)).

    Arguments, parts and errors are those of `perplexity_score`, without windows; `mask_id` replaces the predicted token.
    Source: Salazar et al. 2020, arXiv 1910.14659, section 2.
    """
    metric = PseudoPerplexity(mask_id=mask_id, bos_id=bos_id, eos_id=eos_id, top_k=top_k, bins=bins)
    return metric.score(metric.statistics(network, documents, **reading))


perplexity = perplexity_score  # the name that `eval.perplexity` has always offered
