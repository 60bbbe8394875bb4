"""SentencePiece BPE with byte fallback, made lossless: decode(encode(text)) == text for any UTF-8.

Source: Kudo and Richardson 2018, arXiv 1808.06226. What its library does to some text, and what is done about it here:

    U+2581          stands for a space inside, and comes back as one    its three byte pieces are written directly
    U+2585          a document that holds it is left out of training    kept from the trainer
    <s> <unk> ...   as text, left out of training                       cut in two for the trainer
    no space        in the trained text: one comes back as U+2581       the trainer is shown one
    final newlines  stripped from what is trained on                    a NUL, which is not counted, is put behind them
    long documents  above max_sentence_length left out in silence       cut far apart, and the limit raised
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from data.config import DataError

FILE = "tokenizer.model"
SPACE = "\u2581"
UNK, BOS, EOS = 0, 1, 2
FIRST_PIECES = 3 + 256  # control, bytes
LONGEST = 1 << 16  # characters; sentences of 2^20 took the trainer 80 s for 2 MB of two words, instead of 0.3
COVERAGE = 0.9999  # of the text; the rarest characters are spelled in bytes
PROBE = " a  b\t\r\n\n c \u2581\u00e9e\u0301\uff21\U0001f600<s></s>\0"  # what a tokenizer that is not lossless changes


class Tokenizer:
    """Text to ids and back. Control ids (0 `<unk>`, 1 `<s>`, 2 `</s>`) are never made from text, and decode to nothing.

    encode(a) + encode(b) decodes to a + b, though it need not equal encode(a + b).
    """

    bos_id = BOS
    eos_id = EOS

    def __init__(self, model_bytes: bytes):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({error})") from error
        self.model_bytes = model_bytes
        self.vocab_size = self.processor.vocab_size()
        # What each id stands for, in UTF-8: text is put together from these, so that broken sequences stay visible.
        self.bytes_of = [self._bytes_of(i) for i in range(self.vocab_size)]
        self.space_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        ids = self.encode(PROBE)
        if (self.processor.bos_id(), self.processor.eos_id()) != (BOS, EOS) or UNK in ids or self.decode(ids) != PROBE:
            raise DataError(
                "this SentencePiece model does not give back the text it is given, or its <s> and </s> are not 1, 2. "
                "It needs byte fallback, identity normalisation and no dummy prefix, as train_tokenizer asks for"
            )

    def _bytes_of(self, i: int) -> bytes:
        piece = self.processor.id_to_piece(i)
        if self.processor.is_control(i) or self.processor.is_unknown(i):
            return b""
        return bytes([int(piece[3:5], 16)]) if self.processor.is_byte(i) else piece.replace(SPACE, " ").encode()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a model file, or from a folder that holds tokenizer.model."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: no tokenizer can be read there ({error.strerror})") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        Path(folder, FILE).write_bytes(self.model_bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without <s> and </s>. A lone surrogate, which has no UTF-8, raises UnicodeEncodeError."""
        first, *rest = text.split(SPACE)
        try:
            ids = self.processor.encode(first)
            for part in rest:
                ids += self.space_ids
                ids += self.processor.encode(part)
        except RuntimeError:
            text.encode()  # says which character and where; the library says "unable to cast"
            raise
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are no UTF-8, such as half an emoji, become U+FFFD."""
        return b"".join([self.bytes_of[i] for i in ids]).decode(errors="replace")

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.model_bytes).hexdigest()

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """int64 of (vocab_size,): bytes of text each id stands for. piece_bytes[encode(t)].sum() == len(t.encode())."""
        return np.array([len(piece) for piece in self.bytes_of], dtype=np.int64)


def trainer_options(vocab_size: int) -> dict[str, object]:
    """What SentencePiece's trainer is told, but for the text and its characters.

    White space gets pieces of its own ("    ", "\\n\\n"), as text with indentation needs. Measured on the standard
    library's documentation at 2,048 pieces: 3.19 bytes a token, 3.08 without, 2.97 when lines are fed one by one, which
    loses the newlines. Pieces never join two words (3.28, and "s the" for a piece), nor a word and a newline (3.29).
    """
    return {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "unk_id": UNK,
        "bos_id": BOS,
        "eos_id": EOS,
        "pad_id": -1,
        "character_coverage": 1.0,  # what is too rare is kept from the trainer (see rare)
        "max_sentence_length": 2**30,
        "num_threads": 1,  # the same text gives the same bytes
        "minloglevel": 2,
    }


def feed(text: str) -> str:
    """`text` as the trainer must get it, for every character but U+2581 and U+2585 to count (see above).

    >>> feed("a<s>\\n")
    'a<\\x00s>\\n\\x00'
    """
    text = re.sub("[\u2581\u2585]", "\0", text)
    return re.sub(r"<(?=(?:/?s|unk|0x[0-9A-F]{2})>)", "<\0", text) + "\0"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids, trained on the whole of `texts`.

    Raises DataError when the text has too few distinct pieces to fill it, with the largest size that it fills.
    """
    sentences = [feed(text[i : i + LONGEST]) for text in texts for i in range(0, len(text), LONGEST)]
    sentences.append(feed(" "))  # without a piece for the space, spaces would be spelled in the bytes of U+2581
    spelled = dict.fromkeys(map(ord, rare(sentences, (vocab_size - FIRST_PIECES) // 2)), "\0")
    sentences = [sentence.translate(spelled) for sentence in sentences] if spelled else sentences
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            **trainer_options(vocab_size),
        )
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        if largest is None:
            raise DataError(f"no tokenizer of vocab_size={vocab_size} can be trained on this text ({error})") from error
        raise DataError(
            f"vocab_size={vocab_size} is more than this text can fill: it gives {largest[1]} pieces at most. "
            f"Use --vocab-size {largest[1]}, or more text"
        ) from error
    return Tokenizer(model.getvalue())


def rare(sentences: list[str], most: int) -> set[str]:
    """Characters that get no piece of their own: those beyond COVERAGE of the text, and all but the `most` frequent.

    SentencePiece refuses a vocabulary that cannot hold every character it is shown, as a small one cannot for Chinese,
    and its own character_coverage goes no lower than 0.98. Here characters never take more than half the vocabulary.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    del counts["\0"], counts[" "]  # a space always has a piece
    kept, left = set(), COVERAGE * counts.total()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: max(most, 1)]:
        if left <= 0:
            break
        kept.add(character)
        left -= count
    return counts.keys() - kept
