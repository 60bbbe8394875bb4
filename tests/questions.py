"""Records of questions about short contexts, in the forms that `--objective qa` reads."""

import random
from pathlib import Path

from tests.records import write_rows

NAMES = ["open", "close", "read", "write", "seek", "tell", "flush", "split"]
THINGS = ["a list", "the file", "an integer", "the name", "a string of bytes", "the next line", "an error code"]


def questions(count: int, seed: int = 0, *, unanswered: float = 0.3) -> list[dict]:
    """A question about one of three sentences; or about none of them, which has no answer."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        names = draw.sample(NAMES, 4)
        spans, context = {}, ""
        for name in names[:3]:
            thing = draw.choice(THINGS)
            context += f"The function {name} returns {thing}. "
            spans[name] = {"text": thing, "answer_start": len(context) - len(thing) - 2}
        asked = names[3] if draw.random() < unanswered else draw.choice(names[:3])
        found = [spans[asked]] if asked in spans else []
        answers = {key: [each[key] for each in found] for key in ("text", "answer_start")}
        rows.append({"id": str(number), "context": context, "question": f"What does {asked} return?", "answers": answers})
    return rows


def write_questions(path: Path, count: int = 60, seed: int = 0, **options: float) -> Path:
    return write_rows(path, questions(count, seed, **options))


def as_squad(rows: list[dict]) -> dict:
    """The same records as SQuAD 2.0's own file holds them."""
    paragraphs = []
    for row in rows:
        answers = [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)]
        asked = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        asked |= {} if answers else {"plausible_answers": [{"text": "The", "answer_start": 0}]}
        paragraphs.append({"context": row["context"], "qas": [asked]})
    return {"version": "v2.0", "data": [{"title": "functions", "paragraphs": paragraphs}]}
