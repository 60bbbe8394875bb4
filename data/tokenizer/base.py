"""The interface of every tokenizer. `data.tokenizer.open` chooses the class by the files of a folder."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.config import DataError
from data.tokenizer.chat_templates import parse_chat_templates

TOKENIZER_MODEL, TOKENIZER_JSON, VOCAB_TXT = "tokenizer.model", "tokenizer.json", "vocab.txt"
TOKENIZER_CONFIG = "tokenizer_config.json"
SIDE_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json")  # they give the tokens their roles: bos, eos, mask, pad, …
ADDED_TOKENS = "added_tokens.json"  # beside a tokenizer.model: {name: id} of control tokens that it lacks, with the next ids
PROBE = " a  b\t\r\n\n c \u2581\u00e9e\u0301\uff21\U0001f600<s></s>\0"  # a lossy tokenizer changes this text


class Affixes(NamedTuple):
    """Special tokens that a tokenizer adds around a text: BERT [CLS] and [SEP], LLaMA <s>, T5 </s>, GPT-2 and Qwen none."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


class Tokenizer(ABC):
    """Text to ids and back.

        encode(text)    ids without special tokens; parse_special=True reads a special token written in the text as that token
        decode(ids)     text; special ids decode to nothing
        encode_with_offsets(text)  ids, and the characters of each
        encode_parts(parts)        the same for texts and control tokens side by side: what looks like one in a text stays text
        with_special_tokens(ids)   prefix + ids + suffix, the ids of transformers' tokenizer(text)
        affixes         that prefix and suffix
        token_bytes     UTF-8 bytes of each id; b"" for special ids
        control_tokens  name -> id of the special tokens
        added_tokens    name -> id of tokens that a tokenizer.json adds to its vocabulary, special or not
        special_ids     ids that no text encodes to: special tokens, and ids that pad the vocabulary to the network's
        bos_id eos_id   first and last id of a training document: the affixes, or the separator where there are none
        mask_id pad_id unknown_id  None where there is none; unknown_id replaces text that cannot be spelled
        separator       the name of bos_id where `with_separator` chose it, else None
        is_lossless     decode(encode(text)) == text for any text; encode(a) + encode(b) then decodes to a + b
        vocab_size      the network's, where given: larger (unused ids) or smaller (`check_ids`) than the tokenizer's
        own_size        the number of its own ids, whatever the network's
        sha256          hash of everything that decides ids
        files           name -> content of the files that the tokenizer was read from, byte for byte
        template_files  the same of files beside it that may have chat templates; chat_templates  name -> Jinja text in them

    Without a prefix, one id is both bos_id and eos_id: it ends a document and begins the next. It is the tokenizer's eos, or
    another special token (`with_separator`); a bos that the tokenizer never adds is not used.
    A lossy tokenizer normalizes: lower case, NFKC, one space for two, a space in front.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        token_bytes: list[bytes],
        *,
        roles: dict[str, int | None],
        control_tokens: Mapping[str, int],
        control_ids: Iterable[int],
        affixes: Affixes,
        sha256: str,
        vocab_size: int | None,
    ):
        self.added_tokens: dict[str, int] = {}
        self.template_files: dict[str, bytes] = {}
        own, size = len(token_bytes), len(token_bytes) if vocab_size is None else vocab_size
        self.files, self.sha256, self.own_size, self.vocab_size, self.affixes = files, sha256, own, size, affixes
        self.token_bytes = token_bytes + [b""] * (size - own)
        self.control_tokens = dict(control_tokens)
        self.special_ids = frozenset(i for i in control_ids if i < size) | frozenset(range(own, size))
        end = roles["bos"] if roles["eos"] is None else roles["eos"]
        self.eos_id: int | None = affixes.suffix[-1] if affixes.suffix else end
        self.bos_id: int | None = affixes.prefix[0] if affixes.prefix else self.eos_id
        self.mask_id, self.pad_id, self.unknown_id = roles["mask"], roles["pad"], roles["unk"]
        self.separator: str | None = None
        self.is_lossless = False  # subclasses set it

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, without affixes.

        Errors: UnicodeEncodeError for a lone surrogate; DataError for an id outside the network's vocabulary.
        """
        return self.check_ids(self._encode_text(text, parse_special))

    @abstractmethod
    def _encode_text(self, text: str, parse_special: bool) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return the ids of encode(text, parse_special=True), and offsets N 2: token i has the characters text[begin:end].

        Tokens that spell a character in bytes each have the whole character. Errors: those of `encode`.
        """
        ids = self.encode(text, parse_special=True)
        name_bytes = {id: len(name.encode()) for name, id in self.control_tokens.items()}
        end_N = np.cumsum([name_bytes.get(id) or len(self.token_bytes[id]) for id in ids], dtype=np.int64)
        begin_N = np.concatenate([end_N[:1] * 0, end_N[:-1]])
        character_of_byte = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
        return ids, np.stack([character_of_byte[begin_N], character_of_byte[end_N - 1] + 1], axis=1)

    def encode_parts(self, parts: Sequence[str | int]) -> tuple[list[int], np.ndarray]:
        """Return the ids of texts (str) and control tokens (ids) side by side, and offsets N 2.

        The ids of encode_with_offsets("".join(...)) with each control token by its name, except that a text encodes to no
        control token. Offsets count characters in that joined text. Errors: those of `encode`.
        """
        ids: list[int] = []
        offsets: list[np.ndarray] = []
        at = 0
        for part in parts:
            if isinstance(part, int):
                length = len(self.token_name(part))
                found, offset_N2 = [part], np.array([[0, length]])
            else:
                length = len(part)
                found, offset_N2 = self._encode_part(part)
            ids += found
            offsets.append(offset_N2.reshape(-1, 2) + at)
            at += length
        return self.check_ids(ids), np.concatenate([np.zeros((0, 2), np.int64), *offsets])

    def _encode_part(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return ids and offsets of plain text; a lossless tokenizer's tokens spell it byte by byte."""
        ids = self._encode_text(text, False)
        end_N = np.cumsum([len(self.token_bytes[id]) for id in ids], dtype=np.int64)
        begin_N = np.concatenate([end_N[:1] * 0, end_N[:-1]])
        character_of_byte = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
        return ids, np.stack([character_of_byte[begin_N], character_of_byte[end_N - 1] + 1], axis=1)

    @abstractmethod
    def with_added_tokens(self, names: Sequence[str]) -> "Tokenizer":
        """Return a copy with further control tokens, whose ids follow its own; its files hold them.

        The network's rows for them may exist already, unused, or are added (`model.resize.add_rows`).
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Bytes that are no valid UTF-8, such as half an emoji, become U+FFFD."""

    def with_special_tokens(self, ids: Iterable[int]) -> list[int]:
        """Return prefix + ids + suffix, as transformers' tokenizer(text) does."""
        return self.check_ids([*self.affixes.prefix, *ids, *self.affixes.suffix])

    def check_ids(self, ids: list[int]) -> list[int]:
        """Return `ids`. Raise DataError for one outside the network's vocabulary: some tokenizers have untrained tokens."""
        if self.vocab_size < len(self.token_bytes) and ids and (largest := max(ids)) >= self.vocab_size:
            is_control, count = largest in self.control_tokens.values(), len(self.token_bytes)
            name = self.token_name(largest) if is_control else self.token_bytes[largest].decode(errors="replace")
            raise DataError(
                f"{name!r} has id {largest}, and the network's vocabulary ends with {self.vocab_size - 1}: its tokenizer has "
                f"{count} ids. To give it rows for all: python -m model resize FOLDER --vocab-size {count} --out DIR"
            )
        return ids

    def as_document(self, ids: list[int]) -> list[int]:
        """Return bos + ids + eos, a training document; one id that is both comes first only."""
        begin, end = self.affixes.prefix or (self.bos_id,), self.affixes.suffix or (self.eos_id,)
        return [*begin, *ids, *(() if self.bos_id == self.eos_id else end)]

    def with_separator(self, name: str | None) -> "Tokenizer":
        """Return a copy that separates documents by the special token `name`; None: by its own.

        Errors (DataError): the tokenizer has a prefix, which separates documents already; `name` is no special token; None, and
        the tokenizer has no eos and no bos.
        """
        if name is None:
            if self.eos_id is None:
                raise DataError("no token of this tokenizer ends or begins a document: name one of its own, --separator TOKEN")
            self.check_ids([self.bos_id, self.eos_id])
            return self
        if name not in self.control_tokens:
            raise DataError(f"--separator {name}: not a control token; there are {', '.join(self.control_tokens) or 'none'}")
        if self.affixes.prefix:
            begin = self.token_name(self.bos_id)
            raise DataError(f"--separator {name}: this tokenizer begins each text with {begin}, which separates documents")
        if self.control_tokens[name] == self.eos_id:
            return self
        other = copy.copy(self)
        other.separator = name
        other.bos_id = other.eos_id = self.control_tokens[name]
        other.check_ids([other.eos_id])
        return other

    def token_name(self, id: int) -> str:
        """Return the name of a special token, for messages."""
        return next((name for name, own in self.control_tokens.items() if own == id), f"id {id}")

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Jinja text of the chat templates beside the tokenizer, "default" first; {} without any. Errors: DataError."""
        return parse_chat_templates(self.files | self.template_files)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id, int64 of (vocab_size,).

        Lossless tokenizers: byte_lengths[encode(t)].sum() == len(t.encode()), so bits per byte compare across tokenizers.
        Others: the sum counts the normalized text: an added space is one byte; an unknown token, a dropped capital or accent
        none. `data.sizes` has the bytes of the original text.
        """
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were read, for `load_tokenizer`."""
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)


def first_id(ids: dict[str, int], names: Iterable[str]) -> int | None:
    """Return the id of the first of `names` that exists.

    >>> first_id({"[CLS]": 101, "<s>": 3}, ("<s>", "[CLS]"))
    3
    """
    return next((ids[name] for name in names if name in ids), None)


# Names of special tokens, for files that give no roles. GPT-2's only token ends documents.
WELL_KNOWN_NAMES = {
    "bos": ("<s>", "[CLS]"),
    "eos": ("</s>", "[SEP]", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}
