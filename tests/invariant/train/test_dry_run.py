"""`--dry-run`: what a run would be, what it would need, and not a trace of it."""

import re

from tests.fault.test_command import assert_one_clear_line
from tests.runs import command, last_checkpoint, write_corpus


def test_it_says_what_the_run_would_be_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, out, cache = write_corpus(tmp_path / "text"), tmp_path / "made" / "run", tmp_path / "cache"
    given = ["--corpus", text, "--cache", cache, "--vocab-size", 320, "--width", 32, "--depth", 2, "--heads", 2]
    given += ["--context", 32, "--batch-size", 4, "--epochs", 2, "--threads", 1, "--device", "cpu", "--eval-every", 50]
    given += ["--ema", 0.9, "--out", out]
    dry = command(*given, "--dry-run")
    assert dry.code == 0, dry.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text"], "nothing but the shards"
    real = command(*given)
    lines = {line.split()[0]: line for line in real.out.splitlines() if line}
    assert all(lines[name] in dry.out for name in ("text", "network", "machine", "run"))
    steps = int(re.search(r"steps 0 to (\d+)", lines["run"])[1])
    assert steps > 100, "--epochs were counted"
    counted = rf"^time +\S+ s a step: \d+:\d\d for {steps} steps, and \d+:\d\d for {-(-steps // 50)} validations"
    assert re.search(counted, dry.out, re.MULTILINE)
    predicted, measured = (float(n) for n in re.findall(r"at its highest +(\S+) \S+ +(\S+) ", dry.out)[0])
    assert 0.5 < predicted / measured < 2
    written = sum(path.stat().st_size for path in last_checkpoint(out).glob("*.safetensors"))
    size, unit = re.search(r"a checkpoint takes (\S+) (\S+);", dry.out).groups()
    assert abs(float(size) * {"KiB": 2**10, "MiB": 2**20}[unit] / written - 1) < 0.05
    assert f"--out {out}" in dry.out.splitlines()[-1] and "dry" not in dry.out.splitlines()[-1]


def test_it_refuses_what_the_run_would_refuse(finished, tmp_path):
    assert_one_clear_line(command("--dry-run", "--out", finished), "already holds a run")
    assert_one_clear_line(command("--dry-run", "--resume", finished), "--dry-run")
    assert_one_clear_line(command("--dry-run", "--init", tmp_path / "none"), "none")


def test_one_step_is_timed_too(finished, tmp_path):
    said = command("--init", finished, "--dry-run", "--steps", 1, "--out", tmp_path / "run", "--device", "cpu", "--threads", 1)
    assert said.code == 0 and "for 1 step, and" in said.out and "thrown away" in said.out, said.err
    assert not list(tmp_path.iterdir())
