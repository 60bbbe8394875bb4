"""Text tables of classification: classes with their frequencies, a confusion matrix, predicted samples."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from model.account import align_columns
from model.predict import predicted_labels

MAX_ROWS = 12  # classes in a table
MAX_CHARACTERS = 60  # of a sample's text


def class_table(
    labels: Sequence[str],
    train_counts: Sequence[int],
    counts: Sequence[int],
    totals: tuple[int, int],
    weights: list[float] | None,
) -> str:
    """Format the frequency of each class in training and held-out texts (`totals` of them), with its weight in the loss."""
    train, held_out = totals
    rows = [("label", "trained on", "", "held out", "")]
    for id in range(len(labels)) if len(labels) <= MAX_ROWS else range(MAX_ROWS - 1):
        ours, theirs = train_counts[id], counts[id]
        rows.append((labels[id], f"{ours:,}", f"{ours / train:.1%}", f"{theirs:,}", f"{theirs / held_out:.1%}"))
    if weights is not None:
        rows = [(*row, cell) for row, cell in zip(rows, ["weight", *(f"{w:.3f}" for w in weights)], strict=False)]
    rest = len(labels) + 1 - len(rows)
    more = f"  and {rest} more, of {min(train_counts):,} to {max(train_counts):,} records each\n" if rest else ""
    return f"{align_columns(rows)}\n{more}"


def confusion_table(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Format a confusion matrix: true classes in rows, predicted ones in columns, and the recall of each."""
    rows = [("true, down; predicted", *labels, "recall")]
    for name, counts, id in zip(labels, confusion, range(len(labels)), strict=True):
        recall = f"{counts[id] / sum(counts):.1%}" if sum(counts) else "–"
        rows.append((name, *(f"{count:,}" for count in counts), recall))
    return align_columns(rows)


def shorten(text: str) -> str:
    """Return a text on one line, cut to MAX_CHARACTERS.

    >>> shorten("a\\n  b"), len(shorten("a" * 99))
    ('a b', 60)
    """
    short = " ".join(text.split())
    return short if len(short) <= MAX_CHARACTERS else f"{short[: MAX_CHARACTERS - 1]}…"


def sample_line(
    text: str, labels: Sequence[str], ids: Mapping[str, int], probability_C: Tensor, true: Sequence[str], *, multi: bool
) -> str:
    """Format a text with its predicted labels, their probabilities, and the true labels."""
    short = shorten(text)
    predicted = predicted_labels(labels, probability_C, multi=multi)
    probabilities = " ".join(f"{float(probability_C[ids[name]]):.2f}" for name in predicted)
    mark = "✓" if set(predicted) == set(true) else "✗"
    line = f"{mark} {short}  →  {', '.join(predicted) or 'none'} {probabilities}".rstrip()
    return f"{line}  (true: {', '.join(true) or 'none'})"


def tagged_line(words: Sequence[tuple[str, str, str]], outside: str) -> str:
    """Format words with predicted and true tags: word/tag, word/tag≠true; a word that both leave outside stays alone.

    >>> tagged_line([("os", "B-MOD", "B-MOD"), ("is", "O", "O"), ("abs", "O", "B-FUN")], outside="O")
    'os/B-MOD is abs/O≠B-FUN'
    """
    return " ".join(
        word if predicted == true == outside else f"{word}/{predicted}{f'≠{true}' * (predicted != true)}"
        for word, predicted, true in words
    )
