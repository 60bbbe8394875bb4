"""Whole words against transformers' collator: their groups of tokens exactly, shares of random choices by their errors."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.tokenizer.tokenizer_json import JsonTokenizer
from data.transforms.causal import IGNORE
from data.transforms.masked import mask_tokens
from data.transforms.words import first_of_word, word_edges
from tests.compare import Error, absolute
from tests.runs import WORDS

LIBRARY = f"transformers {transformers.__version__}"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROLES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
ROWS, T = 400, 256


def sentences(count, marks, seed=0):
    """Lines of words of several pieces, with punctuation as `marks` has it."""
    draw, words = random.Random(seed), [*WORDS, *(a + b for a in WORDS for b in WORDS[:9])]
    return [" ".join(word + draw.choice(marks) for word in draw.choices(words, k=draw.randint(5, 20))) for _ in range(count)]


def build(kind):
    """The same tokenizer as the library's and as ours, of so few pieces that words have several."""
    if kind == "WordPiece":
        library, byte_level = Library(models.WordPiece(unk_token="[UNK]")), []
        library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        processor, trainer, size = processors.BertProcessing, trainers.WordPieceTrainer, 110
    else:
        library, byte_level = Library(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        processor, trainer, size = processors.RobertaProcessing, trainers.BpeTrainer, 340
    trainer = trainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=byte_level, show_progress=False)
    library.train_from_iterator(sentences(200, ["", ", ", "."]), trainer)
    library.post_processor = processor(("[SEP]", 3), ("[CLS]", 2))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **ROLES)
    return theirs, JsonTokenizer({"tokenizer.json": library.to_str().encode()})


@pytest.fixture(scope="module", params=["WordPiece", "byte-level"])
def both(request):
    return request.param, *build(request.param)


def collator(theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it masks every chosen token with whole words
        made = transformers.DataCollatorForLanguageModeling(theirs, whole_word_mask=True, mlm_probability=0.15, seed=0)
    made.mask_replace_prob, made.random_replace_prob = 0.8, 0.1
    return made


def their_words(theirs, text):
    """Ids, and the place of the first token of each token's word."""
    encoding = theirs(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    offsets, special = np.array([encoding["offset_mapping"]]), np.array([encoding["special_tokens_mask"]])
    is_no_first = transformers.DataCollatorForLanguageModeling._calc_word_ids_and_prob_mask(offsets, special)[1]
    alone = special.astype(bool)
    place_T = np.arange(len(encoding["input_ids"]))
    return np.array([encoding["input_ids"]]), np.maximum.accumulate(np.where(~is_no_first | alone, place_T, 0), axis=1)


def test_words_equal_transformers(both, parity):
    name, theirs, ours = both
    marks = ["", "", " ,", " ( ", " ."] if name == "WordPiece" else ["", "", ",", " (", ".", "  ", "'s"]
    ids, firsts = their_words(theirs, " ".join(sentences(300, marks, seed=1)))
    mine = first_of_word(ids, word_edges(ours))
    assert len(ids[0]) > 5000 and (mine[0] != np.arange(len(ids[0]))).mean() > 0.2, "words of several tokens"
    error = absolute(torch.from_numpy(mine), torch.from_numpy(firsts))
    parity(f"whole words: groups, {name}", LIBRARY, error, 0, "the same words")


def test_words_of_the_library_s_pre_tokenizer():
    """WordPiece marks no space in front of punctuation: ours are the words that it splits a text into."""
    theirs, ours = build("WordPiece")
    encoding = theirs(text := " ".join(sentences(300, ["", ", ", "(", "'s"], seed=2)))
    firsts: dict = {}
    expected = [t if word is None else firsts.setdefault(word, t) for t, word in enumerate(encoding.word_ids())]
    mine = first_of_word(np.array([encoding["input_ids"]]), word_edges(ours))[0].tolist()
    assert mine == expected
    assert mine != their_words(theirs, text)[1][0].tolist(), "the difference that the docstring states"


def test_where_ours_differ_from_byte_level_offsets():
    theirs, ours = build("byte-level")
    for text, mine, other in (
        ("a\nb", [1, 2, 3], [1, 1, 1]),  # a line break ends a word
        ("\u65e5x", [1, 1, 1, 1], [1, 2, 3, 3]),  # one character of three bytes, and a letter
    ):
        ids, firsts = their_words(theirs, text)
        assert first_of_word(ids, word_edges(ours))[0, 1:-1].tolist() == mine
        assert firsts[0, 1:-1].tolist() == other


def rows(theirs):
    """Rows of T tokens, each with [CLS] in front and [SEP] behind, and what the collator wants of them."""
    text = " ".join(sentences(6000, ["", " ,", " ."], seed=3))
    encoding = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = (np.array(encoding[key]) for key in ("input_ids", "offset_mapping"))
    inner = T - 2
    ids_BT = np.pad(ids[: ROWS * inner].reshape(ROWS, inner), ((0, 0), (1, 1)))
    ids_BT[:, 0], ids_BT[:, -1] = 2, 3
    offsets_BT2 = np.pad(offsets[: ROWS * inner].reshape(ROWS, inner, 2), ((0, 0), (1, 1), (0, 0)))
    return ids_BT, offsets_BT2


def shares(ids_BT, input_ids, labels, first_BT, mask_id):
    """(part, whole) of each share: chosen words, masked and kept tokens of the chosen, half-masked words of two tokens."""
    chosen, masked = labels != IGNORE, input_ids == mask_id
    is_first = (first_BT == np.arange(T)) & (ids_BT > 4)
    sizes = np.zeros_like(ids_BT)
    np.add.at(sizes, (np.arange(len(ids_BT))[:, None], first_BT), 1)
    masked_in_word = np.zeros_like(ids_BT)
    np.add.at(masked_in_word, (np.arange(len(ids_BT))[:, None], first_BT), masked.astype(int))
    of_two = is_first & chosen & (sizes == 2)
    assert (chosen == np.take_along_axis(chosen, first_BT, 1)).all(), "a word is chosen as a whole"
    assert not chosen[ids_BT < 5].any() and (labels[chosen] == ids_BT[chosen]).all()
    return {
        "words chosen": (is_first & chosen, is_first),
        "tokens masked": (masked & chosen, chosen),
        "tokens kept": ((input_ids == ids_BT) & chosen, chosen),
        "words half masked": (of_two & (masked_in_word == 1), of_two),
    }


def test_shares_equal_transformers(both, parity):
    name, theirs, ours = both
    ids_BT, offsets_BT2 = rows(theirs)
    edges = word_edges(ours)
    first_BT = first_of_word(ids_BT, edges)
    settings = {"seed": 0, "step": 0, "first_row": 0, "mask_id": 4, "bos_id": 2, "words": edges}
    settings |= {"special_ids": ours.special_ids, "vocab_size": ours.vocab_size}
    mine = [each.numpy() for each in mask_tokens(torch.from_numpy(ids_BT), **settings)]
    features = [{"input_ids": ids, "offset_mapping": offsets} for ids, offsets in zip(ids_BT, offsets_BT2, strict=True)]
    batch = collator(theirs)(features)
    other = [batch[key].numpy() for key in ("input_ids", "labels")]
    both_shares = [shares(ids_BT, *each, first_BT, 4) for each in (mine, other)]
    for what, exact in (("words chosen", 0.15), ("tokens masked", 0.8), ("tokens kept", None), ("words half masked", 0.32)):
        (p, n), (q, m) = [(float(part.sum() / whole.sum()), int(whole.sum())) for part, whole in (s[what] for s in both_shares)]
        assert exact is None or abs(p - exact) < 3 * math.sqrt(exact * (1 - exact) / n), (what, p)
        sigmas = Error(abs(p - q) / math.sqrt(p * (1 - p) / n + q * (1 - q) / m), "standard errors")
        parity(f"whole words: {what}, {name}", LIBRARY, sigmas, 3, "two random shares")
