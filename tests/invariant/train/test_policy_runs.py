"""`--objective grpo`, `rloo` and `ppo` through the real command: they learn, resume inside a rollout, and say what they do."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.fault.test_ranks import torchrun
from tests.policy_runs import write_place
from tests.runs import Said, arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from train.reports.log import read_metrics

REWARD = r"regex:(?s).*[aeiou].*"  # true of about half of the replies of a random network
SETTINGS = {
    "batch-size": 8, "context": 128, "threads": 1, "device": "cpu", "precision": "fp32", "sample-every": 0, "steps": 6,
    "save-every": 6, "eval-every": 6, "optimizer": "adamw", "lr": "1e-3", "weight-decay": 0, "reward": REWARD,
}  # fmt: skip
SMALL = {"group": 4, "max-reply": 8, "validation-prompts": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("policy"))


def options(place, objective="grpo", **changes) -> list[str]:
    files = {"objective": objective, "init": place / "base", "corpus": place / "train.jsonl"}
    files |= {"validation": place / "held_out.jsonl"}
    small = {f"{objective}.{name}": value for name, value in SMALL.items()}
    return arguments(SETTINGS | files | small | {name.replace("NAME", objective): value for name, value in changes.items()})


def run(place, out, objective="grpo", **changes) -> Said:
    said = command(*options(place, objective, **changes), "--out", out)
    assert said.code == 0, said.err
    return said


def steps(folder) -> list[dict]:
    return [row for row in metrics(folder) if row["split"] == "train"]


# ---- resume

KILLED = {  # objective, options, steps at which it is stopped
    "between minibatches": ("grpo", {"NAME.minibatches": 2, "NAME.rollout-epochs": 2}, (1, 3)),
    "rloo": ("rloo", {"NAME.minibatches": 2}, (3,)),
    "adapter": ("grpo", {"NAME.minibatches": 2, "NAME.beta": 0.1, "adapter": "lora"}, (3,)),
    "ppo": ("ppo", {"NAME.minibatches": 2, "NAME.rollout-epochs": 2, "NAME.kl-target": 0.01, "NAME.kl-horizon": 20}, (1, 3)),
    "ppo, adapter": ("ppo", {"NAME.minibatches": 2, "NAME.rollout-epochs": 1, "adapter": "lora"}, (3,)),
    "resampled": ("grpo", {"NAME.minibatches": 2, "NAME.resample": 2}, (1,)),
}


@pytest.mark.parametrize("name", [*KILLED])
def test_a_run_stopped_inside_a_rollout_goes_on_bit_for_bit(name, place, tmp_path):
    objective, changes, ends = KILLED[name]
    run(place, tmp_path / "whole", objective, **changes)
    for step in ends:
        parted = tmp_path / f"parted{step}"
        assert stopped_at(step, *options(place, objective, **changes), "--out", parted).code == 130
        state = json.loads((last_checkpoint(parted) / "state.json").read_text())["source"]["rollout"]
        assert state["number"] == (step - 1) // (2 * changes.get("NAME.rollout-epochs", 1))
        assert command("--resume", parted).code == 0
        assert_same_end(tmp_path / "whole", parted, steps=6)
        assert (last_checkpoint(parted) / "critic" / "engine.json").is_file() == (objective == "ppo")


# ---- values

def test_the_first_ratio_is_exactly_1_and_moves_then(place, tmp_path):
    changes = {"grpo.minibatches": 2, "grpo.rollout-epochs": 2, "grpo.temperature": 0.7, "lr": "1e-2", "warmup": 0}
    run(place, tmp_path / "run", **changes)
    rows = steps(tmp_path / "run")
    for row in (rows[0], rows[4]):  # the first step of a rollout
        assert (row["ratio_min"], row["ratio"], row["ratio_max"], row["old_kl"]) == (1, 1, 1, 0)
        assert row["clipped_low"] == row["clipped_high"] == 0
    assert rows[1]["ratio_max"] > 1.01 and rows[1]["old_kl"] > 0 and rows[3]["clipped_high"] > 0
    assert all(row["sampler_gap_max"] < 1e-4 for row in rows)


def test_a_constant_reward_moves_no_weight(place, tmp_path):
    (place / "ones.py").write_text("def ones(prompts, completions):\n    return [1.0] * len(completions)\n")
    changes = {"reward": f"{place / 'ones.py'}:ones", "reward-workers": 0}
    run(place, tmp_path / "run", **changes)
    rows = steps(tmp_path / "run")
    assert all(row["grad_norm"] == 0 and row["agreed"] == 1 and row["advantage_std"] == 0 for row in rows)
    begun, ended = (load_file(folder / "model.safetensors") for folder in (place / "base", last_checkpoint(tmp_path / "run")))
    assert begun.keys() == ended.keys()
    for name in begun:
        assert torch.equal(begun[name], ended[name])


def test_it_learns_short_replies(place, tmp_path):
    changes = {"steps": 15, "save-every": 15, "eval-every": 15, "batch-size": 48, "lr": "5e-3", "reward": "length_target:2"}
    run(place, tmp_path / "run", **changes)
    before, after = (row for row in metrics(tmp_path / "run") if row["split"] in ("before", "validation"))
    rows = steps(tmp_path / "run")
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5 and rows[-1]["reply_length"] < rows[0]["reply_length"]
    assert after["reward"] >= before["reward"] and after["loss"] == -after["reward"]


# ---- said

def test_what_is_said_and_written(place, tmp_path):
    several = ["--reward", "length_target:4", "format", "--reward-weights", "1", "0.5"]
    further = {"grpo.beta": 0.1, "eval-corpus": f"more={place / 'train.jsonl'}"}
    said = command(*options(place, **further), *several, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    for text in (
        "12 to train on, 4 held out",
        "rollouts 2 prompts × 4 replies in a rollout, 1 step of 8 replies from it",
        "loss     dapo; advantages divided by a group's standard deviation; KL term k3, β 0.1, to a frozen copy of --init",
        "before the first step: reward of sampled replies",
        "phases   rollout ",
        f"rollouts {tmp_path / 'run' / 'rollouts.png'}",
        f"python -m model chat {tmp_path / 'run'}",
        "--reward length_target:4 format --reward-weights 1.0 0.5",
        "  more: reward of sampled replies",
    ):
        assert text in said.out, text
    assert (tmp_path / "run" / "rollouts.png").stat().st_size > 20_000
    keys = {"reward", "reward_length_target", "reward_format", "reward_std", "kl", "old_kl", "entropy", "clipped_low"}
    keys |= {"clipped_high", "ratio", "ratio_min", "ratio_max", "reply_length", "ended", "agreed", "advantage_std"}
    keys |= {"sampler_gap", "sampler_gap_max", "rollout_tokens_per_s", "update_tokens_per_s", "rollout", "tokens_per_s"}
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and keys <= rows[0].keys()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in samples if row["title"] == "rollout"]
    assert len(rows) == 8 and {row["step"] for row in rows} == {1}
    assert {"prompt", "reply", "has_ended", "rewards", "advantage"} <= rows[0].keys()
    assert rows[0]["rewards"].keys() == {"length_target", "format"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rollouts.png" in page


@pytest.mark.parametrize(
    "objective, held", [("grpo", {"grpo.beta": 10, "grpo.kl": "k2"}), ("ppo", {"ppo.beta": 10, "ppo.rollout-epochs": 1})]
)
def test_a_large_kl_weight_holds_the_policy(objective, held, place, tmp_path):
    changes = {"steps": 8, "save-every": 8, "eval-every": 8, "batch-size": 16, "lr": "3e-4"}
    free = held | {f"{objective}.beta": 1e-9}
    for name, more in (("free", free), ("held", held)):
        run(place, tmp_path / name, objective, **changes, **more)
    free_kl, held_kl = (steps(tmp_path / name)[-1]["kl"] for name in ("free", "held"))
    assert abs(held_kl) < 0.01 and held_kl < free_kl / 2  # ppo's estimate, k1, may be below 0


def test_what_a_run_of_ppo_says_and_writes(place, tmp_path):
    changes = {"NAME.kl-target": 0.1, "NAME.kl-horizon": 50, "NAME.rollout-epochs": 2, "NAME.group": 1}
    said = run(place, tmp_path / "run", "ppo", **changes)
    for text in (
        "rollouts 8 prompts × 1 reply in a rollout, 1 step of 8 replies from it, 2 epochs over it",
        "loss     ppo; γ 1, λ 0.95; KL in the reward, κ 0.05, adapted to 0.1 nats a reply; critic from",
        "phases   rollout ",
    ):
        assert text in said.out, text
    assert "every advantage is 0" not in said.out, "a group of one is PPO's usual"
    keys = {"value_loss", "value_grad_norm", "value_error", "value_clipped", "value", "return", "explained_variance"}
    rows = steps(tmp_path / "run")
    assert keys | {"kl_token", "kl_reply", "kl_coefficient"} <= rows[0].keys() and "agreed" not in rows[0]
    assert rows[0]["kl_reply"] == 0 and (rows[0]["ratio_min"], rows[0]["ratio_max"]) == (1, 1)
    assert len({row["kl_coefficient"] for row in rows}) == 3, "one for each rollout"
    assert (tmp_path / "run" / "rollouts.png").stat().st_size > 20_000
    first, last = (rows[step]["value_error"] for step in (0, 1))
    assert last < first, "the second pass over a rollout is nearer to its returns"


# ---- ranks

@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--mesh", "shard")])
@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_two_ranks_learn_as_one(objective, more, place, tmp_path):
    changes = {"NAME.minibatches": 2, "steps": 4, "save-every": 4, "eval-every": 4} | (
        {"NAME.beta": 0.1} if objective == "grpo" else {}
    )
    run(place, tmp_path / "one", objective, **changes)
    with torchrun(*options(place, objective, **changes), *more, "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    keys = ["loss", "reward", "reply_length", "ended", "advantage_std", "entropy", "kl", "ratio_max", "grad_norm"]
    keys += ["value_loss", "value_grad_norm", "return", "kl_reply"] if objective == "ppo" else []
    for ours, theirs in zip(one, two, strict=True):
        for key in keys:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-5), key
