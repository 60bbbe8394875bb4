"""`python -m eval reward`: rewards, ranks and pairs of all shapes of records, whatever the batch; and its measures by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import eval.__main__
import model.hub
from data.chat.encode import ChatEncoder
from data.chat.encode_preference import encode_replies
from data.chat.preferences import read_preference
from data.chat.replies import read_prompt_replies
from data.chat.template import open_template
from data.tokenizer.open import load_tokenizer
from eval.bootstrap import confidence_interval
from eval.calibration import calibration_error
from eval.pair_rewards import MeanMargin, PairAccuracy, PairCalibration, length_bias
from model.reward import read_mean_score, reward_scores
from tests.chat_runs import CHATML, write_base
from tests.compare import absolute
from tests.preference_runs import pairs, write_reward_model
from tests.records import write_rows
from tests.runs import Said, command

USER = [{"role": "user", "content": "list names"}]


def turn(content: str) -> list[dict]:
    return [{"role": "assistant", "content": content}]


LISTED = {"prompt": USER, "responses": ["yes", "no the", *turn("fox"), "yes"], "scores": [3, 1, 2, 3]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("rewards")
    write_base(place / "base", CHATML)
    corpus = write_rows(place / "pairs.jsonl", pairs(9))
    write_reward_model(place / "float64", place / "base", corpus)
    write_reward_model(place / "float32", place / "base", corpus, dtype=torch.float32)
    return place


def score(*given: object) -> Said:
    said = command("reward", *given, main=eval.__main__.main)
    assert said.code == 0, said.err
    return said


def lines_of(place: Path, folder: str, rows: list[dict], out: Path, *given: object) -> list[dict]:
    """The lines of --out of a file with these records."""
    file = write_rows(out.with_suffix(".rows.jsonl"), rows)
    score(place / folder, file, "--out", out, *given)
    return [json.loads(line) for line in out.read_text().splitlines()]


# ---- the command


@pytest.mark.parametrize("folder, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
def test_rewards_do_not_depend_on_the_batch(folder, tolerance, place, tmp_path):
    """They are the logits of each row alone, minus the mean."""
    rows, found = pairs(9), []
    for size in (1, 3, 32):
        lines = lines_of(place, folder, rows, tmp_path / f"{size}.jsonl", "--batch-size", size)
        found.append([line["reward"] for line in lines])
    assert absolute(found[1], found[0]) < tolerance and absolute(found[2], found[0]) < tolerance
    network, mean = model.hub.load(place / folder), read_mean_score(place / folder).value
    expected = []
    for row in encoded(place, folder, rows):
        expected.append(float(network(torch.tensor(row)[None]).logits.detach()) - mean)
    assert absolute(found[2], expected) < tolerance and np.std(expected) > 0.01


def encoded(place: Path, folder: str, rows: list[dict]) -> list[np.ndarray]:
    tokenizer = load_tokenizer(place / folder)
    encoder = ChatEncoder(tokenizer, open_template(tokenizer), learn="last")
    texts = []
    for row in rows:
        pair = read_preference(row)
        found = encode_replies(encoder, pair.prompt, [pair.chosen, pair.rejected], most=256, policy="error", room=0)
        texts += [np.concatenate([found.prompt, reply]) for reply in found.replies]
    return texts


def test_shapes_and_ranks(place, tmp_path):
    """One ranking to a prompt over all records of it; equal replies have one reward and one rank."""
    rows = [
        LISTED,
        {"prompt": USER, "completion": turn("no the")},
        {"messages": [*USER, {"role": "assistant", "content": "lazy dog"}], "label": True},
        {"instruction": "list names", "output": "fox"},
        {"prompt": "list", "completion": " names"},
        {"prompt": "list", "responses": [" yes", " names"], "ranking": [1, 2]},
        {"prompt": USER, "chosen": turn("user"), "rejected": turn("yes")},
    ]
    found = lines_of(place, "float32", rows, tmp_path / "out.jsonl", "--batch-size", 2)
    assert [(line["record"].rpartition(":")[2], line["reply"]) for line in found] == [
        ("1", "1"), ("1", "2"), ("1", "3"), ("1", "4"), ("2", "1"), ("3", "1"), ("4", "1"), ("5", "1"), ("6", "1"), ("6", "2"),
        ("7", "chosen"), ("7", "rejected"),
    ]  # fmt: skip
    assert [line["prompt"] for line in found] == [1] * 7 + [2] * 3 + [1] * 2
    for number, size in ((1, 9), (2, 3)):
        own = [line for line in found if line["prompt"] == number]
        rewards = [line["reward"] for line in own]
        assert [line["rank"] for line in own] == [1 + sum(other > each for other in rewards) for each in rewards]
        assert {line["of"] for line in own} == {size} == {len(own)}
    by_text: dict[tuple, set] = {}
    for line in found:
        by_text.setdefault((line["prompt"], line["text"]), set()).add((line["reward"], line["rank"]))
    assert len(by_text) == 7 and all(len(values) == 1 for values in by_text.values())
    mean = read_mean_score(place / "float32").value
    assert all(line["score"] - line["reward"] == pytest.approx(mean) for line in found)
    chosen, rejected = map(len, encoded(place, "float32", [rows[6]]))
    assert found[10]["tokens"] - found[11]["tokens"] == chosen - rejected and found[0]["tokens"] == found[11]["tokens"]


def test_pairs_of_lists_scores_and_single_replies(place, tmp_path):
    """A list of scores 3, 1, 2, 3 has five pairs; single replies with a score are compared with those of their prompt."""
    single = [{"prompt": USER, "response": turn(text), "score": score} for text, score in
              (("yes", 1), ("fox", 2), ("no the", 2))]  # fmt: skip
    out = tmp_path / "out.jsonl"
    found = lines_of(place, "float64", [LISTED, *single], out)
    reward = {line["text"]: line["reward"] for line in found}
    better = [("yes", "no the"), ("yes", "fox"), ("fox", "no the"), ("yes", "no the"), ("yes", "fox")]  # of the list
    better += [("fox", "yes"), ("no the", "yes")]
    difference_P = torch.tensor([reward[one] - reward[other] for one, other in better], dtype=torch.float64)
    said = json.loads(score(place / "float64", out.with_suffix(".rows.jsonl"), "--json").out)
    accuracy, margin, calibration = said["pairs"]["scores"]
    assert accuracy["parts"] == {"pairs": 7, "right": int((difference_P > 0).sum())} and said["pairs"]["prompts"] == 1
    assert margin["value"] == pytest.approx(float(difference_P.mean()), abs=1e-12)
    p_P = difference_P.sigmoid()
    expected = calibration_error(torch.stack((1 - p_P, p_P), 1), torch.ones(7, dtype=torch.long), bins=10)
    assert calibration["value"] == pytest.approx(expected.value, abs=1e-9)
    assert margin["interval"] is None, "one prompt has no interval"


def test_what_is_printed(place, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", pairs(4))
    said = score(place / "float32", file, "--show", 1).out
    mean = read_mean_score(place / "float32").value
    for text in (
        f"reward = score - {mean:.4f}, the mean score of preferred held-out replies (reward.json)",
        "4 records, 8 replies to 4 prompts",
        "\n  1. ",
        "\n  2. ",
        "… 3 further prompts",
        "correlation of reward with length: Pearson ",
        "the longer reply is the better one in ",
        "\naccuracy = ",
        "\nmargin = ",
        "\ncalibration error = ",
        "4 prompts; in brackets the 95% interval of a bootstrap",
    ):
        assert text in said, text
    assert "2 records, 4 replies" in score(place / "float32", file, "--limit", 2, "--show", 0).out
    alone = write_rows(tmp_path / "alone.jsonl", [{"prompt": "list", "completion": " names"}])
    said = score(place / "float32", alone)
    assert "accuracy" not in said.out and "1 record has strings, which are read without a template" in said.err
    assert json.loads(score(place / "float32", alone, "--json").out)["pairs"] is None


def test_left_out_and_cut(place, tmp_path):
    """Equal pairs are left out by name; --overlong drop and cut."""
    same = {"prompt": "a", "chosen": " b", "rejected": " b"}
    long = {"prompt": USER, "responses": ["names " * 300, "fox"]}
    file = write_rows(tmp_path / "rows.jsonl", [*pairs(1), same, long])
    said = score(place / "float32", file, "--overlong", "drop")
    assert f"left out 1 record, chosen and rejected are equal: {file}:2" in said.err
    assert f"left out 1 record, longer than a row: {file}:3" in said.err and "3 records, 2 replies" in said.out
    found = lines_of(place, "float32", [long], tmp_path / "cut.jsonl", "--overlong", "cut")
    assert found[0]["tokens"] > 200 and found[1]["tokens"] < 9


def test_a_folder_without_a_mean(place, tmp_path):
    """Any sequence classifier with one label is read; its rewards are its scores."""
    shutil.copytree(place / "float32", tmp_path / "bare")
    (tmp_path / "bare" / "reward.json").unlink()
    file = write_rows(tmp_path / "rows.jsonl", pairs(1))
    said = score(tmp_path / "bare", file, "--out", tmp_path / "out.jsonl")
    assert "has no reward.json: rewards are its scores" in said.err and "reward = score (no reward.json)" in said.out
    assert all(line["reward"] == line["score"] for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))


# ---- the measures


def test_measures_by_hand():
    """Two pairs of prompt 4, one of prompt 9; an equal pair is wrong."""
    difference_P, prompt_P = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64), torch.tensor([4, 4, 9])
    accuracy, margin = (metric.statistics(difference_P, [prompt_P]) for metric in (PairAccuracy(), MeanMargin()))
    assert accuracy.tolist() == [[2, 1], [1, 0]] and margin.tolist() == [[2, 1], [1, 0]]
    assert PairAccuracy().score(accuracy).value == pytest.approx(1 / 3) == MeanMargin().score(margin).value
    assert PairAccuracy().examples(accuracy).tolist() == [0.5, 0]
    p_P = difference_P.sigmoid()
    expected = calibration_error(torch.stack((1 - p_P, p_P), 1), [1, 1, 1], bins=10)
    found = PairCalibration().score(PairCalibration().statistics(difference_P, [prompt_P]))
    assert found.parts == expected.parts


def test_intervals_draw_prompts():
    """Each pair ten times over, of one prompt: the interval stays; as prompts of their own it would be narrower."""
    draw = torch.Generator().manual_seed(0)
    difference_P, prompt_P = torch.randn(12, generator=draw, dtype=torch.float64) + 0.3, torch.arange(12)
    metric = MeanMargin()
    one = confidence_interval(metric, metric.statistics(difference_P, [prompt_P]))
    ten = metric.statistics(difference_P.repeat(10), [prompt_P.repeat(10)])
    apart = confidence_interval(metric, metric.statistics(difference_P.repeat(10), [torch.arange(120)]))
    assert confidence_interval(metric, ten).low == pytest.approx(one.low, abs=1e-12)
    assert apart.half_width < 0.5 * one.half_width
    right = PairAccuracy().statistics(torch.ones(20), [torch.arange(20) // 10])
    assert confidence_interval(PairAccuracy(), right).low == pytest.approx(2 / (2 + 1.959964**2), abs=1e-6), "of two prompts"


def test_length_bias_beside_scipy():
    draw = np.random.default_rng(0)
    length, prompt = draw.integers(3, 40, 30), draw.integers(0, 8, 30)
    reward = 0.1 * length + draw.normal(size=30)
    found = length_bias(torch.tensor(reward), torch.tensor(length), torch.tensor(prompt))
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(reward, length)[0], abs=1e-12)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(reward, length)[0], abs=1e-12)
    several = [number for number in range(8) if (prompt == number).sum() > 1]
    inside = [np.concatenate([side[prompt == n] - side[prompt == n].mean() for n in several]) for side in (reward, length)]
    assert found.within == pytest.approx(scipy.stats.pearsonr(*inside)[0], abs=1e-12)
    alone = length_bias(torch.tensor(reward), torch.tensor(length), torch.arange(30))
    assert np.isnan(alone.within) and alone.pearson == found.pearson


def test_records_of_all_shapes():
    reply = [{"role": "assistant", "content": "4"}]
    for row, count, values in (
        ({"prompt": "2", "chosen": " 4", "rejected": " 5"}, 2, (1.0, 0.0)),
        ({"prompt": "2", "responses": '[" 4", " 5"]', "ranking": "[2, 1]"}, 2, (-2.0, -1.0)),
        ({"prompt": "2", "responses": [" 4", " 5", " 6"]}, 3, None),
        ({"prompt": USER, "responses": ["4", reply, reply[0]]}, 3, None),
        ({"prompt": "2", "responses": [" 4", reply]}, 2, None),
        ({"prompt": "2", "response": " 4", "score": "0.5"}, 1, (0.5,)),
        ({"prompt": USER, "completion": reply, "label": False}, 1, None),
        ({"messages": [*USER, *reply]}, 1, None),
        ({"instruction": "2", "output": "4", "system": "Be brief."}, 1, None),
        ({"chosen": [*USER, *reply], "rejected": [*USER, {"role": "assistant", "content": "5"}]}, 2, (1.0, 0.0)),
    ):
        found = read_prompt_replies(row)
        assert (len(found.replies), found.values) == (count, values), row
        assert found.is_pair == ("chosen" in row) and isinstance(found.prompt, str) == isinstance(found.replies[0], str)
    assert read_prompt_replies({"prompt": USER, "responses": ["4", reply]}).replies == (tuple(reply), tuple(reply))


def test_reward_scores_of_no_reward_model(place):
    with pytest.raises(ValueError, match=r"the network has the head 'lm', and a reward model is a decoder with one score"):
        reward_scores(model.hub.load(place / "base"), [[1, 2]])
