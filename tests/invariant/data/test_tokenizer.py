"""The tokenizer loses nothing: not a byte of any text, and not a document of what it is trained on."""

import io
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch

from data.config import MASK, DataError
from data.tokenizer.open import load_tokenizer
from data.tokenizer.sentencepiece import SentencePieceTokenizer
from data.tokenizer.training import BOS, EOS, UNK, escape_text, train_tokenizer, trainer_options

TEXTS = [
    f"def f{n}(x):\n    return x + {n}  # the sum\n\n\tText, more of the text; caf\u00e9.\n" * 5 for n in range(30)
]
ODD = [
    "", " ", "  two  ", "\t\tx", "\n\n\n", "a\r\nb\r", "nul\0nul", "e\u0301", "\u0301", "\U0001f600",
    "\U0001f468\u200d\U0001f469", "\u2581", "a\u2581 \u2581\u2581b", "\u2047", "\u2585", "<s>", "</s>", "<unk>",
    "<0x41>", " <s> </s>", "\ufeff", "\ufffd", "\uff21\ufb01", "\u2028\u00a0\u3000", " " * 1000, "\u4e2d\u6587",
    "\U0010ffff", "\x1f\x7f\x80",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 360)


def random_texts(count):
    draw = random.Random(0)
    pool = "".join(ODD) + "the text \n"
    for _ in range(count):
        wild = [chr(c) for c in (draw.randrange(0x110000) for _ in range(5)) if not 0xD800 <= c < 0xE000]
        yield "".join(draw.choices(pool, k=draw.randrange(40)) + wild)


def loses(encode, decode, texts):
    return [text for text in texts if decode(encode(text)) != text]


def test_round_trip_of_any_text(tokenizer):
    texts = ODD + list(random_texts(2000))
    assert loses(tokenizer.encode, tokenizer.decode, texts) == []
    # The mutant: the library's own encode and decode.
    assert loses(tokenizer.processor.encode, tokenizer.processor.decode, ODD)


def test_piece_bytes_add_up_to_the_text(tokenizer):
    assert tokenizer.byte_lengths.dtype == np.int64 and tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths[[UNK, BOS, EOS]].tolist() == [0, 0, 0]
    for text in ODD + list(random_texts(500)):
        assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_text_never_makes_control_ids(tokenizer):
    for text in ODD:
        assert not {UNK, BOS, EOS} & set(tokenizer.encode(text))


def test_control_ids_vanish_and_half_a_character_shows(tokenizer):
    ids = [BOS, *tokenizer.encode("a\U0001f600"), EOS]
    assert tokenizer.decode(ids) == "a\U0001f600"
    assert tokenizer.decode(ids[:-2]) == "a\ufffd"
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "a\U0001f600"


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


def test_training_is_deterministic():
    first, second = train_tokenizer(TEXTS, 360), train_tokenizer(iter(TEXTS), 360)
    assert first.model_bytes == second.model_bytes and first.sha256 == second.sha256
    assert first.vocab_size == 360


# What the trainer would leave out: long documents, reserved characters, control pieces, last newlines.
GIVEN = [
    "long " * 5000 + "\n\n",
    "reserved \u2585 here\n",
    "space \u2581 here",
    "<s>, </s>, <unk>, <0x41>\r\n",
    "\n",
    "nul\0",
]


def characters_seen(sentences, **options):
    """What SentencePiece's own log says that it counted, in a process whose standard error can be read."""
    code = (
        "import io, sentencepiece; sentencepiece.SentencePieceTrainer.train("
        f"sentence_iterator=iter({sentences!r}), model_writer=io.BytesIO(), **{options!r})"
    )
    log = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    return int(re.search(r"all chars count=(\d+)", log)[1])


def test_characters_seen_are_characters_given():
    options = trainer_options(300) | {"minloglevel": 0, "hard_vocab_limit": False}
    given = sum(len(re.sub("[\0\u2581\u2585]", "", text)) for text in GIVEN)
    assert characters_seen([escape_text(text) for text in GIVEN], **options) == given
    # The mutants: text fed as it is; the library's own limit on length.
    assert characters_seen(GIVEN, **options) < given
    assert characters_seen([escape_text(text) for text in GIVEN], **options | {"max_sentence_length": 4192}) < given / 10


def test_a_long_document_is_learnt_from():
    text = "zebra quagga " * 150_000  # 2 MB: cut for the trainer
    pieces = set(train_tokenizer([text], 280).token_bytes)
    assert b" quagga" in pieces


def test_white_space_has_pieces_and_no_piece_crosses_words(tokenizer):
    pieces = tokenizer.token_bytes[259:]
    assert any(b"\n" in piece and len(piece) > 1 for piece in pieces)
    assert any(piece.strip(b" ") == b"" and len(piece) > 2 for piece in pieces)
    assert not [piece for piece in pieces if re.search(rb"\S .|\w\n|\n\w", piece)]


def test_more_characters_than_pieces():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 3000))) * 2 + "\u4e2d\u6587" * 500
    tokenizer = train_tokenizer([text], 400)  # no space in it: spaces must come back all the same
    assert tokenizer.vocab_size == 400 and loses(tokenizer.encode, tokenizer.decode, [text, *ODD]) == []


def test_vocabulary_that_the_text_cannot_fill():
    with pytest.raises(DataError, match=r"--vocab-size 5000 .* (\d+) pieces at most.*--vocab-size") as caught:
        train_tokenizer(["to be or not to be"], 5000)
    largest = int(re.search(r"Use --vocab-size (\d+)", str(caught.value))[1])
    assert train_tokenizer(["to be or not to be"], largest).vocab_size == largest


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert load_tokenizer(path).sha256 == tokenizer.sha256 and load_tokenizer(path).is_lossless


def test_roles_and_padding(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id) == (BOS, EOS, None, None)
    assert tokenizer.special_ids == {UNK, BOS, EOS}
    padded = load_tokenizer(tmp_path, vocab_size=384)
    assert padded.vocab_size == len(padded.token_bytes) == len(padded.byte_lengths) == 384
    assert padded.special_ids == {UNK, BOS, EOS, *range(360, 384)} and padded.sha256 == tokenizer.sha256
    assert padded.decode([*padded.encode("a\u2581b"), 383]) == "a\u2581b" and padded.byte_lengths[360:].sum() == 0
    short = load_tokenizer(tmp_path, vocab_size=300)  # a network with fewer rows: what needs a missing one is refused
    assert short.vocab_size == 300 and len(short.token_bytes) == 360 and short.encode("\0") == tokenizer.encode("\0")
    largest = tokenizer.token_bytes[359].decode()
    with pytest.raises(DataError, match=r"has id 3\d\d, and the network's vocabulary ends with 299: .* --vocab-size 360"):
        short.encode(largest)


def test_mask_piece_is_made_when_asked_alone(tokenizer, tmp_path):
    masked = train_tokenizer([*TEXTS, "in [MASK] place"], 360, controls=[MASK])
    assert masked.mask_id == 3 and masked.special_ids == {UNK, BOS, EOS, 3} and masked.vocab_size == 360
    assert loses(masked.encode, masked.decode, [*ODD, "a [MASK] b"]) == []
    assert 3 not in masked.encode("a [MASK] b")
    ids = masked.encode("a [MASK] b</s>", parse_special=True)
    assert ids == [*masked.encode("a "), 3, *masked.encode(" b"), EOS] and masked.decode(ids) == "a  b"
    masked.save(tmp_path)
    assert load_tokenizer(tmp_path).mask_id == 3
    assert tokenizer.encode("a [MASK]", parse_special=True) == tokenizer.encode("a [MASK]")


def test_mask_in_training_text_counts():
    options = trainer_options(300, controls=[MASK]) | {"minloglevel": 0, "hard_vocab_limit": False}
    text = "words around [MASK] in text\n" * 3
    assert characters_seen([escape_text(text, controls=[MASK])], **options) == len(text)
    assert characters_seen([escape_text(text)], **options) < len(text), "the mutant: the trainer takes [MASK] for its own"


def trained_by_the_library(**options):
    model = io.BytesIO()
    options = {"vocab_size": 60, "minloglevel": 2, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **options)
    return model.getvalue()


def test_foreign_models_follow_the_library():
    t5 = {"bos_id": -1, "eos_id": 1, "pad_id": 0, "unk_id": 2}
    llama = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 330}
    for options, roles in ((t5, (1, 1, 0)), (llama, (1, 2, None))):
        model = trained_by_the_library(**options)
        tokenizer = SentencePieceTokenizer(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert not tokenizer.is_lossless and (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == roles
        for text in ODD:
            ids = processor.encode(text)
            assert tokenizer.encode(text) == ids
            ids = [id for id in ids if id != processor.unk_id()]
            for kind in (np.array, torch.tensor):
                assert tokenizer.decode(kind([roles[0], *ids, processor.unk_id(), roles[1]])) == processor.decode(ids)
        assert tokenizer.decode(tokenizer.encode("  two   words")) != "  two   words", "else it would be lossless"
    text = "return the text"  # with Llama's rules the sum counts the space that is put in front
    assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text) + 1
    alone = trained_by_the_library(bos_id=-1, eos_id=-1)
    assert SentencePieceTokenizer(alone).eos_id is None
