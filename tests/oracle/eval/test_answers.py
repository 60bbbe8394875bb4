"""Exact match and F1 of answers against values of SQuAD's scripts, and a twin in plain Python."""

import random
import string
from collections import Counter

import pytest

from eval import answers as module
from eval.answers import Answers, answer_scores, answers_statistics, normalise
from eval.score import corpus_value
from tests.compare import Error, absolute
from tests.pairs import unicode_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*letters of hypotheses:UserWarning")  # of arbitrary Unicode
# (answer, right answers, exact and F1 by version 2.0, by 1.1): what the published scripts give.
VECTORS = [
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos!", "Broncos"], (1, 1), (1, 1)),
    ("the Broncos of Denver", ["Denver Broncos"], (0, 4 / 5), (0, 4 / 5)),
    ("U.S.", ["us"], (1, 1), (1, 1)),
    ("state-of-the-art", ["state of the art", "stateoftheart"], (1, 1), (1, 1)),  # marks go before articles do
    ("an 'a' b", ["b"], (1, 1), (1, 1)),
    ("don't", ["don t"], (0, 0), (0, 0)),
    ("«a» b", ["«» b"], (0, 2 / 5), (0, 2 / 5)),  # only ASCII marks go; «a» becomes two words
    ("the theatre", ["theatre"], (1, 1), (1, 1)),
    ("b b b c", ["b c c"], (0, 4 / 7), (0, 4 / 7)),
    ("10 to 12", ["ten", "12", "10 - 12"], (0, 4 / 5), (0, 4 / 5)),
    ("", [""], (1, 1), (1, 0)),
    ("The!", ["..."], (1, 1), (1, 0)),
    ("", ["cat"], (0, 0), (0, 0)),
    ("cat", [""], (0, 0), (0, 0)),
    ("", ["the", "cat"], (0, 0), (1, 0)),  # 2.0 leaves out "the", which normalises to nothing
    ("cat", ["the", "cat"], (1, 1), (1, 1)),
    ("Σ\u00a0İ", ["σ\n\ti̇"], (1, 1), (1, 1)),
]


def plain_words(text: str) -> list[str]:
    kept = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    words, word = [], ""
    for mark in kept + " ":  # a word for articles is of letters, digits and underscores; other marks end it and stay
        if mark.isalnum() or mark == "_":
            word += mark
        else:
            words.append(" " if word in ("a", "an", "the") else word)
            words.append(mark)
            word = ""
    return "".join(words).split()


def plain(answer: str, rights: list[str], version: str) -> tuple[int, float]:
    """(exact, F1), a pair at a time."""
    if version == "2.0":
        rights = [right for right in rights if plain_words(right)] or [""]
    exact, f1, ours = 0, 0.0, plain_words(answer)
    for right in map(plain_words, rights):
        common = sum((Counter(ours) & Counter(right)).values())
        exact = max(exact, int(ours == right))
        if common:
            precision, recall = common / len(ours), common / len(right)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
        elif version == "2.0" and not ours and not right:
            f1 = 1.0
    return exact, f1


def streams(rights: list[list[str]]) -> list[list[str | None]]:
    return [[row[place] if place < len(row) else None for row in rights] for place in range(max(map(len, rights)))]


@pytest.mark.parametrize(("version", "column"), [("2.0", 2), ("1.1", 3)])
def test_values_of_the_scripts(parity, version, column):
    given, rights = [row[0] for row in VECTORS], [row[1] for row in VECTORS]
    exact, f1 = (Answers(kind, version) for kind in ("exact", "f1"))
    rows = answers_statistics([exact, f1], given, streams(rights))
    assert exact.examples(rows[0]).tolist() == [100 * row[column][0] for row in VECTORS]
    error = absolute(f1.examples(rows[1]), [100 * row[column][1] for row in VECTORS])
    parity("answers: vectors", f"SQuAD {version} script's values", error, 1e-12, "float64, per cent")
    assert rows[1][:2].tolist() == [[3, 1, 2, 2, 2], [1, 1, 2, 3, 2]]
    for alone, row in zip(given, VECTORS, strict=True):
        assert plain(alone, row[1], version) == (row[column][0], pytest.approx(row[column][1], abs=1e-15))


def fuzz(count: int):
    """Answers and 1 to 3 right ones of a few words with marks and articles, empty ones among them, or of any characters."""
    draw = random.Random(0)
    words = ["the", "a", "An", "THE", "cat", "Cat", "cats", "b.c.", "1,000", "-", "'s", "...", "«le»", "É", "a-b", "", "the_a"]
    odd = iter(zip(*unicode_pairs(2 * count, longest=5), strict=True))

    def text() -> str:
        return draw.choice([" ", " ", "  ", "\n"]).join(draw.choices(words, k=draw.randint(0, 4)))

    given, rights = [], []
    for place in range(count):
        answer, right = next(odd) if place % 2 else (text(), text())
        given.append(answer)
        rights.append([right, *(text() for _ in range(draw.randint(0, 2)))])
        draw.shuffle(rights[-1])
    return given, rights


def error(version: str, count: int = 3000) -> Error:
    given, rights = fuzz(count)
    expected = [plain(*pair, version) for pair in zip(given, rights, strict=True)]
    scores = answer_scores(given, streams(rights), version=version)
    metrics = [Answers("exact", version), Answers("f1", version)]
    rows = answers_statistics(metrics, given, streams(rights))
    assert metrics[0].examples(rows[0]).tolist() == [100.0 * exact for exact, _ in expected]
    of_examples = absolute(metrics[1].examples(rows[1]), [100 * f1 for _, f1 in expected])
    means = [100 * sum(column) / count for column in zip(*expected, strict=True)]
    return max(of_examples, absolute([score.value for score in scores.values()], means))


@pytest.mark.parametrize("version", module.SQUAD_VERSIONS)
def test_equals_the_plain_twin(parity, version):
    parity(f"answers: {version}, 3,000 questions", "plain Python", error(version), 1e-11, "float64, per cent; sum of 3,000")


def test_the_twin_catches_mutants(monkeypatch):
    f1, of, matches = module._f1, module._metric_statistics, module.clipped_matches_each
    mutants = {
        "_f1": lambda common, length, right, version: f1(common, length, right, "1.1"),
        "ARTICLES": module.re.compile(r"(a|an|the)"),
        "NO_PUNCTUATION": str.maketrans({mark: " " for mark in string.punctuation}),
        "normalise": lambda text: module.ARTICLES.sub(" ", text.lower()).translate(module.NO_PUNCTUATION).split(),
        "_metric_statistics": lambda metric, length, *columns: of(metric, length, *(column[:, :1] for column in columns)),
        "clipped_matches_each": lambda answer, right, order: matches(answer, right, order).clamp(max=1),
    }
    for name, mutant in mutants.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, mutant)
            try:
                caught = error("2.0", 500) > 1e-6
            except AssertionError:  # exact matches are others
                caught = True
            assert caught, name


def test_any_split_is_one_and_both_kinds_are_scored_at_once():
    given, rights = fuzz(200)
    references = streams(rights)
    for version in module.SQUAD_VERSIONS:
        whole = answer_scores(given, references, version=version)
        for kind, score in zip(module.KINDS, whole.values(), strict=True):
            metric = Answers(kind, version)
            rows_BK = metric.statistics(given, references)
            assert rows_BK[:, 0].max() == 3 and not rows_BK.is_floating_point()
            cuts = [metric.statistics(given[cut], [stream[cut] for stream in references]) for cut in (slice(9), slice(9, None))]
            assert (rows_BK[:9] == cuts[0]).all() and (rows_BK[9:] == cuts[1]).all()
            assert metric.score(rows_BK) == score and corpus_value(metric, rows_BK.flip(0)) == score.value


def test_questions_without_an_answer():
    scores = answer_scores(["", "cat", "dog", "dog"], [["", None, None, "dog"], ["the", None, "dog", "a"]])
    assert [score.value for score in scores.values()] == [75, 75]
    assert scores["f1"].parts == {"has_answer": 100.0, "no_answer": 50.0, "answerable": 2}
    assert str(scores["f1"]) == "F1 = 75.00 nrefs:var|norm:squad|version:2.0"
    assert answer_scores(["cat"], ["cat"])["f1"].no_answer is None
    assert answer_scores(["cat", ""], ["cat", None])["exact_match"].value == 100  # one list
    assert answer_scores([], [])["f1"].value == answer_scores([], [[]], version="1.1")["f1"].value == 0
    with pytest.raises(ValueError, match="example 1 has no reference"):
        answer_scores(["cat", "dog"], [["cat", None]], version="1.1")


def test_a_text_of_a_million_characters():
    long = "ab the, " * 125_000
    scores = answer_scores([long, "ab"], [long[:-16], "ab"])
    assert scores["f1"].has_answer == pytest.approx(50 + 50 * 2 * 124_998 / 249_998, abs=1e-12)
    assert scores["exact_match"].value == 50 and len(normalise(long)) == 125_000


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: answer_scores(["a"], ["a", "b"]), ValueError, "1 hypotheses, but 2 references"),
        (lambda: answer_scores(["a", "b"], [["a", "b"], ["a"]]), ValueError, "2 hypotheses, but 1 references of stream 1"),
        (lambda: answer_scores("a", ["a"]), TypeError, "one string"),
        (lambda: answer_scores(["a"], "a"), TypeError, "a string among them"),
        (lambda: answer_scores([None], ["a"]), TypeError, "hypothesis 0 is None"),
        (lambda: answer_scores(["a", "b"], [["a", 7]]), TypeError, "reference 0 of example 1 is not a string: 7"),
        (lambda: Answers("f2"), ValueError, "kind='f2': one of exact, f1"),
        (lambda: answer_scores(["a"], ["a"], version="3"), ValueError, "version='3': one of 1.1, 2.0"),
        (lambda: Answers().statistics(["a"], ["a"]), TypeError, "a string among them"),
    ],
)
def test_bad_input_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
