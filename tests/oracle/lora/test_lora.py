"""LoRA against PEFT: logits, gradients, ten updates, counts; embeddings and heads; scalings, patterns, biases, whole modules;
combinations of several; LoRA+."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils.other import get_pattern_key

from lora.combine import combine_adapters
from lora.config import AdapterError, LoraConfig
from lora.inject import activate, adapters, add_adapters, parts, remove
from lora.layer import LayerName
from lora.targets import by_pattern, match_layers, published_modules
from model.config import ModelConfig
from model.init import empty_network
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import (
    FAMILIES,
    LIBRARY,
    ROUNDING,
    batch,
    compare,
    gradients_gap,
    loss_of,
    randomize,
    target_names,
    trained,
    twin,
)
from tests.oracle.model.test_network import published
from tests.oracle.wide import Wide, widen

SETTINGS = {
    "all-linear": (LoraConfig(r=3, alpha=6), {"r": 3, "lora_alpha": 6}),
    "query-value": (LoraConfig(r=2, alpha=5, targets="query-value"), {"r": 2, "lora_alpha": 5}),
    "rslora": (LoraConfig(r=3, alpha=2, rank_stabilized=True), {"r": 3, "lora_alpha": 2, "use_rslora": True}),
}


def theirs_of(family: str, **settings) -> peft.LoraConfig:
    return peft.LoraConfig(fan_in_fan_out=family == "gpt2", **settings)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family, setting, tmp_path, parity):
    config, settings = SETTINGS[setting]
    compare("lora", twin(family, config, theirs_of(family, **settings), tmp_path), parity)


OUTPUTS = {"gpt2": "wte|lm_head|c_attn", "llama": "embed_tokens|lm_head|q_proj", "t5": r"^shared$|lm_head|\.q$"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_and_heads(family, tmp_path, parity):
    """On both ends of a tied matrix, which stay two adapters as in PEFT."""
    config = LoraConfig(r=3, alpha=6, targets=OUTPUTS[family])
    both = twin(family, config, theirs_of(family, r=3, lora_alpha=6), tmp_path)
    assert {"body.embedding.parts.default", "head.parts.default"} <= parts(both.network, "default").keys()
    compare("lora, embeddings and heads", both, parity)


def test_the_head_that_a_loss_reads(tmp_path):
    """features · weightᵀ + bias, which a loss takes instead of logits, are the logits; also of BERT's, with a dense layer."""
    for family in ("llama", "bert"):
        network = add_adapters(randomized(tiny_config(family)), LoraConfig(r=3, targets="^head|embedding$"))
        randomize(network)
        ids = torch.randint(0, 61, (2, 7))
        output = network(ids)
        head = network.head
        again = torch.nn.functional.linear(head.features(output.hidden), head.weight, head.bias)
        assert torch.allclose(again, output.logits, rtol=0, atol=1e-12)
        before = output.logits.detach()
        activate(network)
        assert (network(ids).logits - before).abs().max() > 0.1


def test_patterns_biases_and_whole_modules(tmp_path, parity):
    config = LoraConfig(
        r=3,
        alpha=6,
        rank_pattern={"query": 5, r"0\.mlp\.up": 1},
        alpha_pattern={"value": 20.0},
        bias="adapted",
        targets=r"query|value|\.out|mlp",  # a key's bias moves no score: its gradient is rounding alone
        train_whole=(r"head\.dense",),
    )
    theirs = theirs_of(
        "bert",
        r=3,
        lora_alpha=6,
        rank_pattern={"query": 5, r"layer\.0\.intermediate\.dense": 1},
        alpha_pattern={"value": 20},
        bias="lora_only",
        modules_to_save=["transform.dense"],
    )
    both = twin("bert", config, theirs, tmp_path)
    assert {part.A.size(0) for part in parts(both.network, "default").values() if hasattr(part, "A")} == {1, 3, 5}
    compare("lora, patterns and biases", both, parity)


def test_all_biases(tmp_path, parity):
    both = twin("bert", LoraConfig(r=2, alpha=2, bias="all"), theirs_of("bert", r=2, lora_alpha=2, bias="all"), tmp_path)
    ours, theirs, real = batch(both)
    logits, expected = both.network(**ours).logits, both.theirs(**theirs).logits
    parity("lora, patterns and biases: logits", LIBRARY, mixed(logits[real], expected[real]), *ROUNDING)
    for each in (logits, expected):
        loss_of(each, real, ours["input_ids"]).backward()
    parity("lora, patterns and biases: gradients", LIBRARY, gradients_gap(both), *ROUNDING)
    assert {name.rpartition(".")[2] for name in trained(both.network)} == {"A", "B", "bias"}


def test_first_values(tmp_path):
    """A uniform in ±1/√I as PEFT's (Kaiming), B zero; the same for the same seed and name, whatever else has adapters."""
    network = add_adapters(randomized(tiny_config("llama")), LoraConfig(r=8), seed=3)
    for path, part in parts(network, "default").items():
        bound = part.A.size(1) ** -0.5
        assert part.A.abs().max() <= bound and part.A.abs().max() > 0.9 * bound and not part.B.any(), path
        assert abs(part.A.std() - bound / 3**0.5) < 0.1 * bound
    other = add_adapters(randomized(tiny_config("llama")), LoraConfig(r=8, targets="query"), seed=3)
    for path, part in parts(other, "default").items():
        assert torch.equal(part.A, parts(network, "default")[path].A)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_network_is_what_it_was(family):
    network, ids = randomized(tiny_config(family), dtype=torch.float32), torch.randint(0, 61, (2, 9))
    before = network(ids).logits
    add_adapters(network, LoraConfig(r=4, dropout=0.3)).train()
    assert torch.equal(network(ids).logits, before)
    randomize(network)
    assert not torch.equal(network(ids).logits, before)
    assert torch.equal(remove(network)(ids).logits, before)


def test_dropout_is_on_what_a_reads(tmp_path, parity):
    """With the same noise, drawn in the same order, PEFT's."""
    both = twin("llama", LoraConfig(r=3, dropout=0.4), theirs_of("llama", r=3, lora_alpha=16, lora_dropout=0.4), tmp_path)
    ours, theirs, real = batch(both)
    quiet = both.network(**ours).logits  # the network was in eval mode, and so are its new parts
    assert torch.equal(both.network(**ours).logits, quiet)
    both.network.train(), both.theirs.train()
    torch.manual_seed(7)
    logits = both.network(**ours).logits
    torch.manual_seed(7)
    parity("lora: llama, dropout", LIBRARY, mixed(logits[real], both.theirs(**theirs).logits[real]), *ROUNDING)
    assert mixed(logits[real], quiet[real]) > 1e-12


def empty_with_one(preset: str):
    network = empty_network(ModelConfig.preset(preset), device="meta")
    return add_adapters(network, LoraConfig(r=8, targets=r"blocks\.0\..*query"))


def test_published_counts():
    """LoRA's on the published sizes, without their memory."""
    for preset, config, count in (
        ("llama-2-7b", LoraConfig(r=8, targets="query-value"), 4_194_304),
        ("llama-3-8b", LoraConfig(r=16), 41_943_040),
    ):
        network = empty_network(ModelConfig.preset(preset), device="meta")
        add_adapters(network, config)
        assert sum(p.numel() for p in trained(network).values()) == count
    one = parts(empty_with_one("llama-2-7b"), "default")["body.blocks.0.attention.project.query.parts.default"]
    assert one.A.numel() + one.B.numel() == 65_536 and round(1 - 65_536 / 4096**2, 3) == 0.996


# ---- several on one base


@pytest.fixture
def several(tmp_path):
    """One network with adapters `one` and `other` (of different ranks and targets), and PEFT's."""
    network = randomized(tiny_config("llama"))
    base = widen(published(network, tmp_path))
    for number, (name, config) in enumerate(CONFIGS.items()):
        add_adapters(network, config, name)
        randomize(network, seed=number)
    model = None
    for name, config in CONFIGS.items():
        settings = theirs_of("llama", r=config.r, lora_alpha=config.alpha, target_modules=target_names(network, config.targets))
        if model is None:
            model = peft.get_peft_model(base, settings, adapter_name=name).eval()
        else:
            model.add_adapter(name, settings)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name in CONFIGS:
            for path, part in parts(network, name).items():
                layer = f"base_model.model.{published_modules(network)[path.removesuffix(f'.parts.{name}')]}"
                theirs[f"{layer}.lora_A.{name}.weight"].copy_(part.A)
                theirs[f"{layer}.lora_B.{name}.weight"].copy_(part.B)
    return network, model, torch.randint(0, 61, (2, 9))


CONFIGS = {"one": LoraConfig(r=3, alpha=6, targets="attention"), "other": LoraConfig(r=3, alpha=9)}


def test_switched(several, parity):
    network, model, ids = several
    for name in ("one", "other", "one"):
        activate(network, name)
        model.set_adapter(name)
        assert all(f".parts.{name}." in path for path in trained(network))
        parity("lora, several: switched", LIBRARY, mixed(network(ids).logits, model(ids).logits), *ROUNDING)
    activate(network)
    with model.disable_adapter():
        parity("lora, several: none", LIBRARY, mixed(network(ids).logits, model(ids).logits), *ROUNDING)
    assert not trained(network)


@pytest.mark.parametrize(("how", "theirs"), [("concatenated", "cat"), ("linear", "linear")])
@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.5, -0.5)], ids=str)
def test_combined(several, weights, how, theirs, parity):
    network, model, ids = several
    combine_adapters(network, dict(zip(CONFIGS, weights, strict=True)), "both", how)
    with Wide():  # PEFT's roots of the weights
        model.add_weighted_adapter(list(CONFIGS), list(weights), "both", combination_type=theirs)
    model.set_adapter("both")
    parity(f"lora, {how}: logits", LIBRARY, mixed(network(ids).logits, model(ids).logits), *ROUNDING)
    if how == "concatenated":
        both = network(ids).logits
        activate(network, dict(zip(CONFIGS, weights, strict=True)))
        assert mixed(network(ids).logits, both) < 1e-12
        assert list(adapters(network)) == ["one", "other", "both"]


def test_a_share_of_an_embedding_and_a_head():
    """And a combination that has it in its matrices, with scales of its own."""
    network, merged = (randomized(tiny_config("llama", tie_embeddings=False)) for _ in range(2))
    add_adapters(network, LoraConfig(r=2, targets="^head$|embedding$", rank_stabilized=True), "one")
    randomize(network)
    for path, part in parts(network, "one").items():
        change, own = 0.7 * 16 / 2**0.5 * part.B @ part.A, merged.get_submodule(path.removesuffix(".parts.one")).weight
        own.data += change if path.startswith("head") else change.T
    ids = torch.randint(0, 61, (2, 9))
    wanted, plain = merged(ids).logits, network(ids).logits
    activate(network, {"one": 0.7})
    assert mixed(network(ids).logits, wanted) < 1e-12 < mixed(plain, wanted)
    combine_adapters(network, {"one": 0.7}, "both")
    assert mixed(network(ids).logits, wanted) < 1e-12


def test_what_cannot_be_combined(several):
    network, _, _ = several
    for error, change in {
        "'third' is not there; there are: one, other": lambda: combine_adapters(network, {"one": 1, "third": 1}, "x"),
        "how='mean'": lambda: combine_adapters(network, {"one": 1}, "x", "mean"),
        "cannot be an adapter's name": lambda: add_adapters(network, LoraConfig(), "one"),
        "no adapter 'third'": lambda: activate(network, "third"),
        "adapter that trains biases": lambda: add_adapters(network, LoraConfig(bias="all"), "x"),
        "is not a regular expression": lambda: add_adapters(network, LoraConfig(targets="(q"), "x"),
    }.items():
        with pytest.raises(AdapterError, match=error.replace("(", r"\(")):
            change()
    assert list(adapters(network)) == ["one", "other"] and set(parts(network, "x")) == set()
    add_adapters(network, LoraConfig(r=5), "wide")
    with pytest.raises(AdapterError, match="linear combination needs one rank, there are 3, 5"):
        combine_adapters(network, {"one": 1, "wide": 1}, "x", "linear")


def test_a_pattern_is_the_end_of_a_name():
    """Whole parts of it, ours or the published one, as PEFT reads rank_pattern; the first that fits."""
    place = LayerName("body.blocks.1.attention.project.query", "model.layers.1.self_attn.q_proj")
    for pattern, fits in {
        "query": True,
        r"1\.self_attn\.q_proj": True,
        "model.layers.1.self_attn.q_proj": True,
        "uery": False,
        "q_pro": False,
        "self_attn": False,
        "layers": False,
        r"layers\.1": False,
    }.items():
        assert (by_pattern({pattern: 3}, place, 8) == 3) == fits, pattern
        assert (get_pattern_key([pattern], place.published) == pattern) == (fits and pattern != "query"), pattern
    assert by_pattern({"key": 1, "q_proj": 2, "query": 3}, place, 8) == 2


def test_targets_by_either_name():
    network = randomized(tiny_config("llama"))
    for targets in (r"\.query$", "q_proj", "self_attn.q_proj$"):
        assert match_layers(network, targets) == [f"body.blocks.{number}.attention.project.query" for number in range(2)]


def test_targets_that_match_nothing():
    network = randomized(tiny_config("llama"))
    with pytest.raises(AdapterError, match=r"'q_prj' matches no layer; nearest: model.layers.N.self_attn.q_proj"):
        add_adapters(network, LoraConfig(targets="q_prj"))
    assert all(parameter.requires_grad for parameter in network.parameters()) and not adapters(network)


# ---- LoRA+


def test_lora_plus(tmp_path, parity):
    from train.optimizers.build import build_optimizer

    both = twin("llama", LoraConfig(r=3, b_lr_ratio=16.0), theirs_of("llama", r=3, lora_alpha=16), tmp_path)
    ours, theirs, real = batch(both)
    labels = torch.randint(0, 61, real.shape)
    mine = build_optimizer(
        "adamw",
        both.network.named_parameters(),
        lambda name: "matrix",
        lr=1e-3,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-6,
        lr_multiple_of=lambda name: 16.0 if name.endswith(".B") else 1.0,
    )
    other = create_loraplus_optimizer(
        both.theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.0, eps=1e-6, betas=(0.9, 0.999)
    )
    for _ in range(10):
        for optimizer, logits in ((mine, both.network(**ours).logits), (other, both.theirs(**theirs).logits)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits[real], labels[real]).backward()
            optimizer.step()
    errors = [mixed(value, both.theirs.get_parameter(both.names[name])) for name, value in trained(both.network).items()]
    parity("lora+: parameters after 10 steps", LIBRARY, max(errors), 1e-10, "float64 rounding, through ten updates of AdamW")
