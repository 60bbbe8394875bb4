"""Self-Instruct with a scripted writer: what is accepted, each reason of a rejection, resumes, and where it stops."""

import json
import shutil

import numpy as np
import pytest

from data.config import DataError
from train.synthetic.examples import continuation_prompt, draw_examples, parse_list, question, read_instruction
from train.synthetic.filters import FILTERS, rejection
from train.synthetic.novelty import NoveltyFilter
from train.synthetic.report import explain_stop, summarize, write_files
from train.synthetic.rounds import RoundLog, claim_folder
from train.synthetic.self_instruct import Made, Written, judge, self_instruct
from train.synthetic.settings import SelfInstructSettings

VERBS = "Name Explain Compare Count Sort Translate Describe Rewrite Shorten Classify".split()
NOUNS = "rivers verbs planets colours proverbs recipes kings metals birds fractions seasons bridges".split()
LONG = ", and say in a sentence or two why these and no others"
SEEDS = [f"{v} some {n} of your own choice{LONG * (v < 'E')}" for v, n in zip(VERBS, NOUNS, strict=False)]
SETTINGS = SelfInstructSettings(seed=3, batch_size=3)


class Scripted:
    """Draws instructions and replies by (round, request) alone, and notes the requests."""

    def __init__(self):
        self.requests, self.calls = [], 0

    def write_lists(self, requests, round):
        self.calls += 1
        self.requests += [list(request) for request in requests]
        random = np.random.default_rng((11, round))
        lists = []
        for _ in requests:
            numbers, nouns = random.integers(2, 99, 2), random.choice(NOUNS, (2, 2))
            items = [f"{random.choice(VERBS)} {numbers[n]} {' with '.join(nouns[n])}" for n in (0, 1)]
            lists.append(Written(f"9. {items[0]}\n10. {items[1]}\n11. Too short\n12. Never ends", False, 8))
        return lists

    def write_replies(self, instructions, round):
        return [Written(f"reply to {text}", "7" not in text, 0) for text in instructions]


class Constant:
    """Writes the same list each time."""

    def __init__(self, text, has_ended=True, reply=("x", True)):
        self.text, self.has_ended, self.reply = text, has_ended, reply

    def write_lists(self, requests, round):
        return [Written(self.text, self.has_ended, 8) for _ in requests]

    def write_replies(self, instructions, round):
        return [Written(*self.reply) for _ in instructions]


class Silent(Scripted):
    """Writes instructions and no replies."""

    def write_lists(self, requests, round):
        return [Written(f"9. {VERBS[round]} {NOUNS[n]} {VERBS[-n]} {NOUNS[-round]}", True, 8) for n in range(len(requests))]

    def write_replies(self, instructions, round):
        return [Written(" ", True) for _ in instructions]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(folder, writer, count=20, patience=9, **options) -> Made:
    claim_folder(folder, {"seed": 3})
    made = self_instruct(SEEDS, writer, SETTINGS, RoundLog(folder), count=count, patience=patience, **options)
    write_files(folder, made, count)
    return made


# ---- parts


def test_lists_are_parsed():
    text = "Sure:\n\n9. Name  two\nrivers.\n10) Add 1. and 2.\n  Task 11: Sort them\n12.\n13. Last"
    assert parse_list(text) == ["Name two rivers.", "Add 1. and 2.", "Sort them", "Last"]
    assert parse_list("no list at 3.5 items") == [] == parse_list("")


FAILING = {
    "fewer than 4 words": "Sort these words",
    "more than 150 words": "word " * 151,
    "begins with punctuation": "'Sort' the words below",
    "begins with a character outside ASCII": "Übersetze die vier Wörter",
    "begins with 'Write a program'": "Write a program that sorts",
    "has a forbidden word": "Please Go To the next page",
}


def test_every_filter_has_its_case_and_border():
    assert list(FAILING) == list(FILTERS)
    for reason, text in FAILING.items():
        assert rejection(text.strip()) == reason
    for text in ("Sort these four words", "word " * 150, "write a program that sorts", "Filed maps1: imagery of plots drawn"):
        assert rejection(text.strip()) is None, text
    for word in "image images graph graphs picture pictures file files map maps draw plot".split():
        assert rejection(f"Say it with a {word.upper()}, please") == "has a forbidden word"


def test_a_completion_is_judged_item_by_item():
    pool = NoveltyFilter(0.7, SEEDS)
    text = f"9. {SEEDS[0]}\n10. {SEEDS[1]} now\n11. Sing a short song\n12. Sing a short song\n13. Pay the man now"
    found = [(reason, more.get("similar_to")) for _, reason, more in judge(Written(text, False), pool)]
    assert found == [
        ("equal to another one", None),
        ("similar to another one", SEEDS[1]),
        (None, None),
        ("equal to another one", None),
        ("cut by --list-tokens", None),
    ]
    assert judge(Written(text, True), pool)[-1][1] is None  # it ended: its last item is whole
    assert [judge(Written(text, True), pool)[0][1] for text in (" ", "Hello")] == ["empty completion", "no numbered item"]


def test_examples_are_drawn_by_the_request_alone():
    made = ["own a", "own b", "own c"]
    sizes = {"seed": 0, "total": 8, "most": 2}
    drawn = [draw_examples(SEEDS, made, request=request, **sizes) for request in range(50)]
    assert drawn == [draw_examples(SEEDS, made, request=request, **sizes) for request in range(50)]
    for each in drawn:
        assert len(set(each)) == 8 and sum(text in made for text in each) == 2
    assert {text for each in drawn for text in each} == {*SEEDS, *made}
    assert sum(text in made for text in draw_examples(SEEDS, made[:1], request=0, **sizes)) == 1
    assert any(each[0] in made for each in drawn) and any(each[0] not in made for each in drawn)


def test_prompts_number_their_examples():
    assert continuation_prompt(["Add.", "Sort."]).endswith("1. Add.\n2. Sort.\n3.")
    assert "1. Add.\n2. Sort.\n" in question(["Add.", "Sort."]) and "begins with 3." in question(["Add.", "Sort."])


def test_seed_records_of_all_shapes():
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "Add\n 1"}, {"role": "assistant", "content": "2"}]
    for row in (
        {"instruction": "Add 1", "instances": [{"input": "", "output": "2"}]},
        {"instruction": "Add 1", "input": "to 1", "output": "2"},
        {"prompt": "Add 1"},
        {"messages": talk},
        {"conversations": [{"from": "human", "value": "Add 1"}, {"from": "gpt", "value": "2"}]},
    ):
        assert read_instruction(row) == "Add 1"
    with pytest.raises(DataError, match="no prompt"):
        read_instruction({"text": "Add 1"})


# ---- the loop


def test_records_are_whole_and_every_item_is_accounted_for(tmp_path):
    writer = Scripted()
    made = run(tmp_path / "out", writer)
    assert len(made.records) >= 20 and made.requests == 3 * writer.calls
    assert len(made.records) + len(made.rejected) == 4 * made.requests
    assert {"fewer than 4 words", "cut by --list-tokens", "reply cut by --reply-tokens"} <= set(made.reasons)
    assert all("7" not in record["instruction"] for record in made.records)
    assert [len(request) for request in writer.requests] == [8] * made.requests
    assert len({tuple(request) for request in writer.requests}) == made.requests  # each has a draw of its own
    own = {record["instruction"] for record in made.records}
    assert not own & {text for request in writer.requests[:3] for text in request}  # the first round has seeds alone
    assert all(len(own & set(request)) == 2 for request in writer.requests[6:])
    pool = [*SEEDS]
    for record in made.records:  # the property that is promised, by a filter without the bound
        assert NoveltyFilter(0.7, pool, has_bound=False).most_similar(record["instruction"]) is None
        pool.append(record["instruction"])
    assert made.skipped and made.compared
    written = [json.loads(line) for line in (tmp_path / "out" / "conversations.jsonl").read_text().splitlines()]
    assert len(written) == 20 and written[0]["messages"][1]["content"] == f"reply to {written[0]['messages'][0]['content']}"
    assert summarize(made, 20)["made"] == 20 and summarize(made, 20)["beyond_wanted"] == len(made.records) - 20


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("kill", ["between", "inside a line", "inside a round"])
def test_a_killed_run_goes_on_with_the_same_bytes(tmp_path, at, kill):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, Scripted())

    def stop(made):
        if kill != "inside a round" and made.requests == 3 * at:
            raise KeyboardInterrupt

    writer = Scripted()
    if kill == "inside a round":
        reply, count = writer.write_replies, iter(range(99))

        def failing(instructions, round):
            if next(count) == at:
                raise KeyboardInterrupt
            return reply(instructions, round)

        writer.write_replies = failing
    with pytest.raises(KeyboardInterrupt):
        run(broken, writer, on_round=stop)
    log = broken / "rounds.jsonl"
    if kill == "inside a line":
        log.write_bytes(log.read_bytes()[:-25])
    again = Scripted()
    run(broken, again)
    assert files(broken) == files(whole)
    finished = at - (kill == "inside a line")
    assert again.calls == len(log.read_text().splitlines()) - finished > 0  # finished rounds are not written again


def test_a_larger_count_goes_on_and_equals_that_count_at_once(tmp_path):
    run(tmp_path / "grown", Scripted(), count=6)
    run(tmp_path / "grown", Scripted(), count=20)
    run(tmp_path / "once", Scripted(), count=20)
    assert files(tmp_path / "grown") == files(tmp_path / "once")


def test_finished_runs_write_nothing_again(tmp_path):
    run(tmp_path / "out", Scripted())
    before, writer = files(tmp_path / "out"), Scripted()
    run(tmp_path / "out", writer)
    assert files(tmp_path / "out") == before and writer.calls == 0


STUCK = {
    "nothing": (Constant(""), "empty completion", "answers nothing"),
    "no list": (Constant("Hello!"), "no numbered item", "no numbered lists"),
    "a seed": (Constant(f"9. {SEEDS[0]}"), "equal to another one", "repeats what it knows"),
    "near a seed": (Constant(f"9. {SEEDS[0]} now"), "similar to another one", "--overlap"),
    "cut": (Constant("9. Sing a song about", False), "cut by --list-tokens", "raise --list-tokens"),
    "no reply": (Silent(), "empty reply", "--template"),
    "short": (Constant("9. Sing now"), "fewer than 4 words", "larger network"),
}


@pytest.mark.parametrize("case", STUCK)
def test_a_network_that_makes_nothing_is_stopped(tmp_path, case):
    writer, reason, advice = STUCK[case]
    made = run(tmp_path / "out", writer, patience=7)
    assert made.requests == 9 and not made.records  # whole rounds of 3
    assert reason in made.reasons
    said = explain_stop(made, 20, 7, tmp_path / "out")
    assert "9 requests in a row gave nothing (--patience 7), and 0 of 20 conversations are made" in said
    assert reason in said and advice in said
    assert not (tmp_path / "out" / "conversations.jsonl").exists()  # nothing that looks like success
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["is_complete"] is False
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 9 and all(each["reason"] in made.reasons for each in rejected)


def test_repetition_after_a_success_counts_from_there(tmp_path):
    made = run(tmp_path / "out", Constant("9. Sing a song today"), patience=7)
    assert len(made.records) == 1 and made.requests == 9 and made.barren == 8
    assert len((tmp_path / "out" / "conversations.jsonl").read_text().splitlines()) == 1


# ---- the folder


def test_folders_of_other_settings_or_files_are_refused(tmp_path):
    claim_folder(tmp_path / "out", {"command": "self-instruct", "temperature": 0.7})
    claim_folder(tmp_path / "out", {"command": "self-instruct", "temperature": 0.7})
    with pytest.raises(DataError, match=r"temperature = 0.7, and now it is 1.0"):
        claim_folder(tmp_path / "out", {"command": "self-instruct", "temperature": 1.0})
    (tmp_path / "other").mkdir()
    claim_folder(tmp_path / "other", {})  # empty
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not of this command"):
        claim_folder(tmp_path / "other", {})
    with pytest.raises(DataError, match="not of this command"):
        claim_folder(tmp_path / "other" / "mine.txt", {})


def test_a_damaged_log_is_named(tmp_path):
    run(tmp_path / "out", Scripted())
    log = tmp_path / "out" / "rounds.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + "{}\n" + lines[2])
    with pytest.raises(DataError, match=r"rounds.jsonl:2 is not the line of round 1"):
        RoundLog(tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [{"seed_examples": 0}, {"made_examples": -1}, {"top_p": 0.0}, {"overlap": 1.5}, {"temperature": -1.0}, {"batch_size": 0}],
)
def test_numbers_that_cannot_be(settings):
    with pytest.raises(DataError, match=f"--{next(iter(settings)).replace('_', '-')} "):
        SelfInstructSettings(**settings)
