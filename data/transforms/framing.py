"""One text or two as a tokenizer frames them: control tokens around, token types, and a cut that leaves them whole.

The ids are those of transformers' tokenizer(text) and tokenizer(first, second, truncation=True, max_length=…), a control token
that is written out in a text included.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from data.config import DataError
from data.tokenizer.base import JSON, SIDE_FILES, VOCAB, Tokenizer

FIRST, SECOND = "A", "B"
Piece = tuple[int | str, int]  # a control token's id, FIRST or SECOND; and its token type
TYPED = ("BertTokenizer", "ElectraTokenizer")  # classes that return token types
DOUBLED = ("RobertaTokenizer", "BartTokenizer")  # </s></s> between two texts


class Framed(NamedTuple):
    """The ids of a text with what stands around it, their token types, and how many ids of it were cut."""

    ids: list[int]
    types: list[int]
    cut: int = 0


def frame_of_one(tokenizer: Tokenizer) -> tuple[Piece, ...]:
    prefix, suffix = tokenizer.affixes
    return (*((id, 0) for id in prefix), (FIRST, 0), *((id, 0) for id in suffix))


def frame_of_two(tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """By tokenizer.json's post-processor; without one, as the class of transformers has it, or each text as one alone."""
    prefix, suffix = tokenizer.affixes
    alone = (*((id, 0) for id in prefix), (FIRST, 0), *((id, 0) for id in suffix))
    both = (*alone, *((id, 1) for id in prefix), (SECOND, 1), *((id, 1) for id in suffix))
    named = _json(tokenizer, SIDE_FILES[0])
    if JSON in tokenizer.files:
        processor = _json(tokenizer, JSON).get("post_processor")
        if processor is not None:
            return read_pair(processor)
    elif VOCAB not in tokenizer.files:
        return both
    kind = str(named.get("tokenizer_class") or "").removesuffix("Fast")
    if not (prefix and suffix) or kind == "T5Tokenizer":
        return both
    if kind in DOUBLED:
        return tuple((piece, 0) for piece, _ in (*alone, *((id, 0) for id in suffix), (SECOND, 0), *((id, 0) for id in suffix)))
    return (*alone, (SECOND, 1), *((id, 1) for id in suffix))


def read_pair(processor: dict | None) -> tuple[Piece, ...]:
    """Read what a post-processor of tokenizer.json makes of two texts.

    >>> read_pair({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]})
    ((0, 0), ('A', 0), (2, 0), (2, 0), ('B', 0), (2, 0))
    """
    kind = processor["type"] if processor else None
    if kind in (None, "ByteLevel"):
        return (FIRST, 0), (SECOND, 1)
    if kind == "BertProcessing":
        cls, sep = processor["cls"][1], processor["sep"][1]
        return (cls, 0), (FIRST, 0), (sep, 0), (SECOND, 1), (sep, 1)
    if kind == "RobertaProcessing":
        cls, sep = processor["cls"][1], processor["sep"][1]
        return (cls, 0), (FIRST, 0), (sep, 0), (sep, 0), (SECOND, 0), (sep, 0)
    if kind == "Sequence":
        inner = [each for each in processor["processors"] if each["type"] != "ByteLevel"]
        if len(inner) > 1:
            raise DataError("tokenizer.json has several post-processors in a row: how they frame two texts is not read")
        return read_pair(inner[0] if inner else None)
    if kind != "TemplateProcessing":
        raise DataError(f"tokenizer.json has a post_processor of type {kind!r}, which is not read")
    pieces: list[Piece] = []
    for piece in processor["pair"]:
        if "Sequence" in piece:
            pieces.append((piece["Sequence"]["id"], piece["Sequence"]["type_id"]))
        else:
            own = piece["SpecialToken"]
            pieces += [(id, own["type_id"]) for id in processor["special_tokens"][own["id"]]["ids"]]
    return tuple(pieces)


def _json(tokenizer: Tokenizer, name: str) -> dict:
    try:
        found = json.loads(tokenizer.files.get(name, b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def gives_types(named: dict) -> bool:
    """Say if transformers' tokenizer(first, second) returns token types: by tokenizer_config.json, else by its class. (Of the
    families here with token types, RoFormer's class returns none.) A folder that names no class is taken for BERT's.

    >>> gives_types({"tokenizer_class": "BertTokenizerFast"}), gives_types({"tokenizer_class": "PreTrainedTokenizerFast"})
    (True, False)
    """
    if isinstance(names := named.get("model_input_names"), list):
        return "token_type_ids" in names
    return str(named.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast") in TYPED


def lengths_of_two(first: int, second: int, room: int) -> tuple[int, int]:
    """Give what is left of two texts where `room` ids are: the longer one is cut first, then both alike.

    As the library tokenizers does by "longest_first", which truncation=True means.

    >>> lengths_of_two(9, 2, 8), lengths_of_two(9, 7, 9), lengths_of_two(2, 3, 8)
    ((6, 2), (5, 4), (2, 3))
    """
    if first + second <= room:
        return first, second
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


class Framer:
    """framer(text) or framer(first, second) -> Framed, of at most `room` ids.

    `is_pair`: of two texts. Errors (DataError): no room beside the control tokens; a text that makes no id at all.
    """

    def __init__(self, tokenizer: Tokenizer, *, room: int, is_pair: bool = False):
        self.tokenizer, self.room = tokenizer, room
        self.frame = frame_of_two(tokenizer) if is_pair else frame_of_one(tokenizer)
        self.around = sum(piece not in (FIRST, SECOND) for piece, _ in self.frame)
        named = _json(tokenizer, SIDE_FILES[0])
        self.is_left = named.get("truncation_side") == "left"
        if not gives_types(named) or not {JSON, VOCAB} & tokenizer.files.keys():
            self.frame = tuple((piece, 0) for piece, _ in self.frame)
        if room <= self.around:
            raise DataError(f"{room} tokens have no room for a text: {self.around} stand around it")

    @property
    def ends_with(self) -> int | None:
        """The control token at the very end; None: the text ends by itself."""
        piece = self.frame[-1][0]
        return piece if isinstance(piece, int) else None

    def __call__(self, first: str, second: str | None = None) -> Framed:
        given = [self.tokenizer.encode(text, specials=True) for text in (first, second) if text is not None]
        room, lengths = self.room - self.around, [len(ids) for ids in given]
        kept = lengths_of_two(*lengths, room) if len(given) == 2 else (min(lengths[0], room),)
        parts = dict(zip((FIRST, SECOND), map(self._shortened, given, kept), strict=False))
        ids: list[int] = []
        types: list[int] = []
        for piece, kind in self.frame:
            part = parts[piece] if isinstance(piece, str) else [piece]
            ids += part
            types += [kind] * len(part)
        if not ids:
            raise DataError("the text is empty, and this tokenizer puts nothing around it: there is nothing to read")
        return Framed(self.tokenizer.checked(ids), types, sum(lengths) - sum(kept))

    def _shortened(self, ids: list[int], length: int) -> list[int]:
        return ids[len(ids) - length :] if self.is_left else ids[:length]


def pad_id(tokenizer: Tokenizer, last: int | None, known: Iterable[int | None] = ()) -> int:
    """An id to pad with that the network has a row for and that ends no text: where classifiers of transformers look for the
    last token, they look for the last that is no pad."""
    wanted = (*known, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unknown_id)
    found = (id for id in wanted if id is not None and id != last and id < tokenizer.vocab_size)
    return next(found, 0 if last != 0 else 1)
