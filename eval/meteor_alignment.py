"""METEOR's alignment of many pairs at once: equal words or stems, synonyms, and chunks.

The order is NLTK's: from the end of a text, each word takes the last free partner. T words of all hypotheses, S words of all
references, N words of one side, U groups of equal words of a pair, E links between words and synonyms, M matches.
"""

from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple

import torch
from torch import Tensor

from eval.chunks import fewest_chunks
from eval.ngram import Ragged
from eval.notes import Notes, note_or_warn


class Side(NamedTuple):
    """B texts flattened: ids of words, ids of their stems, the pair of each word; and the lengths of the texts."""

    words_N: Tensor
    stems_N: Tensor
    pair_N: Tensor
    lengths_B: Tensor


def flatten_side(text: Ragged, stem_of: Tensor) -> Side:
    """Add stems and pair numbers to the texts of one side; `stem_of` maps word ids to stem ids."""
    length_B = text.lengths_B.clamp(min=0)
    return Side(text.ids_N, stem_of[text.ids_N], torch.repeat_interleave(length_B), length_B)


def match_equal(ids_T: Tensor, pair_T: Tensor, ids_S: Tensor, pair_S: Tensor) -> tuple[Tensor, Tensor]:
    """Match equal words of each pair from the end: the last on each side, the last but one, …; return indices into T and S.

    >>> none = torch.zeros(4, dtype=torch.int64)
    >>> [places.tolist() for places in match_equal(torch.tensor([7, 8, 7, 7]), none, torch.tensor([7, 9, 7]), none[:3])]
    [[2, 3], [0, 2]]
    """
    (group_T, group_S), groups = _group_words(ids_T, pair_T, ids_S, pair_S)
    order_T, end_T, _ = _sort_groups(group_T, groups)
    order_S, end_S, count_S = _sort_groups(group_S, groups)
    from_end_T = torch.empty_like(group_T)
    from_end_T[order_T] = end_T[group_T[order_T]] - 1 - torch.arange(len(group_T))
    (at_T,) = torch.nonzero(from_end_T < count_S[group_T], as_tuple=True)
    return at_T, order_S[end_S[group_T[at_T]] - 1 - from_end_T[at_T]]


def _group_words(ids_T: Tensor, pair_T: Tensor, ids_S: Tensor, pair_S: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
    """Number the groups of equal words of a pair."""
    ids_N, pair_N = torch.cat([ids_T, ids_S]), torch.cat([pair_T, pair_S])
    width = int(ids_N.amax()) + 1 if len(ids_N) else 1
    kinds, group_N = torch.unique(pair_N * width + ids_N, return_inverse=True)
    return group_N.split([len(ids_T), len(ids_S)]), len(kinds)


def _sort_groups(group_N: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices sorted by group, the end of each group among them, and the size of each group."""
    count_U = torch.bincount(group_N, minlength=groups)
    return torch.argsort(group_N, stable=True), count_U.cumsum(0), count_U


def match_synonyms(
    ids_T: Tensor, pair_T: Tensor, ids_S: Tensor, pair_S: Tensor, synonyms: Mapping[int, Set[int]]
) -> tuple[Tensor, Tensor]:
    """Match words from the end of each hypothesis with the last free synonym; return indices into T and S.

    All pairs advance at once, one word of each at a time. A link E joins a word to the group of one synonym.
    """
    word_E, near_E = _synonym_links(ids_T, synonyms)
    (group_E, group_S), groups = _group_words(near_E, pair_T[word_E], ids_S, pair_S)
    order_S, end_U, left_U = _sort_groups(group_S, groups)
    is_present_E = left_U[group_E] > 0
    word_E, group_E, start_U = word_E[is_present_E], group_E[is_present_E], end_U - left_U
    partner_T, last_T = torch.full_like(ids_T, -1), torch.empty_like(ids_T)
    for words, found in _turns(word_E, group_E, pair_T):
        places = torch.where(left_U[found] > 0, order_S[(start_U + left_U - 1)[found].clamp(min=0)], -1)
        last_T[words] = -1
        last_T.scatter_reduce_(0, words, places, "amax")
        is_chosen = (places >= 0) & (places == last_T[words])
        left_U[found[is_chosen]] -= 1
        partner_T[words[is_chosen]] = places[is_chosen]
    (at_T,) = torch.nonzero(partner_T >= 0, as_tuple=True)
    return at_T, partner_T[at_T]


def _synonym_links(ids_T: Tensor, synonyms: Mapping[int, Set[int]]) -> tuple[Tensor, Tensor]:
    """Return (index of a word, id of its synonym) for each link; the keys of `synonyms` ascend."""
    source_L = torch.tensor(list(synonyms))
    count_L = torch.tensor([len(near) for near in synonyms.values()])
    near = torch.tensor([other for near in synonyms.values() for other in near])
    row_T = torch.searchsorted(source_L, ids_T).clamp(max=len(source_L) - 1)
    (at_T,) = torch.nonzero(source_L[row_T] == ids_T, as_tuple=True)
    row_T = row_T[at_T]
    count_T = count_L[row_T]
    skipped_T = (count_L.cumsum(0) - count_L)[row_T] - (count_T.cumsum(0) - count_T)
    return at_T.repeat_interleave(count_T), near[torch.arange(int(count_T.sum())) + skipped_T.repeat_interleave(count_T)]


def _turns(word_E: Tensor, group_E: Tensor, pair_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the links of each pair's last linked word, then of the last but one, …"""
    word_W, row_E = torch.unique(word_E, return_inverse=True)
    pair_W = pair_T[word_W]
    turn_W = torch.bincount(pair_W).cumsum(0)[pair_W] - 1 - torch.arange(len(word_W))
    turn_E = turn_W[row_E]
    order_E, counts = torch.argsort(turn_E, stable=True), torch.bincount(turn_E).tolist()
    return zip(word_E[order_E].split(counts), group_E[order_E].split(counts), strict=True)


def count_chunks(partner_T: Tensor, pair_T: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Count matches and chunks of each pair, (B,) each; partner_T is the index of the matched reference word, or -1."""
    (at_M,) = torch.nonzero(partner_T >= 0, as_tuple=True)
    pair_M = pair_T[at_M]
    is_joined_M = (at_M.diff() == 1) & (partner_T[at_M].diff() == 1) & (pair_M.diff() == 0)
    matches_B = torch.bincount(pair_M, minlength=pairs)
    return matches_B, matches_B - torch.bincount(pair_M[1:][is_joined_M], minlength=pairs)


def search_fewest_chunks(
    hypothesis: Side,
    reference: Side,
    matches_B: Tensor,
    chunks_B: Tensor,
    synonyms: Mapping[int, Set[int]],
    notes: Notes | None,
) -> tuple[Tensor, Tensor]:
    """Search pair by pair for more matches or fewer chunks; note the pairs whose result is not proven optimal."""
    lengths = [side.lengths_B.tolist() for side in (hypothesis, reference)]
    words = [side.words_N.split(length) for side, length in zip((hypothesis, reference), lengths, strict=True)]
    stems = [side.stems_N.split(length) for side, length in zip((hypothesis, reference), lengths, strict=True)]
    is_full_B = matches_B == torch.minimum(hypothesis.lengths_B, reference.lengths_B)
    may_improve_B = (chunks_B > 1) | (~is_full_B if synonyms else torch.zeros_like(is_full_B))
    matches_B, chunks_B, unproven = matches_B.clone(), chunks_B.clone(), []
    for pair in torch.nonzero(may_improve_B).squeeze(1).tolist():
        ids = [tuple(side[pair].tolist() for side in sides) for sides in (words, stems)]
        matches, chunks, is_proven = fewest_chunks(*ids, synonyms, (int(matches_B[pair]), int(chunks_B[pair])))
        matches_B[pair], chunks_B[pair] = matches, chunks
        if not is_proven:
            unproven.append(pair)
    if unproven:
        # With notes the index would be that of one of many batches.
        first = f", the first that of example {unproven[0]}" if notes is None else ""
        note_or_warn("unproven", ("chunks of {} pairs may not be the fewest" + first).format, len(unproven), notes)
    return matches_B, chunks_B
