"""Words with a label each to ids with labels: the first sub-word of a word has its label, every other id -100.

Ids and the word of each id equal transformers' tokenizer(words, is_split_into_words=True): every word is tokenized by itself. A
text is cut at the end of a word; transformers' truncation=True cuts inside one.

A tokenizer that writes the space before a word as a part of it (byte-level BPE, our SentencePiece models) gets a space before
every word, the first too, as in transformers with add_prefix_space=True; one that does so by itself (WordPiece, LLaMA's and
T5's dummy prefix, RoBERTa's with add_prefix_space) gets the word alone. `needs_space` asks the tokenizer.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data.config import DataError
from data.messages import format_count
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE
from data.transforms.framing import FIRST, single_template
from data.transforms.labels import label_name

PROBE = ("a", "list")


class WordEncoding(NamedTuple):
    """Ids with special tokens, the index of each id's word (None for special tokens), and the number of words that are left."""

    ids: list[int]
    word_ids: list[int | None]
    words: int

    @property
    def first_positions(self) -> dict[int, int]:
        """The position of each word's first id, by word, for words that have any."""
        found: dict[int, int] = {}
        for position, word in enumerate(self.word_ids):
            if word is not None:
                found.setdefault(word, position)
        return found


def needs_space(tokenizer: Tokenizer) -> bool:
    """Return True where words in a text have other ids than words by themselves, and a space before each mends it."""
    first, second = PROBE
    ids = tokenizer.encode(f"{first} {second}")
    if ids == tokenizer.encode(first) + tokenizer.encode(second):
        return False
    return ids == tokenizer.encode(first) + tokenizer.encode(f" {second}")


class WordFramer:
    """Callable: framer(words) -> WordEncoding of at most `max_length` ids, special tokens included.

    Special tokens written in a word are parsed, as in transformers. Errors (DataError): max_length has no room for a word.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int):
        self.tokenizer, self.max_length, self.has_space = tokenizer, max_length, needs_space(tokenizer)
        pieces = [piece for piece, _ in single_template(tokenizer)]
        place = pieces.index(FIRST)
        self.prefix, self.suffix = pieces[:place], pieces[place + 1 :]
        self.room = max_length - len(self.prefix) - len(self.suffix)
        if self.room < 1:
            raise DataError(f"{max_length} tokens have no room for a word: {max_length - self.room} are special tokens")

    def encode_word(self, word: str) -> list[int]:
        """Return the ids of one word."""
        return self.tokenizer.encode(f" {word}" if self.has_space and not word.startswith(" ") else word, parse_special=True)

    def __call__(self, words: Sequence[str]) -> WordEncoding:
        ids: list[int] = []
        word_ids: list[int | None] = []
        left = len(words)
        for index, word in enumerate(words):
            own = self.encode_word(word)
            if len(ids) + len(own) > self.room:
                left = index
                break
            ids += own
            word_ids += [index] * len(own)
        framed = self.tokenizer.check_ids([*self.prefix, *ids, *self.suffix])
        return WordEncoding(framed, [*[None] * len(self.prefix), *word_ids, *[None] * len(self.suffix)], left)


def tag_labels(encoding: WordEncoding, label_ids: Sequence[int]) -> np.ndarray:
    """Return the label of each position, int64: a word's at its first id, -100 at its other ids and at special tokens.

    >>> tag_labels(WordEncoding([101, 7, 8, 9, 102], [None, 0, 1, 1, None], 2), [3, 5]).tolist()
    [-100, 3, 5, -100, -100]
    """
    labels = np.full(len(encoding.ids), IGNORE, dtype=np.int64)
    for word, position in encoding.first_positions.items():
        labels[position] = label_ids[word]
    return labels


def find_fault(words: object, labels: object, words_column: str, labels_column: str) -> str | None:
    """Return the fault of a record with words and labels, or None.

    >>> find_fault(["a", "b"], ["O"], "words", "labels")
    "2 words in 'words', and 1 label in 'labels': each word has one"
    """
    for column, values in ((words_column, words), (labels_column, labels)):
        if not isinstance(values, list):
            return f"the value of {column!r} is {values!r:.60}, not a list ({type(values).__name__})"
    for place, word in enumerate(words):
        if not isinstance(word, str):
            return f"word {place + 1} in {words_column!r} is {word!r:.60}, not a string"
    if len(words) != len(labels):
        sizes = format_count(len(words), "word"), format_count(len(labels), "label")
        return f"{sizes[0]} in {words_column!r}, and {sizes[1]} in {labels_column!r}: each word has one"
    return None


def tag_names(labels: Sequence[object], place: str, column: str, names: Sequence[str] = ()) -> list[str]:
    """Return the names of a record's labels. `names`: of integer labels, as Hugging Face's ClassLabel has them; without, an
    integer's digits are its name. Errors (DataError) name the record: no label, an integer outside `names`.

    >>> tag_names([0, 2], "a.jsonl:1", "ner_tags", ("O", "B-PER", "I-PER")), tag_names(["O", 1], "", "")
    (['O', 'I-PER'], ['O', '1'])
    """
    found = []
    for label in labels:
        if names and isinstance(label, int) and not isinstance(label, bool):
            if not 0 <= label < len(names):
                raise DataError(f"{place}: the label {label} in column {column!r} is the number of none of {len(names)} names")
            found.append(names[label])
        else:
            found.append(label_name(label, place, column))
    return found


class WordTags:
    """The most frequent tag of each word in training: the baseline that reads a word and no context.

    Of equally frequent tags the first by id is taken; a word that training never saw has the most frequent tag of all.
    """

    def __init__(self, sentences: Iterable[tuple[Sequence[str], Sequence[int]]]):
        counts: dict[str, Counter] = defaultdict(Counter)
        every: Counter = Counter()
        for words, label_ids in sentences:
            for word, id in zip(words, label_ids, strict=True):
                counts[word][id] += 1
                every[id] += 1
        self.usual = self._best(every)
        self.tag_of = {word: self._best(count) for word, count in counts.items()}

    @staticmethod
    def _best(count: Counter) -> int:
        return min(count, key=lambda id: (-count[id], id))

    def __call__(self, words: Sequence[str]) -> list[int]:
        """Return the tag id of each word."""
        return [self.tag_of.get(word, self.usual) for word in words]
