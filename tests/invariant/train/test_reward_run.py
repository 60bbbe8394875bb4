"""`--objective reward`: it learns to order pairs, resumes bit for bit, and its scores do not depend on the batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval.__main__
import lora.__main__
import model.hub
from data.packing.collate import GROUP
from eval.calibration import calibration_error
from lora.peft_io import open_network as open_adapter
from model.reward import MeanScore, read_mean_score, reward_scores
from tests.chat_runs import CHATML, write_base
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.fault.test_ranks import torchrun
from tests.preference_runs import build_objective, open_preference, pairs, perturb, write_pairs
from tests.records import write_rows
from tests.runs import arguments, assert_same_end, command, last_checkpoint, metrics, stopped_at
from train.evaluate import evaluate
from train.parallel.ranks import Ranks, own_rows
from train.reward_objective import MARGIN, RewardObjective, reward_loss
from train.runs.errors import TrainError
from train.tasks.reward import Settings

OVERFIT = 8  # pairs
SETTINGS = {
    "objective": "reward",
    "batch-size": 4,
    "context": 128,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "sample-every": 0,
    "log-every": 1,
    "lr": "1e-2",
}
FEW = {"steps": 7, "save-every": 1, "eval-every": 3, "keep": 9}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("reward")
    write_base(place / "base", CHATML)
    write_pairs(place / "train.jsonl", OVERFIT)
    write_pairs(place / "held_out.jsonl", 5, seed=1)
    return place


def options(place: Path, init: Path | None = None, validation: str = "held_out.jsonl", **changes) -> list[str]:
    files = {"init": init or place / "base", "corpus": place / "train.jsonl", "validation": place / validation}
    return arguments(SETTINGS | files | {"reward.template": "chatml"} | changes)


@pytest.fixture(scope="module")
def run(place) -> Path:
    """It is scored by the pairs that it learns."""
    said = command(*options(place, validation="train.jsonl", steps=24, **{"eval-every": 24}), "--out", place / "run")
    assert said.code == 0, said.err
    assert "pairs    8 of 8 prompts" in said.out and f"python -m eval reward {place / 'run'} FILE" in said.out
    return place / "run"


def scored(*given: object) -> dict:
    said = command("reward", *given, "--json", main=eval.__main__.main)
    assert said.code == 0, said.err
    return json.loads(said.out)


def validations(run: Path) -> list[dict]:
    return [row for row in metrics(run) if row["split"] == "validation"]


# ---- learning


def test_it_learns_to_order_pairs(run):
    before = next(row for row in metrics(run) if row["split"] == "before")
    (last,) = validations(run)
    assert 0.4 < before["loss"] < 1.2 and last["loss"] < 0.05 and last["accuracy"] == 1 and last["difference"] > 3
    assert last["difference"] == pytest.approx(last["score_chosen"] - last["score_rejected"], abs=1e-5)


def test_the_command_gives_the_scores_of_the_validation(run, place, tmp_path):
    """The mean reward of preferred replies is 0; accuracy, margin and calibration error are those of the last validation."""
    (last,), out = validations(run), tmp_path / "rewards.jsonl"
    found = scored(run, place / "train.jsonl", "--out", out)
    accuracy, margin, calibration = (score["value"] for score in found["pairs"]["scores"])
    assert accuracy == last["accuracy"] and margin == pytest.approx(last["difference"], abs=1e-5)
    assert calibration == pytest.approx(last["ece"], abs=1e-6) and found["mean_score"] == last["score_chosen"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    chosen = [line["reward"] for line in lines if line["reply"] == "chosen"]
    assert len(chosen) == OVERFIT and abs(sum(chosen) / OVERFIT) < 1e-5
    assert [line["rank"] for line in lines] == [1, 2] * OVERFIT


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora"}], ids=["whole", "lora"])
def test_killed_and_resumed(adapter, place, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    given = [*options(place, **FEW | adapter), "--reward.margins"]
    assert command(*given, "--out", whole).code == 0
    assert stopped_at(4, *given, "--out", halves).code == 130
    assert command("--resume", halves).code == 0
    assert_same_end(whole, halves, FEW["steps"])
    for step, validated in ((5, 3), (6, 6)):  # step 5 was taken after the resume
        means = [read_mean_score(run / "checkpoints" / f"step-{step}") for run in (whole, halves)]
        assert means[0] == means[1] and means[0].step == validated


def test_a_checkpoint_without_a_validation_says_whose_mean_it_has(place, tmp_path):
    said = command(*options(place, steps=3, **{"save-every": 1, "eval-every": 3, "keep": 9}), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    assert read_mean_score(folder).step == 0
    said = command("reward", folder, place / "train.jsonl", main=eval.__main__.main)
    assert said.code == 0 and "saved without a validation: its mean score is that of step 0" in said.err


def test_an_adapter_trains_the_head_whole(place, tmp_path):
    out = tmp_path / "lora"
    said = command(*options(place, steps=4, adapter="lora", **{"eval-every": 4, "lora.r": 2}), "--out", out)
    assert said.code == 0, said.err
    (last,) = validations(out)
    found = scored(out, place / "held_out.jsonl")
    assert found["mean_score"] == last["score_chosen"]
    assert found["pairs"]["scores"][1]["value"] == pytest.approx(last["difference"], abs=1e-5)
    _, init = open_preference("reward", place / "base", place / "train.jsonl", dtype=torch.float32)
    head = open_adapter(last_checkpoint(out)).head.out
    trained = next(parameter for name, parameter in head.named_parameters() if "parts" in name)
    assert trained.shape == (1, 32) and absolute(trained, init.head.out.weight) > 1e-4
    said = command("merge", place / "base", out, "--out", tmp_path / "merged", main=lora.__main__.main)
    assert said.code == 0, said.err
    merged = scored(tmp_path / "merged", place / "held_out.jsonl")
    assert merged["mean_score"] == found["mean_score"]
    assert merged["mean_reward"] == pytest.approx(found["mean_reward"], abs=1e-5)


# ---- the head


def test_a_new_head_and_one_that_goes_on(run, place, tmp_path):
    """New: N(0, 1 / (D + 1)) of the seed. A reward model's own is kept; a classifier's that pools otherwise is not."""
    corpus = place / "train.jsonl"
    write_base(tmp_path / "wide", CHATML, hidden_size=512)
    weight = open_preference("reward", tmp_path / "wide", corpus)[1].head.out.weight
    assert weight.shape == (1, 512) and float(weight.detach().std()) * 513**0.5 == pytest.approx(1, abs=0.1)
    again = open_preference("reward", tmp_path / "wide", corpus)[1].head.out.weight
    assert torch.equal(weight, again)
    folder = last_checkpoint(run)
    own, other = model.hub.load(folder), open_preference("reward", folder, corpus, dtype=torch.float32)[1]
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    pooled = model.hub.load(folder)
    pooled.config = pooled.config.replace(pool="mean")
    model.hub.save(pooled, tmp_path / "mean")
    open_preference("reward", folder, corpus)[0].tokenizer.save(tmp_path / "mean")
    pooled = open_preference("reward", tmp_path / "mean", corpus, dtype=torch.float32)[1]
    assert pooled.config.pool == "last" and absolute(pooled.head.out.weight, own.head.out.weight) > 1e-2


def test_a_run_goes_on_from_a_reward_model(run, place, tmp_path):
    said = command(*options(place, init=run, validation="train.jsonl", steps=1), "--out", tmp_path / "more")
    assert said.code == 0 and "takes its place" not in said.out, said.err
    before = next(row for row in metrics(tmp_path / "more") if row["split"] == "before")
    assert before["loss"] == pytest.approx(validations(run)[-1]["loss"], abs=1e-6)


# ---- batches


def several(count: int = 6) -> list[dict]:
    """One to three pairs to each prompt, the pairs of a prompt apart in the file."""
    rows = pairs(count)
    others = pairs(2 * count, seed=7)
    return rows + [row | {"prompt": rows[place % count]["prompt"]} for place, row in enumerate(others) if place % 4]


@pytest.fixture(scope="module")
def opened(place):
    corpus = write_rows(place / "several.jsonl", several())
    task, network = open_preference("reward", place / "base", corpus, validation=corpus, batch_size=6, margins=True)
    return task, perturb(network, 0.1)


def gradients(objective: RewardObjective, batches: list[dict]) -> list[torch.Tensor]:
    """Of the loss over all pairs of several micro-batches."""
    objective.zero_grad()
    total = sum(objective.counts(batch)["loss"] for batch in batches)
    loss = sum(objective.train()(batch).terms["loss"].sum for batch in batches) / total
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in objective.network.parameters())]


def test_pairs_of_a_prompt_stay_together(opened):
    """In one micro-batch of prompts, and on one rank; a batch without margins has no key of theirs."""
    task, _ = opened
    assert len(task.data.train) == 6 and sum(len(prompt.pairs) for prompt in task.data.train.values) == 15
    (batch,) = task.source.batches(0)
    assert len(batch["labels"]) == 30 and len(batch[GROUP].unique()) == 6
    parts = [own_rows(batch, Ranks(rank, 2)) for rank in range(2)]
    assert not set(parts[0][GROUP].tolist()) & set(parts[1][GROUP].tolist())
    assert sum(len(part["labels"]) for part in parts) == 30 and all(len(part["labels"]) % 2 == 0 for part in parts)
    assert [len(prompt.pairs) for prompt in task.data.train.values] != [len(task.data.train.values[0].pairs)] * 6


def test_micro_batches_and_ranks_are_one_batch(opened, place):
    task, network = opened
    objective = build_objective(task, network, place / "base")
    (batch,) = task.source.batches(0)
    expected = gradients(objective, [batch])
    assert expected[-1].abs().max() > 1e-3
    assert mixed(gradients(objective, [own_rows(batch, Ranks(rank, 4)) for rank in range(4)]), expected) < 1e-12
    small, _ = open_preference("reward", place / "base", place / "several.jsonl", validation=place / "several.jsonl",
                               batch_size=2, accumulate=3, margins=True)  # fmt: skip
    assert mixed(gradients(objective, small.source.batches(0)), expected) < 1e-12


def test_padding_and_dropout_change_nothing():
    """Left = right = no padding; in training, all rates of dropout at 0.3."""
    rates = dict.fromkeys(("dropout", "attention_dropout", "mlp_dropout", "output_dropout"), 0.3)
    for family in ("gpt2", "llama"):
        network = randomized(tiny_config(family, head="sequence", labels=1, pad_id=0, **rates))
        objective = RewardObjective(network)
        ids, mask = torch.zeros(2, 2, 12, dtype=torch.long), torch.zeros(2, 2, 12, dtype=torch.long)
        texts = [torch.randint(3, 61, (length,)) for length in (9, 4)]
        for row, text in enumerate(texts):
            for side, at in enumerate((slice(len(text)), slice(12 - len(text), None))):
                ids[side, row, at], mask[side, row, at] = text, 1
        alone = torch.stack([network.eval()(text[None]).logits[0, 0] for text in texts])
        for side in range(2):
            for mode in (True, False):
                batch = {"input_ids": ids[side], "attention_mask": mask[side], "labels": torch.zeros(2, dtype=torch.long)}
                found = objective.train(mode)(batch).metrics
                assert absolute([found["score_chosen"].sum, found["score_rejected"].sum], alone) < 1e-12
        assert network.config.dropout == 0.3, "config.json keeps the rate"


def test_a_shift_of_all_scores_changes_the_centering_alone():
    chosen, rejected, margin = torch.randn(3, 7, dtype=torch.float64)
    bare = reward_loss(chosen, rejected, margin)
    assert absolute(reward_loss(chosen + 5, rejected + 5, margin), bare) < 1e-12
    centred = reward_loss(chosen + 5, rejected + 5, margin, centering=0.01)
    assert absolute(centred - bare, 0.01 * (chosen + rejected + 10) ** 2) < 1e-12
    assert absolute(reward_loss(chosen, chosen), torch.full((7,), 2.0, dtype=torch.float64).log()) < 1e-12


def test_validation_is_that_of_the_pairs(opened, place):
    """No centering in it; the calibration error is eval.calibration's; batches of any size."""
    task, network = opened
    objective = build_objective(task, network, place / "base")
    assert objective.centering == 0.01
    scores = task.scores(evaluate(objective, task.validation))
    compared = [pair for prompt in task.data.validation.values for pair in prompt.pairs]
    texts = [np.concatenate([pair.prompt, reply]) for pair in compared for reply in pair.replies]
    value_P2 = reward_scores(network, texts, batch_size=4).view(-1, 2)
    difference_P = value_P2[:, 0] - value_P2[:, 1]
    p_P = difference_P.sigmoid()
    margin_P = torch.tensor([pair.record.margin for pair in compared], dtype=torch.float64)
    expected = {
        "loss": float(reward_loss(*value_P2.T, margin_P).mean()),
        "accuracy": float((difference_P > 0).double().mean()),
        "score_chosen": float(value_P2[:, 0].mean()),
        "score_rejected": float(value_P2[:, 1].mean()),
        "difference": float(difference_P.mean()),
        "ece": calibration_error(torch.stack((1 - p_P, p_P), 1), torch.ones(len(p_P), dtype=torch.long), bins=10).value,
    }
    assert absolute(scores, expected) < 1e-9 and 0 < scores["accuracy"] < 1
    assert task.mean_score == MeanScore(scores["score_chosen"], None)
    other, _ = open_preference("reward", place / "base", place / "several.jsonl", validation=place / "several.jsonl",
                               batch_size=1, margins=True)  # fmt: skip
    assert absolute(other.scores(evaluate(objective, other.validation)), scores) < 1e-12


@pytest.mark.slow
def test_two_ranks_are_one(place, tmp_path):
    """Two prompts a step: a rank has all pairs of one; their numbers differ."""
    changes = {"corpus": place / "several.jsonl", "batch-size": 2, "steps": 3, "eval-every": 3}
    write_rows(place / "several.jsonl", several())
    with torchrun(*options(place, **changes), "--out", tmp_path / "two") as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert command(*options(place, **changes), "--out", tmp_path / "one").code == 0
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert (two["loss"], two["accuracy"]) == pytest.approx((one["loss"], one["accuracy"]), abs=2e-4)


# ---- errors


def test_what_is_refused(place, tmp_path):
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(TrainError, match=r"--reward\.centering"):
            Settings(centering=value)
    rows = pairs(3)
    del rows[1]["margin"]
    corpus = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(TrainError, match=r"pairs.jsonl:2 has no margin"):
        open_preference("reward", place / "base", corpus, validation=corpus, margins=True)
    (batch,) = open_preference("reward", place / "base", corpus, validation=corpus)[0].source.batches(0)
    assert MARGIN not in batch
    (tmp_path / "reward.json").write_text('{"mean_score": "a"}')
    with pytest.raises(model.hub.HubError, match=r"reward.json cannot be read"):
        read_mean_score(tmp_path)

