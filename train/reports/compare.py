"""`python -m train compare RUN RUN …`: the settings in which runs differ, their results, and their curves in one picture."""

import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from data.shell import program
from train.reports.comparability import not_comparable, objective_of
from train.reports.curves import named_scores
from train.reports.log import METRICS, format_duration, read_metrics
from train.runs.checkpoint import SETTINGS
from train.runs.errors import TrainError

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of every PNG
NEVER_EQUAL = {"run.out"}  # settings in which any two runs differ
# Scores that are shown where all runs have them.
SCORES = ("perplexity", "bits_per_byte", "masked_accuracy", "accuracy", "macro_f1", "exact_match", "ended")


@dataclass(frozen=True)
class Compare:
    """Compare runs: the settings in which they differ, their best validation, and a picture of their losses."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN …")]
    """Two or more run folders."""
    out: Path | None = None
    """The picture to write, a .png. Default: compare-A-B.png beside the run A, for the runs A and B."""


def compare_command(arguments: Sequence[str]) -> None:
    """Read the options, print the table, draw the picture. Errors (TrainError), before any of it: fewer than two runs, a
    folder that is none, or a picture that would overwrite another file."""
    few = f"compare takes two or more runs: {program('train compare')} RUN RUN … [--out FILE.png]"
    if not arguments:  # tyro's own message has many lines
        raise TrainError(few)
    options = tyro.cli(Compare, args=[*arguments], prog=program("train compare"))
    if len(options.runs) < 2:
        raise TrainError(few)
    refuse_equal(options.runs)
    settings, can_draw = [settings_of_run(run) for run in options.runs], find_spec("matplotlib") is not None
    out = picture_of(options.runs) if options.out is None else options.out
    if can_draw:
        prepare_picture(out)
    if reason := not_comparable(options.runs, settings):
        print(f"{reason}\n")
    print(comparison(options.runs))
    for line in gaps(options.runs):
        print(line)
    if not can_draw:
        print("curves   not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    try:
        draw(options.runs, out)
    except OSError as error:
        raise TrainError(f"--out {out} cannot be written ({error.strerror}): choose another --out FILE.png") from None
    print(f"curves   {out}")


def refuse_equal(runs: Sequence[Path]) -> None:
    """Refuse a run that is given twice (TrainError): it has no difference to show."""
    seen: dict[Path, Path] = {}
    for run in runs:
        if run.resolve() in seen:
            first = seen[run.resolve()]
            raise TrainError(f"{run} is given twice" if run == first else f"{first} and {run} are the same run")
        seen[run.resolve()] = run


def picture_of(runs: Sequence[Path]) -> Path:
    """The default picture: beside the first run, named after the runs, so that only the same comparison overwrites it.

    Where the name does not say which runs they are (more than two, or in several folders), a hash of their paths does.
    """
    names, places = [label.replace("/", "-") for label in labels(runs)], [run.resolve() for run in runs]
    name = "-".join(("compare", *names[:2])) + f"-and-{len(runs) - 2}-more" * (len(runs) > 2)
    if len(runs) > 2 or len({place.parent for place in places}) > 1:
        name += f"-{sha256(bytes(1).join(map(os.fsencode, places))).hexdigest()[:6]}"
    folder = runs[0].parent if runs[0].name not in ("", "..") else places[0].parent
    return folder / f"{name}.png"


def prepare_picture(out: Path) -> None:
    """Make the picture's folder. Errors (TrainError): a name or a file that is no PNG, or a place that cannot be written."""
    if out.suffix.lower() != ".png":
        raise TrainError(f"--out {out}: the picture is a PNG, so its name must end in .png")
    try:
        if out.is_dir():
            raise TrainError(f"--out {out} is a folder: name a file that ends in .png")
        if out.exists() and first_bytes(out) not in (PNG, b""):
            raise TrainError(f"--out {out} is there already, and is no PNG: choose another --out FILE.png")
        if out.parent.exists() and not out.parent.is_dir():
            raise TrainError(f"--out {out}: {out.parent} is no folder")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"--out {out} cannot be written ({error.strerror}): choose another --out FILE.png") from None
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise TrainError(f"--out {out} cannot be written (no permission): choose another --out FILE.png")


def first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(PNG))


def labels(runs: Sequence[Path]) -> list[str]:
    """The runs' folder names; with as many of their parents as make them differ.

    >>> labels([Path("/runs/one"), Path("/runs/other")]), labels([Path("/a/run"), Path("/b/run")])
    (['one', 'other'], ['a/run', 'b/run'])
    """
    parts = [Path(os.path.abspath(run)).parts for run in runs]  # "." has no name
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*each[-count:])) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def settings_of_run(run: Path) -> dict[str, object]:
    """Flatten a run's config.toml: "optimizer.lr" → value. Errors (TrainError): no run."""
    if not run.exists():
        raise TrainError(f"{run} does not exist: give a run's folder")
    if not (run / SETTINGS).is_file():
        for folder in run.resolve().parents[:2]:
            if (folder / SETTINGS).is_file():
                spelled = next((each for each in run.parents if each.resolve() == folder), folder)
                raise TrainError(f"{run} is no run, but a part of one: give the run's folder, {spelled}")
        raise TrainError(f"{run} is not a run: it has no {SETTINGS}")
    try:
        table = tomllib.loads((run / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{run} is not a run: its {SETTINGS} cannot be read ({error})") from None
    return {f"{group}.{name}": value for group, values in table.items() for name, value in values.items()}


def comparison(runs: Sequence[Path]) -> str:
    """The table: a row for each setting that differs ("–": not set), then the results of each run."""
    settings, metrics = [settings_of_run(run) for run in runs], [rows_of_run(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in NEVER_EQUAL]
    rows = [("", *labels(runs))]
    for key in keys:
        values = [each.get(key, "–") for each in settings]
        if any(value != values[0] for value in values):
            rows.append((key, *map(shown, values)))
    rows.append(("", *[""] * len(runs)))
    best = [min(of_split(each, "validation"), key=lambda row: row["loss"], default={}) for each in metrics]
    last = [next(reversed(of_split(each, "train")), {}) for each in metrics]
    rows.append(("best validation loss", *(shown(row.get("loss", "–")) for row in best)))
    rows.append(("  at step", *(shown(row.get("step", "–")) for row in best)))
    for name in (*SCORES, *named_scores([row for row in best if row])):
        if all(name in row for row in best):
            rows.append((f"  {name.replace('_', ' ')}", *(shown(row[name]) for row in best)))
    rows.append(("last training loss", *(shown(row.get("loss", "–")) for row in last)))
    rows.append(("scored labels", *(shown(row.get("tokens", "–")) for row in last)))
    rows.append(("labels a second, median", *(median_rate(each) for each in metrics)))
    rows.append(("time, first line to last", *(duration(each) for each in metrics)))
    return aligned(rows)


def rows_of_run(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that have a time and, but for skipped steps, a loss."""
    rows = [row for row in read_metrics(run / METRICS) if isinstance(row.get("time"), int | float) and "split" in row]
    return [row for row in rows if row["split"] == "skipped" or isinstance(row.get("loss"), int | float)]


def gaps(runs: Sequence[Path]) -> Iterator[str]:
    """Lines that say why a run has no numbers, and which lines of its metrics.jsonl cannot be read."""
    for run, label in zip(runs, labels(runs), strict=True):
        path, rows, settings = run / METRICS, rows_of_run(run), settings_of_run(run)
        if not path.is_file():
            yield f"missing  {label} has no {METRICS}: it ended before its first step"
            continue
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if unread := len(lines) - len(rows):
            one = f"a line in the {METRICS} of {label} cannot be read, and is left out: a kill may have cut it off"
            many = f"{unread:,} lines in the {METRICS} of {label} cannot be read, and are left out"
            yield f"damaged  {one if unread == 1 else many}"
        if not rows:
            yield f"missing  {label} has no numbers: its {METRICS} is empty" + " but for that" * bool(unread)
        elif not of_split(rows, "validation"):
            every, step = settings.get("report.eval_every"), max(row["step"] for row in rows)
            yield f"missing  {label} has no validation yet: its last line is of step {step:,}" + (
                f", and one comes every {every:,} steps" if isinstance(every, int) else ""
            )


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
    """Draw training and validation losses of all runs over the steps, one colour a run; needs matplotlib.

    Losses of different objectives do not share axes: each objective has a row of panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    objectives = [objective_of(settings_of_run(run)) for run in runs]
    kinds = list(dict.fromkeys(objectives))
    figure = Figure(figsize=(10, 4.5 * len(kinds)), layout="constrained")
    panels = dict(zip(kinds, figure.subplots(len(kinds), 2, sharey="row", squeeze=False), strict=True))
    for number, (run, label, objective) in enumerate(zip(runs, labels(runs), objectives, strict=True)):
        rows, colour, (train, held_out) = rows_of_run(run), f"C{number % 10}", panels[objective]
        for axes, split, marker in ((train, "train", ""), (held_out, "validation", "o")):
            points = [(row["step"], row["loss"]) for row in of_split(rows, split)]
            if points:
                name = label.encode(errors="surrogateescape").decode(errors="replace").replace("$", r"\$")
                axes.plot(*zip(*points, strict=True), color=colour, label=name, marker=marker, linewidth=1, markersize=3)
    for kind, pair in panels.items():
        for axes, title in zip(pair, ("training loss", "validation loss"), strict=True):
            of_kind = f" of {kind}" if len(kinds) > 1 else ""
            axes.set(title=f"{title}{of_kind}", xlabel="step", ylabel="nats per label")
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
    FigureCanvasAgg(figure).print_figure(path, dpi=110, format="png")
