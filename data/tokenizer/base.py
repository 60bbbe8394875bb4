"""One interface to every tokenizer, and the choice of its kind by the files of a folder.

    tokenizer.model, spiece.model          SentencePiece            data.tokenizer_sentencepiece
    tokenizer.json                         any, by `tokenizers`     data.tokenizer_json
    vocab.txt                              BERT's WordPiece         data.tokenizer_json

The kinds are imported when a file asks for them: only tokenizer.json and vocab.txt need the library `tokenizers`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.config import DataError

SENTENCEPIECE, JSON, SPIECE, BPE, VOCAB = FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # which token has which role
LFS = b"version https://git-lfs.github.com/spec/"  # what a pointer begins with, in place of the file
PROBE = " a  b\t\r\n\n c \u2581\u00e9e\u0301\uff21\U0001f600<s></s>\0"  # what a tokenizer that is not lossless changes


class Affixes(NamedTuple):
    """What a tokenizer puts around a text, by its files: BERT [CLS] and [SEP], LLaMA <s>, T5 </s>, GPT-2 and Qwen nothing."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


class Tokenizer(ABC):
    """Text to ids and back.

        encode(text)   ids without any control token; with specials=True the text of a control token is that token
        decode(ids)    text; control ids are nothing
        framed(ids)    ids with what the folder's tokenizer puts around a text: those of transformers' tokenizer(text)
        affixes        what that is
        bytes_of       what each id stands for, in UTF-8; b"" for control ids
        controls       name -> id of the control tokens
        special_ids    ids that no text makes: control tokens, and what pads a vocabulary to a network's size
        bos_id eos_id  begin and end a training document: what stands around a text, and where that is nothing, the separator
        mask_id pad_id None where there is none
        separator      the name of bos_id where `with_separator` chose it, else None
        lossless       decode(encode(text)) == text, for any text; encode(a) + encode(b) then decodes to a + b
        vocab_size     the network's, when it was given: larger by ids that stand for nothing, or smaller (`checked`)
        sha256         of all that decides ids
        files          name -> content, byte for byte, of the files that it is made from

    Where nothing stands before a text, one id is both bos_id and eos_id: it ends a document and so begins the next. It is the
    tokenizer's eos (no bos is invented that the tokenizer never adds), or another control token (`with_separator`).
    A tokenizer that is not lossless normalises (lower case, NFKC, one space for two, a space put in front).
    `unknown_id`, where there is one, is what it gives for text that it cannot spell.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        bytes_of: list[bytes],
        *,
        roles: dict[str, int | None],
        controls: Mapping[str, int],
        control_ids: Iterable[int],
        affixes: Affixes,
        sha256: str,
        vocab_size: int | None,
    ):
        own, asked = len(bytes_of), len(bytes_of) if vocab_size is None else vocab_size
        self.files, self.sha256, self.vocab_size, self.affixes = files, sha256, asked, affixes
        self.bytes_of = bytes_of + [b""] * (asked - own)
        self.controls = dict(controls)
        self.special_ids = frozenset(i for i in control_ids if i < asked) | frozenset(range(own, asked))
        ends = roles["bos"] if roles["eos"] is None else roles["eos"]
        self.eos_id: int | None = affixes.suffix[-1] if affixes.suffix else ends
        self.bos_id: int | None = affixes.prefix[0] if affixes.prefix else self.eos_id
        self.mask_id, self.pad_id, self.unknown_id = roles["mask"], roles["pad"], roles["unk"]
        self.separator: str | None = None
        self.lossless = False  # until the kind knows

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The ids of `text`. A lone surrogate, which has no UTF-8, raises UnicodeEncodeError; an id that the network has no
        row for raises DataError."""
        return self.checked(self._ids(text, specials))

    @abstractmethod
    def _ids(self, text: str, specials: bool) -> list[int]: ...

    def framed(self, ids: Iterable[int]) -> list[int]:
        return self.checked([*self.affixes.prefix, *ids, *self.affixes.suffix])

    def checked(self, ids: list[int]) -> list[int]:
        """The ids, if the network's vocabulary has each of them: some tokenizers have more, of tokens that nobody trained."""
        if self.vocab_size < len(self.bytes_of) and ids and (largest := max(ids)) >= self.vocab_size:
            is_control, count = largest in self.controls.values(), len(self.bytes_of)
            name = self.name_of(largest) if is_control else self.bytes_of[largest].decode(errors="replace")
            raise DataError(
                f"{name!r} has id {largest}, and the network's vocabulary ends with {self.vocab_size - 1}: its tokenizer has "
                f"{count} ids. To give it rows for all: python -m model resize FOLDER --vocab-size {count} --out DIR"
            )
        return ids

    def document(self, ids: list[int]) -> list[int]:
        """A training document: what begins one, the text, and what ends it. An id that does both stands before the text."""
        begin, end = self.affixes.prefix or (self.bos_id,), self.affixes.suffix or (self.eos_id,)
        return [*begin, *ids, *(() if self.bos_id == self.eos_id else end)]

    def with_separator(self, name: str | None) -> "Tokenizer":
        """The same, with another control token between documents. Errors: where a token stands before each text, which then
        parts them; a name that is no control token's; no token at all (DataError)."""
        if name is None:
            if self.eos_id is None:
                raise DataError("no token of this tokenizer ends or begins a document: name one of its own, --separator TOKEN")
            self.checked([self.bos_id, self.eos_id])
            return self
        if name not in self.controls:
            raise DataError(f"--separator {name}: not a control token; there are {', '.join(self.controls) or 'none'}")
        if self.affixes.prefix:
            begin = self.name_of(self.bos_id)
            raise DataError(f"--separator {name}: this tokenizer begins each text with {begin}, which parts documents")
        if self.controls[name] == self.eos_id:
            return self
        other = copy.copy(self)
        other.separator = name
        other.bos_id = other.eos_id = self.controls[name]
        other.checked([other.eos_id])
        return other

    def name_of(self, id: int) -> str:
        """The name of a control token, for messages."""
        return next((name for name, own in self.controls.items() if own == id), f"id {id}")

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are no UTF-8, such as half an emoji, become U+FFFD."""

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """int64, for each id: the bytes of text that it stands for.

        Of a lossless tokenizer piece_bytes[encode(t)].sum() == len(t.encode()), and bits per byte compare with those of
        any other. Otherwise the sum counts the bytes of the text as the tokenizer normalised it: a space put in front
        is one byte, an unknown token none, capitals and accents that it drops are not counted. `data.sizes` has the bytes of
        the text itself.
        """
        return np.array([len(piece) for piece in self.bytes_of], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """The files that `load_tokenizer` makes this tokenizer from, byte for byte as they came."""
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        return load_tokenizer(path)


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a folder, or of one of its files; `vocab_size` is the network's, which may be larger.

    The first of FILES that is there decides, but that a tokenizer.model which is not lossless gives way to a
    tokenizer.json: published networks were trained with the ids of the latter. Raises DataError, which names the file.
    """
    path = Path(path)
    if not path.is_dir():
        return read_tokenizer(path, vocab_size)
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise DataError(
            f"{path}: no tokenizer can be read there: none of {', '.join(FILES)} exists. "
            "(transformers' AutoTokenizer.from_pretrained(…).save_pretrained writes a tokenizer.json for most models)"
        )
    if found[0].name == BPE:
        raise DataError(
            f"{found[0]}: the models that carry it (XLM-RoBERTa, mBART, …) shift its ids, each in its own way, and only "
            f"a {JSON} beside it says how. Save one with transformers; or name the file itself to read its own ids"
        )
    tokenizer = read_tokenizer(found[0], vocab_size)
    if found[0].name == SENTENCEPIECE and not tokenizer.lossless and path / JSON in found:
        return read_tokenizer(path / JSON, vocab_size)
    return tokenizer


def read_tokenizer(file: Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of one file, its kind told by the name."""
    try:
        content = file.read_bytes()
        if content.startswith(LFS):
            raise DataError("a Git LFS pointer, not the file: fetch it with `git lfs pull`")
        beside = {name: (file.parent / name).read_bytes() for name in SIDE_FILES if (file.parent / name).is_file()}
        if file.suffix == ".model":
            from data.tokenizer.sentencepiece import SentencePieceTokenizer

            return SentencePieceTokenizer(content, vocab_size, name=file.name, beside=beside)
        if file.suffix not in (".json", ".txt"):
            raise DataError(f"not a tokenizer's file: read are {', '.join(FILES)}")
        from data.tokenizer.tokenizer_json import JsonTokenizer

        return JsonTokenizer({(JSON if file.suffix == ".json" else VOCAB): content} | beside, vocab_size)
    except OSError as error:
        raise DataError(f"{file}: no tokenizer can be read there ({error.strerror})") from error
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def first_id(ids: dict[str, int], names: Iterable[str]) -> int | None:
    """The id of the first of `names` that there is.

    >>> first_id({"[CLS]": 101, "<s>": 3}, ("<s>", "[CLS]"))
    3
    """
    return next((ids[name] for name in names if name in ids), None)


# What control tokens are called where no file says which has which role. GPT-2's one token ends documents.
WELL_KNOWN = {
    "bos": ("<s>", "[CLS]"),
    "eos": ("</s>", "[SEP]", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}
