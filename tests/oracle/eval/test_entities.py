"""Entities in tagged sentences against seqeval, on well-formed and malformed tags."""

import random
import warnings
from importlib.metadata import version

import pytest
import torch
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.scheme import IOB2

from eval import entities as module
from eval.entities import Entities, entity_scores
from eval.score import corpus_value
from tests.compare import Error, absolute

LIBRARY = f"seqeval {version('seqeval')}"
TYPES = ("LOC", "MISC", "ORG-NAME", "PER")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI"))


def corpus(sentences: int, seed: int = 0, types=TYPES):
    """(predicted, true): any tag may follow any, runs of I- of one type and of two are frequent; empty sentences too."""
    draw = random.Random(seed)

    def next_tag(tag: str) -> str:
        if tag != "O" and draw.random() < 0.5:
            return "I" + tag[1:]
        return "O" if draw.random() < 0.3 else f"{draw.choice('BI')}-{draw.choice(types)}"

    predicted, true = [], []
    for _ in range(sentences):
        row = []
        for _ in range(draw.randint(0, 15)):
            row.append(next_tag(row[-1] if row else "O"))
        true.append(row)
        predicted.append([draw.choice(TAGS) if draw.random() < 0.15 else tag for tag in row])
    return predicted, true


def oracle(predicted, true, mode, average, zero_division=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"average": average, "zero_division": zero_division}
        if mode == "strict":
            return strict_scores(true, predicted, scheme=IOB2, **settings)
        return precision_recall_fscore_support(true, predicted, **settings)


def error(predicted, true, mode, zero_division=0) -> Error:
    """The largest, over averages and over each type; how many entities there are has to be the same."""
    errors = []
    for average in ("micro", "macro", "weighted", None):
        theirs = oracle(predicted, true, mode, average, zero_division)
        score = entity_scores(predicted, true, mode=mode, average=average or "micro", zero_division=zero_division)
        if average is None:
            ours = [[kind[name] for kind in score.types.values()] for name in ("precision", "recall", "f1")]
            assert [kind["true"] for kind in score.types.values()] == theirs[3].tolist()
        else:
            ours = [score.precision, score.recall, score.f1]
            assert score.value == score.f1 and score.true == theirs[3]
        errors.append(absolute(ours, theirs[:3]))
    return max(errors)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_equals_seqeval_on_random_tags(parity, mode):
    reason = "float64; F1 from counts, not from P and R"
    parity(f"entity F1: {mode}, 2,000 sentences", LIBRARY, error(*corpus(2000), mode), 1e-12, reason)
    worst = max(error(*corpus(4, seed), mode, seed % 2) for seed in range(40))
    parity(f"entity F1: {mode}, 40 corpora of 4 sentences", LIBRARY, worst, 1e-12, reason)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
@pytest.mark.parametrize("zero_division", [0, 1])
def test_equals_seqeval_where_something_is_missing(parity, mode, zero_division):
    cases = [
        ([["O", "O"]], [["B-PER", "I-PER"]]),
        ([["B-PER", "I-PER"]], [["O", "O"]]),
        ([["B-PER", "B-LOC"]], [["B-PER", "O"]]),
        ([["I-PER", "I-PER"]], [["B-PER", "I-PER"]]),
        ([["B-PER", "I-PER"], ["I-PER"]], [["B-PER", "I-PER"], ["B-PER"]]),
        ([["B", "I", "O", "I"]], [["B", "I", "O", "B"]]),
        ([["B-PER", "I-LOC", "I-LOC", "I-PER"]], [["B-PER", "I-LOC", "B-LOC", "I-PER"]]),
    ]
    worst = max(error(*case, mode, zero_division) for case in cases)
    parity(f"entity F1: {mode}, missing sides", LIBRARY, worst, 1e-12, "float64; F1 from counts, not from P and R")
    for average in ("micro", "macro", "weighted"):  # no entity at all: seqeval has no macro average of it
        score = entity_scores([["O"]], [["O"]], mode=mode, average=average, zero_division=zero_division)
        assert [score.precision, score.recall, score.f1, score.types] == [zero_division] * 3 + [{}]


def test_the_report_has_the_same_names():
    predicted, true = corpus(50)
    report = classification_report(true, predicted, output_dict=True)
    assert list(entity_scores(predicted, true).types) == [name for name in report if not name.endswith(" avg")] == list(TYPES)


def test_the_oracle_catches_mutants(monkeypatch):
    predicted, true = corpus(100)
    spans = module.entity_spans
    mutants = {
        "modes exchanged": lambda kind, kinds, row, *, strict: spans(kind, kinds, row, strict=None if strict else "IOB2"),
        "types may change inside": lambda kind, kinds, row, **mode: spans(kind, -(kind == 0).long(), row, **mode),
        "sentences run together": lambda kind, kinds, row, *, strict: spans(kind, kinds, row * 0, strict=strict),
        "B- goes on": lambda kind, kinds, row, *, strict: spans(kind.sign() * 2, kinds, row, strict=None),
    }
    for name, mutant in mutants.items():
        monkeypatch.setattr(module, "entity_spans", mutant)
        for mode in ("lenient", "strict"):
            try:
                caught = error(predicted, true, mode) > 1e-6
            except AssertionError:  # another number of entities
                caught = True
            assert caught, (name, mode)


def test_any_split_and_ids_are_one():
    predicted, true = corpus(300, 1)
    for mode in ("lenient", "strict"):
        for average in ("micro", "macro", "weighted"):
            metric = Entities(TAGS, mode, average)
            whole = metric.statistics(predicted, [true])
            assert whole.dtype == torch.int64 and whole.shape == (300, 1 + 3 * len(TYPES)) and (whole[:, 0] == 1).all()
            parts = [metric.statistics(predicted[cut], [true[cut]]) for cut in (slice(7), slice(7, 8), slice(8, 300))]
            assert torch.equal(torch.cat(parts), whole)
            value = entity_scores(predicted, true, mode=mode, average=average).value
            assert metric.score(whole).value == corpus_value(metric, whole.flip(0)) == value
            assert metric.scores(whole.sum(0).expand(2, 1, -1)).flatten().tolist() == [value, value]
    ids = [[[TAGS.index(tag) for tag in sentence] for sentence in side] for side in (predicted, true)]
    assert entity_scores(*ids, tags=TAGS, mode=mode).parts == entity_scores(predicted, true, mode=mode).parts
    padded = [torch.full((300, 16), fill) for fill in (3, -100)]
    for side, rows in zip(padded, ids, strict=True):
        for row, sentence in enumerate(rows):
            side[row, : len(sentence)] = torch.tensor(sentence)
    assert entity_scores(*padded, tags=TAGS, mode=mode).parts == entity_scores(predicted, true, mode=mode).parts


def test_ignored_tokens_are_taken_out_of_both_sides():
    true, predicted = [["B-PER", None, "I-PER", None]], [["B-PER", "O", "I-PER", "B-LOC"]]
    score = entity_scores(predicted, true)
    assert score.value == 1 and (score.correct, score.predicted, score.true) == (1, 1, 1)
    metric = Entities(TAGS, average="macro")
    rows_BK = metric.statistics([["O"], ["B-PER", "B-LOC"], []], [[["O"], ["B-PER", "O"], []]])
    assert metric.examples(rows_BK).tolist() == [1, 2 / 3, 1]  # alike without an entity is right
    assert entity_scores([], []).value == corpus_value(metric, metric.statistics([], [[]])) == 0


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: entity_scores([["O"]], [["O"], ["O"]]), ValueError, "1 predicted sentences, but 2 true ones"),
        (
            lambda: entity_scores([["O"], ["O"]], [["O"], ["O", "O"]]),
            ValueError,
            "sentence 1 has 1 predicted tags, but 2 true ones",
        ),
        (lambda: entity_scores([["E-PER"]], [["O"]]), ValueError, "tag 'E-PER' is not an IOB2 tag"),
        (lambda: entity_scores([["O-PER"]], [["O"]]), ValueError, "tag 'O-PER' is not an IOB2 tag"),
        (lambda: entity_scores([["BPER"]], [["O"]]), ValueError, "tag 'BPER' is not an IOB2 tag"),
        (lambda: entity_scores(["O"], [["O"]]), TypeError, "a string"),
        (lambda: entity_scores([[0]], [[0]]), TypeError, "hold ids, such as 0"),
        (lambda: entity_scores(torch.zeros(1, 2).long(), torch.zeros(1, 2).long()), TypeError, "pass their `tags`"),
        (lambda: entity_scores(torch.zeros(1, 2), torch.zeros(1, 2), tags=TAGS), TypeError, "float32"),
        (lambda: entity_scores([[0.5]], [[0]], tags=TAGS), TypeError, "float64"),
        (
            lambda: entity_scores([[0, 9]], [[0, 0]], tags=TAGS),
            ValueError,
            "predicted id 9 in sentence 0 is not one of the 9 tags",
        ),
        (
            lambda: entity_scores([[0], [0]], [[0], [-1]], tags=TAGS),
            ValueError,
            "true id -1 in sentence 1 is not one of the 9 tags",
        ),
        (lambda: entity_scores([["B-X"]], [["O"]], tags=TAGS), ValueError, "predicted tag 'B-X' is not one of O, B-LOC"),
        (lambda: entity_scores([["O"]], [["O"]], mode="loose"), ValueError, "mode='loose': one of lenient, strict"),
        (lambda: entity_scores([["O"]], [["O"]], average="samples"), ValueError, "average='samples'"),
        (lambda: Entities(("O", "O")), ValueError, "twice among O, O"),
        (lambda: Entities(TAGS).statistics([["O"]], [[["O"]], [["O"]]]), ValueError, "2 streams"),
    ],
)
def test_bad_input_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
