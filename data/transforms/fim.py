"""Fill in the middle: a document's prefix, middle and suffix in another order, so that a decoder learns to write the middle.

Two orders (Bavarian et al. 2022, arXiv 2207.14255), the tokens PRE, SUF and MID, and an end, which is learned too:

    psm    PRE prefix SUF suffix MID middle END
    spm    PRE SUF suffix MID prefix middle END     (the paper's variant 2, which all published models have)

`FORMATS` has the names of these tokens in published tokenizers. A document is cut at two characters, each uniform in
[0, length], sorted; any part may be empty. Cuts of characters rather than tokens, since a user's gap may begin inside a token
(section 4.4 of the paper); the parts are then tokenized each by itself. Joined again in the text's order they are the document.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.config import DataError
from data.packing.blocks import FILLER
from data.tokenizer.base import Tokenizer

STREAM = 0x66696D  # "fim", half of the key: separates these random numbers from other uses of the seed
VALIDATION_STEP = 2**64 - 1  # never reached in training: the fixed gaps of validation
CONTEXT, DOCUMENT = 0, 1  # part of the counter: the level of a transform
OTHER, PREFIX, SUFFIX, MIDDLE = range(4)  # kinds of positions; the end is a part of the middle
PRE, SUF, MID, END = "PRE", "SUF", "MID", "END"
PARTS = {"prefix": PREFIX, "suffix": SUFFIX, "middle": MIDDLE}
PSM = (PRE, "prefix", SUF, "suffix", MID, "middle")
SPM = (PRE, SUF, "suffix", MID, "prefix", "middle")
MARK = "\u263a"  # a character in front of a text, so that a tokenizer puts its space before that and not before the text


@dataclass(frozen=True)
class Format:
    """The tokens and orders of a published format.

        names      of PRE, SUF and MID; of "PAD", which fills a suffix; of END, where it is not the tokenizer's eos
        orders     by name, as sequences of tokens and parts
        published  the orders that the published models were trained with: the first one is for generation
        is_joined  in the order spm, prefix and middle are tokenized together, without a seam
    """

    names: Mapping[str, str]
    orders: Mapping[str, tuple[str, ...]]
    published: tuple[str, ...]
    is_joined: bool = False


def name_tokens(prefix: str, suffix: str, middle: str, pad: str | None = None, end: str | None = None) -> dict[str, str]:
    """Return the names of a format's tokens, without those that it lacks."""
    named = {PRE: prefix, SUF: suffix, MID: middle, "PAD": pad, END: end}
    return {role: name for role, name in named.items() if name is not None}


BOTH = {"psm": PSM, "spm": SPM}
FORMATS = {
    # bigcode-project/Megatron-LM: prefix and middle apart in spm
    "starcoder": Format(name_tokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"), BOTH, ("psm", "spm")),
    "santacoder": Format(name_tokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<fim-pad>"), BOTH, ("psm", "spm")),
    # Rozière et al. 2023, arXiv 2308.12950: prefix and middle together in spm; an end of its own
    "codellama": Format(
        name_tokens("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", end="\u2581<EOT>"), BOTH, ("psm", "spm"), is_joined=True
    ),
    # Published in one order; spm is made of the same tokens when it is asked for
    "qwen": Format(name_tokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"), BOTH, ("psm",)),
    "deepseek": Format(
        name_tokens("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"), BOTH, ("psm",)
    ),
    # For generation alone: how its middles end in training is not published
    "codestral": Format({PRE: "[PREFIX]", SUF: "[SUFFIX]"}, {"spm": (SUF, "suffix", PRE, "prefix", "middle")}, ("spm",)),
}


def find_format(tokenizer: Tokenizer) -> str | None:
    """Return the name of the format whose tokens a tokenizer has; None where there is none."""
    known = tokenizer.control_tokens.keys() | tokenizer.added_tokens.keys()
    needed = {name: {format.names[role] for role in format.names if role != "PAD"} for name, format in FORMATS.items()}
    return next((name for name, names in needed.items() if names <= known), None)


class Choice(NamedTuple):
    """The random choices for one text."""

    order: str | None  # None: it stays left to right
    first: int  # 64 random bits for each cut
    second: int


class FillInMiddle:
    """The transform of one tokenizer and format: a pure function of (seed, step or epoch, place).

    rate: the share of texts that are transformed; spm_rate: of these, in the order spm. Errors (DataError): the tokenizer lacks
    a token of the format, or the id that ends a middle.
    """

    def __init__(self, tokenizer: Tokenizer, format: str, *, rate: float = 0.5, spm_rate: float = 0.5, seed: int = 0):
        self.tokenizer, self.name, self.format = tokenizer, format, FORMATS[format]
        self.rates, self.seed = (rate, spm_rate), seed
        known = tokenizer.control_tokens | tokenizer.added_tokens
        names = self.format.names
        if missing := [name for role, name in names.items() if name not in known and role != "PAD"]:
            raise DataError(describe_missing(tokenizer, format, missing))
        self.ids = {role: known[name] for role, name in names.items() if name in known}
        tokenizer.check_ids(list(self.ids.values()))
        end_id = self.ids.get(END, tokenizer.eos_id)
        if end_id is None:
            raise DataError("this tokenizer has no token that ends a text: a middle would not end")
        self.end_id, self.pad_id = end_id, self.ids.get("PAD")
        self.bos_ends = end_id == tokenizer.bos_id  # the bos of the next document ends a middle
        # tokens that the tokenizer finds in a text: tokenizer.json does not mark them as special (Qwen's)
        self.found_in_text = {name: known[name] for name in names.values() if name in tokenizer.added_tokens}
        self.found_in_text = {name: id for name, id in self.found_in_text.items() if name not in tokenizer.control_tokens}
        self.written = re.compile("|".join(map(re.escape, self.found_in_text)))

    # ---- text

    def encode(self, text: str, *, is_first: bool = False) -> list[int]:
        """Encode a part; a token of the format that is written in the text stays text.

        Where it does not begin a document, the space that a SentencePiece tokenizer puts before a text is left out.
        """
        found = self.written.finditer(text) if self.found_in_text else ()
        cuts = [0, *(match.start() + 1 for match in found), len(text)]  # inside a name, which is no token then
        parts = [text[start:end] for start, end in pairwise(cuts)]
        return [id for i, part in enumerate(parts) for id in self._encode_part(part, is_first=is_first and i == 0)]

    def _encode_part(self, text: str, *, is_first: bool) -> list[int]:
        if is_first or self.tokenizer.is_lossless:
            return self.tokenizer.encode(text)
        mark, ids = self.tokenizer.encode(MARK), self.tokenizer.encode(MARK + text)
        return ids[len(mark) :] if ids[: len(mark)] == mark else self.tokenizer.encode(text)

    def as_text(self, body: Sequence[int]) -> list[int]:
        """Return ids of a text without the format's tokens: where it has their names, they are spelled in letters."""
        is_plain = not self.found_in_text or set(body).isdisjoint(self.found_in_text.values())
        return [*body] if is_plain else self.encode(self.tokenizer.decode(body))

    def split(self, text: str, choice: Choice) -> dict[str, str]:
        """Cut a text at two characters; return its parts by name. 64 bits are uniform up to length / 2^64."""
        start, end = sorted(bits % (len(text) + 1) for bits in (choice.first, choice.second))
        return {"prefix": text[:start], "middle": text[start:end], "suffix": text[end:]}

    def encode_parts(self, parts: Mapping[str, str], order: str, *, begins: bool = True) -> dict[str, list[int]]:
        """Encode the parts; `begins`: they begin a document.

        In the order spm of a joined format the middle holds prefix and middle, and the prefix is empty.
        """
        if order == "spm" and self.format.is_joined:
            joined = self.encode(parts["prefix"] + parts["middle"], is_first=begins)
            return {"prefix": [], "suffix": self.encode(parts["suffix"]), "middle": joined}
        return {name: self.encode(text, is_first=begins and name == "prefix") for name, text in parts.items()}

    def assemble(self, encoded: Mapping[str, Sequence[int]], order: str) -> tuple[list[int], list[int]]:
        """Return the ids of the parts in an order, with its tokens and without an end, and the kind of each."""
        ids: list[int] = []
        kinds: list[int] = []
        for piece in self.format.orders[order]:
            own = encoded[piece] if piece in PARTS else [self.ids[piece]]
            ids += own
            kinds += [PARTS.get(piece, OTHER)] * len(own)
        return ids, kinds

    def build_prompt(self, prefix: str, suffix: str, order: str | None = None) -> list[int]:
        """Return the ids after which the middle is generated: a transformed text up to its middle.

        order: None is the first published one. In the order spm of a joined format the middle goes on without a seam: it may
        complete the last word of the prefix. Errors (DataError): the format lacks the order.
        """
        order = order or self.format.published[0]
        if order not in self.format.orders:
            raise DataError(f"the format {self.name} has no order {order}: it has {', '.join(self.format.orders)}")
        return self.assemble(self.encode_parts({"prefix": prefix, "suffix": suffix, "middle": ""}, order), order)[0]

    # ---- choices

    def choose(self, level: int, step: int, row: int, piece: int = 0) -> Choice:
        """Return the choices for a text: Philox with key (seed, STREAM) and counter (row, piece, level, step)."""
        counter = np.array([row, piece, level, step], dtype=np.uint64)
        key = np.array([self.seed, STREAM], dtype=np.uint64)
        words = np.random.Philox(counter=counter, key=key).random_raw(4).tolist()
        is_moved, is_spm = ((word >> 11) * 2.0**-53 < rate for word, rate in zip(words[:2], self.rates, strict=True))
        order = ("spm" if is_spm else "psm") if is_moved else None
        return Choice(order, words[2], words[3])

    # ---- document level

    def transform_document(self, body: Sequence[int], epoch: int, index: int) -> list[int]:
        """Return the ids of a document in an epoch, without its bos: transformed, then its end; or as they are, then eos.

        body: its ids without bos and eos. Where one id is bos and eos, that of the next document ends this one.
        """
        tokenizer = self.tokenizer
        choice, is_bos_eos = self.choose(DOCUMENT, epoch, index), tokenizer.bos_id == tokenizer.eos_id
        if choice.order is None:
            ids = self.as_text(body)
            return ids if is_bos_eos else [*ids, tokenizer.eos_id]
        parts = self.split(tokenizer.decode(body), choice)
        ids, _ = self.assemble(self.encode_parts(parts, choice.order), choice.order)
        return ids if self.bos_ends else [*ids, self.end_id]

    # ---- context level

    def transform_blocks(self, block_BT1: Tensor, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        """Transform rows of packed documents in place: (ids, kinds), each int64 of (B, T + 1).

        Each piece of a document in a row is a text of its own, and keeps its length: the end of its suffix is truncated, or
        padded (with FILLER behind the piece where the format has no padding). A piece whose suffix is too short for that stays
        left to right. Every transformed piece gets an end, also where its document goes on in another row.
        """
        rows = [self.transform_row(row, step, first_row + r) for r, row in enumerate(block_BT1.tolist())]
        ids_BT1, kinds_BT1 = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
        return ids_BT1, kinds_BT1

    def transform_row(self, row: list[int], step: int, number: int) -> tuple[list[int], list[int]]:
        """Transform one row; `number` is its index in the global batch.

        Where one id is bos and eos, the bos of the next document in the row ends a middle: it has the kind of the middle.
        """
        bos_id = self.tokenizer.bos_id
        starts = sorted({0, *(t for t, id in enumerate(row) if id == bos_id)})
        ids: list[int] = []
        kinds: list[int] = []
        is_unended = False  # the piece before has a middle without an end of its own
        for piece, (start, end) in enumerate(zip(starts, [*starts[1:], len(row)], strict=True)):
            choice = self.choose(CONTEXT, step, number, piece)
            new, new_kinds = self.transform_piece(row[start:end], choice, is_last=end == len(row))
            is_moved = any(new_kinds)
            if is_unended:
                new_kinds[0] = MIDDLE
            ids, kinds, is_unended = ids + new, kinds + new_kinds, is_moved and self.bos_ends
        return ids, kinds

    def transform_piece(self, piece: list[int], choice: Choice, *, is_last: bool) -> tuple[list[int], list[int]]:
        """Transform a piece of a document, which may begin with bos and end with eos, in its own length.

        Where one id is bos and eos, only the last piece of a row gets an end: the others are followed by the next bos.
        """
        if FILLER in piece:
            return piece, [OTHER] * len(piece)
        tokenizer = self.tokenizer
        is_bos_eos = tokenizer.bos_id == tokenizer.eos_id
        begin = piece[:1] if piece[0] == tokenizer.bos_id else []
        body = piece[len(begin) : -1 if piece[-1] == tokenizer.eos_id and not is_bos_eos else None]
        unchanged = [*begin, *self.as_text(body), *piece[len(begin) + len(body) :]][: len(piece)], [OTHER] * len(piece)
        text = tokenizer.decode(body)
        if choice.order is None or not text or "\ufffd" in text:  # a row may begin or end inside a character
            return unchanged
        end = [] if self.bos_ends and not is_last else [self.end_id]
        parts = self.encode_parts(self.split(text, choice), choice.order, begins=bool(begin))
        tokens_added = sum(name not in PARTS for name in self.format.orders[choice.order])
        excess = len(begin) + tokens_added + sum(map(len, parts.values())) + len(end) - len(piece)
        if excess > len(parts["suffix"]):
            return unchanged
        if excess > 0:
            parts["suffix"] = parts["suffix"][: len(parts["suffix"]) - excess]
        elif self.pad_id is not None:
            parts["suffix"] = [*parts["suffix"], *[self.pad_id] * -excess]
        ids, kinds = self.assemble(parts, choice.order)
        ids, kinds = [*begin, *ids, *end], [*[OTHER] * len(begin), *kinds, *[MIDDLE] * len(end)]
        fillers = len(piece) - len(ids)
        return ids + [FILLER] * fillers, kinds + [OTHER] * fillers


def describe_missing(tokenizer: Tokenizer, format: str, missing: Sequence[str]) -> str:
    """Return the message about tokens that a tokenizer lacks."""
    other = find_format(tokenizer)
    advice = (
        f"it has those of another format: --fim.format {other}"
        if other is not None and other != "codestral"
        else "add them to its folder with transformers (tokenizer.add_special_tokens, save_pretrained), and give the network "
        "rows for them (python -m model resize FOLDER --vocab-size N --out DIR); a tokenizer that is trained here has them"
    )
    return f"this tokenizer has no {', '.join(missing)}, which --fim.format {format} needs: {advice}"


def keep_middle_labels(labels_BT: Tensor, kinds_BT1: Tensor, ignore: int) -> Tensor:
    """Return the labels of middles and their ends alone; `ignore` elsewhere."""
    return labels_BT.masked_fill(kinds_BT1[:, 1:] != MIDDLE, ignore)


def with_wrong_suffix(batch: dict[str, Tensor], kinds_BT1: Tensor, pad_id: int | None = None) -> dict[str, Tensor]:
    """Return the batch with `shuffled_ids` (B, T): the ids, with each gap's suffix replaced by that of another gap.

    The other gap is half of the batch's gaps further on; its suffix is cut, or repeated, to the length. Padding stays.
    """
    ids_BT, shuffled_BT = batch["input_ids"], batch["input_ids"].clone()
    is_suffix_BT = (kinds_BT1[:, :-1] == SUFFIX) & (ids_BT != (-1 if pad_id is None else pad_id))
    gaps = [
        (row, [*places])
        for row, flags in enumerate(is_suffix_BT.tolist())
        for is_suffix, places in groupby(range(len(flags)), flags.__getitem__)
        if is_suffix
    ]
    half = len(gaps) // 2
    for (row, places), (other_row, others) in zip(gaps, [*gaps[half:], *gaps[:half]], strict=True):
        suffix = ids_BT[other_row, others].repeat(-(-len(places) // len(others)))
        shuffled_BT[row, places] = suffix[: len(places)]
    return batch | {"shuffled_ids": shuffled_BT}
