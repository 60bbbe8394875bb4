"""What only a card can show: the same command picks it up, compiled and in bf16, and the twins agree there too."""

import json
import tomllib

import pytest
import torch

import model.hub
import train.__main__
from model.attention import attention_reference, attention_sdpa
from model.generate import generate
from model.init import build_network
from model.mask import Mask
from model.weights import role_of
from tests.conftest import TINY_FAMILIES, randomized, tiny_config
from train.objective import Objective
from train.optimizers.build import build_optimizer
from train.step import train_step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_attention_twins_agree(dtype, tolerance):
    q, k, v = (torch.randn(2, heads, 64, 32, device="cuda", requires_grad=True) for heads in (4, 2, 2))
    pad = torch.ones(2, 64, dtype=torch.long, device="cuda")
    pad[0, :9] = 0  # rows without a key: 0, and finite gradients
    for mask in (Mask(), Mask(attention_mask=pad), Mask(window=7)):
        inputs = mask.attention_inputs(64, 64, "cuda")
        expected = attention_reference(q.double(), k.double(), v.double(), *inputs)
        ours = attention_sdpa(q.to(dtype), k.to(dtype), v.to(dtype), *inputs)
        assert (ours.double() - expected).abs().max() < tolerance
        assert all(g.isfinite().all() for g in torch.autograd.grad(ours.float().sum(), (q, k, v)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_on_the_card_is_the_step_on_the_cpu(optimizer):
    config, after = tiny_config("llama"), []
    ids = torch.randint(0, 61, (4, 33))
    for device in ("cpu", "cuda"):
        network = build_network(config, seed=0, device=device, dtype=torch.float32)
        groups = build_optimizer(
            optimizer, network.named_parameters(), lambda n: role_of(config, n), lr=1e-3, matrix_lr=1e-3
        )
        for inner in groups.optimizers:
            if hasattr(inner, "ns_dtype"):
                inner.ns_dtype = torch.float32
        batch = {"input_ids": ids[:, :-1].to(device), "labels": ids[:, 1:].to(device)}
        for _ in range(3):
            train_step(Objective(network), [batch], groups, max_norm=1.0)
        after.append([parameter.detach().cpu() for parameter in network.parameters()])
    assert max((a - b).abs().max() for a, b in zip(*after, strict=True)) < 2e-3


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_each_family_loads_onto_the_card(family, tmp_path):
    network = randomized(tiny_config(family), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    there = model.hub.load(tmp_path, device="cuda").eval()
    ids, mask = torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = 0
    options = {"decoder_input_ids": ids} if network.config.architecture == "encoder-decoder" else {}
    expected = network(ids, mask, **options).logits
    ours = there(ids.cuda(), mask.cuda(), **{name: value.cuda() for name, value in options.items()}).logits
    assert (ours.cpu() - expected)[mask.bool()].abs().max() < 1e-3 * expected.abs().max()
    if network.config.architecture != "encoder":
        new = generate(there, ids.cuda(), max_new_tokens=8, temperature=0)
        assert torch.equal(new.cpu(), generate(network, ids, max_new_tokens=8, temperature=0))


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_command_uses_the_card(objective, tmp_path):
    out = tmp_path / "run"
    options = ["--steps", "60", "--out", str(out), "--cache", str(tmp_path / "cache"), "--eval-every", "30"]
    assert train.__main__.main([*options, "--objective", objective]) == 0
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["run"]["device"] == "cuda" and config["speed"]["compile"] == "on"
    assert config["speed"]["precision"] == "bf16"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
