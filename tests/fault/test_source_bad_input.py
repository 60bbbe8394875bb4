"""Refusals of span corruption and denoising: told in a line with the option, the numbers and what to do."""

import pytest

import data.tokenizer.training
import model.hub
from tests.conftest import randomized, tiny_config
from tests.invariant.train.test_source_runs import options
from tests.runs import WORDS, command, write_corpus
from tests.seq2seq import write_folder

BAD = {  # the options: what is said
    ("span", "--span.density", 1.5): "--span.density 1.5: must be above 0 and below 1",
    ("span", "--span.mean-length", 0.5): "--span.mean-length 0.5: must be at least 1",
    ("span", "--span.sentinels", 0): "--span.sentinels 0: must be at least 1",
    ("span", "--span.mixture", "t5"): "--span.mixture 't5' is no denoiser: MEAN_LENGTH:DENSITY",
    ("span", "--span.mixture", "3:.15", "--span.density", 0.2): "--span.density would have no effect: --span.mixture has",
    ("span", "--span.sentinels", 2): "a text of 52 tokens needs 3 sentinels, and this tokenizer (tokenizer.model",
    ("span", "--context", 2): "a context of 2 tokens is too short",
    ("span", "--preset", "tiny"): "trains networks of the architecture 'encoder-decoder'",
    ("denoise", "--denoise.mask", 1.5): "--denoise.mask 1.5: a fraction, from 0 to 1",
    ("denoise", "--denoise.mask-random", -0.5): "--denoise.mask-random -0.5: a fraction, from 0 to 1",
    ("denoise", "--denoise.poisson", 17): "--denoise.poisson 17.0: must be from 0.1 to 16",
    ("denoise", "--denoise.mask", 0, "--denoise.poisson", 3): "--denoise.poisson would have no effect: --denoise.mask 0 masks",
    ("denoise", "--denoise.mask", 0, "--denoise.mask-random", 0.1): "--denoise.mask-random would have no effect: without",
    ("denoise", "--denoise.mask", 0, "--denoise.permute", 0): "--denoise.mask, permute, insert and rotate are all 0:",
    ("denoise", "--context", 2): "--context 2: a text has 2 special tokens around it, and nothing is left",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("source")
    write_corpus(place / "corpus", 12)
    return place


@pytest.mark.parametrize("given", BAD, ids=lambda given: " ".join(map(str, given)))
def test_options(place, given, tmp_path):
    objective, *more = given
    changes = {name.removeprefix("--"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    said = command(*options(place, objective, **changes), "--out", tmp_path / "run")
    assert said.code == 2 and BAD[given] in said.err, said.err
    assert not (tmp_path / "run").exists()


def init(place, objective, folder, **changes):
    new = ("preset", "dropout", "vocab-size", "width", "depth", "heads")
    line = options(place, objective, init=folder, **changes)
    return [part for i, part in enumerate(line) if part[2:] not in new and (not i or line[i - 1][2:] not in new)]


def test_tokenizers_without_the_tokens(place, tmp_path):
    write_folder(place / "bart", "bart")
    said = command(*init(place, "span", place / "bart"), "--out", tmp_path / "run")
    assert said.code == 2 and "has 0: <extra_id_0> to <extra_id_2> are missing" in said.err, said.err
    assert "add_special_tokens" in said.err and "python -m model resize" in said.err
    said = command(*init(place, "denoise", place / "bart"), "--out", tmp_path / "run")
    assert said.code == 2 and "needs a mask token, and this tokenizer (tokenizer.json" in said.err, said.err


def test_an_encoder_decoder_without_a_start(place, tmp_path):
    """A family of our own, whose config.json may lack it."""
    folder = tmp_path / "vaswani"
    folder.mkdir()
    controls = [f"<extra_id_{number}>" for number in range(3)]
    tokenizer = data.tokenizer.training.train_tokenizer([" ".join(WORDS) * 20], 320, controls)
    network = randomized(tiny_config("vaswani", vocab_size=320, decoder_start_id=None))
    model.hub.save(network, folder)
    tokenizer.save(folder)
    said = command(*init(place, "span", folder, context=48), "--out", tmp_path / "run")
    assert said.code == 2 and "no decoder_start_token_id in its config.json begins targets" in said.err, said.err
