"""One text or two as a tokenizer frames them: control tokens around, token types, and a cut that leaves them whole.

The ids are those of transformers' tokenizer(text) and tokenizer(first, second, truncation=True, max_length=…), a control token
that is written out in a text included.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from data.config import DataError
from data.tokenizer.base import TOKENIZER_CONFIG, TOKENIZER_JSON, VOCAB_TXT, Tokenizer

FIRST, SECOND = "A", "B"
Piece = tuple[int | str, int]  # a control token's id, FIRST or SECOND; and its token type
CLASSES_WITH_TYPES = ("BertTokenizer", "ElectraTokenizer")  # classes that return token types
CLASSES_WITH_DOUBLE_SEPARATOR = ("RobertaTokenizer", "BartTokenizer")  # </s></s> between two texts


class Encoding(NamedTuple):
    """The ids of a text with what stands around it, their token types, and how many ids of it were cut."""

    ids: list[int]
    type_ids: list[int]
    truncated: int = 0


def single_template(tokenizer: Tokenizer) -> tuple[Piece, ...]:
    prefix, suffix = tokenizer.affixes
    return (*((id, 0) for id in prefix), (FIRST, 0), *((id, 0) for id in suffix))


def pair_template(tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """By tokenizer.json's post-processor; without one, as the class of transformers has it, or each text as one alone."""
    prefix, suffix = tokenizer.affixes
    alone = (*((id, 0) for id in prefix), (FIRST, 0), *((id, 0) for id in suffix))
    both = (*alone, *((id, 1) for id in prefix), (SECOND, 1), *((id, 1) for id in suffix))
    named = read_json(tokenizer, TOKENIZER_CONFIG)
    if TOKENIZER_JSON in tokenizer.files:
        processor = read_json(tokenizer, TOKENIZER_JSON).get("post_processor")
        if processor is not None:
            return read_pair_template(processor)
    elif VOCAB_TXT not in tokenizer.files:
        return both
    kind = str(named.get("tokenizer_class") or "").removesuffix("Fast")
    if not (prefix and suffix) or kind == "T5Tokenizer":
        return both
    if kind in CLASSES_WITH_DOUBLE_SEPARATOR:
        return tuple((piece, 0) for piece, _ in (*alone, *((id, 0) for id in suffix), (SECOND, 0), *((id, 0) for id in suffix)))
    return (*alone, (SECOND, 1), *((id, 1) for id in suffix))


def read_pair_template(processor: dict | None) -> tuple[Piece, ...]:
    """Read what a post-processor of tokenizer.json makes of two texts.

    >>> read_pair_template({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]})
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
        return read_pair_template(inner[0] if inner else None)
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


def read_json(tokenizer: Tokenizer, name: str) -> dict:
    try:
        found = json.loads(tokenizer.files.get(name, b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def returns_token_types(named: dict) -> bool:
    """Say if transformers' tokenizer(first, second) returns token types: by tokenizer_config.json, else by its class. (Of the
    families here with token types, RoFormer's class returns none.) A folder that names no class is taken for BERT's.

    >>> [returns_token_types({"tokenizer_class": name}) for name in ("BertTokenizerFast", "PreTrainedTokenizerFast")]
    [True, False]
    """
    if isinstance(names := named.get("model_input_names"), list):
        return "token_type_ids" in names
    return str(named.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast") in CLASSES_WITH_TYPES


def truncate_longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Give what is left of two texts where `room` ids are: the longer one is cut first, then both alike.

    As the library tokenizers does by "longest_first", which truncation=True means.

    >>> truncate_longest_first(9, 2, 8), truncate_longest_first(9, 7, 9), truncate_longest_first(2, 3, 8)
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
    """framer(text) or framer(first, second) -> Framed, of at most `max_length` ids.

    `is_pair`: of two texts. Errors (DataError): no room beside the control tokens; a text that makes no id at all.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, is_pair: bool = False):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.frame = pair_template(tokenizer) if is_pair else single_template(tokenizer)
        self.special_count = sum(piece not in (FIRST, SECOND) for piece, _ in self.frame)
        named = read_json(tokenizer, TOKENIZER_CONFIG)
        self.truncates_left = named.get("truncation_side") == "left"
        if not returns_token_types(named) or not {TOKENIZER_JSON, VOCAB_TXT} & tokenizer.files.keys():
            self.frame = tuple((piece, 0) for piece, _ in self.frame)
        if max_length <= self.special_count:
            raise DataError(f"{max_length} tokens have no room for a text: {self.special_count} stand around it")

    @property
    def last_token(self) -> int | None:
        """The control token at the very end; None: the text ends by itself."""
        piece = self.frame[-1][0]
        return piece if isinstance(piece, int) else None

    def __call__(self, first: str, second: str | None = None) -> Encoding:
        given = [self.tokenizer.encode(text, parse_special=True) for text in (first, second) if text is not None]
        room, lengths = self.max_length - self.special_count, [len(ids) for ids in given]
        kept = truncate_longest_first(*lengths, room) if len(given) == 2 else (min(lengths[0], room),)
        parts = dict(zip((FIRST, SECOND), map(self._shortened, given, kept), strict=False))
        ids: list[int] = []
        types: list[int] = []
        for piece, kind in self.frame:
            part = parts[piece] if isinstance(piece, str) else [piece]
            ids += part
            types += [kind] * len(part)
        if not ids:
            raise DataError("the text is empty, and this tokenizer puts nothing around it: there is nothing to read")
        return Encoding(self.tokenizer.check_ids(ids), types, sum(lengths) - sum(kept))

    def _shortened(self, ids: list[int], length: int) -> list[int]:
        return ids[len(ids) - length :] if self.truncates_left else ids[:length]


def choose_pad_id(tokenizer: Tokenizer, last: int | None, known: Iterable[int | None] = ()) -> int:
    """An id to pad with that the network has a row for and that ends no text: where classifiers of transformers look for the
    last token, they look for the last that is no pad."""
    wanted = (*known, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unknown_id)
    found = (id for id in wanted if id is not None and id != last and id < tokenizer.vocab_size)
    return next(found, 0 if last != 0 else 1)
