"""The data sets by name, each as training and held-out records, and the measurements that are printed with them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from data.config import DataError
from data.corpus.dedup import fingerprint
from data.made.conversations import ABSENT, answers_of, contents, context_of, split_conversations
from data.made.cues import allowed_accuracy, correlation, histogram, measure_cues
from data.made.modules import Module, Record
from data.made.names import Names
from data.made.pairs import length_features, make_pairs
from data.made.qa import make_qa
from data.made.scores import SIZE, make_scores
from data.made.tag import make_tag, problem_of_tags
from data.made.written import WrittenSet
from data.messages import format_count

BINS = 10
MOST_CORRELATION = 0.2  # of a score with a length, and three standard errors 1 / sqrt(N): 0.04 of the variance
MOST_POSITION = 0.2  # share of the answers in a tenth of their contexts
CHECKED = {
    "tag": "IOB2 is valid, as many labels as words",
    "qa": "each answer stands in its context at its offset; the label by length or position alone:",
    "pairs": "the label by length alone (half of each text's records are yes):",
    "scores": "the score by length alone:",
    "conversations": "each reply stands in its context; whether it has the answer by length or turn alone:",
}


@dataclass
class Measured:
    """Measurements of one file, as a table shows them. `shares`: of labels; `cues`: {cue: (found, allowed)}."""

    records: int
    words: float  # a record, on average
    shares: dict[str, float]
    cues: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def found_cues(self) -> list[str]:
        return [name for name, (found, allowed) in self.cues.items() if found > allowed]


def make_set(name: str, modules: list[Module], seed: int = 0) -> dict[str, list[Record]]:
    """Return {"train": records, "validation": records} of a data set: of the modules that are not and that are held out.

    No text of the held-out records is one of the others, up to case and white space.
    """
    if name == "conversations":
        records = split_conversations(modules, seed)
        return raise_if_empty(name, records, modules)
    seen, held_out = ([module for module in modules if module.is_held_out == side] for side in (False, True))
    if name == "tag":
        names = Names(modules)
        make: Callable[..., list[Record]] = lambda *arguments: make_tag(*arguments, names=names)  # noqa: E731
    else:
        make = {"qa": make_qa, "pairs": make_pairs, "scores": make_scores}[name]
    size = {"size": SIZE // 4} if name == "scores" else {}
    validation = make(held_out, seed, frozenset(), **size)
    avoid = frozenset(fingerprint(text) for record in validation for text in texts_of(record))
    records = {"train": make(seen, seed, avoid), "validation": validation}
    return raise_if_empty(name, records, modules)


def write_set(name: str, modules: list[Module], seed: int = 0) -> WrittenSet:
    """Return the records of a data set, checked, with their measurements as a table."""
    sets = make_set(name, modules, seed)
    for records in sets.values():
        check_records(records)
    measured = {split: measure(records) for split, records in sets.items()}
    used = {split: sorted({record["module"] for record in records}) for split, records in sets.items()}
    leak = measure_leak(sets) if name == "conversations" else None
    index = {
        "modules": used,
        "shares": {split: table.shares for split, table in measured.items()},
        "leak": leak,
        "cues": {split: table.cues for split, table in measured.items()},
    }
    tables = list(measured.values())
    lines = [
        ("records", [f"{table.records:,}" for table in tables]),
        ("modules", [f"{len(names):,}" for names in used.values()]),
        ("words a record", [f"{table.words:.1f}" for table in tables]),
    ]
    labels = dict.fromkeys(label for table in tables for label in table.shares)
    lines += [(f"  {label}", [f"{table.shares.get(label, 0):.1%}" for table in tables]) for label in labels]
    shared = set(used["train"]) & set(used["validation"])
    lines.append((f"checked      {format_count(len(shared), 'module')} on both sides; {CHECKED[name]}", []))
    for cue in measured["train"].cues:
        lines.append((f"  {cue}", [f"{table.cues[cue][0]:.3f} ≤ {table.cues[cue][1]:.3f}" for table in tables]))
    if leak is not None:
        same = f"{leak[0]:,} of {leak[1]:,} held-out replies are those of a question of the same form in training"
        lines.append((f"leak         {same}", []))
    notes = [
        f"{split}: {cue} is {table.cues[cue][0]:.3f}: more than chance allows"
        for split, table in measured.items()
        for cue in table.found_cues
    ]
    return WrittenSet(sets, index, lines, notes)


def raise_if_empty(name: str, records: dict[str, list[Record]], modules: list[Module]) -> dict[str, list[Record]]:
    for split, found in records.items():
        if not found:
            raise DataError(f"{name}: no {split} records can be made of {len(modules):,} modules: take more")
    return records


def texts_of(record: Record) -> list[str]:
    if "words" in record:
        return [" ".join(record["words"])]
    if "messages" in record:
        return [context_of(record)]
    return [record["context"]] if "context" in record else [record["first"], record["second"]]


def measure(records: list[Record]) -> Measured:
    """Return the numbers of a table: records, words, shares of labels, and cues by length and position."""
    words = sum(len(text.split()) for record in records for text in texts_of(record)) / len(records)
    if "words" in records[0]:
        return Measured(len(records), words, shares(label for record in records for label in record["labels"]))
    if "messages" in records[0]:
        words = sum(len(text.split()) for record in records for text in contents(record)) / len(records)
        kinds = shares(kind for record in records for kind in record["kind"].split())
        return Measured(len(records), words, kinds, conversation_cues(records))
    if "context" in records[0]:
        return Measured(len(records), words, shares(record["id"].split(":", 1)[1] for record in records), qa_cues(records))
    if "label" in records[0]:
        labels = [record["label"] == "yes" for record in records]
        found = measure_cues(length_features(records), labels)
        allowed = allowed_accuracy(labels)
        cues = {f"accuracy by {name}": (value, allowed) for name, value in found.items()}
        return Measured(len(records), words, shares(record["label"] for record in records), cues)
    scores = [record["score"] for record in records]
    found = {name: abs(correlation(values, scores)) for name, values in length_features(records).items()}
    allowed = MOST_CORRELATION + 3 / len(scores) ** 0.5
    cues = {f"correlation with {name}": (value, allowed) for name, value in found.items()}
    bins = {f"{i / BINS:.1f}–{(i + 1) / BINS:.1f}": part for i, part in enumerate(histogram(scores, BINS))}
    return Measured(len(records), words, bins, cues)


def shares(values: Iterable[str]) -> dict[str, float]:
    counts = Counter(values)
    return {value: count / counts.total() for value, count in counts.most_common()}


def qa_cues(records: list[Record]) -> dict[str, tuple[float, float]]:
    """Return the accuracy of guessing by lengths whether there is an answer, and the share of answers that begin in the fullest
    tenth of their contexts."""
    lengths = {key: [float(len(record[key])) for record in records] for key in ("context", "question")}
    has_answer = [bool(record["answers"]["text"]) for record in records]
    allowed, found = allowed_accuracy(has_answer), measure_cues(lengths, has_answer)
    cues = {f"answered or not, by length of the {key}": (value, allowed) for key, value in found.items()}
    places = [r["answers"]["answer_start"][0] / len(r["context"]) for r in records if r["answers"]["text"]]
    cues["answers in the fullest tenth of the contexts"] = max(histogram(places, BINS)), MOST_POSITION
    return cues


def conversation_cues(records: list[Record]) -> dict[str, tuple[float, float]]:
    """Return the accuracy of guessing by lengths, or by the question's number, whether a context has the answer."""
    features: dict[str, list[float]] = {"length of the context": [], "length of the question": [], "the question's number": []}
    has_answer = []
    for record in records:
        context = len(context_of(record))
        for i, (kind, question) in enumerate(zip(record["kind"].split(), contents(record, "user"), strict=True)):
            if kind != "module":
                has_answer.append(not kind.endswith(":absent"))
                length = len(question) - (context + 2 if len(question) > context else 0)
                for values, value in zip(features.values(), (context, length, i), strict=True):
                    values.append(float(value))
    allowed = allowed_accuracy(has_answer)
    return {f"answered or not, by {name}": (value, allowed) for name, value in measure_cues(features, has_answer).items()}


def measure_leak(sets: dict[str, list[Record]]) -> tuple[int, int]:
    """Return how many held-out replies are replies to a question of the same form in training, and how many there are; of
    conversations, without the replies that say that the text does not tell."""
    known = set(answers_of(sets["train"]))
    held_out = list(answers_of(sets["validation"]))
    return sum(answer in known for answer in held_out), len(held_out)


def check_records(records: list[Record]) -> None:
    """Raise DataError for tags that are not IOB2, or an answer that is not in its context (at its offset, where it has one)."""
    for number, record in enumerate(records, 1):
        if "labels" in record:
            if len(record["words"]) != len(record["labels"]):
                raise DataError(f"record {number}: {len(record['words'])} words and {len(record['labels'])} labels")
            if problem := problem_of_tags(record["labels"]):
                raise DataError(f"record {number}: {problem}")
        if "messages" in record:
            for kind, reply in zip(record["kind"].split(), contents(record, "assistant"), strict=True):
                told = {"module": record["module"]}.get(kind, context_of(record))
                if not reply or reply not in (ABSENT if kind.endswith(":absent") else told):
                    raise DataError(f"record {number}: the reply {reply!r} to a question of kind {kind} is not in its context")
        for text, start in zip(*record.get("answers", {}).values(), strict=True):
            if record["context"][start : start + len(text)] != text:
                raise DataError(f"record {number}: the answer {text!r} is not in its context at {start}")
