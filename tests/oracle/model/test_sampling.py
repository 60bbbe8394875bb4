"""Probabilities that tokens are drawn by, against transformers: each filter, and all of `generate`, step by step, bit for bit.

Which of equal tokens at the nucleus' edge stay, transformers leaves to an unstable sort, and so to the processor: its sort is
made stable here. How many stay is the same either way.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn

import model.hub
from model.generate import generate
from model.sampling import Sampling, filter_logits, keep_min_p, keep_top_k, keep_top_p, penalize
from tests.compare import absolute, count
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY as TRANSFORMERS

LIBRARY = f"{TRANSFORMERS}, its sort made stable"

SETTINGS = [
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.6},
    {"temperature": 0.7, "min_p": 0.2},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
]
WARPERS = {
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
}


@pytest.fixture
def stable(monkeypatch):
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))


def filtered_by_theirs(logits: Tensor, settings: dict) -> Tensor:
    for name, value in settings.items():
        logits = WARPERS[name](value)(None, logits)
    return logits


def words(settings: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


ALONE = {"top_k": (keep_top_k, [1, 4, 61, 99]), "top_p": (keep_top_p, [0.1, 0.8, 1.0]), "min_p": (keep_min_p, [0.0, 0.2, 1.0])}


@pytest.mark.parametrize("name", ALONE)
def test_each_filter_alone(name, parity, stable):
    keep, values = ALONE[name]
    logits = torch.randn(50, 61, dtype=torch.float64).mul(4).round() / 2  # with ties
    wrong = [value for value in values if not torch.equal(keep(logits, value), WARPERS[name](value)(None, logits))]
    parity(f"sampling: {keep.__name__}", LIBRARY, count(wrong), 0, "bit for bit")
    settings = Sampling(**{name: values[1]})
    chosen = settings.choose(logits.repeat(40, 1), None, torch.Generator().manual_seed(0)).view(40, 50)
    kept = keep(logits, values[1]).isfinite()
    assert kept[torch.arange(50), chosen].all() and (kept.sum(1) > 1).any()


@pytest.mark.parametrize("rounded", [None, torch.bfloat16, torch.float16], ids=["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("settings", SETTINGS, ids=words)
def test_filters(settings, rounded, parity, stable):
    """Of logits that have 16 bits many are equal, at the k-th place and at the nucleus' edge too."""
    logits = torch.randn(50, 400 if rounded else 61, dtype=torch.float64) * 2
    logits = logits if rounded is None else logits.to(rounded).float()
    expected = filtered_by_theirs(logits, settings)
    ours = filter_logits(logits, **({"top_k": None, "top_p": None} | settings))
    assert torch.equal(ours.isinf(), expected.isinf()) and ours.isinf().any()
    kept = ~expected.isinf()
    error = absolute(ours[kept], expected[kept])
    parity(f"sampling filters: {settings}, {rounded}", LIBRARY, error, 0.0, "the same operations")


@pytest.mark.parametrize("settings", SETTINGS, ids=words)
def test_filters_as_shipped(settings):
    """The logits that stay are the same, whichever of equal tokens have them."""
    logits = (torch.randn(50, 400) * 2).bfloat16().float()
    ours = filter_logits(logits, **({"top_k": None, "top_p": None} | settings))
    assert torch.equal(ours.sort().values, filtered_by_theirs(logits, settings).sort().values)


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty(penalty, parity):
    logits, ids = torch.randn(50, 61, dtype=torch.float64), torch.randint(0, 61, (50, 12))
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    seen = torch.zeros(50, 61, dtype=torch.bool).scatter(1, ids, True)
    error = absolute(penalize(logits, seen, penalty), expected)
    parity(f"repetition penalty: {penalty}", TRANSFORMERS, error, 0.0, "the same operations")


def test_min_p_of_one_keeps_the_best():
    kept = filter_logits(torch.tensor([[2.0, 1.0, 2.0]]), 1.0, None, None, min_p=1.0)
    assert kept.isfinite().tolist() == [[True, False, True]]


TIES = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0, 3.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [1, 5]),  # both that share the first place
        ({"top_k": 4}, [0, 1, 2, 3, 4, 5, 7]),  # all that share the fourth
        ({"top_p": 1e-9}, [5]),
        ({"top_p": 0.3}, [5]),
        ({"top_p": 0.5}, [1, 5]),
        ({"top_p": 0.85}, [1, 3, 4, 5, 7]),  # of four at the edge the two with the largest ids
        ({"min_p": 0.13}, [0, 1, 2, 3, 4, 5, 7]),  # e^-2 = 0.135
    ],
    ids=str,
)
def test_ties(settings, kept, stable):
    ours = filter_logits(TIES[None], **({"temperature": 1.0, "top_k": None, "top_p": None} | settings))
    assert ours[0].isfinite().nonzero().flatten().tolist() == kept
    assert torch.equal(ours, filtered_by_theirs(TIES[None], settings))


def saying(logits_V: Tensor, dtype: torch.dtype, **changes) -> nn.Module:
    """A network that gives these logits, in its format, whatever it reads: the last norm's result is (1, 0, …)."""
    network = randomized(tiny_config("gpt2", vocab_size=len(logits_V), tie_embeddings=False, **changes), dtype=torch.float32)
    with torch.no_grad():
        network.body.norm.weight.zero_()
        network.body.norm.bias.zero_()[0] = 1
        network.head.weight[:, 0] = logits_V
    return network.to(dtype)


def near_ties(count: int = 40) -> Tensor:
    """Logits of both signs, many nearer to one another than 16 bits can tell, in an order of no meaning."""
    logits = torch.linspace(-2, 3, count // 4).repeat_interleave(4) + torch.tensor([0, 0, 1e-3, 3e-3]).repeat(count // 4)
    return logits[torch.randperm(count)]


WHOLE = [
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.72},
    {"min_p": 0.3},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "temperature": 0.8, "top_k": 23, "top_p": 0.85, "min_p": 0.1},
    {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 18, "top_p": 0.9},
]


def one_draw(probabilities: list[Tensor], tokens: Iterator[Tensor], probability_BV: Tensor, *_, **__) -> Tensor:
    probabilities.append(probability_BV.clone())
    return next(tokens)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", WHOLE, ids=words)
def test_generate_draws_from_what_transformers_draws_from(settings, dtype, tmp_path, monkeypatch, parity, stable):
    """Twelve steps of five texts: transformers draws; we, given its draws, have the same probabilities before each."""
    network = saying(near_ties(), dtype)
    model.hub.save(network, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    ids = torch.randint(0, 40, (5, 6))
    options = {"temperature": 1.0, "top_k": 0, "do_sample": True, "max_new_tokens": 12, "eos_token_id": None} | settings
    options |= {"return_dict_in_generate": True, "output_scores": True}
    made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    found: list[Tensor] = []
    drawn = iter(made.sequences[:, 6:].unbind(1))
    monkeypatch.setattr(torch, "multinomial", lambda *given, **named: one_draw(found, drawn, *given, **named))
    new = generate(network, ids, max_new_tokens=12, **settings)
    assert torch.equal(new, made.sequences[:, 6:]) and len(found) == 12
    expected = [scores.softmax(-1) for scores in made.scores]
    parity(f"sampling, whole: {words(settings)}, {dtype}", LIBRARY, absolute(found, expected), 0.0, "the same operations")
    plain = network(ids).logits[:, -1].float().softmax(-1)
    assert not torch.equal(found[0], plain)  # the setting is seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_greedy_from_16_bits(dtype, tmp_path):
    """Penalized in 16 bits, the best of nearly equal tokens would be another."""
    network = saying(near_ties(), dtype)
    model.hub.save(network, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    ids = torch.randint(0, 40, (5, 6))
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "repetition_penalty": 1.02}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 6:]
    assert torch.equal(generate(network, ids, max_new_tokens=24, temperature=0, repetition_penalty=1.02), expected)
