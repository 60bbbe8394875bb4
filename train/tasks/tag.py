"""Token classification: a label for each word (named entities, parts of speech), from records with words and their labels.

The first sub-word of a word has its label; its other sub-words and special tokens have none. The network has its family's
token-classification head: on an encoder, or on a decoder, whose words see only those before them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.shell import command
from train.record_task import RecordTask, check_max_length
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import Defaults, Info, Scores, Totals

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from data.example import Example
    from data.sources.records import Row, Rows
    from data.tokenizer.base import Tokenizer
    from data.transforms.labels import LabelledData
    from data.transforms.tags import WordEncoding
    from eval.entities import Entities
    from model.config import ModelConfig
    from train.config import TrainConfig
    from train.objective import Objective
    from train.tag_baseline import Sentence, TagBaseline

SAMPLES, SAMPLE_WORDS = 5, 24


@dataclass(frozen=True)
class TagSettings:
    """Token classification: the columns of words and labels, the scheme of entities, the treatment of long texts."""

    words: str = "words"
    """The column with the words of a text, a list of strings."""
    labels: str = "labels"
    """The column with a label for each word: strings or integers."""
    names: tuple[str, ...] = ()
    """The names of integer labels, by number, as Hugging Face's ClassLabel has them. Default: the digits."""
    scheme: Literal["auto", "IOB2", "IOBES", "BILOU", "none"] = "auto"
    """How labels spell entities, for entity F1; none: labels are no entities (parts of speech). auto: the first that fits."""
    max_length: int | None = None
    """Maximal tokens of a text, special tokens included. Default: the context."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """A longer text: truncate it at the end of a word, leave the record out, or stop."""
    best: Literal["loss", "accuracy", "f1"] = "loss"
    """The score that selects the best checkpoint."""

    def __post_init__(self) -> None:
        if self.words == self.labels:
            raise TrainError(f"--tag.words {self.words}: the labels are the same column")
        if self.max_length is not None and self.max_length < 1:
            raise TrainError(f"--tag.max-length {self.max_length}: must be at least 1")
        if self.best == "f1" and self.scheme == "none":
            raise TrainError("--tag.best f1 is entity F1, and --tag.scheme none has no entities: --tag.best accuracy")


class TagTask(RecordTask):
    """Token classification, scored by accuracy of words and by entity F1 (seqeval's), beside two baselines: label frequencies
    for the loss, and the most frequent tag of each word for accuracy and F1."""

    Settings = TagSettings
    defaults = Defaults("tiny-encoder", 3e-3)
    architectures, head, unit = ("encoder", "decoder"), "token", "words"
    wants_mask = True

    settings: TagSettings
    data: "LabelledData"

    # ---- data

    @classmethod
    def columns(cls, settings: TagSettings) -> list[tuple[str, str]]:
        return [(settings.words, "--tag.words"), (settings.labels, "--tag.labels")]

    @classmethod
    def texts(cls, settings: TagSettings, row: "Row") -> list[str]:
        return [" ".join(row[settings.words])]

    @classmethod
    def check(cls, settings: TagSettings, row: "Row") -> str | None:
        from data.transforms.tags import find_fault

        return find_fault(row[settings.words], row[settings.labels], settings.words, settings.labels)

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "LabelledData":
        from data.transforms.labels import LabelledData, choose_labels
        from train.label_config import initial_labels

        settings: TagSettings = settings_of(config)
        data = super().open_data(config, tokenizer, info, progress=progress)
        train, held_out = (labels_of(settings, rows) for rows in (data.train, data.validation))
        named = zip(data.validation.names, held_out, strict=True)
        labels = choose_labels(train, named, settings.labels, initial_labels(config))
        if not settings.names and all(name.isdecimal() for name in labels):
            info(f"labels   are integers, named by their digits ({', '.join(labels[:4])}, …); --tag.names names them")
        return LabelledData(data.tokenizer, data.train, data.validation, data.sha256, labels)

    @classmethod
    def network(cls, config: "TrainConfig", base: "ModelConfig", data: "LabelledData") -> "ModelConfig":
        """Set the number and names of the labels."""
        from train.label_config import with_labels

        return with_labels(base, data.labels)

    def __init__(self, config: "TrainConfig", data: "LabelledData"):
        from data.transforms.tags import WordFramer

        settings: TagSettings = settings_of(config)
        check_max_length(config)
        self.framer = WordFramer(data.tokenizer, max_length=settings.max_length or config.network.context)
        self.ids = {name: id for id, name in enumerate(data.labels)}
        self.labels = self.label_names = data.labels
        self.entities = entities_of(settings, data.labels)
        self.encodings: dict[int, WordEncoding | None] = {}  # by id() of the record
        self.cut: dict[str, int] = {}  # records that were cut or left out, and their words that are not used
        self.empty: list[str] = []  # records without a labelled word
        self.lost = 0  # words without a token
        splits = (data.train, data.validation)
        self.row_names = {id(row): name for rows in splits for row, name in zip(rows.values, rows.names, strict=True)}
        self.best, self.higher_is_better = settings.best, settings.best != "loss"
        if settings.best == "f1" and self.entities is None:
            raise TrainError("--tag.best f1 is entity F1, and these labels spell no entities: --tag.best accuracy")
        super().__init__(config, data)
        self.baseline = self._baseline()

    @property
    def max_lengths(self) -> tuple[int, ...]:
        return (self.framer.max_length,)

    def label_ids(self, row: "Row") -> list[int]:
        """Return the label id of each word of a record."""
        from data.transforms.tags import tag_names

        settings = self.settings
        return [self.ids[name] for name in tag_names(row[settings.labels], "", settings.labels, settings.names)]

    def encode(self, row: "Row") -> "WordEncoding | None":
        """Return the ids of a record's words; None where --tag.overlong leaves it out, or no labelled word is left."""
        if id(row) not in self.encodings:
            self.encodings[id(row)] = self._encode(row[self.settings.words], self.row_names[id(row)])
        return self.encodings[id(row)]

    def _encode(self, words: list[str], name: str) -> "WordEncoding | None":
        from data.config import DataError

        encoding, room = self.framer(words), self.framer.max_length
        if encoding.words < len(words):
            if self.settings.overlong == "error":
                raise DataError(
                    f"{name} has {len(words):,} words, of which {encoding.words:,} have room in {room:,} tokens "
                    "(--tag.max-length, --context). --tag.overlong cut or drop goes on without"
                )
            self.cut[name] = len(words) - encoding.words
            if self.settings.overlong == "drop":
                return None
        if not encoding.first_positions:
            self.empty.append(name)
            return None
        self.lost += encoding.words - len(encoding.first_positions)
        return encoding

    def transform(self, row: "Row", random: "np.random.Generator") -> "list[Example]":
        import numpy as np

        from data.example import Example
        from data.transforms.tags import tag_labels

        if (encoding := self.encode(row)) is None:
            return []
        return [Example(np.array(encoding.ids, dtype=np.int64), tag_labels(encoding, self.label_ids(row)))]

    def identity(self) -> dict:
        return super().identity() | {"labels": list(self.labels)}

    def introduction(self) -> str:
        return f"{super().introduction()}{self._label_table()}{self._left_out()}"

    def _label_table(self) -> str:
        from train.label_report import class_table

        baseline = self.baseline
        totals = sum(baseline.train_counts), sum(baseline.counts)
        table = class_table(self.labels, baseline.train_counts, baseline.counts, totals, None)
        spells = f"{self.entities.scheme} spells entities" if self.entities is not None else "no scheme of entities"
        return f"labels   {len(self.labels)}, in the column {self.settings.labels!r}; {spells}; counted in words\n{table}"

    def _left_out(self) -> str:
        """Name and count what is not used: long texts, texts without a labelled word, words without a token."""
        from data.messages import format_count, shorten_list

        total, room, lines = len(self.data.train) + len(self.data.validation), self.framer.max_length, ""
        if self.cut:
            action = {"cut": "cut to", "drop": "left out, longer than"}[self.settings.overlong]
            words = f", {format_count(sum(self.cut.values()), 'word')} not used" * (self.settings.overlong == "cut")
            lines += f"long     {len(self.cut):,} of {total:,} texts {action} {room:,} tokens (--tag.max-length){words}\n"
        if self.empty:
            names = shorten_list(self.empty)
            lines += f"empty    {len(self.empty):,} of {total:,} texts left out, as no labelled word is left: {names}\n"
        if self.lost:
            lines += f"lost     {format_count(self.lost, 'word')} without a token of this tokenizer: not learned, not scored\n"
        return lines

    # ---- learning

    def objective(self, networks, loss, held_out=None) -> "Objective":
        from train.tag_objective import TagObjective

        asked = self.config.optimizer
        return TagObjective(networks, entities=self.entities, smoothing=asked.label_smoothing, z_loss=asked.z_loss)

    # ---- evaluation

    def _baseline(self) -> "TagBaseline":
        """Score label frequencies and the most frequent tag of each word, on the held-out words that are scored."""
        from data.config import DataError
        from data.transforms.tags import WordTags
        from train.tag_baseline import word_baseline

        train, held_out = (self._sentences(rows) for rows in (self.data.train, self.data.validation))
        found = word_baseline(WordTags(train), train, held_out, len(self.labels), self.entities)
        for name, ours, theirs in zip(self.labels, found.train_counts, found.counts, strict=True):
            if theirs and not ours:
                raise DataError(
                    f"texts of {self.framer.max_length:,} tokens leave no training word with the label {name!r}, and "
                    f"{theirs:,} held-out words have it: --tag.max-length, --context"
                )
        return found

    def _sentences(self, rows: "Rows") -> "list[Sentence]":
        """Return the words with a token of each record, and their label ids."""
        found = []
        for row in rows.values:
            words, ids, encoding = row[self.settings.words], self.label_ids(row), self.encode(row)
            used = [] if encoding is None else list(encoding.first_positions)
            found.append(([words[word] for word in used], [ids[word] for word in used]))
        return found

    def scores(self, totals: Totals) -> Scores:
        from train.tag_baseline import entity_parts

        (nats, count), (right, _) = totals["loss"], totals["accuracy"]
        scores = {"loss": nats / count, "baseline_loss": self.baseline.loss}
        scores |= {"accuracy": right / count, "word_accuracy": self.baseline.accuracy}
        if self.entities is not None:
            scores |= entity_parts(self.entities, totals["entities"][0]) | {"word_f1": self.baseline.f1}
        return scores

    def score_line(self, scores: Scores) -> str:
        line = (
            f"loss {scores['loss']:.4f} (label frequencies {scores['baseline_loss']:.4f}) · accuracy {scores['accuracy']:.1%} "
            f"(most frequent tag of the word in training {scores['word_accuracy']:.1%})"
        )
        if self.entities is None:
            return line
        parts = f"precision {scores['precision']:.3f}, recall {scores['recall']:.3f}"
        return f"{line} · entity F1 {scores['f1']:.3f} (of the word {scores['word_f1']:.3f}; {parts})"

    def verdict(self, scores: Scores) -> str:
        rest = self.score_line(scores).partition(" · ")[2]
        return f"label frequencies {scores['baseline_loss']:.4f}; {rest}, chosen by {self.best}"

    def sample(self, network: "nn.Module", device: "torch.device") -> tuple[str, str]:
        from model.predict import Text
        from model.predict_tags import predicted_tags
        from train.label_report import tagged_line

        lines, usual = [], self.labels[max(range(len(self.labels)), key=self.baseline.train_counts.__getitem__)]
        for row in self.data.validation.values:
            encoding = self.encode(row)
            places, ids = encoding.first_positions if encoding else {}, self.label_ids(row)
            if all(self.labels[ids[word]] == usual for word in places):
                continue
            (tags,) = predicted_tags(network, [Text(encoding.ids)], [list(places.values())], pad_id=self.pad_id)
            words = row[self.settings.words]
            some = [(words[word], self.labels[tag], self.labels[ids[word]]) for word, tag in zip(places, tags, strict=True)]
            rarer = next(place for place, (_, _, true) in enumerate(some) if true != usual)
            start = max(0, rarer - SAMPLE_WORDS // 2)
            lines.append(tagged_line(some[start : start + SAMPLE_WORDS], outside=usual))
            if len(lines) == SAMPLES:
                break
        title = f"held-out texts that have a rarer tag: word/predicted tag (≠ the true one), no tag is {usual}"
        return title, "\n".join(lines)

    def example_command(self, folder: Path) -> str:
        return command("model", "predict", folder, (*self.config.data.validation, *self.config.data.paths)[0])


def labels_of(settings: TagSettings, rows: "Rows") -> list[list[str]]:
    """Return the label names of each record."""
    from data.transforms.tags import tag_names

    column, names = settings.labels, settings.names
    return [tag_names(row[column], place, column, names) for row, place in zip(rows.values, rows.names, strict=True)]


def entities_of(settings: TagSettings, labels: tuple[str, ...]) -> "Entities | None":
    """Return the metric of the entities that the labels spell; None where they spell none."""
    from eval.entities import find_entities

    if settings.scheme == "none":
        return None
    try:
        return find_entities(labels, None if settings.scheme == "auto" else settings.scheme)
    except ValueError as error:
        raise TrainError(f"--tag.scheme {settings.scheme}: {error}") from None


TASK = TagTask
