"""Conversations about the standard library, as OpenAI's messages: what `--objective sft` is trained on without a corpus.

    system     one of a few sentences
    user       a context and a question about it
    assistant  the answer: words of the context, or ABSENT if it does not answer
    user       another question about the same context …

A context is one snippet or two of a module (`data.made.snippets`, with the forms of questions). Some conversations begin with
a question without a context, of one more form:

    module     Which module holds X?           a fact of the pretraining text: X stands in the text that its module's name opens

One answer in five is ABSENT, in each form but `module`: the question is that of another snippet of the module about a name,
word or line that the context does not have; or (`returns`, `raises`) the definition in the context does not tell.

Conversations are held out by module (`data.made.modules`). No reply to a held-out question is a reply to a question of the same
form in training, ABSENT alone excepted: questions of which that is not so are dropped, and no context is on both sides.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.corpus.dedup import fingerprint
from data.made.modules import Module, Record, draw, package_of, read_modules
from data.made.snippets import TEMPLATES, Question, Snippet, ask, list_snippets

ABSENT = "The text does not say."
SYSTEMS = (
    "Answer with words of the text. If it does not answer, say so.",
    "You answer questions about Python code, briefly.",
    "You are a helpful assistant. Quote the text, or say that it does not tell.",
)
MODULE_TEMPLATES = ("Which module holds {name}?", "In which module is {name} defined?")
ABSENT_SHARE = 0.2
WEIGHTS = {"returns": 3, "raises": 8, "base": 2, "default": 4, "summary": 2, "arguments": 0.7}  # of forms, else 1
TWO = 0.25  # of the contexts have two snippets
CONTEXT = 560  # characters of a context, at most
TURNS = (0.1, 0.25, 0.5, 0.8, 0.95)  # cumulative shares of conversations with at most 1, 2 … questions, of different forms
LENGTH, MESSAGE = 890, 20  # characters of a conversation, at most, and what each message adds: below 512 tokens of 1,024 pieces
OF_A_PACKAGE = 240  # conversations, at most
RECALL_PLACE = 1500  # characters: a name that stands further behind its module's name is not asked for


class Turn(NamedTuple):
    """A question in words, and its reply. `kind`: its form, with ":absent" where the reply is ABSENT."""

    question: str
    reply: str
    kind: str


def make_conversations(seed: int = 0, progress: Callable[[list[Path]], Iterable[Path]] = iter) -> dict[str, list[Record]]:
    """Return {"train": records, "validation": records} made of the standard library: the corpus `stdlib-chat`.

    A record is {"messages": [{"role", "content"}, …], "module", "kind"}; "kind" has one word for each reply.
    progress: wraps the list of files that are read.
    """
    return split_conversations(read_modules(progress=progress), seed)


def split_conversations(modules: list[Module], seed: int = 0) -> dict[str, list[Record]]:
    """Return the conversations about modules that are seen in training, and about those that are held out."""
    facts = module_facts(modules)
    seen, held_out = (
        {module.name: list_snippets(module) for module in modules if module.is_held_out == side} for side in (False, True)
    )
    contexts = frozenset(fingerprint(snippet.text) for snippets in held_out.values() for snippet in snippets)
    train = list(converse(seen, facts, seed, contexts=contexts))
    answers = frozenset(answers_of(train))
    validation = list(converse(held_out, facts, seed, answers=answers))
    return {
        split: sorted(records, key=lambda record: draw(seed, "order", record["messages"]))
        for split, records in (("train", train), ("validation", validation))
    }


def converse(
    snippets: dict[str, list[Snippet]],
    facts: dict[tuple[str, str], Question],
    seed: int = 0,
    *,
    contexts: frozenset[bytes] = frozenset(),
    answers: frozenset[tuple[str, str]] = frozenset(),
) -> Iterator[Record]:
    """Yield conversations about the snippets of modules, {name: snippets}: at most one about each.

    facts: of `module_facts`.  contexts: fingerprints of snippets that are left out.  answers: (form, reply) of questions that
    are left out.
    """
    seen = set(contexts)
    asked: dict[str, dict[Snippet, list[Question]]] = {}
    for module, found in snippets.items():
        unique = {key: snippet for snippet in found if (key := fingerprint(snippet.text)) not in seen}
        seen |= unique.keys()
        asked[module] = {snippet: ask(snippet) for snippet in unique.values()}
    usable = {
        snippet: [question for question in questions if (question.form, question.reply.casefold()) not in answers]
        for found in asked.values()
        for snippet, questions in found.items()
    }
    silent = silent_shares(question for questions in usable.values() for question in questions)
    count: Counter[str] = Counter()
    for module in sorted(asked, key=lambda module: draw(seed, "module", module)):
        others = [question for questions in asked[module].values() for question in questions if question.reply]
        for snippet in sorted(asked[module], key=lambda snippet: draw(seed, "snippet", snippet.text)):
            key = (module, snippet.text)
            if count[package_of(module)] == OF_A_PACKAGE:
                break
            context = make_context(snippet, list(asked[module]), seed, *key)
            questions = [q for q in usable[snippet] if q.reply or draw(seed, "silent", *key, q) < silent[q.form]]
            if turns := make_turns(context, questions, others, seed, *key):
                count[package_of(module)] += 1
                yield build(module, facts.get((module, snippet.name)), context, turns, seed)


def silent_shares(questions: Iterable[Question]) -> dict[str, float]:
    """Return {form: share of its questions that the asked definition leaves open which are used}: as many as make half of the
    ABSENT_SHARE of the form."""
    count = Counter((question.form, bool(question.reply)) for question in questions)
    return {form: min(1.0, ABSENT_SHARE / 2 * count[form, True] / count[form, False]) for form, is_told in count if not is_told}


def make_context(snippet: Snippet, snippets: list[Snippet], seed: int, *key: str) -> str:
    """Return the snippet's text, or its and another's of the same module."""
    if draw(seed, "two", *key) < TWO:
        fitting = [other for other in snippets if other.name != snippet.name and len(other.text + snippet.text) < CONTEXT]
        if fitting:
            other = fitting[int(draw(seed, "other", *key) * len(fitting))]
            pair = [snippet.text, other.text]
            return "\n\n".join(pair if draw(seed, "first", *key) < 0.5 else pair[::-1])
    return snippet.text


def make_turns(context: str, asked: list[Question], others: list[Question], seed: int, *key: str) -> list[Turn]:
    """Return up to six questions of different forms about a context, with their replies; [] if there is nothing to ask."""
    by_form: dict[str, list[Question]] = defaultdict(list)
    for question in sorted(asked, key=lambda question: draw(seed, "question", *key, question)):
        is_clear = question.form not in ("line", "sentence") or context.count(question.word) == 1
        if is_clear:
            by_form[question.form].append(question)
    forms = sorted(by_form, key=lambda form: draw(seed, "form", *key, form) / WEIGHTS.get(form, 1))
    turns, most = [], 1 + sum(draw(seed, "turns", *key) >= limit for limit in TURNS)
    for form in forms[:most]:
        question = by_form[form][0]
        limit = ABSENT_SHARE / 2 if form in ("returns", "raises") else ABSENT_SHARE  # for half of it the definition is silent
        if question.reply and draw(seed, "absent", *key, form) < limit:
            question = borrow(question, context, others, draw(seed, "borrowed", *key, form)) or question
        templates = TEMPLATES[form]
        text = templates[int(draw(seed, "template", *key, form) * len(templates))].format(**question._asdict())
        turns.append(Turn(text, question.reply or ABSENT, form if question.reply else f"{form}:absent"))
    return sorted(turns, key=lambda turn: draw(seed, "order", *key, turn))


def borrow(question: Question, context: str, others: list[Question], place: float) -> Question | None:
    """Return a question of the same form that the context does not answer: about a name or word that does not occur in it."""
    same = [other for other in others if other.form == question.form]
    start = int(place * len(same))
    for other in same[start:] + same[:start]:
        if not re.search(rf"(?<!\w){re.escape(other.subject)}(?!\w)", context):
            return Question(question.form, question.name if other.word else other.name, other.word)
    return None


def module_facts(modules: list[Module]) -> dict[tuple[str, str], Question]:
    """Return {(module, name): question} of documented names that stand near their module's begin, in no other module."""
    count = Counter(found.name for module in modules for found in module.definitions if not found.owner)
    facts = {}
    for module in modules:
        place, described = 0, [found for found in module.definitions if found.name == module.name]
        for found in module.definitions if described else []:
            if place < RECALL_PLACE and count[found.name] == 1 and "." not in found.name and found not in described:
                facts[module.name, found.name] = Question("module", found.name, reply=module.name)
            place += len(found.header) + len(found.text)
    return facts


def build(module: str, fact: Question | None, context: str, turns: list[Turn], seed: int) -> Record:
    """Return the record of a conversation; the first question about the context stands below it."""
    first, *rest = turns
    turns = [first._replace(question=f"{context}\n\n{first.question}"), *rest]
    if fact is not None:
        text = MODULE_TEMPLATES[int(draw(seed, "template", context, "module") * len(MODULE_TEMPLATES))]
        turns = [Turn(text.format(name=fact.name), fact.reply, fact.form), *turns]
    messages = [{"role": "system", "content": SYSTEMS[int(draw(seed, "system", context) * len(SYSTEMS))]}]
    while len(turns) > 1 + (fact is not None) and sum(len(turn.question + turn.reply) + 2 * MESSAGE for turn in turns) > LENGTH:
        turns = turns[:-1]
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.reply}]
    return {"messages": messages, "module": module, "kind": " ".join(turn.kind for turn in turns)}


def contents(record: Record, role: str | None = None) -> list[str]:
    """Return the texts of a conversation's messages: all, or those of a role."""
    return [message["content"] for message in record["messages"] if role in (None, message["role"])]


def context_of(record: Record) -> str:
    """Return the context of a conversation, without the question below it."""
    asked = contents(record, "user")
    return asked[record["kind"].startswith("module")].rpartition("\n\n")[0]


def answers_of(records: Iterable[Record]) -> Iterator[tuple[str, str]]:
    """Yield (form, reply), in small letters, of every reply that is not ABSENT."""
    for record in records:
        for kind, reply in zip(record["kind"].split(), contents(record, "assistant"), strict=True):
            if not kind.endswith(":absent"):
                yield kind, reply.casefold()
