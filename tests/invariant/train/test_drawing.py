"""Drawings of examples show what a batch holds: each token over its own label, nothing of the padding."""

import re

import pytest
import torch

from data.config import MASK
from data.tokenizer.training import train_tokenizer
from data.transforms.causal import clm_batch
from train.reports import drawing
from train.reports.drawing import draw_example

WORDS = "the quick brown fox jumps over a lazy dog\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS * 30], 300, [MASK])


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_each_token_stands_over_its_label(tokenizer):
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("the quick\nfox")]])
    batch = clm_batch(ids, tokenizer.bos_id)
    shown = draw_example(batch, tokenizer)
    tokens = [re.sub("\n", "⏎", tokenizer.token_bytes[id].decode()).replace(" ", "▁") for id in ids[0, 1:].tolist()]
    assert rows(shown) == {"input": ["<s>", *tokens[:-1]], "label": tokens}
    first, second = (line.split(maxsplit=1)[1] for line in shown.splitlines())
    starts = [[match.start() for match in re.finditer(r"\S+", line)] for line in (first, second)]
    assert starts[0] == starts[1]
    batch["labels"] = batch["labels"].roll(1)
    assert rows(draw_example(batch, tokenizer))["label"] != tokens, "the mutant"


def test_what_is_not_scored_and_what_is_padding(tokenizer):
    ids = torch.tensor([[5, 6, 7, 0]])
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, 6, -100, -100]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    shown = rows(draw_example(batch, tokenizer))
    assert shown["label"] == ["·", shown["input"][1], "·"] and len(shown["input"]) == 3


def test_a_source_and_the_decoder(tokenizer):
    batch = {
        "input_ids": torch.tensor([[300 - 1, 300 - 2, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
        "decoder_input_ids": torch.tensor([[1, 290, 291]]),
        "labels": torch.tensor([[290, 2, -100]]),
    }
    shown = rows(draw_example(batch, tokenizer))
    assert [len(shown[name]) for name in ("source", "input", "label")] == [2, 2, 2]
    assert shown["input"][0] == "<s>" and shown["label"][1] == "</s>" and shown["input"][1] == shown["label"][0]


def test_labels_of_a_text(tokenizer):
    batch = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.ones(2, 2), "labels": torch.tensor([1, 0])}
    assert rows(draw_example(batch, tokenizer, names=("no", "yes")))["label"] == ["yes"]
    assert rows(draw_example(batch, tokenizer, row=1, names=("no", "yes")))["label"] == ["no"]
    batch["labels"] = torch.tensor([0.25, 0.5])
    assert rows(draw_example(batch, tokenizer))["label"] == ["0.25"]


def test_a_long_example_ends_in_an_ellipsis(tokenizer):
    ids = torch.full((1, 400), 70)
    shown = draw_example({"input_ids": ids, "labels": ids}, tokenizer).splitlines()
    assert len(shown) == 2 * drawing.LINES and all(len(line) <= drawing.WIDTH + 2 for line in shown)
    assert all(line.endswith(" …") for line in shown[-2:]) and not shown[0].endswith(" …")
