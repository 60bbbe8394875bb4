"""Preference pairs over the standard library that follow a rule, and conversations that keep it in a quarter of the replies.

    prompt     one message of the user: a module's name, a definition in a few lines, a question about it
    chosen     the answer by the rule of `data.made.rule`: short, no hedge, names the module
    rejected   the same answer, which breaks one part of the rule or several; both are well formed

`make_styled_conversations` has prompts of the same kind; its replies keep the rule in RULE_SHARE, and else break it as rejected
ones do: a network trained on it has a preference left to learn. Modules are held out as in `data.made.conversations`.

Accuracy on the 1,228 held-out pairs of Python 3.11, chosen by one property; a tie counts as half:

    fewer characters 69 %   fewer words 73 %   names the module 72 %   no hedge 71 %   at most MOST_WORDS words 66 %
    without one word, the best of 120: 63 %    logistic regression on counts of words: 98 % (of `module` alone: 94 %)

The words of hedges and padding give themselves away; another module's name in the place of the module's (`styles.ANOTHER`) does
not: a reward model that never looks at the prompt stays at about 98 %.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.corpus.dedup import fingerprint
from data.made.modules import Module, Record, draw, package_of, read_modules
from data.made.rule import MOST_WORDS, has_hedge, is_well_formed, names_module
from data.made.snippets import INDENT, TEMPLATES, Question, Snippet, ask, list_snippets
from data.made.styles import CLAUSES, WORDS, longest_plain, write_reply

RULE_SHARE = 0.25  # of the styled conversations' replies
BREAKS = {  # shares of what rejected replies break
    ("hedge",): 0.3,
    ("length",): 0.2,
    ("module",): 0.34,
    ("hedge", "length"): 0.04,
    ("hedge", "module"): 0.06,
    ("length", "module"): 0.04,
    ("hedge", "length", "module"): 0.02,
}
HEADS = ("# {module}", "Module {module}:")
CONTEXT, ANSWER = 150, 24  # characters of a definition, and of an answer with the module's name, at most
NAME, SAID = 16, 52  # characters of the module's name, and of names and answer together, at most
WEIGHTS = {"raises": 8, "base": 4, "returns": 3, "arguments": 0.4}  # of forms of questions, else 1
OF_A_PACKAGE = 240  # prompts, at most


class Prompt(NamedTuple):
    """A message of the user, and what a reply says: the answer to a question about a module."""

    text: str
    module: str
    question: Question


def make_preferences(seed: int = 0, progress: Callable[[list[Path]], Iterable[Path]] = iter) -> dict[str, list[Record]]:
    """Return {"train": records, "validation": records} of pairs: the corpus `stdlib-preferences`.

    A record is {"prompt": [message], "chosen": [message], "rejected": [message], "module", "kind", "answer", "breaks"}: "kind"
    is the form of the question, "answer" the words that both replies answer with, "breaks" the sorted list of the parts that
    the rejected reply breaks.  progress: wraps the list of files that are read.
    """
    return split_preferences(read_modules(progress=progress), seed)


def make_styled_conversations(
    seed: int = 0, progress: Callable[[list[Path]], Iterable[Path]] = iter
) -> dict[str, list[Record]]:
    """Return {"train": records, "validation": records} of conversations in both styles: the corpus `stdlib-styles`.

    A record is {"messages": [user's, assistant's], "module", "kind", "answer", "breaks"}; "breaks" is [] in RULE_SHARE of them.
    """
    return split_styles(read_modules(progress=progress), seed)


def split_preferences(modules: list[Module], seed: int = 0) -> dict[str, list[Record]]:
    """Return pairs about modules that are seen in training, and about those that are held out."""
    return split_records(modules, seed, build_pair)


def split_styles(modules: list[Module], seed: int = 0) -> dict[str, list[Record]]:
    """Return conversations in both styles about modules that are seen in training, and about those that are held out."""
    return split_records(modules, seed, build_styled)


def split_records(
    modules: list[Module], seed: int, build: Callable[[Prompt, list[str], int], Record]
) -> dict[str, list[Record]]:
    """Return {split: records} that `build` makes of a prompt, all modules' names and the seed; no context is on both sides."""
    snippets: dict[str, dict[str, list[Snippet]]] = {split: {} for split in ("validation", "train")}
    for module in modules:
        snippets["validation" if module.is_held_out else "train"][module.name] = list_snippets(module)
    records, seen = {}, set()  # contexts: of held-out prompts, then of all
    for split, found in snippets.items():
        prompts = list(list_prompts(found, seen, seed))
        names = sorted({prompt.module for prompt in prompts})
        built = [build(prompt, names, seed) for prompt in prompts]
        records[split] = sorted(built, key=lambda record: draw(seed, "order", record))
    return {split: records[split] for split in ("train", "validation")}


# ---- prompts


def list_prompts(snippets: dict[str, list[Snippet]], seen: set[bytes], seed: int = 0) -> Iterator[Prompt]:
    """Yield at most one prompt about each snippet of modules, {name: snippets}; at most OF_A_PACKAGE about a package.

    seen: fingerprints of contexts that are left out; those of the prompts are added.
    Left out too: modules whose name is a word of the replies' forms, and answers that keep a reply from being short and well
    formed, have a hedge, or name the module by themselves.
    """
    count: Counter[str] = Counter()
    for module in sorted(snippets, key=lambda module: draw(seed, "module", module)):
        if len(module) > NAME or names_module(WORDS, module):
            continue
        for snippet in sorted(snippets[module], key=lambda snippet: draw(seed, "snippet", snippet.text)):
            if count[package_of(module)] == OF_A_PACKAGE:
                break
            question = choose_question(snippet, seed)
            if question and (key := fingerprint(shorten(snippet, question))) not in seen:
                seen.add(key)
                count[package_of(module)] += 1
                yield Prompt(write_prompt(snippet, question, seed), module, question)


def choose_question(snippet: Snippet, seed: int) -> Question | None:
    """Return a question that a short text of the snippet answers in a few words; None if there is none."""
    by_form: dict[str, list[Question]] = defaultdict(list)
    for question in ask(snippet):
        if question.form in CLAUSES and is_usable(question, snippet):
            by_form[question.form].append(question)
    if not by_form:
        return None
    form = min(by_form, key=lambda form: draw(seed, "form", snippet.text, form) / WEIGHTS.get(form, 1))
    return min(by_form[form], key=lambda question: draw(seed, "question", snippet.text, question))


def is_usable(question: Question, snippet: Snippet) -> bool:
    """Return True if a short text of the snippet has the answer, and each chosen form of it keeps the rule."""
    said = " ".join(part for part in question[1:] if part)
    return (
        bool(question.reply)
        and len(question.reply) <= ANSWER
        and len(said) + len(snippet.module) <= SAID
        and (question.form != "arguments" or "," in question.reply)
        and question.reply in shorten(snippet, question)
        and not has_hedge(said)
        and not names_module(said, snippet.module)
        and is_well_formed(f"The answer is {said}.")
        and longest_plain(question, snippet.module) <= MOST_WORDS
    )


def shorten(snippet: Snippet, question: Question) -> str:
    """Return the longest text of the snippet that has its answer and at most CONTEXT characters; "" if there is none."""
    quoted = [f'{INDENT}"""{snippet.docstring}"""'] if snippet.docstring else []
    texts = ("\n".join([snippet.header, *quoted, *snippet.lines]), "\n".join([snippet.header, *snippet.lines]),
             "\n".join([snippet.header, *quoted]), snippet.header)  # fmt: skip
    return next((text for text in texts if len(text) <= CONTEXT and question.reply in text), "")


def write_prompt(snippet: Snippet, question: Question, seed: int) -> str:
    """Return the module's name, the snippet's short text and the question, in one of their forms."""
    def pick(kind: str, forms: tuple[str, ...]) -> str:
        return forms[int(draw(seed, kind, snippet.module, snippet.text) * len(forms))]

    head = pick("head", HEADS).format(module=snippet.module)
    asked = pick("template", TEMPLATES[question.form]).format(**question._asdict())
    return f"{head}\n{shorten(snippet, question)}\n\n{asked}"


# ---- records


def build_pair(prompt: Prompt, names: list[str], seed: int) -> Record:
    """Return the record of a pair."""
    breaks, others = draw_breaks(prompt, seed, "pair"), [name for name in names if name != prompt.module]
    chosen = write_reply(prompt.question, prompt.module, (), others, seed, "chosen", prompt.text)
    rejected = write_reply(prompt.question, prompt.module, breaks, others, seed, "rejected", prompt.text)
    return {
        "prompt": [{"role": "user", "content": prompt.text}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **describe(prompt, breaks),
    }


def build_styled(prompt: Prompt, names: list[str], seed: int) -> Record:
    """Return the record of a conversation in a drawn style."""
    keeps = draw(seed, "keeps", prompt.text) < RULE_SHARE
    breaks, others = () if keeps else draw_breaks(prompt, seed, "style"), [name for name in names if name != prompt.module]
    reply = write_reply(prompt.question, prompt.module, breaks, others, seed, "style", prompt.text)
    messages = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": reply}]
    return {"messages": messages, **describe(prompt, breaks)}


def draw_breaks(prompt: Prompt, seed: int, kind: str) -> tuple[str, ...]:
    """Return the parts of the rule that a reply to a prompt breaks, in the shares of BREAKS."""
    place = draw(seed, "breaks", kind, prompt.text) * sum(BREAKS.values())
    for breaks, fraction in BREAKS.items():
        place -= fraction
        if place < 0:
            return breaks
    return breaks


def describe(prompt: Prompt, breaks: Iterable[str]) -> Record:
    question = prompt.question
    return {"module": prompt.module, "kind": question.form, "answer": question.reply, "breaks": sorted(breaks)}
