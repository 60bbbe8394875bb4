"""Frozen parts, gradual unfreezing and rates by layer, through the real command and beside what they promise."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import model.__main__
from model.config import ModelConfig
from model.init import build_network
from model.parameters import parameters
from tests.conftest import randomized, tiny_config
from tests.fault.test_ranks import torchrun
from tests.runs import assert_same_end, command, further, last_checkpoint, stopped_at
from train.config_toml import read_settings
from train.layer_groups import layer_groups
from train.optimizers.build import build_optimizer
from train.overrides import differing
from train.registry import load
from train.runs.checkpoint import checkpoints, step_of
from train.setup import rates_by_layer
from train.unfreeze import Unfreezing

HEADS = {"gpt2": "lm", "bert": "sequence", "t5": "lm", "bart": "sequence"}


@pytest.mark.parametrize("family", HEADS)
def test_layers_from_the_top_down(family):
    """Every parameter is in one group; of two stacks the decoder comes first."""
    config = tiny_config(family).replace(head=HEADS[family])
    names = [*parameters(config)]
    groups = layer_groups(config, names)
    assert sorted(itertools.chain(*groups.values())) == sorted(names)
    first, *layers, last = groups
    assert (first, last) == ("head", "embeddings") and len(layers) == config.depth + (config.decoder_depth or 0)
    assert layers[0].endswith(f"layer {(config.decoder_depth or config.depth) - 1}") and layers[-1].endswith("layer 0")
    for group, held in groups.items():
        stack, _, number = group.rpartition("layer ")
        inside = [name for name in held if f"{stack.strip()}{'.' * bool(stack)}blocks.{number}." in name]
        norms = [name for name in held if name.endswith(("norm.weight", "norm.bias")) and "blocks" not in name]
        if "layer" in group:
            assert len(inside) + len(norms) == len(held) and len(inside) > 5
            assert bool(norms) == any(name.startswith((f"body.{stack.strip()}.norm", "body.norm")) for name in norms)
    tied = config.head == "lm"
    assert bool(groups["head"]) != tied and "body.embedding.weight" in groups["embeddings"]


def records(folder, labels: str):
    folder.mkdir()
    rows = [{"text": f"{word} value {n}", "label": labels[n % len(labels)]} for n, word in enumerate(["list", "string"] * 20)]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def changed(run, step: int, base: dict) -> set[str]:
    folder = next(each for each in checkpoints(run) if step_of(each) == step)
    after = load_file(folder / "model.safetensors")
    return {name for name in after if name in base and not torch.equal(after[name], base[name])}


def test_a_new_head_alone_is_trained(options, finished, tmp_path):
    """--freeze all keeps all that --init brings; it is refused where the head is not new; body then trains the head."""
    labelled = ["--objective", "classify", "--corpus", records(tmp_path / "a", "xy"), "--steps", 8, "--eval-every", 8]
    base = load_file(last_checkpoint(finished) / "model.safetensors")
    shared, run = [*further(options), *labelled, "--save-every", 8], tmp_path / "run"
    said = command(*shared, "--init", finished, "--freeze", "all", "--out", run)
    assert said.code == 0 and "frozen (--freeze all)" in said.out, said.err
    assert changed(run, 8, base) == set()
    assert (rate := read_settings(run).optimizer.lr) == load("classify").defaults_of(read_settings(run)).lr and rate > 1e-4
    assert "of pretraining's" not in said.out  # an eighth is for weights that are trained further
    assert load_file(last_checkpoint(run) / "optimizer.safetensors").keys()
    assert all(name.startswith("optimizer.head.") for name in load_file(last_checkpoint(run) / "optimizer.safetensors"))
    said = command(*shared, "--init", run, "--freeze", "all", "--out", tmp_path / "again")
    assert said.code == 2 and "has the head 'sequence' of this objective already, --freeze body trains it" in said.err
    shared += ["--steps", 1]
    said = command(*shared, "--init", run, "--freeze", "all", "--classify.pool", "mean", "--out", tmp_path / "mean")
    assert said.code == 0 and "a new head that pools 'mean' takes the place of its own" in said.out, said.err
    said = command(*shared, "--init", finished, "--freeze", "head", "--out", tmp_path / "head")
    assert said.code == 2 and "--freeze head freezes the new head, whose weights are random" in said.err
    for frozen in ("body", "embeddings"):  # one group learns, and two of three
        said = command(*shared, "--init", run, "--freeze", frozen, "--layer-rate", 0.5, "--out", tmp_path / frozen)
        assert (said.code == 2 and "--layer-rate 0.5 would have no effect" in said.err) == (frozen == "body")
    three = records(tmp_path / "three", "xyz")
    said = command(*shared, "--corpus", three, "--init", run, "--out", tmp_path / "labels")
    assert said.code == 0 and "has a head of 2 labels: a new one of 3 takes its place" in said.out, said.err
    head = load_file(last_checkpoint(run) / "model.safetensors")
    shared = shared[:-2]
    assert command(*shared, "--init", run, "--freeze", "body", "--out", tmp_path / "body").code == 0
    assert changed(tmp_path / "body", 8, head) == {"score.weight"}


@pytest.mark.parametrize("what", ["embeddings", "top:1"])
def test_parts(what, options, finished, tmp_path):
    run, base = tmp_path / "run", load_file(last_checkpoint(finished) / "model.safetensors")
    shared = [*further(options), "--init", finished, "--steps", 2, "--eval-every", 2, "--freeze", what]
    assert command(*shared, "--out", run).code == 0
    embeddings = {name for name in base if "wte" in name or "wpe" in name}
    below = {name for name in base if "h.0." in name} if what == "top:1" else set()
    assert set(base) - changed(run, 2, base) == embeddings | below and len(embeddings) == 2


@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_one_layer_more_each_time(optimizer, options, finished, tmp_path):
    """Frozen groups keep their bytes, in the averages too, and have no moments; killed at a border or within a group and
    resumed, the run ends in the same bytes."""
    run, base = tmp_path / "run", load_file(last_checkpoint(finished) / "model.safetensors")
    asked = ["--init", last_checkpoint(finished), "--unfreeze", 8, "--layer-rate", 0.4, "--ema", 0.5, "--weight-decay", 0.5]
    asked += ["--optimizer", optimizer, "--steps", 24, "--save-every", 4, "--eval-every", 8, "--keep", 9, "--log-every", 1]
    said = command(*further(options), *asked, "--out", run)
    assert said.code == 0, said.err
    assert "unfreeze layer 1 from step 0, layer 0 from 8, embeddings from 16" in said.out
    assert "layers   learn at 1 (layer 1), 0.4 (layer 0), 0.16 (embeddings) times the rate" in said.out
    of_group = {
        "layer 1": {name for name in base if "h.1." in name or "ln_f" in name},
        "layer 0": {name for name in base if "h.0." in name},
        "embeddings": {name for name in base if "wte" in name or "wpe" in name},
    }
    assert sum(map(len, of_group.values())) == len(base)
    for step, groups in ((4, 1), (8, 1), (12, 2), (16, 2), (20, 3), (24, 3)):
        assert changed(run, step, base) == set().union(*[*of_group.values()][:groups]), step
    for folder in checkpoints(run):
        moments = " ".join(load_file(folder / "optimizer.safetensors"))
        assert ("blocks.0." in moments) == (step_of(folder) > 8) and ("embedding." in moments) == (step_of(folder) > 16)
    for stop in (8, 13) if optimizer == "muon" else (16,):
        parted = tmp_path / f"parted-{stop}"
        assert stopped_at(stop, *further(options), *asked, "--out", parted).code == 130
        assert command("--resume", parted).code == 0
        assert_same_end(run, parted, steps=24)


def test_an_epoch_a_layer(options, finished, tmp_path):
    """`gradual` is recorded as the steps of an epoch; a run that is too short says which layers never learn."""
    said = command(*further(options), "--init", finished, "--unfreeze", "gradual", "--steps", 4, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    stored = read_settings(tmp_path / "run")
    steps = int(stored.run.unfreeze)
    for asked, differs in (("gradual", False), (f"{steps}", False), ("3", True)):  # what a restart by torchrun may say
        found = differing(stored, replace(stored, run=replace(stored.run, unfreeze=asked)))
        assert bool(found) == differs, found
    epochs = float(said.out.split(" epochs in all")[0].split()[-1])
    assert steps > 10 and abs(4 / steps - epochs) < 0.06
    assert f"layer 1 from step 0; layer 0 to embeddings would begin at {steps} and later, and the run ends at 4" in said.out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_two_ranks_unfreeze_as_one(mesh, options, tmp_path):
    """Before and after the border between two groups; without dropout, whose noise each rank draws for itself."""
    asked = [*options, "--dropout", 0, "--unfreeze", 4, "--steps", 8, "--save-every", 4, "--eval-every", 8, "--keep", 9]
    asked += ["--optimizer", "adamw", "--lr", 1e-3, "--layer-rate", 0.5]
    assert command(*asked, "--out", tmp_path / "one").code == 0
    with torchrun(*asked, "--mesh", mesh, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=200)
    assert running.returncode == 0, err[-3000:]
    first, second = (weights_of(tmp_path / "one", step, tmp_path / f"{step}") for step in (4, 8))
    embedding = "transformer.wte.weight"
    assert torch.equal(first[embedding], second[embedding]) and not torch.equal(*(each[BLOCK] for each in (first, second)))
    for step, wanted in ((4, first), (8, second)):
        weights = weights_of(tmp_path / "two", step, tmp_path / f"two-{step}")
        assert max((weights[name] - wanted[name]).abs().max() for name in wanted) < 2e-5
        assert torch.equal(weights[embedding], wanted[embedding])


BLOCK = "transformer.h.0.mlp.c_fc.weight"


def weights_of(run, step: int, place) -> dict:
    folder = next(each for each in checkpoints(run) if step_of(each) == step)
    assert model.__main__.main(["export", str(folder), "--out", str(place)]) == 0
    return load_file(place / "model.safetensors")


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adamw8bit", "sgd"])
def test_rates_by_layer(optimizer):
    """Each group's rate is the one above times the layer rate; with Muon both rates are scaled. Norms and biases too."""
    network = build_network(ModelConfig.preset("tiny").replace(vocab_size=300, depth=3, head="sequence"), seed=0)
    multiples = rates_by_layer(network, 0.5)
    wanted = {"head": 1.0, "layer 2": 0.5, "layer 1": 0.25, "layer 0": 0.125, "embeddings": 0.0625}
    groups = layer_groups(network.config, multiples)
    assert {name: {multiples[each] for each in held} for name, held in groups.items()} == {k: {v} for k, v in wanted.items()}
    roles = {name: parameter.role for name, parameter in parameters(network.config).items()}
    built = build_optimizer(
        optimizer, network.named_parameters(), roles.__getitem__, lr=1e-3, matrix_lr=1e-2, lr_multiple_of=multiples.__getitem__
    )
    seen = {name: group["lr"] for group in built.param_groups for name in group["names"]}
    by_muon = {name for name, role in roles.items() if role == "matrix"} if optimizer == "muon" else set()
    assert seen == {name: multiple * (1e-2 if name in by_muon else 1e-3) for name, multiple in multiples.items()}
    built.set_lr(0.5)
    assert [group["lr"] for group in built.param_groups] == [group["base_lr"] * 0.5 for group in built.param_groups]


def test_dropped_gradients_are_those_of_frozen_groups():
    """All gradients are computed, as under DDP, and what is frozen at a step loses its own."""
    network = randomized(tiny_config("gpt2"))
    unfreezing = Unfreezing(network, 5, computes_all=True)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for step, kept in ((4, ["layer 1"]), (5, ["layer 1", "layer 0"]), (10, ["layer 1", "layer 0", "embeddings"])):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        unfreezing.begin(step)
        unfreezing.drop_gradients(step)
        assert all(parameter.requires_grad for parameter in network.parameters())
        held = {names[id(parameter)] for parameter in network.parameters() if parameter.grad is not None}
        groups = layer_groups(network.config, names.values())
        assert held == {name for group in kept for name in groups[group]}


BAD = {  # words of a command line that is refused: what is said
    "--freeze top:3": "--freeze top:3: the network has 2 layers",
    "--freeze body": "leaves nothing to train: head and embedding are one matrix",
    "--freeze atention": "is found in no name of a weight (attention",
    "--freeze all": "has the head 'lm' of this objective already, which is its embedding too: --freeze top:1 trains a layer",
    "--freeze top:0": "leaves nothing to train: head and embedding are one matrix",
    "--freeze top:-1": "--freeze top:-1: top:K, with the number of layers from the top that are trained",
    "--unfreeze 0": "gradual (one layer an epoch), or steps a layer, 1 at least",
    "--unfreeze slowly": "--unfreeze slowly: gradual",
    "--unfreeze 4 --freeze top:1": "--unfreeze: layer 1 alone is trained",
    "--unfreeze 4 --adapter lora": "--unfreeze 4: --adapter lora freezes all weights",
    "--layer-rate 1.5": "--layer-rate 1.5: above 0 and at most 1",
    "--layer-rate 0": "--layer-rate 0.0: above 0 and at most 1",
}


@pytest.mark.parametrize("words", BAD)
def test_what_is_refused(words, options, finished, tmp_path):
    said = command(*further(options), "--init", finished, *words.split(), "--out", tmp_path / "run")
    assert said.code == 2 and BAD[words] in said.err, said.err
    assert not (tmp_path / "run" / "config.toml").exists()


def test_random_weights_have_nothing_to_keep(options, tmp_path):
    said = command(*options, "--freeze", "all", "--out", tmp_path / "run")
    assert said.code == 2 and "--freeze all keeps what --init brings" in said.err


def test_info_counts_what_is_trained(capsys):
    counted = {}
    for words in ([], ["--freeze", "top:2"], ["--freeze", "wpe"]):
        assert model.__main__.main(["info", "gpt2", *words]) == 0
        text = capsys.readouterr().out
        row = next((line for line in text.splitlines() if "trainable" in line), None)
        memory = next(line for line in text.splitlines() if line.strip().startswith("optimizer"))
        counted[" ".join(words)] = (None if row is None else int(row.split()[1].replace(",", "")), memory)
    assert counted[""][0] is None and counted["--freeze top:2"][0] == 2 * 7_087_872 + 1536
    assert counted["--freeze wpe"][0] == 124_439_808 - 786_432
    assert len({memory for _, memory in counted.values()}) == 3
