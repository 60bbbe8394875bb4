"""`python -m tests.drawings`: write into docs/objectives.md what each objective makes of a small text.

A drawing is the first row of a task's first step (`train.reports.drawing`), on records of two sentences about guests and
parties, with a tokenizer of these words. A test compares the page with what the code draws.
"""

import json
import random
import re
import sys
import tempfile
from pathlib import Path

from data.config import DataConfig
from tests.runs import ROOT
from train.config import NetworkConfig, OptimizerConfig, RecordedConfig, RunConfig
from train.registry import config_type, load, settings_of
from train.reports.drawing import draw_example

PAGE = ROOT / "docs" / "objectives.md"
BLOCK = re.compile(r"<!-- drawing: (.+?) -->\n```text\n(.*?)```\n", re.DOTALL)
RECORDS, SPLIT = 60, 300  # SPLIT: a vocabulary so small that words are split
OPTIONS = {  # drawing: (objective, its settings, context, vocabulary)
    "clm": ("clm", {}, 20, None),
    "mlm": ("mlm", {}, 20, None),
    "mlm --mlm.whole-words": ("mlm", {"whole_words": True}, 24, SPLIT),
    "mlm --mlm.nsp": ("mlm", {"nsp": True}, 24, None),
    "prefix": ("prefix", {}, 20, None),
    "fim --fim.rate 1": ("fim", {"rate": 1.0, "level": "document"}, 30, None),
    "span": ("span", {}, 40, None),
    "denoise": ("denoise", {}, 24, None),
    "seq2seq": ("seq2seq", {}, 24, None),
    "classify": ("classify", {}, 24, None),
    "tag": ("tag", {}, 24, SPLIT),
    "pairs": ("pairs", {"first": "source", "second": "target"}, 40, None),
    "qa": ("qa", {}, 40, None),
}


def write_records(path: Path) -> Path:
    """Write records with the columns of every objective."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(RECORDS):
            choices = ["me", "us", "them"], ["week", "year"], ["Ann", "Ben", "Eve"], ["Tom", "Sue", "Max"], ["food", "music"]
            who, when, name, guest, what = map(draw.choice, choices)
            first = f"Thank you for inviting {who} to your party last {when}."
            second = f"{name} and {guest} enjoyed the {what}."
            record = {
                "text": f"{first} {second}",
                "label": name,
                "source": second,
                "target": first,
                "words": [name, "and", guest, "enjoyed", "the", f"{what}."],
                "labels": ["B-PERSON", "O", "B-PERSON", "O", "O", "O"],
                "question": f"What did {name} enjoy?",
                "context": f"{first} {second}",
                "answers": {"text": [f"the {what}"], "answer_start": [f"{first} {second}".index(f"the {what}")]},
            }
            file.write(json.dumps(record) + "\n")
    return path


def draw(name: str, folder: Path) -> str:
    """Return the drawing of an objective: the first row of its first step."""
    objective, settings, context, vocab_size = OPTIONS[name]
    corpus = str(write_records(folder / "records.jsonl"))
    kind, task = config_type(objective), load(objective)
    config = kind(
        run=RunConfig(objective=objective),
        data=DataConfig(corpus=(corpus,), cache=folder, val_fraction=0.2, dedup=False, vocab_size=vocab_size),
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=4),
        recorded=RecordedConfig(decoder_start_id=1),
        **({objective: type(settings_of(kind(run=RunConfig(objective=objective))))(**settings)} if settings else {}),
    )
    made = task(config, task.open_data(config, None, lambda line: None))
    return draw_example(made.for_drawing(made.source.batches(0)[0]), made.tokenizer, names=made.label_names)


def drawings() -> dict[str, str]:
    """Return all drawings by name."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: draw(name, Path(folder)) for name in OPTIONS}


def main() -> None:
    made = drawings()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        BLOCK.sub(lambda match: f"<!-- drawing: {match[1]} -->\n```text\n{made[match[1]]}\n```\n", text), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
