"""`python -m train --anchor …`: weights that are held near those of --init, the run's anchor file, and its resume."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.hub
import train.anchored_run
from data.packing.blocks import BlockStream
from data.tokenizer.open import load_tokenizer
from data.transforms.causal import clm_batch
from model.account import format_bytes
from tests.compare import relative
from tests.fault.test_ranks import CHANGES, losses, torchrun
from tests.runs import arguments, assert_same_end, command, further, last_checkpoint, stopped_at
from train.anchor import DrawnLabels, fisher_diagonal
from train.anchored_run import FILE, Anchoring
from train.config_toml import read_settings
from train.engine import Engine, stored_tensors
from train.losses.cross_entropy import linear_cross_entropy
from train.objective import Objective
from train.registry import load
from train.reports.log import read_metrics
from train.runs.open import resolve

STEPS = 12
SHORT = {"steps": STEPS, "save-every": 4, "eval-every": 6, "log-every": 1, "eval-tokens": 300, "warmup": 0, "context": 16}


@pytest.fixture(scope="module")
def short(options, finished):
    """short(kind, weight) → the options of a short run that goes on from `finished`, but for --out."""

    def line(kind: str, weight: float = 1.0, **changes: object) -> list[str]:
        words = further([*options, *arguments(SHORT | {"init": finished} | changes)])
        words += ["--anchor", kind, "--anchor-weight", weight]
        corpus = options[options.index("--corpus") + 1]
        return words + (["--anchor-corpus", corpus, "--anchor-rows", 6] if kind.startswith("ewc") else [])

    return line


@pytest.fixture(scope="module")
def made(short, tmp_path_factory):
    """made(kind, weight) → (the folder of a finished run, what it printed); each is trained once."""
    runs = {}

    def run(kind: str, weight: float = 1.0):
        if (kind, weight) not in runs:
            folder = tmp_path_factory.mktemp("anchored") / "run"
            said = command(*short(kind, weight), "--out", folder)
            assert said.code == 0, said.err
            runs[kind, weight] = folder, said.out
        return runs[kind, weight]

    return run


def stop(*_, **__) -> None:
    raise KeyboardInterrupt


def distance(run, start) -> float:
    """‖θ − θ*‖ of a run's last weights."""
    mine, theirs = load_file(last_checkpoint(run) / "model.safetensors"), load_file(resolve(start) / "model.safetensors")
    return sum(float((mine[name] - value).square().sum()) for name, value in theirs.items()) ** 0.5


@pytest.mark.parametrize("kind", ["l2-sp", "ewc", "ewc-empirical"])
def test_it_holds_the_weights(kind, made, finished):
    """The penalty is 0 at first, and is logged; a larger weight holds more; θ* in the file are those of --init."""
    (near, out), (far, _) = made(kind, 1e4), made(kind, 1e-9)
    assert f"anchor   {kind}, weight 10000: 28 tensors held near those of --init" in out
    assert ("; F of 6 rows of " in out and "anchor   F of 6 rows in " in out) == (kind != "l2-sp")
    logged = [row for row in read_metrics(near / "metrics.jsonl") if row["split"] == "train"]
    assert len(logged) == STEPS and logged[0]["penalty"] == 0 and all(row["penalty"] > 0 for row in logged[1:])
    assert distance(near, finished) < 0.9 * distance(far, finished)
    held, start = load_file(near / FILE), dict(model.hub.load(resolve(finished)).named_parameters())
    assert all(torch.equal(held.pop(f"start.{name}"), value) for name, value in start.items())
    fishers = [held.pop(f"fisher.{name}") for name in start if kind != "l2-sp"]
    assert not held and len(fishers) == (0 if kind == "l2-sp" else len(start))
    assert all(bool((value >= 0).all()) and value.any() for value in fishers)


@pytest.mark.parametrize("kind", ["ewc", "ewc-empirical"])
def test_fisher_is_of_the_old_texts_rows(kind, made, finished):
    """One row of the training split for each row of F, in the order of the seed, without dropout."""
    run = made(kind, 1e4)[0]
    config, network = read_settings(run), model.hub.load(resolve(finished)).train()
    assert network.config.dropout > 0
    shards = load("clm").open_data(config, load_tokenizer(resolve(run), network.config.vocab_size), lambda line: None)
    stream = BlockStream(shards.train.ids, config.network.context, 1, config.run.seed)
    loss = DrawnLabels(config.run.seed) if kind == "ewc" else linear_cross_entropy
    objective = Objective(network.eval(), loss)

    def log_likelihood(row: int):
        loss.row = row
        return objective(clm_batch(stream.batch(row), shards.tokenizer.bos_id, shards.tokenizer.eos_id)).terms["loss"][:2]

    found = fisher_diagonal(log_likelihood, dict(network.named_parameters()), range(6))
    held = load_file(run / FILE)
    assert relative({name: held[f"fisher.{name}"] for name in found}, found) < 1e-4


def test_the_kinds_differ(made):
    """And the labels' source decides F alone."""
    held = {kind: load_file(made(kind, 1e4)[0] / FILE) for kind in ("ewc", "ewc-empirical")}
    same = {name: torch.equal(value, held["ewc-empirical"][name]) for name, value in held["ewc"].items()}
    assert all(is_same == name.startswith("start.") for name, is_same in same.items())


@pytest.mark.parametrize("kind", ["l2-sp", "ewc"])
def test_stopped_and_resumed_it_ends_in_the_same_bytes(kind, short, made, tmp_path, monkeypatch):
    """F is computed once: a resume reads it."""
    run, whole = tmp_path / "run", made(kind, 1e4)[0]
    assert stopped_at(7, *short(kind, 1e4), "--out", run).code == 130
    monkeypatch.setattr(train.anchored_run, "fisher_diagonal", lambda *_, **__: pytest.fail("F was computed again"))
    said = command("--resume", run)
    assert said.code == 0, said.err
    assert_same_end(run, whole, STEPS)
    assert (run / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_resume_needs_the_file_as_it_was(short, tmp_path):
    run = tmp_path / "run"
    assert stopped_at(7, *short("l2-sp"), "--out", run).code == 130
    shutil.copy(run / FILE, tmp_path / FILE)
    held = load_file(run / FILE)
    next(iter(held.values())).add_(1)
    save_file(held, run / FILE)
    said = command("--resume", run)
    assert said.code == 2 and f"{FILE} was changed after it was written" in said.err
    (run / FILE).unlink()
    said = command("--resume", run)
    assert said.code == 2 and f"{FILE} is missing: it holds what --anchor l2-sp holds the weights near" in said.err
    shutil.move(tmp_path / FILE, run / FILE)
    assert command("--resume", run).code == 0


def test_killed_before_the_first_checkpoint_it_starts_again(short, made, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.anchored_run, "fisher_diagonal", stop)
        said = command(*short("ewc", 1e4), "--out", run)
    assert said.code == 130 and said.err.startswith("stopped at once, without saving; ")
    assert said.err.endswith(f"--resume {run} goes on from step 0, for it has no checkpoint yet\n")
    assert not (run / FILE).exists() and (run / "config.toml").exists()
    monkeypatch.setattr(train.anchored_run, "QUIET_SECONDS", 0)
    said = command("--resume", run)
    assert said.code == 0 and "anchor   F: row 5 of 6\n" in said.out
    assert_same_end(run, made("ewc", 1e4)[0], STEPS)


def test_an_old_text_that_is_not_there(short, tmp_path):
    words = short("ewc")
    words[words.index("--anchor-corpus") + 1] = tmp_path / "nothing"
    said = command(*words, "--out", tmp_path / "run")
    assert said.code == 2 and said.err.startswith(f"error: --anchor-corpus: {tmp_path / 'nothing'}: no such file or folder")
    assert not (tmp_path / "run").exists()


def test_the_dry_run_has_it_and_writes_nothing(short, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.anchored_run, "fisher_diagonal", lambda *_, **__: pytest.fail("F was computed"))
    said = command(*short("ewc"), "--dry-run")
    assert said.code == 0, said.err
    size = 4 * sum(value.numel() for value in model.hub.load(resolve(finished)).parameters())
    memory = format_bytes(2 * size)  # θ* and F; and of a step, F (θ − θ*) and the gradient
    assert f"; keeps {memory} in memory, and takes up to {memory} more within a step\n" in said.out
    assert f"anchor   {memory} stay in memory, and a step takes up to {memory} more, besides what is predicted;" in said.out
    assert "anchor   ewc, weight 1: 28 tensors held" in said.out
    assert "; before the first step, the run computes F: 6 forwards" in said.out
    monkeypatch.setattr(Anchoring, "stand_in", stop)
    said = command(*short("ewc"), "--dry-run")
    assert said.code == 130 and said.err == "stopped at once\n"  # there is no folder to go on with
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """The options of a short classifier's run, but for --init and --out."""
    table = tmp_path_factory.mktemp("texts") / "texts.csv"
    table.write_text("text,label\n" + "".join(f"the file number {n} {'reads' * (n % 2)},{n % 2}\n" for n in range(40)))
    return ["--objective", "classify", "--corpus", table, "--steps", 3, "--sample-every", 0, "--threads", 1]


def test_below_a_new_head_nothing_may_be_held_for_a_while(classify, finished, tmp_path):
    """With --unfreeze the penalty is 0 until a weight of --init learns; with --freeze none ever does."""
    words, run = [*classify, "--log-every", 1, "--init", finished, "--anchor", "l2-sp"], tmp_path / "run"
    said = command(*words, "--unfreeze", 1, "--out", run)
    assert said.code == 0, said.err
    logged = [row["penalty"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"]
    assert logged[:2] == [0, 0] and logged[2] > 0  # step 0: the head alone; at step 1 the last layer begins to move
    for part in ("all", "body"):
        said = command(*words, "--freeze", part, "--out", tmp_path / part)
        assert said.code == 2 and f"--anchor l2-sp: --freeze {part} leaves none of the weights of --init to hold" in said.err
        assert not (tmp_path / part).exists()


def test_a_new_head_is_left_out(classify, finished, tmp_path):
    """L2-SP holds the body, but for what is frozen; EWC, which must score the old text, is refused."""
    words, run, table = [*classify], tmp_path / "run", classify[classify.index("--corpus") + 1]
    said = command(*words, "--init", finished, "--freeze", "embeddings", "--anchor", "l2-sp", "--out", run)
    assert said.code == 0, said.err
    assert "held near those of --init, 1 new one left out;" in said.out
    held = load_file(run / FILE)
    assert len(held) == 26 and not any("head" in name or "embedding" in name for name in held)
    words += ["--anchor-corpus", table, "--anchor-rows", 3]
    said = command(*words, "--init", finished, "--anchor", "ewc", "--out", tmp_path / "new")
    assert said.code == 2 and "--anchor ewc: the head of --objective classify is new, and cannot score the old text" in said.err
    for kind in ("ewc", "ewc-empirical"):  # with a head that --init has; its labels are no tokens
        said = command(*words, "--init", run, "--anchor", kind, "--out", tmp_path / kind)
        assert (said.code == 0) == (kind == "ewc-empirical") == (tmp_path / kind).exists(), said.err
        assert kind != "ewc" or "--anchor ewc is for objectives that predict tokens" in said.err


def test_an_objective_with_a_loss_of_its_own_draws_no_labels(short, tmp_path, monkeypatch):
    monkeypatch.setattr(load("clm"), "objective", lambda self, networks, loss, held_out=None: Objective(networks))
    said = command(*short("ewc"), "--out", tmp_path / "run")
    assert said.code == 2 and "does not compute its loss by one call of the loss that it is given" in said.err


def test_an_objective_of_two_terms_has_no_fisher(short, tmp_path, monkeypatch):
    monkeypatch.setattr(Objective, "counts", staticmethod(lambda batch: {"loss": torch.tensor(1), "nsp": torch.tensor(1)}))
    said = command(*short("ewc-empirical"), "--out", tmp_path / "run")
    assert said.code == 2 and "has the terms loss and nsp, and F is of one: l2-sp goes with any" in said.err
    assert not (tmp_path / "run").exists()


def test_a_step_adds_every_penalty():
    """That of AdaLoRA's orthogonality and the anchor's; the loss that a step returns has neither."""
    parts = {"allocator": SimpleNamespace(penalty=lambda: torch.tensor(2.0)), "anchor": None}
    assert Engine._penalty(SimpleNamespace(**parts)) == 2
    parts["anchor"] = SimpleNamespace(penalty=lambda: torch.tensor(0.5))
    assert Engine._penalty(SimpleNamespace(**parts)) == 2.5


REFUSED = {
    "--anchor ewc --init x": "--anchor ewc needs the text that is not to be forgotten: --anchor-corpus PATH",
    "--anchor l2-sp": "--anchor l2-sp holds weights near those of --init: add --init",
    "--anchor l2-sp --init x --adapter lora": "--anchor l2-sp: --adapter lora freezes the weights of --init",
    "--anchor l2-sp --init x --qat int8": "--anchor l2-sp does not go with --qat int8",
    "--anchor l2-sp --init x --mesh shard": "--anchor l2-sp does not go with --mesh shard: replicate does",
    "--anchor l2-sp --init x --anchor-weight 0": "--anchor-weight 0.0: must be above 0",
    "--anchor ewc --init x --anchor-corpus y --anchor-rows 0": "--anchor-rows 0: must be at least 1",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_go_together_is_refused(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command(*line.split())
    assert said.code == 2 and said.err.startswith("error: ") and REFUSED[line] in said.err, said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mlm", "span", "fim", "prefix"])
def test_labels_are_drawn_for_every_objective_on_tokens(objective, options, tmp_path):
    new = [*options[options.index("--width") :], *arguments(SHORT | {"steps": 2})]
    start, run, corpus = tmp_path / "start", tmp_path / "run", options[options.index("--corpus") + 1]
    said = command("--objective", objective, *new, "--out", start)
    assert said.code == 0, said.err
    words = ["--init", start, "--anchor", "ewc", "--anchor-corpus", corpus, "--anchor-rows", 4, "--out", run]
    said = command("--objective", objective, *further(new), *words)
    assert said.code == 0, said.err
    fishers = {name: value for name, value in load_file(run / FILE).items() if name.startswith("fisher.")}
    assert fishers and all(value.any() for name, value in fishers.items() if "embedding" not in name)


@pytest.mark.slow
def test_two_ranks_hold_them_alike(short, uninterrupted, tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    words = short("ewc", 100, **CHANGES, init=uninterrupted(**CHANGES))
    assert command(*words, "--out", alone).code == 0
    with torchrun(*words, "--out", two) as running:
        _, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert losses(two) == pytest.approx(losses(alone), abs=2e-5)
    one, other = (load_file(run / FILE) for run in (alone, two))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-9)
    one, other = ([row.get("penalty", 0.0) for row in read_metrics(run / "metrics.jsonl")] for run in (alone, two))
    assert max(one) > 0 and other == pytest.approx(one, rel=1e-3, abs=1e-9)
    for name, value in stored_tensors(last_checkpoint(alone)).items():
        torch.testing.assert_close(stored_tensors(last_checkpoint(two))[name], value, rtol=1e-3, atol=1e-4)
