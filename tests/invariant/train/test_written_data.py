"""`python -m data self-instruct` and `replies` on a small network: files, resumes after SIGKILL, reproducible winners."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import data.__main__
import model.hub
from data.chat.conversation import Conversation, Plain
from data.chat.encode import ChatEncoder, encode_rendered
from data.chat.shapes import read_chat_record
from data.chat.template import open_template
from data.tokenizer.open import load_tokenizer
from model.rollouts import sample_replies
from tests.policy_runs import write_place
from tests.records import write_rows
from tests.runs import ROOT, Said, command
from train.chat_replies import Reply
from train.rollout import draw_uniforms
from train.synthetic.rounds import RoundLog
from train.synthetic.samples import BEST_OF
from train.synthetic.settings import SelfInstructSettings
from train.synthetic.writer import NetworkWriter

TOPICS = "rivers kings verbs metals planets fractions proverbs recipes bridges seasons".split()
SEEDS = [{"instruction": f"Write a line about {topic} number {n}", "output": "x"} for n, topic in enumerate(TOPICS)]
SMALL = ["--list-tokens", 24, "--reply-tokens", 8, "--batch-size", 4, "--template", "chatml"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = write_place(tmp_path_factory.mktemp("written"))
    write_rows(place / "seeds.jsonl", SEEDS)
    return place


def run(*line: object) -> Said:
    return command(*line, main=data.__main__.main)


def instruct(place: Path, out: Path, *options: object) -> list[object]:
    return ["self-instruct", place / "base", "--seeds", place / "seeds.jsonl", "--out", out, *SMALL, *options]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jsonl")}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scripted(network, tokenizer, prompts, *, generator, max_new_tokens, **options) -> list[Reply]:
    """In place of what a random network writes: lists and replies drawn by the generator that it would be given."""
    found = []
    for _ in prompts:
        a, b, c = (int(torch.randint(0, 10, (), generator=generator)) for _ in range(3))
        is_list = max_new_tokens == 24
        item = f"Compare {TOPICS[a]} with {TOPICS[b]} and {TOPICS[c]} {a}{b}{c}"
        found.append(Reply(f"Here:\n9. {item}\n10. Say it" if is_list else f"no {a}", is_list or a > 1))
    return found


# ---- self-instruct


def test_conversations_that_sft_reads(place, tmp_path):
    with patch("train.synthetic.writer.write_replies", scripted):
        said = run(*instruct(place, tmp_path / "out", "--count", 10))
    assert said.code == 0, said.err
    made = lines(tmp_path / "out" / "conversations.jsonl")
    assert len(made) == 10 and all(isinstance(read_chat_record(row), Conversation) for row in made)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["made"] == 10 and summary["is_complete"] and summary["requests"] % 4 == 0
    assert sum(summary["rejected"].values()) == len(lines(tmp_path / "out" / "rejected.jsonl"))
    assert summary["rejected"]["reply cut by --reply-tokens"] > 0
    for part in ("asks         in messages; replies by the template chatml", "made         10 conversations", "by length"):
        assert part in said.out, said.out


def test_an_interrupted_command_goes_on(place, tmp_path):
    with patch("train.synthetic.writer.write_replies", scripted):
        assert run(*instruct(place, tmp_path / "whole", "--count", 10)).code == 0
        append = RoundLog.append

        def failing(log, row):
            if row["round"] == 2:
                raise KeyboardInterrupt
            append(log, row)

        with patch.object(RoundLog, "append", failing):
            assert run(*instruct(place, tmp_path / "broken", "--count", 10)).code == 130
        assert not (tmp_path / "broken" / "conversations.jsonl").exists()
        said = run(*instruct(place, tmp_path / "broken", "--count", 10))
    assert said.code == 0 and "goes on      behind 2 finished rounds" in said.out
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_process_that_is_killed_goes_on(place, tmp_path):
    """With the random network itself, which makes little and is rejected; SIGKILL at any time."""
    options = ("--patience", 40, "--count", 999, "--ask", "text")
    line = [*instruct(place, tmp_path / "killed", *options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rounds = tmp_path / "killed" / "rounds.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "data", *map(str, line)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        end = time.monotonic() + 60
        while time.monotonic() < end and running.poll() is None and not (rounds.exists() and rounds.stat().st_size > 2000):
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
    killed = rounds.read_bytes().count(b"\n")
    said = run(*line)
    assert said.code == 2 and "requests in a row gave nothing (--patience 40)" in said.err, said.err
    again = run(*instruct(place, tmp_path / "whole", *options))
    assert 0 < killed < rounds.read_bytes().count(b"\n") and again.code == 2
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    changed = run(*line, "--seed", 1)
    assert changed.code == 2 and "began with other settings, seed = 0, and now it is 1" in changed.err


def open_writer(place: Path, *, is_chat: bool, **settings: object) -> NetworkWriter:
    network = model.hub.load(place / "base", dtype=torch.float64)
    tokenizer = load_tokenizer(place / "base", network.config.vocab_size)
    made = SelfInstructSettings(**{"list_tokens": 12, "reply_tokens": 12, "batch_size": 4} | settings)
    return NetworkWriter(network, tokenizer, open_template(tokenizer, "chatml"), made, stop_ids=[1], is_chat=is_chat)


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_round_is_a_function_of_its_number(place, is_chat):
    writer, seeds = open_writer(place, is_chat=is_chat), [row["instruction"] for row in SEEDS]
    requests = [seeds[:2], seeds[2:4], seeds[4:6]]
    first, second = writer.write_lists(requests, 0), writer.write_lists(requests, 1)
    assert writer.write_lists(requests, 0) == first != second
    assert open_writer(place, is_chat=is_chat, seed=1).write_lists(requests, 0) != first
    assert all(each.text.startswith("3. ") != is_chat and each.examples == 2 for each in first)


def test_requests_have_fewer_examples_where_the_context_ends(place):
    writer, seeds = open_writer(place, is_chat=True), [row["instruction"] for row in SEEDS]
    ids, count = writer.fit(seeds)
    assert 1 < count < len(seeds) and len(ids) + 12 <= writer.context
    assert len(writer.list_ids(seeds[: count + 1])) + 12 > writer.context
    assert writer.write_lists([seeds], 0)[0].examples == count
    with pytest.raises(data.DataError, match=r"one example, 'word word .* leaves no room"):
        writer.fit(["word " * 200])
    long, short = writer.write_replies(["word " * 200, "hi"], 0)
    assert long == ("", False, 0) and short.text


# ---- the best of several replies


def replies(place: Path, out: Path, *options: object) -> list[object]:
    line = ["replies", place / "base", place / "train.jsonl", "--out", out, "--max-reply", 8, "--template", "chatml"]
    return [*line, *([] if "--truncated" in options else ["--truncated", "keep"]), *options]


def test_winners_are_the_best_of_what_is_sampled(place, tmp_path):
    """Sampled again here by `sample_replies`, judged by hand; in other batches."""
    out = tmp_path / "best.jsonl"
    said = run(*replies(place, out, "--best-of", 4, "--score", "length_target:4", "--batch-size", 5, "--seed", 3))
    assert said.code == 0, said.err
    network = model.hub.load(place / "base")
    tokenizer = load_tokenizer(place / "base", network.config.vocab_size)
    template = open_template(tokenizer, "chatml")
    rows = lines(place / "train.jsonl")
    prompts = [list(map(int, encode_rendered(tokenizer, template, row["prompt"]))) for row in rows for _ in range(4)]
    noise = draw_uniforms(3, BEST_OF, 0, range(len(rows)), 4, 8)
    ends = [id for id in (tokenizer.eos_id, tokenizer.control_tokens["<|im_end|>"])]
    sampled = sample_replies(network, prompts, uniforms_NT=noise, stop_ids=ends, context=256)
    scores = [-abs(len(reply.ids) - 4) / 4 for reply in sampled]
    wins, found = {}, lines(out)
    for n in range(len(rows)):
        group = scores[4 * n : 4 * n + 4]
        best = sampled[4 * n + group.index(max(group))]
        text = tokenizer.decode(best.ids[:-1] if best.has_ended else best.ids).strip()
        if text:
            wins[f"train.jsonl:{n + 1}"] = (text, max(group), math.fsum(group) / 4)
    got = {Path(each["origin"]).name: (each["messages"][-1]["content"], each["score"], each["mean_score"]) for each in found}
    assert got == wins and len(wins) > 6
    assert all(each["best_of"] == 4 and each["messages"][:-1] == rows[n]["prompt"] for n, each in enumerate(found[:1]))
    assert f"score        {sum(scores) / len(scores):.4f} on average of 48 scored replies" in said.out
    assert f"best of 4    {sum(each[1] for each in wins.values()) / len(wins):.4f}" in said.out
    assert f"dropped      {1 - len(wins) / 12:.1%} of the prompts" in said.out and "at most 0.6363 nats" in said.out


def test_the_noise_of_a_reply_is_its_own(place, tmp_path):
    """The first 2 of 4 are the 2 of 2, in other batches too: the best of more is never worse."""
    score = ("--score", "length_target:4")
    for n in (2, 4):
        assert run(*replies(place, tmp_path / f"{n}.jsonl", "--best-of", n, *score, "--batch-size", n)).code == 0
    assert run(*replies(place, tmp_path / "again.jsonl", "--best-of", 4, *score, "--batch-size", 7)).code == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "4.jsonl").read_bytes()
    best = [{each["origin"]: each["score"] for each in lines(tmp_path / f"{n}.jsonl")} for n in (2, 4)]
    both = best[0].keys() & best[1].keys()
    assert len(both) > 6 and all(best[1][name] >= best[0][name] for name in both)
    assert any(best[1][name] > best[0][name] for name in both)


def test_own_functions_strings_and_what_is_left_out(place, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, completions, has_ended, keep):\n"
        "    return [None if k == 'no' else float(k == 'high') for k in keep]\n"
    )
    rows = [{"prompt": f"{n} hello", "keep": keep} for n, keep in enumerate(("high", "low", "no", "high"))]
    rows.append({"prompt": "hello " * 400, "keep": "high"})
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    line = ["replies", place / "base", file, "--best-of", 2, "--score", f"{tmp_path / 'mine.py'}:mine", "--score-workers", 0]
    line += ["--at-least", 1, "--max-reply", 8, "--truncated", "keep", "--out", tmp_path / "best.jsonl"]
    said = run(*line)
    assert said.code == 0, said.err
    made = lines(tmp_path / "best.jsonl")
    assert made and all(isinstance(read_chat_record(row), Plain) for row in made)
    assert {row["prompt"] for row in made} <= {"0 hello", "3 hello"} and all(row["score"] == 1.0 for row in made)
    for part in (f"1 below --at-least: {file}:2", f"1 no reward: {file}:3", f"1 no room for a reply in the context: {file}:5"):
        assert part in said.out, said.out


def test_a_winner_is_encoded_as_it_was_sampled(place, tmp_path):
    """The record's prompt by the encoder of --objective sft is the prompt that was answered, and the reply its text."""
    out = tmp_path / "best.jsonl"
    assert run(*replies(place, out, "--best-of", 2, "--score", "length_target:4")).code == 0
    tokenizer = load_tokenizer(place / "base")
    template = open_template(tokenizer, "chatml")
    for row in lines(out):
        (tokens,) = ChatEncoder(tokenizer, template)(read_chat_record(row))
        asked = encode_rendered(tokenizer, template, row["messages"][:-1])
        assert tokens.ids[: len(asked)].tolist() == list(map(int, asked)) and not tokens.is_learned[: len(asked)].any()
        assert tokenizer.decode(tokens.ids[tokens.is_learned].tolist()).strip() == row["messages"][-1]["content"]


def test_cut_replies_do_not_win_unless_they_may(place, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    line = ["replies", base, place / "train.jsonl", "--best-of", 2, "--score", "length_target:4", "--template", "chatml"]
    said = run(*line, "--max-reply", 1, "--out", tmp_path / "none.jsonl")
    assert said.code == 2 and "nothing to write: no reply to keep of 12 prompts" in said.err, said.err
    assert "12 every rewarded reply is cut by --max-reply" in said.err and "raise --max-reply" in said.err
    assert not list(tmp_path.glob("*none*"))
    assert run(*line, "--max-reply", 1, "--truncated", "keep", "--out", tmp_path / "some.jsonl").code == 0
