"""`--objective dpo` and `kto` through the real command: they learn; killed, with adapters, on two ranks, with references."""

import json
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import train.loop
from quant.linear import packed_tensors
from tests.chat_runs import CHATML, write_base
from tests.fault.test_command import assert_one_clear_line
from tests.fault.test_ranks import torchrun
from tests.preference_runs import build_objective, open_preference, pairs, perturb, rated, write_pairs
from tests.ranks import in_two_ranks
from tests.records import write_rows
from tests.runs import Said, arguments, assert_same_end, command, last_checkpoint, metrics, nothing_half_made, stopped_at
from train.parallel.mesh import build_mesh
from train.parallel.parallelize import parallelize, unwrapped
from train.parallel.ranks import Ranks, own_rows
from train.parallel.shard import full_tensor, local_grad
from train.reference_file import same_for_same
from train.runs.checkpoint import step_of
from train.step import train_step

PAIRS = 8
SETTINGS = {
    "batch-size": 4,
    "context": 128,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "sample-every": 0,
    "log-every": 1,
    "steps": 6,
    "save-every": 3,
    "eval-every": 3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("preferences")
    write_base(place / "base", CHATML, hidden_size=64, intermediate_size=96)
    write_pairs(place / "dpo.jsonl", PAIRS, longest=4)
    write_pairs(place / "dpo_held_out.jsonl", 4, seed=1, longest=4)
    write_rows(place / "kto.jsonl", rated(PAIRS, longest=4))
    write_rows(place / "kto_held_out.jsonl", rated(4, seed=1, longest=4))
    return place


def options(place: Path, objective: str, **changes: object) -> list[str]:
    files = {"objective": objective, "init": place / "base", "corpus": place / f"{objective}.jsonl"}
    files |= {"validation": place / f"{objective}_held_out.jsonl"}
    return arguments(SETTINGS | files | {f"{objective}.replies": 2, f"{objective}.max-reply": 8} | changes)


def run(place: Path, objective: str, out: Path, **changes: object) -> Said:
    said = command(*options(place, objective, **changes), "--out", out)
    assert said.code == 0, said.err
    return said


def validations(run: Path) -> list[dict]:
    return [row for row in metrics(run) if row["split"] in ("before", "validation")]


def steps(run: Path) -> list[dict]:
    return [row for row in metrics(run) if row["split"] == "train"]


# ---- learning

LEARNED = {  # options, an upper bound of the loss
    "dpo": ({}, 0.2),
    "kto": ({}, 0.35),
    "orpo": ({"dpo.loss": "orpo"}, 4.0),
}


@pytest.mark.parametrize("name", [*LEARNED])
def test_it_learns_the_pairs_that_it_trains_on(name, place, tmp_path):
    objective = "kto" if name == "kto" else "dpo"
    corpus = place / f"{objective}.jsonl"
    changes = {"steps": 30, "eval-every": 30, "save-every": 30, "batch-size": 8, "lr": "1e-3", "matrix-lr": "5e-3"}
    changes["validation"] = corpus
    said = run(place, objective, tmp_path / "run", **changes | LEARNED[name][0])
    before, after = validations(tmp_path / "run")
    assert after["accuracy"] == 1 and after["loss"] < LEARNED[name][1] < before["loss"]
    if name == "kto":
        assert after["reward_good"] > 0.5 and after["reward_bad"] < -0.5
        assert "100.0% on their side of z" in said.out and "reward of good replies" in said.out
        assert "labels   4 good, 4 bad" in said.out
    else:
        assert after["margin"] > (0.01 if name == "orpo" else 0.2) and after["reward_chosen"] > after["reward_rejected"]
        assert "100.0% ordered right" in said.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("on their side of z" if name == "kto" else "ordered right") in page
    assert 0 <= after["ended"] <= 1 and f"python -m model chat {tmp_path / 'run'}" in said.out


def test_what_is_said(place, tmp_path):
    """The pair as it is read, the loss, the reference; values of step 0; how many pairs a step has."""
    said = run(place, "dpo", tmp_path / "run", **{"dpo.beta": 0.3})
    for text in (
        "8 to train on, 4 in ",
        "template chatml",
        f"{place / 'dpo.jsonl'}:1: ",
        "chosen   yes ",
        "<|im_end|>\nrejected no ",
        "loss     sigmoid, β 0.3",
        f"reference a frozen copy of {place / 'base'}",
        "steps 0 to 6 of 4 pairs, 3.0 epochs",
        "before the first step: loss of held-out pairs 0.6931 · 0.0% ordered right · margin 0.000 · KL 0.000 nats a token",
    ):
        assert text in said.out, text
    assert json.loads((tmp_path / "run" / "reference.json").read_text())["init"] == str(place / "base")
    said = run(place, "dpo", tmp_path / "orpo", steps=1, **{"dpo.loss": "orpo"})
    assert "reference none: the loss needs none" in said.out and not (tmp_path / "orpo" / "reference.json").exists()


def one_pair(place: Path, tmp_path: Path, row: dict, **changes: object) -> list[dict]:
    """The steps of a run on one pair, by plain gradient descent at a constant rate."""
    corpus = write_rows(tmp_path / "one.jsonl", [row])
    asked = {"optimizer": "sgd", "momentum": 0, "schedule": "constant", "warmup": 0, "weight-decay": 0, "batch-size": 1}
    asked |= {"steps": 11, "eval-every": 11, "save-every": 11, "corpus": corpus, "validation": corpus, "dpo.replies": 0}
    line = [word for word in options(place, "dpo", **asked | changes) if word not in ("--dpo.max-reply", "8")]
    out = tmp_path / f"run {len([*tmp_path.iterdir()])}"
    said = command(*line, "--out", out)
    assert said.code == 0, said.err
    return steps(out)


def test_ten_steps_on_one_pair(place, tmp_path):
    """The margin rises at each; the loss falls."""
    found = one_pair(place, tmp_path, pairs(1)[0], lr=0.02)
    margins, losses = ([row[name] for row in found] for name in ("margin", "loss"))
    assert len(margins) == 11 and margins[0] == 0 and margins == sorted(set(margins)) and margins[-1] > 0.05
    assert losses == sorted(set(losses), reverse=True) and losses[0] == pytest.approx(0.693147, abs=1e-6)


def test_dpop_keeps_what_dpo_lets_fall(place, tmp_path):
    """A rejected reply that repeats the chosen one: DPO makes both less likely. DPOP does not."""
    chosen, rejected = "the list of names", "the list of names, the list of names, the list"
    replies = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))}
    row = {"prompt": [{"role": "user", "content": "Return"}], **replies}
    falls = one_pair(place, tmp_path, row, lr=0.01)
    keeps = one_pair(place, tmp_path, row, lr=0.01, **{"dpo.loss": "dpop"})
    assert falls[-1]["margin"] > 0.5 and falls[-1]["log_prob_chosen"] < falls[0]["log_prob_chosen"] - 1
    assert keeps[-1]["margin"] > 0.2 and keeps[-1]["log_prob_chosen"] > keeps[0]["log_prob_chosen"]
    assert min(row["log_prob_chosen"] for row in keeps) > keeps[0]["log_prob_chosen"] - 0.5, "a step too far is taken back"


# ---- resume

WAYS = {
    "dpo, a copy": ("dpo", {}),
    "dpo, precomputed": ("dpo", {"dpo.reference": "precomputed", "dpo.ld-alpha": 0.5}),
    "dpo, adapter off": ("dpo", {"adapter": "lora"}),
    "kto": ("kto", {"accumulate": 2}),
    "kto, precomputed": ("kto", {"kto.reference": "precomputed"}),
    "orpo": ("dpo", {"dpo.loss": "orpo"}),
    "aot": ("dpo", {"dpo.loss": "aot", "accumulate": 2}),
}
SLOW = ("dpo, adapter off", "kto, precomputed", "orpo", "aot")


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way in SLOW else ()) for way in WAYS])
def test_killed_and_resumed_it_ends_in_the_same_bytes(way, place, tmp_path):
    objective, changes = WAYS[way]
    line = options(place, objective, **changes)
    said = command(*line, "--out", tmp_path / "whole")
    assert said.code == 0, said.err
    said = stopped_at(4, *line, "--out", tmp_path / "run")
    assert said.code == 130 and step_of(last_checkpoint(tmp_path / "run")) == 4, said.err
    said = command("--resume", tmp_path / "run")
    assert said.code == 0, said.err
    assert_same_end(tmp_path / "whole", tmp_path / "run", SETTINGS["steps"])


def test_a_resume_refuses_another_reference(place, tmp_path):
    """--init's weights have changed, or are gone: by name. A loss without a reference does not mind."""
    base = shutil.copytree(place / "base", tmp_path / "base")
    for name, changes in {"copy": {}, "precomputed": {"dpo.reference": "precomputed"}, "free": {"dpo.loss": "simpo"}}.items():
        assert stopped_at(4, *options(place, "dpo", init=base, **changes), "--out", tmp_path / name).code == 130
    write_base(base, CHATML, hidden_size=64, intermediate_size=96, seed=1)
    expected = (f"the reference {base} has other weights than when {tmp_path / 'copy'} began", "bring them back")
    assert_one_clear_line(command("--resume", tmp_path / "copy"), *expected, f"--init {tmp_path / 'copy'}")
    assert_one_clear_line(command("--resume", tmp_path / "precomputed"), "has other weights than when", "bring them back")
    shutil.rmtree(base)
    for name in ("copy", "precomputed"):
        expected = f"the reference, which --init names, cannot be read: {base} does not exist. Bring it back"
        assert_one_clear_line(command("--resume", tmp_path / name), expected)
    shutil.copytree(place / "base", base)
    for name in ("copy", "precomputed", "free"):
        said = command("--resume", tmp_path / name)
        assert said.code == 0, said.err


# ---- precomputed references


def test_references_give_the_same_numbers(place, tmp_path):
    """A copy, the adapter switched off, and a table: every metric of training and validation, bit for bit."""
    for name in ("auto", "copy", "precomputed"):
        run(place, "dpo", tmp_path / name, adapter="lora", **{"dpo.reference": name})
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "copy") == metrics(tmp_path / "precomputed")
    assert steps(tmp_path / "auto")[-1]["margin"] > 0.01
    assert steps(tmp_path / "auto")[0]["margin"] == 0 and steps(tmp_path / "auto")[0]["kl"] == 0


def test_a_file_of_a_reference_is_shared_and_checked(place, tmp_path):
    """Two runs of other steps and losses read it; other weights, number format or records are refused, and nothing is left."""
    shared = {"dpo.reference": "precomputed", "dpo.reference-file": tmp_path / "shared" / "log_probs.safetensors"}
    said = run(place, "dpo", tmp_path / "first", **shared)
    assert f"reference 24 log-probabilities computed: {shared['dpo.reference-file']}" in said.out
    assert not (tmp_path / "first" / "reference.safetensors").exists()
    before = shared["dpo.reference-file"].read_bytes()
    fewer = write_rows(tmp_path / "fewer.jsonl", pairs(PAIRS, longest=4)[::-1][:6])  # in another order
    said = run(place, "dpo", tmp_path / "second", **shared | {"dpo.loss": "ipo", "batch-size": 2, "corpus": fewer, "seed": 3})
    assert f"reference {shared['dpo.reference-file']}: 20 log-probabilities read" in said.out
    assert steps(tmp_path / "second")[0]["kl"] == pytest.approx(0, abs=1e-5)

    write_base(tmp_path / "other", CHATML, hidden_size=64, intermediate_size=96, seed=1)
    others = write_pairs(tmp_path / "others.jsonl", PAIRS, seed=2, longest=4)
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    path = str(shared["dpo.reference-file"])
    for changes, expected in (
        ({"init": tmp_path / "other"}, ("is of another reference (init_sha256 '", "name another --dpo.reference-file", path)),
        ({"precision": "bf16"}, ("is of another reference (precision 'fp32' there, 'bf16' here)", path)),
        ({"dpo.ld-alpha": 0.5}, ("is of another reference (ld_alpha 1.0 there, 0.5 here)", path)),
        ({"corpus": others}, ("lacks 16 of the 24 rows of this run: other records, template", path)),
        ({"dpo.reference-file": tmp_path / "broken.safetensors"}, ("broken.safetensors is no file of a reference's",)),
    ):
        said = command(*options(place, "dpo", **shared | changes), "--out", tmp_path / "refused")
        assert_one_clear_line(said, *expected)
        assert not (tmp_path / "refused").exists(), expected
    assert shared["dpo.reference-file"].read_bytes() == before and nothing_half_made(tmp_path)


def test_rows_of_equal_ids_have_one_log_probability(place, tmp_path):
    """A prompt and chosen reply twice, beside shorter and longer rejected ones: a resume reads what was computed."""
    assert same_for_same(torch.tensor([5, 7, 5]), torch.tensor([1.0, 2.0, 3.0])).tolist() == [3, 2, 3]
    row, others = pairs(1)[0], pairs(4, seed=5, longest=12)
    rows = [row | {"rejected": other["rejected"]} for other in others] + pairs(4, seed=6)
    corpus = write_rows(tmp_path / "twice.jsonl", rows)
    line = options(place, "dpo", corpus=corpus, **{"dpo.reference": "precomputed", "dpo.ld-alpha": 0.5, "batch-size": 3})
    assert command(*line, "--out", tmp_path / "whole").code == 0
    assert stopped_at(2, *line, "--out", tmp_path / "run").code == 130
    assert command("--resume", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "run", SETTINGS["steps"])
    run(place, "dpo", tmp_path / "copy", corpus=corpus, **{"dpo.ld-alpha": 0.5, "batch-size": 3})
    for mine, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "copy"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_a_dry_run_with_a_precomputed_reference(place, tmp_path):
    for objective in ("dpo", "kto"):
        line = options(place, objective, **{f"{objective}.reference": "precomputed"})
        said = command(*line, "--dry-run", "--out", tmp_path / "run")
        assert said.code == 0 and "zeros stand for them here" in said.out, said.err
        assert "example  the first of the first step" in said.out and not (tmp_path / "run").exists()


# ---- adapters


@pytest.mark.parametrize("quantize", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_the_base_stays_bit_identical(quantize, place, tmp_path):
    """Under an adapter: every weight of the network, packed ones too, before the first step and after the last."""
    seen = []

    def weights(self) -> dict[str, torch.Tensor]:
        network = self.engine.network
        found = {name: each.detach().clone() for name, each in network.named_parameters() if not each.requires_grad}
        found |= {f"packed {index}": each.detach().clone() for index, each in enumerate(packed_tensors(network))}
        return found

    opened, concluded = train.loop.Run._open_files, train.loop.conclude
    watched_start = patch.object(train.loop.Run, "_open_files", lambda self: (seen.append(weights(self)), opened(self)))
    watched_end = patch("train.loop.conclude", lambda self, *rest: (seen.append(weights(self)), concluded(self, *rest)))
    quantized = {} if quantize is None else {"quantize": quantize}
    with watched_start, watched_end:
        run(place, "dpo", tmp_path / "run", adapter="lora", lr="1e-2", **quantized)
    before, after = seen
    assert len(before) > 10 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert steps(tmp_path / "run")[-1]["margin"] > 0.1
    assert steps(tmp_path / "run")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


# ---- ranks

STEPS = {  # objective, settings, pairs of each micro-batch; of one pair, rank 1 has none
    "sigmoid": ("dpo", {}, (4,)),
    "sigmoid, a rank without a pair": ("dpo", {}, (1,)),
    "aot with sft and orpo": ("dpo", {"loss": "aot=1,aot_unpaired=1,sft=0.5,orpo=0.2", "beta": 0.2}, (1, 3)),
    "kto": ("kto", {"desirable_weight": 1.3}, (2, 1)),
}


class Kept:
    """In the optimizer's place: keeps the gradients of a step."""

    def __init__(self, objective):
        self.objective, self.param_groups = objective, [{"params": list(objective.parameters())}]

    def step(self):
        named = unwrapped(self.objective).network.named_parameters()
        self.gradients = {name: full_tensor(local_grad(each), each).clone() for name, each in named}

    def zero_grad(self, set_to_none=True):
        self.objective.zero_grad(set_to_none=set_to_none)


def taken(objective, micro_batches, ranks):
    kept = Kept(objective)
    result = train_step(objective, [own_rows(batch, ranks) for batch in micro_batches], kept, ranks=ranks)
    return result, kept.gradients


def in_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks, cpu = Ranks(rank, 2, rank), torch.device("cpu")

    def build(name: str):
        objective, settings, _ = STEPS[name]
        files = {"validation": folder / f"{objective}.jsonl", "batch_size": PAIRS}
        task, network = open_preference(objective, folder / "base", folder / f"{objective}.jsonl", **files | settings)
        made = build_objective(task, network, folder / "base").train()
        perturb(network)
        return made, task.source.batch(0)

    for name, (_, _, sizes) in STEPS.items():
        alone, batch = build(name)
        batch = {key: value[: 2 * sum(sizes)] for key, value in batch.items()}
        pieces = {key: value.split([2 * size for size in sizes]) for key, value in batch.items()}
        micro_batches = [{key: parts[i] for key, parts in pieces.items()} for i in range(len(sizes))]
        assert sum(sizes) > 1 or len(own_rows(micro_batches[0], Ranks(1, 2))["labels"]) == 0
        expected, theirs = taken(alone, micro_batches, Ranks())
        for mesh in ("replicate", "shard"):
            objective = parallelize(build(name)[0], build_mesh(mesh, ranks, cpu), cpu)
            result, ours = taken(objective, micro_batches, ranks)
            assert result.count == expected.count == sum(sizes), (name, mesh)
            assert abs(result.loss - expected.loss) < 1e-12, (name, mesh)
            assert max((theirs[key] - ours[key]).abs().max() for key in theirs) < 1e-12, (name, mesh)
            assert result.metrics == pytest.approx(expected.metrics, rel=1e-11, abs=1e-12), (name, mesh)
            assert max(gradient.abs().max() for gradient in ours.values()) > 1e-4, (name, mesh)
    dist.barrier()


@pytest.mark.slow
def test_a_step_on_two_ranks_is_what_it_is_on_one(place, tmp_path):
    """Loss, gradients and metrics in float64, replicated and sharded; losses that compare the pairs of all ranks too."""
    shutil.copytree(place / "base", tmp_path / "base")
    for objective in ("dpo", "kto"):
        shutil.copy(place / f"{objective}.jsonl", tmp_path)
    in_two_ranks(in_ranks, tmp_path)


RANKS = {
    "dpo, precomputed": ("dpo", {"dpo.reference": "precomputed"}),
    "kto": ("kto", {"accumulate": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", RANKS)
def test_runs_on_two_ranks(way, place, tmp_path):
    """Three pairs a batch, two of them on the first rank; of 8 records the third batch repeats one of the first."""
    objective, changes = RANKS[way]
    line = options(place, objective, **{"batch-size": 3} | changes)
    assert command(*line, "--out", tmp_path / "one").code == 0
    with torchrun(*line, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    for mine, other in zip(*(metrics(tmp_path / name) for name in ("one", "two")), strict=True):
        assert mine.pop("split") == other.pop("split") and mine == pytest.approx(other, rel=1e-4, abs=2e-5)
    assert re.search("ordered right|on their side", (tmp_path / "two" / "report.html").read_text())


@pytest.mark.slow
def test_sharded_weights_cannot_make_a_table(place, tmp_path):
    """They are told how to get one."""
    line = options(place, "dpo", **{"dpo.reference": "precomputed", "dpo.reference-file": tmp_path / "table"})
    with torchrun(*line, "--mesh", "shard", "--out", tmp_path / "run") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 1 and not (tmp_path / "run").exists()
    assert f"precomputed: {tmp_path / 'table'} is not there, and sharded weights cannot make it: make it by a run" in err
