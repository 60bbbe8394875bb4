"""The account of a network against what is published, what transformers builds and what torch counts."""

import re

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model.hub
from model.account import info
from model.cache import Cache
from model.config import ConfigError, ModelConfig, load_family, presets
from model.flops import flops_per_token
from model.init import build_network
from model.memory import training_memory
from model.parameters import PARTS, adapter_parameters, cache_bytes, parameters, parameters_by_part
from model.training import Training
from model.weights import head_spec
from tests.compare import absolute, relative
from tests.conftest import tiny_config
from tests.oracle.model.test_memory import FAMILIES, TORCH, Scored, adapt, batch_of
from train.objective import MaskedObjective
from train.recompute import recompute

LIBRARY = f"transformers {transformers.__version__}"

PUBLISHED = {
    "gpt2": ({}, 124_439_808),
    "bert-base": ({"head": "pooler"}, 109_482_240),
    "t5-small": ({}, 60_506_624),
    "flan-t5-small": ({}, 76_961_152),
    "llama-3-8b": ({}, 8_030_261_248),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_totals(preset):
    changes, total = PUBLISHED[preset]
    assert sum(parameters_by_part(ModelConfig.preset(preset, **changes)).values()) == total


def test_published_adapters():
    assert adapter_parameters(ModelConfig.preset("llama-2-7b"), 8, "query-value") == 4_194_304
    assert adapter_parameters(ModelConfig.preset("llama-3-8b"), 16, "all-linear") == 41_943_040


@pytest.mark.parametrize("preset", [name for name, values in presets().items() if values["family"] != "vaswani"])
def test_every_preset_has_the_library_s_count(preset, parity):
    config = ModelConfig.preset(preset)
    rules = load_family(config.family)
    kind = getattr(transformers, head_spec(config).architecture)
    with torch.device("meta"):
        theirs = kind(kind.config_class(**rules.write_config(config)))
    expected = sum(p.numel() for p in theirs.parameters() if p.requires_grad)  # RoFormer's sines are none that is trained
    table = theirs.get_input_embeddings().weight
    if not config.tie_embeddings and theirs.get_output_embeddings().weight is table:
        expected += table.numel()  # transformers 5 ties every T5, until it has read a checkpoint whose head differs
    ours = sum(p.size for p in parameters(config).values() if p.trained)  # BART's constant bias is a buffer there
    parity(f"parameters: {preset}", LIBRARY, absolute(ours, expected), 0, "a count")


def test_vaswani_by_hand():
    """6 + 6 layers of width 512, feed-forward 2048, biases everywhere; 65 million in the paper's table 3."""
    attention, mlp, norm = 4 * (512 * 512 + 512), 2 * 512 * 2048 + 2048 + 512, 2 * 512
    encoder, decoder = 6 * (attention + mlp + 2 * norm), 6 * (2 * attention + mlp + 3 * norm)
    counts = parameters_by_part(ModelConfig.preset("transformer-base"))
    assert counts == {
        "embedding": 37000 * 512,
        "attention": 12 * attention,
        "cross-attention": 6 * attention,
        "mlp": 12 * mlp,
        "norms": (6 * 2 + 6 * 3) * norm,
    }
    assert sum(counts.values()) == 37000 * 512 + encoder + decoder == 63_082_496


def test_every_head_of_every_family_has_a_part_for_each_parameter():
    for name in ("bert-base", "gpt2", "bart-base", "t5-small", "tiny", "roberta-base"):
        for head in (*load_family(ModelConfig.preset(name).family).HEADS, "value"):
            config = ModelConfig.preset(name, head=head)
            assert set(parameters_by_part(config)) <= set(PARTS)
            training_memory(config, Training(context=16))
            flops_per_token(config, 16)


# ---- operations


def run_counted(network: nn.Module, batch: dict) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        total = Scored(network)(batch).terms["loss"].sum
    with FlopCounterMode(display=False) as backward:
        total.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_operations(name, parity):
    """The counter sees matrix products alone, as ours does, and the plain attention computes every score."""
    config = tiny_config(name)
    forward, backward = run_counted(build_network(config, seed=0, attention="reference"), batch_of(3, 20))
    ours = flops_per_token(config, 20, skip_masked=False)
    error = max(relative(ours.forward * 60, forward), relative(ours.backward * 60, backward))
    parity(f"operations a token: {name}", f"{TORCH} FlopCounterMode", error, 1e-12, "a count")
    skipped = flops_per_token(config, 20)
    assert skipped.scores == ours.scores if config.architecture == "encoder" else skipped.scores < ours.scores


def test_operations_of_adapters(parity):
    config = tiny_config("llama")
    network = adapt(build_network(config, seed=0, attention="reference"), 4, "all-linear")
    # The account counts a gradient for every matrix's input, also below the first adapter.
    network.body.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    forward, backward = run_counted(network, batch_of(3, 20))
    ours = flops_per_token(config, 20, rank=4, skip_masked=False)
    error = max(relative(ours.forward * 60, forward), relative(ours.backward * 60, backward))
    parity("operations a token: llama with adapters", f"{TORCH} FlopCounterMode", error, 1e-12, "a count")


def test_a_head_that_reads_few_positions():
    """A masked-language objective: 15 of 60 positions are scored."""
    network, batch = build_network(tiny_config("bert"), seed=0, attention="reference").train(), batch_of(3, 20)
    batch["labels"].flatten()[15:] = -100
    with FlopCounterMode(display=False) as counter:
        MaskedObjective(network)(batch)
    ours = flops_per_token(network.config, 20, scored=15 / 60, skip_masked=False)
    assert ours.forward * 60 == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_recomputation_is_one_more_forward_of_the_blocks():
    config = tiny_config("gpt2")
    network = recompute(build_network(config, seed=0, attention="reference"), "blocks").train()
    forward, backward = run_counted(network, batch_of(3, 20))
    ours = flops_per_token(config, 20, recompute=True, skip_masked=False)
    assert ours.backward * 60 == pytest.approx(backward, rel=0.06)  # the last product of a block need not run again
    assert ours.backward * 60 >= backward > 2 * forward


# ---- the cache


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5", "bart"])
def test_cache(name):
    config = tiny_config(name)
    cache, network = Cache(config, 1, 24), build_network(config, seed=0).eval()
    ids = torch.randint(3, 61, (1, 24))
    network(ids, cache=cache, **({"decoder_input_ids": ids} if config.decoder_depth else {}))
    own = [x for layer in cache.layers for x in (layer.key_BGSK, layer.value_BGSK)]
    across = [x for layer in cache.cross if layer.keys_and_values is not None for x in layer.keys_and_values]
    ours = cache_bytes(config, 24, itemsize=4)
    assert sum(x.nbytes for x in own) == 24 * ours.token
    assert sum(x.nbytes for x in across) == 24 * ours.source_token
    assert sum(x.nbytes for x in own + across) == ours.full
    window = config.windows[0]
    assert ours.in_reach == (ours.full if window is None else ours.token * window)
    assert cache_bytes(tiny_config("bert"), 24).full == 0


# ---- the page


@pytest.mark.parametrize("preset", ["gpt2", "llama-3-8b", "mistral-7b", "t5-small", "bert-base", "bart-base", "qwen3-0.6b"])
def test_the_page(preset):
    """And its headline is a training that one would do: at most 2,048 tokens a text, with the whole reach beside them."""
    config = ModelConfig.preset(preset)
    text = info(config, batch_size=2, rank=16)
    total = sum(parameters_by_part(config).values())
    for words in (f"{total:,}", "operations a token", "key/value cache", "QLoRA", "at its highest", "batch 2 of", "r=16"):
        assert words in text
    assert max(len(line) for line in text.split("\n")) <= 128
    at, words = min(2048, config.context), " ".join(text.split())
    assert re.search(rf"\noperations a token,.* at {at:,} tokens\n", text)
    assert (f"(the network reads {config.context:,}: --context)" in words) == (config.context > 2048)
    if config.architecture != "encoder":
        assert f" at {at:,} tokens" in words and f" at {config.context:,} tokens" in words


def test_the_page_of_one_way():
    config = ModelConfig.preset("gpt2")
    text = info(config, precision="bf16-pure", recompute="blocks", recompute_every=3, loss="chunked", optimizer="sgd", ema=True)
    assert "of full, bf16-pure recomputed, every 3. block (" in text
    assert "sgd with averages" in text and "logits in chunks" in text
    detail = dict(line.strip().split("  ", 1) for line in text.partition("of full, bf16-pure")[2].splitlines()[1:5])
    halves, averages = 2 * 124_439_808 / 2**20, 4 * 124_439_808 / 2**20
    assert float(detail["weights"].split()[0]) == pytest.approx(halves, abs=0.1)
    assert float(detail["gradients"].split()[0]) == pytest.approx(halves, abs=0.1)
    assert float(detail["optimizer"].split()[0]) == pytest.approx(halves + averages, abs=0.1)


def test_the_page_of_a_folder(tmp_path):
    network = build_network(tiny_config("llama"), seed=0)
    model.hub.save(network, tmp_path)
    (tmp_path / "model.safetensors").unlink()  # weights are not read
    assert f"{sum(p.numel() for p in network.parameters()):,}" in info(model.hub.read_config(tmp_path), context=16)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("context", 0),
        ("context", 33),
        ("rank", 0),
        ("accumulate", -1),
        ("targets", "mlp"),
        ("method", "ia3"),
        ("optimizer", "lion"),
        ("recompute", "all"),
        ("recompute_every", 0),
        ("loss", "sliced"),
        ("precision", "fp8"),
        ("device", "tpu"),
    ],
)
def test_wrong_values_name_the_option(option, value):
    with pytest.raises(ConfigError, match=option):
        info(tiny_config("gpt2"), **{option: value})
