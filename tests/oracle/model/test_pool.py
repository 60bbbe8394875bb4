"""Pooling of a sequence classifier: logits and gradients beside plain torch, text by text; padding, prompts, folders, cost."""

import json
from typing import get_args

import pytest
import torch
from torch import nn

import model.hub
from model.activations import tape
from model.config import ConfigError, Pool
from model.flops import flops_per_token
from model.folders import HubError
from model.heads import POOLS, first, last, maximum, mean
from model.parameters import parameters
from model.training import Training
from model.weights import head_spec, other_pool, pool_of
from tests.compare import absolute, mixed, relative
from tests.conftest import randomized, tiny_config

MASK = torch.tensor(  # padded on the right, on the left, on both sides, one token first and last, whole
    [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
)
PLAIN = {
    "first": lambda text_ND: text_ND[0],
    "last": lambda text_ND: text_ND[-1],
    "mean": lambda text_ND: text_ND.sum(0) / len(text_ND),
    "max": lambda text_ND: torch.stack([column.max() for column in text_ND.T]),
}
FAMILIES = ("llama", "bert", "roformer", "bart")  # pool the last token; the first, through a dense layer; the last likewise
LIBRARY = "plain torch, one text at a time"


def classifier(family: str, pool: str | None, **changes):
    return randomized(tiny_config(family, head="sequence", labels=3, pool=pool, **changes))


def plain_logits(head: nn.Module, pool: str, own: str, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """The logits of each text's real tokens alone, by the names of the docstring."""
    rows = []
    for hidden_TD, real_T in zip(hidden_BTD, MASK.bool(), strict=True):
        text_ND = hidden_TD[real_T]
        vector_D = PLAIN[own if pool == "concat" else pool](text_ND)
        if head.dense is not None:
            vector_D = head.activation(head.dense.weight @ vector_D + head.dense.bias)
        if pool == "concat":
            vector_D = torch.cat((vector_D, PLAIN["max"](text_ND), PLAIN["mean"](text_ND)))
        rows.append(head.out.weight @ vector_D + (0 if head.out.bias is None else head.out.bias))
    return torch.stack(rows)


@pytest.mark.parametrize("pool", get_args(Pool))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_pools_as_plain_torch_does(family, pool, parity):
    config = tiny_config(family, head="sequence", labels=3)
    head = classifier(family, pool).head
    hidden_BTD = torch.randn(6, 5, 24, dtype=torch.float64, requires_grad=True)
    ours, theirs = head(hidden_BTD, MASK), plain_logits(head, pool, head_spec(config).pool, hidden_BTD)
    direction, inputs = torch.randn_like(ours), [hidden_BTD, *head.parameters()]
    gradients = [torch.autograd.grad((logits * direction).sum(), inputs) for logits in (ours, theirs)]
    error = max(mixed(ours, theirs), *(mixed(a, b) for a, b in zip(*gradients, strict=True)))
    assert not gradients[0][0][MASK == 0].any()
    assert tuple(head.out.weight.shape) == (3, 72 if pool == "concat" else 24)
    parity(f"pooling: {family}, {pool}", LIBRARY, error, 1e-12, "rounding of sums in another order")


def test_the_names_of_the_options_are_those_of_the_functions():
    assert set(get_args(Pool)) == {*POOLS, "concat"}
    assert POOLS == {"first": first, "last": last, "mean": mean, "max": maximum}
    with pytest.raises(ConfigError, match="pool='average' is none of first, last, mean, max, concat"):
        tiny_config("bert", head="sequence", pool="average")


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_without_a_mask_all_tokens_are_real(pool):
    hidden_BTD = torch.randn(2, 5, 24, dtype=torch.float64)
    assert absolute(POOLS[pool](hidden_BTD, None), POOLS[pool](hidden_BTD, torch.ones(2, 5))) < 1e-15


@pytest.mark.parametrize("garbage", [1e30, -1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("pool", get_args(Pool))
def test_padding_has_no_influence(pool, garbage):
    head, hidden_BTD = classifier("llama", pool).head, torch.randn(6, 5, 24, dtype=torch.float64)
    other_BTD = torch.where(MASK.bool()[..., None], hidden_BTD, torch.tensor(garbage, dtype=torch.float64))
    assert torch.equal(head(hidden_BTD, MASK), head(other_BTD, MASK))


@pytest.mark.parametrize("pool", get_args(Pool))
@pytest.mark.parametrize("family", ["llama", "bert", "roformer"])
def test_a_text_has_the_same_logits_in_any_batch(family, pool):
    network, text = classifier(family, pool), torch.randint(3, 61, (1, 4))
    alone = network(text, torch.ones(1, 4)).logits
    for left in {0, 3} if family != "bert" else {0}:  # its learned positions are counted from the left
        ids, mask = torch.randint(3, 61, (2, 9)), torch.zeros(2, 9, dtype=torch.long)
        ids[0, left : left + 4], mask[0, left : left + 4], mask[1] = text, 1, 1
        assert absolute(network(ids, mask).logits[:1], alone) < 1e-12


@pytest.mark.parametrize("pool", ["mean", "max", "concat"])
def test_a_row_without_tokens_is_finite_and_has_no_gradient(pool):
    """Such rows fill a rank's batch up; their labels are -100."""
    head, mask = classifier("llama", pool).head, torch.tensor([[1, 1, 0], [0, 0, 0]])
    hidden_BTD = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    logits = head(hidden_BTD, mask)
    nn.functional.cross_entropy(logits, torch.tensor([1, -100]), reduction="sum").backward()
    assert logits.isfinite().all() and not hidden_BTD.grad[1].any()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


class Prompt(nn.Module):
    length = 4

    def forward(self) -> torch.Tensor:
        return torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_prompt_before_the_text_is_not_pooled():
    """A network that pools the first token takes the prompt's first vector, as PEFT; mean and max are of the text alone."""
    ids, mask = torch.randint(3, 61, (1, 5)), torch.ones(1, 5)
    network = classifier("bert", "concat")
    network.body.prompt = Prompt()
    output, found = network(ids, mask), []
    network.head.out.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0][0]))
    network(ids, mask)
    token = network.head.activation(network.head.dense(output.prompt[0, 0]))
    wanted = torch.cat((token, output.hidden[0].amax(0), output.hidden[0].mean(0)))
    assert absolute(found[0], wanted) < 1e-12


@pytest.mark.parametrize("family", ["llama", "bert", "vaswani"])
def test_a_folder_holds_the_pooling(family, tmp_path):
    """In a key of our own, as transformers has no class for it; the family's own pooling is not written."""
    ids, mask = torch.randint(3, 61, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changes = {"decoder_start_id": 1} if family == "vaswani" else {}
    network = classifier(family, "concat", **changes)
    model.hub.save(network, tmp_path)
    written, loaded = json.loads((tmp_path / "config.json").read_text()), model.hub.load(tmp_path)
    assert (written["pool"], written["head"], written["architectures"]) == ("concat", "sequence", [])
    assert loaded.config == network.config and torch.equal(loaded(ids, mask).logits, network(ids, mask).logits)
    model.hub.save(loaded, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()
    if family != "vaswani":  # which has published no classifier: its weights have our names, and no other head reads them
        body = model.hub.load(tmp_path, head="none")
        model.hub.save(body, tmp_path / "body")
        assert body.config.pool is None and "pool" not in json.loads((tmp_path / "body/config.json").read_text())
    own = head_spec(network.config).pool
    model.hub.save(classifier(family, own, **changes), tmp_path / "own")
    written = json.loads((tmp_path / "own/config.json").read_text())
    assert "pool" not in written and ("head" in written) == (family == "vaswani")
    model.hub.save(classifier(family, None, **changes), tmp_path / "none")
    assert (tmp_path / "none/config.json").read_text() == (tmp_path / "own/config.json").read_text()


@pytest.mark.parametrize("pool", ["mean", "concat", "last"])
def test_another_pooling_makes_the_head_new(pool, tmp_path):
    """Also where its matrix has the same shape: it was trained on another vector."""
    saved = classifier("llama", "max")
    model.hub.save(saved, tmp_path)
    network = model.hub.load(tmp_path, pool=pool, seed=5)
    named = dict(saved.named_parameters())
    same = {name for name, value in network.named_parameters() if torch.equal(value, named[name])}
    assert same == {name for name in named if not name.startswith("head.")}
    assert other_pool(network.config) == (None if pool == "last" else pool)  # LLaMA's own is the last token
    assert network.head.out.weight.abs().max() < 0.2, "initialized, not read"
    again = model.hub.load(tmp_path, pool="max")
    assert all(torch.equal(value, named[name]) for name, value in again.named_parameters())


def test_an_unknown_pooling_of_a_folder_is_refused(tmp_path):
    model.hub.save(classifier("llama", "max"), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"max"', '"avg"'))
    with pytest.raises(HubError, match="pool='avg' is none of first, last, mean, max, concat"):
        model.hub.load(tmp_path)


def test_the_key_means_nothing_to_other_heads(tmp_path):
    model.hub.save(randomized(tiny_config("llama")), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"pool": "avg",', 1))
    assert model.hub.load(tmp_path).config.pool is None


def test_only_a_sequence_classifier_has_another_pooling():
    config = tiny_config("llama", head="sequence", pool="mean")
    assert (other_pool(config), pool_of(config)) == ("mean", "mean")
    assert (other_pool(config.replace(head="token")), other_pool(config.replace(pool="last"))) == (None, None)
    assert pool_of(config.replace(pool=None)) == "last"
    assert head_spec(config).architecture is None and head_spec(config.replace(pool="last")).architecture


def test_the_cost_of_a_wider_head():
    own, concat = (tiny_config("bert", head="sequence", labels=3, pool=pool) for pool in (None, "concat"))
    more = parameters(concat)["head.out.weight"].size - parameters(own)["head.out.weight"].size
    assert more == 3 * 2 * 24 and parameters(concat)["head.dense.weight"].shape == (24, 24)
    found = flops_per_token(concat, 8).forward - flops_per_token(own, 8).forward
    assert found == pytest.approx(2 * more / 8)  # once a text of 8 tokens


@pytest.mark.parametrize("pool", ["max", "concat"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_memory_of_the_largest_values(family, pool, parity):
    """They save what they are taken from; other poolings have no such line. The bytes that autograd keeps from the head's
    forward: neither its weights nor its input, which the last norm keeps."""
    changes = {"width": 64, "heads": 4, "kv_heads": 4, "mlp_width": 160, "context": 96}
    config = tiny_config(family, head="sequence", labels=3, pool=pool, **changes)
    head, hidden_BTD = randomized(config, dtype=torch.float32).head.train(), torch.randn(3, 80, 64, requires_grad=True)
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = head(hidden_BTD, torch.ones(3, 80))
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
    own = {tensor.untyped_storage().data_ptr() for tensor in (hidden_BTD, *head.parameters())}
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    predicted = {each: tape(config.replace(pool=each), Training(3, 80, device="cpu"))[-1] for each in get_args(Pool)}
    pooling = {each: [op.saved for op in head.ops if op.name == "pool"] for each, head in predicted.items()}
    assert pooling == {"first": [], "last": [], "mean": [], "max": [3 * 80 * 64 * 4], "concat": [3 * 80 * 64 * 4]}
    error = relative(torch.tensor(float(predicted[pool].saved)), torch.tensor(float(measured)))
    parity(f"activations of pooling: {family}, {pool}", "torch's saved tensors", error, 0.03, "masks, a byte a token")
