"""One interface to every tokenizer, and the choice of its kind by the files of a folder.

    tokenizer.model, spiece.model          SentencePiece            data.tokenizer_sentencepiece
    tokenizer.json                         any, by `tokenizers`     data.tokenizer_json
    vocab.txt                              BERT's WordPiece         data.tokenizer_json

The kinds are imported when a file asks for them: only tokenizer.json and vocab.txt need the library `tokenizers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

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
PROBE = " a  b\t\r\n\n c \u2581\u00e9e\u0301\uff21\U0001f600<s></s>\0"  # what a tokenizer that is not lossless changes


class Tokenizer(ABC):
    """Text to ids and back.

        encode(text)   ids without any control token; with specials=True the text of a control token is that token
        decode(ids)    text; control ids are nothing
        bytes_of       what each id stands for, in UTF-8; b"" for control ids
        special_ids    ids that no text makes: control tokens, and what pads a vocabulary to a network's size
        bos_id eos_id  begin and end a document; one and the same id where a tokenizer has no token that begins (GPT-2)
        mask_id pad_id None where there is none
        lossless       decode(encode(text)) == text, for any text; encode(a) + encode(b) then decodes to a + b
        vocab_size     the network's, when it was given: larger by ids that stand for nothing
        sha256         of all that decides ids
        files          name -> content, byte for byte, of the files that it is made from

    A tokenizer that is not lossless normalises (lower case, NFKC, one space for two, a space put in front).
    `unknown_id`, where there is one, is what it gives for text that it cannot spell.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        bytes_of: list[bytes],
        *,
        roles: dict[str, int | None],
        control_ids: Iterable[int],
        sha256: str,
        vocab_size: int | None,
    ):
        own, asked = len(bytes_of), len(bytes_of) if vocab_size is None else vocab_size
        if asked < own:
            raise DataError(f"the tokenizer has {own} ids, more than the network's vocab_size={asked}")
        self.files, self.sha256, self.vocab_size = files, sha256, asked
        self.bytes_of = bytes_of + [b""] * (asked - own)
        self.special_ids = frozenset(control_ids) | frozenset(range(own, asked))
        eos = roles["bos"] if roles["eos"] is None else roles["eos"]
        if eos is None:
            raise DataError("no token of this tokenizer ends or begins a document (no </s>, [SEP], <|endoftext|> or the like)")
        self.eos_id = eos
        self.bos_id = eos if roles["bos"] is None else roles["bos"]
        self.mask_id, self.pad_id, self.unknown_id = roles["mask"], roles["pad"], roles["unk"]
        self.lossless = False  # until the kind knows

    @abstractmethod
    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The ids of `text`. A lone surrogate, which has no UTF-8, raises UnicodeEncodeError."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are no UTF-8, such as half an emoji, become U+FFFD."""

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """int64 of (vocab_size,): bytes of text each id stands for.

        Of a lossless tokenizer piece_bytes[encode(t)].sum() == len(t.encode()), and bits per byte compare with those of
        any other. Otherwise the sum counts the bytes of the text as the tokenizer normalised it: a space put in front
        is one byte, an unknown token none, capitals and accents that it drops are not counted. Bits per byte are then
        bits per byte of that text, which compares networks with this tokenizer, and others only roughly.
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
        beside = {name: (file.parent / name).read_bytes() for name in SIDE_FILES if (file.parent / name).is_file()}
        if file.suffix == ".model":
            from data.tokenizer_sentencepiece import SentencePieceTokenizer

            return SentencePieceTokenizer(content, vocab_size, name=file.name, beside=beside)
        if file.suffix not in (".json", ".txt"):
            raise DataError(f"not a tokenizer's file: read are {', '.join(FILES)}")
        from data.tokenizer_json import JsonTokenizer

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
