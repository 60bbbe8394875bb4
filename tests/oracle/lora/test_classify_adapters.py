"""Classifiers that an adapter makes of a frozen network: PEFT opens their folders, with the same logits; merged too."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

import lora.__main__
import model.__main__
import model.hub
from data.tokenizer.open import load_tokenizer
from data.transforms.framing import Framer, choose_pad_id
from lora.config import CONFIGS
from lora.methods import uses_virtual_tokens
from model.predict import Text, pad_batch
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, write_tokenizer
from tests.oracle.train.test_classify import EOS, SPECIALS, template, word_piece, write_labelled
from tests.runs import command
from train.runs.open import resolve

METHODS = {
    "lora": ["--lora.r", 2],
    "dora": ["--dora.r", 2],
    "adalora": ["--adalora.r", 2, "--adalora.initial-r", 3, "--adalora.every", 2],
    "ia3": [],
    "adapter": ["--adapter.width", 4],
    "prompt": ["--prompt.tokens", 4],
    "ptuning": ["--ptuning.tokens", 4, "--ptuning.width", 16],
    "prefix": ["--prefix.tokens", 4],
}
DEFAULT = {("lora", "bert"), ("prefix", "gpt2")}  # the others are slow tests
SETTINGS = ["--steps", 6, "--batch-size", 4, "--val-fraction", 0.2, "--sample-every", 0, "--threads", 1, "--device", "cpu"]


def cases() -> list:
    return [
        pytest.param(method, family, marks=() if (method, family) in DEFAULT else pytest.mark.slow)
        for method in METHODS
        for family in ("bert", "roberta", "roformer", "gpt2", "llama", "t5")
        if (method, family) != ("prefix", "roformer")  # transformers' RoFormer fails on a prefix
    ]


def write_base(folder: Path, family: str) -> Path:
    if family in ("bert", "roformer", "roberta"):
        word_piece(folder)
    else:
        write_tokenizer(folder, byte_level(SPECIALS, template("<s> $A </s>", ("<s>", 330), EOS)), SPECIALS, eos_token="</s>")
    changes = {"vocab_size": 340, "pad_id": 0, "eos_id": 331, "context": 64}
    head = {"bert": "none", "roberta": "mlm", "roformer": "mlm"}.get(family, "lm")
    changes |= {"position_offset": 1} if family == "roberta" else {}
    model.hub.save(randomized(tiny_config(family, head=head, **changes), dtype=torch.float32), folder)
    return folder


@pytest.mark.parametrize(("method", "family"), cases())
def test_peft_opens_the_run(method, family, tmp_path, parity):
    base, corpus = write_base(tmp_path / "base", family), write_labelled(tmp_path / "corpus.jsonl")
    run = tmp_path / "run"
    options = ["--objective", "classify", "--init", base, "--corpus", corpus, *SETTINGS, "--adapter", method, *METHODS[method]]
    said = command(*options, "--out", run)
    assert said.code == 0, said.err
    folder, out = resolve(run), tmp_path / "predicted.jsonl"
    said = command("predict", run, corpus, "--out", out, main=model.__main__.main)
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in out.read_text().splitlines()][:12]
    assert [*rows[0]["probabilities"]] == ["10", "bad", "good"]
    own = torch.tensor([[*row["probabilities"].values()] for row in rows])
    if CONFIGS[method].mergeable:
        merged, again = tmp_path / "merged", tmp_path / "merged.jsonl"
        assert command("merge", base, folder, "--out", merged, main=lora.__main__.main).code == 0
        assert command("predict", merged, corpus, "--out", again, main=model.__main__.main).code == 0
        other = [json.loads(line)["probabilities"] for line in again.read_text().splitlines()][:12]
        assert [*other[0]] == ["10", "bad", "good"]
        assert max((torch.tensor([[*row.values()] for row in other]) - own).abs().flatten()) < 1e-5
        assert transformers.AutoConfig.from_pretrained(merged).id2label == {0: "10", 1: "bad", 2: "good"}
    given = json.loads((folder / "adapter_config.json").read_text())
    if given["peft_type"].startswith("TOUCHSTONE"):  # what PEFT has no form for
        assert method == "adapter" or family == "t5"
        return
    assert given["task_type"] == "SEQ_CLS"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    tokenizer = load_tokenizer(folder)
    framer = Framer(tokenizer, max_length=60 if uses_virtual_tokens(CONFIGS[method]) else 64)
    texts = [Text(framer(row["text"]).ids) for row in rows]
    # PEFT's prompts hide pads from a decoder
    batches = [[text] for text in texts] if uses_virtual_tokens(CONFIGS[method]) else [texts]
    with torch.no_grad():
        inputs = [pad_batch(batch, choose_pad_id(tokenizer, framer.last_token), types=False) for batch in batches]
        other = torch.cat([theirs(**each).logits.softmax(-1) for each in inputs])
    parity(f"classification run: {method} {family}", f"peft {peft.__version__}", absolute(own, other), 1e-5, "float32 rounding")
