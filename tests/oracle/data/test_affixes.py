"""Special tokens around a text, and texts as records have them, against transformers' tokenizers."""

import pytest
import transformers

from data.tokenizer.base import Affixes
from data.tokenizer.open import load_tokenizer
from data.tokenizer.tokenizer_json import JsonTokenizer
from data.transforms.seq2seq import encode_text
from tests.compare import count
from tests.oracle.data.test_tokenizer_hub import TEXTS, TRICKY, byte_level, unigram, wordpiece

LIBRARY = f"transformers {transformers.__version__}"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    wordpiece(folder)
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_affixes_are_what_transformers_adds(bert, parity):
    ours, theirs = load_tokenizer(bert), transformers.AutoTokenizer.from_pretrained(bert)
    assert isinstance(ours, JsonTokenizer) and ours.affixes == Affixes((theirs.cls_token_id,), (theirs.sep_token_id,))
    wrong = [text for text in TRICKY + TEXTS if ours.with_special_tokens(ours.encode(text)) != theirs(text)["input_ids"]]
    parity("tokenizer: special tokens", LIBRARY, count(wrong), 0, "ids are equal or wrong")


@pytest.mark.parametrize("write", [byte_level, unigram])
def test_without_any(write, tmp_path):
    write(tmp_path)
    assert load_tokenizer(tmp_path).affixes == Affixes((), ())


@pytest.mark.parametrize("length", [None, 3, 7, 500])
def test_a_text_cut_to_a_length(bert, length, parity):
    ours, theirs = load_tokenizer(bert), transformers.AutoTokenizer.from_pretrained(bert)
    cut = {} if length is None else {"truncation": True, "max_length": length}
    wrong = []
    for text in TRICKY + TEXTS:
        ids, whole = encode_text(ours, text, max_length=length)
        wrong += [text] * (ids.tolist() != theirs(text, **cut)["input_ids"] or whole != len(theirs(text)["input_ids"]))
    parity(f"tokenizer: texts of at most {length}", LIBRARY, count(wrong), 0, "ids are equal or wrong")


def test_a_target_ends_with_eos_where_the_tokenizer_adds_none(tmp_path):
    byte_level(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids, whole = encode_text(tokenizer, "return x", add_eos=True)
    assert ids.tolist() == [*tokenizer.encode("return x"), tokenizer.eos_id] and whole == len(ids)
    assert encode_text(tokenizer, "return x", max_length=2, add_eos=True)[0].tolist() == [ids[0], tokenizer.eos_id]
