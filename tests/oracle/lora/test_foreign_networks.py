"""LoRA on networks of other libraries: `LoraLinear` alone, and `add_adapters` on transformers' models, against PEFT in float64.

Whole tensors, forward and every gradient; random B, biases and norms; then merged.
"""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import lora.peft_io
from lora.config import (
    AdaloraConfig,
    AdapterConfig,
    AdapterError,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from lora.inject import activate, add_adapters, merge, parts, remove, unmerge
from lora.lora import LoraLinear
from lora.targets import all_linear
from tests.compare import absolute, mixed
from tests.oracle.adapter_twins import LIBRARY
from tests.oracle.model.test_network import ROUNDING

SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    sizes = {"vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, dropout_rate=0, decoder_start_token_id=0))


PEFT = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}
NETWORKS = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}
NAMED = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "wo"]}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[kind]().double().eval()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return network


def loss(network: nn.Module, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    output = network(input_ids=ids, labels=torch.tensor([0, 2]) if kind == "bert" else ids)
    return output.logits, output.loss


def same_values(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """Random values in every part of ours and in PEFT's; our name of each trained parameter → PEFT's."""
    generator, names = torch.Generator().manual_seed(2), {}
    have = dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        if value.requires_grad:
            path, _, leaf = name.partition(".parts.default.")
            prefix = f"base_model.model.{path}"
            other = f"{prefix}.{PEFT[leaf]}.default.weight" if leaf in PEFT else f"{prefix}.modules_to_save.default.{leaf}"
            names[name] = other
            with torch.no_grad():
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
                have[other].copy_(value)
    assert set(names.values()) == {name for name, value in have.items() if value.requires_grad}
    return names


SETTINGS = {
    "all-linear": (LoraConfig(r=3, alpha=6), {"r": 3, "lora_alpha": 6}),
    "rslora": (LoraConfig(r=3, alpha=6, rank_stabilized=True), {"r": 3, "lora_alpha": 6, "use_rslora": True}),
    "dora": (DoraConfig(r=3, alpha=6), {"r": 3, "lora_alpha": 6, "use_dora": True}),
    "names": (None, {"r": 3, "lora_alpha": 6}),
    "a pattern": (None, {"r": 3, "lora_alpha": 6}),
    "modules_to_save": (None, {"r": 3, "lora_alpha": 6}),
}


HEADS = {"llama": "lm_head", "bert": "classifier"}  # those that are not tied
CASES = [(kind, setting) for kind in NETWORKS for setting in SETTINGS if setting != "modules_to_save" or kind in HEADS]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_add_adapters_is_pefts(kind, setting, parity):
    config, settings = SETTINGS[setting]
    names = "|".join(NAMED[kind])
    targets = {"names": NAMED[kind], "a pattern": rf".*(1|block\.0).*\.({names})"}.get(setting, "all-linear")
    if setting == "names":
        config = LoraConfig(r=3, alpha=6, targets=rf"(^|\.)({names})$")
    elif setting == "a pattern":
        config = LoraConfig(r=3, alpha=6, targets=rf"^{targets}$")
    elif setting == "modules_to_save":
        config = LoraConfig(r=3, alpha=6, train_whole=(f"^{HEADS[kind]}$",))
        settings = settings | {"modules_to_save": [HEADS[kind]]}
    network = made(kind)
    base = copy.deepcopy(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    task = "SEQ_CLS" if kind == "bert" and setting == "modules_to_save" else None  # it trains the classifier, asked or not
    if kind == "bert" and targets == "all-linear" and task is None:
        targets = all_linear(network)  # without a task PEFT's has the classifier among them
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, task_type=task, **settings)).double().eval()
    assert add_adapters(network, config) is network and not network.training
    logits, _ = loss(network, kind)
    expected, _ = loss(theirs, kind)
    parity(f"LoRA on transformers' {kind}: at first", LIBRARY, mixed(logits, expected), *ROUNDING)

    pairs = same_values(network, theirs)
    logits, ours = loss(network, kind)
    expected, other = loss(theirs, kind)
    parity(f"LoRA on transformers' {kind}: logits", LIBRARY, mixed(logits, expected), *ROUNDING)
    ours.backward()
    other.backward()
    mine, have = dict(network.named_parameters()), dict(theirs.named_parameters())
    error = max(absolute(mine[name].grad, have[pairs[name]].grad) for name in pairs)
    parity(f"LoRA on transformers' {kind}: gradients", LIBRARY, error, *ROUNDING)
    assert max(float(mine[name].grad.abs().max()) for name in pairs) > 1e-3
    assert all(value.grad is None for name, value in mine.items() if name not in pairs)

    merged, theirs_merged = loss(merge(network), kind)[0], loss(theirs.merge_and_unload(), kind)[0]
    parity(f"LoRA on transformers' {kind}: merged", LIBRARY, mixed(merged, theirs_merged), *ROUNDING)
    assert mixed(merged, logits) < 1e-10
    assert torch.equal(loss(unmerge(network), kind)[0], logits)
    back = remove(network).state_dict()
    assert back.keys() == before.keys() and all(torch.equal(back[name], before[name]) for name in before)
    assert all(value.requires_grad for value in network.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_two_adapters_are_pefts_weighted_sum(kind, parity):
    """Active together, each with a weight, as PEFT's add_weighted_adapter ("cat"); then each one alone."""
    network, theirs = made(kind), None
    targets = all_linear(network)
    for name, rank in (("one", 2), ("two", 3)):
        config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=targets, fan_in_fan_out=kind == "gpt2")
        theirs = peft.get_peft_model(made(kind), config, name) if theirs is None else theirs
        if name == "two":
            theirs.add_adapter(name, config)
        add_adapters(network, LoraConfig(r=rank, alpha=6), name)
        assert len(parts(network, name)) == len(targets)
    theirs.double().eval()
    have = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, part in (each for name in ("one", "two") for each in parts(network, name).items()):
            layer, _, name = path.partition(".parts.")
            for leaf in ("A", "B"):
                value = torch.randn(getattr(part, leaf).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
                getattr(part, leaf).copy_(value)
                have[f"base_model.model.{layer}.lora_{leaf}.{name}.weight"].copy_(value)
    for name in ("one", "two"):
        theirs.set_adapter(name)
        error = mixed(loss(activate(network, name), kind)[0], loss(theirs, kind)[0])
        parity(f"LoRA on transformers' {kind}: one of two", LIBRARY, error, *ROUNDING)
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    error = mixed(loss(activate(network, {"one": 0.7, "two": -0.4}), kind)[0], loss(theirs, kind)[0])
    parity(f"LoRA on transformers' {kind}: a weighted sum", LIBRARY, error, *ROUNDING)


def test_merged_for_good_keeps_transformers_names():
    network = add_adapters(made("gpt2"), LoraConfig(r=2))
    with torch.no_grad():
        for part in parts(network, "default").values():
            part.B.normal_()
    expected = loss(network, "gpt2")[0]
    plain = remove(merge(network))
    assert mixed(loss(plain, "gpt2")[0], expected) < 1e-10
    again = NETWORKS["gpt2"]().double().eval()
    again.load_state_dict(plain.state_dict())
    assert torch.equal(loss(again, "gpt2")[0], loss(plain, "gpt2")[0])


IA3 = Ia3Config(targets="query|value|dense", feedforward="output.dense")


@pytest.mark.parametrize("config", [AdaloraConfig(r=2, initial_r=3), IA3])
def test_other_methods_start_at_the_network_and_merge(config):
    network = made("bert")
    before = loss(network, "bert")[0]
    add_adapters(network, config)
    assert torch.equal(loss(network, "bert")[0], before)
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    beside = loss(network, "bert")[0]
    assert mixed(beside, before) > 1e-3 and mixed(loss(merge(network), "bert")[0], beside) < 1e-10


class Odd(nn.Module):
    """Names that ours could be taken for, a layer under two names, torch's own encoder layer, which reads weights itself."""

    def __init__(self):
        super().__init__()
        self.base = nn.Module()
        self.base.base = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.again = self.base.base

    def forward(self, x):
        return self.again(self.encoder(self.base.base(x)))


@pytest.mark.parametrize("training", [True, False])
def test_any_module(training):
    torch.manual_seed(0)
    network, x = Odd().double().train(training), torch.randn(2, 5, 8, dtype=torch.float64)
    network.encoder.linear1.bias.requires_grad_(False)
    before, frozen = network(x), [name for name, value in network.named_parameters() if not value.requires_grad]
    add_adapters(network, LoraConfig(r=2), "a")
    assert mixed(network(x), before) < 1e-12
    with torch.no_grad():
        for part in parts(network, "a").values():
            part.B.normal_()
    assert len(parts(network, "a")) == 4  # base.base, out_proj, linear1, linear2
    beside = network(x)
    assert mixed(beside, before) > 1e-2
    with torch.no_grad():
        assert mixed(network(x), beside) < 1e-12  # torch's fast path too
    beside.square().sum().backward()
    assert all(bool(part.A.grad.abs().max() > 0) for part in parts(network, "a").values())
    assert mixed(merge(network)(x), beside) < 1e-12
    unmerge(network)
    add_adapters(network, LoraConfig(r=2, targets=r"^base\.base$"), "b")
    assert mixed(activate(network)(x), before) < 1e-12
    assert torch.equal(remove(network)(x), before)
    assert [name for name, value in network.named_parameters() if not value.requires_grad] == frozen


def test_what_a_foreign_network_lacks_is_named(tmp_path):
    network = made("llama")
    wrong = {
        "virtual tokens need a network of model.hub.load or model.network, not a LlamaForCausalLM": PromptConfig(),
        "virtual tokens need": PrefixConfig(),
        "targets='query-value' is for networks of this project": LoraConfig(targets="query-value"),
        "matches no layer; nearest: model.layers.N.self_attn.q_proj, ": LoraConfig(targets="q_prj"),
        "train_whole='^lm$' matches no layer": AdapterConfig(train_whole=("^lm$",)),
    }
    for message, config in wrong.items():
        with pytest.raises(AdapterError) as raised:
            add_adapters(network, config)
        assert message in str(raised.value)
    add_adapters(network, LoraConfig())
    for call in (lora.peft_io.save, lora.peft_io.load):
        with pytest.raises(AdapterError, match="PEFT's folders need a network of"):
            call(network, tmp_path / "adapter")
    network = made("gpt2")
    add_adapters(network, LoraConfig(r=2, targets="lm_head"))
    with pytest.raises(AdapterError, match=r"its matrix is also transformer\.wte\.weight"):
        merge(network)
    with pytest.raises(AdapterError, match="untie: the config of a GPT2LMHeadModel is not known here"):
        merge(network, untie=True)
    with pytest.raises(AdapterError, match="an attribute `adapters` of its own"):
        other = nn.Sequential(nn.Linear(2, 2))
        other.adapters = nn.ModuleList()
        add_adapters(other, LoraConfig())


# ---- LoraLinear alone


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_lora_linear_is_pefts(kind, rank_stabilized, parity):
    torch.manual_seed(0)
    layer = nn.Linear(12, 9, bias=kind != "no bias") if kind != "conv1d" else transformers.pytorch_utils.Conv1D(9, 12)
    layer.double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    settings = {"use_rslora": rank_stabilized, "fan_in_fan_out": kind == "conv1d"}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **settings)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).double()
    ours = LoraLinear(layer, 3, 5, rank_stabilized=rank_stabilized)
    inner = theirs.base_model.model[0]
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    assert torch.equal(ours(x), layer(x))
    with torch.no_grad():
        ours.B.normal_()
        inner.lora_A.default.weight.copy_(ours.A)
        inner.lora_B.default.weight.copy_(ours.B)
    y, expected, weights = ours(x), theirs(x), torch.randn(2, 4, 9, dtype=torch.float64)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(y, expected), (ours.A.grad, inner.lora_A.default.weight.grad), (ours.B.grad, inner.lora_B.default.weight.grad)]
    parity("LoraLinear: forward and gradients", LIBRARY, max(absolute(a, b) for a, b in pairs), *ROUNDING)
    own = layer.weight.clone()
    ours.merge()
    theirs.merge_adapter()
    assert mixed(layer.weight, inner.base_layer.weight) < 1e-12 and mixed(ours(x), y) < 1e-12 and mixed(layer(x), y) < 1e-12
    ours.unmerge()
    assert torch.equal(layer.weight, own) and torch.equal(ours(x), y)


def test_lora_linear_begins_as_pefts_does():
    """A uniform in ±1/√I, B zero; a generator makes it repeatable; float32 beside a 16-bit layer."""
    layer = LoraLinear(nn.Linear(400, 300).bfloat16(), r=50, generator=torch.Generator().manual_seed(3))
    again = LoraLinear(nn.Linear(400, 300), r=50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.A, again.A) and layer.A.dtype == torch.float32 and not layer.B.any()
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(400, 300)), peft.LoraConfig(r=50, target_modules=["0"]))
    other = theirs.base_model.model[0].lora_A.default.weight
    for A in (layer.A, other):
        assert 0.0499 < A.abs().max() <= 0.05 and abs(A.std() * 3**0.5 / 0.05 - 1) < 0.02 and abs(A.mean()) < 1e-3
    assert [name for name, value in layer.named_parameters() if value.requires_grad] == ["parts.default.A", "parts.default.B"]


def test_lora_linear_drops_only_what_A_reads():
    layer = LoraLinear(nn.Linear(6, 4).double(), 2, 4, dropout=0.5)
    nn.init.normal_(layer.B)
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    expected = layer.base(x) + 2 * nn.functional.dropout(x, 0.5) @ layer.A.T @ layer.B.T
    assert mixed(y, expected) < 1e-12
    assert mixed(layer.eval()(x), layer.base(x) + 2 * x @ layer.A.T @ layer.B.T) < 1e-12


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("r=0 must be a number, at least 1", lambda: LoraLinear(nn.Linear(2, 2), 0)),
        ("dropout=1.5 must be", lambda: LoraLinear(nn.Linear(2, 2), dropout=1.5)),
        ("a linear layer is expected, not a LayerNorm", lambda: LoraLinear(nn.LayerNorm(2))),
    ],
)
def test_lora_linear_refuses(message, call):
    with pytest.raises(AdapterError, match=message):
        call()


def test_lora_linear_inside_a_network():
    """It trains with the network, moves with it, and keeps its state; `add_adapters` leaves such a network alone."""
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), LoraLinear(nn.Linear(5, 4), 2))
    with pytest.raises(AdapterError, match="'2' has an adapter of its own"):
        add_adapters(network, LoraConfig(r=2))
    nn.init.normal_(network[2].B)
    again = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), LoraLinear(nn.Linear(5, 4), 2))
    again.load_state_dict(network.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(again(x), network(x)) and again.double()(x.double()).dtype == torch.float64
    assert mixed(copy.deepcopy(network)(x), network(x)) == 0


def test_mistakes_are_told():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AdapterError, match=r"such as LoraConfig\(\), not peft\.tuners\.lora\.config\.LoraConfig"):
        add_adapters(network, peft.LoraConfig(r=4))
    with pytest.raises(AdapterError, match="NoneType"):
        add_adapters(network, None)
    for targets in ("attention", "query-value"):
        with pytest.raises(AdapterError, match=f"targets='{targets}' is for networks of this project; on a Sequential"):
            add_adapters(network, LoraConfig(targets=targets))
    with pytest.raises(AdapterError, match="a linear layer is expected, not a int"):
        LoraLinear(8, 4)
    assert "r=2, scale=2" in repr(LoraLinear(torch.nn.Linear(4, 4), r=2, alpha=4.0))
