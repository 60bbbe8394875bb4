"""Masked-LM training through the real command, and training that starts from a folder of the Hugging Face kind."""

import json
import math
import re

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import model.__main__
import model.hub
from data.tokenizer.open import load_tokenizer
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from tests.runs import SETTINGS, arguments, assert_same_end, command, further, last_checkpoint, stopped_at, write_corpus
from train.reports.log import read_metrics

MASKED = SETTINGS | {"objective": "mlm", "preset": "tiny-encoder", "optimizer": "muon"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return write_corpus(folder / "corpus"), folder / "cache"


@pytest.fixture(scope="module")
def masked_options(corpus):
    return arguments(MASKED | {"corpus": corpus[0], "cache": corpus[1]})


@pytest.fixture(scope="module")
def run(masked_options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked") / "run"
    said = command(*masked_options, "--sample-every", 160, "--out", folder)
    assert said.code == 0, said.err
    return folder, said.out


def test_what_it_says(run):
    folder, shown = run
    held_out = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]
    keys = {"baseline_loss", "perplexity", "masked_accuracy", "unigram_perplexity", "unigram_accuracy"}
    assert all(set(row) == {"step", "split", "loss", "tokens", "time"} | keys for row in held_out)
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"])) for row in held_out)
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    for part in ("pseudo-perplexity", "masked accuracy", "unigrams", "predictions for masked tokens", f"model fill {folder}"):
        assert part in shown


def test_tokens_are_the_masked_ones(run):
    rows = [row for row in read_metrics(run[0] / "metrics.jsonl") if row["split"] == "train"]
    assert rows[-1]["tokens"] / (160 * 4 * 32) == pytest.approx(0.15, abs=0.01)


def test_a_resume_ends_in_the_same_bytes(run, masked_options, tmp_path):
    """Also where config.toml has no [mlm], as before the objective had settings."""
    stopped_at(70, *masked_options, "--sample-every", 160, "--out", tmp_path / "run")
    settings = (tmp_path / "run" / "config.toml").read_text()
    table = re.compile(r"^\[mlm\]\n(?:[^\[].*\n|\n)*", re.MULTILINE)
    assert "whole_words = false" in table.search(settings)[0]
    (tmp_path / "run" / "config.toml").write_text(table.sub("", settings))
    assert command("--resume", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", run[0])


def test_checkpoint_opens_in_transformers_with_its_tokenizer(run, parity):
    folder, text = last_checkpoint(run[0]), "the file reads a [MASK] of objects"
    theirs, loading = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = load_tokenizer(folder).encode(text, parse_special=True)
    assert transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        ours, other = (network.eval()(torch.tensor([ids])).logits for network in (model.hub.load(folder), theirs))
    library = f"transformers {transformers.__version__}"
    parity("masked-LM checkpoint, logits", library, absolute(ours, other), 1e-5, "float32 rounding")


def fill(*options):
    return command("fill", *options, main=model.__main__.main)


def test_fill_shows_the_best_of_each_gap(run):
    said = fill(run[0], "the [MASK] reads a [MASK] of objects", "--top", 3)
    assert said.code == 0, said.err
    assert said.out.count("%") == 6
    shares = [float(line.split("%")[0].split()[-1]) for line in said.out.splitlines() if "%" in line]
    assert shares[:3] == sorted(shares[:3], reverse=True) and shares[3:] == sorted(shares[3:], reverse=True)
    assert fill(run[0], "the [MASK] reads a [MASK] of objects", "--top", 3).out == said.out
    folder = last_checkpoint(run[0])
    network, tokenizer = model.hub.load(folder).eval(), load_tokenizer(folder)
    # "the" " reads a" " of objects": the space before a gap is the missing token's own
    parts = [tokenizer.encode(part) for part in ("the", " reads a", " of objects")]
    ids = [tokenizer.bos_id, *parts[0], tokenizer.mask_id, *parts[1], tokenizer.mask_id, *parts[2], tokenizer.eos_id]
    with torch.no_grad():
        best = network(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_id)].softmax(-1).max().item()
    assert shares[0] == pytest.approx(100 * best, abs=0.06)


@pytest.mark.parametrize(("text", "message"), [("no gap", "has no gap"), ("a [MASK]\udce9", "not valid UTF-8")])
def test_fill_with_bad_text(text, message, run):
    said = fill(run[0], text)
    assert said.code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out


def test_fill_and_generate_ask_for_their_kind_of_network(run, finished):
    assert "its tokenizer has no mask token" in fill(finished, "the [MASK]").err
    said = command("generate", run[0], main=model.__main__.main)
    assert said.code == 2 and "error: " in said.err


def test_wrong_pairs_of_objective_and_network(run, masked_options, finished, tmp_path):
    said = command(*masked_options, "--preset", "gpt2", "--out", tmp_path / "one")
    assert said.code == 2 and "Those that fit: bert-base, " in said.err and "tiny-encoder" in said.err
    shapes = ("preset", "width", "depth", "heads", "dropout")  # --init decides them
    plain = arguments({k: v for k, v in SETTINGS.items() if k not in shapes} | {"objective": "mlm"})
    said = command(*further(plain), "--init", finished, "--out", tmp_path / "two")
    assert said.code == 2 and "trains networks of the architecture 'encoder'" in said.err


def word_pieces(corpus, folder):
    """A BERT folder as transformers writes it: lower-case WordPiece, [CLS] and [SEP], a random network of two layers."""
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train([str(p) for p in corpus.glob("*.txt")], trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, **names).save_pretrained(folder)
    return library.get_vocab_size()


def byte_pairs(corpus, folder):
    """A GPT-2 folder: byte-level BPE, one token that both begins and ends a text."""
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    library.train([str(path) for path in corpus.glob("*.txt")], trainer)
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token=end, eos_token=end).save_pretrained(folder)
    return library.get_vocab_size()


KINDS = {
    "mlm": ("bert", word_pieces, transformers.AutoModelForMaskedLM, {"pad_id": 0}),
    "clm": ("gpt2", byte_pairs, transformers.AutoModelForCausalLM, {"bos_id": 0, "eos_id": 0}),
}


@pytest.mark.parametrize("objective", KINDS)
def test_training_starts_from_a_published_kind_of_folder(objective, corpus, tmp_path):
    """transformers writes network and tokenizer; we train on; transformers opens the checkpoint, tokenizer too."""
    family, make, kind, ids = KINDS[objective]
    start, run = tmp_path / "start", tmp_path / "run"
    size = make(corpus[0], start)
    network = randomized(tiny_config(family, vocab_size=size + 3, **ids), dtype=torch.float32)  # padded, as many are
    model.hub.save(network, start / "ours")
    kind.from_pretrained(start / "ours").save_pretrained(start)
    settings = {"objective": objective, "init": start, "corpus": corpus[0], "cache": corpus[1], "out": run, "steps": 40}
    settings |= {"batch-size": 4, "val-fraction": 0.2, "threads": 1, "device": "cpu", "precision": "fp32", "lr": 2e-3}
    said = command(*arguments(settings | {"eval-every": 20, "sample-every": 40, "optimizer": "adamw"}))
    assert said.code == 0, said.err
    held_out = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "validation"]
    assert held_out[-1] < held_out[0]
    folder, text = last_checkpoint(run), "the file reads a list"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (start / name).read_bytes()
    ours, theirs = model.hub.load(folder).eval(), kind.from_pretrained(folder).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(folder, size + 3).encode(text) == encoded
    with torch.no_grad():
        assert torch.allclose(ours(torch.tensor([encoded])).logits, theirs(torch.tensor([encoded])).logits, rtol=0, atol=1e-5)
    resumed = command("--resume", run)
    assert resumed.code == 0, resumed.err
    if objective == "mlm":
        assert fill(run, "the [MASK] reads a list").code == 0
    else:
        said = command("generate", run, "--prompt", "the file", "--max-new-tokens", 5, main=model.__main__.main)
        assert said.code == 0 and said.out.startswith("the file")


def test_another_head_in_the_folder_is_told(corpus, tmp_path):
    size = word_pieces(corpus[0], tmp_path / "start")
    model.hub.save(randomized(tiny_config("bert", vocab_size=size, head="pooler"), dtype=torch.float32), tmp_path / "start")
    settings = {"objective": "mlm", "init": tmp_path / "start", "corpus": corpus[0], "cache": corpus[1], "steps": 2}
    settings |= {"batch-size": 4, "val-fraction": 0.2, "device": "cpu", "precision": "fp32", "out": tmp_path / "run"}
    said = command(*arguments(settings))
    assert said.code == 0, said.err
    assert "has the head 'pooler': 'mlm' takes its place" in said.out
    assert json.loads((last_checkpoint(tmp_path / "run") / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


def test_a_tokenizer_without_a_mask_is_refused(corpus, tmp_path):
    size = byte_pairs(corpus[0], tmp_path)
    model.hub.save(randomized(tiny_config("bert", vocab_size=size), dtype=torch.float32), tmp_path)
    settings = {"objective": "mlm", "init": tmp_path, "corpus": corpus[0], "cache": corpus[1], "out": tmp_path / "run"}
    said = command(*arguments(settings | {"steps": 1}))
    assert said.code == 2 and "mask token" in said.err
