"""Reports: scores with confidence intervals, systems compared with the first one, and the examples that differ most."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from eval.bootstrap import Interval, confidence_interval
from eval.choices import TESTS as TEST_NAMES
from eval.notes import Notes
from eval.score import Metric, Score
from eval.significance import TESTS, Comparison, examples_needed, reason_without_p_value

CONFIDENCE = 0.95
MAX_TEXT = 300  # characters shown of a text


class Difference(NamedTuple):
    """One example of the first system and another: scores, texts, references."""

    line: int  # from 1
    scores: tuple[float, float]
    texts: tuple[str, str]
    references: list[str]

    def as_json(self, systems: tuple[str, str]) -> dict[str, object]:
        named = {name: dict(zip(systems, pair, strict=True)) for name, pair in (("scores", self.scores), ("texts", self.texts))}
        return {"line": self.line} | named | {"references": self.references}


@dataclass(frozen=True)
class Row:
    """A score of a system and its comparison with the first system; `needed`: examples to detect such a difference."""

    system: str
    score: Score
    interval: Interval | None
    paired: Comparison | None = None
    needed: int | None = None


@dataclass(frozen=True)
class Result:
    """Rows in the order of metrics, then of systems; `unit` names the examples."""

    examples: int
    rows: list[Row]
    unit: str = "example"

    def as_json(self, differences: Mapping[str, Sequence[Difference] | None]) -> dict[str, object]:
        found: dict[str, object] = {f"{self.unit}s": self.examples, "confidence": CONFIDENCE}
        found["scores"] = [_row_as_json(row) for row in self.rows]
        if differences:
            first = self.rows[0].system
            found["differ_most"] = {
                system: [each.as_json((first, system)) for each in largest or ()] for system, largest in differences.items()
            }
        return found


def _row_as_json(row: Row) -> dict[str, object]:
    score = row.score
    found = {"system": row.system} if row.system else {}
    found |= {"score": score.name, "value": finite_or_none(score.value)} | _interval_as_json("interval", row.interval)
    found["interval_kind"] = row.interval.kind if row.interval else None
    found["parts"] = {name: finite_or_none(part) for name, part in score.parts.items()}
    if row.paired:
        near = row.paired.interval if row.paired.interval.has_width else None
        found |= {"difference": row.paired.difference} | _interval_as_json("difference_interval", near)
        found |= {"p_value": meaningful_p_value(row.paired), "no_p_value": reason_without_p_value(row.paired)}
        found |= {"test": describe_test(row.paired), "examples_needed": row.needed}
    return found | {"signature": score.signature}


def _interval_as_json(name: str, interval: Interval | None) -> dict[str, list | None]:
    return {name: None if interval is None else [finite_or_none(interval.low), finite_or_none(interval.high)]}


def meaningful_p_value(comparison: Comparison) -> float | None:
    """Return the p-value; None if too few examples differ, where sacrebleu's tests often give their smallest p."""
    return None if reason_without_p_value(comparison) else comparison.p_value


def finite_or_none(value: object) -> object:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_systems(
    metrics: Sequence[Metric], statistics: Mapping[str, Sequence[Tensor]], *, samples: int, seed: int, test: str
) -> Result:
    """Score each system's statistics, one tensor (B, K) per metric, and test each system against the first."""
    first, *_ = statistics
    rows = []
    for place, metric in enumerate(metrics):
        for system, parts in statistics.items():
            score, interval = score_with_interval(metric, parts[place], samples, seed)
            paired = needed = None
            if system != first:
                pair = metric, statistics[first][place], parts[place]
                test_function, given = TESTS[TEST_NAMES[test]], {"samples": samples} if samples else {}
                paired = test_function(*pair, seed=seed, notes=Notes(), **given)
                needed = examples_needed(*pair, level=1 - CONFIDENCE, seed=seed)
            rows.append(Row(system, score, interval, paired, needed))
    return Result(len(statistics[first][0]), rows)


def score_single(metric: Metric, statistics_BK: Tensor, *, samples: int, seed: int, unit: str) -> Result:
    """Score one system without a name."""
    return Result(len(statistics_BK), [Row("", *score_with_interval(metric, statistics_BK, samples, seed))], unit)


def score_with_interval(metric: Metric, statistics_BK: Tensor, samples: int, seed: int) -> tuple[Score, Interval | None]:
    """Score a corpus with its confidence interval, which the score and its signature include."""
    samples = samples or 1000
    interval = confidence_interval(metric, statistics_BK, samples=samples, seed=seed, confidence=CONFIDENCE)
    is_wilson = interval is not None and interval.kind == "wilson"
    signature = metric.signature(statistics_BK, **({"ci": "wilson"} if is_wilson else {"bs": samples, "seed": seed}))
    bounds = None if interval is None else (interval.low, interval.high)
    return replace(metric.score(statistics_BK), interval=bounds, signature=signature), interval


# ---- text output


def format_result(result: Result, differences: Mapping[str, Sequence[Difference] | None]) -> str:
    """Format a result; `differences` are those of all systems but the first, None if not wanted."""
    lines = []
    if differences:
        for name in dict.fromkeys(row.score.name for row in result.rows):
            lines += [*format_table([row for row in result.rows if row.score.name == name]), ""]
    else:
        for row in result.rows:
            lines += [f"{row.score.name} = {format_value(row)}", *format_parts(row.score), f"  {row.score.signature}", ""]
    count = f"{result.examples:,} {result.unit}{'s' * (result.examples != 1)}"
    lines += [f"{count}; in brackets the {CONFIDENCE:.0%} interval of a bootstrap", *interval_legend(result)]
    for system, largest in differences.items():
        if largest is not None:
            lines += ["", *format_differences(result, system, largest)]
    return "\n".join(lines)


def interval_legend(result: Result) -> Iterator[str]:
    """Explain the brackets that do not hold a bootstrap interval."""
    kinds = {row.interval.kind if row.interval else None for row in result.rows}
    kinds |= {None for row in result.rows if row.paired and not row.paired.interval.has_width}
    if "wilson" in kinds:
        yield "Wilson: Wilson's score interval of a share; where all are right, or all wrong, a bootstrap shows no variation"
    if None in kinds and result.examples == 1:
        yield f"[–]: one {result.unit} has no interval"
    elif None in kinds:
        yield f"[–]: {result.unit}s that all score, or differ, alike show a bootstrap no variation, which is not certainty"


def format_value(row: Row) -> str:
    kind = " Wilson" if row.interval and row.interval.kind == "wilson" else ""
    return f"{row.score.value:.{row.score.digits}f} {format_interval(row.interval, row.score.digits)}{kind}"


def format_interval(interval: Interval | None, digits: int, sign: str = "") -> str:
    return "[–]" if interval is None else f"[{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def format_parts(score: Score) -> Iterator[str]:
    for name, part in score.parts.items():
        digits = max(3, score.digits)
        if isinstance(part, dict):
            shown = " / ".join(f"{key}: {value:.{digits}f}" for key, value in part.items())
        else:
            shown = " / ".join(format_number(value, digits) for value in (part if isinstance(part, list | tuple) else [part]))
        yield f"  {name.replace('_', ' ')}  {shown}"


def format_number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"


def format_table(rows: Sequence[Row]) -> list[str]:
    """Format one score of all systems as a table."""
    score = rows[0].score
    digits = score.digits
    cells = [(score.name, "", "difference", "", "p", "examples needed")]
    for row in rows:
        found = [row.system, format_value(row), "", "", "", ""]
        if row.paired:
            near = row.paired.interval if row.paired.interval.has_width else None
            found[2:4] = f"{row.paired.difference:+.{digits}f}", format_interval(near, digits, "+")
            found[4:] = format_number(meaningful_p_value(row.paired), 4), format_number(row.needed, 0)
        cells.append(tuple(found))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("   ".join((first.ljust(widths[0]), *aligned)).rstrip())
    lines += [f"  {score.signature}", f"  p: {describe_test(rows[1].paired)}, against {rows[0].system}"]
    return lines + [f"  p of {row.system}: – {why}" for row in rows[1:] if (why := reason_without_p_value(row.paired))]


def describe_test(comparison: Comparison) -> str:
    name = TESTS[comparison.test].__name__.replace("_", " ")
    return f"{name}, {comparison.samples:,} samples, seed {comparison.seed}"


def format_differences(result: Result, system: str, largest: Sequence[Difference]) -> list[str]:
    first, score = result.rows[0].system, result.rows[0].score
    lines = [f"where {system} and {first} differ most, by {score.name} of single examples:"]
    for each in largest:
        before, after = (f"{value:.{score.digits}f}" for value in each.scores)
        lines += [f"  line {each.line:,}: {first} {before}, {system} {after}"]
        width = max(len(first), len(system), len("reference"))
        for name, text in ((first, each.texts[0]), (system, each.texts[1]), *(("reference", text) for text in each.references)):
            lines.append(f"    {name.ljust(width)}  {shorten(text)}")
    return lines if largest else [f"{system} and {first} score the same on every example, by {score.name}"]


def shorten(text: str) -> str:
    """Put a text on one line of at most MAX_TEXT characters."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def example_lines(metrics: Sequence[Metric], scored: Mapping[str, Sequence[Tensor]], first: int) -> Iterator[str]:
    """Yield JSON lines of a batch: the number of each example and each system's scores."""
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
