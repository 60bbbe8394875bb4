"""`python -m eval SCORE HYP REF…`: a score with its 95 % interval and all its settings; of several systems, which is better.

Files are read a batch at a time; of each example only the statistics stay, whole numbers as a rule.
"""

import itertools
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import tyro

import touchstone

touchstone.refuse_shadowed()  # before a file of the user's is imported in place of ours

from data.messages import format_count
from data.shell import program
from eval.commands import options as asked
from eval.commands.texts import BATCH, HYPOTHESIS_FIELDS, REFERENCE_FIELDS, EvalError, Source, Sources
from train.command_line import refuse_idle, refuse_unreadable, run_command

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from data.tokenizer.base import Tokenizer
    from eval.commands.scoring import Document
    from eval.commands.texts import Batch
    from eval.notes import Notes
    from eval.report import Difference, Result
    from eval.score import Metric

LEAST = 40  # samples
Texts = Sequence[str]


class Scorer(NamedTuple):
    """Metrics that share the work on a batch; by the first one, examples are said to differ."""

    metrics: list["Metric"]
    statistics: Callable[..., list["Tensor"]]  # (hypotheses, streams of references, notes=…)
    batch: int | None = None  # examples at once, where it matters


# ---- one scorer for each command


def settings(options: asked.Scored) -> dict[str, object]:
    """The options of one score alone, without those that all have."""
    common = {option.name for option in fields(asked.Scored)}
    return {name: value for name, value in asdict(options).items() if name not in common}


def scorer_of(metric: "Metric", batch: int | None = None) -> Scorer:
    """The scorer of one metric."""
    return Scorer([metric], lambda *texts, notes: [metric.statistics(*texts, notes=notes)], batch)


def bleu(options: asked.Bleu) -> Scorer:
    from eval.bleu import Bleu

    metric = Bleu(**settings(options))
    return scorer_of(metric)


def chrf(options: asked.Chrf) -> Scorer:
    from eval.chrf import Chrf

    metric = Chrf(**settings(options))
    return scorer_of(metric)


def rouge(options: asked.Rouge) -> Scorer:
    from eval.rouge import KINDS, Rouge, rouge_statistics

    wrong = [kind for kind in options.kinds if kind not in KINDS]
    if wrong or not options.kinds:
        raise EvalError(f"--kinds {shlex.join(wrong)}: kinds are {', '.join(KINDS)}; files stand before --kinds")
    metrics = [Rouge(kind, stemmer=options.stemmer, tokenize=options.tokenize) for kind in options.kinds]

    def broken(texts: Sequence[str | None]) -> list[str | None]:
        there = options.line_break
        return [text if text is None or not there else text.replace(there, "\n") for text in texts]

    def statistics(hypotheses: Texts, references: Sequence[Sequence[str | None]], *, notes: "Notes") -> list["Tensor"]:
        return rouge_statistics(metrics, broken(hypotheses), [broken(stream) for stream in references], notes=notes)

    return Scorer(metrics, statistics)


def meteor(options: asked.Meteor) -> Scorer:
    from eval.meteor import Meteor
    from eval.wordnet import WordNet

    wordnet = None if options.wordnet is None else WordNet(options.wordnet)
    metric = Meteor(**settings(options) | {"wordnet": wordnet})
    return scorer_of(metric)


def bertscore(options: asked.BertScore) -> Scorer:
    from eval.bertscore import BertScore
    from eval.commands.scoring import open_folder

    opened = open_folder(options.model, device=options.device, threads=options.threads)
    given = {"layer": options.layer, "idf": options.idf, "baseline": options.baseline, "progress": sys.stderr.isatty()}
    name = "/".join(options.model.resolve().parts[-2:])  # the last part alone is often "model"
    metric = BertScore(opened.network, opened.tokenizer, model=name, **given)
    # Which token is rare, all references tell together.
    batch = sys.maxsize if options.idf else None
    return scorer_of(metric, batch)


def f1(options: asked.F1) -> Scorer:
    from eval.answers import Answers, answers_statistics

    metrics = [Answers("f1", **settings(options)), Answers("exact", **settings(options))]
    return Scorer(metrics, lambda *texts, notes: answers_statistics(metrics, *texts, notes=notes))


SCORERS: dict[type, Callable[..., Scorer]] = {
    asked.Bleu: bleu,
    asked.Chrf: chrf,
    asked.Rouge: rouge,
    asked.Meteor: meteor,
    asked.BertScore: bertscore,
    asked.F1: f1,
}


# ---- texts


def sources(options: asked.Scored) -> Sources:
    hypothesis_fields = (options.hypothesis_field,) if options.hypothesis_field else HYPOTHESIS_FIELDS
    reference_fields = (options.reference_field,) if options.reference_field else REFERENCE_FIELDS
    files, systems = list(options.files), {}
    if not options.system and len(files) < 2:
        last = "; files stand before --no-answer" if getattr(options, "no_answer", ()) else ""
        raise EvalError(f"a file of hypotheses and one or more of references are wanted: HYP REF…{last}")
    for system in options.system or ["=" + files.pop(0)]:
        name, equals, path = system.partition("=")
        if not (equals and path) or (options.system and not name):
            raise EvalError(f"--system {system}: NAME=FILE is wanted")
        if name in systems:
            raise EvalError(f"--system {system}: there is a system {name!r} already")
        systems[name] = Source(path, hypothesis_fields, several=False)
    if not files:
        raise EvalError("a file of references is wanted beside the systems")
    empty = isinstance(options, asked.F1) and options.version == "2.0"  # a question without an answer
    return Sources(systems, [Source(path, reference_fields, several=True, empty=empty) for path in files])


def score_texts(options: asked.Scored) -> None:
    from tqdm import tqdm

    from eval.notes import Notes, distinct_sentences
    from eval.report import Difference, compared, per_example

    scorer, found = SCORERS[type(options)](options), sources(options)
    names = list(found.systems)
    statistics: dict[str, list[list[Tensor]]] = {name: [[] for _ in scorer.metrics] for name in names}
    differences: dict[str, list[Difference]] = {name: [] for name in names[1:]}
    notes = {name: Notes() for name in names}
    bar = tqdm(unit="example", desc="scoring", disable=not sys.stderr.isatty(), leave=False, delay=1)
    with bar, whole_or_not_there(options.per_example, found) as written:
        for batch in found.batches(scorer.batch or BATCH):
            scored = {
                name: scorer.statistics(texts, batch.references, notes=notes[name]) for name, texts in batch.hypotheses.items()
            }
            for name, texts in batch.hypotheses.items():
                if not isinstance(options, asked.F1):  # there an empty answer is one
                    empty = Counter(empty=sum(not text.strip() for text in texts), texts=len(texts))
                    notes[name].add("empty", describe_empty, empty)
            for name, parts in scored.items():
                for kept, part in zip(statistics[name], parts, strict=True):
                    kept.append(part)
            for name, kept in differences.items():
                kept[:] = furthest(kept + changed(batch, scorer, scored, names[0], name, options.differ), options.differ)
            if written:
                written.writelines(per_example(scorer.metrics, scored, batch.first))
            bar.update(len(batch.references[0]))
    for note in distinct_sentences(notes):
        print(f"note: {note}", file=sys.stderr)
    whole = {name: [joined(parts) for parts in kept] for name, kept in statistics.items()}
    result = compared(scorer.metrics, whole, samples=options.samples, seed=options.seed, test=options.test)
    show(options.json, result, differences if options.differ else dict.fromkeys(differences))


def describe_empty(found: Counter) -> str | None:
    if not found["empty"]:
        return None
    return f"{found['empty']:,} of {format_count(found['texts'], 'hypothesis', 'hypotheses')} are empty"


@contextmanager
def whole_or_not_there(path: Path | None, read: Sources) -> Iterator[TextIO | None]:
    """A file that takes its name when all is written; it may not be one of those that are read."""
    if path is None:
        yield None
        return
    if any(source.path != "-" and path.resolve() == Path(source.path).resolve() for source in read.all):
        raise EvalError(f"--per-example {path}: that file is read, and would be lost")
    making = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with making.open("w", encoding="utf-8", errors="replace") as file:
            yield file
        making.replace(path)
    except OSError as error:
        raise EvalError(f"--per-example {path}: {error.strerror}") from error
    finally:
        making.unlink(missing_ok=True)


def show(as_json: bool, result: "Result", differences: "dict[str, list[Difference]]") -> None:
    from eval.report import printed

    print(json.dumps(result.as_json(differences), ensure_ascii=False) if as_json else printed(result, differences))


def joined(parts: "list[Tensor]") -> "Tensor":
    import torch

    return torch.cat(parts)


def changed(
    batch: "Batch", scorer: Scorer, scored: dict[str, list["Tensor"]], first: str, name: str, most: int
) -> "list[Difference]":
    """The examples of a batch where a system's score differs most from the first system's."""
    from eval.report import Difference

    here, there = (scorer.metrics[0].examples(scored[system][0]) for system in (name, first))
    values, places = (here - there).abs().topk(min(most, len(here)))
    return [
        Difference(
            batch.first + place + 1,
            (float(there[place]), float(here[place])),
            (batch.hypotheses[first][place], batch.hypotheses[name][place]),
            [stream[place] for stream in batch.references if stream[place] is not None],
        )
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value > 0
    ]


def furthest(differences: "list[Difference]", most: int) -> "list[Difference]":
    return sorted(differences, key=lambda found: (-abs(found.scores[1] - found.scores[0]), found.line))[:most]


# ---- a language model


def score_model(options: asked.Perplexity) -> None:
    from eval.commands.scoring import Met, documents, held_out, language_model, open_folder
    from eval.perplexity import Perplexity, PseudoPerplexity
    from eval.report import alone

    opened = open_folder(options.model, device=options.device, threads=options.threads)
    masked, held, has = language_model(opened) == "mlm", not options.corpus, opened.network.config.context
    met = Met()
    if held:
        what, found = held_out(opened)
    else:
        what = " ".join(options.corpus)
        found = documents(opened, options.corpus, options.text_key, options.on_bad_text, met=met)
    context = options.context or has
    if not 2 <= context <= has:
        raise EvalError(f"--context {options.context}: from 2 to the network's {has:,}")
    tokenizer = opened.tokenizer
    bos_id, eos_id = ends(options, tokenizer, held_out=held)
    settings = {"bos_id": bos_id, "eos_id": eos_id, "top_k": options.top_k, "bins": options.bins}
    settings["dtype"] = str(next(opened.network.parameters()).dtype).removeprefix("torch.")
    if masked:
        if options.stride is not None:
            raise EvalError("--stride is of causal models: of a masked one each token sees all of its document")
        if options.bos == "every-window":
            raise EvalError("--bos every-window is of causal models: a masked one has no windows")
        metric = PseudoPerplexity(mask_id=tokenizer.mask_id, **settings)
        room = context - (bos_id is not None) - (eos_id is not None)
        found = (part for whole in found for part in pieces(whole, room, tokenizer.byte_lengths))
    else:
        bos_at = "every-window" if options.bos == "every-window" else "document"
        metric = Perplexity(context=context, stride=options.stride, bos_at=bos_at, **settings)
    statistics_BK = metric.statistics(opened.network, **columns(found, options.tokens), **reading(options))
    for line in met.notes(tokenizer):
        print(f"note: {line}", file=sys.stderr)
    unit = "document" if len(statistics_BK) == statistics_BK[:, 6].sum() else "window"
    result = alone(metric, statistics_BK, samples=options.samples, seed=options.seed, counted=unit)
    if not options.json:
        print(f"{options.model} on {what}")
    show(options.json, result, {})


def ends(options: asked.Perplexity, tokenizer: "Tokenizer", *, held_out: bool) -> tuple[int | None, int | None]:
    """The tokens before and behind a document: `auto` takes those of the folder's tokenizer, and for a run's held-out text
    those of its training."""
    for name, side in zip(("bos", "eos"), tokenizer.affixes, strict=True):
        if len(side) > 1 and getattr(options, name) == "auto" and not held_out:
            names = " ".join(map(tokenizer.token_name, side))
            raise EvalError(f"--{name} auto: this tokenizer puts {names} there, and one token is scored with: say yes or no")
    begins, finishes = (held_out or bool(side) for side in tokenizer.affixes)
    begins = begins if options.bos == "auto" else options.bos != "no"
    finishes = finishes if options.eos == "auto" else options.eos == "yes"
    for name, wanted, there in (("bos", begins, tokenizer.bos_id), ("eos", finishes, tokenizer.eos_id)):
        if wanted and there is None:
            raise EvalError(f"--{name} {getattr(options, name)}: the tokenizer has no such token")
    return tokenizer.bos_id if begins else None, tokenizer.eos_id if finishes else None


def reading(options: asked.Perplexity) -> dict[str, object]:
    return {"batch_size": options.batch_size, "device": options.device, "progress": sys.stderr.isatty()}


def pieces(whole: "Document", longest: int, piece_bytes: "ndarray") -> "Iterator[Document]":
    """Of a document that may be too long to be read at once. Its bytes are shared out; characters and words are not known."""
    from data.sizes import split_in_proportion

    parts = [whole.ids[start : start + longest] for start in range(0, len(whole.ids), longest)]
    for ids, size in zip(parts, split_in_proportion(whole.bytes, [int(piece_bytes[ids].sum()) for ids in parts]), strict=True):
        yield whole._replace(ids=ids, bytes=size, characters=0, words=0)


def columns(found: "Iterator[Document]", tokens: int | None) -> "dict[str, Iterator]":
    """Ids, and the sizes of their texts, side by side; no document is held longer than it is scored."""
    read = itertools.tee(until(found, tokens), 4)
    names = {"documents": "ids", "bytes": "bytes", "characters": "characters", "words": "words"}
    return {name: map(attrgetter(kept), rows) for (name, kept), rows in zip(names.items(), read, strict=True)}


def until(found: "Iterator[Document]", tokens: int | None) -> "Iterator[Document]":
    read = 0
    for each in found:
        yield each
        read += len(each.ids)
        if tokens is not None and read >= tokens:
            return


def main(arguments: list[str]) -> int:
    def act() -> None:
        refuse_unreadable(arguments, EvalError)
        options = tyro.extras.subcommand_cli_from_dict(asked.KINDS, args=arguments or ["--help"], prog=program("eval"))
        check_values(options)
        refuse_idle(options, options.NEEDS, arguments, EvalError)
        (score_model if isinstance(options, asked.Perplexity) else score_texts)(options)

    return run_command(act, failures)


def failures() -> tuple[type[Exception], ...]:
    """With what is wrong with a model folder only where one was opened: scores of texts open none."""
    if "model.hub" not in sys.modules:
        return EvalError, ValueError, OSError
    from safetensors import SafetensorError

    from train.runs.errors import CheckpointError

    return EvalError, ValueError, OSError, SafetensorError, CheckpointError


def check_values(options: asked.Scored | asked.Perplexity) -> None:
    for name, least in {"samples": 0, "seed": 0, "differ": 0, "threads": 0, "batch_size": 1, "tokens": 1}.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise EvalError(f"--{name.replace('_', '-')} {value}: from {least}")
    if 0 < options.samples < LEAST:
        raise EvalError(f"--samples {options.samples}: from {LEAST}, for a 95 % interval leaves out one in {LEAST} at each end")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without UTF-8, and for files' names that are none
    sys.exit(main(sys.argv[1:]))
