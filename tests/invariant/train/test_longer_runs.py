"""Runs of so many epochs, runs made longer, and weights that stay as they are."""

import re

import pytest
import torch
from safetensors.torch import load_file

import model.hub
from tests.runs import STEPS, assert_same_end, command, further, last_checkpoint, metrics, stopped_at
from train.config_toml import read_settings
from train.optimizers.schedule import SCHEDULES


def rates(run):
    return {row["step"]: row["lr"] for row in metrics(run) if row["split"] == "train"}


def test_epochs_are_steps(options, tmp_path):
    at = options.index("--steps")
    said = command(*options[:at], *options[at + 2 :], "--epochs", 0.25, "--out", tmp_path / "a")
    assert said.code == 0, said.err
    settings = read_settings(tmp_path / "a")
    assert settings.run.epochs is None and settings.recorded.epochs == 0.25
    assert f"steps 0 to {settings.run.steps} of" in said.out and re.search(r"0\.[23] epochs in all", said.out)
    exactly = [*options, "--steps", settings.run.steps, "--out", tmp_path / "b"]
    assert command(*exactly).code == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    said = command(*options, "--epochs", 2, "--out", tmp_path / "c")
    assert said.code == 2 and "--steps would have no effect: --epochs says how long" in said.err
    said = command("--epochs", -1)
    assert said.code == 2 and "--epochs -1" in said.err


LONGER = STEPS + 40


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_rate_without_an_end_goes_on(schedule, options, tmp_path):
    """The longer run ends as one that was as long from the beginning, but for the warm-up, a share of the steps: given so."""
    asked = ["--schedule", schedule, "--out", tmp_path / "run", "--optimizer", "adamw"]
    assert command(*options, *asked, "--warmup", 0.1).code == 0
    assert command("--resume", tmp_path / "run", "--steps", LONGER).code == 0
    asked[3] = tmp_path / "whole"
    assert command(*options, *asked, "--warmup", 0.1 * STEPS / LONGER, "--steps", LONGER).code == 0
    assert rates(tmp_path / "run") == pytest.approx(rates(tmp_path / "whole"), rel=1e-12)
    one, other = (load_file(last_checkpoint(tmp_path / name) / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_longer_run_killed_goes_on_to_its_new_end(options, tmp_path):
    """config.toml has the new number: a later resume needs no option, and ends in the same bytes."""
    for name in ("once", "twice"):
        assert command(*options, "--schedule", "constant", "--out", tmp_path / name).code == 0
    assert command("--resume", tmp_path / "once", "--steps", LONGER).code == 0
    assert stopped_at(STEPS + 12, "--resume", tmp_path / "twice", "--steps", LONGER).code == 130
    assert read_settings(tmp_path / "twice").run.steps == LONGER
    assert (tmp_path / "twice" / "config.toml").read_text().startswith("# begun on Python")
    assert command("--resume", tmp_path / "twice").code == 0
    assert_same_end(tmp_path / "once", tmp_path / "twice", steps=LONGER)


@pytest.mark.parametrize(("how", "final"), [("hold", 0.1), ("replan", 0.0)])
def test_a_schedule_with_an_end_is_told_how(how, final, options, tmp_path):
    run = tmp_path / "run"
    assert command(*options, "--final-lr", final, "--out", run).code == 0
    said = command("--resume", run, "--steps", LONGER)
    assert said.code == 2 and "--extend replan" in said.err and "--extend hold" in said.err
    assert command("--resume", run, "--steps", LONGER, "--extend", how).code == 0
    lr, warmup = read_settings(run).optimizer.lr, read_settings(run).optimizer.warmup
    total = STEPS if how == "hold" else LONGER
    told = {"warmup": round(warmup * total), "total": total, "final": final}
    found = rates(run)
    wanted = {step: lr * SCHEDULES["cosine"](step - 1, **told) for step in range(STEPS + 2, LONGER + 1, 2)}
    assert {step: found[step] for step in wanted} == pytest.approx(wanted) and found[LONGER] > 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--steps", STEPS), f"the run has {STEPS}"),
        (("--steps", LONGER, "--extend", "hold"), "ends with the rate 0"),
        (("--extend", "replan"), f"add --steps, more than {STEPS}"),
    ],
)
def test_what_cannot_be_longer(more, words, finished):
    said = command("--resume", finished, *more)
    assert said.code == 2 and words in said.err, said.err


def test_extend_is_of_a_resume(options, tmp_path):
    said = command(*options, "--extend", "hold", "--out", tmp_path / "run")
    assert said.code == 2 and "--extend would have no effect" in said.err


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adamw8bit", "sgd"])
def test_frozen_weights_stay_bit_for_bit(optimizer, options, finished, tmp_path):
    """By our names or the published ones; neither gradient, nor decay, nor moments; the others learn. Resumed bit for bit."""
    run, base = tmp_path / "run", load_file(last_checkpoint(finished) / "model.safetensors")
    pattern = r"h\.0\.|position"  # gpt2's name of the first block, our name of the positions
    asked = ["--init", last_checkpoint(finished), "--freeze", pattern, "--optimizer", optimizer, "--weight-decay", 0.5]
    kept = further(options)
    said = command(*kept, *asked, "--steps", 50, "--ema", 0.5, "--out", run)
    assert said.code == 0, said.err
    assert "13 tensors frozen (--freeze" in said.out
    after = load_file(last_checkpoint(run) / "model.safetensors")
    frozen = {name for name in after if "h.0." in name or "wpe" in name}
    assert len(frozen) == 13
    assert all(torch.equal(after[name], base[name]) == (name in frozen) for name in after)
    moments = load_file(last_checkpoint(run) / "optimizer.safetensors")
    assert not any("blocks.0." in name or "position" in name for name in moments)
    assert any("blocks.1." in name for name in moments)
    assert any(value.dtype == torch.uint8 for value in moments.values()) == (optimizer == "adamw8bit")
    raw, averages = (load_file(last_checkpoint(run) / f"{name}.safetensors") for name in ("raw", "averages"))
    assert not any("blocks.0." in name or "position" in name for name in averages)
    assert any("blocks.1." in name for name in averages)
    began, of = dict(model.hub.load(last_checkpoint(finished)).named_parameters()), "weights."
    same = {name: torch.equal(value, began[name.removeprefix(of)]) for name, value in raw.items()}
    assert same == {name: "blocks.0." in name or "position" in name for name in raw} and len(raw) == len(began)
    asked += ["--steps", 50, "--ema", 0.5, "--log-every", 1, "--out", tmp_path / "parted"]
    assert stopped_at(10, *kept, *asked).code == 130
    assert command("--resume", tmp_path / "parted").code == 0
    parted = load_file(last_checkpoint(tmp_path / "parted") / "model.safetensors")
    assert all(torch.equal(after[name], parted[name]) for name in after)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nothing", "is found in no name"),
        ("c_atn", "is found in no name of a weight (c_attn"),  # near a published name
        (".", "leaves nothing to train"),
        ("(", "not a regular expression"),
    ],
)
def test_patterns_that_freeze_nothing_or_all(pattern, words, options, tmp_path):
    said = command(*options, "--freeze", pattern, "--out", tmp_path / "run")
    assert said.code == 2 and words in said.err, said.err
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_restart_of_a_longer_run_has_the_same_options(options, tmp_path, monkeypatch):
    """torchrun --max-restarts says --steps again, which the run has by then. Its config.toml may have no first comment."""
    run = tmp_path / "run"
    assert command(*options, "--schedule", "constant", "--steps", 8, "--out", run).code == 0
    config = run / "config.toml"
    config.write_text(config.read_text().partition("\n\n")[2])
    assert stopped_at(10, "--resume", run, "--steps", 14).code == 130
    assert config.read_text().startswith("# begun by an older version\n\n[run]")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert command("--resume", run, "--steps", 14).code == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert command("--resume", run, "--steps", 14).code == 0
    assert metrics(run)[-1]["step"] == 14
