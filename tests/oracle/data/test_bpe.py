"""The plain BPE makes SentencePiece's pieces, in its order, and gives its ids."""

import random

import pytest
import regex
import sentencepiece

from data.config import MASK, DataConfig
from data.corpus.dedup import deduplicate
from data.corpus.split import split_documents
from data.tokenizer import bpe
from data.tokenizer.bpe import encode_bpe, train_bpe
from data.tokenizer.training import VocabularyError, train_tokenizer, trainer_sentences
from tests.compare import count
from tests.invariant.data.test_tokenizer import ODD, random_texts

LIBRARY = f"sentencepiece {sentencepiece.__version__}"
BLOCKS = [
    (0x20, 0x7F), (0x7F, 0x180), (0x300, 0x530), (0x5D0, 0x5EB), (0x620, 0x700), (0x904, 0x940), (0xE01, 0xE3B),
    (0x10D0, 0x10F1), (0x3041, 0x3097), (0x30A1, 0x3100), (0x4E00, 0x4E20), (0xAC00, 0xAC20), (0x1F600, 0x1F610),
]  # fmt: skip
PARTS = [" ", "  ", "    ", "\n", "\t", "\x1f", "a", "ab", "e", "=", "-", "the", " ret", "\u2581", "\u00e9", "\u4e2d", "\u304b"]


def many_scripts(seed=0):
    """Accents on everything, digits beside letters, characters that two scripts share."""
    draw = random.Random(seed)
    return ["".join(chr(draw.randrange(*draw.choice(BLOCKS))) for _ in range(60)) for _ in range(800)]


def repetitions(seed=1):
    """Pairs that overlap, pieces that several pairs spell, rows of spaces."""
    draw = random.Random(seed)
    return ["".join(draw.choice(PARTS) * draw.randrange(1, 9) for _ in range(draw.randrange(1, 8))) for _ in range(1000)]


def pieces_of(tokenizer, controls=3):
    return {tokenizer.token_bytes[id].decode(): id for id in range(controls + 256, tokenizer.vocab_size)}


def differing(ours, theirs):
    """How many places of two vocabularies differ."""
    return count(abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours.items(), theirs.items(), strict=False)))


@pytest.fixture(scope="module")
def texts(documents):
    """What the tokenizer of the default run was trained on."""
    kept, _ = deduplicate(documents)
    return [document.text for document in split_documents(kept, DataConfig().val_fraction)["train"]]


@pytest.fixture(scope="module")
def tokenizer(stdlib_docs):
    return stdlib_docs.tokenizer


def test_pieces_of_the_built_in_corpus(texts, tokenizer, parity):
    ours = train_bpe(trainer_sentences(texts, 2048), 2048)
    parity("BPE trainer: built-in corpus", LIBRARY, differing(ours, pieces_of(tokenizer)), 0, "exact")


def test_pieces_of_small_corpora(texts, parity):
    for name, corpus in (("documents", texts[:20]), ("scripts", many_scripts()), ("repetitions", repetitions())):
        for size in (500, 1000):
            ours = train_bpe(trainer_sentences(corpus, size, controls=[MASK]), size, controls=4)
            wrong = differing(ours, pieces_of(train_tokenizer(corpus, size, controls=[MASK]), controls=4))
            parity(f"BPE trainer: {name}, {size}", LIBRARY, wrong, 0, "exact")


def test_pieces_until_there_are_no_more(texts, parity):
    """The last ones are made of pairs that no longer occur."""
    for name, corpus in (("documents", texts[:5]), ("scripts", many_scripts()), ("repetitions", repetitions())):
        with pytest.raises(VocabularyError) as caught:
            train_tokenizer(corpus, 100_000)
        size = caught.value.largest
        ours, theirs = train_bpe(trainer_sentences(corpus, size), size), pieces_of(train_tokenizer(corpus, size))
        parity(f"BPE trainer: {name}, all pieces", LIBRARY, differing(ours, theirs), 0, "exact")
        assert train_bpe(trainer_sentences(corpus, 100_000), 100_000).keys() == theirs.keys()


def test_vocabulary_without_room_for_the_characters():
    with pytest.raises(ValueError, match="vocab_size=261: 3 controls, 256 bytes, 3 characters"):
        train_bpe(["abc"], 261)
    assert train_bpe(["abc"], 262) == {"a": 259, "b": 260, "c": 261}


def wrong_ids(tokenizer, texts):
    """Texts with other ids than SentencePiece's, or with ids of another text."""
    pieces, wrong = pieces_of(tokenizer), []
    for text in texts:
        ids = encode_bpe(text, pieces)
        wrong += [text] if ids != tokenizer.encode(text) or tokenizer.decode(ids) != text else []
    return wrong


def test_ids_of_the_built_in_corpus(texts, tokenizer, parity):
    parity("BPE encoder: built-in corpus", LIBRARY, count(wrong_ids(tokenizer, texts)), 0, "exact")


def test_ids_of_any_text(tokenizer, parity):
    anything = [*ODD, *random_texts(10_000)]
    parity("BPE encoder: random Unicode", LIBRARY, count(wrong_ids(tokenizer, anything)), 0, "exact")
    made = train_tokenizer(many_scripts() + repetitions(), 3000)  # it merges in every script
    wrong = wrong_ids(made, [*ODD, *many_scripts(2), *repetitions(3)])
    parity("BPE encoder: scripts and repetitions", LIBRARY, count(wrong), 0, "exact")


@pytest.fixture(scope="module")
def small(texts):
    corpus = texts[:6] + repetitions()[:500]
    sentences, theirs = trainer_sentences(corpus, 600), pieces_of(train_tokenizer(corpus, 600))
    assert differing(train_bpe(sentences, 600), theirs) == 0
    return sentences, theirs


def last_of_equals(pair, times):
    return -times[pair], len("".join(pair)), [-ord(character) for character in "".join(pair).replace(" ", "\u2581")], pair


def any_length(pair, times):
    return -times[pair], "".join(pair).replace(" ", "\u2581"), pair


TRAINERS = {
    "ties: the last of equals": ("priority", last_of_equals),
    "ties: any length": ("priority", any_length),
    "a space as U+0020": ("SPACE", " "),
    "pieces of 15 characters": ("LONGEST", 15),
    "mixed scripts": ("PIECE", regex.compile("(?s) +| ?(?!.*[ \0\x1f\u2585]).+")),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_mutants_of_the_trainer_are_caught(name, small, monkeypatch):
    sentences, theirs = small
    monkeypatch.setattr(bpe, *TRAINERS[name])
    monkeypatch.setattr(bpe, "is_valid", bpe.is_valid.__wrapped__)  # without what it remembers
    assert differing(train_bpe(sentences, 600), theirs) > 0


ENCODERS = {
    "the rightmost of equals": lambda unions: min(unions, key=lambda union: (union[0], -union[1])),
    "left to right": lambda unions: unions[0],
    "the last piece first": max,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_mutants_of_the_encoder_are_caught(name, texts, tokenizer, monkeypatch):
    choose = ENCODERS[name]
    monkeypatch.setattr(bpe, "min", lambda values: choose(values) if isinstance(values, list) else min(values), raising=False)
    assert wrong_ids(tokenizer, texts[:6] + repetitions()[:100])
