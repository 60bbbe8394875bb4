"""ROUGE: overlap of words, n-grams or longest common subsequences between a hypothesis (a summary) and its reference.

    P = m / h      R = m / r      F = 2 P R / (P + R)

h and r are the sizes of hypothesis and reference, m is the number of matches:

- rouge1 … rouge9: sizes are numbers of n-grams; m = Σ over n-grams of min(count in the hypothesis, count in the reference)
- rougeL: sizes are numbers of words; m is the length of the longest common subsequence (LCS)
- rougeLsum: as rougeL, for texts of several lines, one sentence a line (sentences are not split here). For each reference line
  take the union of its LCS with every hypothesis line. m is the number of words in these unions; a word counts at most as often
  as it occurs in the hypothesis. For texts of one line it equals rougeL
- rougeW: m is the weighted LCS, in which k consecutive matches count f(k) = k^weight; P = f⁻¹(m / f(h)), R = f⁻¹(m / f(r))

The score of a corpus is the mean over its examples. Of several references the one with the largest F is used, the first if
several are equal. Words and values are rouge-score's; rougeW (which rouge-score lacks) is the paper's.

Shapes: B examples, R references per example, K statistics, X any leading dimensions, N tokens flattened, L lines, P pairs of
lines, M lines of a chunk, O n-gram orders. A stream of references is a list with one reference, or None, for each hypothesis;
there are R streams. Source: Lin 2004, aclanthology.org/W04-1013.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eval import scripts
from eval.lcs import lcs_lengths, lcs_reference, lcs_union, weighted_lcs
from eval.ngram import Ragged, clipped_matches, clipped_matches_each, number_tokens
from eval.notes import Notes
from eval.porter import stem
from eval.score import (
    Score,
    check_has_reference,
    check_streams,
    corpus_value,
    exact_mean,
    f_measure,
    ratio,
    reference_count,
    signature_of,
)
from eval.tokenize import TOKENIZERS, check_tokenizer, tokenize_unicode, tokenizer_name

ROUGE_SCORE_VERSION = "0.1.2"  # the release of rouge-score whose values are reproduced
WEIGHT = 1.2  # the value that ROUGE-1.5.5 recommends
MAX_WEIGHT = 20.0  # a million words to this power still fit into a float64
SENTENCE_PAIRS = 1 << 18  # pairs of lines compared at once by rougeLsum


# ---- the scores of one kind of ROUGE


@dataclass(frozen=True)
class Rouge:
    """One kind of ROUGE with its settings; the score is the mean F over examples, from 0 to 1.

    - `kind`: rouge1 … rouge9, rougeL, rougeLsum or rougeW
    - `stemmer`: replace words of more than three characters by their Porter stems
    - `tokenize`:
      "rouge-score": words are runs of a-z and 0-9, lower-cased; text in another script has no words and scores 0
      "unicode": words are runs of letters and digits of any script; identical for ASCII
      one of BLEU's tokenizers ("zh", "ja-mecab", "char" … for scripts without spaces): lower-cased, punctuation is words too
      "ids": texts are sequences of tokens or ids already, each a single line
    - `weight`: the exponent of rougeW, 1.2 by default

    Columns of the statistics of an example: number of references, m, h, r (for the chosen reference). Empty texts score 0.
    """

    kind: str = "rouge1"
    stemmer: bool = False
    tokenize: str = "rouge-score"
    weight: float | None = None

    is_mean: ClassVar[bool] = True

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
        elif self.weight is not None and (self.kind != "rougeW" or not 1 <= self.weight <= MAX_WEIGHT):
            raise ValueError(f"kind={self.kind!r} with weight={self.weight}: rougeW alone has one, from 1 to {MAX_WEIGHT:g}")

    @property
    def name(self) -> str:
        return f"ROUGE-{self.kind.removeprefix('rouge')}"

    def measures(self, statistics_XK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return P, R and F of each row of statistics. Errors: rows of another metric (ValueError)."""
        if statistics_XK.size(-1) != 4:
            raise ValueError(f"not the statistics of ROUGE: expected 4 columns, got {statistics_XK.size(-1)}")
        _, match_X, hypothesis_X, reference_X = statistics_XK.unbind(-1)
        if self.kind == "rougeW":
            # f⁻¹(m / f(h)) = f⁻¹(m) / h. A Python loop: torch's vectorized pow may round a number differently by its position.
            roots = [value ** (1 / self.weight) for value in match_X.flatten().tolist()]
            match_X = torch.tensor(roots, dtype=torch.float64, device=match_X.device).view_as(match_X)
        # Rounding may give slightly more than 1.
        precision_X, recall_X = (ratio(match_X, size_X).clamp(max=1) for size_X in (hypothesis_X, reference_X))
        return precision_X, recall_X, f_measure(precision_X, recall_X)

    def statistics(self, hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None) -> Tensor:
        return rouge_statistics([self], hypotheses, references, notes=notes)[0]

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return self.measures(statistics_XK)[2]

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        precision, recall, fmeasure = map(exact_mean, self.measures(statistics_BK))
        parts = {"precision": precision, "recall": recall, "fmeasure": fmeasure}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"nrefs": reference_count(statistics_BK)} | resampling | {"kind": self.kind}
        settings |= {"stemmer": "yes" if self.stemmer else "no", "tok": tokenizer_name(self.tokenize), "beta": 1}
        settings |= {} if self.weight is None else {"weight": self.weight}
        return signature_of(settings | {"version": ROUGE_SCORE_VERSION})


# ---- m, the number of matches of each example (B,), by kind


class Side(NamedTuple):
    """One side, tokenized: all hypotheses, or one stream of references. Tokens by line, lines per text, tokens by text."""

    lines: Ragged
    lines_B: Tensor
    texts: Ragged


def _lcs(hypothesis: Side, reference: Side) -> Tensor:
    """rougeL: length of the longest common subsequence."""
    return lcs_lengths(hypothesis.texts, reference.texts)


def _weighted_lcs(hypothesis: Side, reference: Side, weight: float) -> Tensor:
    """rougeW: weighted longest common subsequence (Lin 2004, section 4)."""
    return weighted_lcs(hypothesis.texts, reference.texts, weight)


def summary_lcs_reference(hypothesis: Sequence[Sequence], reference: Sequence[Sequence]) -> int:
    """rougeLsum's m for one pair of texts, given as lists of tokenized lines: the reference implementation.

        union(i) = ∪_j (positions in reference line i of its LCS with hypothesis line j)
        m = Σ over words w of min(count of w in all unions, count of w in the hypothesis)

    The minimum matters because two reference lines may match the same word of the hypothesis.
    Source: Lin 2004, section 3.2; the minimum is rouge-score's.

    >>> summary_lcs_reference([["a", "b"]], [["a", "c"], ["b", "a"]])  # the unions are {a} and {b}
    2
    >>> summary_lcs_reference([["a", "b"]], [["a", "c"], ["a", "b"]])  # {a} and {a, b}
    2
    """
    union = Counter()
    for line in reference:
        union.update(line[place] for place in {place for other in hypothesis for place in lcs_reference(other, line)})
    return (union & Counter(chain.from_iterable(hypothesis))).total()


def _summary_lcs(hypothesis: Side, reference: Side) -> Tensor:
    """rougeLsum: `summary_lcs_reference` of each pair of texts."""
    is_in_union_N = torch.zeros_like(reference.lines.ids_N, dtype=torch.bool)
    for hypothesis_P, reference_P in _line_pairs(hypothesis.lines_B, reference.lines_B):
        is_in_union_N |= lcs_union(hypothesis.lines, reference.lines, hypothesis_P, reference_P)
    ids_N, length_B = reference.texts
    example_N = torch.repeat_interleave(length_B.clamp(min=0))
    union = Ragged(ids_N[is_in_union_N], torch.bincount(example_N[is_in_union_N], minlength=len(length_B)))
    return clipped_matches(hypothesis.texts, [union], 1)[:, 0]


def _line_pairs(hypothesis_B: Tensor, reference_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield index pairs (hypothesis line, reference line) within each example, (P,) each, in chunks.

    `hypothesis_B` and `reference_B` are numbers of lines per text. About SENTENCE_PAIRS pairs at a time.

    >>> [torch.stack(pairs).tolist() for pairs in _line_pairs(torch.tensor([1, 2]), torch.tensor([1, 2]))]
    [[[0, 1, 2, 1, 2], [0, 1, 1, 2, 2]]]
    """
    example_L = torch.repeat_interleave(reference_B)
    partners_L = hypothesis_B[example_L]
    first_partner_L = (hypothesis_B.cumsum(0) - hypothesis_B)[example_L]
    first_pair_L = partners_L.cumsum(0) - partners_L
    _, chunk_sizes = torch.unique_consecutive(first_pair_L // SENTENCE_PAIRS, return_counts=True)
    for line_M in torch.arange(len(example_L), device=example_L.device).split(chunk_sizes.tolist()):
        reference_P = torch.repeat_interleave(line_M, partners_L[line_M])
        pair_P = first_pair_L[line_M[0]] + torch.arange(len(reference_P), device=example_L.device)
        yield first_partner_L[reference_P] + pair_P - first_pair_L[reference_P], reference_P


NGRAM_ORDERS = {f"rouge{n}": n for n in range(1, 10)}
LCS_KINDS: dict[str, Callable[..., Tensor]] = {"rougeL": _lcs, "rougeLsum": _summary_lcs, "rougeW": _weighted_lcs}
KINDS = (*NGRAM_ORDERS, *LCS_KINDS)


# ---- statistics of a batch


def rouge_statistics(
    metrics: Sequence[Rouge], hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None
) -> list[Tensor]:
    """Compute the statistics (B, 4) of several kinds at once; texts are tokenized once. References are R streams of length B.

    Errors: an example without a reference, streams of unequal length (ValueError); a text that is no string, or a string
    among ids (TypeError).
    """
    check_streams(hypotheses, references)
    check_has_reference(references)
    texts, found = [hypotheses, *references], {}
    words = {tokenize: _split_sides(texts, tokenize, notes) for tokenize in dict.fromkeys(each.tokenize for each in metrics)}
    for tokenize, stemmer in dict.fromkeys((each.tokenize, each.stemmer) for each in metrics):
        lines = [_stem_words(side) for side in words[tokenize]] if stemmer else words[tokenize]
        hypothesis, *sides = _number_sides(texts, lines)
        group = [metric for metric in metrics if (metric.tokenize, metric.stemmer) == (tokenize, stemmer)]
        max_order = max((NGRAM_ORDERS.get(metric.kind, 0) for metric in group), default=0)
        if max_order:
            ngrams_BRO = clipped_matches_each(hypothesis.texts, [side.texts for side in sides], max_order)
        length_BR = torch.stack([side.texts.lengths_B for side in sides], 1)
        for metric in group:
            order = NGRAM_ORDERS.get(metric.kind, 1)
            if metric.kind in NGRAM_ORDERS:
                match_BR = ngrams_BRO[..., order - 1]
            else:
                weight = () if metric.weight is None else (metric.weight,)
                match_BR = torch.stack([LCS_KINDS[metric.kind](hypothesis, side, *weight) for side in sides], 1)
            found[metric] = _best_reference(metric, match_BR, hypothesis.texts.lengths_B, length_BR, order)
    return [found[metric] for metric in metrics]


def _best_reference(metric: Rouge, match_BR: Tensor, length_B: Tensor, length_BR: Tensor, order: int) -> Tensor:
    """Return the statistics of the best reference: highest F, first if tied. A text of T words has T - order + 1 n-grams."""
    has_reference_BR = length_BR >= 0
    columns = [has_reference_BR.sum(1, keepdim=True).expand_as(length_BR), match_BR]
    columns += [(words_BR - (order - 1)).clamp(min=0) for words_BR in (length_B[:, None].expand_as(length_BR), length_BR)]
    row_BRK = torch.stack([column.to(match_BR.dtype) for column in columns], 2)
    best_B = metric.scores(row_BRK).where(has_reference_BR, -1.0).argmax(1)
    return row_BRK[torch.arange(len(best_B), device=best_B.device), best_B]


# ---- text to words, line by line


def split_ascii_words(lines: Sequence[str]) -> list[list[str]]:
    """Split lower-cased lines into rouge-score's words: runs of a-z and 0-9.

    >>> split_ascii_words(["naïve b2b", ""])
    [['na', 've', 'b2b'], []]
    """
    plain = "\n".join(lines).encode("ascii", "replace").translate(ASCII_WORDS).decode("ascii")
    return [line.split() for line in plain.split("\n")] if lines else []


ASCII_WORDS = bytes(byte if chr(byte) in "abcdefghijklmnopqrstuvwxyz0123456789\n" else 32 for byte in range(256))
WORD_TOKENIZERS = {"rouge-score": split_ascii_words, "unicode": tokenize_unicode} | TOKENIZERS
TOKENIZE = (*WORD_TOKENIZERS, "ids")


def _split_sides(texts: Sequence[Sequence], tokenize: str, notes: Notes | None) -> list[list]:
    """Tokenize all lines of each side; note characters that the tokenizer ignores and scripts that it cannot segment."""
    if tokenize == "ids":
        return [[_check_ids(text) for text in side] for side in texts]
    lines = [_split_lines(side, tokenize) for side in texts]
    words = [WORD_TOKENIZERS[tokenize](side) for side in lines]
    if tokenize == "rouge-score":
        scripts.note_dropped_letters(texts[0], texts[1:], notes)
    elif tokenize != "char":
        scripts.note_unsegmented(f"ROUGE ({tokenize})", scripts.USE_TOKENIZERS, lines, words, notes)
    return words


def _split_lines(texts: Sequence[str | None], tokenize: str) -> list[str]:
    present = [text for text in texts if text is not None]
    if wrong := [text for text in present if not isinstance(text, str)]:
        raise TypeError(f"tokenize={tokenize!r}, but {wrong[0]!r:.60} is not a string: use tokenize='ids'")
    return "\n".join(present).lower().split("\n") if present else []


def _check_ids(text: Sequence[Hashable] | None) -> Sequence[Hashable] | None:
    if isinstance(text, str):
        raise TypeError(f"tokenize='ids', but {text!r:.60} is a string: use tokenize='rouge-score'")
    return text.tolist() if hasattr(text, "tolist") else text


def _stem_words(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    stems = {word: stem(word) if len(word) > 3 else word for word in set(chain.from_iterable(lines))}
    return [list(map(stems.__getitem__, line)) for line in lines]


def _number_sides(texts: Sequence[Sequence], lines: Sequence[Sequence]) -> list[Side]:
    """Convert each side's texts and the words of all its lines to ids."""
    sides = []
    for side, row in zip(texts, number_tokens(*lines), strict=True):
        breaks = [text.count("\n") if isinstance(text, str) else 0 for text in side]
        lines_B = torch.tensor([0 if text is None else 1 + count for text, count in zip(side, breaks, strict=True)]).long()
        row = Ragged(row.ids_N, row.lengths_B[row.lengths_B >= 0])
        length_B = torch.zeros_like(lines_B).index_add_(0, torch.repeat_interleave(lines_B), row.lengths_B)
        sides.append(Side(row, lines_B, Ragged(row.ids_N, length_B.where(lines_B > 0, -1))))
    return sides


# ---- scores of a corpus


def rouge_scores(
    hypotheses: Sequence,
    references: Sequence,
    *,
    kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    stemmer: bool = False,
    tokenize: str = "rouge-score",
    weight: float = WEIGHT,
) -> dict[str, Score]:
    """ROUGE of a corpus: kind → Score, the mean F = 2 P R / (P + R) over examples, from 0 to 1.

    Each Score has the means `.precision`, `.recall` and `.fmeasure`. `references` is one text per hypothesis, or streams:
    `references[r][i]` is the r-th reference of hypothesis i, or None (transposed, as in sacrebleu). Token ids are always given
    in streams. `weight` is rougeW's. Words are runs of a-z and 0-9: text in other scripts has none and scores 0 unless
    `tokenize` is another one (see `Rouge`); a warning states how many letters are dropped. Errors: those of
    `rouge_statistics`; an unknown kind or tokenizer. Source: Lin 2004, aclanthology.org/W04-1013; values are rouge-score's.

    >>> print(rouge_scores(["testing one"], ["testing one two"])["rouge2"])
    ROUGE-2 = 0.6667 nrefs:1|kind:rouge2|stemmer:no|tok:rouge-score|beta:1|version:0.1.2
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if tokenize != "ids" and all(text is None or isinstance(text, str) for text in references):
        references = [references]
    metrics = [Rouge(kind, stemmer, tokenize, weight if kind == "rougeW" else None) for kind in kinds]
    statistics = rouge_statistics(metrics, hypotheses, references)
    return {metric.kind: metric.score(rows_BK) for metric, rows_BK in zip(metrics, statistics, strict=True)}


rouge = rouge_scores  # the name that `eval.rouge` has always offered
