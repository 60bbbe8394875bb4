"""Scores to look at: with their intervals, systems beside the first one, and the examples where they differ most."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from eval.bootstrap import Interval, confidence_interval
from eval.notes import Notes
from eval.score import Metric, Score
from eval.significance import Comparison, approximate_randomisation, examples_needed, paired_bootstrap, reason_without_p_value

CONFIDENCE = 0.95
TESTS = {"bootstrap": paired_bootstrap, "randomisation": approximate_randomisation}
NAMES = {"bs": "paired bootstrap", "ar": "approximate randomisation"}
SHOWN = 300  # characters of a text


class Difference(NamedTuple):
    """One example as the first system and another have it."""

    line: int  # from 1
    scores: tuple[float, float]
    texts: tuple[str, str]
    references: list[str]

    def as_json(self, systems: tuple[str, str]) -> dict[str, object]:
        named = {name: dict(zip(systems, pair, strict=True)) for name, pair in (("scores", self.scores), ("texts", self.texts))}
        return {"line": self.line} | named | {"references": self.references}


@dataclass(frozen=True)
class Row:
    """A score of a system, and how it compares with the first system's; `needed`: examples to see such a difference with."""

    system: str
    score: Score
    interval: Interval | None
    paired: Comparison | None = None
    needed: int | None = None


@dataclass(frozen=True)
class Result:
    """Rows in the order of metrics, then of systems; `counted` is what examples are."""

    examples: int
    rows: list[Row]
    counted: str = "example"

    def as_json(self, differences: Mapping[str, Sequence[Difference] | None]) -> dict[str, object]:
        found: dict[str, object] = {f"{self.counted}s": self.examples, "confidence": CONFIDENCE}
        found["scores"] = [_row_as_json(row) for row in self.rows]
        if differences:
            first = self.rows[0].system
            found["differ_most"] = {
                system: [each.as_json((first, system)) for each in kept or ()] for system, kept in differences.items()
            }
        return found


def _row_as_json(row: Row) -> dict[str, object]:
    score = row.score
    found = {"system": row.system} if row.system else {}
    found |= {"score": score.name, "value": finite(score.value)} | ends("interval", row.interval)
    found["interval_kind"] = row.interval.kind if row.interval else None
    found["parts"] = {name: finite(part) for name, part in score.parts.items()}
    if row.paired:
        near = row.paired.interval
        found |= {"difference": row.paired.difference} | ends("difference_interval", near if near.has_width else None)
        found |= {"p_value": p_value(row.paired), "no_p_value": reason_without_p_value(row.paired), "test": tested(row.paired)}
        found["examples_needed"] = row.needed
    return found | {"signature": score.signature}


def ends(name: str, interval: Interval | None) -> dict[str, list | None]:
    return {name: None if interval is None else [finite(interval.low), finite(interval.high)]}


def p_value(comparison: Comparison) -> float | None:
    """None where too few examples differ for a p: sacrebleu's tests often give their smallest there."""
    return None if reason_without_p_value(comparison) else comparison.p_value


def finite(value: object) -> object:
    """JSON has no infinity, and no number that is none: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compared(
    metrics: Sequence[Metric], statistics: Mapping[str, Sequence[Tensor]], *, samples: int, seed: int, test: str
) -> Result:
    """The scores of each system's statistics, one tensor (B, K) for each metric; tests are against the first system."""
    first, *_ = statistics
    rows = []
    for place, metric in enumerate(metrics):
        for system, parts in statistics.items():
            score, interval = with_interval(metric, parts[place], samples, seed)
            paired = needed = None
            if system != first:
                pair = metric, statistics[first][place], parts[place]
                paired = TESTS[test](*pair, seed=seed, notes=Notes(), **({"samples": samples} if samples else {}))
                needed = examples_needed(*pair, level=1 - CONFIDENCE, seed=seed)
            rows.append(Row(system, score, interval, paired, needed))
    return Result(len(statistics[first][0]), rows)


def alone(metric: Metric, statistics_BK: Tensor, *, samples: int, seed: int, counted: str) -> Result:
    return Result(len(statistics_BK), [Row("", *with_interval(metric, statistics_BK, samples, seed))], counted)


def with_interval(metric: Metric, statistics_BK: Tensor, samples: int, seed: int) -> tuple[Score, Interval | None]:
    samples = samples or 1000
    interval = confidence_interval(metric, statistics_BK, samples=samples, seed=seed, confidence=CONFIDENCE)
    is_wilson = interval is not None and interval.kind == "wilson"
    signature = metric.signature(statistics_BK, **({"ci": "wilson"} if is_wilson else {"bs": samples, "seed": seed}))
    ends = None if interval is None else (interval.low, interval.high)
    return replace(metric.score(statistics_BK), interval=ends, signature=signature), interval


# ---- for people


def printed(result: Result, differences: Mapping[str, Sequence[Difference] | None]) -> str:
    """`differences` of all systems but the first; None: not asked for."""
    lines = []
    if differences:
        for name in dict.fromkeys(row.score.name for row in result.rows):
            lines += [*table([row for row in result.rows if row.score.name == name]), ""]
    else:
        for row in result.rows:
            lines += [f"{row.score.name} = {amount(row)}", *parts_of(row.score), f"  {row.score.signature}", ""]
    count = f"{result.examples:,} {result.counted}{'s' * (result.examples != 1)}"
    lines += [f"{count}; in brackets the {CONFIDENCE:.0%} interval of a bootstrap", *intervals(result)]
    for system, kept in differences.items():
        if kept is not None:
            lines += ["", *differ(result, system, kept)]
    return "\n".join(lines)


def intervals(result: Result) -> Iterator[str]:
    """What brackets hold that are not a bootstrap's."""
    kinds = {row.interval.kind if row.interval else None for row in result.rows}
    kinds |= {None for row in result.rows if row.paired and not row.paired.interval.has_width}
    if "wilson" in kinds:
        yield "Wilson: Wilson's score interval of a share; where all are right, or all wrong, a bootstrap shows no variation"
    if None in kinds and result.examples == 1:
        yield f"[–]: one {result.counted} has no interval"
    elif None in kinds:
        yield f"[–]: {result.counted}s that all score, or differ, alike show a bootstrap no variation, which is not certainty"


def amount(row: Row) -> str:
    kind = " Wilson" if row.interval and row.interval.kind == "wilson" else ""
    return f"{row.score.value:.{row.score.digits}f} {bracketed(row.interval, row.score.digits)}{kind}"


def bracketed(interval: Interval | None, digits: int, sign: str = "") -> str:
    return "[–]" if interval is None else f"[{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def parts_of(score: Score) -> Iterator[str]:
    for name, part in score.parts.items():
        digits = max(3, score.digits)
        if isinstance(part, dict):
            shown = " / ".join(f"{key}: {value:.{digits}f}" for key, value in part.items())
        else:
            shown = " / ".join(figure(value, digits) for value in (part if isinstance(part, list | tuple) else [part]))
        yield f"  {name.replace('_', ' ')}  {shown}"


def figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"


def table(rows: Sequence[Row]) -> list[str]:
    """One score of all systems."""
    score = rows[0].score
    digits = score.digits
    cells = [(score.name, "", "difference", "", "p", "examples needed")]
    for row in rows:
        found = [row.system, amount(row), "", "", "", ""]
        if row.paired:
            near = row.paired.interval
            found[2:4] = f"{row.paired.difference:+.{digits}f}", bracketed(near if near.has_width else None, digits, "+")
            found[4:] = figure(p_value(row.paired), 4), figure(row.needed, 0)
        cells.append(tuple(found))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("   ".join((first.ljust(widths[0]), *aligned)).rstrip())
    lines += [f"  {score.signature}", f"  p: {tested(rows[1].paired)}, against {rows[0].system}"]
    return lines + [f"  p of {row.system}: – {why}" for row in rows[1:] if (why := reason_without_p_value(row.paired))]


def tested(comparison: Comparison) -> str:
    return f"{NAMES[comparison.test]}, {comparison.samples:,} samples, seed {comparison.seed}"


def differ(result: Result, system: str, kept: Sequence[Difference]) -> list[str]:
    first, score = result.rows[0].system, result.rows[0].score
    lines = [f"where {system} and {first} differ most, by {score.name} of single examples:"]
    for each in kept:
        before, after = (f"{value:.{score.digits}f}" for value in each.scores)
        lines += [f"  line {each.line:,}: {first} {before}, {system} {after}"]
        width = max(len(first), len(system), len("reference"))
        for name, text in ((first, each.texts[0]), (system, each.texts[1]), *(("reference", text) for text in each.references)):
            lines.append(f"    {name.ljust(width)}  {shortened(text)}")
    return lines if kept else [f"{system} and {first} score the same on every example, by {score.name}"]


def shortened(text: str) -> str:
    """On one line, and not endless."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def per_example(metrics: Sequence[Metric], scored: Mapping[str, Sequence[Tensor]], first: int) -> Iterator[str]:
    """JSON lines of a batch: the example's number, and each system's scores."""
    columns = {
        (system, metric.name): metric.examples(part).tolist()
        for system, parts in scored.items()
        for metric, part in zip(metrics, parts, strict=True)
    }
    for place in range(len(next(iter(columns.values())))):
        found: dict[str, object] = {"line": first + place + 1}
        for (system, name), values in columns.items():
            into = found.setdefault(system, {}) if system else found
            into[name] = values[place]
        yield json.dumps(found, ensure_ascii=False) + "\n"
