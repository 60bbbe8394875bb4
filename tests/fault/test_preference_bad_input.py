"""What a person can get wrong with `--objective dpo` and `kto`: one line that names it and a way out, code 2, nothing left."""

import re
import shutil
from pathlib import Path

import pytest

import model.hub
from tests.chat_runs import CHATML, write_base
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.records import write_rows
from tests.runs import Said, command

SIZES = ["--context", 128, "--threads", 1, "--device", "cpu", "--sample-every", 0, "--steps", 2]
LONG = "x y " * 99


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("bad")
    write_base(place / "base", CHATML)
    write_base(place / "without")  # no template, and no control tokens for one
    return place


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pair(prompt: str = "Hi", chosen: str = "Lo", rejected: str = "No") -> dict:
    return {"prompt": user(prompt), "chosen": reply(chosen), "rejected": reply(rejected)}


def rated(prompt: str = "Hi", text: str = "Lo", label: object = True) -> dict:
    return {"prompt": user(prompt), "completion": reply(text), "label": label}


def pairs(odd: dict | None = None) -> list[dict]:
    """Good records; the fifth one is odd."""
    rows = [pair(f"Hi {number}") for number in range(6)]
    return rows if odd is None else [*rows[:4], odd, *rows[4:]]


def ratings(odd: dict | None = None) -> list[dict]:
    rows = [rated(f"Hi {number}", label=number % 2 == 0) for number in range(6)]
    return rows if odd is None else [*rows[:4], odd, *rows[4:]]


def run(place: Path, objective: str, rows: list[dict], *options: object, base: str | None = "base") -> Said:
    corpus, held_out = write_rows(place / "rows.jsonl", rows), pairs() if objective == "dpo" else ratings()
    line = ["--objective", objective, "--corpus", corpus, *SIZES]
    line += ["--validation", write_rows(place / "held_out.jsonl", held_out)]
    line += [] if base is None else ["--init", place / base]
    line += [] if "--batch-size" in options else ["--batch-size", 4]
    said = command(*line, *options, "--out", place / "run")
    assert not (place / "run").exists(), "nothing is left"
    return said


def accept(place: Path, objective: str, rows: list[dict], *options: object, **more) -> str:
    said = run(place, objective, rows, *options, "--dry-run", **more)
    assert said.code == 0, said.err
    return said.out


# ---- records

AT = "rows.jsonl:5"
LATE = pair(chosen=f"{LONG}a", rejected=f"{LONG}b")
LEFT_OUT = {  # the fifth record, --dpo.overlong: why it is left out
    "equal replies": (pair(rejected="Lo"), "error", "chosen and rejected are equal"),
    "a prompt that fills a row": (pair(LONG), "cut", "the prompt alone fills a row"),
    "a difference after the cut": (LATE, "cut", "the replies differ only after the cut"),
    "a long pair": (LATE, "drop", "longer than a row"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_record_that_is_left_out(name, place):
    """Counted and named; where every record is such a one, the run is refused."""
    odd, policy, reason = LEFT_OUT[name]
    said = accept(place, "dpo", pairs(odd), "--dpo.overlong", policy)
    assert f"left out 1 record, {reason}: {place / AT}\n" in said and "6 to train on" not in said.partition("left out")[2]
    others = [odd | {"prompt": user(f"{odd['prompt'][0]['content']} {number}")} for number in range(3)]
    said = run(place, "dpo", others, "--dpo.overlong", policy)
    assert_one_clear_line(said, f"no record of 3 is left to compare ({reason}: 3 records)")


def test_a_record_that_is_cut(place):
    said = accept(place, "dpo", pairs(pair(chosen=f"a {LONG}", rejected="b")), "--dpo.overlong", "cut")
    assert f"cut      1 record longer than a row: {place / AT}\n" in said
    said = accept(place, "kto", ratings(rated(text=LONG)), "--kto.overlong", "cut")
    assert f"cut      1 record longer than a row: {place / AT}\n" in said


RECORDS = {  # objective, records, options, what is said
    "an empty reply": ("dpo", pairs(pair(chosen="")), [], (f"{AT}: chosen, turn 1 (assistant): the reply is empty",)),
    "an empty rated reply": ("kto", ratings(rated(text=" ")), [], (f"{AT}: ", "reply is empty")),
    "a long pair": (
        "dpo",
        pairs(pair(chosen=LONG)),
        [],
        (f"{AT}: it has 4", "a row holds 128", "a larger context", "cut (drop its oldest turns", "--dpo.overlong"),
    ),
    "a long rated reply": ("kto", ratings(rated(text=LONG)), [], (f"{AT}: it has 4", "--kto.overlong")),
    "good labels alone": (
        "kto",
        [rated(f"Hi {number}") for number in range(6)],
        [],
        ("all 6 labels are good, and KTO needs both", "--objective sft"),
    ),
    "bad labels alone": ("kto", [rated(f"{n}", label=0) for n in range(6)], [], ("all 6 labels are bad, and KTO needs both",)),
    "one prompt": (
        "kto",
        [rated(text=f"Lo {number}", label=number % 2) for number in range(6)],
        [],
        ("all 6 records have one prompt, and KTO compares with replies to other prompts",),
    ),
    "a label that is none": ("kto", ratings(rated(label="maybe")), [], (f"{AT}: 'label' is 'maybe': true or 1 for a",)),
    "no label": ("kto", ratings({"messages": user("Hi") + reply("Lo")}), [], (f"{AT}: no label: 'label' says true",)),
    "conversations": (
        "dpo",
        [{"messages": user("Hi") + reply("Lo")}],
        [],
        ("rows.jsonl:1: its columns: 'messages'", "Accepted: prompt, chosen, rejected", "--objective sft"),
    ),
    "prompt and completion": (
        "dpo",
        [{"prompt": "Hi", "completion": "Lo"}],
        [],
        ("its columns: 'prompt', 'completion'", "Accepted: "),
    ),
    "rated replies": ("dpo", ratings(), [], ("rows.jsonl:1: ", "one reply, rated good or bad: for KTO")),
    "columns of no shape": ("dpo", [{"question": "a", "good": "b"}], [], ("its columns: 'question', 'good'. Accepted: ",)),
    "no shape of a rated reply": ("kto", [{"question": "a", "good": "b"}], [], ("Accepted: prompt, completion, label; ",)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record(name, place):
    objective, rows, options, expected = RECORDS[name]
    assert_one_clear_line(run(place, objective, rows, *options), *expected)


def test_pairs_are_rated_replies_too(place):
    said = accept(place, "kto", pairs())
    assert "labels   6 good, 6 bad" in said


# ---- options

OPTIONS = {  # a line: what is said
    "dpo --dpo.loss robust --dpo.label-smoothing 0.5": ("--dpo.label-smoothing 0.5: --dpo.loss robust takes 0 <= ", "< 1/2"),
    "dpo --dpo.loss exo_pair --dpo.label-smoothing 0": ("--dpo.label-smoothing 0.0: --dpo.loss exo_pair takes 0 < ",),
    "dpo --dpo.loss simpo --dpo.gamma -1": ("--dpo.gamma -1.0: --dpo.loss simpo takes a finite number, 0 or more",),
    "dpo --dpo.loss discopop --dpo.tau 0": ("--dpo.tau 0.0: --dpo.loss discopop takes a finite number above 0",),
    "dpo --dpo.loss dpop --dpo.dpop-lambda -1": ("--dpo.dpop-lambda -1.0: --dpo.loss dpop takes a finite number, 0 or more",),
    "dpo --dpo.loss sigmoid=1,simpo=1": ("sigmoid=1,simpo=1: these have different β by default ([0.1, 2.0]): give --dpo.beta",),
    "dpo --dpo.loss bco_pair --dpo.divergence js": ("--dpo.divergence js goes with losses of the", "sigmoid, ", "bco_pair"),
    "dpo --dpo.divergence-alpha 0.3": ("--dpo.divergence-alpha would have no effect: it is of --dpo.divergence alpha",),
    "dpo --dpo.label-smoothing 0.1": ("--dpo.label-smoothing would have no effect: the losses of --dpo.loss have no",),
    "dpo --dpo.nll-weight 2": ("--dpo.nll-weight would have no effect: it is of --dpo.loss cpo and orpo",),
    "dpo --dpo.reference adapter-off": ("--dpo.reference adapter-off: there is no adapter to switch off: add --adapter",),
    "kto --kto.reference adapter-off": ("--kto.reference adapter-off: there is no adapter to switch off",),
    "dpo --dpo.reference copy --dpo.loss orpo": ("--dpo.reference would have no effect: the losses of --dpo.loss have no",),
    "dpo --dpo.reference-file x": ("--dpo.reference-file would have no effect: it is of --dpo.reference precomputed",),
    "dpo --dpo.loss aot --batch-size 1": ("aot compares the pairs of a step, and needs two of them: --batch-size 2",),
    "kto --batch-size 1": ("compares the replies of a step with their mean, and needs two: --batch-size 2",),
    "dpo --dpo.loss simpo --dpo.ld-alpha 0.5": ("--dpo.ld-alpha 0.5: --dpo.loss simpo divides by the number of tokens",),
    "dpo --loss chunked": ("--loss would have no effect: --dpo.loss chooses the loss of pairs",),
    "kto --label-smoothing 0.1": ("--label-smoothing would have no effect: the loss is KTO's",),
    "dpo --dpo.template chatgpt": ("there is no chat template 'chatgpt'", "chatml, llama-2"),
    "dpo --dpo.max-reply 3 --dpo.replies 0": ("--dpo.max-reply would have no effect: --dpo.replies 0 generates none",),
}


@pytest.mark.parametrize("line", OPTIONS)
def test_an_option(line, place):
    objective, *options = line.split()
    assert_one_clear_line(run(place, objective, pairs() if objective == "dpo" else ratings(), *options), *OPTIONS[line])


VALUES = {  # refused before anything is read
    "dpo --dpo.loss sigmoidal": "loss 'sigmoidal': 'sigmoidal' is not known; one of sigmoid, conservative,",
    "dpo --dpo.loss sigmoid=0": "sigmoid=0: expected a finite weight above 0",
    "dpo --dpo.loss sigmoid=1,sigmoid=2": "sigmoid is given twice",
    "dpo --dpo.loss sft": "--dpo.loss sft: it goes beside a loss of pairs; alone it is --objective sft on chosen replies",
    "dpo --dpo.loss kto": "--dpo.loss kto: --objective kto reads pairs too, each reply by itself",
    "dpo --dpo.beta 0": "--dpo.beta 0.0: must be finite and above 0",
    "dpo --dpo.beta inf": "--dpo.beta inf: must be finite and above 0",
    "dpo --dpo.ld-alpha 1.5": "--dpo.ld-alpha 1.5: must be between 0 and 1",
    "dpo --dpo.nll-weight inf": "--dpo.nll-weight inf: must be finite and at least 0",
    "dpo --dpo.divergence-alpha nan": "--dpo.divergence-alpha nan: must be finite",
    "dpo --dpo.replies -1": "--dpo.replies -1: must be at least 0",
    "kto --kto.max-reply 0": "--kto.max-reply 0: must be at least 1",
    "kto --kto.desirable-weight 0": "--kto.desirable-weight 0.0: must be finite and above 0",
    "kto --kto.undesirable-weight inf": "--kto.undesirable-weight inf: must be finite and above 0",
    "kto --kto.beta nan": "--kto.beta nan: must be finite and above 0",
}


@pytest.mark.parametrize("line", VALUES)
def test_a_value(line, place):
    objective, *options = line.split()
    said = run(place, objective, [], *options)
    assert said.code == 2 and VALUES[line] in " ".join(re.sub(r"[│─╭╮╰╯]", " ", said.err).split()), said.err


# ---- what it goes on from


def test_what_it_goes_on_from(place):
    """A decoder with a tokenizer; one without a template gets ChatML's control tokens, which an adapter does not train."""
    for objective, rows in (("dpo", pairs()), ("kto", ratings())):
        said = run(place, objective, rows, base=None)
        assert_one_clear_line(said, f"{objective} goes on from a network that answers: --init RUN, of --objective sft")
    assert_one_clear_line(run(place, "dpo", pairs(), base="none"), f"--init {place / 'none'}", "does not exist")
    model.hub.save(randomized(tiny_config("bert", vocab_size=332)), place / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, place / "bert" / name)
    assert_one_clear_line(run(place, "dpo", pairs(), base="bert"), "networks of the architecture 'decoder'", "'encoder'")
    said = accept(place, "dpo", pairs(), base="without")
    assert "this folder has no chat template: chatml is used" in said and "2 new control tokens: <|im_start|>, " in said
    said = run(place, "dpo", pairs(), "--adapter", "lora", base="without")
    expected = ("--lora.train-whole embedding head", "--dpo.template alpaca, zephyr")
    assert_one_clear_line(said, "new control tokens (<|im_start|>, <|im_end|>)", *expected)
    assert "reference " in accept(place, "dpo", pairs(), "--adapter", "lora", "--dpo.template", "zephyr", base="without")


def test_a_classifier_is_no_network_to_go_on_from(place):
    """Such as a reward model: it writes no text."""
    shutil.copytree(place / "base", place / "scores")
    network = model.hub.load(place / "base", head="sequence", labels=1)
    model.hub.save(network, place / "scores")
    for objective, rows in (("dpo", pairs()), ("kto", ratings())):
        said = run(place, objective, rows, base="scores")
        assert_one_clear_line(said, f"--init {place / 'scores'} has the head 'sequence' and writes no replies: name one")


def test_what_looks_odd_is_said(place):
    """Strings on a network that chats, and pairs whose scores say the opposite."""
    strings = {"prompt": "Hi there", "chosen": " Lo", "rejected": " No", "score_chosen": 1, "score_rejected": 9}
    said = accept(place, "dpo", pairs(strings))
    assert "strings  1 record without a template; `model chat` asks by one" in said
    assert "margins  1 pair: the rejected reply has the higher score" in said
    assert "strings " not in accept(place, "dpo", pairs())


def test_an_adapter_is_no_network_to_go_on_from(place, tmp_path):
    """It is merged first, by the command that is named."""
    line = ["--objective", "dpo", "--corpus", write_rows(tmp_path / "rows.jsonl", pairs()), *SIZES, "--batch-size", 4]
    line += ["--validation", tmp_path / "rows.jsonl", "--dpo.replies", 0]
    said = command(*line, "--init", place / "base", "--adapter", "lora", "--out", tmp_path / "adapted")
    assert said.code == 0, said.err
    said = command(*line, "--init", tmp_path / "adapted", "--out", tmp_path / "run")
    assert_one_clear_line(said, "holds an adapter, not a network", "python -m lora merge")
