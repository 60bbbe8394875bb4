"""Refusals of masked-language modelling and next-sentence prediction, each with a remedy."""

import pytest
from tokenizers import processors

from data.config import DataError
from data.tokenizer.open import load_tokenizer
from data.transforms.next_sentence import segment_template
from tests.folders import byte_level, write_tokenizer
from tests.oracle.model.test_folders import SPECIALS
from tests.runs import SETTINGS, arguments, command, write_corpus

MASKED = {k: v for k, v in SETTINGS.items() if k not in ("preset", "val-fraction")} | {"objective": "mlm", "steps": 2}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Three documents, of which one is held out."""
    return write_corpus(tmp_path_factory.mktemp("few") / "corpus", documents=3)


def refused(tmp_path, *options):
    said = command(*arguments(MASKED), *options, "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    assert said.code == 2 and not (tmp_path / "run").exists()
    return " ".join(said.err.replace("│", " ").split())  # tyro writes the errors of options in a frame


def test_a_corpus_without_another_document(few, tmp_path):
    said = refused(tmp_path, "--mlm.nsp", "--corpus", few, "--val-fraction", 0.34)
    assert "has 1 document of two tokens and more: a second segment that is not the next" in said
    assert "leave --mlm.nsp out" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mlm.probability", 0), "--mlm.probability 0.0: must be above 0"),
        (("--mlm.mask-replace-prob", 0.95), "--mlm.mask-replace-prob 0.95 and --mlm.random-replace-prob 0.1: shares"),
        (("--mlm.random-replace-prob", -0.1), "neither below 0, and their sum at most 1"),
        (("--mlm.nsp", "--mlm.short", 1.5), "--mlm.short 1.5: a share of the pairs"),
        (("--mlm.short", 0.1), "--mlm.short would have no effect: it cuts pairs of segments: add --mlm.nsp"),
        (("--mlm.nsp", "--context", 7), "room for 3 tokens of text: two segments need 4 at least"),
    ],
)
def test_settings_that_mean_nothing(options, message, few, tmp_path):
    assert message in refused(tmp_path, *options, "--corpus", few, "--val-fraction", 0.34)


PAIRED = {
    "none": (None, "before the first"),
    "behind": (("$A </s>", "$A </s> $B </s>"), "before the first"),
    "in front": (("<s> $A", "<s> $A $B:1"), "between the two"),
}


@pytest.mark.parametrize("kind", PAIRED)
def test_a_tokenizer_without_special_tokens_around_two_texts(kind, tmp_path):
    template, where = PAIRED[kind]
    special_tokens = [("<s>", 330), ("</s>", 331)]
    around = template and processors.TemplateProcessing(*template, special_tokens=special_tokens)
    write_tokenizer(tmp_path, byte_level(SPECIALS, around), SPECIALS)
    with pytest.raises(DataError, match=f"--mlm.nsp: this tokenizer has no special token {where}"):
        segment_template(load_tokenizer(tmp_path))
