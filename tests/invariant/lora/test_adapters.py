"""What holds for adapters of every method: nothing is half done, what is switched off is off, wrong settings are told."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import model.hub
from lora.config import (
    CONFIGS,
    AdaloraConfig,
    AdapterConfig,
    AdapterError,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
)
from lora.inject import activate, adapters, add_adapters, merge, remove, unmerge
from lora.layer import Part
from lora.methods import LAYER_METHODS, layer_method
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import randomize, trained

IDS = torch.arange(3, 12)[None]

FAILING = {
    "DoRA does not support a LanguageHead": DoraConfig(targets="q_proj|lm_head"),
    "is not among the 61": PromptConfig(ids=(99999,)),
    "leave no room for it": PrefixConfig(tokens=32),
    "matches no layer": LoraConfig(targets="q_proj", train_whole=("q_prj",)),
}


def picture(network) -> tuple[list[str], list[tuple[str, bool]]]:
    named = network.named_parameters()
    return [f"{name}: {type(module)}" for name, module in network.named_modules()], [(n, p.requires_grad) for n, p in named]


@pytest.mark.parametrize("error", FAILING)
def test_a_failure_changes_nothing(error):
    network = randomized(tiny_config("llama"))
    before, logits = picture(network), network(IDS).logits
    with pytest.raises(AdapterError, match=error):
        add_adapters(network, FAILING[error], "d")
    assert picture(network) == before and not adapters(network)

    add_adapters(network, LoraConfig(r=2), "first")
    with pytest.raises(AdapterError, match=error):
        add_adapters(network, FAILING[error], "d")
    add_adapters(network, LoraConfig(targets="v_proj"), "d")
    assert all("value" in name for name in trained(network))
    assert picture(remove(network)) == before and torch.equal(network(IDS).logits, logits)


@pytest.mark.parametrize("name", ["", "a.b", "train", "keys", "half"])
def test_names_that_no_adapter_can_have(name):
    network = randomized(tiny_config("llama"))
    before = picture(network)
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        add_adapters(network, LoraConfig(), name)
    assert picture(network) == before


@pytest.mark.parametrize("config", [LoraConfig(r=2, bias="all"), LoraConfig(r=2, train_whole=("up$",), targets="query")])
def test_none_active_is_the_network_without_adapters(config):
    """Biases that were trained where they are, and whole modules, too; and all of it comes back."""
    network = randomized(tiny_config("bert"))
    before = network(IDS).logits
    add_adapters(network, config, "a")
    randomize(network)
    beside = network(IDS).logits
    assert mixed(beside, before) > 1e-3
    with pytest.raises(AdapterError, match="cannot have the weight 0"):
        activate(network, {"a": 0.0})
    assert torch.equal(activate(network)(IDS).logits, before) and not trained(network)
    assert torch.equal(activate(network, "a")(IDS).logits, beside) and trained(network)
    assert torch.equal(remove(network)(IDS).logits, before)


def test_one_of_two_whole_modules():
    network = randomized(tiny_config("bert"))
    for name in ("a", "b"):
        add_adapters(network, LoraConfig(r=2, train_whole=("up$",), targets="query"), name)
    with pytest.raises(AdapterError, match="was trained in full by a and b: only one of them can be active"):
        activate(network, ("a", "b"))


def test_untied_for_merging_and_tied_again():
    network = randomized(tiny_config("llama"))
    before = picture(network)
    add_adapters(network, LoraConfig(targets="embed_tokens"))
    randomize(network)
    beside = network(IDS).logits
    merge(network, untie=True)
    assert not network.config.tie_embeddings
    assert torch.equal(unmerge(network)(IDS).logits, beside) and network.config.tie_embeddings
    assert picture(remove(network)) == before and network.head.weight is network.body.embedding.weight


def test_dora_after_another_computes_alike_with_dropout_and_without():
    network = randomized(tiny_config("gpt2"))
    add_adapters(network, LoraConfig(r=2), "a")
    randomize(network)
    add_adapters(network, DoraConfig(r=2, dropout=1e-12), "b")
    randomize(network)
    activate(network, ("a", "b"))
    assert mixed(network.train()(IDS).logits, network.eval()(IDS).logits) < 1e-9


def test_what_has_adapters_is_not_saved_as_a_network(tmp_path):
    network = add_adapters(randomized(tiny_config("llama")), LoraConfig())
    for state in (network, merge(network)):
        with pytest.raises(model.hub.HubError, match="has adapters"):
            model.hub.save(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.hub.save(remove(network), tmp_path / "out")
    assert remove(model.hub.load(tmp_path / "out")) is not None  # without adapters there is nothing to do


WRONG = {
    "bias='lora_only' must be one of none, all, adapted": lambda: LoraConfig(bias="lora_only"),
    "placement='pfeifer' must be one of": lambda: AdapterConfig(placement="pfeifer"),
    "must be a string, such as 'q_proj|v_proj'": lambda: LoraConfig(targets=["q_proj", "v_proj"]),
    "targets='' must be a string": lambda: Ia3Config(targets=""),
    "r=2.5 must be an integer": lambda: LoraConfig(r=2.5),
    "r=True must be an integer": lambda: LoraConfig(r=True),
    "rank_pattern: 'q' = 0 must be a number, at least 1": lambda: LoraConfig(rank_pattern={"q": 0}),
    "rank_pattern: '(' is not a regular expression": lambda: DoraConfig(rank_pattern={"(": 2}),
    "alpha_pattern: 'q' = -1 must be a number, at least 0": lambda: LoraConfig(alpha_pattern={"q": -1}),
    "alpha=nan must be a number": lambda: LoraConfig(alpha=float("nan")),
    "dropout=1.0 must be at least 0 and below 1": lambda: LoraConfig(dropout=1.0),
    "text must hold something": lambda: PromptConfig(text=""),
    "does not go with ids": lambda: PromptConfig(text="a", ids=(1,)),
    "is above initial_r=4": lambda: AdaloraConfig(r=5, initial_r=4),
}


@pytest.mark.parametrize("error", WRONG)
def test_settings_that_no_adapter_can_have(error):
    with pytest.raises(AdapterError) as raised:
        WRONG[error]()
    assert error in str(raised.value)


def test_a_method_registers_itself():
    """A config class and a function are all that a new method needs: neither is named in a second place."""

    @dataclass(frozen=True)
    class ShiftConfig(MethodConfig):
        method: ClassVar[str] = "shift"
        learning_rate: ClassVar[float] = 1e-2
        targets: str = "q_proj|v_proj"
        train_whole: tuple[str, ...] = ()

    class Shift(Part):
        def __init__(self, base):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.empty(base.out_features))

        def reset_parameters(self, generator=None):
            self.shift.data.zero_()

        def post_forward(self, x, y, base):
            return y + self.shift

    try:
        layer_method(ShiftConfig)(lambda base, config, name: Shift(base))
        network = randomized(tiny_config("llama"))
        before = network(IDS).logits
        add_adapters(network, ShiftConfig())
        assert torch.equal(network(IDS).logits, before) and len(trained(network)) == 4
        randomize(network)
        assert mixed(network(IDS).logits, before) > 1e-3
        with pytest.raises(AdapterError, match="Shift cannot be merged"):
            merge(network)
        assert torch.equal(remove(network)(IDS).logits, before)
    finally:
        CONFIGS.pop("shift")
        LAYER_METHODS.pop("shift")
    with pytest.raises(AdapterError, match="unknown method 'shift'; methods: "):
        add_adapters(network, ShiftConfig())
