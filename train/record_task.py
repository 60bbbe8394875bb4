"""Objectives on records with columns: a record gives examples, which are padded or packed into rows."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from data.config import MASK
from data.messages import format_count
from data.sources.record_files import FORMATS
from train.registry import settings_of
from train.runs.errors import TrainError
from train.task import EvalCorpus, Info, Scores, Task

if TYPE_CHECKING:
    import numpy as np

    from data.example import Example
    from data.sources.records import RecordData, Row
    from data.tokenizer.base import Tokenizer
    from train.config import TrainConfig

BUILT_IN = "stdlib-preferences"  # records of preferences, and of prompts
FEW = 50  # held-out records below which a score is said to be rough


class RecordTask(Task):
    """A task whose examples are made from records by `transform`, a function of its arguments alone.

    `sees`: "neighbours" gives transform all records and an index. `is_random`: it uses its random generator.
    """

    can_mix: ClassVar[bool] = True
    suffixes = FORMATS
    sees: ClassVar[str] = "record"
    is_random: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False
    affix_flags: ClassVar[Mapping[str, bool]] = MappingProxyType({})  # special tokens that a new tokenizer adds
    wants_mask: ClassVar[bool] = False  # a new tokenizer has a mask token, and special tokens on both sides of a text

    @classmethod
    @abstractmethod
    def columns(cls, settings: Any) -> list[tuple[str, str]]:
        """Return (column, the option that names it) of each required column."""

    @classmethod
    @abstractmethod
    def texts(cls, settings: Any, row: "Row") -> list[str]:
        """Return the texts of a record: the tokenizer is trained on them, and a hash of them decides if it is held out."""

    @classmethod
    def split_key(cls, settings: Any, row: "Row") -> str:
        """Return the text whose hash decides if a record is held out."""
        return "\0".join(cls.texts(settings, row))

    @classmethod
    def controls(cls, config: "TrainConfig") -> tuple[str, ...]:
        """Return the control tokens of a newly trained tokenizer besides <s> and </s>."""
        return (MASK,) if cls.needs_mask or cls.wants_mask else ()

    @classmethod
    def check(cls, settings: Any, row: "Row") -> str | None:
        """Return the fault of a record, or None; the message is prefixed by the record's name."""
        return None

    @classmethod
    def open_data(
        cls, config: "TrainConfig", tokenizer: "Tokenizer | None", info: Info, *, progress: bool = False
    ) -> "RecordData":
        from data.config import DataError
        from data.sources.records import RecordData, hash_rows, open_records, train_or_load_tokenizer

        settings = settings_of(config)
        if cls.needs_mask and tokenizer is not None and tokenizer.mask_id is None:
            raise DataError(f"--objective {config.run.objective} needs a tokenizer with a mask token")

        options = {
            "columns": cls.columns(settings),
            "text_of": lambda row: cls.split_key(settings, row),
            "check": lambda row: cls.check(settings, row),
        }
        train, validation = open_records(config.data, info=info, **options)
        if tokenizer is None:
            texts = (text for row in train.values for text in cls.texts(settings, row))
            options = {"controls": cls.controls(config), "affix_flags": cls.affix_flags}
            tokenizer = train_or_load_tokenizer(config.data, texts, info, **options)
        else:
            tokenizer = tokenizer.with_separator(config.data.separator)
        return RecordData(tokenizer, train, validation, hash_rows(train, validation))

    def __init__(self, config: "TrainConfig", data: "RecordData"):
        from data.packing.examples import ExampleSource
        from data.packing.mixed import MixedExamples
        from train.mixing import Mixing

        self.config, self.data, self.tokenizer, self.settings = config, data, data.tokenizer, settings_of(config)
        optimizer = config.optimizer
        common = {
            "batch_size": optimizer.batch_size,
            "seed": config.run.seed,
            "pad_id": self.pad_id,
            "max_lengths": self.max_lengths,
            "sees": self.sees,
        }
        training = common | {"accumulate": optimizer.accumulate, "packing": self.packing, "is_random": self.is_random}
        weights = config.data.weights
        rows_by_source = {name: data.train.from_source(name) for name in weights or ("",)}
        for name, rows in rows_by_source.items():
            if not len(rows):
                raise TrainError(f"the source {name} has no record to train on: none in it, or all of them are held out")
        streams = [(number,) if weights else () for number in range(1, len(rows_by_source) + 1)]  # independent random streams
        self.sources = {
            name: ExampleSource(rows.values, self.transform, names=rows.names.__getitem__, stream=stream, **training)
            for (name, rows), stream in zip(rows_by_source.items(), streams, strict=True)
        }
        sources = list(self.sources.values())
        counts = {name: (self.sources[name].rows_in_epoch(0), len(rows_by_source[name])) for name in weights}
        rows, documents = ({name: pair[i] for name, pair in counts.items()} for i in (0, 1))
        self.mixing = Mixing(config.data, rows, documents, config.run.seed, "record")
        self.source = MixedExamples(sources, list(self.mixing.shares.values()), config.run.seed) if weights else sources[0]
        for source in sources:
            source.epoch(0)  # finds the keys that are one value a text
        names = data.validation.names.__getitem__
        common["sequence_level"] = self.source.sequence_level
        held_out = ExampleSource(data.validation.values, self.transform, names=names, **common)
        self.validation = held_out.evaluation_batches()

    @property
    def pad_id(self) -> int:
        """The id of padding; it is masked and not scored."""
        known = (self.tokenizer.pad_id, self.tokenizer.eos_id, self.tokenizer.unknown_id, 0)
        return next(id for id in known if id is not None)

    @property
    def packing(self) -> str:
        """"pad" or "first_fit"."""
        return "pad"

    @property
    def max_lengths(self) -> tuple[int, ...]:
        """The maximal length of a row, along each axis of an example's lengths."""
        return (self.config.network.context,)

    @abstractmethod
    def transform(self, row: "Row", random: "np.random.Generator") -> "list[Example]":
        """Make the examples of one record."""

    def open_eval_corpus(self, data: "RecordData", name: str, paths: tuple[str, ...], info: Info) -> EvalCorpus:
        from train.eval_records import open_records

        return open_records(self, data, name, paths, info)

    def identity(self) -> dict:
        return {"tokenizer_sha256": self.tokenizer.sha256, "records_sha256": self.data.sha256}

    def epochs(self, steps: int) -> float:
        optimizer = self.config.optimizer
        rows = sum(source.rows_in_epoch(0) for source in self.sources.values())
        return steps * optimizer.batch_size * optimizer.accumulate / rows

    def per_step(self) -> str:
        optimizer = self.config.optimizer
        rows = optimizer.batch_size * optimizer.accumulate
        return format_count(rows, "packed row" if self.packing == "first_fit" else "record")

    def introduction(self) -> str:
        data, corpus = self.config.data, " ".join(self.config.data.corpus)
        held_out, few = f"in {' '.join(data.validation)}" if data.validation else "held out", len(self.data.validation)
        held_out += f", each {100 / few:.0f} % of every score" if 0 < few < FEW else ""
        return (
            f"records  {corpus}: {len(self.data.train):,} to train on, {len(self.data.validation):,} {held_out}\n"
            f"tokens   {self.tokenizer.vocab_size:,} pieces; "
            f"{'; '.join(f'{name} {source.describe()}'.strip() for name, source in self.sources.items())}\n{self.mixture()}"
        )

    def mixture(self) -> str:
        """Describe the sources of a mixture: the share and the epochs of each."""
        optimizer, mixing = self.config.optimizer, self.mixing
        counts = Counter(each for each in self.data.validation.sources if each in mixing.rows)
        held_out = {name: count * mixing.rows[name] / mixing.documents[name] for name, count in counts.items()}
        return mixing.describe(self.config.run.steps * optimizer.batch_size * optimizer.accumulate, held_out)

    def drawn(self, step: int) -> Scores:
        return self.mixing.drawn(step * self.config.optimizer.batch_size * self.config.optimizer.accumulate)


def check_max_length(config: "TrainConfig") -> None:
    """Raise TrainError where --NAME.max-length exceeds the context of the run, which no row does."""
    length, context = settings_of(config).max_length, config.network.context
    if length is not None and length > context:
        option = f"--{config.run.objective}.max-length {length}"
        raise TrainError(f"{option}: the rows of this run have at most {context} tokens (--context)")


def is_built_in(config: "TrainConfig") -> bool:
    """Return True if the records are the built-in preferences, which come as two splits."""
    return config.data.corpus == (BUILT_IN,) and not config.data.validation
