"""`python -m train --init … --adapter …`: what is trained, what is saved, how it goes on, and what is refused."""

import json
import re
import shutil
import tomllib
from dataclasses import replace

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

import lora.__main__ as lora_command
import lora.peft_io
import model.__main__ as model_command
import model.hub
from data.tokenizer.open import load_tokenizer
from lora.adalora import RankAllocator
from lora.config import CONFIGS, LoraConfig
from lora.inject import add_adapters, parts
from model.stack import Output
from model.weights import weight_table
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import randomize, trained
from tests.runs import arguments, assert_same_end, command, further, last_checkpoint, metrics, stopped_at
from train.adapters import add_adapter, cast_frozen_weights, has_memory_estimate
from train.config import OptimizerConfig, RunConfig, TrainConfig
from train.config_toml import from_plain, to_plain
from train.engine import Engine
from train.objective import Objective
from train.parallel.ranks import Ranks
from train.recompute import recompute
from train.resolve import resolve_network
from train.runs.checkpoint import step_of
from train.runs.errors import TrainError
from train.setup import open_optimizers

STEPS = 48
SMALL = {"steps": STEPS, "eval-every": 16, "save-every": 12}
METHODS = {
    "lora": {"lora.r": 2, "lora.dropout": "0.1", "lora.b-lr-ratio": 4},
    "dora": {"dora.r": 2, "dora.targets": "attention"},
    "adalora": {"adalora.r": 2, "adalora.initial-r": 3, "adalora.every": 5},
    "ia3": {},
    "adapter": {"adapter.width": 4, "adapter.placement": "pfeiffer"},
    "prompt": {"prompt.tokens": 4, "prompt.text": "the value of a list", "context": 28},
    "ptuning": {"ptuning.tokens": 4, "ptuning.width": 16, "context": 28},
    "prefix": {"prefix.tokens": 4, "context": 28},
}


@pytest.fixture(scope="module")
def base(finished, tmp_path_factory):
    """A finished run, whose folder these tests may not change; and a copy of its best checkpoint as a model folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    assert model_command.main(["export", str(finished), "--out", str(folder)]) == 0
    return folder


def adapt(options, base, method: str, *more: object, **changes) -> list[object]:
    settings = METHODS[method] | SMALL | changes
    return [*further(options), *arguments(settings), "--init", base, "--adapter", method, *more]


def test_every_method_is_here():
    assert METHODS.keys() == CONFIGS.keys()


LATER = ("dora", "adalora", "ia3", "adapter", "prompt", "ptuning")


@pytest.mark.parametrize("method", [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in METHODS])
def test_a_run_trains_and_saves_the_adapter_alone(method, options, base, tmp_path):
    """And one that was stopped ends in the same bytes."""
    run, other = tmp_path / "run", tmp_path / "other"
    said = command(*adapt(options, base, method), "--out", run)
    assert said.code == 0 and "before the first step: loss" in said.out, said.err
    assert ("python -m lora merge" in said.out) == CONFIGS[method].mergeable
    chosen = tomllib.loads((run / "config.toml").read_text())["optimizer"]
    assert (chosen["optimizer"], chosen["lr"], chosen["weight_decay"]) == ("adamw", CONFIGS[method].learning_rate, 0.0)
    checkpoint = last_checkpoint(run)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json", "raw.safetensors"} <= names
    assert not {"model.safetensors", "config.json"} & names
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert moments and all(".parts.default." in name for name in moments)
    network = lora.peft_io.open_network(checkpoint)
    own = sum(value.numel() for name, value in network.named_parameters() if ".parts." not in name)
    counted = re.search(r"in all, of ([\d,]+) +\d+ +([\d,]+) \(", said.out)
    assert counted, said.out
    losses = [row["loss"] for row in metrics(run) if row["split"] == "validation"]
    assert losses[-1] < losses[0] + 0.02
    assert sum(path.stat().st_size for path in checkpoint.glob("adapter_model*")) < 4 * own

    said = stopped_at(20, *adapt(options, base, method), "--out", other)
    assert said.code == 130 and step_of(last_checkpoint(other)) == 20, said.err
    said = command("--resume", other)
    assert said.code == 0, said.err
    assert_same_end(run, other, STEPS)


def test_the_weights_of_the_base_stand_still(options, base, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    run = tmp_path / "run"
    said = command(*adapt(options, base, "lora", "--ema", "0.9"), "--out", run)
    assert said.code == 0, said.err
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}
    adapted, plain = lora.peft_io.open_network(last_checkpoint(run)), model.hub.load(base)
    for name, value in plain.named_parameters():
        found = {n.replace(".base.", "."): p for n, p in adapted.named_parameters() if ".parts." not in n}
        assert torch.equal(found[name], value)
    averages = load_file(last_checkpoint(run) / "averages.safetensors")
    part = parts(adapted, "default")["body.blocks.0.mlp.up.parts.default"]
    assert torch.equal(part.A, averages["averages.body.blocks.0.mlp.up.parts.default.A"])


def test_no_gradient_and_no_state_for_what_is_frozen():
    network = add_adapters(randomized(tiny_config("llama"), dtype=torch.float32), LoraConfig(r=2))
    network(torch.randint(0, 61, (2, 9))).logits.logsumexp(-1).sum().backward()
    with_gradient = {name for name, value in network.named_parameters() if value.grad is not None}
    assert with_gradient == set(trained(network)) == {n for n, _ in network.named_parameters() if ".parts.default." in n}


def test_generate_and_merge_read_the_run(options, base, tmp_path, capsys):
    run = tmp_path / "run"
    assert command(*adapt(options, base, "lora"), "--out", run).code == 0
    line = ["generate", str(run), "--prompt", "the value", "--max-new-tokens", "12", "--temperature", "0"]
    assert model_command.main(line) == 0
    text = capsys.readouterr().out
    checkpoint = run / json.loads((run / "best.json").read_text())["checkpoint"]
    assert lora_command.main(["merge", str(base), str(checkpoint), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    line[1] = str(tmp_path / "merged")
    assert model_command.main(line) == 0 and capsys.readouterr().out == text
    merged = dict(model.hub.load(tmp_path / "merged").named_parameters())
    assert any(not torch.equal(value, merged[name]) for name, value in model.hub.load(base).named_parameters())
    assert model_command.main(["export", str(run), "--out", str(tmp_path / "no")]) == 2
    assert "python -m lora merge" in capsys.readouterr().err
    said = command(*further(options), "--init", run, "--out", tmp_path / "next")
    assert said.code == 2 and "python -m lora merge" in said.err


def test_masked_language_models_too(options, tmp_path):
    settings = {"objective": "mlm", "steps": 60}
    start, run = tmp_path / "start", tmp_path / "run"
    said = command(*options, *arguments(settings), "--preset", "tiny-encoder", "--out", start)
    assert said.code == 0, said.err
    said = command(*further(options), *arguments(settings), "--init", start, "--adapter", "lora", "--lora.r", 2, "--out", run)
    assert said.code == 0, said.err
    assert (last_checkpoint(run) / "adapter_model.safetensors").is_file()
    assert model_command.main(["fill", str(run), "the [MASK] of a list"]) == 0


def test_what_adalora_gave_up_is_gone_from_the_averages(options, base, tmp_path):
    run = tmp_path / "run"
    said = command(*adapt(options, base, "adalora", "--ema", "0.9", steps=30), "--out", run)
    assert said.code == 0, said.err
    stored = load_file(last_checkpoint(run) / "adapter_model.safetensors")
    values = [value for name, value in stored.items() if name.endswith("lora_E")]
    assert sum(int(value.count_nonzero()) for value in values) == 2 * len(values) < sum(map(torch.numel, values))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_float32_adapters_beside_16_bits(precision, options, base, tmp_path):
    """fp16 weights that are trained could not be unscaled; adapters can."""
    run = tmp_path / "run"
    said = command(*adapt(options, base, "lora", steps=30), "--precision", precision, "--out", run)
    assert said.code == 0, said.err
    stored = load_file(last_checkpoint(run) / "raw.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in stored.values())
    assert any(value.any() for name, value in stored.items() if name.endswith(".B"))


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_recomputed_blocks_give_adapters_their_gradients(kind):
    """The blocks' inputs need no gradient, and dropout draws the same noise again."""
    found = []
    for way in ("none", kind):
        network = randomized(tiny_config("gpt2", dropout=0.1, attention_dropout=0.1)).train()
        add_adapters(network, LoraConfig(r=2, dropout=0.1))
        randomize(network)
        recompute(network, way, 1)
        torch.manual_seed(5)
        output: Output = network(torch.arange(18).view(2, 9))
        output.logits.logsumexp(-1).sum().backward()
        found.append({name: value.grad for name, value in trained(network).items()})
    for name, gradient in found[0].items():
        assert gradient.any() and torch.equal(gradient, found[1][name]), name


REFUSED = {
    "--init RUN or a model folder": ["--adapter", "lora"],
    "has no effect: add --adapter lora": ["--lora.r", 4],
    "does not go with --mesh shard": ["--adapter", "lora", "--init", "BASE", "--mesh", "shard"],
    "--precision bf16 casts the frozen weights": ["--adapter", "lora", "--init", "BASE", "--precision", "bf16-pure"],
    "targets='c_atn' matches no layer; nearest: transformer.h.N.attn.c_attn": [
        *("--adapter", "lora", "--init", "BASE", "--lora.targets", "c_atn"),
    ],
    "--lora.rank-pattern 'qproj' ends no adapted layer's name": [
        *("--adapter", "lora", "--init", "BASE", "--lora.rank-pattern", "qproj", 2),
    ],
    "--context 32 and 20 positions before the text exceed 32: --context 12 fits": ["--adapter", "prefix", "--init", "BASE"],
    "leave no steps in": ["--adapter", "adalora", "--init", "BASE", "--adalora.warmup", "0.8"],
}


@pytest.mark.parametrize("error", REFUSED)
def test_what_is_refused(error, options, base, tmp_path):
    asked = [base if part == "BASE" else part for part in REFUSED[error]]
    said = command(*(further(options) if base in asked else options), *asked, "--out", tmp_path / "run")
    assert said.code == 2 and error in said.err, said.err
    assert not (tmp_path / "run" / "config.toml").exists()


def test_another_base_is_refused(options, base, halfway, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(base, moved)
    assert stopped_at(20, *adapt(options, moved, "lora"), "--out", run).code == 130
    model.hub.save(model.hub.load(last_checkpoint(halfway)), moved)  # the same network, at an earlier step
    said = command("--resume", run)
    assert said.code == 2 and "was trained on another base" in said.err
    shutil.rmtree(moved)
    said = command("--resume", run)
    assert said.code == 2 and str(moved) in said.err and "--init BASE" in said.err
    said = command("--resume", run, "--init", halfway)
    assert said.code == 2 and "was trained on another base" in said.err
    line = ["generate", str(run), "--prompt", "the", "--max-new-tokens", "3"]
    assert model_command.main(line) == 2 and model_command.main([*line, "--base", str(base)]) == 0
    said = command("--resume", run, "--init", base)  # the same tensors, elsewhere
    assert said.code == 0 and step_of(last_checkpoint(run)) == STEPS, said.err


# ---- what a run decides about its adapter

WHOLE = {"bias": "all", "train_whole": ("^head$",), "b_lr_ratio": 4.0}
DECAYED = {"lora": {"A", "B", "dense.weight", "weight"}, "dora": {"A", "B"}, "adalora": {"A", "B"}, "adapter": {"down", "up"}}


@pytest.mark.parametrize("method", METHODS)
def test_what_decays_and_how_fast_it_learns(method):
    """Matrices decay, vectors, prompts and biases do not; of a module trained whole the family's table knows. LoRA+ is of B."""
    own = CONFIGS[method](**WHOLE if method == "lora" else {})
    asked = OptimizerConfig(optimizer="adamw", lr=1e-3, weight_decay=0.1)
    network = add_adapters(randomized(tiny_config("bert")), own)
    groups = open_optimizers(TrainConfig(run=RunConfig(adapter=method), optimizer=asked, **{method: own}), network).param_groups
    found = {name: (group["base_lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found.keys() == trained(network).keys()
    for name, values in found.items():
        leaf = name.partition(".parts.default.")[2]
        wanted = 4e-3 if method == "lora" and leaf == "B" else 1e-3, 0.1 if leaf in DECAYED.get(method, ()) else 0.0
        assert values == wanted, name


@pytest.mark.parametrize(("family", "dtype"), [("bert", torch.bfloat16), ("t5", torch.bfloat16), ("t5", torch.float16)])
def test_frozen_weights_are_narrowed_and_trained_ones_are_not(family, dtype):
    network = add_adapters(randomized(tiny_config(family), dtype=torch.float32), LoraConfig(r=2, bias="all"))
    cast_frozen_weights(network, None)
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    cast_frozen_weights(network, dtype)
    wide = {row.name for row in weight_table(network.config).values() if row.layout == "wide" and dtype == torch.float16}
    assert bool(wide) == (dtype == torch.float16)
    for name, value in network.named_parameters():
        stays = value.requires_grad or ".parts." in name or name.replace(".base.", ".") in wide
        assert value.dtype == (torch.float32 if stays else dtype), name


def test_a_head_that_the_base_lacks_is_trained_whole(options, base, tmp_path):
    model.hub.save(model.hub.load(base, head="sequence", labels=3), tmp_path / "other")
    for path in base.iterdir():
        if not (tmp_path / "other" / path.name).exists():
            shutil.copy(path, tmp_path / "other")
    said = command(*adapt(options, tmp_path / "other", "ia3", steps=20), "--out", tmp_path / "run")
    assert said.code == 0 and "'lm' takes its place" in said.out, said.err
    assert "weights.head.parts.default.weight" in load_file(last_checkpoint(tmp_path / "run") / "raw.safetensors")
    said = command(*adapt(options, base, "ia3", steps=20), "--out", tmp_path / "usual")
    stored = load_file(last_checkpoint(tmp_path / "usual") / "raw.safetensors")
    assert said.code == 0 and not any("head" in name for name in stored)


def test_an_adapter_begins_by_the_seed_and_a_prompt_by_its_text(base):
    first = {}
    for method in ("lora", "prompt"):
        network = model.hub.load(base)
        tokenizer = load_tokenizer(base, network.config.vocab_size)
        config = TrainConfig(run=RunConfig(adapter=method, seed=3))
        config = replace(config, prompt=replace(config.prompt, tokens=9, text="the value")) if method == "prompt" else config
        add_adapter(config, network, tokenizer, new_head=False)
        first |= parts(network, "default")
    wanted = parts(add_adapters(model.hub.load(base), LoraConfig(), seed=3), "default")
    assert all(torch.equal(part.A, first[path].A) for path, part in wanted.items())
    ids = tokenizer.encode("the value")
    words = network.body.embedding(torch.tensor([ids[place % len(ids)] for place in range(9)]))
    assert any(torch.equal(part.vectors, words) for part in first.values() if hasattr(part, "vectors"))


@pytest.mark.parametrize("orthogonality", [0.0, 0.5])
def test_a_step_takes_the_penalty_and_counts_for_the_ranks(orthogonality):
    """At the start Λ is zero, so that the penalty alone moves P and Q."""
    own = CONFIGS["adalora"](r=2, initial_r=3, orthogonality=orthogonality)
    network = add_adapters(randomized(tiny_config("llama"), dtype=torch.float32), own)
    asked = OptimizerConfig(optimizer="adamw", lr=1e-2, weight_decay=0.0)
    config = TrainConfig(run=RunConfig(adapter="adalora"), optimizer=asked, adalora=own)
    before = {name: value.detach().clone() for name, value in trained(network).items()}
    allocator = RankAllocator(network, "default", 10)
    engine = Engine(Objective(network), open_optimizers(config, network), allocator=allocator)
    ids = torch.randint(3, 61, (2, 9))
    assert engine.train([{"input_ids": ids, "labels": ids}]).is_updated and allocator.updates == 1
    for name, value in trained(network).items():
        assert torch.equal(value, before[name]) == (orthogonality == 0 and not name.endswith(".E")), name


def test_the_room_that_a_prefix_leaves():
    """Positions that are relative have no end, so nothing is taken from the text."""
    for family, room in (("gpt2", -4), ("t5", 0)):
        network = add_adapters(randomized(tiny_config(family)), CONFIGS["prefix"](tokens=4))
        config = TrainConfig(run=RunConfig(device="cpu", adapter="prefix"))
        resolved = resolve_network(config, Ranks(), network)
        assert resolved.network.context == network.config.context + room


def test_memory_is_foretold_of_what_the_account_knows():
    for method in METHODS:
        assert has_memory_estimate(TrainConfig(run=RunConfig(adapter=method))) == (method == "lora")
    known, unknown = {"r": 2, "targets": "attention", "b_lr_ratio": 4.0}, ({"targets": "query"}, {"dropout": 0.1}, WHOLE)
    for changes in (known, *unknown):
        assert has_memory_estimate(TrainConfig(run=RunConfig(adapter="lora"), lora=LoraConfig(**changes))) == (changes is known)


def test_patterns_in_a_runs_settings():
    """A table of numbers by regular expression goes through config.toml; that of another method is left out."""
    own = LoraConfig(rank_pattern={r"0\.mlp\.up": 1}, alpha_pattern={'a "quoted" name': 5.0})
    config = TrainConfig(run=RunConfig(adapter="lora"), lora=own)
    table = tomllib.loads(tomli_w.dumps(to_plain(config)))
    assert from_plain(TrainConfig, table, "config.toml") == config
    assert {"run", "lora"} <= table.keys() and not (CONFIGS.keys() - {"lora"}) & table.keys()
    table["lora"]["alpha_pattern"] = {"mlp": 5}
    assert type(from_plain(TrainConfig, table, "config.toml").lora.alpha_pattern["mlp"]) is float
    table["lora"]["rank_pattern"] = {"mlp": "two"}
    with pytest.raises(TrainError, match=r"config\.toml: lora: rank_pattern\.mlp = 'two': int is expected"):
        from_plain(TrainConfig, table, "config.toml")
