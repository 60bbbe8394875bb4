"""The next token of each record's text, a record a row."""

from dataclasses import dataclass

import numpy as np

from data.example import Example
from train.record_task import RecordTask
from train.task import Defaults


@dataclass(frozen=True)
class Settings:
    """Of the toy."""

    column: str = "text"
    """The column with the text."""


class Toy(RecordTask):
    Settings = Settings
    defaults = Defaults("tiny", 8e-3)
    architectures, head = ("decoder",), "lm"

    @classmethod
    def columns(cls, settings):
        return [(settings.column, "--toy.column")]

    @classmethod
    def texts(cls, settings, row):
        return [row[settings.column]]

    def transform(self, row, random):
        ids = np.array(self.tokenizer.as_document(self.tokenizer.encode(row[self.settings.column])))
        return [Example(ids[:-1], ids[1:])]

    def objective(self, networks, loss, held_out=None):
        from train.objective import Objective

        return Objective(networks, loss, held_out)


TASK = Toy
