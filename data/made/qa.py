"""Questions about docstrings, as records of SQuAD 2: an answer is a span of the context at `answer_start`; a third have none.

The context is a few neighbouring docstrings of a module, each after its name and parameters. The forms:

    return     What does X return?                   "Return <answer>."
    exception  Which exception does X raise?         "Raise <answer> if …", "<answer> is raised"
    when       When does X raise E?                  "Raise E if <answer>."
    default    What is the default of p in X?        "p defaults to <answer>", "p (default <answer>)"
    if         What happens in X if …?               "If …, <answer>."
    what       What is X?                            a class: "A <answer>." at its beginning
    do         What does X do?                       a function: its first sentence

`do` is as frequent as the most frequent other form, and prefers docstrings that answer another question too: what is asked must
be read. A question without an answer has one of the forms, each as often as among the answered ones. It asks for what the
docstring does not say: it has no word of that kind; or the question (`if`, `what`, `do`) is about another definition of the
module, which is not in the context. Neighbours before and after are chosen so that the answers, or the docstrings asked about,
begin anywhere in their contexts, equally often.
"""

import ast
import re
from collections import Counter, defaultdict
from typing import NamedTuple

from data.corpus.dedup import fingerprint
from data.made.modules import Definition, Module, Record, draw
from data.made.text import paragraphs, sentences

CONTEXT_WORDS = 80  # at most, if the docstring asked about is not longer
DOCSTRING_WORDS = 60  # a longer docstring is cut at the end of a sentence
ANSWER_WORDS = range(1, 16)
NEIGHBOURS = 2  # docstrings, on each side
EXCEPTION = r"[A-Za-z_.]*(?:Error|Exception|Warning|StopIteration|StopAsyncIteration|Exit|Interrupt|NoMatch|Timeout)\b"
END = r"(?=[.;:,](?:\s|$)|\s\(|\s--?\s|$)"
RETURN = re.compile(rf"(?:^|[.!?:]\s+|\s-\s)Returns?:?\s+(?P<answer>\S.*?){END}")
RAISE = re.compile(rf"\b[Rr]ais(?:es?|ing)\s+(?:an?\s+|the\s+)?[`']*(?P<answer>{EXCEPTION})")
RAISED = re.compile(rf"(?P<answer>{EXCEPTION})[`']*\s+(?:is|are|will be|may be|gets)\s+raised\b")
CASE = rf"\s+(?:if|when|unless)\s+(?P<answer>\S.*?){END}"
WHEN = re.compile(rf"\b[Rr]ais(?:es?|ing)\s+(?:an?\s+|the\s+)?[`']*(?P<error>{EXCEPTION})[`']*{CASE}")
WHEN_RAISED = re.compile(rf"(?P<error>{EXCEPTION})[`']*\s+(?:is|will be|may be)\s+raised{CASE}")
DEFAULT = re.compile(
    r"[`'*]*\b(?P<name>[A-Za-z_]\w*)[`'*]*,?\s+(?:defaults?\s+to|\(defaults?(?:\s+to|\s+is|:|=)?)\s+"
    r"(?P<answer>[^\s,;()]+?)(?=[.,;:]*(?:[\s)]|$))"
)
IF = re.compile(rf"(?:^|[.!?]\s+)If (?P<condition>[^,.;:()]+),\s+(?:then\s+)?(?P<answer>\S.*?){END}")
WHAT = re.compile(r"^(?P<answer>(?:An?|The)\s+\S.*?)(?=\.(?:\s|$)|$)")
DO = re.compile(r"^(?!Return)(?P<answer>[A-Z][a-z]+\s+\S.*?)(?=\.(?:\s|$)|$)")
ANY_ERROR = re.compile("rais|error|exception", re.IGNORECASE)
MENTIONS = {
    "return": re.compile("return|yield|give", re.IGNORECASE),
    "exception": ANY_ERROR,
    "when": ANY_ERROR,
    "default": re.compile("default", re.IGNORECASE),
}
USUAL_ERRORS = ["ValueError", "TypeError"]
ELSEWHERE = ("if", "what", "do")  # without an answer they are about a definition that is not in the context
TEMPLATES = {
    "return": ("What does {name} return?", "What is returned by {name}?"),
    "exception": ("Which exception does {name} raise?", "What does {name} raise?"),
    "when": ("When does {name} raise {error}?", "When is {error} raised by {name}?"),
    "default": ("What is the default of {parameter} in {name}?", "What does {parameter} default to in {name}?"),
    "if": ("What happens in {name} if {condition}?", "What does {name} do if {condition}?"),
    "what": ("What is {name}?", "What kind of thing is {name}?"),
    "do": ("What does {name} do?", "What is {name} for?"),
}


class Entry(NamedTuple):
    """A definition as it stands in a context: "name(parameters): docstring", in one line."""

    name: str
    header: str
    body: str
    node: ast.AST

    @property
    def text(self) -> str:
        return f"{self.header}: {self.body}"


class Question(NamedTuple):
    """A question. `words` fill the template of its form.

    about, anchor   the places, among the module's entries, of the one asked about, and of one that is in the context
    offset          the answer's, in the anchor's text; without an answer any, which is placed evenly too
    """

    form: str
    about: int
    words: dict[str, str]
    anchor: int
    offset: int
    answer: str = ""


def make_qa(modules: list[Module], seed: int = 0, avoid: frozenset[bytes] = frozenset()) -> list[Record]:
    """Return records {"id", "context", "question", "answers", "module"} in an order drawn by the seed.

    "answers" is {"text": [answer], "answer_start": [offset in characters]}, or two empty lists. The id ends in ":form", or in
    ":form:none".  avoid: fingerprints of contexts that are left out.
    """
    forms: dict[tuple[str, bool], list[Record]] = defaultdict(list)
    several: set[str] = set()  # ids of questions about docstrings that answer another one too
    for module in modules:
        entries = [entry for found in module.definitions if (entry := make_entry(found))]
        answered = [question for i, entry in enumerate(entries) for question in ask(i, entry)]
        count = Counter(question.anchor for question in answered)
        for question in [*answered, *ask_in_vain(module.name, entries, answered, seed)]:
            record = build(module.name, entries, question, seed)
            if record and fingerprint(record["context"]) not in avoid:
                forms[question.form, bool(question.answer)].append(record)
                if question.answer and count[question.anchor] > 1:
                    several.add(record["id"])
    records = []
    most = max(len(forms[form, True]) for form in TEMPLATES if form != "do")
    for form in TEMPLATES:
        with_answer, without = (
            sorted(forms[form, has_answer], key=lambda record: (record["id"] not in several, draw(seed, "qa", record["id"])))
            for has_answer in (True, False)
        )
        count = min(len(with_answer), 2 * len(without), most if form == "do" else len(with_answer))
        records += with_answer[:count] + without[: count // 2]
    return sorted(records, key=lambda record: draw(seed, "order", record["id"]))


def make_entry(found: Definition) -> Entry | None:
    """Return the definition as a line of a context; None if no prose is left of its docstring."""
    words: list[str] = []
    for sentence in (s for paragraph in paragraphs(found.text) for s in sentences(paragraph)):
        if words and len(words) + len(sentence.split()) > DOCSTRING_WORDS:
            break
        words += sentence.split()
    header = found.name
    if isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):  # names alone: defaults would answer questions
        names = [each.arg for each in ast.walk(found.node.args) if isinstance(each, ast.arg)]
        header = f"{header}({', '.join(name for name in names if name not in ('self', 'cls'))})"
    return Entry(found.name, header, " ".join(words), found.node) if 3 <= len(words) <= 2 * DOCSTRING_WORDS else None


def ask(i: int, entry: Entry) -> list[Question]:
    """Return the questions that a docstring answers, at most one of each form."""
    body, shift = entry.body, len(entry.header) + 2
    found: dict[str, tuple[re.Match, dict[str, str]]] = {}
    if match := RETURN.search(body):
        found["return"] = match, {}
    if match := RAISE.search(body) or RAISED.search(body):
        found["exception"] = match, {}
    if match := WHEN.search(body) or WHEN_RAISED.search(body):
        found["when"] = match, {"error": match["error"]}
    if match := DEFAULT.search(body):
        found["default"] = match, {"parameter": match["name"]}
    if match := IF.search(body):
        found["if"] = match, {"condition": match["condition"]}
    if isinstance(entry.node, ast.ClassDef) and (match := WHAT.search(body)):
        found["what"] = match, {}
    elif isinstance(entry.node, ast.FunctionDef) and (match := DO.search(body)):
        found["do"] = match, {}
    return [
        Question(form, i, {"name": entry.name, **words}, i, shift + match.start("answer"), match["answer"])
        for form, (match, words) in found.items()
        if len(match["answer"].split()) in ANSWER_WORDS
    ]


def ask_in_vain(module: str, entries: list[Entry], answered: list[Question], seed: int) -> list[Question]:
    """Return questions of the same forms that a docstring, or the context around it, does not answer."""
    errors = sorted({question.words["error"] for question in answered if question.form == "when"}) or USUAL_ERRORS
    asked = [question for question in answered if question.form in ELSEWHERE]
    found = []
    for i, entry in enumerate(entries):
        offset = len(entry.header) + 2 + int(draw(seed, "place", module, entry.name) * len(entry.body) * 0.7)
        silent = [form for form, mentions in MENTIONS.items() if not mentions.search(entry.body)]
        for form in silent:
            words = {"name": entry.name, "error": errors[int(draw(seed, "error", module, entry.name) * len(errors))]}
            if form == "default":
                names = [name for name in parameter_names(entry) if re.search(rf"\b{re.escape(name)}\b", entry.body)]
                if not names:
                    continue
                words["parameter"] = names[int(draw(seed, "parameter", module, entry.name) * len(names))]
            found.append(Question(form, i, words, i, offset))
        if asked:
            other = asked[int(draw(seed, "other", module, entry.name) * len(asked))]
            words = other.words if other.form != "if" else {**other.words, "name": entry.name}
            found.append(Question(other.form, other.about, words, i, offset))
    return found


def parameter_names(entry: Entry) -> list[str]:
    inside = entry.header.partition("(")[2].rstrip(")")
    return inside.split(", ") if inside else []


def build(module: str, entries: list[Entry], question: Question, seed: int) -> Record | None:
    """Return the record, in the context whose neighbours bring the offset nearest to a drawn place; None for a question whose
    answer would be in every context."""
    key = f"{module}.{entries[question.anchor].name}:{question.form}{'' if question.answer else ':none'}"
    target, best = draw(seed, "context", key), None
    for first in range(max(0, question.anchor - NEIGHBOURS), question.anchor + 1):
        for last in range(question.anchor, min(len(entries), question.anchor + NEIGHBOURS + 1)):
            if not question.answer and question.form in ELSEWHERE and first <= question.about <= last:
                continue
            texts = [entry.text for entry in entries[first : last + 1]]
            if last > first and sum(len(text.split()) for text in texts) > CONTEXT_WORDS:
                continue
            start = len("\n".join([*texts[: question.anchor - first], ""])) + question.offset
            context = "\n".join(texts)
            distance = abs(start / len(context) - target)
            if best is None or distance < best[0]:
                best = distance, context, start
    if best is None:
        return None
    _, context, start = best
    templates = TEMPLATES[question.form]
    text = templates[int(draw(seed, "template", key) * len(templates))].format(**question.words)
    answers = {"text": [question.answer], "answer_start": [start]} if question.answer else {"text": [], "answer_start": []}
    return {"id": key, "context": context, "question": text, "answers": answers, "module": module}
