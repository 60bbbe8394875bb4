"""What a person sees, and metrics.jsonl."""

import fcntl
import io
import json
import os
import platform
import re
import struct
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

import train.reports.log
from model.config import ModelConfig
from train.config import OptimizerConfig, RunConfig, SpeedConfig, TrainConfig
from train.reports.curves import diagnose, panels, plot
from train.reports.log import Console, Metrics, format_duration, read_metrics, truncate
from train.reports.summary import comparable, training_curve


def validation(step, loss, bits=1.0, bigram=2.0):
    return {
        "step": step,
        "split": "validation",
        "loss": loss,
        "bits_per_byte": bits,
        "unigram_bits_per_byte": 3.0,
        "bigram_bits_per_byte": bigram,
    }


def rows(train_losses, validations):
    lines = [
        {"step": 10 * n, "split": "train", "loss": loss, "lr": 0.1, "grad_norm": 1.0}
        for n, loss in enumerate(train_losses, start=1)
    ]
    return sorted(lines + [validation(*each) for each in validations], key=lambda row: row["step"])


FALLING = [4 - 0.1 * n for n in range(20)]
VERDICTS = [
    ("healthy", FALLING, [(50, 3.5), (150, 3.01), (200, 3.0)], "hardly falls"),
    ("overfitting", FALLING, [(50, 3.5), (100, 3.0), (200, 3.2)], "best at step 100"),
    ("unstable", FALLING[::-1], [(50, 3.5), (100, 3.0), (200, 3.2)], "lower --lr"),
    ("underfitting", FALLING, [(50, 3.5), (150, 3.2), (200, 3.0)], "still fell 6.2 %"),
    ("underfitting", FALLING, [(50, 3.5), (150, 3.01), (200, 3.0, 2.1)], "no better than the bigram baseline"),
    ("too short to tell", FALLING, [(50, 3.5), (200, 3.0)], "validations: 2"),
    ("too short to tell", [], [(50, 3.5), (100, 3.2), (200, 3.0)], "validations: 3"),
]


def test_a_run_that_gained_nothing():
    """What it began with, and what needs no input, are baselines too."""
    lines = rows(FALLING, [(50, 3.5), (150, 3.01), (200, 3.0)])
    before = [{"step": 0, "split": "before", "loss": 3.0}, *lines]
    assert diagnose(before).verdict == "no gain" and "began with had validation loss 3.000" in diagnose(before).why
    assert diagnose([{**before[0], "loss": 3.001}, *lines]).verdict == "healthy"
    held_out = [line for line in lines if line["split"] == "validation"]
    for scores, verdict in (({"baseline_loss": 3.0}, "underfitting"), ({"baseline_loss": 3.001}, "healthy")):
        held_out[-1] |= scores
        assert diagnose(lines).verdict == verdict
    for mcc, verdict in ((0.0, "underfitting"), (0.1, "healthy")):
        held_out[-1] |= {"mcc": mcc}
        assert diagnose(lines).verdict == verdict and ("(MCC) 0.000" in diagnose(lines).why) == (mcc == 0)
    assert [line.get_xdata()[0] for line in panels(before).axes[0].lines if line.get_label() == "validation"] == [0]


@pytest.mark.parametrize("verdict, train_losses, validations, why", VERDICTS)
def test_diagnosis(verdict, train_losses, validations, why):
    diagnosis = diagnose(rows(train_losses, validations))
    assert diagnosis.verdict == verdict and why in diagnosis.why


@pytest.mark.parametrize("lines", [rows(FALLING, VERDICTS[0][2]), rows(FALLING[:1], []), []])
def test_plot_writes_a_png(lines, tmp_path):
    path = tmp_path / "curves.png"
    assert plot(lines, path, "a title") == diagnose(lines)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and list(tmp_path.iterdir()) == [path]


def test_every_point_is_drawn_as_it_was_logged(tmp_path):
    """Each line of metrics.jsonl is a mark; both rates; both losses on one axis; labels are plain numbers."""
    lines = rows(FALLING, VERDICTS[0][2])
    trained = [row for row in lines if row["split"] == "train"]
    for n, row in enumerate(trained):
        row |= {"lr": 1e-5 * n, "grad_norm": 0.3 + 0.02 * n, "matrix_lr": 5e-5 * n}
    figure = panels(lines, training="training (with dropout 0.1)")
    loss, counted, rate, norm = figure.axes
    assert [curve.get_label() for curve in loss.lines] == ["training (with dropout 0.1)", "validation"]
    for curve, key in (
        (loss.lines[0], "loss"),
        (rate.lines[0], "lr"),
        (rate.lines[1], "matrix_lr"),
        (norm.lines[0], "grad_norm"),
    ):
        assert curve.get_marker() == "."
        assert curve.get_xydata().tolist() == [[row["step"], row[key]] for row in trained]
    assert loss.lines[1].get_xydata().tolist() == [[50, 3.5], [150, 3.01], [200, 3.0]]
    assert counted.lines[0].get_xydata().tolist() == [[50, 1.0], [150, 1.0], [200, 1.0]]
    low, high = loss.get_ylim()
    assert low < min(row["loss"] for row in lines) and high > max(row["loss"] for row in lines)
    figure.savefig(tmp_path / "drawn.png")
    texts = [
        text.get_text() for axes in figure.axes for which in ("major", "minor") for text in axes.get_yticklabels(which=which)
    ]
    numbers = [text.replace("\N{MINUS SIGN}", "-") for text in texts if text]
    assert {"0.3", "0.0002", "3.50"} < set(numbers) and all(re.fullmatch(r"-?[0-9.]+", text) for text in numbers), numbers


def test_a_gradient_of_zero_is_a_point_too():
    lines = rows(FALLING, [])
    lines[3]["grad_norm"] = 0.0
    norm = panels(lines).axes[3]
    assert norm.get_yscale() == "linear" and norm.get_ylim()[0] < 0 and len(norm.lines[0].get_ydata()) == len(FALLING)


def test_the_training_loss_says_what_it_holds():
    network = ModelConfig.preset("tiny").replace(dropout=0.1)
    smoothed = TrainConfig(optimizer=OptimizerConfig(label_smoothing=0.1, z_loss=1e-4))
    assert training_curve(smoothed, network) == "training (with dropout 0.1, label smoothing 0.1, z-loss 0.0001)"
    assert training_curve(TrainConfig(), network.replace(dropout=0.0)) == "training"


def test_metrics_are_read_without_a_line_that_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    metrics = Metrics(tmp_path, 0)
    metrics.write(step=1, loss=0.1)
    metrics.write(step=2, loss=1 / 3)
    metrics.close()
    whole = path.read_text()
    for cut in range(1, 15):
        path.write_text(whole[:-cut])
        assert [row["step"] for row in read_metrics(path)] == ([1, 2] if cut == 1 else [1])
    path.write_bytes(whole.encode() + b'\xff\n[1]\n"step"\n{"loss": 1}\n')
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 0.1), (2, 1 / 3)]


def test_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4, "lo')
    truncate(path, 2)
    assert path.read_text() == "".join(lines[:3]) and list(tmp_path.iterdir()) == [path]
    before = json.dumps({"step": 0, "split": "before", "loss": 4.0}) + "\n"
    path.write_text(before + "".join(lines))
    truncate(path, 2)
    assert path.read_text() == before + "".join(lines[:3])
    truncate(path, 0)
    assert path.read_text() == "", "a run that begins again scores its first weights again"


@pytest.mark.parametrize(
    "seconds, said",
    [(None, "?"), (0, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"), (100 * 3600 + 61, "100:01:01")],
)
def test_clock(seconds, said):
    assert format_duration(seconds) == said


def test_time_left_is_reckoned_from_this_session(monkeypatch):
    """A resume at step 1000 of 2000: the thousand steps before took no time of this session."""
    now = [50.0]
    monkeypatch.setattr(train.reports.log.time, "monotonic", lambda: now[0])
    console = Console(verbose=False)
    console.begin(1000, 2000)
    assert console.seconds_left(1000) is None
    now[0] = 90.0  # 40 s of compilation say nothing about later steps
    console.advance(1001)
    assert console.seconds_left(1001) is None
    now[0] = 100.0
    assert console.seconds_left(1021) == (2000 - 1021) * 0.5
    assert console.seconds_left(2000) == 0


def through_console(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    now = [100.0]
    with monkeypatch.context() as patched:
        patched.setattr(train.reports.log.time, "monotonic", lambda: now[0])
        console = Console()
        console.begin(0, 100)
        for step in range(1, 101):
            now[0] += 1
            console.progress(step, 2.5, 1000.0)
            console.advance(step)
            if step == 50:
                console.info("validation at step 50")
        console.end()
    stream.flush()


def test_lines_alone_without_a_terminal(monkeypatch):
    stream = io.StringIO()
    through_console(stream, monkeypatch)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text and "%|" not in text
    lines = text.splitlines()
    assert "validation at step 50" in lines
    progress = [line for line in lines if line.startswith("step ")]
    assert len(progress) == 20  # one in five seconds
    assert progress[10] == "step     51/100  loss 2.500  1,000 tokens/s  0:49 left"


def read_to_the_end(terminal):
    parts = []
    with open(terminal, "rb", buffering=0) as stream, suppress(OSError):  # Linux ends a terminal's output with EIO
        while part := stream.read(1 << 16):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")


def test_a_bar_on_a_terminal(monkeypatch):
    main, side = os.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with ThreadPoolExecutor(1) as pool:  # read at once: a terminal that nobody reads holds 4 KiB, and then the bar waits
        reading = pool.submit(read_to_the_end, main)
        with open(side, "w", encoding="utf-8") as terminal, monkeypatch.context() as patched:
            through_console(terminal, patched)
        text = reading.result()
    assert "100%|" in text and "100/100" in text and "loss 2.500" in text and "1,000 tokens/s" in text
    assert "validation at step 50" in text and "step     51/100" not in text


def test_what_two_runs_must_have_in_common(monkeypatch):
    """Python, whose documentation is the default corpus, library, processor, its instructions, threads, ranks and precision."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "A processor"})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    config = TrainConfig(RunConfig(threads=3), speed=SpeedConfig(precision="bf16"))
    for world, ranks in ((1, ""), (4, ", 4 ranks")):
        run = SimpleNamespace(device=torch.device("cpu"), config=config, ranks=SimpleNamespace(world=world))
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        assert comparable(run) == f"{versions}, A processor with AVX2, 3 threads{ranks}, bf16"
