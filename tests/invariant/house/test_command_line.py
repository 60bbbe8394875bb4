"""The commands themselves: help, a run through the real command, what it leaves, generate, --init."""

import inspect
import json
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import model.__main__
import train.__main__
import train.options
from model.config import ModelConfig
from tests.runs import (
    ROOT,
    STEPS,
    arguments,
    assert_same_end,
    command,
    further,
    last_checkpoint,
    process,
    stopped_at,
    torch_as_it_was,
    wait_for_step,
    write_corpus,
)
from train.config import TrainConfig
from train.config_toml import from_plain, read_settings
from train.evaluate import evaluate
from train.objective import Objective
from train.optimizers.schedule import cosine
from train.options import aliases, option_groups, resolve_aliases
from train.registry import load
from train.reports.log import read_metrics
from train.runs.checkpoint import checkpoints, step_of
from train.runs.errors import TrainError
from train.setup import open_data, open_network
from train.step import train_step
from train.tasks.clm import CausalTask

HEAVY = ("torch", "numpy", "sentencepiece", "safetensors", "matplotlib", "triton")
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], *sys.argv[2:]]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    "line, shown",
    [
        ("train --help", ["--resume", "--corpus", "--learning-rate", "--help-all"]),
        ("train --help-all", ["run options", "data options", "network options", "optimizer options", "speed options",
                          "report options", "--resume", "--corpus", "--preset", "--lr", "--compile", "--save-every"]),
        ("model --help", ["generate"]),
        ("model generate --help", ["--prompt", "--temperature", "--top-k", "--top-p", "--seed"]),
        ("data --help", ["prepare", "Text in, batches out."]),
        ("quant --help", ["nf4", "fp4"]),
        ("eval --help", ["bleu", "chrf", "rouge", "meteor", "bertscore", "f1", "perplexity"]),
        ("eval bleu --help", ["HYP REF", "--system", "--json", "--tokenize", "--smooth", "--lowercase"]),
        ("quant nf4 --help", ["--out", "--double", "--block-size", "--skip", "--corpus"]),
    ],
)  # fmt: skip
def test_help_imports_nothing_heavy(line, shown):
    done = subprocess.run([sys.executable, "-c", HELP, *line.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    help, _, loaded = done.stdout.partition("loaded:")
    assert not set(HEAVY) & set(loaded.split())
    for words in shown:
        assert words in help
    assert f"python -m {line.partition(' ')[0]}" in help


def test_the_real_command_writes_to_out_and_cache_alone(options, uninterrupted, tmp_path):
    """In an empty folder and home, on a terminal without UTF-8, ended by SIGTERM: then the same bytes as ever."""
    here, home, scratch, run = (tmp_path / name for name in ("here", "home", "scratch", "run"))
    here.mkdir(), home.mkdir(), scratch.mkdir()  # torch keeps a cache of its own in scratch
    environment = {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONIOENCODING": "ascii", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["MPLCONFIGDIR"] = str(tmp_path / "fonts")  # matplotlib's own list of fonts
    changes = {"cache": tmp_path / "cache", "out": run, "sample-every": 20}
    with process(*options, *arguments(changes), cwd=here, **environment) as running:
        wait_for_step(running, run, 62)
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert err == "\nSIGTERM: saving after this step; a second signal stops at once\n"  # no bar, of data or of steps
    assert "\x1b" not in out + err and "\r" not in out and "    | " in out
    assert re.search(r"stopped on SIGTERM, saved at step \d+", out) and f"python -m train --resume {run}" in out
    assert list(here.iterdir()) == list(home.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"here", "home", "scratch", "run", "cache", "fonts"}
    assert {path.name for path in run.iterdir()} == {
        *("config.toml", "metrics.jsonl", "samples.jsonl", "curves.png", "report.html", "checkpoints", "best.json", "last.json")
    }
    assert 62 <= step_of(last_checkpoint(run)) < STEPS
    assert command("--resume", run).code == 0
    assert_same_end(run, uninterrupted())


COLUMNS = {"step", "split", "loss", "tokens", "lr", "matrix_lr", "grad_norm", "tokens_per_s", "time"}


def test_metrics_hold_what_was_promised(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    train, held_out = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))
    assert [row["step"] for row in train] == [1, *range(2, STEPS + 1, 2)]
    assert [row["step"] for row in held_out] == [40, 80, 120, 160]
    assert all(set(row) == COLUMNS for row in train)
    assert all(row["matrix_lr"] == pytest.approx(5 * row["lr"]) for row in train)  # 4e-2 and 8e-3, by one schedule
    times = [row["time"] for row in rows]
    assert times == sorted(times) and abs(times[-1] - (finished / "metrics.jsonl").stat().st_mtime) < 5
    baselines = {"baseline_loss", "unigram_bits_per_byte", "bigram_bits_per_byte"}
    for row in held_out:
        assert set(row) == {"step", "split", "loss", "tokens", "perplexity", "bits_per_byte", "time"} | baselines
        assert row["perplexity"] == pytest.approx(2.718281828459045 ** row["loss"])
    tokens = [row["tokens"] for row in train]
    assert tokens == sorted(tokens) and 0.97 < tokens[-1] / (STEPS * 4 * 32) < 1  # all but the first of each document
    assert train[-1]["lr"] == pytest.approx(0, abs=1e-6) and max(row["lr"] for row in train) == 8e-3


def test_config_holds_what_was_chosen(options, tmp_path):
    run = tmp_path / "run"
    automatic = arguments({"precision": "auto", "device": "auto", "threads": 0, "steps": 1, "out": run})
    assert command(*options, *automatic, "--optimizer", "adamw").code == 0
    text = (run / "config.toml").read_text()
    assert "auto" not in text
    config = from_plain(TrainConfig, tomllib.loads(text), "config.toml")
    assert config.run.threads >= 1 and config.network.mlp_width == 128 and config.optimizer.optimizer == "adamw"
    assert config.speed.compile in ("on", "off") and config.speed.precision in ("fp32", "bf16")


def test_a_vocabulary_that_nobody_asked_for(options, tmp_path):
    """What the text can fill stands in config.toml, so that a resume finds the same shards; --init has its own."""
    at = options.index("--vocab-size")
    options = options[:at] + options[at + 2 :]
    said = stopped_at(2, *options, "--steps", 4, "--log-every", 1, "--out", tmp_path / "run")
    size = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["data"]["vocab_size"]
    assert 320 < size < 2048 and f"the text can fill {size:,} pieces" in said.out and f"tokens   {size:,} pieces" in said.out
    said = command("--resume", tmp_path / "run")
    assert said.code == 0 and "(reused)" in said.out and "can fill" not in said.out
    assert command(*further(options), "--init", tmp_path / "run", "--steps", 1, "--out", tmp_path / "other").code == 0
    assert "vocab_size" not in tomllib.loads((tmp_path / "other" / "config.toml").read_text())["data"]


def test_where_nothing_can_be_compiled_it_is_said_and_written_down(options, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\nmore lines")

    monkeypatch.setattr("train.setup.torch.compile", broken)
    said = command(*options, "--compile", "on", "--steps", 1, "--out", tmp_path / "run")
    assert said.code == 0
    assert "not compiled, because torch.compile does not work here: No working C++ compiler found\n" in said.out
    assert ", eager" in said.out and 'compile = "off"' in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize("keep", [1, 2])
def test_keep(keep, options, tmp_path):
    """The latest K, and the best, wherever it stands: here a rate that grows ruins what the first steps reached."""
    run = tmp_path / "run"
    changes = {"steps": 60, "save-every": 10, "eval-every": 20, "schedule": "linear", "warmup": 1, "lr": 3, "matrix-lr": 9}
    assert command(*options, *arguments(changes), "--keep", keep, "--out", run).code == 0
    best, last = (json.loads((run / f"{name}.json").read_text())["step"] for name in ("best", "last"))
    assert best == 20 and last == 60
    assert [step_of(folder) for folder in checkpoints(run)] == [*[60, 50][:keep], 20]


def test_init_goes_on_with_the_runs_tokenizer(options, finished, tmp_path):
    corpus, run = write_corpus(tmp_path / "corpus", seed=1), tmp_path / "run"
    changes = {"corpus": corpus, "init": finished, "steps": 20, "lr": 1e-3, "out": run}
    said = command(*further(options), *arguments(changes))
    assert said.code == 0, said.err
    tokenizers = [(last_checkpoint(folder) / "tokenizer.model").read_bytes() for folder in (run, finished)]
    assert tokenizers[0] == tokenizers[1]
    (start, first), before = read_metrics(run / "metrics.jsonl")[:2], read_metrics(finished / "metrics.jsonl")[-1]
    assert (start["step"], start["split"], first["step"]) == (0, "before", 1)
    assert max(start["loss"], first["loss"]) < before["loss"] + 0.5  # not the 5.8 of random weights
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["run"]["init"] == str(last_checkpoint(finished))  # the very checkpoint, in case that its run goes on


def generate(*options):
    return command("generate", *options, main=model.__main__.main)


def test_generate(finished):
    with_seed = ["--prompt", "the file", "--max-new-tokens", 30]
    said = generate(finished, *with_seed, "--seed", 3)
    assert said.code == 0 and said.out.startswith("the file") and len(said.out) > 20
    assert generate(finished, *with_seed, "--seed", 3).out == said.out
    assert generate(last_checkpoint(finished), *with_seed, "--seed", 3).out == said.out  # its best is its last
    assert generate(finished, *with_seed, "--seed", 3, "--no-cache").out == said.out
    assert generate(finished, *with_seed, "--seed", 4).out != said.out
    best = generate(finished, *with_seed, "--temperature", 0).out
    assert best == generate(finished, *with_seed, "--temperature", 0, "--seed", 4).out
    assert best == generate(finished, *with_seed, "--top-k", 1).out
    assert generate(finished, "--prompt", "the file", "--max-new-tokens", 0).out == "the file\n"
    assert generate(finished, "--prompt", "the file " * 40, "--max-new-tokens", 40).code == 0  # longer than the context
    assert generate(finished, "--max-new-tokens", 5).code == 0  # no prompt: a document's beginning
    hot = [*with_seed, "--temperature", 3]
    every = generate(finished, *hot, "--top-k", 0).out  # 0: no limit, as in transformers
    assert every == generate(finished, *hot, "--top-k", 320).out != generate(finished, *hot).out


@pytest.mark.parametrize(
    "given, message",
    [
        ("--temperature -1", "temperature=-1.0"),
        ("--temperature nan", "temperature=nan"),
        ("--top-k -1", "top_k=-1"),
        ("--top-p 0", "top_p=0.0"),
        ("--top-p 1.5", "top_p=1.5"),
        ("--max-new-tokens -1", "max_new_tokens=-1"),
        ("--device nonsense", "--device nonsense: not a device"),
        ("--device cuda:99", "--device cuda:99"),
        ("--prompt caf\udce9", "not valid UTF-8"),
    ],
)
def test_generate_with_a_bad_value(given, message, finished):
    said = generate(finished, *given.split(" "))
    assert said.code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err
    assert not said.out


def test_generate_from_nothing(tmp_path, halfway):
    assert "nothing does not exist" in generate(tmp_path / "nothing").err
    assert "neither a run" in generate(tmp_path).err
    (checkpoints(halfway)[-1] / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in generate(halfway).err
    for path in (tmp_path / "nothing", tmp_path, halfway):
        assert generate(path).code == 2


def test_validation_does_not_depend_on_the_batch(finished):
    config = from_plain(TrainConfig, tomllib.loads((finished / "config.toml").read_text()), "config.toml")
    checkpoint = last_checkpoint(finished)
    losses, counts = [], []
    with torch_as_it_was():
        shards = open_data(config, checkpoint, print)
        objective = Objective(open_network(config, shards, checkpoint, torch.device("cpu")).double())
        for size in (1, 3, 8):
            table = tomllib.loads((finished / "config.toml").read_text())
            table["optimizer"]["batch_size"] = size
            batches = CausalTask(from_plain(TrainConfig, table, "config.toml"), shards).validation
            assert all(batch["input_ids"].size(0) == size for batch in batches)
            nats, count = evaluate(objective, batches)["loss"]
            losses.append(nats / count)
            counts.append(count)
    assert len(set(counts)) == 1 and max(losses) - min(losses) < 1e-10
    assert losses[0] == pytest.approx(read_metrics(finished / "metrics.jsonl")[-1]["loss"], abs=1e-6)
    objective.eval()  # the mutant: a mean of means, though the last batch is short
    with torch.no_grad(), torch_as_it_was():
        means = [objective(batch).terms["loss"] for batch in batches]
    wrong = float(torch.stack([term.sum / term.count for term in means]).mean())
    assert abs(wrong - losses[0]) > 1e-4


def test_first_line_of_a_session_is_not_one_more(options, tmp_path):
    """A resume logs what the run would have logged: no line for its own first step."""
    run = tmp_path / "run"
    stopped_at(10, *options, "--steps", 20, "--log-every", 10, "--out", run)
    assert command("--resume", run).code == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 10, 20, 20]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in train.options.RECIPES.glob("*.toml")))
def test_every_recipe_is_a_run_that_could_start(recipe):
    config = train.options.read_recipe(recipe)
    if config.method is not None:  # an adapter's wants weights to stand beside
        config = replace(config, run=replace(config.run, init=Path("folder")))
    config.check()
    preset = config.network.preset or load(config.run.objective).defaults.preset
    assert config != type(config)() and (config.method is not None or ModelConfig.preset(preset))


def test_a_step_gets_its_rate_its_clip_and_its_micro_batches(options, tmp_path):
    given = []

    def watched(objective, micro_batches, optimizers, **settings):
        rates = [group["lr"] / group["base_lr"] for group in optimizers.param_groups]
        given.append((rates, len(micro_batches), {len(batch["labels"]) for batch in micro_batches}, settings["max_norm"]))
        return train_step(objective, micro_batches, optimizers, **settings)

    run, steps = tmp_path / "run", 20
    changes = {"steps": steps, "accumulate": 3, "clip": 0.25, "warmup": 0.2, "log-every": 1, "out": run}
    with patch("train.engine.train_step", watched):
        assert command(*options, *arguments(changes)).code == 0
    factors = [cosine(step, warmup=4, total=steps) for step in range(steps)]
    assert len(given) == steps
    for (rates, *_), factor in zip(given, factors, strict=True):
        assert rates == pytest.approx([factor] * len(rates))
    assert all(rest == [3, {4}, 0.25] for _, *rest in given)
    logged = [row["lr"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"]
    assert logged == pytest.approx([8e-3 * factor for factor in factors])


def test_options_have_the_names_of_other_trainers_too(options, tmp_path):
    """Every alias reads as the option itself, stands in its help, and is refused beside it."""
    others = {alias: (each, group) for group in option_groups() for each in fields(group) for alias in aliases(each)}
    known = {"--learning-rate", "--max-grad-norm", "--gradient-accumulation-steps", "--max-steps", "--num-train-epochs"}
    assert known <= set(others)
    for alias, (each, group) in others.items():
        name = f"--{each.name.replace('_', '-')}"
        assert resolve_aliases([alias, "3"]) == [name, "3"]
        assert resolve_aliases([f"--{alias[2:].replace('-', '_')}=3"]) == [f"{name}=3"]
        with pytest.raises(TrainError, match="another name"):
            resolve_aliases([name, "3", alias, "4"])
        assert f"Also {alias}." in " ".join(inspect.getsource(group).split()), alias
    run = tmp_path / "run"
    words = [*options, "--learning-rate", "0.0123", "--gradient_accumulation_steps=2", "--max-grad-norm", "0.5", "--out", run]
    assert command(*words, *arguments({"steps": 1})).code == 0
    read = read_settings(run).optimizer
    assert (read.lr, read.accumulate, read.clip) == (0.0123, 2, 0.5)


def test_names_that_are_nearly_right_and_rates_that_may_surprise(options, tmp_path):
    said = command(*options, "--lerning-rate", "1e-3")
    assert said.code == 2 and "there is no option --lerning-rate: --learning-rate is meant?" in said.err
    run = tmp_path / "run"
    said = command(*options, *arguments({"steps": 1, "optimizer": "muon", "lr": 1e-3, "out": run}))
    assert "lr 0.001 for AdamW; hidden matrices are trained by Muon, at its default matrix-lr 0.04" in said.out, said.err
