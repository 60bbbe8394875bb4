"""Continued pretraining on the standard library's code, from a run on its documentation: what is learned, what is forgotten.

Both domains are scored in bits per byte on the same held-out texts (--eval-corpus) before the first step and at each
validation. Per method:

    gain                 new domain: before − last
    forgetting           old domain: last − best earlier score (of a loss, the lowest)
    backward transfer    old domain: before − last; below 0 where learning the new domain has cost the old one

Re-warmed: the rate rises to pretraining's peak and falls to a tenth of it again; kept: it stays at pretraining's last rate, a
tenth of the peak. Replay is the share of rows from the old text. The anchors' weights and LoRA's rate are chosen over three
values each: the lowest sum of both domains' last scores, with the first seed. Each row is the mean over the seeds, after ± half
of their distance. The seed chooses the rows of text and the drawn labels; the documentation run is the same.
Source: Ibrahim et al. 2024, arXiv 2403.08763 (re-warming, replay); Lopez-Paz & Ranzato 2017, arXiv 1706.08840 (backward
transfer); Biderman et al. 2024, arXiv 2405.09673 (LoRA learns less and forgets less).
"""

import json
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.bench.timing import table
from tests.runs import command
from train.reports.log import read_metrics

OLD, NEW = "stdlib-docs", "stdlib-code"
PEAK, LAST = (8e-3, 4e-2), 0.1  # lr and matrix-lr of the documentation run, and the last rate as a fraction
SMALL = "--context 128 --threads 1 --sample-every 0 --log-every 20"
BASE = f"{SMALL} --width 96 --depth 3 --batch-size 16 --steps 300 --eval-every 300 --eval-tokens 20000 --final-lr {LAST}"
CONTINUED = f"{SMALL} --batch-size 8 --steps 120 --eval-every 30 --save-every 120 --eval-tokens 6000"
SCORED = f"--eval-corpus old={OLD} new={NEW}"
REWARMED = f"--lr {PEAK[0]} --matrix-lr {PEAK[1]} --warmup 0.05 --final-lr {LAST}"
KEPT = f"--lr {PEAK[0] * LAST:g} --matrix-lr {PEAK[1] * LAST:g} --warmup 0 --schedule constant"
OLD_ROWS = f"--anchor-corpus {OLD} --anchor-rows 128"
ANCHORS = {
    "EWC": (f"--anchor ewc {OLD_ROWS} --anchor-weight", (10, 30, 100)),
    "empirical EWC": (f"--anchor ewc-empirical {OLD_ROWS} --anchor-weight", (10, 30, 100)),
    "L2 to the start": ("--anchor l2-sp --anchor-weight", (0.01, 0.03, 0.1)),
}
LORA = (f"--warmup 0.05 --final-lr {LAST} --adapter lora --lr", (3e-3, 1e-2, 3e-2))
SEEDS = (0, 1)


class Method(NamedTuple):
    """A row: its options, and the values that its last option is tried with (none: nothing is chosen)."""

    options: str
    values: tuple[float, ...] = ()


def replay(share: float) -> str:
    """The options for a share of old text in percent."""
    if not share:
        return f"--corpus {NEW}"
    return f"--corpus code={NEW}:{1 - share / 100:g} docs={OLD}:{share / 100:g}"


def methods() -> dict[str, Method]:
    rows = {}
    for name, rates in (("re-warmed", REWARMED), ("kept", KEPT)):
        for share in (0, 1, 5, 25):
            rows[f"{f'{share} % replay' if share else 'no replay'} ({name})"] = Method(f"{replay(share)} {rates}")
        for kind, (options, values) in ANCHORS.items():
            rows[f"{kind} ({name})"] = Method(f"{replay(0)} {rates} {options}", values)
    rows["LoRA"] = Method(f"{replay(0)} {LORA[0]}", LORA[1])
    return rows


class Course(NamedTuple):
    """The scores of a run, at each validation, in bits per byte."""

    old: list[float]
    new: list[float]

    @property
    def total(self) -> float:
        """The sum that chooses among values."""
        return self.old[-1] + self.new[-1]

    @property
    def gain(self) -> float:
        return self.new[0] - self.new[-1]

    @property
    def forgetting(self) -> float:
        return self.old[-1] - min(self.old[:-1])

    @property
    def transfer(self) -> float:
        return self.old[0] - self.old[-1]


def train(home: Path, name: str, options: str) -> Path:
    """Train in this process, in `home / name`, unless that run is there; return its folder."""
    folder = home / name
    if not (folder / "last.json").exists():
        said = command(*options.split(), "--cache", home / "cache", "--out", folder)
        if said.code:
            raise SystemExit(f"{name}: {said.err}")
    return folder


def scores(folder: Path) -> Course:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] in ("before", "validation")]
    return Course(*([row[f"bits_per_byte_{name}"] for row in rows] for name in ("old", "new")))


def mean(values: list[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def bench_forgetting(rounds: int, only: str = "", base: str = "") -> None:
    """`rounds` is not used. only: rows whose names have one of these parts. base: a folder that keeps the runs, so that a
    bench which was stopped goes on."""
    home = Path(base or tempfile.mkdtemp(prefix="forgetting-"))
    began = sum(os.times()[:2])
    start = train(home, "docs", f"--corpus {OLD} {BASE}")
    print(f"the run on {OLD}: {sum(os.times()[:2]) - began:.0f} s of the processor", flush=True)
    wanted = {name: method for name, method in methods().items() if not only or any(part in name for part in only.split(","))}
    paths: dict[str, list[Course]] = {name: [] for name in wanted}
    chosen: dict[str, float] = {}
    for seed in SEEDS:
        for name, method in wanted.items():
            values = [chosen[name]] if name in chosen else list(method.values) or [None]
            found = {}
            for value in values:
                options = method.options if value is None else f"{method.options} {value:g}"
                folder = "-".join(re.findall(r"[\w.]+", f"{name} {'' if value is None else f'{value:g}'} {seed}"))
                run = train(home, folder, f"--init {start} --seed {seed} {CONTINUED} {SCORED} {options}")
                found[value] = path = scores(run)
                line = {"old": path.old, "new": path.new, "processor": round(sum(os.times()[:2]) - began)}
                print(name, value or "", seed, json.dumps(line, default=float), flush=True)
            best = min(found, key=lambda value: found[value].total)
            if best is not None:
                chosen[name] = best
            paths[name].append(found[best])
        print(f"\nafter {seed + 1} of {len(SEEDS)} seeds:\n{result(paths, chosen)}\n", flush=True)
        draw(paths, home / "forgetting.png")
    print(f"{sum(os.times()[:2]) - began:.0f} s of the processor; {home / 'forgetting.png'}")


def result(paths: dict[str, list[Course]], chosen: dict[str, float]) -> str:
    """The table."""
    lines = []
    for name, each in paths.items():
        value = f"{chosen[name]:g}" if name in chosen else ""
        columns = [[path.old[-1] for path in each], [path.new[-1] for path in each], [path.total / 2 for path in each]]
        columns += [[path.gain for path in each], [path.forgetting for path in each], [path.transfer for path in each]]
        lines.append((name, value, *map(mean, columns)))
    first = next(iter(paths.values()))[0]
    before = (first.old[0], first.new[0], (first.old[0] + first.new[0]) / 2)
    lines.insert(0, ("before", "", *(f"{score:.3f}" for score in before), "", "", ""))
    return table(("method", "chosen", "old", "new", "mean of both", "gain", "forgetting", "backward transfer"), lines)


def draw(paths: dict[str, list[Course]], file: Path) -> None:
    """Draw old against new bits per byte: one path a method, from the common start, of the first seed; the dot is its end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, kinds = figure.subplots(), list(dict.fromkeys(name.split(" (")[0] for name in paths))
    for name, each in paths.items():
        style, colour = "--" if name.endswith("(kept)") else "-", f"C{kinds.index(name.split(' (')[0])}"
        axes.plot(each[0].new, each[0].old, style, color=colour, linewidth=1, marker=".", markersize=3, label=name)
        axes.plot(each[0].new[-1], each[0].old[-1], "o", color=colour, fillstyle="none" if style == "--" else "full")
    axes.set(xlabel=f"{NEW}: bits per byte (new)", ylabel=f"{OLD}: bits per byte (old)", title="learned and forgotten")
    figure.legend(fontsize=8, loc="outside right upper")
    FigureCanvasAgg(figure).print_figure(file, dpi=110, format="png")
