"""Faults of `--objective grpo` and `rloo`: one clear line, code 2, and what was saved stays whole."""

import re
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import model.hub
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.policy_runs import prompts, write_place
from tests.records import write_rows
from tests.runs import Said, arguments, assert_same_end, at_step, command, last_checkpoint, metrics, process, steps_of
from train.policy_objective import PolicyObjective
from train.runs.checkpoint import verify

SETTINGS = {
    "batch-size": 8, "context": 128, "threads": 1, "device": "cpu", "precision": "fp32", "sample-every": 0, "steps": 6,
    "save-every": 2, "eval-every": 6, "optimizer": "adamw", "lr": "1e-3", "reward": "length_target:4", "corpus": "train.jsonl",
    "validation": "held_out.jsonl", "init": "base", "NAME.group": 4, "NAME.max-reply": 8, "NAME.validation-prompts": 2,
}  # fmt: skip
FILES = ("corpus", "validation", "init")
MINE = """
import time
from pathlib import Path

PLACE, CALLS = Path(__file__).parent, [0]


def mine(prompts, completions):
    values = [float(len(text)) for text in completions]
    CALLS[0] += 1
    mode = (PLACE / "mode").read_text() if (PLACE / "mode").exists() else ""
    if mode.isdecimal() and CALLS[0] == int(mode):
        (PLACE / "waiting").touch()
        time.sleep(60)
    if mode == "raise":
        raise KeyError("answer")
    if mode in ("nan", "inf"):
        values[-1] = float(mode)
    if mode == "late":
        time.sleep(60)
    if mode == "none":
        return [None] * len(values)
    return values[:-1] if mode == "short" else values
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = write_place(tmp_path_factory.mktemp("bad"))
    (place / "mine.py").write_text(MINE)
    return place


@pytest.fixture
def mine(place):
    """The reward of a file, and what becomes of it after a step."""
    yield f"{place / 'mine.py'}:mine"
    for name in ("mode", "waiting"):
        (place / name).unlink(missing_ok=True)


def options(place: Path, objective: str = "grpo", **changes: object) -> list[str]:
    """The options of a run; None leaves one out."""
    asked = {"objective": objective} | SETTINGS | {name.replace("_", "-"): value for name, value in changes.items()}
    asked = {name: place / value if name in FILES and value else value for name, value in asked.items() if value is not None}
    return arguments({name.replace("NAME", objective): value for name, value in asked.items()})


def refuse(place: Path, *more: object, objective: str = "grpo", **changes: object) -> Said:
    """A run that does not begin."""
    said = command(*options(place, objective, **changes), *more, "--out", place / "run")
    assert said.code == 2 and not (place / "run").exists(), said
    return said


def accept(place: Path, *more: object, **changes: object) -> str:
    said = command(*options(place, **changes), *more, "--out", place / "run", "--dry-run")
    assert said.code == 0, said.err
    return said.out


# ---- what it begins with

def test_no_reward(place):
    for objective in ("grpo", "rloo"):
        said = refuse(place, objective=objective, reward=None)
        forms = "--reward NAME, PATH.py:FUNCTION or a reward model's folder"
        assert_one_clear_line(said, f"--objective {objective} needs a judge: {forms}")


def test_what_it_goes_on_from(place):
    for objective in ("grpo", "rloo"):
        said = refuse(place, objective=objective, init=None)
        assert_one_clear_line(said, f"--objective {objective} goes on from a network that answers: --init RUN, of --objective")
    assert_one_clear_line(refuse(place, init="none"), f"--init {place / 'none'}", "does not exist")
    model.hub.save(randomized(tiny_config("bert", vocab_size=332)), place / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, place / "bert" / name)
    assert_one_clear_line(refuse(place, init="bert"), "networks of the architecture 'decoder'", "'encoder'")
    shutil.copytree(place / "base", place / "scores")
    model.hub.save(model.hub.load(place / "base", head="sequence", labels=1), place / "scores")
    for objective in ("grpo", "rloo"):
        said = refuse(place, objective=objective, init="scores")
        assert_one_clear_line(said, f"--init {place / 'scores'} has the head 'sequence' and writes no replies: name one")


def test_no_corpus(place):
    said = refuse(place, corpus=None, validation=None)
    assert_one_clear_line(said, "--objective grpo reads prompts with answers: --corpus FILE.jsonl (python -m data task")


def test_sizes_of_a_rollout(place):
    said = refuse(place, batch_size=6)
    assert_one_clear_line(said, "1 minibatch of 6 replies", ": 6, which is no multiple of the group of 4", "--batch-size 4")
    assert "6 prompts × 4 replies in a rollout, 4 steps of 6 replies" in accept(place, batch_size=6, **{"NAME.minibatches": 4})
    assert "warning  --grpo.group 1: one reply has no others to compare with" in accept(place, **{"NAME.group": 1})
    assert "warning  --grpo.group" not in accept(place)


LONG = {"prompt": [{"role": "user", "content": "x y " * 99}], "answer": "x"}


def test_prompts_without_room(place):
    rows = prompts(6)
    write_rows(place / "odd.jsonl", [*rows[:4], LONG, *rows[4:]])
    said = refuse(place, corpus="odd.jsonl")
    assert_one_clear_line(said, "odd.jsonl:5: its prompt has ", "no room is left for a reply in a context of 128", " drop ")
    said = accept(place, corpus="odd.jsonl", **{"NAME.overlong": "drop"})
    assert f"left out 1 prompt without room for a reply: {place / 'odd.jsonl'}:5" in said and "6 to train on" in said
    write_rows(place / "long.jsonl", [LONG, LONG | {"answer": "y"}])
    said = refuse(place, corpus="long.jsonl", **{"NAME.overlong": "drop"})
    assert_one_clear_line(said, "no prompt of 2 fits a context of 128 tokens")


# ---- values

VALUES = {  # an option: what is said
    "--grpo.clip-low 0": "--grpo.clip-low 0.0: must be finite and above 0",
    "--grpo.clip-low 1.5": "--grpo.clip-low 1.5: at most 1",
    "--grpo.clip-high -0.2": "--grpo.clip-high -0.2: must be finite and above 0",
    "--grpo.clip-high nan": "--grpo.clip-high nan: must be finite and above 0",
    "--grpo.cap inf --grpo.loss cispo": "--grpo.cap inf: must be finite and above 0",
    "--grpo.temperature 0": "--grpo.temperature 0.0: must be finite and above 0",
    "--grpo.temperature nan": "--grpo.temperature nan: must be finite and above 0",
    "--grpo.beta -0.1": "--grpo.beta -0.1: must be finite and at least 0",
    "--grpo.beta inf": "--grpo.beta inf: must be finite and at least 0",
    "--grpo.entropy-bonus -1": "--grpo.entropy-bonus -1.0: must be finite and at least 0",
    "--grpo.correction token_mask --grpo.correction-cap 0": "--grpo.correction-cap 0.0: must be finite and above 0",
    "--grpo.group 0": "--grpo.group 0: must be at least 1",
    "--grpo.max-reply 0": "--grpo.max-reply 0: must be at least 1",
    "--grpo.minibatches 0": "--grpo.minibatches 0: must be at least 1",
    "--grpo.rollout-epochs 0": "--grpo.rollout-epochs 0: must be at least 1",
    "--grpo.resample -1": "--grpo.resample -1: must be at least 0",
    "--grpo.validation-prompts 0": "--grpo.validation-prompts 0: must be at least 1",
    "--grpo.samples-every -1": "--grpo.samples-every -1: must be at least 0",
    "--grpo.truncated punish --grpo.punish-margin 0": "--grpo.punish-margin 0: must be at least 1",
    "--grpo.truncated punish --grpo.punish-margin 9": "--grpo.punish-margin 9: replies have at most 8 tokens",
    "--grpo.beta 0.1 --grpo.reference adapter-off": "there is no adapter to switch off: add --adapter lora",
    "--rloo.group 1": "--rloo.group 1: a reply is compared with the others to its prompt: 2 at least",
    "--rloo.clip-low 1.01": "--rloo.clip-low 1.01: at most 1",
    "--rloo.clip-high 0": "--rloo.clip-high 0.0: must be finite and above 0",
    "--rloo.temperature -1": "--rloo.temperature -1.0: must be finite and above 0",
    "--rloo.beta nan": "--rloo.beta nan: must be finite and at least 0",
}


@pytest.mark.parametrize("line", VALUES)
def test_a_value_that_cannot_be(line, place):
    said = refuse(place, *line.split(), objective=line[2:6])
    assert VALUES[line] in " ".join(re.sub(r"[│─╭╮╰╯]", " ", said.err).split()), said.err


# ---- rewards that fail in the middle of a run

FAULTS = {  # mode: what is said
    "raise": ("mine.py:mine raised KeyError: 'answer' (line ", "train.jsonl:", "reply "),
    "nan": ("mine.py:mine returned nan for ", "train.jsonl:", "a finite number is expected, or None"),
    "inf": ("mine.py:mine returned inf for ", "train.jsonl:"),
    "short": ("mine.py:mine returned 3 values for 4 replies to ", "train.jsonl:", "one a reply is expected"),
    "none": ("rollout 3: the reward functions left out every reply (they returned None)",),
    "late": ("mine.py:mine: no result after 0.5 s for 4 replies to a prompt", "train.jsonl:", "(--reward-timeout)"),
}


@pytest.fixture(scope="module")
def whole(place) -> Path:
    said = command(*options(place, reward=f"{place / 'mine.py'}:mine", reward_workers=0), "--out", place / "whole")
    assert said.code == 0, said.err
    return place / "whole"


@pytest.mark.parametrize("mode", FAULTS)
def test_a_reward_that_fails_in_the_middle(mode, place, mine, whole, tmp_path):
    """The run stops in one line; its last checkpoint is whole, and goes on to the same end once the reward is well."""
    run, how = tmp_path / "run", {"reward_timeout": 0.5} if mode == "late" else {"reward_workers": 0}
    with at_step(3, lambda: (place / "mode").write_text(mode)):
        said = command(*options(place, reward=mine, **how), "--out", run)
    assert_one_clear_line(said, *FAULTS[mode])
    assert steps_of(run) == [2] and [row["step"] for row in metrics(run)][-1] == 3
    verify(last_checkpoint(run))
    (place / "mode").unlink()
    if mode == "raise":
        assert command("--resume", run, "--reward", mine).code == 0
        assert_same_end(whole, run, steps=6)


# ---- replies that do not end

def test_all_replies_are_cut(place, tmp_path):
    """Said once; a run that would learn from none is refused."""
    said = command(*options(place, steps=2), "--out", tmp_path / "kept")
    note = "all replies of rollout 0 were cut at 8 tokens: raise --grpo.max-reply, or teach stopping first (--objective sft)"
    assert said.code == 0 and said.out.count("were cut at") == 1 and f"note: {note}" in said.out
    said = command(*options(place, **{"NAME.truncated": "mask"}), "--out", tmp_path / "masked")
    assert_one_clear_line(said, "rollout 0: all 8 replies were cut at 8 tokens, and --grpo.truncated mask learns from none")
    punish = {"NAME.truncated": "punish", "NAME.punish-margin": 2}
    said = command(*options(place, "rloo", steps=1, **punish), "--out", tmp_path / "punished")
    assert said.code == 0 and "raise --rloo.max-reply" in said.out


# ---- a ratio that is not finite

def test_a_ratio_that_is_not_finite(place, tmp_path):
    run, log_probs, seen = tmp_path / "run", PolicyObjective.log_probs, []

    def spoilt(self, *given):
        log_p_BT, entropy_BT = log_probs(self, *given)
        if self.training and torch.is_grad_enabled():
            seen.append(1)
            if len(seen) == 4:  # ratio e^1000
                return log_p_BT + 1000, entropy_BT
        return log_p_BT, entropy_BT

    with patch.object(PolicyObjective, "log_probs", spoilt):
        said = command(*options(place, **{"NAME.minibatches": 2}), "--out", run)
    assert_one_clear_line(said, "step 4: the loss is ", "its batch held ", "train.jsonl:", "(rollout 1)")
    assert f"--resume {run} --on-nonfinite skip" in said.err and steps_of(run) == [2]
    verify(last_checkpoint(run))
    seen.clear()
    seen.extend([1, 1])
    with patch.object(PolicyObjective, "log_probs", spoilt):
        said = command("--resume", run, "--on-nonfinite", "skip")
    assert said.code == 0 and "skipped step 4: " in said.out, said
    assert [row["step"] for row in metrics(run) if row["split"] == "train"] == [1, 2, 3, 5, 6]


# ---- code in a file is run only when a command line names it

def test_a_resume_needs_the_same_code_again(place, mine, whole, tmp_path):
    run, file = tmp_path / "run", tmp_path / "mine.py"
    shutil.copy(place / "mine.py", file)
    with at_step(3, lambda: signal.raise_signal(signal.SIGINT)):
        said = command(*options(place, reward=f"{file}:mine", reward_workers=0), "--out", run)
    assert said.code == 130 and f"the code in {file} is run (SHA-256 " in said.out
    said = command("--resume", run)
    assert_one_clear_line(said, "of files, which are run only if the command line names them", f"--reward {file}:mine")
    said = command("--resume", run, "--reward", "length_target:4")
    assert_one_clear_line(said, "in this order")
    text = file.read_text()
    file.write_text(text + "# changed\n")
    said = command("--resume", run, "--reward", f"{file}:mine")
    assert_one_clear_line(said, "mine.py:mine is not the file that", "began with (SHA-256 ")
    file.write_text(text)
    (tmp_path / "moved").mkdir()
    moved = shutil.move(file, tmp_path / "moved" / "other.py")
    said = command("--resume", run, "--reward", f"{file}:mine")
    assert_one_clear_line(said, "mine.py cannot be read")
    assert steps_of(run) == [3, 2]
    said = command("--resume", run, "--reward", f"{moved}:mine")
    assert said.code == 0 and f"the code in {moved} is run" in said.out, said.err
    assert_same_end(whole, run, steps=6)


def test_a_recipe_runs_no_code(place, mine):
    (place / "own.toml").write_text(f'[rewards]\nreward = ["{mine}"]\n')
    said = refuse(place, "--recipe", place / "own.toml", reward=None)
    assert_one_clear_line(said, f"own.toml: reward = '{mine}' is code, which no recipe runs")


# ---- kill -9

KILLED = {"between rollout and update": (9, [2, 1]), "between two minibatches": (13, [3, 2, 1])}  # call of mine, checkpoints


@pytest.mark.parametrize("name", ["between rollout and update", pytest.param([*KILLED][1], marks=pytest.mark.slow)])
def test_killed_inside_a_rollout(name, place, mine, tmp_path):
    """Four calls are those of validation before the first step, the next four of each rollout; then of validation at step 4."""
    call, saved = KILLED[name]
    changes = {"reward": mine, "reward_workers": 0, "save_every": 1, "eval_every": 4, "NAME.minibatches": 2}
    whole, run = place / "killed-whole", tmp_path / "run"
    if not whole.exists():
        assert command(*options(place, **changes), "--out", whole).code == 0
    (place / "mode").write_text(str(call))
    with process(*options(place, **changes), "--out", run) as alive:
        end = time.monotonic() + 120
        while not (place / "waiting").exists():
            assert alive.poll() is None and time.monotonic() < end, alive.communicate()
            time.sleep(0.01)
        alive.kill()
        assert alive.wait() == -signal.SIGKILL
    assert steps_of(run) == saved
    (place / "mode").unlink()
    said = command("--resume", run, "--reward", mine)
    assert said.code == 0, said.err
    assert_same_end(whole, run, steps=6)
