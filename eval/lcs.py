"""Longest common subsequences (LCS) of many pairs of texts at once, by bit-parallel integer arithmetic.

Let t[i, j] be the LCS length of i reference tokens and j hypothesis tokens. A column of t rises by 0 or 1 from row to row.
Bit i of V_j is 0 where column j rises, and one addition computes a column from the previous one (bit i of M: reference token i
equals hypothesis token j):

    V_j = (V_{j-1} + (V_{j-1} & M)) | (V_{j-1} & ~M)      length = number of zeros of the last V

Batches are int64 tensors on any device. A text may span several words of bits; word w processes token j in step j + w, so the
carry moves by one word per step. If both texts of a pair are long, V is one Python integer.
Source: Crochemore et al. 2001, "A fast and practical bit-vector algorithm for the longest common subsequence problem".

P pairs, T positions of the hypothesis, S of the reference, W words of bits, N tokens flattened, U groups.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.ngram import Ragged

WORD = 62  # bits of an int64 in use: the sum of two words and a carry stays below the sign
ONES = (1 << WORD) - 1
BUDGET = 1 << 22  # int64 numbers of a batch, 32 MB; also of the masks of a pair in Python integers
LARGEST = 1 << 16  # numbers per pair in a batch; beyond that, from about 2,000 words on, a Python integer is faster
FEW = 16  # a mask of fewer positions is faster to make bit by bit than from an array


# ---- the reference implementations: one pair, the full table


def lcs_reference(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> list[int]:
    """Return the reference positions of the longest common subsequence, by the full table; the reference implementation of
    `lcs_members`.

    >>> lcs_reference([2, 5, 3, 4], [1, 2, 3, 4, 5])
    [1, 2, 3]
    """
    t = [[0] * (len(hypothesis) + 1) for _ in range(len(reference) + 1)]
    for i, token in enumerate(reference, 1):
        for j, other in enumerate(hypothesis, 1):
            t[i][j] = t[i - 1][j - 1] + 1 if token == other else max(t[i - 1][j], t[i][j - 1])
    i, j, members = len(reference), len(hypothesis), []
    while i and j:
        if reference[i - 1] == hypothesis[j - 1]:
            i, j = i - 1, j - 1
            members.insert(0, i)
        elif t[i][j - 1] > t[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return members


def weighted_lcs_reference(hypothesis: Sequence[Hashable], reference: Sequence[Hashable], weight: float) -> float:
    """Compute the weighted LCS of one pair, with k^weight for a run of k matches; the reference implementation of
    `weighted_lcs`.

    >>> weighted_lcs_reference("abcd", "abxcd", 2.0)  # two runs of two
    8.0
    """
    value = [[0.0] * (len(hypothesis) + 1) for _ in range(len(reference) + 1)]
    run = [[0] * (len(hypothesis) + 1) for _ in range(len(reference) + 1)]
    for i, token in enumerate(reference, 1):
        for j, other in enumerate(hypothesis, 1):
            if token == other:
                k = run[i - 1][j - 1]
                run[i][j] = k + 1
                value[i][j] = value[i - 1][j - 1] + ((k + 1.0) ** weight - float(k) ** weight)
            else:
                value[i][j] = max(value[i - 1][j], value[i][j - 1])
    return value[-1][-1]


# ---- many pairs at once


def lcs_lengths(hypotheses: Ragged, references: Ragged) -> Tensor:
    """Length of the longest common subsequence of each pair, (B,) int64; 0 if a side is empty or missing.

    >>> from eval.ngram import number_tokens
    >>> lcs_lengths(*number_tokens(["police killed the gunman".split()], ["the gunman police killed".split()]))
    tensor([2])
    """
    pair_B = torch.arange(len(references.lengths_B), device=references.lengths_B.device)
    length_B = torch.zeros_like(pair_B)
    batches, large = _make_batches(hypotheses.lengths_B, references.lengths_B, _vector_size)
    bit_K = torch.arange(WORD, device=pair_B.device)
    for place_P in batches:
        vector_PW = _last(_vectors(_pad(hypotheses, place_P, -1), _pad(references, place_P, -2)))
        length_B[place_P] = (~vector_PW[..., None] >> bit_K & 1).sum((1, 2))
    for place in large:
        reference = _get_row(references, place)
        length_B[place] = len(reference) - _last(_integer_steps(_get_row(hypotheses, place), reference)()).bit_count()
    return length_B


def lcs_members(hypotheses: Ragged, references: Ragged) -> Tensor:
    """Mask of the reference tokens in the longest common subsequence of each pair, (N,) bool.

    Of several longest ones, it is rouge-score's, traced back from the ends of both texts: equal tokens are members; otherwise
    the hypothesis steps back if t[i, j-1] > t[i-1, j], else the reference.
    """
    pair_B = torch.arange(len(references.lengths_B), device=references.lengths_B.device)
    return lcs_union(hypotheses, references, pair_B, pair_B)


def lcs_union(hypotheses: Ragged, references: Ragged, hypothesis_P: Tensor, reference_P: Tensor) -> Tensor:
    """Union of `lcs_members` over the pairs (hypothesis_P[p], reference_P[p]) of text numbers, (N,) bool."""
    union_N = torch.zeros_like(references.ids_N, dtype=torch.bool)
    start_B = _starts(references)
    batches, large = _make_batches(hypotheses.lengths_B[hypothesis_P], references.lengths_B[reference_P], _history_size)
    for place_P in batches:
        is_member_PS = _trace_back(_pad(hypotheses, hypothesis_P[place_P], -1), _pad(references, reference_P[place_P], -2))
        pair_M, position_M = torch.nonzero(is_member_PS, as_tuple=True)
        union_N[start_B[reference_P[place_P]][pair_M] + position_M] = True
    for place in large:
        row = int(reference_P[place])
        members = _trace_back_integers(_get_row(hypotheses, int(hypothesis_P[place])), _get_row(references, row))
        union_N[int(start_B[row]) + torch.tensor(members, dtype=torch.int64, device=union_N.device)] = True
    return union_N


def weighted_lcs(hypotheses: Ragged, references: Ragged, weight: float) -> Tensor:
    """Weighted longest common subsequence of each pair, (B,) float64: a run of k matches counts f(k) = k^weight.

        equal tokens:  run(i, j) = run(i-1, j-1) + 1      c(i, j) = c(i-1, j-1) + f(run(i, j)) - f(run(i-1, j-1))
        others:        run(i, j) = 0                      c(i, j) = max(c(i-1, j), c(i, j-1))

    One step computes a diagonal of all tables of a batch: T + S - 1 steps, memory for three diagonals. c may decrease along a
    row, so texts are right-aligned. Source: Lin 2004, section 4.
    """
    pair_B = torch.arange(len(references.lengths_B), device=references.lengths_B.device)
    value_B = torch.zeros_like(pair_B, dtype=torch.float64)
    batches, large = _make_batches(hypotheses.lengths_B, references.lengths_B, _diagonal_size)
    for place_P in [*batches, *(pair_B[place : place + 1] for place in large)]:
        hypothesis_PT = _align_right(_pad(hypotheses, place_P, -1))
        reference_PS = _align_right(_pad(references, place_P, -2))
        longest = min(hypothesis_PT.size(1), reference_PS.size(1))
        gain_K = torch.tensor(_gains(longest, weight), dtype=torch.float64, device=value_B.device)
        run_PS = last_run_PS = torch.zeros_like(F.pad(reference_PS, (1, 0)))  # the first column is i = 0
        value_PS = last_value_PS = run_PS.double()
        for token_PS in _skew(hypothesis_PT, reference_PS.size(1), -1):
            is_equal_PS, diagonal_run_PS = token_PS == reference_PS, last_run_PS[:, :-1]
            extended_PS = last_value_PS[:, :-1] + gain_K[diagonal_run_PS]
            next_PS = torch.where(is_equal_PS, extended_PS, torch.maximum(value_PS[:, :-1], value_PS[:, 1:]))
            value_PS, last_value_PS = F.pad(next_PS, (1, 0)), value_PS
            run_PS, last_run_PS = F.pad(torch.where(is_equal_PS, diagonal_run_PS + 1, 0), (1, 0)), run_PS
        value_B[place_P] = value_PS[:, -1]
    return value_B


def _gains(longest: int, weight: float) -> list[float]:
    """Increments f(k + 1) - f(k) for k = 0 … longest."""
    return [(k + 1.0) ** weight - float(k) ** weight for k in range(longest + 1)]


def _last(steps: Iterator):
    """Return the last item of an iterator without storing the others."""
    return deque(steps, maxlen=1).pop()


# ---- batches: pairs of similar lengths, as many as fit into the budget
# `size(length, other)` approximates the int64 numbers of a pair with `length` hypothesis and `other` reference tokens.

VECTORS = 5  # tensors of W words in a step of `_vectors`: V, carry, masks, matched bits, sum
DIAGONALS = 10  # tensors of S numbers in a step of `weighted_lcs`: tokens of both sides, equality, three runs, four values


def _vector_size(length, other):
    """Size of both texts, a mask for each hypothesis token, and one step."""
    words = -(-other // WORD)
    return length + other + words * length + words * VECTORS


def _history_size(length, other):
    """Size of `_vector_size` plus V after each of the T + W steps."""
    words = -(-other // WORD)
    return _vector_size(length, other) + words * (length + words)


def _diagonal_size(length, other):
    """Size of the hypothesis, its padded copy, and one step."""
    return 2 * length + DIAGONALS * other


def _make_batches(length_P: Tensor, other_P: Tensor, size: Callable) -> tuple[list[Tensor], list[int]]:
    """Group pairs into batches of indices, and list those too large for a batch; neither has pairs with an empty side."""
    is_nonempty_P, size_P = (length_P > 0) & (other_P > 0), size(length_P, other_P)
    (small_M,) = torch.nonzero(is_nonempty_P & (size_P <= LARGEST), as_tuple=True)
    # A class is a power of two of words on either side, so no long text pads short ones.
    class_M = 64 * _bit_length((other_P[small_M] - 1) // WORD) + _bit_length((length_P[small_M] - 1) // WORD)
    batches = []
    for kind in class_M.unique().tolist():
        place_C = small_M[class_M == kind]
        padded = size(int(length_P[place_C].amax()), int(other_P[place_C].amax()))
        batches.extend(place_C.split(max(1, BUDGET // padded)))
    return batches, torch.nonzero(is_nonempty_P & (size_P > LARGEST)).flatten().tolist()


def _bit_length(integer_M: Tensor) -> Tensor:
    return torch.frexp(integer_M.double()).exponent.long()


def _starts(side: Ragged) -> Tensor:
    length_B = side.lengths_B.clamp(min=0)
    return length_B.cumsum(0) - length_B


def _pad(side: Ragged, place_P: Tensor, fill: int) -> Tensor:
    """Return the selected texts as rows (P, T), padded with `fill`."""
    length_P = side.lengths_B[place_P]
    position_T = torch.arange(int(length_P.amax()), device=length_P.device)
    index_PT = (_starts(side)[place_P][:, None] + position_T).clamp(max=len(side.ids_N) - 1)
    return side.ids_N[index_PT].masked_fill(position_T >= length_P[:, None], fill)


def _align_right(value_PT: Tensor) -> Tensor:
    """Move the padding (negative values) of each row to its front."""
    length_P1, position_T = (value_PT >= 0).sum(1, keepdim=True), torch.arange(value_PT.size(1), device=value_PT.device)
    return value_PT.gather(1, (position_T + length_P1) % value_PT.size(1))


def _get_row(side: Ragged, place: int) -> list[int]:
    start = int(_starts(side)[place])
    return side.ids_N[start : start + int(side.lengths_B[place])].tolist()


def _skew(value_PT: Tensor, width: int, fill: int) -> Iterator[Tensor]:
    """Yield (P, width) per step: column c of step t is value t - c, or `fill` outside the row."""
    length = value_PT.size(1)
    padded_PT = F.pad(value_PT.flip(1), (width, width), value=fill)
    for step in range(length + width - 1):
        yield padded_PT[:, width + length - 1 - step :][:, :width]


# ---- a batch: V as W words per pair


def _vectors(hypothesis_PT: Tensor, reference_PS: Tensor) -> Iterator[Tensor]:
    """Yield the bit vectors V after each step, (P, W). Word w is w steps behind: in step t it has processed token t - w."""
    words = -(-reference_PS.size(1) // WORD)
    row_PT, mask_UW = _masks(hypothesis_PT, reference_PS, words)
    mask_V, word_W = mask_UW.flatten(), torch.arange(words, device=row_PT.device)
    vector_PW = torch.full((len(row_PT), words), ONES, device=row_PT.device)
    carry_PW = torch.zeros_like(vector_PW)
    for first_PW in _skew(row_PT * words, words, 0):
        matched_PW = vector_PW & mask_V[first_PW + word_W]
        sum_PW = vector_PW + matched_PW + carry_PW
        carry_PW[:, 1:] = (sum_PW >> WORD)[:, :-1]
        vector_PW = (sum_PW & ONES) | (vector_PW ^ matched_PW)
        yield vector_PW


def _masks(hypothesis_PT: Tensor, reference_PS: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Bit masks M of the reference positions equal to each hypothesis token: rows (P, T) of masks (U, W); row 0 is empty."""
    width = 1 + int(torch.maximum(hypothesis_PT.amax(), reference_PS.amax()))
    pair_P1 = torch.arange(len(hypothesis_PT), device=hypothesis_PT.device)[:, None]
    is_token_PT, is_token_PS = hypothesis_PT >= 0, reference_PS >= 0
    key_U, row_M = torch.unique((hypothesis_PT + pair_P1 * width)[is_token_PT], return_inverse=True)
    row_PT = torch.zeros_like(hypothesis_PT)
    row_PT[is_token_PT] = row_M + 1
    key_M = (reference_PS + pair_P1 * width)[is_token_PS]
    place_M = torch.searchsorted(key_U, key_M).clamp(max=len(key_U) - 1)
    position_M = torch.arange(reference_PS.size(1), device=row_PT.device).expand_as(reference_PS)[is_token_PS]
    bit_M = (torch.ones_like(position_M) << position_M % WORD).where(key_U[place_M] == key_M, 0)
    mask_V = torch.zeros((len(key_U) + 1) * words, dtype=torch.int64, device=row_PT.device)
    mask_V.index_add_(0, (place_M + 1) * words + position_M // WORD, bit_M)  # no bit occurs twice: the sum is the union
    return row_PT, mask_V.view(-1, words)


def _trace_back(hypothesis_PT: Tensor, reference_PS: Tensor) -> Tensor:
    """Trace back through all tables at once; return the mask of members, (P, S) bool.

    For unequal tokens, t[i, j-1] > t[i-1, j] holds exactly if bit i of V_j is 0.
    """
    history_XPW = torch.stack(list(_vectors(hypothesis_PT, reference_PS)))
    pair_P = torch.arange(len(reference_PS), device=reference_PS.device)
    i_P, j_P = (reference_PS >= 0).sum(1), (hypothesis_PT >= 0).sum(1)
    width = reference_PS.size(1)
    is_member_PS = F.pad(torch.zeros_like(reference_PS, dtype=torch.bool), (0, 1))  # the last column collects non-members
    for _ in range(width + hypothesis_PT.size(1)):
        is_active_P = (i_P > 0) & (j_P > 0)
        row_P, column_P = (i_P - 1).clamp(min=0), (j_P - 1).clamp(min=0)
        word_P = row_P // WORD
        is_equal_P = is_active_P & (reference_PS[pair_P, row_P] == hypothesis_PT[pair_P, column_P])
        is_rise_P = history_XPW[column_P + word_P, pair_P, word_P] >> row_P % WORD & 1 == 0
        is_member_PS.scatter_(1, torch.where(is_equal_P, row_P, width)[:, None], True)
        i_P = i_P - (is_active_P & (is_equal_P | ~is_rise_P)).long()
        j_P = j_P - (is_active_P & (is_equal_P | is_rise_P)).long()
    return is_member_PS[:, :-1]


# ---- a pair too large for a batch: V as one Python integer


def _integer_steps(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> Callable[..., Iterator[int]]:
    """Return a function steps(first, last, vector) that yields V after each hypothesis token first … last - 1, starting
    from `vector`."""
    positions = defaultdict(list)
    for position, token in enumerate(reference):
        positions[token].append(position)
    size = len(reference)
    ones = (1 << size) - 1

    @lru_cache(maxsize=max(1, 8 * BUDGET // (size // 8 + 1)))  # all masks of a long text would be as large as the table
    def mask(token: Hashable) -> int:
        places = positions[token]
        if len(places) < FEW:
            return sum(1 << place for place in places)
        bit_S = np.zeros(size, np.uint8)
        bit_S[places] = 1
        return int.from_bytes(np.packbits(bit_S, bitorder="little").tobytes(), "little")

    def steps(first: int = 0, last: int = len(hypothesis), vector: int = ones) -> Iterator[int]:
        for token in hypothesis[first:last]:
            if token in positions:
                matched = vector & mask(token)
                vector = (vector + matched | vector ^ matched) & ones
            yield vector

    return steps


def _trace_back_integers(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> list[int]:
    """Trace back block by block: V is stored at the start of each of √T blocks, and recomputed within the current block."""
    steps, block = _integer_steps(hypothesis, reference), math.isqrt(len(hypothesis)) + 1
    starts, vector = [], (1 << len(reference)) - 1
    for first in range(0, len(hypothesis), block):
        starts.append((first, vector))
        vector = _last(steps(first, first + block, vector))
    i, members = len(reference), []
    for first, vector in reversed(starts):
        vectors = list(steps(first, first + block, vector))
        while i and vectors:
            if reference[i - 1] == hypothesis[first + len(vectors) - 1]:
                members.append(i - 1)
                i -= 1
                vectors.pop()
            elif vectors[-1] >> i - 1 & 1:
                i -= 1
            else:
                vectors.pop()
    return members
