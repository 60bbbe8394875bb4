"""The tokenizer.json that a checkpoint carries gives the ids of the tokenizer that made it."""

import io
import json
import random

import pytest
import sentencepiece

import data.tokenizer.export
from data.config import MASK
from data.tokenizer.open import load_tokenizer
from data.tokenizer.sentencepiece import SentencePieceTokenizer
from data.tokenizer.training import train_tokenizer, trainer_options
from tests.compare import count
from tests.invariant.data.test_tokenizer import ODD, TEXTS, random_texts

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def runs(count):
    """Repeated characters, where the same piece can be merged from several pairs."""
    draw = random.Random(1)
    parts = [" ", "  ", "\n", "a", "e", "=", "-", "*", "    ", "\t", "the", " ret", "\u2581", "\u00e9"]
    for _ in range(count):
        yield "".join(draw.choice(parts) * draw.randrange(1, 9) for _ in range(draw.randrange(1, 8)))


def opened(tokenizer):
    made = tokenizers.Tokenizer.from_str(tokenizer.json_files["tokenizer.json"].decode())
    made.encode_special_tokens = True
    return made


def differ(tokenizer, made, texts):
    return count([text for text in texts if made.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)])


def test_ids_are_equal_on_the_whole_corpus(stdlib_docs, documents, parity):
    tokenizer = stdlib_docs.tokenizer
    made = opened(tokenizer)
    texts = [document.text for document in documents] + ODD + list(random_texts(2000)) + list(runs(5000))
    name = f"tokenizers {tokenizers.__version__}"
    parity("our tokenizer as tokenizer.json", name, differ(tokenizer, made, texts), 0, "ids are equal or wrong")
    assert all(made.decode(tokenizer.encode(text)) == text for text in texts[:200] + ODD)


def test_order_of_merges_matters(stdlib_docs, monkeypatch):
    """The mutant: merges in the order of the alphabet."""
    sort = data.tokenizer.export.list_merges
    monkeypatch.setattr(data.tokenizer.export, "list_merges", lambda ids, score: sorted(sort(ids, score)))
    tokenizer = SentencePieceTokenizer(stdlib_docs.tokenizer.model_bytes)
    assert differ(tokenizer, opened(tokenizer), TEXTS) > 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_transformers_opens_a_checkpoint(tmp_path, model_type):
    tokenizer = train_tokenizer(TEXTS, 360, controls=[MASK])
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.mask_token_id, len(theirs)) == (1, 2, 3, 360)
    for text in [*TEXTS, *ODD, "in [MASK] place"]:
        if "<unk>" not in text:
            assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, parse_special=True)
            assert theirs(text)["input_ids"] == tokenizer.with_special_tokens(tokenizer.encode(text, parse_special=True))
        assert tokenizer.with_special_tokens([7]) == [1, 7, 2]  # masked tokens are guessed in whole documents
        assert theirs.decode(tokenizer.encode(text)) == text


def test_the_model_file_stays_the_one_that_is_read(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 360)
    tokenizer.save(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    again = load_tokenizer(tmp_path)
    assert again.is_lossless and list(again.files) == ["tokenizer.model"] and again.sha256 == tokenizer.sha256
    again.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_what_is_no_such_bpe_is_not_written(tmp_path):
    for changes in ({"model_type": "unigram"}, {"user_defined_symbols": ["return"]}):
        model = io.BytesIO()
        options = trainer_options(360) | {"hard_vocab_limit": False} | changes
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **options)
        tokenizer = SentencePieceTokenizer(model.getvalue())
        assert tokenizer.is_lossless and tokenizer.json_files == {}
