"""`python -m train compare RUN RUN …`: the settings in which runs differ, their results, and their curves in one picture."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.shell import program
from train.reports.log import format_duration, read_metrics
from train.runs.checkpoint import SETTINGS
from train.runs.errors import TrainError

NEVER_EQUAL = {"run.out"}  # settings in which any two runs differ
SCORES = ("perplexity", "bits_per_byte", "masked_accuracy", "accuracy", "macro_f1", "exact_match")  # shown where all have them


@dataclass(frozen=True)
class Compare:
    """Compare runs: the settings in which they differ, their best validation, and a picture of their losses."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN …")]
    """Two or more run folders."""
    out: Path = Path("compare.png")
    """The picture to write."""


def compare_command(arguments: Sequence[str]) -> None:
    """Read the options, print the table, draw the picture. Errors (TrainError): fewer than two runs, or a folder that is
    none."""
    options = tyro.cli(Compare, args=[*arguments] or ["--help"], prog=program("train compare"))
    if len(options.runs) < 2:
        raise TrainError("compare takes two or more runs")
    print(comparison(options.runs))
    try:
        draw(options.runs, options.out)
        print(f"curves   {options.out}")
    except ImportError:
        print("curves   not drawn: matplotlib is not installed (pip install matplotlib)")


def settings_of_run(run: Path) -> dict[str, object]:
    """Flatten a run's config.toml: "optimizer.lr" → value. Errors (TrainError): no run."""
    try:
        table = tomllib.loads((run / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{run} is not a run: its {SETTINGS} cannot be read ({error})") from None
    return {f"{group}.{name}": value for group, values in table.items() for name, value in values.items()}


def comparison(runs: Sequence[Path]) -> str:
    """The table: a row for each setting that differs ("–": not set), then the results of each run."""
    settings, metrics = [settings_of_run(run) for run in runs], [read_metrics(run / "metrics.jsonl") for run in runs]
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in NEVER_EQUAL]
    rows = [("", *(run.name for run in runs))]
    for key in keys:
        values = [each.get(key, "–") for each in settings]
        if any(value != values[0] for value in values):
            rows.append((key, *map(shown, values)))
    rows.append(("", *[""] * len(runs)))
    best = [min(of_split(each, "validation"), key=lambda row: row["loss"], default={}) for each in metrics]
    last = [next(reversed(of_split(each, "train")), {}) for each in metrics]
    rows.append(("best validation loss", *(shown(row.get("loss", "–")) for row in best)))
    rows.append(("  at step", *(shown(row.get("step", "–")) for row in best)))
    for name in SCORES:
        if all(name in row for row in best):
            rows.append((f"  {name.replace('_', ' ')}", *(shown(row[name]) for row in best)))
    rows.append(("last training loss", *(shown(row.get("loss", "–")) for row in last)))
    rows.append(("scored labels", *(shown(row.get("tokens", "–")) for row in last)))
    rows.append(("labels a second, median", *(median_rate(each) for each in metrics)))
    rows.append(("time, first line to last", *(duration(each) for each in metrics)))
    return aligned(rows)


def of_split(rows: list[dict], split: str) -> list[dict]:
    return [row for row in rows if row["split"] == split]


def shown(value: object) -> str:
    """
    >>> shown(0.00123456), shown(1_000_000), shown(["a", "b"]), shown("–")
    ('0.001235', '1,000,000', 'a b', '–')
    """
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def median_rate(rows: list[dict]) -> str:
    rates = sorted(row["tokens_per_s"] for row in of_split(rows, "train"))
    return shown(round(rates[len(rates) // 2])) if rates else "–"


def duration(rows: list[dict]) -> str:
    times = [row["time"] for row in rows]
    return format_duration(max(times) - min(times)) if times else "–"


def aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("   ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def draw(runs: Sequence[Path], path: Path) -> None:
    """Draw training and validation losses of all runs over the steps, one colour a run; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    train, held_out = figure.subplots(1, 2, sharey=True)
    for number, run in enumerate(runs):
        rows, colour = read_metrics(run / "metrics.jsonl"), f"C{number % 10}"
        for axes, split, marker in ((train, "train", ""), (held_out, "validation", "o")):
            points = [(row["step"], row["loss"]) for row in of_split(rows, split)]
            if points:
                name = run.name.encode(errors="surrogateescape").decode(errors="replace").replace("$", r"\$")
                axes.plot(*zip(*points, strict=True), color=colour, label=name, marker=marker, linewidth=1, markersize=3)
    for axes, title in ((train, "training loss"), (held_out, "validation loss")):
        axes.set(title=title, xlabel="step", ylabel="nats per label")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    FigureCanvasAgg(figure).print_figure(path, dpi=110, format="png")
