"""What the README shows of Python does what it says."""

import json
import re
from pathlib import Path

import torch

import model.hub
from eval.bleu import corpus_bleu
from lora.inject import adapters
from quant.linear import quantized_layers
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import gap
from tests.pairs import word_pairs

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_adapters_of_the_readme(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8").partition("## Adapters")[2].partition("## Four bits")[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    before = randomized(tiny_config("llama"))
    model.hub.save(before, "FOLDER")
    names: dict = {}
    exec(block, names)
    after = names["network"]
    assert not adapters(after) and (tmp_path / "ADAPTER" / "adapter_model.safetensors").is_file()
    for name, value in after.named_parameters():  # B was zero: the weights are what they were
        assert gap(value, before.get_parameter(name)) < 1e-6, name


def test_the_four_bits_of_the_readme(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8").partition("## Four bits")[2].partition("## Eight bits")[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model.hub.save(randomized(tiny_config("llama")), "FOLDER")
    names: dict = {"weight": torch.randn(64, 64), "network": randomized(tiny_config("llama"))}
    exec(block, names)
    assert names["small"].bits < 4.2 and quantized_layers(names["network"])
    assert json.loads((tmp_path / "DIR" / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_the_eight_bits_of_the_readme(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8").partition("## Eight bits")[2].partition("## Scores")[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    before = randomized(tiny_config("llama"), dtype=torch.float32)
    model.hub.save(before, "FOLDER")
    batches = [{"input_ids": torch.arange(12).view(2, 6)}]
    names: dict = {"weight": torch.randn(64, 64), "network": before, "batches": batches}
    exec(block, names)
    assert names["small"].group_size == 32 and quantized_layers(names["packed"])
    assert json.loads((tmp_path / "DIR" / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    assert torch.equal(model.hub.load("DIR")(**batches[0]).logits, names["network"].eval()(**batches[0]).logits)


def test_the_scores_of_the_readme():
    text = README.read_text(encoding="utf-8").partition("## Scores")[2].partition("## Networks")[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    hypotheses, references = word_pairs(7)
    names: dict = {"hypotheses": hypotheses, "references": references, "baseline": hypotheses[::-1]}
    names |= {"predicted": ["a", "b", "a"], "true": ["a", "b", "b"], "labels": torch.tensor([0, 1])}
    names |= {"probabilities": torch.tensor([[0.9, 0.1], [0.6, 0.4]]), "documents": [[*range(5, 45)]]}
    names["network"] = randomized(tiny_config("llama"))
    exec(block, names)
    assert names["test"].difference > 5 and names["report"].accuracy == 2 / 3 and names["loss"].targets == 39
    assert names["error"].value > 0 and names["named"].precision == 0
    assert names["whole"] == corpus_bleu(hypotheses, [references]) and "tok:intl" in names["score"].signature
    assert names["interval"].low < names["whole"].value < names["interval"].high and names["scores"]["rouge1"].fmeasure > 0.3
