"""`python -m eval` on files: the numbers are those of the functions, in words and as JSON, of one system and of several."""

import io
import json
import random
import re
import sys
from dataclasses import replace

import pytest

from eval.__main__ import main
from eval.bleu import Bleu, corpus_bleu
from eval.bootstrap import bootstrap_interval
from eval.significance import approximate_randomisation, examples_needed, paired_bootstrap
from tests.pairs import word_pairs
from tests.runs import command

COUNT = 60
SCORES = {
    "bleu": ["BLEU"],
    "chrf": ["chrF2"],
    "rouge": ["ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"],
    "meteor": ["METEOR"],
    "f1": ["F1", "exact match"],
}


@pytest.fixture(scope="module")
def texts():
    hypotheses, references = word_pairs(COUNT, seed=5)
    shuffle = random.Random(1)
    worse = [" ".join(shuffle.sample(text.split(), len(text.split()))) for text in hypotheses]
    return hypotheses, worse, references


@pytest.fixture(scope="module")
def place(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in zip(("good", "worse", "reference"), texts, strict=True):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True, params=[7, 1000])
def batch(request, monkeypatch):
    """The files in one batch and in many: nothing may depend on it."""
    monkeypatch.setattr("eval.commands.score_texts.BATCH", request.param)


def scored(*options):
    said = command(*options, "--json", main=main)
    assert said.code == 0, said.err
    return json.loads(said.out)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_and_its_interval(score, place):
    found = scored(score, place / "good.txt", place / "reference.txt")
    assert found["examples"] == COUNT and [each["score"] for each in found["scores"]] == SCORES[score]
    for each in found["scores"]:
        low, high = each["interval"]
        wilson = each["interval_kind"] == "wilson"  # of made-up words no answer is exact
        assert low <= each["value"] <= high and wilson == (each["score"] == "exact match" and each["value"] == 0)
        assert wilson or ("bs:1000" in each["signature"] and "seed:12345" in each["signature"])
    said = command(score, place / "good.txt", place / "reference.txt", main=main)
    for each in found["scores"]:
        assert re.search(rf"^{re.escape(each['score'])} = ", said.out, re.MULTILINE) and each["signature"] in said.out
    perfect = scored(score, place / "reference.txt", place / "reference.txt")
    for each, best in zip(perfect["scores"], found["scores"], strict=True):
        assert each["value"] > best["value"] or best["value"] == 0


def test_bleu_is_that_of_the_function(place, texts):
    hypotheses, _, references = texts
    metric = Bleu(tokenize="intl", smooth="floor", smooth_value=0.3, lowercase=True)
    given = "--tokenize", "intl", "--smooth", "floor", "--smooth-value", "0.3", "--lowercase"
    (found,) = scored("bleu", place / "good.txt", place / "reference.txt", *given, "--samples", "50", "--seed", "3")["scores"]
    statistics_BK = metric.statistics(hypotheses, [references])
    interval = bootstrap_interval(metric, statistics_BK, samples=50, seed=3)
    assert found["value"] == metric.score(statistics_BK).value and found["interval"] == [interval.low, interval.high]
    assert found["signature"] == metric.signature(statistics_BK, bs=50, seed=3)
    assert found["value"] != corpus_bleu(hypotheses, [references]).value


def test_several_references_and_standard_input(place, texts, monkeypatch):
    hypotheses, worse, references = texts
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{text}\n" for text in hypotheses).encode())))
    (found,) = scored("bleu", "-", place / "reference.txt", place / "worse.txt")["scores"]
    assert found["value"] == corpus_bleu(hypotheses, [references, worse]).value and found["signature"].startswith("nrefs:2|")


@pytest.mark.parametrize(("test", "function"), [("bootstrap", paired_bootstrap), ("randomisation", approximate_randomisation)])
def test_systems_beside_the_first(place, texts, test, function):
    given = "--system", f"good={place / 'good.txt'}", "--system", f"shuffled={place / 'worse.txt'}", place / "reference.txt"
    found = scored("bleu", *given, "--test", test, "--differ", "4")
    metric = Bleu()
    good, worse = (metric.statistics(side, [texts[2]]) for side in texts[:2])
    first, second = found["scores"]
    expected = function(metric, good, worse)
    assert (first["system"], second["system"]) == ("good", "shuffled") and "p_value" not in first
    assert second["p_value"] == expected.p_value < 0.01 and second["difference"] == expected.difference < -10
    assert second["examples_needed"] == examples_needed(metric, good, worse)
    single = replace(metric, effective_order=True)
    furthest = (single.scores(worse) - single.scores(good)).abs().topk(4)
    kept = found["differ_most"]["shuffled"]
    assert [abs(each["scores"]["shuffled"] - each["scores"]["good"]) for each in kept] == furthest.values.tolist()
    for each in kept:
        assert list(each["texts"].values()) == [side[each["line"] - 1] for side in texts[:2]]
        assert each["references"] == [texts[2][each["line"] - 1]]
    said = command("bleu", *given, "--test", test, main=main).out
    for words in ("shuffled", f"{expected.p_value:.4f}", "differ most", kept[0]["texts"]["good"]):
        assert words in said


def test_a_system_beside_itself_is_no_better(place):
    given = "--system", f"a={place / 'good.txt'}", "--system", f"b={place / 'good.txt'}", place / "reference.txt"
    _, second = scored("chrf", *given)["scores"]
    assert second["difference"] == 0 and second["p_value"] is None and second["examples_needed"] is None
    assert "score the same on every example" in command("chrf", *given, main=main).out
    assert "same" not in command("chrf", *given, "--differ", "0", main=main).out


def answers_of(folder, right: int, **systems: int):
    """Files of systems that are right on so many questions, the first ones."""
    given = []
    for name, count in systems.items():
        (folder / name).write_text("yes\n" * count + "no\n" * (right - count))
        given += ["--system", f"{name}={folder / name}"]
    (folder / "r").write_text("yes\n" * right)
    return "f1", *given, folder / "r"


def test_too_few_examples_that_differ_have_no_p(tmp_path):
    for test in ("bootstrap", "randomisation"):
        for differ in (0, 1, 5, 6):
            given = *answers_of(tmp_path, 30, a=20, b=20 + differ), "--test", test
            _, second, *_ = scored(*given)["scores"]
            assert (second["p_value"] is None) == (differ < 6) == (second["no_p_value"] is not None)
            assert second["difference"] == pytest.approx(100 * differ / 30)
            said = command(*given, main=main)
            lines = [line for line in said.out.splitlines() if line.startswith("  p of b: – ")]
            assert said.err == "" and len(lines) == 2 * (differ < 6)  # F1 and exact match
            if differ == 5:
                assert lines[0] == "  p of b: – 5 examples differ: a two-sided p of so few is at least 0.0625, and 0.05 takes 6"
                assert re.search(r"^b .* – ", said.out, re.MULTILINE)


def test_intervals_of_examples_that_are_all_right_or_one(tmp_path):
    """Wilson's of 30 of 30, none of an F1 of 100, and of one example none at all."""
    answers_of(tmp_path, 30, a=30)
    f1, exact = scored("f1", tmp_path / "a", tmp_path / "r")["scores"]
    assert (f1["interval"], f1["interval_kind"], exact["interval_kind"]) == (None, None, "wilson")
    assert exact["interval"] == [pytest.approx(100 * 30 / (30 + 1.959964**2), abs=1e-5), 100]
    assert "|ci:wilson|" in exact["signature"] and "bs:1000" in f1["signature"]
    said = command("f1", tmp_path / "a", tmp_path / "r", main=main)
    assert said.err == "" and "F1 = 100.00 [–]\n" in said.out and "exact match = 100.00 [88.65, 100.00] Wilson\n" in said.out
    assert "\nWilson: Wilson's score interval of a share; " in said.out
    assert "\n[–]: examples that all score, or differ, alike show a bootstrap no variation" in said.out
    table = command(*answers_of(tmp_path, 30, a=30, b=0), main=main).out
    assert re.search(r"^b +0.00 \[0.00, 11.35\] Wilson +-100.00 +\[–\] ", table, re.MULTILINE)
    answers_of(tmp_path, 1, a=1)
    for score in ("bleu", "f1"):
        assert all(each["interval"] is None for each in scored(score, tmp_path / "a", tmp_path / "r")["scores"])
        said = command(score, tmp_path / "a", tmp_path / "r", main=main)
        assert "[–]: one example has no interval" in said.out and "Wilson" not in said.out
    mixed = command(*answers_of(tmp_path, 30, a=30, b=7), main=main).out
    assert "Wilson: " in mixed and "[–]: " in mixed
    assert "[–]" not in command(*answers_of(tmp_path, 30, a=9, b=7), main=main).out


def test_equal_scores_of_different_systems_have_a_p(tmp_path):
    """One is right on the even lines, the other on the odd ones."""
    (tmp_path / "r").write_text("yes\n" * 20)
    (tmp_path / "a").write_text("yes\nno\n" * 10)
    (tmp_path / "b").write_text("no\nyes\n" * 10)
    _, second, *_ = scored("f1", "--system", f"a={tmp_path / 'a'}", "--system", f"b={tmp_path / 'b'}", tmp_path / "r")["scores"]
    assert second["difference"] == 0 and second["p_value"] > 0.3


def test_scores_of_each_example(place, texts, tmp_path):
    pair, kinds = (place / "good.txt", place / "reference.txt"), ("--kinds", "rouge1", "rougeL")
    scored("rouge", *pair, *kinds, "--per-example", tmp_path / "each")
    rows = [json.loads(line) for line in (tmp_path / "each").read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in rows] == list(range(1, COUNT + 1)) and rows[0].keys() == {"line", "ROUGE-1", "ROUGE-L"}
    given = "--system", f"a={place / 'good.txt'}", "--system", f"b={place / 'worse.txt'}", place / "reference.txt"
    scored("bleu", *given, "--per-example", tmp_path / "each")
    row = json.loads((tmp_path / "each").read_text(encoding="utf-8").splitlines()[0])
    assert row.keys() == {"line", "a", "b"} and row["a"].keys() == {"BLEU"}


def test_sentences_of_rouge_stand_on_lines_of_their_own(tmp_path):
    (tmp_path / "h.txt").write_text("the cat sat<n>a dog barked\n")
    (tmp_path / "r.txt").write_text("a dog barked<n>the cat sat\n")
    pair = "rouge", tmp_path / "h.txt", tmp_path / "r.txt", "--kinds", "rougeL", "rougeLsum"
    (longest, summary), (_, whole) = (scored(*pair, *more)["scores"] for more in (("--line-break", "<n>"), ()))
    assert summary["value"] == 1 and longest["value"] < 1 and whole["value"] < 1
