"""Perplexity: how well a language model guesses a text, token by token, and what that is per byte, character and word.

    perplexity = exp(1/n Σ -log p(target | the tokens before it))        over the n targets of all documents

A network reads at most `context` tokens at once, in windows that advance by `stride`; a window scores the targets that none
before it has scored, so that each counts once. With context 5 and stride 3:

    document        a b c d e f g h i        i is a target only, and without a bos, a is none
    first window    a b c d e                scores b c d e f
    second                d e f g h          scores g h i, which have at least context - stride + 1 = 3 tokens before them

A bos, where there is one, stands at the document's start and is a token as others are. With a bos in every window it takes the
place of each window's first token, so that windows and their targets stay, and all but the first see one token less:

    document        <s> a b c d e f g h i
    first window    <s> a b c d              scores a b c d e
    second                <s> d e f g        scores f g h, which have <s> and context - stride = 2 tokens before them, or more
    third                       <s> g h      scores i

Perplexity per token compares models of one tokenizer; per byte, character or word it compares models of any.
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

from eval.score import Score, corpus_value, exact_sum
from eval.targets import IGNORE, SIZES, Ids, Reader, Row, batches, evaluating, framed, sized

ROWS = 1024  # read ahead and sorted by length, so that few positions of a batch are padding
BOS_AT = ("document", "every-window")


@dataclass(frozen=True, kw_only=True)
class TokenScores(ABC):
    """Scores of targets, however a document is made into them.

    Statistics of an example, float64: references (1), nats, targets, bytes, characters, words, documents; how many targets are
    the best guess, and among the best k for each further k; then of all bins of confidence the targets, Σ confidence, and how
    many are the best guess. All but nats and confidences are whole numbers.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    top_k: Sequence[int] = (1, 5)
    bins: int = 15
    dtype: str = ""  # of the network, for the signature: log-probabilities are computed in float32 at the least

    name: ClassVar[str]
    mean: ClassVar[bool] = False
    architecture: ClassVar[str]  # of the networks that it is for
    padded: ClassVar[bool]  # whether rows of several lengths may be read at once

    def __post_init__(self) -> None:
        if self.bins < 1 or min(self.top_k, default=1) < 1:
            raise ValueError(f"top_k={self.top_k} and bins={self.bins} must be at least 1")
        object.__setattr__(self, "top_k", tuple(sorted({1, *self.top_k})))

    @abstractmethod
    def rows(self, id_M: np.ndarray) -> Iterator[Row]:
        """A document, with its bos and eos, in rows."""

    def statistics(
        self, network: Callable, documents: Iterable[Ids], *, texts: Iterable[str] | None = None,
        bytes: Iterable[int] | None = None, characters: Iterable[int] | None = None, words: Iterable[int] | None = None,
        unit: str | None = None, batch_size: int | None = None, device: str | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Statistics (B, K) of documents of token ids, which are read as they come: a generator will do.

        `network(input_ids B T)` is logits B T V, or has them as `.logits`. Of `texts` the bytes (UTF-8), characters (code
        points) and words (between white space) are counted, or these counts are given. Examples are documents, or with
        `unit` "window" windows: so by default where there is one document, for a bootstrap needs something to draw. A document
        without a target (empty, or one token without bos) is zeros, its size too. Statistics of parts of a set, joined, sum to
        those of the set but for rounding in the network; with `batch_size` 1 to the last bit.

        Errors: ids that are no whole numbers (TypeError); ids outside the vocabulary, a bos or an eos that is there already,
        more documents than texts or fewer, a target whose log-probability is not finite (ValueError: document and token).
        A logit of -inf is a probability of 0, which only a target must not have.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if unit not in (None, "document", "window"):
            raise ValueError(f"unit={unit!r}: one of 'document', 'window'")
        config = getattr(network, "config", None)
        if (kind := getattr(config, "architecture", self.architecture)) != self.architecture:
            raise ValueError(f"{self.name} is of a network of architecture {self.architecture!r}, this is {kind!r}")
        from tqdm import tqdm

        counts = {name: values for name, values in zip(SIZES, (bytes, characters, words), strict=True) if values is not None}
        first_WK, parts = None, [torch.zeros(0, 7 + len(self.top_k) + 3 * self.bins, dtype=torch.float64)]
        with evaluating(network), tqdm(unit=" targets", unit_scale=True, leave=False, disable=not progress) as bar:
            read = Reader(network, device, getattr(config, "vocab_size", None))
            for rows in self._groups(sized(documents, texts, counts), read.vocabulary):
                statistics_WK = self._score(read, rows, batch_size, bar.update)
                first_WK = statistics_WK if first_WK is None else first_WK
                parts.append(statistics_WK if unit == "window" else by_document(statistics_WK, rows))
        statistics_BK = torch.cat(parts)
        return first_WK if unit is None and len(statistics_BK) == 1 else statistics_BK

    def _groups(self, documents: Iterable[tuple[Ids, Sequence[int]]], vocabulary: int) -> Iterator[list[Row]]:
        """`ROWS` rows or more at a time, all of a document together: they then add up in one order, whatever comes with it."""
        for name, value in vars(self).items():
            if name.endswith("_id") and value is not None and not 0 <= value < vocabulary:
                raise ValueError(f"{name}={value} is outside the vocabulary of {vocabulary}")
        rows = []
        for place, (document, size) in enumerate(documents):
            if len(rows) >= ROWS:
                yield rows
                rows = []
            id_M = framed(document, place, vocabulary, self.bos_id, self.eos_id)
            found = list(self.rows(id_M)) or [Row(0, id_M[:0], id_M[:0])]
            done_W = np.cumsum([0, *((row.label_T != IGNORE).sum() for row in found)])
            share_W3 = np.diff(np.array(size) * done_W[:, None] // max(1, done_W[-1]), axis=0)
            rows += [row._replace(document=place, size=share_W3[i], opens=i == 0) for i, row in enumerate(found)]
        if rows:
            yield rows

    def _score(self, read: Reader, rows: Sequence[Row], batch_size: int | None, advance: Callable[[int], object]) -> Tensor:
        """Statistics (W, K) of rows."""
        edges = torch.arange(1, self.bins, dtype=torch.float64) / self.bins  # a bin is (low, high], as in eval/calibration.py
        found_WK = torch.zeros(len(rows), 2 + len(self.top_k) + 3 * self.bins, dtype=torch.float64)
        for batch in batches(rows, read.vocabulary, batch_size, padded=self.padded):
            row_N, place_N, nll_N, rank_N, confidence_N = read([rows[i] for i in batch])
            for n in (~nll_N.isfinite()).nonzero()[:1, 0].tolist():
                where = f"document {rows[batch[int(row_N[n])]].document}, token {int(place_N[n])}"
                raise ValueError(f"{where}: -log p = {float(nll_N[n])} is not finite")
            cell_N, one_N = row_N * self.bins + torch.bucketize(confidence_N, edges), torch.ones_like(nll_N)
            sums = [row_N.bincount(value, len(batch)) for value in (nll_N, one_N, *((rank_N < k).double() for k in self.top_k))]
            bins = [cell_N.bincount(value, len(batch) * self.bins) for value in (one_N, confidence_N, (rank_N == 0).double())]
            found_WK[batch] = torch.cat([torch.stack(sums, 1), *(value.view(-1, self.bins) for value in bins)], 1)
            advance(len(row_N))
        counted_W5 = torch.tensor(np.array([(1, *row.size, row.opens) for row in rows]))
        return torch.cat([counted_W5[:, :1], found_WK[:, :2], counted_W5[:, 1:], found_WK[:, 2:]], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        """Perplexity per token; infinite past float64, NaN where there is no target."""
        return (statistics_XK[..., 1] / statistics_XK[..., 2]).exp()

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        """Parts: loss (nats per token), bits_per_token, accuracy, top_k_accuracy {k: …}, the expected calibration_error (to 1);
        targets, documents, skipped (documents without a target); and where bytes, characters or words are known, their number,
        bits_per_byte … and perplexity_per_byte … Errors: no target at all (ValueError).
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
                whole = torch.tensor(nats / size, dtype=torch.float64).exp()
                parts |= {name: int(size), f"bits_{per}": nats / math.log(2) / size, f"perplexity_{per}": float(whole)}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        settings = {name.removesuffix("_id"): value for name, value in vars(self).items()}
        if settings.get("bos_at") == "document":  # where a bos stands unless it is told otherwise
            del settings["bos_at"]
        del settings["dtype"]
        said = {"per": "token"} | resampled | settings | {"top_k": ",".join(map(str, self.top_k))}
        said |= {"dtype": self.dtype} if self.dtype else {}
        return "|".join(f"{name}:{'none' if value is None else value}" for name, value in said.items())


@dataclass(frozen=True, kw_only=True)
class Perplexity(TokenScores):
    """Of a causal language model. N tokens have N - 1 targets, one more with a bos (the first token), and one more with an eos.

    By default `stride` is half the context: no target but a document's first ones sees less than that, at twice the cost of
    stride = context. A bos stands at the document's start, or with `bos_at` "every-window" at every window's, in place of the
    token there. In training's validation, too, a target sees its own document alone, but blocks of `context` tokens are cut at
    fixed places of the whole stream (data.packing.blocks.sequential), in the midst of documents, where windows begin with a
    document: at stride = context the values differ a little.
    """

    context: int
    stride: int | None = None
    bos_at: str = "document"

    name: ClassVar[str] = "perplexity"
    architecture: ClassVar[str] = "decoder"
    padded: ClassVar[bool] = True  # on the right, where no target looks

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
    """Of a masked language model: every token but bos and eos is a target, guessed from all others of its document.

    A document of N tokens is read N times, each time with another one masked: the cost is N². It must fit into the network.
    Source: Salazar et al. 2020, arXiv 1910.14659, section 2.
    """

    mask_id: int

    name: ClassVar[str] = "pseudo-perplexity"
    architecture: ClassVar[str] = "encoder"
    padded: ClassVar[bool] = False  # every token looks at all others

    def rows(self, id_M: np.ndarray) -> Iterator[Row]:
        first = int(self.bos_id is not None)
        for place in range(first, len(id_M) - (self.eos_id is not None)):
            input_T, label_T = id_M.copy(), np.full_like(id_M, IGNORE)
            input_T[place], label_T[place] = self.mask_id, id_M[place]
            yield Row(-first, input_T, label_T)


def by_document(statistics_WK: Tensor, rows: Sequence[Row]) -> Tensor:
    """Each document's rows, summed in order."""
    index_W = torch.tensor([row.opens for row in rows]).cumsum(0) - 1
    summed_BK = statistics_WK.new_zeros(int(index_W[-1]) + 1, statistics_WK.size(1)).index_add_(0, index_W, statistics_WK)
    summed_BK[:, 0] = 1
    return summed_BK


def perplexity_score(
    network: Callable, documents: Iterable[Ids], *, context: int, stride: int | None = None, bos_id: int | None = None,
    bos_at: str = "document", eos_id: int | None = None, top_k: Sequence[int] = (1, 5), bins: int = 15, **reading: object,
) -> Score:  # fmt: skip
    """Perplexity per token of documents: settings as in `Perplexity`; `reading`, errors as in its `statistics`.

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
    """Pseudo-perplexity per token of documents: settings as in `PseudoPerplexity`; `reading`, errors as in its `statistics`."""
    metric = PseudoPerplexity(mask_id=mask_id, bos_id=bos_id, eos_id=eos_id, top_k=top_k, bins=bins)
    return metric.score(metric.statistics(network, documents, **reading))


perplexity = perplexity_score  # the name that `eval.perplexity` has always offered
