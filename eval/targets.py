"""Targets of a language model: rows of documents, batches of rows, and the network's log-probabilities.

A document's ids, with bos and eos, become rows with a label per position. Rows are batched, and each target gets -log p, its
rank among all tokens, and the largest probability. `eval.perplexity` defines the rows and sums the results.

B rows of a batch, T positions, V vocabulary, N targets, or N ids of a document.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a label that is not scored
LOGITS, TOKENS = 1 << 26, 1 << 14  # upper bounds of a batch if its size is not given: 256 MiB of float32
SOFTMAX = 1 << 24  # logits in one softmax
SIZES = ("bytes", "characters", "words")
MISSING = object()

Ids = Sequence[int] | np.ndarray | Tensor


class Row(NamedTuple):
    """One input sequence and its labels: label_T[t] is the target of position t, or -100."""

    place: int  # index of label_T[0] in the document
    input_T: np.ndarray
    label_T: np.ndarray
    document: int = 0
    size: Sequence[int] = (0, 0, 0)  # bytes, characters and words of the document, in proportion to the row's targets
    is_first: bool = False  # the first row of its document


def with_sizes(documents: Iterable[Ids], texts: Iterable[str] | None, counts: Mapping[str, Iterable[int]]) -> Iterator[tuple]:
    """Yield each document with its numbers of bytes, characters and words; 0 if unknown."""
    if isinstance(texts, str) or (texts is not None and counts):
        raise TypeError(f"texts are counted: either a text for each document, or {', '.join(SIZES)}; got one string, or both")
    given = counts if texts is None else {"texts": texts}
    for place, (document, *found) in enumerate(zip_longest(documents, *given.values(), fillvalue=MISSING)):
        has_more = {name: one is not MISSING for name, one in zip(("documents", *given), (document, *found), strict=True)}
        if not all(has_more.values()):
            ended, more = (" and ".join(name for name in has_more if has_more[name] is state) for state in (False, True))
            raise ValueError(f"there are {place} {ended} but more {more}")
        sizes = dict(zip(given, found, strict=True))
        if text := sizes.get("texts"):
            sizes = {"bytes": len(text.encode()), "characters": len(text), "words": len(text.split())}
        yield document, [sizes.get(name, 0) for name in SIZES]


def add_special_tokens(document: Ids, place: int, vocabulary: int, bos_id: int | None, eos_id: int | None) -> np.ndarray:
    """Check a document's ids and put them between bos and eos, int64."""
    id_N = document.detach().cpu().numpy() if isinstance(document, Tensor) else np.asarray(document)
    if id_N.ndim != 1 or (id_N.size and id_N.dtype.kind not in "iu"):
        raise TypeError(f"document {place} is not a sequence of token ids: {document!r:.60}")
    for n in np.flatnonzero((id_N < 0) | (id_N >= vocabulary))[:1]:
        raise ValueError(f"document {place}, token {n}: id {id_N[n]} is outside the vocabulary of {vocabulary}")
    if len(id_N) and (id_N[0] == bos_id or id_N[-1] == eos_id):
        raise ValueError(f"document {place} has its bos_id={bos_id} or eos_id={eos_id} already: it would be doubled")
    bos, eos = ([] if id is None else [id] for id in (bos_id, eos_id))
    return np.concatenate([bos, id_N, eos]).astype(np.int64)


def row_batches(rows: Sequence[Row], vocabulary: int, batch_size: int | None, *, padded: bool) -> Iterator[list[int]]:
    """Yield batches of row indices, longest rows first; rows of a batch have equal length unless `padded`."""
    order = sorted((i for i, row in enumerate(rows) if len(row.input_T)), key=lambda i: -len(rows[i].input_T))
    start = 0
    while start < len(order):
        longest = len(rows[order[start]].input_T)
        size = batch_size or max(1, min(LOGITS // vocabulary, TOKENS) // longest)
        batch = [i for i in order[start : start + size] if padded or len(rows[i].input_T) == longest]
        start += len(batch)
        yield batch


class TargetScorer:
    """Runs the network on batches of rows and scores their targets."""

    def __init__(self, network: Callable, device: str | None, vocabulary: int | None):
        parameters = network.parameters() if hasattr(network, "parameters") else ()
        self.network, self.device = network, device or next((weight.device for weight in parameters), "cpu")
        self.vocabulary = vocabulary or self.logits(torch.zeros(1, 1, dtype=torch.int64)).size(-1)

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """Return for each target its row, its place in the document, -log p, its rank (0 is best), and the largest p."""
        shape = len(rows), max(len(row.input_T) for row in rows)
        input_BT, label_BT = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
        for index, row in enumerate(rows):
            input_BT[index, : len(row.input_T)] = torch.from_numpy(row.input_T)
            label_BT[index, : len(row.label_T)] = torch.from_numpy(row.label_T)
        logits_BTV, (row_N, position_N) = self.logits(input_BT), (label_BT != IGNORE).nonzero(as_tuple=True)
        column_3N = torch.stack([row_N, position_N, label_BT[row_N, position_N]]).to(self.device)
        chunks = column_3N.split(max(1, SOFTMAX // self.vocabulary), 1)
        parts = [score_targets(logits_BTV[b, t], label) for b, t, label in chunks]
        nll_N, rank_N, confidence_N = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        place_N = torch.tensor([row.place for row in rows])[row_N] + position_N
        return row_N, place_N, nll_N.double(), rank_N, confidence_N.double()

    def logits(self, input_BT: Tensor) -> Tensor:
        output = self.network(input_BT.to(self.device))
        logits_BTV = getattr(output, "logits", output)
        if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != input_BT.shape:
            raise ValueError(f"logits of shape {tuple(logits_BTV.shape)} for ids of shape {tuple(input_BT.shape)}")
        return logits_BTV


def score_targets(logits_NV: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return -log p and rank of each label, and the largest p, (N,) each, in float32 or wider; of equal logits the lower id
    ranks first, on every device.

    >>> score_targets(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([2]))
    (tensor([0.8620]), tensor([1]), tensor([0.4223]))
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logp_NV, label_N1 = logits_NV.log_softmax(-1), label_N[:, None]
    chosen_N1 = logits_NV.gather(1, label_N1)
    lower_NV = torch.arange(logits_NV.size(1), device=label_N.device) < label_N1
    rank_N = torch.where(lower_NV, logits_NV >= chosen_N1, logits_NV > chosen_N1).sum(1)
    return -logp_NV.gather(1, label_N1)[:, 0], rank_N, logp_NV.amax(1).exp()


@contextmanager
def evaluation_mode(network: Callable) -> Iterator[None]:
    """Disable dropout and gradients, and restore the training mode."""
    training = getattr(network, "training", False)
    if training:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            network.train()
