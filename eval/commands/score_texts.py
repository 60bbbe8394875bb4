"""Score files of hypotheses against references: bleu, chrf, rouge, meteor, bertscore, f1; compare several systems.

Files are read batch by batch; only the statistics of each example are kept.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from data.messages import format_count
from eval.commands.options import F1, Scored, holds_records
from eval.commands.scorer import Scorer
from eval.commands.texts import BATCH, HYPOTHESIS_FIELDS, REFERENCE_FIELDS, EvalError, Source, Sources

if TYPE_CHECKING:
    from torch import Tensor

    from eval.commands.texts import Batch
    from eval.report import Difference, Result


def open_sources(options: Scored) -> Sources:
    """Assign the files of a command line to systems and references."""
    hypothesis_fields = (options.hypothesis_field,) if options.hypothesis_field else HYPOTHESIS_FIELDS
    reference_fields = (options.reference_field,) if options.reference_field else REFERENCE_FIELDS
    files, systems = list(options.files), {}
    if not options.system and len(files) < 2:
        last = "; files come before --no-answer" if getattr(options, "no_answer", ()) else ""
        raise EvalError(f"expected a file of hypotheses and one or more files of references: HYP REF…{last}")
    for system in options.system or ["=" + files.pop(0)]:
        name, equals, path = system.partition("=")
        if not (equals and path) or (options.system and not name):
            raise EvalError(f"--system {system}: expected NAME=FILE")
        if name in systems:
            raise EvalError(f"--system {system}: there is a system {name!r} already")
        systems[name] = Source(path, hypothesis_fields, is_reference=False)
    if not files:
        raise EvalError("expected a file of references in addition to the systems")
    may_be_empty = isinstance(options, F1) and options.version == "2.0"  # a question without an answer
    references = [Source(path, reference_fields, is_reference=True, may_be_empty=may_be_empty) for path in files]
    return Sources(systems, references)


def score_texts(options: Scored) -> None:
    """Score all systems and print the result, with notes on standard error."""
    from tqdm import tqdm

    from eval.notes import Notes, distinct_sentences
    from eval.report import Difference, compare_systems, example_lines

    scorer, sources = options.scorer(), open_sources(options)
    names = list(sources.systems)
    statistics: dict[str, list[list[Tensor]]] = {name: [[] for _ in scorer.metrics] for name in names}
    differences: dict[str, list[Difference]] = {name: [] for name in names[1:]}
    notes = {name: Notes() for name in names}
    bar = tqdm(unit="example", desc="scoring", disable=not sys.stderr.isatty(), leave=False, delay=1)
    with bar, write_atomically(options.per_example, sources) as written:
        for batch in sources.batches(scorer.batch_size or BATCH):
            scored = {
                name: scorer.statistics(texts, batch.references, notes=notes[name]) for name, texts in batch.hypotheses.items()
            }
            for name, texts in batch.hypotheses.items():
                if not isinstance(options, F1):  # there an empty answer is an answer
                    without = sum(not any(ref and ref.strip() for ref in refs) for refs in zip(*batch.references, strict=True))
                    empty = Counter(empty=sum(not text.strip() for text in texts), texts=len(texts), without=without)
                    notes[name].add("empty", describe_empty, empty)
            for name, parts in scored.items():
                for collected, part in zip(statistics[name], parts, strict=True):
                    collected.append(part)
            for name, largest in differences.items():
                found = batch_differences(batch, scorer, scored, names[0], name, options.differ)
                largest[:] = largest_differences(largest + found, options.differ)
            if written:
                written.writelines(example_lines(scorer.metrics, scored, batch.first))
            bar.update(len(batch.references[0]))
    paths = {Path(source.path).resolve() for source in sources.references if not holds_records([source.path])}
    for source in sources.systems.values():
        if source.path != "-" and Path(source.path).resolve() in paths:
            print(f"note: {source.path} holds hypotheses and references: each text is compared with itself", file=sys.stderr)
    for note in distinct_sentences(notes):
        print(f"note: {note}", file=sys.stderr)
    joined = {name: [concatenate(parts) for parts in collected] for name, collected in statistics.items()}
    result = compare_systems(scorer.metrics, joined, samples=options.samples, seed=options.seed, test=options.test)
    print_result(options.json, result, differences if options.differ else dict.fromkeys(differences))


def describe_empty(found: Counter) -> str | None:
    """Hypotheses, or references, without any text."""
    said = []
    if found["empty"]:
        said.append(f"{found['empty']:,} of {format_count(found['texts'], 'hypothesis', 'hypotheses')} are empty")
    if found["without"]:
        said.append(f"{found['without']:,} of {format_count(found['texts'], 'example')} have an empty reference")
    return "; ".join(said) or None


@contextmanager
def write_atomically(path: Path | None, sources: Sources) -> Iterator[TextIO | None]:
    """Open a temporary file that is renamed to `path` when complete. Errors: a file that is read (EvalError)."""
    if path is None:
        yield None
        return
    if any(source.path != "-" and path.resolve() == Path(source.path).resolve() for source in sources.all):
        raise EvalError(f"--per-example {path}: that file is read, and would be lost")
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise EvalError(f"--per-example {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def print_result(as_json: bool, result: "Result", differences: "dict[str, list[Difference]]") -> None:
    from eval.report import format_result

    print(json.dumps(result.as_json(differences), ensure_ascii=False) if as_json else format_result(result, differences))


def concatenate(parts: "list[Tensor]") -> "Tensor":
    import torch

    return torch.cat(parts)


def batch_differences(
    batch: "Batch", scorer: Scorer, scored: dict[str, list["Tensor"]], first: str, name: str, most: int
) -> "list[Difference]":
    """Find the examples of a batch where a system's score differs most from the first system's."""
    from eval.report import Difference

    system_B, first_B = (scorer.metrics[0].examples(scored[system][0]) for system in (name, first))
    values, places = (system_B - first_B).abs().topk(min(most, len(system_B)))
    return [
        Difference(
            batch.first + place + 1,
            (float(first_B[place]), float(system_B[place])),
            (batch.hypotheses[first][place], batch.hypotheses[name][place]),
            [stream[place] for stream in batch.references if stream[place] is not None],
        )
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value > 0
    ]


def largest_differences(differences: "list[Difference]", most: int) -> "list[Difference]":
    return sorted(differences, key=lambda found: (-abs(found.scores[1] - found.scores[0]), found.line))[:most]
