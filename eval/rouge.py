"""ROUGE: how many of a reference's words, n-grams or longest common subsequences a text has.

    P = m / n      R = m / r      F = 2 P R / (P + R)        n, r: the size of the hypothesis and of the reference

- rouge1 … rouge9: m counts common n-grams, of which n and r are the numbers; an n-gram counts as often as both have it
- rougeL: m is the length of the longest common subsequence, n and r are words
- rougeLsum: each line of the reference has longest common subsequences with all lines of the hypothesis; m counts the words in
  the union of them, a word as often as both texts have it. It is rougeL where both texts are one line: put a line break after
  each sentence first, this does not look for sentences
- rougeW: m is the weighted longest common subsequence, in which k words in a row count f(k) = k^weight;
  P = f⁻¹(m / f(n)) and R = f⁻¹(m / f(r))

A corpus has the mean of its examples; an example with several references the one that its F is greatest with. Words, values and
choices are rouge-score's, but for rougeW, which it has not and which is the paper's, and for other tokenizers.
Source: Lin 2004, aclanthology.org/W04-1013.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval import scripts
from eval.bootstrap import CELLS
from eval.lcs import lcs_lengths, lcs_reference, lcs_union, weighted_lcs
from eval.ngram import Ragged, matches, matches_each, numbered
from eval.notes import Notes
from eval.score import Score, check_each_has_one, check_streams, corpus_value, exact_mean, f_measure, ratio
from eval.tokenize import TOKENIZERS, check_tokenizer, tokenize_unicode, tokenizer_name

ROUGE_SCORE = "0.1.2"  # the version of rouge-score whose values these are
GRAMS = {f"rouge{n}": n for n in range(1, 10)}
KINDS = (*GRAMS, "rougeL", "rougeLsum", "rougeW")
TOKENIZE = ("rouge-score", "unicode", *TOKENIZERS, "ids")
WEIGHT = 1.2  # ROUGE-1.5.5's
HEAVIEST = 20.0  # a million words to this power are still a float64
SENTENCE_PAIRS = 1 << 18  # of one step of rougeLsum
WORDS = bytes(byte if chr(byte) in "abcdefghijklmnopqrstuvwxyz0123456789\n" else 32 for byte in range(256))


@dataclass(frozen=True)
class Rouge:
    """Settings of one kind of ROUGE; its score is the mean F of the examples, from 0 to 1.

    - `tokenize`: "rouge-score", words are runs of a-z and 0-9 in lower case, and nothing else is: a text in Chinese or Arabic
      has no word and scores 0, as in rouge-score; "unicode", words are runs of letters and digits of any script, for ASCII the
      same; one of BLEU's tokenizers, whose punctuation counts as words, of text in lower case: "zh", "ja-mecab" or "char" for
      scripts without spaces; or "ids", for texts that are sequences of tokens or ids already, each of one line
    - `stemmer`: words of more than three characters become their Porter stems
    - `weight`: rougeW's exponent, 1.2 unless told

    Statistics of an example: references, m, n, r with the chosen one. An empty text has P, R and F of 0.
    """

    kind: str = "rouge1"
    stemmer: bool = False
    tokenize: str = "rouge-score"
    weight: float | None = None

    mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: one of {', '.join(KINDS)}")
        if self.tokenize not in TOKENIZE:
            raise ValueError(f"tokenize={self.tokenize!r}: one of {', '.join(TOKENIZE)}")
        if self.tokenize in TOKENIZERS:
            check_tokenizer(self.tokenize)
        if self.stemmer and self.tokenize == "ids":
            raise ValueError("stemmer=True with tokenize='ids': ids are taken as they are")
        if self.kind == "rougeW" and self.weight is None:
            object.__setattr__(self, "weight", WEIGHT)
        elif self.weight is not None and (self.kind != "rougeW" or not 1 <= self.weight <= HEAVIEST):
            raise ValueError(f"kind={self.kind!r} with weight={self.weight}: rougeW alone has one, from 1 to {HEAVIEST:g}")

    @property
    def name(self) -> str:
        return f"ROUGE-{self.kind.removeprefix('rouge')}"

    def statistics(self, hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None) -> Tensor:
        return rouge_statistics([self], hypotheses, references, notes=notes)[0]

    def measures(self, statistics_XK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Precision, recall and F of each row. Errors: rows of another metric (ValueError)."""
        if statistics_XK.size(-1) != 4:
            raise ValueError(f"these are no statistics of ROUGE: 4 columns wanted, got {statistics_XK.size(-1)}")
        _, match_X, hypothesis_X, reference_X = statistics_XK.unbind(-1)
        if self.kind == "rougeW":
            # One by one: torch's powers depend on a value's place in the tensor, in the last bit.
            root = [value ** (1 / self.weight) for value in match_X.flatten().tolist()]
            match_X = torch.tensor(root, dtype=torch.float64, device=match_X.device).view_as(match_X)
        # A root may be an ulp too large.
        precision_X, recall_X = (ratio(match_X, size_X).clamp(max=1) for size_X in (hypothesis_X, reference_X))
        return precision_X, recall_X, f_measure(precision_X, recall_X)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return self.measures(statistics_XK)[2]

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        precision, recall, fmeasure = map(exact_mean, self.measures(statistics_BK))
        parts = {"precision": precision, "recall": recall, "fmeasure": fmeasure}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        counts = statistics_BK[:, 0].long().unique().tolist()
        said = {"nrefs": counts[0] if len(counts) == 1 else "var"} | resampled | {"kind": self.kind}
        said |= {"stemmer": "yes" if self.stemmer else "no", "tok": tokenizer_name(self.tokenize), "beta": 1}
        said |= ({} if self.weight is None else {"weight": self.weight}) | {"version": ROUGE_SCORE}
        return "|".join(f"{name}:{value}" for name, value in said.items())


class Side(NamedTuple):
    """Texts of one side: all their tokens line by line, and text by text; L lines, of which each text has some."""

    lines: Ragged
    lines_B: Tensor
    texts: Ragged


def rouge_statistics(
    metrics: Sequence[Rouge], hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None
) -> list[Tensor]:
    """The statistics of several kinds, for which texts are cut into words and numbered once. References are streams.

    Errors: no reference of an example, streams of other lengths (ValueError); what is no text, or a text among ids (TypeError).
    """
    check_streams(hypotheses, references)
    check_each_has_one(references)
    texts, found = [hypotheses, *references], {}
    cut = {tokenize: _cut(texts, tokenize, notes) for tokenize in dict.fromkeys(metric.tokenize for metric in metrics)}
    for tokenize, stemmer in {(metric.tokenize, metric.stemmer): None for metric in metrics}:
        alike = [metric for metric in metrics if (metric.tokenize, metric.stemmer) == (tokenize, stemmer)]
        hypothesis, *sides = _sides(texts, [_stems(side) for side in cut[tokenize]] if stemmer else cut[tokenize])
        order = max((GRAMS.get(metric.kind, 0) for metric in alike), default=0)
        grams_BRO = matches_each(hypothesis.texts, [side.texts for side in sides], order) if order else None
        for metric in alike:
            if n := GRAMS.get(metric.kind, 0):
                common_BR = grams_BRO[..., n - 1]
            else:
                weight = () if metric.weight is None else (metric.weight,)
                common_BR = torch.stack([COMMON[metric.kind](hypothesis, side, *weight) for side in sides], 1)
            length_BR = torch.stack([side.texts.lengths_B for side in sides], 1)
            found[metric] = _best(metric, common_BR, hypothesis.texts.lengths_B, length_BR, max(1, n))
    return [found[metric] for metric in metrics]


def _best(metric: Rouge, common_BR: Tensor, length_B: Tensor, length_BR: Tensor, n: int) -> Tensor:
    """Statistics with the reference that F is greatest with, the first of equals; T words have T - (n - 1) n-grams."""
    there_BR = length_BR >= 0
    columns = [there_BR.sum(1, keepdim=True).expand_as(length_BR), common_BR]
    columns += [(side_BR - (n - 1)).clamp(min=0) for side_BR in (length_B[:, None].expand_as(length_BR), length_BR)]
    row_BRK = torch.stack([column.to(common_BR.dtype) for column in columns], 2)
    best_B = metric.scores(row_BRK).where(there_BR, -1.0).argmax(1)
    return row_BRK[torch.arange(len(best_B), device=best_B.device), best_B]


def _longest(hypothesis: Side, reference: Side) -> Tensor:
    return lcs_lengths(hypothesis.texts, reference.texts)


def _weighted(hypothesis: Side, reference: Side, weight: float) -> Tensor:
    return weighted_lcs(hypothesis.texts, reference.texts, weight)


def summary_reference(hypothesis: Sequence[Sequence], reference: Sequence[Sequence]) -> int:
    """rougeLsum's m of one pair, whose texts are lists of lines; i and j are lines of reference and hypothesis.

        union(i) = ∪_j (places in i of the longest common subsequence of i and j)
        m = Σ over words w of min(how often the unions have w, how often the hypothesis has w)

    The minimum: two lines of the reference may both take one word of the hypothesis.
    Source: Lin 2004, section 3.2; the minimum is rouge-score's.

    >>> summary_reference([["a", "b"]], [["a", "c"], ["b", "a"]])  # the unions are {a} and {b}
    2
    >>> summary_reference([["a", "b"]], [["a", "c"], ["a", "b"]])  # {a} and {a, b}
    2
    """
    union = Counter()
    for line in reference:
        union.update(line[place] for place in {place for other in hypothesis for place in lcs_reference(other, line)})
    return (union & Counter(chain.from_iterable(hypothesis))).total()


def _summary(hypothesis: Side, reference: Side) -> Tensor:
    """`summary_reference` of each pair, (B,)."""
    union_N = torch.zeros_like(reference.lines.ids_N, dtype=torch.bool)
    for hypothesis_P, reference_P in _line_pairs(hypothesis.lines_B, reference.lines_B):
        union_N |= lcs_union(hypothesis.lines, reference.lines, hypothesis_P, reference_P)
    ids_N, length_B = reference.texts
    example_N = torch.repeat_interleave(length_B.clamp(min=0))
    union = Ragged(ids_N[union_N], torch.bincount(example_N[union_N], minlength=len(length_B)))
    return matches(hypothesis.texts, [union], 1)[:, 0]


def _line_pairs(hypothesis_B: Tensor, reference_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each line of an example's reference with each of its hypothesis, both as places among all L lines of their side, from
    numbers of lines; some P pairs at a time, since a corpus has many.

    >>> [torch.stack(pairs).tolist() for pairs in _line_pairs(torch.tensor([1, 2]), torch.tensor([1, 2]))]
    [[[0, 1, 2, 1, 2], [0, 1, 1, 2, 2]]]
    """
    example_L = torch.repeat_interleave(reference_B)
    partners_L, partner_L = hypothesis_B[example_L], (hypothesis_B.cumsum(0) - hypothesis_B)[example_L]  # the first of them
    pair_L = partners_L.cumsum(0) - partners_L  # the number of a line's first pair
    _, together = torch.unique_consecutive(pair_L // SENTENCE_PAIRS, return_counts=True)
    for line_M in torch.arange(len(example_L), device=example_L.device).split(together.tolist()):
        reference_P = torch.repeat_interleave(line_M, partners_L[line_M])
        pair_P = pair_L[line_M[0]] + torch.arange(len(reference_P), device=example_L.device)
        yield partner_L[reference_P] + pair_P - pair_L[reference_P], reference_P


COMMON: dict[str, Callable[..., Tensor]] = {"rougeL": _longest, "rougeLsum": _summary, "rougeW": _weighted}


def _sides(texts: Sequence[Sequence], lines: Sequence[Sequence]) -> list[Side]:
    """From the texts of each side, and the words of all their lines."""
    sides = []
    for side, row in zip(texts, numbered(*lines), strict=True):
        breaks = [text.count("\n") if isinstance(text, str) else 0 for text in side]
        counts = [0 if text is None else 1 + count for text, count in zip(side, breaks, strict=True)]
        lines_B = torch.tensor(counts, dtype=torch.int64)
        row = Ragged(row.ids_N, row.lengths_B[row.lengths_B >= 0])
        length_B = torch.zeros_like(lines_B).index_add_(0, torch.repeat_interleave(lines_B), row.lengths_B)
        sides.append(Side(row, lines_B, Ragged(row.ids_N, length_B.where(lines_B > 0, -1))))
    return sides


def _ids(text: Sequence[Hashable] | None) -> Sequence[Hashable] | None:
    if isinstance(text, str):
        raise TypeError(f"tokenize='ids', but {text!r:.60} is text: for that, tokenize is 'rouge-score'")
    return text.tolist() if hasattr(text, "tolist") else text


def _cut(texts: Sequence[Sequence], tokenize: str, notes: Notes | None) -> list[list]:
    """The words of each line of all texts, side by side of them; says what these words do not hold of the texts."""
    if tokenize == "ids":
        return [[_ids(text) for text in side] for side in texts]
    lines = [_lines(side, tokenize) for side in texts]
    words = [_words(side, tokenize) for side in lines]
    if tokenize == "rouge-score":
        scripts.notice_dropped(texts[0], texts[1:], notes)
    elif tokenize != "char":
        scripts.notice_uncut(f"ROUGE ({tokenize})", scripts.TOKENIZERS, lines, words, notes)
    return words


def _lines(texts: Sequence[str | None], tokenize: str) -> list[str]:
    there = [text for text in texts if text is not None]
    if wrong := [text for text in there if not isinstance(text, str)]:
        raise TypeError(f"tokenize={tokenize!r}, but {wrong[0]!r:.60} is no text: for that, tokenize is 'ids'")
    return "\n".join(there).lower().split("\n") if there else []


def _words(lines: Sequence[str], tokenize: str) -> list[list[str]]:
    if tokenize == "rouge-score":
        plain = "\n".join(lines).encode("ascii", "replace").translate(WORDS).decode("ascii")
        return [line.split() for line in plain.split("\n")] if lines else []
    return tokenize_unicode(lines) if tokenize == "unicode" else TOKENIZERS[tokenize](lines)


def _stems(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    from eval.porter import stem

    stems = {word: stem(word) if len(word) > 3 else word for word in set(chain.from_iterable(lines))}
    return [list(map(stems.__getitem__, line)) for line in lines]


def rouge_scores(
    hypotheses: Sequence,
    references: Sequence,
    *,
    kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    stemmer: bool = False,
    tokenize: str = "rouge-score",
    weight: float = WEIGHT,
) -> dict[str, Score]:
    """Each kind of ROUGE for a corpus, from 0 to 1, with the mean precision, recall and fmeasure of its examples as parts.

    `references` is one text for each hypothesis, or streams: `references[r][i]` is a reference of hypothesis i, or None. Of ids
    they are always streams. `weight` is rougeW's. Words are runs of a-z and 0-9: texts in other scripts, which have none, score
    0 unless `tokenize` is another one; a warning says how many letters are dropped.

    >>> print(rouge_scores(["testing one"], ["testing one two"])["rouge2"])
    ROUGE-2 = 0.6667 nrefs:1|kind:rouge2|stemmer:no|tok:rouge-score|beta:1|version:0.1.2
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if tokenize != "ids" and all(text is None or isinstance(text, str) for text in references):
        references = [references]
    metrics = [Rouge(kind, stemmer, tokenize, weight if kind == "rougeW" else None) for kind in kinds]
    statistics = rouge_statistics(metrics, hypotheses, references)
    return {metric.kind: metric.score(rows_BK) for metric, rows_BK in zip(metrics, statistics, strict=True)}


def aggregate(
    metric: Rouge,
    statistics_BK: Tensor,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int | np.random.RandomState | None = 12345,
) -> dict[str, tuple[float, float, float]]:
    """Mean precision, recall and F of examples drawn anew: "low" and "high" bound the middle `confidence`, "mid" is the median.

    The draws are those of rouge-score's BootstrapAggregator under `np.random.seed(seed)`; a RandomState draws on from where it
    is, as that aggregator does from kind to kind. With seed None they differ each time. Memory does not grow with the samples.
    Errors: no example, no sample, `confidence` not from 0 to 1 (ValueError).

    >>> metric = Rouge("rouge1")
    >>> rows_BK = metric.statistics(["one two", "seven eight"], [["one two three", "one two five six"]])
    >>> aggregate(metric, rows_BK)["mid"]
    (0.5, 0.3333333333333333, 0.4)
    """
    if samples < 1 or not 0 <= confidence <= 1:
        raise ValueError(f"samples={samples}, confidence={confidence}: one sample at least, and from 0 to 1")
    if not len(statistics_BK):
        raise ValueError("no example to draw")
    random = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    measure_B3 = torch.stack(metric.measures(statistics_BK), 1).cpu().numpy()
    examples, means = len(measure_B3), []
    rows = max(1, CELLS // examples)
    for first in range(0, samples, rows):
        index_XB = random.randint(0, examples, size=(min(rows, samples - first), examples))
        means.append(measure_B3[index_XB].mean(1))
    outside = (1 - confidence) / 2
    bounds = np.percentile(np.concatenate(means), [100 * outside, 50, 100 * (1 - outside)], axis=0)
    return dict(zip(("low", "mid", "high"), map(tuple, bounds.tolist()), strict=True))


rouge = rouge_scores  # the name that `eval.rouge` has always offered
