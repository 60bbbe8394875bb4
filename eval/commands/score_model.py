"""Score a language model on text: perplexity of a causal model, pseudo-perplexity of a masked one."""

import itertools
import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from eval.commands.options import Perplexity
from eval.commands.score_texts import print_result
from eval.commands.texts import EvalError

if TYPE_CHECKING:
    from numpy import ndarray

    from data.tokenizer.base import Tokenizer
    from eval.commands.scoring import Document, Opened
    from eval.perplexity import TokenScores


def score_model(options: Perplexity) -> None:
    """Score the model of a command line and print the result, with notes on standard error."""
    from eval.commands.scoring import ReadingNotes, held_out_documents, open_folder, read_documents
    from eval.report import score_single

    opened = open_folder(options.model, device=options.device, threads=options.threads)
    metric, room = build_metric(options, opened)
    notes = ReadingNotes()
    if options.corpus:
        text = " ".join(options.corpus)
        documents = read_documents(opened, options.corpus, options.text_key, options.on_bad_text, notes=notes)
    else:
        text, documents = held_out_documents(opened)
    if room is not None:
        documents = (part for each in documents for part in split_document(each, room, opened.tokenizer.byte_lengths))
    running = {"batch_size": options.batch_size, "device": options.device, "progress": sys.stderr.isatty()}
    statistics_BK = metric.statistics(opened.network, **document_columns(documents, options.tokens), **running)
    for line in notes.lines(opened.tokenizer):
        print(f"note: {line}", file=sys.stderr)
    unit = "document" if len(statistics_BK) == statistics_BK[:, 6].sum() else "window"
    result = score_single(metric, statistics_BK, samples=options.samples, seed=options.seed, unit=unit)
    if not options.json:
        print(f"{options.model} on {text}")
    print_result(options.json, result, {})


def build_metric(options: Perplexity, opened: "Opened") -> tuple["TokenScores", int | None]:
    """Build the metric of a network; return it with the longest document that a masked network can read, else None."""
    from eval.commands.scoring import perplexity_objective
    from eval.perplexity import Perplexity, PseudoPerplexity

    is_masked, network_context = perplexity_objective(opened) == "mlm", opened.network.config.context
    context = options.context or network_context
    if not 2 <= context <= network_context:
        raise EvalError(f"--context {options.context}: from 2 to the network's {network_context:,}")
    bos_id, eos_id = boundary_ids(options, opened.tokenizer, is_held_out=not options.corpus)
    settings = {"bos_id": bos_id, "eos_id": eos_id, "top_k": options.top_k, "bins": options.bins}
    settings["dtype"] = str(next(opened.network.parameters()).dtype).removeprefix("torch.")
    if not is_masked:
        bos_at = "every-window" if options.bos == "every-window" else "document"
        return Perplexity(context=context, stride=options.stride, bos_at=bos_at, **settings), None
    if options.stride is not None:
        raise EvalError("--stride applies to causal models: in a masked one each token sees all of its document")
    if options.bos == "every-window":
        raise EvalError("--bos every-window applies to causal models: a masked one has no windows")
    room = context - (bos_id is not None) - (eos_id is not None)
    return PseudoPerplexity(mask_id=opened.tokenizer.mask_id, **settings), room


def boundary_ids(options: Perplexity, tokenizer: "Tokenizer", *, is_held_out: bool) -> tuple[int | None, int | None]:
    """Return bos_id and eos_id of a document, None if not added; `auto` follows the folder's tokenizer, or for a run's held-out
    text its training."""
    for name, side in zip(("bos", "eos"), tokenizer.affixes, strict=True):
        if len(side) > 1 and getattr(options, name) == "auto" and not is_held_out:
            names = " ".join(map(tokenizer.token_name, side))
            raise EvalError(f"--{name} auto: this tokenizer adds {names}, but one token is scored: give yes or no")
    has_bos, has_eos = (is_held_out or bool(side) for side in tokenizer.affixes)
    has_bos = has_bos if options.bos == "auto" else options.bos != "no"
    has_eos = has_eos if options.eos == "auto" else options.eos == "yes"
    for name, is_wanted, token_id in (("bos", has_bos, tokenizer.bos_id), ("eos", has_eos, tokenizer.eos_id)):
        if is_wanted and token_id is None:
            raise EvalError(f"--{name} {getattr(options, name)}: the tokenizer has no such token")
    return tokenizer.bos_id if has_bos else None, tokenizer.eos_id if has_eos else None


def split_document(document: "Document", longest: int, byte_lengths: "ndarray") -> "Iterator[Document]":
    """Split a document that is too long for the network; bytes are divided in proportion, characters and words unknown."""
    from data.sizes import split_in_proportion

    parts = [document.ids[start : start + longest] for start in range(0, len(document.ids), longest)]
    sizes = split_in_proportion(document.bytes, [int(byte_lengths[ids].sum()) for ids in parts])
    for ids, size in zip(parts, sizes, strict=True):
        yield document._replace(ids=ids, bytes=size, characters=0, words=0)


def document_columns(documents: "Iterator[Document]", tokens: int | None) -> "dict[str, Iterator]":
    """Split documents into parallel iterators of ids and sizes; a document is released once it is scored."""
    copies = itertools.tee(take_tokens(documents, tokens), 4)
    names = {"documents": "ids", "bytes": "bytes", "characters": "characters", "words": "words"}
    return {name: map(attrgetter(field), rows) for (name, field), rows in zip(names.items(), copies, strict=True)}


def take_tokens(documents: "Iterator[Document]", tokens: int | None) -> "Iterator[Document]":
    """Yield documents up to the one that reaches this number of tokens; None yields all."""
    read = 0
    for document in documents:
        yield document
        read += len(document.ids)
        if tokens is not None and read >= tokens:
            return
