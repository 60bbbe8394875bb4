"""Training a SentencePiece BPE with byte fallback that is lossless: decode(encode(text)) == text for any UTF-8.

Source: Kudo and Richardson 2018, arXiv 1808.06226. What its library does to some text, and what is done about it here:

    U+2581          stands for a space inside, and comes back as one    (data.tokenizer_sentencepiece)
    U+2585          a document that holds it is left out of training    kept from the trainer
    <s> <unk> ...   as text, left out of training                       cut in two for the trainer
    no space        in the trained text: one comes back as U+2581       the trainer is shown one
    final newlines  stripped from what is trained on                    a NUL, which is not counted, is put behind them
    long documents  above max_sentence_length left out in silence       cut far apart, and the limit raised
"""

import io
import re
from collections import Counter
from collections.abc import Iterable

import sentencepiece

from data.config import DataError
from data.tokenizer.sentencepiece import SentencePieceTokenizer

UNK, BOS, EOS = 0, 1, 2
MASK = "[MASK]"  # id 3, where it is asked for
FIRST_PIECES = 3 + 256  # control, bytes
LONGEST = 1 << 16  # characters; sentences of 2^20 took the trainer 80 s for 2 MB of two words, instead of 0.3
COVERAGE = 0.9999  # of the text; the rarest characters are spelled in bytes


class VocabularyError(DataError):
    """A vocabulary that the text cannot fill. `largest`: how many pieces it gives."""

    def __init__(self, message: str, largest: int):
        super().__init__(message)
        self.largest = largest


def trainer_options(vocab_size: int, mask: bool = False) -> dict[str, object]:
    """What SentencePiece's trainer is told, but for the text and its characters. `mask` adds a control piece.

    White space gets pieces of its own ("    ", "\\n\\n"), as text with indentation needs. Measured on the standard
    library's documentation at 2,048 pieces: 3.19 bytes a token, 3.08 without, 2.97 when lines are fed one by one, which
    loses the newlines. Pieces never join two words (3.28, and "s the" for a piece), nor a word and a newline (3.29).
    """
    options = {
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
    return options | {"control_symbols": [MASK]} if mask else options


def feed(text: str, mask: bool = False) -> str:
    """`text` as the trainer must get it, for every character but U+2581 and U+2585 to count (see above).

    >>> feed("a<s>\\n")
    'a<\\x00s>\\n\\x00'
    """
    text = re.sub("[\u2581\u2585]", "\0", text)
    text = text.replace(MASK, "[\0MASK]") if mask else text
    return re.sub(r"<(?=(?:/?s|unk|0x[0-9A-F]{2})>)", "<\0", text) + "\0"


def train_tokenizer(texts: Iterable[str], vocab_size: int, mask: bool = False) -> SentencePieceTokenizer:
    """A tokenizer of exactly `vocab_size` ids, trained on the whole of `texts`; `mask`: one of them is [MASK].

    Raises VocabularyError when the text has too few distinct pieces to fill it, with the largest size that it fills.
    """
    sentences = [feed(text[i : i + LONGEST], mask) for text in texts for i in range(0, len(text), LONGEST)]
    sentences.append(feed(" "))  # without a piece for the space, spaces would be spelled in the bytes of U+2581
    spelled = dict.fromkeys(map(ord, rare(sentences, (vocab_size - FIRST_PIECES - mask) // 2)), "\0")
    sentences = [sentence.translate(spelled) for sentence in sentences] if spelled else sentences
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            **trainer_options(vocab_size, mask),
        )
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        if largest is None:
            raise DataError(f"no tokenizer of {vocab_size} pieces can be trained on this text ({error})") from error
        raise VocabularyError(
            f"--vocab-size {vocab_size} is more than this text can fill: it gives {largest[1]} pieces at most. "
            f"Use --vocab-size {largest[1]}, or more text",
            int(largest[1]),
        ) from error
    return SentencePieceTokenizer(model.getvalue())


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
