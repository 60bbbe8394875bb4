"""`python -m train compare` says when losses are not comparable: other objectives, held-out texts or tokenizers."""

import json

import pytest

from tests.runs import SETTINGS, arguments, command, write_corpus
from train.reports.comparability import not_comparable

OURS = {"run.objective": "clm", "data.corpus": ["/text"], "data.val_fraction": 0.05, "report.eval_tokens": 200_000}
TEXT = {"tokenizer_sha256": "ab", "train_tokens": 9000, "validation_tokens": 500}


def said(folder, other: dict, text: dict | None = TEXT) -> str:
    """What is said of a run with the settings OURS and the text TEXT, and another."""
    runs = [folder / "one", folder / "other"]
    for run, each in zip(runs, (TEXT, text), strict=True):
        step = run / "checkpoints" / "step-3"
        step.mkdir(parents=True)
        if each is not None:
            (step / "state.json").write_text(json.dumps({"format": 2, "text": each}))
    return not_comparable(runs, [OURS, {key: value for key, value in (OURS | other).items() if value is not None}])


@pytest.mark.parametrize(
    "other, text, expected",
    [
        ({"optimizer.lr": 0.1, "network.width": 64, "run.seed": 3}, {}, ""),
        ({"run.objective": "mlm"}, {}, "the objectives differ (clm, mlm)"),
        ({"clm.shift": 2}, {}, "the objective's settings differ (clm.shift)"),
        ({"clm.bleu": True}, {}, ""),
        ({"data.corpus": ["/other"]}, {"validation_tokens": 300}, "the held-out texts differ (data.corpus)"),
        ({"data.val_fraction": 0.1}, {"validation_tokens": 900}, "the held-out texts differ (data.val_fraction)"),
        ({"data.validation": ["/v"]}, {"validation_tokens": 300}, "the held-out texts differ (data.validation)"),
        ({}, {"validation_tokens": 300}, "the held-out texts differ (the files have changed between the runs)"),
        ({"data.corpus": ["/moved"]}, {}, ""),  # the same text from another folder
        ({"data.corpus": ["/other"]}, None, "the held-out texts differ (data.corpus)"),  # no checkpoint to tell
        ({"report.eval_tokens": 100}, {}, "the held-out texts differ (report.eval_tokens)"),
        ({"report.eval_tokens": 900}, {}, ""),  # there are 500
        ({}, {"tokenizer_sha256": "cd"}, "the tokenizers differ (by their SHA-256), and a loss is per token: compare bits"),
    ],
)
def test_what_differs_is_named(tmp_path, other, text, expected):
    found = said(tmp_path, other, text if text is None else TEXT | text)
    assert found.startswith(f"not comparable: {expected}") if expected else found == "", found


def test_weights_of_sources_and_texts_beside_one_validation_are_no_difference(tmp_path):
    """Runs on different text with the same --validation, and one tokenizer: this is what such a comparison is for."""
    fixed = {"data.validation": ["/v"]}
    runs = [tmp_path / "one", tmp_path / "other"]
    for run, tokens in zip(runs, (9000, 4000), strict=True):
        (run / "checkpoints" / "step-3").mkdir(parents=True)
        state = {"format": 2, "text": TEXT | {"train_tokens": tokens}}
        (run / "checkpoints" / "step-3" / "state.json").write_text(json.dumps(state))
    assert not_comparable(runs, [OURS | fixed, OURS | fixed | {"data.corpus": ["/other"]}]) == ""
    mixed = [OURS | {"data.corpus": [f"a=/a:{weight}", "b=/b:1.0"]} for weight in (1.0, 7.0)]
    assert not_comparable(runs, mixed) == ""


def test_tokenizers_are_of_no_matter_to_classification(tmp_path):
    classified = {"tokenizer_sha256": "ab", "records_sha256": "01", "labels": ["a", "b"]}
    runs = [tmp_path / "one", tmp_path / "other"]
    for run, tokenizer in zip(runs, ("ab", "cd"), strict=True):
        (run / "checkpoints" / "step-3").mkdir(parents=True)
        state = {"format": 2, "text": classified | {"tokenizer_sha256": tokenizer}}
        (run / "checkpoints" / "step-3" / "state.json").write_text(json.dumps(state))
    ours = OURS | {"run.objective": "classify"}
    assert not_comparable(runs, [ours, ours | {"report.eval_tokens": 100, "classify.best": "f1"}]) == ""
    assert "settings differ (classify.label)" in not_comparable(runs, [ours, ours | {"classify.label": "topic"}])


def test_runs_of_the_command(finished, tmp_path):
    """Real runs: the same text by another learning rate, then another text, tokenizer and objective."""
    text = write_corpus(tmp_path / "text", 20, seed=1)
    short = SETTINGS | {"steps": 2, "eval-every": 1, "cache": tmp_path / "cache", "corpus": text}
    for name, more in {"a": [], "b": ["--lr", 0.1], "c": ["--objective", "mlm", "--preset", "tiny-encoder"]}.items():
        made = command(*arguments(short), *more, "--out", tmp_path / name)
        assert made.code == 0, made.err
    a, b, c = (tmp_path / name for name in "abc")
    assert "not comparable" not in command("compare", a, b).out
    assert "the objectives differ" not in (out := command("compare", a, finished).out)
    assert out.startswith("not comparable: the held-out texts differ (data.corpus); the tokenizers differ (by their SHA-256)")
    panels = tmp_path / "panels.png"
    out = command("compare", a, b, c, "--out", panels).out
    assert out.startswith("not comparable: the objectives differ (clm, mlm)")
    one = tmp_path / "one.png"
    command("compare", a, b, "--out", one)
    heights = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (one, panels)]
    assert heights[1] == 2 * heights[0], "a row of panels for each objective"


@pytest.mark.parametrize(
    "other, expected",
    [
        ({"grpo.loss": "dr_grpo", "grpo.group": 16, "grpo.beta": 0.1, "optimizer.lr": 1e-3, "run.seed": 5}, ""),
        ({"grpo.temperature": 0.7}, "the objective's settings differ (grpo.temperature)"),
        ({"rewards.reward": ["exact", "format"]}, "the rewards differ"),
        ({"rewards.reward_weights": [2.0]}, "the rewards differ"),
        ({"recorded.reward_sha256": ["ab"]}, "the rewards differ"),
    ],
)
def test_rewards_of_held_out_prompts_depend_on_few_settings(tmp_path, monkeypatch, other, expected):
    usual = {"grpo.loss": "dapo", "grpo.temperature": 1.0, "rewards.reward": ["exact"]}
    monkeypatch.setitem(OURS, "run.objective", "grpo")
    for key, value in usual.items():
        monkeypatch.setitem(OURS, key, value)
    found = said(tmp_path, other)
    assert found == (f"not comparable: {expected}" if expected else "")
