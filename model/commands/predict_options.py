"""The options of `model predict`, of all heads; `model.commands.predict.HEADS` says which head reads which."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from train.command_line import Needs


@dataclass(frozen=True)
class Predict:
    """Predict by a network of --objective classify, pairs or tag, or by any folder with such a head: the label of each text of
    a file with the probability of each label, for regression a number; the tag of each word; the answer of each question
    (--objective qa). The output has the input's columns too."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run (its best checkpoint, else its last), a checkpoint, a model folder or an adapter's."""
    file: Annotated[Path, tyro.conf.Positional]
    """.jsonl .json .csv .tsv with a column of texts, or .txt with a text a line; each also .gz."""
    out: Path | None = None
    """The file to write: .jsonl .csv .tsv, by its suffix. Default: JSON lines on the screen."""
    text: str | None = None
    """The column with the text. Default: what the run was trained with, else "text"."""
    pair: str | None = None
    """The column with the second text. Default: what the run was trained with, else none."""
    words: str | None = None
    """The column with the words, a list. Default: what the run was trained with, else "words"."""
    context: str | None = None
    """The column with the context of a question. Default: what the run was trained with, else "context"."""
    question: str | None = None
    """The column with the question. Default: what the run was trained with, else "question"."""
    top: int = 0
    """List so many of the best answers, with offsets and probabilities, in the column `top`."""
    stride: int | None = None
    """Tokens of a question's context that neighbouring windows share. Default: that of the run, else a third of a window."""
    max_answer: int | None = None
    """Most tokens of an answer. Default: that of the run, else 30."""
    null_threshold: float | None = None
    """Predict no answer where its score exceeds that of the best span by more than this. Default: that of the run, else 0."""
    always_answer: bool | None = None
    """Predict an answer to every question. Default: what the run was trained with."""
    score: bool = False
    """Compare with the labels in the file: accuracy, F1, entity F1; of numbers the mean squared error; of answers exact match
    and F1."""
    label: str | None = None
    """The column with the label, for --score; of tags with the list of labels, of answers with the right ones. Default: what
    the run was trained with, else "label", "labels" or "answers"."""
    threshold: float = 0.5
    """With several labels a text: predict those that are more probable than this."""
    max_length: int | None = None
    """Truncate longer texts to this many tokens. Default: what the run was trained with, else the network's context."""
    batch_size: int = 32
    """Texts at a time; the results do not depend on it."""
    base: Path | None = None
    """For an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""

    NEEDS: ClassVar = (Needs(("label",), lambda options: options.score, "it names what --score compares with"),)
