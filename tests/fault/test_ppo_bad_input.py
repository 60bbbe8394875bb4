"""Faults of `--objective ppo` and of a reward model as --reward: one clear line, code 2, and what was saved stays whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import data.__main__
import model.hub
from data.tokenizer.open import load_tokenizer
from model.reward import read_mean_score, reward_scores
from model.rollouts import SampledReply
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.policy_runs import open_policy, write_place
from tests.preference_runs import write_pairs
from tests.runs import arguments, command, last_checkpoint, metrics, steps_of
from train.config import RewardConfig
from train.rewards.open import open_rewards
from train.rewards.sample import Sample
from train.runs.checkpoint import verify
from train.runs.errors import TrainError

SETTINGS = {
    "objective": "ppo", "batch-size": 8, "context": 128, "threads": 1, "device": "cpu", "precision": "fp32", "steps": 4,
    "sample-every": 0, "save-every": 2, "eval-every": 4, "optimizer": "adamw", "lr": "1e-3", "ppo.max-reply": 8,
    "ppo.rollout-epochs": 2, "ppo.validation-prompts": 2, "reward": "length_target:4",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A start in base, prompts, and a reward model of it in judge, trained for two steps."""
    place = write_place(tmp_path_factory.mktemp("ppo"))
    pairs = write_pairs(place / "pairs.jsonl", 8), write_pairs(place / "held_out_pairs.jsonl", 2, seed=1)
    files = {"init": place / "base", "corpus": pairs[0], "validation": pairs[1], "out": place / "judge"}
    steps = {"steps": 2, "eval-every": 2, "batch-size": 2, "context": 256, "threads": 1, "device": "cpu"}
    said = command(*arguments({"objective": "reward"} | files | steps))
    assert said.code == 0, said.err
    return place


def copied(place: Path, folder: Path) -> Path:
    """The reward model as a folder without a manifest, which may be changed."""
    shutil.copytree(last_checkpoint(place / "judge"), folder, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


def options(place: Path, **changes: object) -> list[str]:
    files = {"init": place / "base", "corpus": place / "train.jsonl", "validation": place / "held_out.jsonl"}
    return arguments(SETTINGS | files | {name.replace("_", "-"): value for name, value in changes.items()})


# ---- a reward model as a reward


def test_values_are_the_models_scores_of_the_ids(place, parity):
    rewards = open_rewards(RewardConfig((str(place / "judge"), "length_target:4")))
    rows = [(5, 6, 7, 8), (9, 10, 11), (5, 6, 7, 8, 12, 13)]
    values_NK = rewards([Sample("p", "r", {}, True, 2, "a.jsonl:1", ids) for ids in rows])
    assert rewards.names == ["model", "length_target"] and rewards.model_folders == [last_checkpoint(place / "judge")]
    network, mean = model.hub.load(last_checkpoint(place / "judge")).eval(), read_mean_score(last_checkpoint(place / "judge"))
    assert mean is not None and torch.equal(values_NK[:, 0].float(), reward_scores(network, rows, mean_score=mean.value))
    with torch.no_grad():
        by_hand = [network.head.out(network.body(torch.tensor([ids])).hidden[0, -1]).item() - mean.value for ids in rows]
    error = absolute(values_NK[:, 0], torch.tensor(by_hand, dtype=torch.float64))
    parity("rewards of a reward model", "a forward of each text alone", error, 1e-5, "float32")


def test_the_rollout_is_judged_by_its_ids(place):
    """Prompt and reply with its end, as the policy wrote them."""
    task, _ = open_policy(place, "ppo", group=1, reward=(str(place / "judge"),), dtype=torch.float32)
    prompt = task.data.train.values[0]
    reply = SampledReply([7, 8, 9], [-1.0, -1.0, -1.0], True)
    assert task.sample_of(prompt, reply).ids == (*prompt.ids, 7, 8, 9)


def test_a_reward_model_is_a_judge_of_grpo_too(place, tmp_path):
    more = {"objective": "grpo", "reward": place / "judge", "grpo.max-reply": 8, "grpo.group": 4, "grpo.validation-prompts": 2}
    asked = {name: value for name, value in SETTINGS.items() if not name.startswith("ppo.")}
    files = {"init": place / "base", "corpus": place / "train.jsonl", "validation": place / "held_out.jsonl"}
    said = command(*arguments(asked | files | more), "--out", tmp_path / "run")
    assert said.code == 0 and "is a reward model; its mean score" in said.out, said.err
    assert len({row["reward"] for row in metrics(tmp_path / "run")}) > 2


def test_other_vocabularies_templates_and_heads_are_refused(place, tmp_path):
    said = command(*options(place, reward=place / "base"), "--out", tmp_path / "run")
    assert_one_clear_line(said, "has the head 'lm'", "a reward model is a decoder with one score")
    said = command(*options(place, reward=place / "nothing"), "--out", tmp_path / "run")
    assert_one_clear_line(said, str(place / "nothing"))
    other = copied(place, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    said = command(*options(place, reward=other), "--out", tmp_path / "run")
    assert_one_clear_line(said, "chat template", "other ids than --init's")
    foreign = copied(place, tmp_path / "foreign")
    tokens = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokens))
    said = command(*options(place, reward=foreign), "--out", tmp_path / "run")
    assert_one_clear_line(said, str(foreign), "its tokenizer or chat template", "other ids than --init's")
    small = copied(place, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    said = command(*options(place, reward=small), "--out", tmp_path / "run")
    assert_one_clear_line(said, "reads 64 tokens, and --context is 128")
    assert not (tmp_path / "run").exists()


def test_a_resume_needs_the_same_reward_model(place, tmp_path):
    """By its weights: it may lie elsewhere, if --reward says where."""
    judge, run = copied(place, tmp_path / "judge"), tmp_path / "run"
    assert command(*options(place, reward=judge, steps=2), "--out", run).code == 0
    kept = judge.with_name("kept")
    judge.rename(kept)
    assert_one_clear_line(command("--resume", run, "--steps", 4), str(judge))
    said = command("--resume", run, "--steps", 4, "--reward", kept)
    assert said.code == 0, said.err
    network = model.hub.load(kept)
    network.head.out.weight.data *= 2
    model.hub.save(network, kept)
    said = command("--resume", run, "--steps", 6, "--reward", kept)
    assert_one_clear_line(said, "is not the reward model that", "SHA-256")


# ---- the critic


def test_a_critic_that_does_not_fit_is_refused(place, tmp_path):
    network = randomized(tiny_config("llama", vocab_size=40, context=128, head="sequence", labels=1, pool="last"))
    model.hub.save(network, tmp_path / "other")
    said = command(*options(place, **{"ppo.value": tmp_path / "other"}), "--out", tmp_path / "run")
    assert_one_clear_line(said, "--ppo.value", "a vocabulary of 40 tokens", "both must read the same ids")
    said = command(*options(place, **{"ppo.value": tmp_path / "nothing"}), "--out", tmp_path / "run")
    assert_one_clear_line(said, str(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()


def test_a_critic_that_diverges_stops_the_run(place, tmp_path):
    run = tmp_path / "run"
    said = command(*options(place, steps=12, **{"ppo.value-lr": "1e18", "clip": 0}), "--out", run)
    assert_one_clear_line(said, "diverge", "lower --ppo.value-lr (now 1e+18)")
    for step in steps_of(run):
        verify(run / "checkpoints" / f"step-{step}")


def test_a_divergence_that_explodes_stops_the_run(place, tmp_path):
    run = tmp_path / "run"
    said = command(*options(place, steps=30, lr=3.0, **{"ppo.max-kl": 0.2, "warmup": 0, "clip": 0}), "--out", run)
    assert_one_clear_line(said, "the KL divergence from the reference is", "above --ppo.max-kl 0.2", "raise --ppo.beta")
    assert steps_of(run)
    verify(last_checkpoint(run))


def test_a_checkpoint_without_its_critic_is_refused(place, tmp_path):
    run = tmp_path / "run"
    assert command(*options(place, steps=2), "--out", run).code == 0
    manifest = last_checkpoint(run) / "manifest.json"
    files = json.loads(manifest.read_text())
    shutil.rmtree(last_checkpoint(run) / "critic")
    files["files"] = {name: entry for name, entry in files["files"].items() if not name.startswith("critic/")}
    manifest.write_text(json.dumps(files))
    assert_one_clear_line(command("--resume", run, "--steps", 4), "critic cannot be read")


# ---- options


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ppo.lam": 1.5}, "--ppo.lam 1.5: must be from 0 to 1"),
        ({"ppo.gamma": -0.1}, "--ppo.gamma -0.1: must be from 0 to 1"),
        ({"ppo.clip-high": 0}, "--ppo.clip-high 0.0: must be finite and above 0"),
        ({"ppo.dual-clip": 1}, "--ppo.dual-clip 1.0: must be finite and above 1"),
        ({"ppo.kl-target": 0}, "--ppo.kl-target 0.0: must be finite and above 0"),
        ({"ppo.kl-horizon": 5}, "it is of --ppo.kl-target"),
        ({"ppo.kl-target": 1, "ppo.beta": 0}, "they are of the KL term, --ppo.beta"),
        ({"ppo.resample": 1}, "groups of one reply always agree: --ppo.group"),
        ({"ppo.clip-value": 0.1, "ppo.rollout-epochs": 1}, "nothing is clipped"),
    ],
)
def test_settings_that_cannot_be(changes, said, place, tmp_path):
    found = command(*options(place, **changes), "--out", tmp_path / "run")
    assert found.code == 2 and said in " ".join(found.err.split()), found.err
    assert not (tmp_path / "run").exists()


def test_tokenizers_agree(place):
    """What the tests above rely on: judge and start have one tokenizer."""
    own, theirs = (load_tokenizer(folder, 400) for folder in (place / "base", last_checkpoint(place / "judge")))
    assert own.encode("a few words") == theirs.encode("a few words")
    with pytest.raises(TrainError, match="no reward is named"):
        open_rewards(RewardConfig())


def test_best_of_n_by_a_reward_model(place, tmp_path):
    """`python -m data replies --score FOLDER`: the winners' mean is above that of all replies."""
    out = tmp_path / "best.jsonl"
    line = ["replies", place / "base", place / "train.jsonl", "--best-of", 4, "--score", place / "judge"]
    line += ["--max-reply", 6, "--template", "chatml"]
    said = command(*line, "--truncated", "keep", "--out", out, main=data.__main__.main)
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12 and all(row["score"] > row["mean_score"] and row["best_of"] == 4 for row in rows)
    refused = [place / "base" if word == place / "judge" else word for word in line]
    said = command(*refused, "--out", tmp_path / "none.jsonl", main=data.__main__.main)
    assert said.code == 2 and f"--score {place / 'base'} has the head 'lm'" in said.err, said.err
