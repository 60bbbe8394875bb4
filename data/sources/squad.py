"""SQuAD's own nested JSON as flat records, one a question: {"data": [{"title", "paragraphs": [{"context", "qas": […]}]}]}.

Source: Rajpurkar et al. 2016, arXiv 1606.05250; Rajpurkar et al. 2018, arXiv 1806.03822 (`is_impossible`).
"""

from collections.abc import Iterator
from typing import Any


def is_squad(value: Any) -> bool:
    """Return True for an object whose "data" is a list of articles with paragraphs."""
    articles = value.get("data") if isinstance(value, dict) else None
    return isinstance(articles, list) and any(isinstance(each, dict) and "paragraphs" in each for each in articles)


def squad_records(value: dict) -> Iterator[tuple[str, dict | str]]:
    """Yield (place, record) of each question; in place of a record that is malformed, the problem.

    A record is that of Hugging Face's squad_v2: id, title, context, question, answers {"text": […], "answer_start": […]}. A
    question that says is_impossible has no answer; its "plausible_answers" are wrong ones, and are left out.

    >>> qa = {"id": "7", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
    >>> [(place, row)] = squad_records({"data": [{"title": "t", "paragraphs": [{"context": "Ada wrote.", "qas": [qa]}]}]})
    >>> place, row["answers"]
    ('article 1, paragraph 1, question 1', {'text': ['Ada'], 'answer_start': [0]})
    """
    for article_number, article in enumerate(value["data"], 1):
        place = f"article {article_number}"
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield place, 'no list of "paragraphs"'
            continue
        for paragraph_number, paragraph in enumerate(paragraphs, 1):
            here = f"{place}, paragraph {paragraph_number}"
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list) or "context" not in paragraph:
                yield here, 'no "context" with a list of "qas"'
                continue
            for question_number, question in enumerate(paragraph["qas"], 1):
                if not isinstance(question, dict):
                    yield f"{here}, question {question_number}", "it is no object"
                    continue
                answers = [] if question.get("is_impossible") else question.get("answers") or []
                is_list = isinstance(answers, list) and all(isinstance(each, dict) for each in answers)
                keys = ("text", "answer_start")
                row = {key: each for key, each in question.items() if key in ("id", "question")}
                row |= {"title": article.get("title", ""), "context": paragraph["context"]}
                row["answers"] = {key: [each.get(key) for each in answers] for key in keys} if is_list else answers
                yield f"{here}, question {question_number}", row
