"""METEOR: F-score of an alignment by equal words, stems and synonyms, with a penalty for fragmentation.

    score = (1 - γ (chunks / matches)^β) P R / (α P + (1 - α) R)
    P = matches / words of the hypothesis      R = matches / words of the reference

Three stages align the words that earlier stages left: equal words, equal Porter stems, WordNet synonyms. A word is matched at
most once. A chunk is a maximal run of matched words that are adjacent in both texts, in the same order.
B pairs of texts, T words of all hypotheses, S words of all references, K statistics, X any leading dimensions.
Source: Banerjee & Lavie 2005; with α, β, γ Lavie & Agarwal 2007. Values are NLTK's, and with "nltk" its alignment, which is not
the paper's with the fewest crossings: from the end, each word takes the last equal one that is free. What is left for the third
stage is stems there, and these are looked up in WordNet, not the words.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from eval import porter, scripts
from eval.choices import ALIGNMENTS, CORPUS_SCORES
from eval.meteor_alignment import Side, count_chunks, flatten_side, match_equal, match_synonyms, search_fewest_chunks
from eval.ngram import number_tokens
from eval.notes import Notes
from eval.score import Score, check_has_reference, check_streams, corpus_value, ratio, reference_count, signature_of
from eval.tokenize import TOKENIZERS, check_tokenizer, tokenize_texts, tokenizer_name

NLTK_VERSION = "3.10.4"  # the release of NLTK whose values are reproduced


class Synonyms(Protocol):
    """Source of synonyms: `eval.wordnet.WordNet`, or any object with this method."""

    def synonyms(self, word: str) -> Iterable[str]: ...


@dataclass(frozen=True)
class Meteor:
    """Settings of METEOR; the score is from 0 to 1.

    - stem, wordnet: the stages after that of equal words
    - alpha, beta, gamma: weight of precision, exponent and maximum of the penalty
    - alignment: "nltk", or "fewest-chunks": of the alignments with the most matches, one with the fewest chunks (`eval.chunks`)
    - corpus: "mean", the mean of the examples' scores; "sum", the score of their summed statistics, as in the paper
    - tokenize: tokenizer of strings; sequences of words are used unchanged. Each word is lower-cased

    An example with several references has the best-scoring one, the first of equals. Without a match the score is 0. Errors: an
    unknown name, a number out of range (ValueError); `wordnet` without a method `synonyms` (TypeError).
    Statistics of an example: references, matches, chunks, length, reference length.
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
        for setting, known in (("alignment", ALIGNMENTS), ("corpus", CORPUS_SCORES), ("tokenize", TOKENIZERS)):
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
    def is_mean(self) -> bool:
        return CORPUS_SCORES[self.corpus]

    def statistics(self, hypotheses: Sequence, references: Sequence[Sequence], *, notes: Notes | None = None) -> Tensor:
        check_streams(hypotheses, references)
        check_has_reference(references)
        texts = [self._split_words(side) for side in (hypotheses, *references)]
        if None in texts[0]:
            raise TypeError(f"hypothesis {texts[0].index(None)} is None")
        if self.tokenize != "char":
            strings = [[text if isinstance(text, str) else None for text in side] for side in (hypotheses, *references)]
            scripts.note_unsegmented(f"METEOR ({self.tokenize})", scripts.USE_TOKENIZERS, strings, texts, notes)
        words = list(dict.fromkeys(word for side in texts for text in side if text is not None for word in text))
        stems = [porter.stem(word) for word in words] if self.stem else words
        forms = list(dict.fromkeys(stems))
        stem_of = number_tokens([forms], [stems])[1].ids_N
        _, *found = number_tokens([words], *texts)
        has_reference_BR = torch.stack([side.lengths_B >= 0 for side in found[1:]], 1)
        hypothesis, *others = (flatten_side(side, stem_of) for side in found)
        best_BK, best_B = None, torch.full((len(hypotheses),), -1.0, dtype=torch.float64)
        for reference, has_reference_B in zip(others, has_reference_BR.unbind(1), strict=True):
            aligned = self._align(hypothesis, reference, forms, notes)
            row_BK = torch.stack([has_reference_BR.sum(1), *aligned, hypothesis.lengths_B, reference.lengths_B], 1)
            score_B = self.scores(row_BK).where(has_reference_B, -1.0)
            best_BK = row_BK if best_BK is None else torch.where((score_B > best_B)[:, None], row_BK, best_BK)
            best_B = torch.maximum(best_B, score_B)
        return best_BK

    def _split_words(self, texts: Sequence) -> list[list[str] | None]:
        """Split texts and lower-case word by word, as NLTK: a capital sigma has another lower case at the end of a word."""
        split = tokenize_texts([text if isinstance(text, str) else None for text in texts], self.tokenize)
        rows = [text if words is None else words for text, words in zip(texts, split, strict=True)]
        try:
            return [None if row is None else [*map(str.lower, row)] for row in rows]
        except TypeError as error:
            raise TypeError(f"METEOR takes texts, or sequences of words: {error}") from None

    def _align(self, hypothesis: Side, reference: Side, forms: Sequence[str], notes: Notes | None) -> tuple[Tensor, Tensor]:
        """Align each pair and return its numbers of matches and chunks, (B,) each; `forms` are the stems by id."""
        partner_T, is_taken_S = torch.full_like(hypothesis.words_N, -1), torch.zeros_like(reference.words_N, dtype=torch.bool)
        free_T, free_S = torch.arange(len(partner_T)), torch.arange(len(is_taken_S))
        for ids_T, ids_S in ((hypothesis.words_N, reference.words_N), (hypothesis.stems_N, reference.stems_N)):
            at_T, at_S = match_equal(ids_T[free_T], hypothesis.pair_N[free_T], ids_S[free_S], reference.pair_N[free_S])
            partner_T[free_T[at_T]], is_taken_S[free_S[at_S]] = free_S[at_S], True
            free_T, free_S = torch.nonzero(partner_T < 0).squeeze(1), torch.nonzero(~is_taken_S).squeeze(1)
        synonyms = {}
        if self.wordnet is not None:
            synonyms = self._find_synonyms(hypothesis.stems_N[free_T], reference.stems_N[free_S], forms)
        if synonyms:
            ids_T, ids_S = hypothesis.stems_N[free_T], reference.stems_N[free_S]
            at_T, at_S = match_synonyms(ids_T, hypothesis.pair_N[free_T], ids_S, reference.pair_N[free_S], synonyms)
            partner_T[free_T[at_T]] = free_S[at_S]
        known = count_chunks(partner_T, hypothesis.pair_N, len(hypothesis.lengths_B))
        return known if self.alignment == "nltk" else search_fewest_chunks(hypothesis, reference, *known, synonyms, notes)

    def _find_synonyms(self, stems_T: Tensor, stems_S: Tensor, forms: Sequence[str]) -> dict[int, set[int]]:
        """Map each hypothesis stem, in ascending order, to its synonyms among the reference stems."""
        reference_stems = {forms[stem]: stem for stem in stems_S.unique().tolist()}
        found = (
            (stem, {reference_stems[form] for form in self.wordnet.synonyms(forms[stem]) if form in reference_stems} - {stem})
            for stem in stems_T.unique().tolist()
        )
        return {stem: near for stem, near in found if near}

    def scores(self, statistics_XK: Tensor) -> Tensor:
        _, _, f_mean_X, penalty_X = self._parts(statistics_XK)
        return (1 - penalty_X) * f_mean_X

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def _parts(self, statistics_XK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return precision, recall, their weighted harmonic mean, and the penalty."""
        _, matches_X, chunks_X, length_X, reference_X = statistics_XK.double().unbind(-1)
        precision_X, recall_X = ratio(matches_X, length_X), ratio(matches_X, reference_X)
        f_mean_X = ratio(precision_X * recall_X, self.alpha * precision_X + (1 - self.alpha) * recall_X)
        return precision_X, recall_X, f_mean_X, self.gamma * ratio(chunks_X, matches_X) ** self.beta

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts, of the summed statistics: precision, recall, f_mean, penalty, matches, chunks, length,
        reference_length."""
        sums_K = statistics_BK.sum(0)
        parts = dict(zip(("precision", "recall", "f_mean", "penalty"), map(float, self._parts(sums_K)), strict=True))
        parts |= dict(zip(("matches", "chunks", "length", "reference_length"), sums_K[1:].tolist(), strict=True))
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        stages = ["exact", *["stem"] * self.stem, *["synonyms"] * (self.wordnet is not None)]
        settings = {"nrefs": reference_count(statistics_BK)} | resampling | {"stages": "+".join(stages)}
        if self.wordnet is not None:
            settings["wordnet"] = getattr(self.wordnet, "version", type(self.wordnet).__name__)
        settings |= {"alpha": f"{self.alpha:g}", "beta": f"{self.beta:g}", "gamma": f"{self.gamma:g}"}
        settings["align"] = f"nltk-{NLTK_VERSION}" if self.alignment == "nltk" else self.alignment
        return signature_of(settings | {"corpus": self.corpus, "case": "lc", "tok": tokenizer_name(self.tokenize)})


def meteor_score(hypotheses: Sequence, references: Sequence, **settings: object) -> Score:
    """METEOR of a corpus, from 0 to 1: (1 - γ (chunks / matches)^β) P R / (α P + (1 - α) R), with NLTK's values.

    `references` is one reference per hypothesis, or streams: `references[r][i]` is a reference of hypothesis i, or None. Both
    sides are strings, or sequences of words. Settings are those of `Meteor`: stem=True, wordnet=None (no synonyms), alpha=0.9,
    beta=3, gamma=0.5, alignment, corpus, tokenize. Parts: precision, recall, f_mean, penalty, matches, chunks, length,
    reference_length. Errors: those of `Meteor`; streams of unequal length, an example without a reference (ValueError); texts
    that are neither (TypeError).
    Source: Banerjee & Lavie 2005; with α, β, γ Lavie & Agarwal 2007.

    >>> print(meteor_score(["on the mat sat the cat"], ["The cat sat on the mat"]))
    METEOR = 0.5000 nrefs:1|stages:exact+stem|alpha:0.9|beta:3|gamma:0.5|align:nltk-3.10.4|corpus:mean|case:lc|tok:none
    """
    metric = Meteor(**settings)
    is_one_list = isinstance(references, Sequence) and _is_one_list(hypotheses, references)
    return metric.score(metric.statistics(hypotheses, [references] if is_one_list else references))


def _is_one_list(hypotheses: Sequence, references: Sequence) -> bool:
    """True if the references are texts like the hypotheses, not streams of texts."""
    if isinstance(references, str) or not len(references) or not len(hypotheses):
        return not len(references)
    if any(isinstance(text, str) for text in hypotheses):
        return any(isinstance(text, str) for text in references)
    return all(text is None or not len(text) or isinstance(text[0], str) for text in references)


meteor = meteor_score  # the name that `eval.meteor` has always offered
