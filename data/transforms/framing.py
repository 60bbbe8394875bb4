"""Encode one text or two with special tokens, token types and truncation.

The ids equal transformers' tokenizer(text) and tokenizer(first, second, truncation=True, max_length=…); special tokens written
in a text are parsed.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from data.config import DataError
from data.tokenizer.base import TOKENIZER_CONFIG, TOKENIZER_JSON, VOCAB_TXT, Tokenizer

FIRST, SECOND = "A", "B"
Piece = tuple[int | str, int]  # (a special token's id, FIRST or SECOND; its token type)
CLASSES_WITH_TYPES = ("BertTokenizer", "ElectraTokenizer")  # classes that return token types
CLASSES_WITH_DOUBLE_SEPARATOR = ("RobertaTokenizer", "BartTokenizer")  # </s></s> between two texts


class Encoding(NamedTuple):
    """Ids with special tokens, their token types, and the number of truncated ids."""

    ids: list[int]
    type_ids: list[int]
    truncated: int = 0


def single_template(tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """Return the template of one text: prefix, text, suffix."""
    prefix, suffix = tokenizer.affixes
    return (*((id, 0) for id in prefix), (FIRST, 0), *((id, 0) for id in suffix))


def pair_template(tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """Return the template of two texts: tokenizer.json's, else that of transformers' class, else two single templates."""
    prefix, suffix = tokenizer.affixes
    single = (*((id, 0) for id in prefix), (FIRST, 0), *((id, 0) for id in suffix))
    both = (*single, *((id, 1) for id in prefix), (SECOND, 1), *((id, 1) for id in suffix))
    settings = read_json(tokenizer, TOKENIZER_CONFIG)
    if TOKENIZER_JSON in tokenizer.files:
        processor = read_json(tokenizer, TOKENIZER_JSON).get("post_processor")
        if processor is not None:
            return read_pair_template(processor)
    elif VOCAB_TXT not in tokenizer.files:
        return both
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if not (prefix and suffix) or kind == "T5Tokenizer":
        return both
    if kind in CLASSES_WITH_DOUBLE_SEPARATOR:
        separator = tuple((id, 0) for id in suffix)
        return (*single, *separator, (SECOND, 0), *separator)
    return (*single, (SECOND, 1), *((id, 1) for id in suffix))


def read_pair_template(processor: dict | None) -> tuple[Piece, ...]:
    """Return the template of two texts of a post-processor in tokenizer.json.

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
            raise DataError("tokenizer.json has several post-processors in a row: this is not supported for two texts")
        return read_pair_template(inner[0] if inner else None)
    if kind != "TemplateProcessing":
        raise DataError(f"tokenizer.json has a post_processor of type {kind!r}, which is not supported")
    pieces: list[Piece] = []
    for piece in processor["pair"]:
        if "Sequence" in piece:
            pieces.append((piece["Sequence"]["id"], piece["Sequence"]["type_id"]))
        else:
            token = piece["SpecialToken"]
            pieces += [(id, token["type_id"]) for id in processor["special_tokens"][token["id"]]["ids"]]
    return tuple(pieces)


def read_json(tokenizer: Tokenizer, name: str) -> dict:
    """Return a JSON file of the tokenizer; {} where it is missing or no object."""
    try:
        content = json.loads(tokenizer.files.get(name, b"{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def returns_token_types(settings: dict) -> bool:
    """Return True if transformers' tokenizer(first, second) returns token types: by tokenizer_config.json, else by its class.

    (Of the families here with token types, RoFormer's class returns none.) Without a class, BERT's is assumed.

    >>> [returns_token_types({"tokenizer_class": name}) for name in ("BertTokenizerFast", "PreTrainedTokenizerFast")]
    [True, False]
    """
    if isinstance(names := settings.get("model_input_names"), list):
        return "token_type_ids" in names
    return str(settings.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast") in CLASSES_WITH_TYPES


def truncate_longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the lengths of two texts truncated to `room` ids in total: the longer one first, then both equally.

    Equals "longest_first" of the library tokenizers, which truncation=True selects.

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
    """Callable: framer(text) or framer(first, second) -> Encoding of at most `max_length` ids, special tokens included.

    is_pair: two texts. Errors (DataError): max_length has no room for text; a text without ids and without special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, is_pair: bool = False):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.frame = pair_template(tokenizer) if is_pair else single_template(tokenizer)
        self.special_count = sum(piece not in (FIRST, SECOND) for piece, _ in self.frame)
        settings = read_json(tokenizer, TOKENIZER_CONFIG)
        self.truncates_left = settings.get("truncation_side") == "left"
        if not returns_token_types(settings) or not {TOKENIZER_JSON, VOCAB_TXT} & tokenizer.files.keys():
            self.frame = tuple((piece, 0) for piece, _ in self.frame)
        if max_length <= self.special_count:
            raise DataError(f"{max_length} tokens have no room for a text: {self.special_count} are special tokens")

    @property
    def last_token(self) -> int | None:
        """Special token at the very end; None if there is none."""
        piece = self.frame[-1][0]
        return piece if isinstance(piece, int) else None

    def __call__(self, first: str, second: str | None = None) -> Encoding:
        encoded = [self.tokenizer.encode(text, parse_special=True) for text in (first, second) if text is not None]
        room, lengths = self.max_length - self.special_count, [len(ids) for ids in encoded]
        retained = truncate_longest_first(*lengths, room) if len(encoded) == 2 else (min(lengths[0], room),)
        parts = dict(zip((FIRST, SECOND), map(self._truncate, encoded, retained), strict=False))
        ids: list[int] = []
        type_ids: list[int] = []
        for piece, kind in self.frame:
            part = parts[piece] if isinstance(piece, str) else [piece]
            ids += part
            type_ids += [kind] * len(part)
        if not ids:
            raise DataError("the text is empty, and this tokenizer adds no special tokens: there is nothing to read")
        return Encoding(self.tokenizer.check_ids(ids), type_ids, sum(lengths) - sum(retained))

    def _truncate(self, ids: list[int], length: int) -> list[int]:
        return ids[len(ids) - length :] if self.truncates_left else ids[:length]


def choose_pad_id(
    tokenizer: Tokenizer, last: int | None, known: Iterable[int | None] = (), ends: Iterable[int | None] = ()
) -> int:
    """Return an id for padding that is in the network's vocabulary and differs from `last`, the last token of a text.

    (transformers' classifiers read the last token that is no padding.) known: ids to try first. ends: further ids that end
    texts.
    """
    lasts = {last, *ends}
    wanted = (*known, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unknown_id)
    found = (id for id in wanted if id is not None and id not in lasts and id < tokenizer.vocab_size)
    return next(found, next(id for id in range(len(lasts) + 1) if id not in lasts))
