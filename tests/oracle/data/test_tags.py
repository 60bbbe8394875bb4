"""Words to ids, beside transformers' tokenizer(words, is_split_into_words=True): the ids, and the word of each."""

import random

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import data.transforms.tags
from data.config import DataError
from data.tokenizer.open import load_tokenizer
from data.tokenizer.training import train_tokenizer
from data.transforms.tags import WordFramer, needs_space, tag_labels
from tests.compare import count
from tests.folders import TEXT, byte_level, write_tokenizer
from tests.oracle.model.test_folders import SPECIALS, template
from tests.oracle.train.test_classify import word_piece

WORDS = ["The", "os.path", "list", "naïve", "名前", "(", ")", "<s>", "a b", " c", "abcdefgh", "jumps", "x", "\u2581y", "don't"]


def bpe(folder):
    """A tokenizer as GPT-2's: `transformers` wants add_prefix_space=True to take words."""
    write_tokenizer(folder, byte_level(SPECIALS), SPECIALS)


def framed_bpe(folder):
    write_tokenizer(folder, byte_level(SPECIALS, template("<s> $A </s>", ("<s>", 330), ("</s>", 331))), SPECIALS)


def dummy_prefix(folder):
    """A tokenizer as T5's and LLaMA's: a space before a word comes from the tokenizer."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    made.train_from_iterator(TEXT * 9, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    write_tokenizer(folder, made, ["<pad>", "</s>", "<unk>"])


def ours(folder):
    """The tokenizer that is trained for a run, as transformers opens it."""
    folder.mkdir()
    train_tokenizer(TEXT * 20, 330, controls=["[MASK]"]).save(folder)


# How transformers is given the words: with a space before each where its class has no add_prefix_space for that.
KINDS = {word_piece: str, bpe: " {}".format, framed_bpe: " {}".format, dummy_prefix: str, ours: " {}".format}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_ids_and_words_are_those_of_transformers(kind, tmp_path, parity):
    kind(tmp_path / "made")
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "made"), load_tokenizer(tmp_path / "made")
    draw, wrong = random.Random(0), []
    assert needs_space(tokenizer) == (KINDS[kind] is not str)
    framer = WordFramer(tokenizer, max_length=512)
    for _ in range(200):
        words = draw.choices(WORDS, k=draw.randint(0, 12))
        given = [word if word.startswith(" ") else KINDS[kind](word) for word in words]
        expected = theirs([given], is_split_into_words=True)
        found = framer(words)
        same = found.ids == expected["input_ids"][0] and found.word_ids == expected.word_ids(0)
        wrong += [words] * (not same or found.words != len(words))
    library = f"transformers {transformers.__version__}"
    parity(f"words to ids: {kind.__name__}", library, count(wrong), 0, "ids are equal or wrong")


def test_a_space_before_each_word_is_add_prefix_space(tmp_path):
    """Ids of a byte-level tokenizer that adds the space itself, which needs_space leaves alone, are the same."""
    framed_bpe(tmp_path / "plain")
    made = byte_level(SPECIALS, template("<s> $A </s>", ("<s>", 330), ("</s>", 331)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    write_tokenizer(tmp_path / "adds", made, SPECIALS)
    plain, adds = (load_tokenizer(tmp_path / name) for name in ("plain", "adds"))
    assert needs_space(plain) and not needs_space(adds)
    words = [word for word in WORDS if "<s>" not in word]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "adds")([words], is_split_into_words=True)
    assert WordFramer(plain, max_length=99)(words).ids == WordFramer(adds, max_length=99)(words).ids == theirs["input_ids"][0]


def test_a_text_is_cut_where_a_word_ends(tmp_path):
    """At each length there are as many whole words as have room, in a whole frame; transformers' own cut agrees up to there."""
    word_piece(tmp_path)
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = ["returns", "the-list", "the", "of(value)", "of"]
    whole = WordFramer(tokenizer, max_length=99)(words)
    ends = [len(whole.word_ids) - whole.word_ids[::-1].index(word) for word in range(5)]
    for length in range(3, len(whole.ids) + 1):
        cut = WordFramer(tokenizer, max_length=length)(words)
        assert cut.words == sum(end + 1 <= length for end in ends) and len(cut.ids) <= length
        expected = theirs([words], is_split_into_words=True, truncation=True, max_length=length)
        assert cut.ids[:-1] == expected["input_ids"][0][: len(cut.ids) - 1] and cut.ids[-1] == whole.ids[-1]
        assert cut.word_ids == [*whole.word_ids[: len(cut.ids) - 1], None]
    with pytest.raises(DataError, match="2 tokens have no room for a word: 2 are special tokens"):
        WordFramer(tokenizer, max_length=2)


def test_the_first_sub_word_has_the_label(tmp_path):
    """Labels stand as the course of Hugging Face aligns them (label_all_tokens=False); that of a word without ids nowhere."""
    word_piece(tmp_path)
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    words, label_ids = ["the-list", "", "the", "\u200b", "of(value)"], [1, 4, 0, 4, 3]
    encoding = WordFramer(tokenizer, max_length=99)(words)
    aligned, before = [], None
    for word in theirs([words], is_split_into_words=True).word_ids(0):
        aligned.append(-100 if word is None or word == before else label_ids[word])
        before = word
    assert tag_labels(encoding, label_ids).tolist() == aligned and sorted({*aligned}) == [-100, 0, 1, 3]
    assert sum(label != -100 for label in aligned) == 3 == len(encoding.first_positions) < len(encoding.ids) - 3
    assert data.transforms.tags.tag_names([True, 2], "", "") == ["true", "2"]
