"""METEOR: how well the words of two texts can be aligned, by themselves, their stems and their synonyms, and how scattered.

    score = (1 - γ (chunks / matches)^β) P R / (α P + (1 - α) R)     P = matches / words of the hypothesis, R = of the reference

Stages come one after the other, each for the words that those before it left: equal words, equal Porter stems, synonyms.
A word is matched once at most. A chunk is a run of matched words that stand side by side in both texts, in the same order.
Source: Banerjee & Lavie 2005; with α, β, γ Lavie & Agarwal 2007. Values are NLTK's, and with "nltk" its alignment, which is not
the paper's with the fewest crossings: from the end, each word takes the last equal one that is free. What is left for the third
stage is stems there, and these are looked up in WordNet, not the words.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from eval import porter, scripts
from eval.chunks import fewest_chunks
from eval.ngram import Ragged, numbered
from eval.notes import Notes, notice
from eval.score import Score, check_each_has_one, check_streams, corpus_value, ratio
from eval.tokenize import TOKENIZERS, check_tokenizer, tokenizer_name, tokens

NLTK = "3.10.4"  # whose values these are
ALIGNMENTS = ("nltk", "fewest-chunks")
MEANS = {"mean": True, "sum": False}


class Synonyms(Protocol):
    """`eval.wordnet.WordNet`, or any other source."""

    def synonyms(self, word: str) -> Iterable[str]: ...


class Side(NamedTuple):
    """The words of B texts in a row: their ids, those of their stems, whose they are; and the lengths."""

    words_N: Tensor
    stems_N: Tensor
    pair_N: Tensor
    lengths_B: Tensor


@dataclass(frozen=True)
class Meteor:
    """Settings of METEOR; `stem` and `wordnet` say which stages follow that of equal words.

    - alignment "nltk"; or "fewest-chunks", with the most matches, see `eval.chunks` for when that is proven
    - corpus "mean": the mean of the examples' scores; "sum": the score of their summed statistics, as in the paper
    - tokenize: of texts; sequences of words are taken as they are. All are lower-cased, word by word

    Of several references the one with the best score counts, the first of equals. Without a match, and so of empty texts, the
    score is 0. Statistics of an example: references, matches, chunks, length, reference length.
    """

    stem: bool = True
    wordnet: Synonyms | None = None
    alpha: float = 0.9
    beta: float = 3.0
    gamma: float = 0.5
    alignment: str = "nltk"
    corpus: str = "mean"
    tokenize: str = "none"

    name: ClassVar[str] = "METEOR"

    def __post_init__(self) -> None:
        for setting, known in (("alignment", ALIGNMENTS), ("corpus", MEANS), ("tokenize", TOKENIZERS)):
            if getattr(self, setting) not in known:
                raise ValueError(f"{setting}={getattr(self, setting)!r}: one of {', '.join(known)}")
        check_tokenizer(self.tokenize)
        for setting, most in (("alpha", 1), ("gamma", 1), ("beta", math.inf)):
            value = getattr(self, setting)
            if not (0 <= value <= most and math.isfinite(value)):
                raise ValueError(f"{setting}={value}: a number from 0{'' if most == math.inf else ' to 1'}")
        if self.wordnet is not None and not hasattr(self.wordnet, "synonyms"):
            raise TypeError(f"wordnet={self.wordnet!r:.60} has no method synonyms: eval.wordnet.WordNet(folder) has")

    @property
    def mean(self) -> bool:
        return MEANS[self.corpus]

    def statistics(self, hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None) -> Tensor:
        check_streams(hypotheses, references)
        check_each_has_one(references)
        texts = [self._words(side) for side in (hypotheses, *references)]
        if None in texts[0]:
            raise TypeError(f"hypothesis {texts[0].index(None)} is None")
        if self.tokenize != "char":
            whole = [[text if isinstance(text, str) else None for text in side] for side in (hypotheses, *references)]
            scripts.notice_uncut(f"METEOR ({self.tokenize})", scripts.TOKENIZERS, whole, texts, notes)
        words = list(dict.fromkeys(word for side in texts for text in side if text is not None for word in text))
        stems = [porter.stem(word) for word in words] if self.stem else words
        forms = list(dict.fromkeys(stems))
        stem_of = numbered([forms], [stems])[1].ids_N
        _, *found = numbered([words], *texts)
        there_BR = torch.stack([side.lengths_B >= 0 for side in found[1:]], 1)
        hypothesis, *others = (_side(side, stem_of) for side in found)
        best_BK, best_B = None, torch.full((len(hypotheses),), -1.0, dtype=torch.float64)
        for reference, there_B in zip(others, there_BR.unbind(1), strict=True):
            aligned = self._aligned(hypothesis, reference, forms, notes)
            row_BK = torch.stack([there_BR.sum(1), *aligned, hypothesis.lengths_B, reference.lengths_B], 1)
            score_B = self.scores(row_BK).where(there_B, -1.0)
            best_BK = row_BK if best_BK is None else torch.where((score_B > best_B)[:, None], row_BK, best_BK)
            best_B = torch.maximum(best_B, score_B)
        return best_BK

    def _words(self, texts: Sequence) -> list[list[str] | None]:
        """Lower case is each word's own, as in NLTK: a capital sigma becomes another letter at the end of a word."""
        split = tokens([text if isinstance(text, str) else None for text in texts], self.tokenize)
        rows = [text if words is None else words for text, words in zip(texts, split, strict=True)]
        try:
            return [None if row is None else [*map(str.lower, row)] for row in rows]
        except TypeError as error:
            raise TypeError(f"METEOR takes texts, or sequences of words: {error}") from None

    def _aligned(self, hypothesis: Side, reference: Side, forms: Sequence[str], notes: Notes | None) -> tuple[Tensor, Tensor]:
        """(matches, chunks) of each pair; `forms` spells the ids of stems."""
        partner_T, taken_S = torch.full_like(hypothesis.words_N, -1), torch.zeros_like(reference.words_N, dtype=torch.bool)
        free_T, free_S = torch.arange(len(partner_T)), torch.arange(len(taken_S))
        for ids_T, ids_S in ((hypothesis.words_N, reference.words_N), (hypothesis.stems_N, reference.stems_N)):
            at_T, at_S = _equal(ids_T[free_T], hypothesis.pair_N[free_T], ids_S[free_S], reference.pair_N[free_S])
            partner_T[free_T[at_T]], taken_S[free_S[at_S]] = free_S[at_S], True
            free_T, free_S = torch.nonzero(partner_T < 0).squeeze(1), torch.nonzero(~taken_S).squeeze(1)
        links = {} if self.wordnet is None else self._links(hypothesis.stems_N[free_T], reference.stems_N[free_S], forms)
        if links:
            ids_T, ids_S = hypothesis.stems_N[free_T], reference.stems_N[free_S]
            at_T, at_S = _linked(ids_T, hypothesis.pair_N[free_T], ids_S, reference.pair_N[free_S], links)
            partner_T[free_T[at_T]] = free_S[at_S]
        known = _matches_and_chunks(partner_T, hypothesis.pair_N, len(hypothesis.lengths_B))
        return known if self.alignment == "nltk" else _fewest(hypothesis, reference, *known, links, notes)

    def _links(self, stems_T: Tensor, stems_S: Tensor, forms: Sequence[str]) -> dict[int, set[int]]:
        """Of stems of hypotheses, ascending, their synonyms among those of references."""
        there = {forms[stem]: stem for stem in stems_S.unique().tolist()}
        found = (
            (stem, {there[form] for form in self.wordnet.synonyms(forms[stem]) if form in there} - {stem})
            for stem in stems_T.unique().tolist()
        )
        return {stem: near for stem, near in found if near}

    def scores(self, statistics_XK: Tensor) -> Tensor:
        _, _, f_mean_X, penalty_X = self._parts(statistics_XK)
        return (1 - penalty_X) * f_mean_X

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def _parts(self, statistics_XK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Precision, recall, their mean, penalty."""
        _, matches_X, chunks_X, length_X, reference_X = statistics_XK.double().unbind(-1)
        precision_X, recall_X = ratio(matches_X, length_X), ratio(matches_X, reference_X)
        f_mean_X = ratio(precision_X * recall_X, self.alpha * precision_X + (1 - self.alpha) * recall_X)
        return precision_X, recall_X, f_mean_X, self.gamma * ratio(chunks_X, matches_X) ** self.beta

    def score(self, statistics_BK: Tensor) -> Score:
        """Parts are those of the summed statistics, whatever `corpus` makes the value of."""
        sums_K = statistics_BK.sum(0)
        parts = dict(zip(("precision", "recall", "f_mean", "penalty"), map(float, self._parts(sums_K)), strict=True))
        parts |= dict(zip(("matches", "chunks", "length", "reference_length"), sums_K[1:].tolist(), strict=True))
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        counts = statistics_BK[:, 0].unique().tolist()
        stages = ["exact", *["stem"] * self.stem, *["synonyms"] * (self.wordnet is not None)]
        said = {"nrefs": counts[0] if len(counts) == 1 else "var"} | resampled | {"stages": "+".join(stages)}
        if self.wordnet is not None:
            said["wordnet"] = getattr(self.wordnet, "version", type(self.wordnet).__name__)
        said |= {"alpha": f"{self.alpha:g}", "beta": f"{self.beta:g}", "gamma": f"{self.gamma:g}"}
        said["align"] = f"nltk-{NLTK}" if self.alignment == "nltk" else self.alignment
        said |= {"corpus": self.corpus, "case": "lc", "tok": tokenizer_name(self.tokenize)}
        return "|".join(f"{name}:{value}" for name, value in said.items())


def meteor_score(hypotheses: Sequence, references: Sequence, **settings: object) -> Score:
    """METEOR of a corpus, from 0 to 1; settings: `Meteor`'s.

    `references` are one for each hypothesis, or streams of such, [[first of example 0, …], [second of example 0, …]], in which
    None is none. They are texts where hypotheses are, else sequences of words.

    >>> print(meteor_score(["on the mat sat the cat"], ["The cat sat on the mat"]))
    METEOR = 0.5000 nrefs:1|stages:exact+stem|alpha:0.9|beta:3|gamma:0.5|align:nltk-3.10.4|corpus:mean|case:lc|tok:none
    """
    metric = Meteor(**settings)
    single = isinstance(references, Sequence) and _one_each(hypotheses, references)
    return metric.score(metric.statistics(hypotheses, [references] if single else references))


def _one_each(hypotheses: Sequence, references: Sequence) -> bool:
    """Whether these are texts as the hypotheses are, not streams of them."""
    if isinstance(references, str) or not len(references) or not len(hypotheses):
        return not len(references)
    if any(isinstance(text, str) for text in hypotheses):
        return any(isinstance(text, str) for text in references)
    return all(text is None or not len(text) or isinstance(text[0], str) for text in references)


def _side(text: Ragged, stem_of: Tensor) -> Side:
    length_B = text.lengths_B.clamp(min=0)
    return Side(text.ids_N, stem_of[text.ids_N], torch.repeat_interleave(length_B), length_B)


def _equal(ids_T: Tensor, pair_T: Tensor, ids_S: Tensor, pair_S: Tensor) -> tuple[Tensor, Tensor]:
    """Places of equal words of a pair: the last of each side, the last but one, and so on.

    >>> none = torch.zeros(4, dtype=torch.int64)
    >>> [places.tolist() for places in _equal(torch.tensor([7, 8, 7, 7]), none, torch.tensor([7, 9, 7]), none[:3])]
    [[2, 3], [0, 2]]
    """
    (group_T, group_S), groups = _grouped(ids_T, pair_T, ids_S, pair_S)
    order_T, end_T, _ = _sorted(group_T, groups)
    order_S, end_S, count_S = _sorted(group_S, groups)
    from_end_T = torch.empty_like(group_T)
    from_end_T[order_T] = end_T[group_T[order_T]] - 1 - torch.arange(len(group_T))
    (at_T,) = torch.nonzero(from_end_T < count_S[group_T], as_tuple=True)
    return at_T, order_S[end_S[group_T[at_T]] - 1 - from_end_T[at_T]]


def _grouped(ids_T: Tensor, pair_T: Tensor, ids_S: Tensor, pair_S: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
    """Equal words of a pair get one number."""
    ids_N, pair_N = torch.cat([ids_T, ids_S]), torch.cat([pair_T, pair_S])
    width = int(ids_N.amax()) + 1 if len(ids_N) else 1
    kinds, group_N = torch.unique(pair_N * width + ids_N, return_inverse=True)
    return group_N.split([len(ids_T), len(ids_S)]), len(kinds)


def _sorted(group_N: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places group by group, where each group ends among them, and its size."""
    count_U = torch.bincount(group_N, minlength=groups)
    return torch.argsort(group_N, stable=True), count_U.cumsum(0), count_U


def _linked(
    ids_T: Tensor, pair_T: Tensor, ids_S: Tensor, pair_S: Tensor, links: Mapping[int, Set[int]]
) -> tuple[Tensor, Tensor]:
    """Places of words matched from the end of each hypothesis: each takes the last free word that it is linked to.

    All pairs at once, one word of each at a time. E are the links of a word to all places of one word.
    """
    word_E, near_E = _links_of(ids_T, links)
    (group_E, group_S), groups = _grouped(near_E, pair_T[word_E], ids_S, pair_S)
    order_S, end_U, left_U = _sorted(group_S, groups)
    there_E = left_U[group_E] > 0
    word_E, group_E, start_U = word_E[there_E], group_E[there_E], end_U - left_U
    partner_T, last_T = torch.full_like(ids_T, -1), torch.empty_like(ids_T)
    for words, found in _turns(word_E, group_E, pair_T):
        places = torch.where(left_U[found] > 0, order_S[(start_U + left_U - 1)[found].clamp(min=0)], -1)
        last_T[words] = -1
        last_T.scatter_reduce_(0, words, places, "amax")
        won = (places >= 0) & (places == last_T[words])
        left_U[found[won]] -= 1
        partner_T[words[won]] = places[won]
    (at_T,) = torch.nonzero(partner_T >= 0, as_tuple=True)
    return at_T, partner_T[at_T]


def _links_of(ids_T: Tensor, links: Mapping[int, Set[int]]) -> tuple[Tensor, Tensor]:
    """(place of a word, what it is linked to), link by link; the keys of `links` ascend."""
    source_L = torch.tensor(list(links))
    count_L = torch.tensor([len(near) for near in links.values()])
    near = torch.tensor([other for near in links.values() for other in near])
    row_T = torch.searchsorted(source_L, ids_T).clamp(max=len(source_L) - 1)
    (at_T,) = torch.nonzero(source_L[row_T] == ids_T, as_tuple=True)
    row_T = row_T[at_T]
    count_T = count_L[row_T]
    skipped_T = (count_L.cumsum(0) - count_L)[row_T] - (count_T.cumsum(0) - count_T)
    return at_T.repeat_interleave(count_T), near[torch.arange(int(count_T.sum())) + skipped_T.repeat_interleave(count_T)]


def _turns(word_E: Tensor, group_E: Tensor, pair_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The links of the last word that has any, of all pairs; of the last but one; and so on."""
    word_W, row_E = torch.unique(word_E, return_inverse=True)
    pair_W = pair_T[word_W]
    turn_W = torch.bincount(pair_W).cumsum(0)[pair_W] - 1 - torch.arange(len(word_W))
    turn_E = turn_W[row_E]
    order_E, counts = torch.argsort(turn_E, stable=True), torch.bincount(turn_E).tolist()
    return zip(word_E[order_E].split(counts), group_E[order_E].split(counts), strict=True)


def _matches_and_chunks(partner_T: Tensor, pair_T: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    (at_M,) = torch.nonzero(partner_T >= 0, as_tuple=True)
    pair_M = pair_T[at_M]
    joined_M = (at_M.diff() == 1) & (partner_T[at_M].diff() == 1) & (pair_M.diff() == 0)
    matches_B = torch.bincount(pair_M, minlength=pairs)
    return matches_B, matches_B - torch.bincount(pair_M[1:][joined_M], minlength=pairs)


def _fewest(
    hypothesis: Side,
    reference: Side,
    matches_B: Tensor,
    chunks_B: Tensor,
    links: Mapping[int, Set[int]],
    notes: Notes | None,
) -> tuple[Tensor, Tensor]:
    """Searches pair by pair where an alignment may be bettered. Says where what is found is not proven the fewest."""
    lengths = [side.lengths_B.tolist() for side in (hypothesis, reference)]
    words = [side.words_N.split(length) for side, length in zip((hypothesis, reference), lengths, strict=True)]
    stems = [side.stems_N.split(length) for side, length in zip((hypothesis, reference), lengths, strict=True)]
    whole_B = matches_B == torch.minimum(hypothesis.lengths_B, reference.lengths_B)
    may_B = (chunks_B > 1) | (~whole_B if links else torch.zeros_like(whole_B))
    matches_B, chunks_B, unproven = matches_B.clone(), chunks_B.clone(), []
    for pair in torch.nonzero(may_B).squeeze(1).tolist():
        ids = [tuple(side[pair].tolist() for side in sides) for sides in (words, stems)]
        matches, chunks, proven = fewest_chunks(*ids, links, (int(matches_B[pair]), int(chunks_B[pair])))
        matches_B[pair], chunks_B[pair] = matches, chunks
        if not proven:
            unproven.append(pair)
    if unproven:
        first = f", the first that of example {unproven[0]}" if notes is None else ""  # else of one of many batches
        notice("unproven", ("chunks of {} pairs may not be the fewest" + first).format, len(unproven), notes)
    return matches_B, chunks_B


meteor = meteor_score  # the name that `eval.meteor` has always offered
