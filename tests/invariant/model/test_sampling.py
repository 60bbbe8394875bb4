"""Tokens drawn through `generate` and through the command are counted, beside their exact probabilities by the definitions."""

import json
import math
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import model.__main__
import model.generate
import model.hub
from data.config import DataConfig
from data.corpus.prepare import prepare
from data.tokenizer.open import load_tokenizer
from model.generate import generate
from tests.folders import byte_level, llama, write_tokenizer
from tests.oracle.model.test_sampling import saying, words
from tests.runs import command, write_corpus

# Some are equal, some only in 16 bits, and the last never comes. Each setting leaves some out, or changes all.
LOGITS = [1.5, 0.2, 1.0, -0.5, 1.002, 0.6, -0.1, 1.0, 0.2, 1.5, -0.8, 0.6002, 0.2, -0.5, 0.9, -1e4]
SETTINGS = [
    {"temperature": 0.5},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.55},
    {"temperature": 1.0, "min_p": 0.4},
    {"temperature": 1.0, "repetition_penalty": 3.0},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.4},
]


def exact(logits: list[float], seen: frozenset, temperature, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """The probability of each token: penalized, divided, the k best, the nucleus, min-p, one after the other."""

    def penalized(i: int, x: float) -> float:
        return x if i not in seen else x / repetition_penalty if x > 0 else x * repetition_penalty

    scores = {i: penalized(i, x) / temperature for i, x in enumerate(logits)}

    def probabilities() -> dict[int, float]:
        weights = {i: math.exp(x - max(scores.values())) for i, x in scores.items()}
        return {i: weight / math.fsum(weights.values()) for i, weight in weights.items()}

    if top_k is not None:
        least = sorted(scores.values())[-top_k]
        scores = {i: x for i, x in scores.items() if x >= least}
    if top_p is not None:
        mass, found = 0.0, probabilities()
        for i in sorted(scores, key=scores.get)[:-1]:  # of equal ones the smaller ids go first
            mass += found[i]
            if mass <= 1 - top_p:
                del scores[i]
    if min_p is not None:
        found = probabilities()
        scores = {i: x for i, x in scores.items() if found[i] >= min_p * max(found.values())}
    found = probabilities()
    return torch.tensor([found.get(i, 0.0) for i in range(len(logits))], dtype=torch.float64)


def assert_drawn(new_BN: Tensor, prompt: list[int], logits: list[float], settings: dict) -> None:
    """No token that has no probability; each that has some, as often as its probabilities before all draws say, to five
    standard deviations."""
    before = cache(lambda seen: exact(logits, seen, **settings))
    expected, variance = torch.zeros(2, len(logits), dtype=torch.float64)
    for row in new_BN.tolist():
        seen = frozenset(prompt)
        for token in row:
            probability = before(seen)
            assert probability[token] > 0
            expected += probability
            variance += probability * (1 - probability)
            if settings.get("repetition_penalty", 1.0) != 1:
                seen |= {token}
    count = torch.bincount(new_BN.flatten(), minlength=len(logits))
    assert ((count - expected).abs() <= 5 * variance.sqrt() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=words)
def test_tokens_come_as_often_as_they_should(settings, dtype):
    network = saying(torch.tensor(LOGITS), dtype)
    prompt = torch.tensor([[2, 5, 9]]).expand(200, 3)
    logits = network(prompt[:1]).logits[0, -1].tolist()
    assert len(set(logits)) < len(LOGITS) and (dtype == torch.float64 or len(set(logits)) < len(set(LOGITS)))
    new = generate(network, prompt, max_new_tokens=12, generator=torch.Generator().manual_seed(0), **settings)
    assert_drawn(new, [2, 5, 9], logits, settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, list[float], int]:
    """A model folder whose network gives the logits above to 16 ids, and no chance to the others."""
    root = tmp_path_factory.mktemp("saying")
    config = DataConfig(corpus=(str(write_corpus(root / "corpus")),), cache=root / "cache", vocab_size=320)
    tokenizer = prepare(config).tokenizer
    logits = torch.full((tokenizer.vocab_size,), -1e4)
    logits[300 : 300 + len(LOGITS)] = torch.tensor(LOGITS)
    ends = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    network = saying(logits, torch.float32, context=1024, depth=1, **ends)
    model.hub.save(network, root / "folder")
    tokenizer.save(root / "folder")
    return root / "folder", logits.tolist(), tokenizer.bos_id


@pytest.mark.parametrize("settings", SETTINGS, ids=words)
def test_so_does_the_command(settings, folder):
    """Each option reaches the draw, one long text a setting."""
    path, logits, bos = folder
    options = {"top_k": len(logits)} | settings  # else 50
    made, said = [], [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]

    def watched(*given, **named):
        made.append(generate(*given, **named))
        return made[-1]

    with patch.object(model.generate, "generate", watched):
        done = command("generate", path, "--max-new-tokens", 600, "--no-stream", *said, main=model.__main__.main)
    assert done.code == 0, done.err
    (new,) = made
    assert new.shape == (1, 600)
    assert_drawn(new, [bos], logits, settings)


def test_lengths_and_ends_that_the_folder_leaves_open(tmp_path):
    """max_length counts the prompt too; where no file of the network names an end, it is the tokenizer's."""
    llama(tmp_path, vocab_size=333, eos_token_id=None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": 20}))
    write_tokenizer(tmp_path, byte_level(["<s>", "</s>"]), ["<s>", "</s>"], eos_token="</s>")
    asked = []

    def none_new(*_, **settings):
        asked.append(settings)
        return torch.zeros(1, 0, dtype=torch.long)

    with patch("model.generate.generate", none_new):
        said = command("generate", tmp_path, "--prompt", "the lazy dog", main=model.__main__.main)
    assert said.code == 0, said.err
    prompt = load_tokenizer(tmp_path).encode("the lazy dog")
    assert asked[0]["max_new_tokens"] == 20 - len(prompt) < 20 and asked[0]["stop_ids"] == [331]
