"""Exact and near duplicates, so that the validation split is text that training has not seen."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data.sources.files import Document

SHINGLE_WORDS = 8  # words
THRESHOLD = 0.5  # a document goes when this share of it stands in others
SAMPLE_ABOVE = 1 << 26  # shingles; 64 Mi of them take about 2 GB here

# A script without spaces gives a word a character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


@dataclass(frozen=True)
class DedupReport:
    """List what was dropped: (document, its kept twin), and (document, the kept one with most of it, share in kept ones)."""

    documents: int
    exact: list[tuple[str, str]] = field(default_factory=list)
    near: list[tuple[str, str, float]] = field(default_factory=list)


def deduplicate(documents: list[Document], near: bool = True) -> tuple[list[Document], DedupReport]:
    """The documents that stay, in their order, and the report.

    The first of exact duplicates stays, and the longest of near ones.
    """
    first: dict[bytes, Document] = {}
    exact = []
    for document in documents:
        kept = first.setdefault(fingerprint(document.text), document)
        if kept is not document:
            exact.append((document.name, kept.name))
    unique = list(first.values())
    covered = find_covered([document.text for document in unique]) if near else {}
    report = DedupReport(
        len(documents), exact, [(unique[i].name, unique[j].name, share) for i, (j, share) in sorted(covered.items())]
    )
    return [document for i, document in enumerate(unique) if i not in covered], report


def drop_held_out(
    documents: list[Document], held_out: list[Document], near: bool = True
) -> tuple[list[Document], list[str], list[tuple[str, float]]]:
    """The documents without those that validation has: (kept, names of the equal ones, near ones with the share it has).

    A near one is a document of which COVERED or more of the shingles stand in `held_out`, all of it together.
    """
    equal = {fingerprint(document.text) for document in held_out}
    words: dict[str, int] = {}
    hashes = [shingles(document.text, SHINGLE_WORDS, words) for document in held_out] if near else []
    theirs = np.unique(np.concatenate(hashes)) if near else None
    kept, exact, covered = [], [], []
    for document in documents:
        if fingerprint(document.text) in equal:
            exact.append(document.name)
            continue
        mine = np.unique(shingles(document.text, SHINGLE_WORDS, words)) if near else np.empty(0)
        share = float(np.isin(mine, theirs).mean()) if len(mine) else 0.0
        if share >= THRESHOLD:
            covered.append((document.name, share))
        else:
            kept.append(document)
    return kept, exact, covered


def fingerprint(text: str) -> bytes:
    """Equal for texts that differ in case and white space alone."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def find_covered(texts: list[str], length: int = SHINGLE_WORDS, threshold: float = THRESHOLD) -> dict[int, tuple[int, float]]:
    """Texts that stand in other texts already: {index: (the kept text that holds most of it, share covered)}.

    With S(A) the set of A's hashed shingles (runs of `length` words), from the largest S to the smallest,

        A is dropped  when  |S(A) & union of S(B), B kept so far| / |S(A)|  >=  threshold.

    This is the containment of Broder 1997 ("On the resemblance and containment of documents"), measured against the
    union of what is kept: it finds a text inside a longer one, where the Jaccard index |A & B| / |A | B| is small, and
    one put together from several. As containment of the smaller set >= Jaccard, near copies are found too.
    All shingles are compared, so no candidates need verifying; the time is that of one sort. Above SAMPLE_ABOVE
    shingles, only hashes divisible by a power of two are (FracMinHash; Irber et al. 2022), which estimates that share.
    """
    hashes, total = [], 0
    word_hash: dict[str, int] = {}
    for text in texts:
        hashes.append(np.unique(shingles(text, length, word_hash)))
        total += len(hashes[-1])
    if total > SAMPLE_ABOVE:
        divisor = np.uint64(1 << (total // SAMPLE_ABOVE).bit_length())
        hashes = [h[h % divisor == 0] for h in hashes]
    _, ids = np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]), return_inverse=True)
    sizes = np.array([len(h) for h in hashes], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    owner = np.full(ids.max(initial=-1) + 1, -1, dtype=np.int64)  # shingle -> the kept text that had it first
    covered = {}
    for i in np.argsort(-sizes, kind="stable").tolist():
        mine = ids[starts[i] : starts[i] + sizes[i]]
        holders = owner[mine]
        seen = holders[holders >= 0]
        if len(mine) and len(seen) >= threshold * len(mine):
            covered[i] = (Counter(seen.tolist()).most_common(1)[0][0], len(seen) / len(mine))
        else:
            owner[mine[holders < 0]] = i
    return covered


def shingles(text: str, length: int, word_hash: dict[str, int] | None = None) -> np.ndarray:
    """uint64 hashes of the runs of `length` words, in order: h_i = mix(sum_j w_{i+j} * M^(j+1)), modulo 2^64.

    A text of fewer words is one shingle; one without words has none. `word_hash` remembers the words' own hashes w.
    """
    word_hash = {} if word_hash is None else word_hash
    words = WORD.findall(text.casefold())
    for word in set(words) - word_hash.keys():  # str's own hash differs from process to process
        word_hash[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    w = np.fromiter((word_hash[word] for word in words), np.uint64, len(words))
    length = min(length, len(w))
    if not length:
        return w
    h, multiplier, power = np.zeros(len(w) - length + 1, np.uint64), 0x9E3779B97F4A7C15, 1
    for j in range(length):
        power = power * multiplier % 2**64
        h += w[j : len(w) - length + 1 + j] * np.uint64(power)
    h ^= h >> np.uint64(32)  # the low bits choose the sample: let the high ones reach them
    h *= np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


def shingle_overlap(texts: list[str], others: list[str], length: int = SHINGLE_WORDS) -> float:
    """The share of the distinct shingles of `texts` that `others` have too: how much of a validation split has leaked.

    >>> shingle_overlap(["a b c"], ["x a b c"], length=2)
    1.0
    """
    mine = np.unique(np.concatenate([shingles(text, length) for text in texts]))
    theirs = np.unique(np.concatenate([shingles(text, length) for text in others]))
    return float(np.isin(mine, theirs).mean()) if len(mine) else 0.0
