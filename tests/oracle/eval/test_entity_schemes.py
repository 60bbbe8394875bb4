"""Entities in IOBES and BILOU tags against seqeval, on tags that fit together and on tags that do not."""

import random
import warnings

import pytest
import torch
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.scheme import BILOU, IOBES

from eval.entities import SCHEMES, Entities, entity_scores, entity_spans
from tests.compare import Error, absolute
from tests.oracle.eval.test_entities import LIBRARY, TYPES

THEIRS = {"IOBES": IOBES, "BILOU": BILOU}
AS_IOBES = str.maketrans("LU", "ES")


def written(sentence: list[tuple[int, str]], letters: str) -> list[str]:
    """Tags of (length, type); "O" as a type is outside."""
    tags = []
    for length, kind in sentence:
        if kind == "O":
            tags += ["O"] * length
        else:
            inside = [f"{letters[2]}-{kind}"] * (length - 2)
            tags += [f"{letters[4]}-{kind}"] if length == 1 else [f"B-{kind}", *inside, f"{letters[3]}-{kind}"]
    return tags


def corpus(scheme: str, sentences: int, noise: float, seed: int = 0) -> tuple[list[list[str]], list[list[str]]]:
    """(predicted, true): both well written, but for `noise` of the tags, which are any."""
    draw, letters = random.Random(seed), SCHEMES[scheme]
    tags = ["O", *(f"{letter}-{kind}" for letter in letters[1:] for kind in TYPES)]
    true = [written([(draw.randint(1, 4), draw.choice(("O", *TYPES))) for _ in range(4)], letters) for _ in range(sentences)]

    def spoilt(share: float) -> list[list[str]]:
        return [[draw.choice(tags) if draw.random() < share else tag for tag in row] for row in true]

    return spoilt(noise), spoilt(noise / 4)


def theirs(predicted, true, scheme: str, mode: str, average: str | None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mode == "strict":
            return strict_scores(true, predicted, scheme=THEIRS[scheme], average=average)
        sides = ([[tag[0].translate(AS_IOBES) + tag[1:] for tag in row] for row in side] for side in (true, predicted))
        return precision_recall_fscore_support(*sides, average=average)


def error(predicted, true, scheme: str, mode: str) -> Error:
    errors = []
    for average in ("micro", "macro", "weighted"):
        score = entity_scores(predicted, true, scheme=scheme, mode=mode, average=average)
        expected = theirs(predicted, true, scheme, mode, average)[:3]
        errors.append(absolute([score.precision, score.recall, score.f1], list(expected)))
    counts = theirs(predicted, true, scheme, mode, None)[3].tolist()
    assert [kind["true"] for kind in score.types.values()] == counts
    return max(errors)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
@pytest.mark.parametrize("scheme", THEIRS)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_equals_seqeval(scheme, mode, noise, parity):
    found = error(*corpus(scheme, 600, noise), scheme, mode)
    parity(f"entity F1: {scheme}, {mode}, {noise:.0%} of tags any", LIBRARY, found, 1e-12, "float64; F1 from counts")


def test_the_readings_differ_where_tags_do_not_fit():
    predicted, true = [["B-PER", "I-PER", "O", "E-LOC"]], [["B-PER", "E-PER", "O", "S-LOC"]]
    lenient, strict = (entity_scores(predicted, true, scheme="IOBES", mode=mode) for mode in ("lenient", "strict"))
    assert (lenient.correct, lenient.predicted, lenient.true) == (2, 2, 2)
    assert (strict.correct, strict.predicted, strict.true) == (0, 0, 2)
    assert "scheme:IOBES|mode:strict" in strict.signature
    whole = corpus("BILOU", 50, 0.0)[1]
    assert entity_scores(whole, whole, scheme="BILOU", mode="strict").value == 1


def test_a_scheme_and_its_tags_are_checked():
    with pytest.raises(ValueError, match="scheme='IOB1': one of IOB2, IOBES, BILOU"):
        Entities(("O",), scheme="IOB1")
    with pytest.raises(ValueError, match="tag 'L-PER' is not an IOBES tag \\(O, B-TYPE, I-TYPE, E-TYPE, S-TYPE\\)"):
        entity_scores([["L-PER"]], [["O"]], scheme="IOBES")


def test_the_oracle_catches_mutants(monkeypatch):
    predicted, true = corpus("IOBES", 100, 0.5)
    mutants = {
        "no end is asked for": lambda *tags, strict: entity_spans(*tags, strict=strict and "IOB2"),
        "E- begins anew": lambda kind, *tags, strict: entity_spans(torch.where(kind == 3, 4, kind), *tags, strict=strict),
        "S- is I-": lambda kind, *tags, strict: entity_spans(torch.where(kind == 4, 2, kind), *tags, strict=strict),
    }
    for name, mutant in mutants.items():
        monkeypatch.setattr("eval.entities.entity_spans", mutant)
        try:
            caught = error(predicted, true, "IOBES", "strict") > 1e-6
        except AssertionError:  # another number of entities
            caught = True
        assert caught, name
