"""Train a SentencePiece BPE with byte fallback that is lossless: decode(encode(text)) == text for any UTF-8.

Source: Kudo and Richardson 2018, arXiv 1808.06226. Quirks of the library's trainer, and the remedies here:

    U+2581          represents a space, and decodes to one              see data.tokenizer.sentencepiece
    U+2585          a document with it is dropped from training         replaced by NUL
    <s> <unk> ...   documents with them as text are dropped             split by a NUL
    no space        in the training text: " " decodes to U+2581         a sentence with a space is added
    final newlines  stripped from sentences                             followed by a NUL, which is not counted
    long documents  above max_sentence_length dropped silently          cut into long sentences, and the limit raised
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import sentencepiece

from data.config import DEFAULT_VOCAB_SIZE, MIN_VOCAB_SIZE, DataError
from data.tokenizer.sentencepiece import SentencePieceTokenizer

UNK, BOS, EOS = 0, 1, 2
RESERVED_PIECES = 3 + 256  # <unk> <s> </s>, bytes; further control tokens follow the first three
MAX_SENTENCE = 1 << 16  # characters; sentences of 2^20 took the trainer 80 s for 2 MB of two words, instead of 0.3
COVERAGE = 0.9999  # of the text; the rarest characters are spelled in bytes


class VocabularyError(DataError):
    """The text cannot fill the vocabulary. `largest`: the largest vocabulary that it fills."""

    def __init__(self, message: str, largest: int):
        super().__init__(message)
        self.largest = largest


def trainer_options(vocab_size: int, controls: Sequence[str] = ()) -> dict[str, object]:
    """Return the options of SentencePiece's trainer. `controls`: further control tokens, ids 3, 4, … in this order.

    White space gets its own pieces ("    ", "\\n\\n"), for indentation. Measured on the standard
    library's documentation at 2,048 pieces: 3.19 bytes a token, 3.08 without, 2.97 when trained line by line, which
    loses the newlines. Pieces never join two words (3.28, with pieces like "s the"), nor a word and a newline (3.29).
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
        "character_coverage": 1.0,  # rare characters are removed before (see rare_characters)
        "max_sentence_length": 2**30,
        "num_threads": 1,  # the same text gives the same bytes
        "minloglevel": 2,
    }
    return options | {"control_symbols": list(controls)} if controls else options


def escape_text(text: str, controls: Sequence[str] = ()) -> str:
    """Return `text` so that the trainer counts every character except U+2581 and U+2585 (see the module).

    >>> escape_text("a<s>\\n")
    'a<\\x00s>\\n\\x00'
    """
    text = re.sub("[\u2581\u2585]", "\0", text)
    for control in controls:
        text = text.replace(control, f"{control[0]}\0{control[1:]}")
    return re.sub(r"<(?=(?:/?s|unk|0x[0-9A-F]{2})>)", "<\0", text) + "\0"


def trainer_sentences(texts: Iterable[str], vocab_size: int, controls: Sequence[str] = ()) -> list[str]:
    """Return what the trainer gets: escaped sentences of all the text, with NUL for each rare character."""
    parts = (text[i : i + MAX_SENTENCE] for text in texts for i in range(0, len(text), MAX_SENTENCE))
    sentences = [escape_text(part, controls) for part in parts]
    sentences.append(escape_text(" "))  # otherwise spaces have no piece and are spelled in the bytes of U+2581
    max_kept = (vocab_size - RESERVED_PIECES - len(controls)) // 2
    removed = dict.fromkeys(map(ord, rare_characters(sentences, max_kept)), "\0")
    return [sentence.translate(removed) for sentence in sentences] if removed else sentences


def train_tokenizer(texts: Iterable[str], vocab_size: int, controls: Sequence[str] = ()) -> SentencePieceTokenizer:
    """Return a tokenizer of exactly `vocab_size` ids, trained on all of `texts`.

    controls: control tokens besides <s> and </s>, which are among these ids, as ("[MASK]",) for masked language modelling.
    Errors: VocabularyError if the texts have too few distinct pieces, with the largest size that they fill.
    """
    sentences = trainer_sentences(texts, vocab_size, controls)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            **trainer_options(vocab_size, controls),
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


def train_to_fit(
    texts: Sequence[str], vocab_size: int, controls: Sequence[str] = (), *, may_shrink: bool
) -> SentencePieceTokenizer:
    """Return a tokenizer of `vocab_size` ids; with may_shrink the largest that the texts fill, where that is smaller.

    A smaller vocabulary holds fewer characters and may fill even fewer pieces, so sizes are tried in turn.
    Errors: VocabularyError as in `train_tokenizer`; DataError below MIN_VOCAB_SIZE.
    """
    while True:
        try:
            return train_tokenizer(texts, vocab_size, controls)
        except VocabularyError as error:
            if not may_shrink:
                raise
            if error.largest < MIN_VOCAB_SIZE:
                least = f"a tokenizer has {MIN_VOCAB_SIZE} at the least: use more text"
                raise DataError(f"this text can fill {error.largest} pieces, and {least}") from error
            vocab_size = error.largest


def describe_smaller_vocabulary(size: int, default: int = DEFAULT_VOCAB_SIZE) -> str:
    """Return the message about a tokenizer smaller than the default."""
    return f"the text can fill {size:,} pieces, fewer than the default {default:,}: the tokenizer has these"


def rare_characters(sentences: list[str], max_kept: int) -> set[str]:
    """Return the characters without a piece of their own: beyond COVERAGE of the text, or after the `max_kept` most frequent.

    SentencePiece refuses a vocabulary with no room for every character, as a small one has none for Chinese, and its own
    character_coverage is at least 0.98. Here characters take at most half the vocabulary.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    del counts["\0"], counts[" "]  # a space always has a piece
    retained, left = set(), COVERAGE * counts.total()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: max(max_kept, 1)]:
        if left <= 0:
            break
        retained.add(character)
        left -= count
    return counts.keys() - retained
