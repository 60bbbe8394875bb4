"""`python -m tests.mutants`: the mutation score of a seeded sample, and the mutants that no test notices."""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.cover import Cover
from tests.mutants.draw import PACKAGES, Mutant, draw, source_files
from tests.mutants.trial import Copy, Result

ROOT = Path(__file__).resolve().parents[2]


def read_arguments(words: Sequence[str] | None = None, root: Path = ROOT) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the draw; the first mutants of a larger --count are the same")
    parser.add_argument("--count", type=at_least_one, default=60, help="mutants (default: 60)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PATH", help="folders or files, as model/ train/step.py")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="mutants at a time, each in its own tree (default: 1)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a mutant's tests (default: 300)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results, or with --list the list")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests, run none")
    options = parser.parse_args(words)
    for start in options.only:
        if not source_files(root, [start]):
            packages = ", ".join(f"{package}/" for package in PACKAGES)
            parser.error(f"--only {start}: no Python file of {packages} begins with it; name them as model/ or train/step.py")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    return options


def at_least_one(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer of at least 1")
    return int(word)


def results(root: Path, mutants: list[Mutant], *, jobs: int, limit: float) -> Iterator[Result]:
    """Try mutants, `jobs` at a time; results come in the order of the mutants."""
    cover, copies = Cover(root), SimpleQueue()
    made = [Copy(root, limit) for _ in range(jobs)]
    for copy in made:
        copies.put(copy)

    def try_in_a_free_copy(mutant: Mutant) -> Result:
        copy = copies.get()
        try:
            return copy.try_mutant(mutant, cover.tests(mutant.file))
        finally:
            copies.put(copy)

    pool = ThreadPoolExecutor(jobs)
    try:
        yield from pool.map(try_in_a_free_copy, mutants)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for copy in made:
            copy.close()
    if broken := sorted({test for copy in made for test in copy.broken}):
        print(f"\nleft out, since they fail without a mutant too: {', '.join(broken)}")


def describe(mutant: Mutant, data: bytes) -> str:
    before, after = mutant.lines(data)
    return f"{mutant.file}:{mutant.edit.line}  {mutant.edit.kind}\n  - {before}\n  + {after}"


def progress(mutant: Mutant, result: Result) -> str:
    by = f"by {result.by}" if result.status == "killed" else f"{result.passed} tests passed"
    return f"{result.status:8} {result.seconds:5.0f} s  {mutant.file}:{mutant.edit.line} {mutant.edit.kind}, {by}"


def row(mutant: Mutant, data: bytes) -> dict:
    return {"file": mutant.file, **mutant.edit._asdict(), "lines": mutant.lines(data)}


def write(out: Path | None, table: dict) -> None:
    if out:
        out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None, root: Path = ROOT) -> list[Result]:
    options = read_arguments(words, root)
    sources = {file: (root / file).read_bytes() for file in source_files(root, options.only)}
    mutants = [*islice(draw(sources, options.seed), options.count)]
    if len(mutants) < options.count:
        place = " ".join(options.only).strip() or "the project"
        print(f"{len(mutants)} mutants instead of {options.count}: {place} has no more")
    if options.list:
        cover, rows = Cover(root), []
        for mutant in mutants:
            tests = cover.tests(mutant.file)
            print(describe(mutant, sources[mutant.file]), f"  {len(tests)} files: {' '.join(tests[:3])} …", sep="\n")
            rows.append(row(mutant, sources[mutant.file]) | {"tests": tests})
        write(options.out, {"seed": options.seed, "mutants": rows})
        return []
    begun, done = time.time(), []
    for mutant, result in zip(mutants, results(root, mutants, jobs=options.jobs, limit=options.limit), strict=True):
        done.append((mutant, result))
        print(f"{len(done):3}/{len(mutants)}  {progress(mutant, result)}", flush=True)
    counts = Counter(result.status for _, result in done)
    print(f"\nmutation score {counts['killed']}/{len(done)}: {dict(counts)}, {time.time() - begun:.0f} s")
    for mutant, result in done:
        if result.status != "killed":
            print(f"\n{result.status}, {result.passed} tests passed: {describe(mutant, sources[mutant.file])}")
    rows = [row(mutant, sources[mutant.file]) | result._asdict() for mutant, result in done]
    write(options.out, {"seed": options.seed, "limit": options.limit, **counts, "mutants": rows})
    return [result for _, result in done]


if __name__ == "__main__":
    main()
