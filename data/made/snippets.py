"""Short contexts from definitions, and the questions that their text answers. `data.made.conversations` asks them.

A snippet is a class or function as `ast.unparse` writes it: its header; the first sentences of its docstring, in one line; its
body, or of a class the headers of its methods. A body that makes it too long is left out. The forms of questions:

    returns    What does X return?             the expression after its one `return`; "Return <answer>." of a docstring alone
    raises     Which exception does X raise?   the one class after `raise`; "Raise <answer> if …" of a docstring alone
    arguments  Which arguments does X take?    what stands between its parentheses
    next       Which argument comes after p?   the next name
    default    What is the default of p?       what stands after "p="
    base       What is the base class of X?    what stands between its parentheses
    summary    Summarise X.                    the first sentence of the docstring
    line       Continue after this line: …     the next line
    sentence   Continue this sentence: …       the rest of a sentence of the docstring
"""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from data.corpus.stdlib import DEFINITION, without_surrogates
from data.made.modules import Module
from data.made.qa import MENTIONS, RAISE, RAISED, RETURN
from data.made.text import paragraphs, sentences

SNIPPET = 420  # characters, at most
DOCSTRING = 200  # characters, at most, if the first sentence is not longer
LINES = 40  # of a body in the source; a longer one is left out
METHODS = 5  # of a class
REPLY = 80  # characters, at most
LINE = 64  # characters, at most, of a line that is to be continued
WORDS = range(4, 19)  # of a sentence that is asked for
INDENT = "    "
TEMPLATES = {
    "returns": ("What does {name} return?", "What is returned by {name}?"),
    "raises": ("Which exception does {name} raise?", "What does {name} raise?"),
    "arguments": ("Which arguments does {name} take?", "What are the arguments of {name}?"),
    "next": ("Which argument of {name} comes after {word}?", "In {name}, which argument follows {word}?"),
    "default": ("What is the default of {word} in {name}?", "What does {word} default to in {name}?"),
    "base": ("What is the base class of {name}?", "From which class does {name} inherit?"),
    "summary": ("Summarise {name}.", "Describe {name} in one sentence."),
    "line": ("Which line comes after this one?\n{word}", "Continue after this line:\n{word}"),
    "sentence": ("Continue this sentence:\n{word}", "How does this sentence go on?\n{word}"),
}
OF_A_WORD = ("next", "default", "line", "sentence")  # forms that ask for a word or line, not for a name


class Question(NamedTuple):
    """A question about a snippet. `name` and `word` fill the template of its form; without an answer, the reply is ""."""

    form: str
    name: str
    word: str = ""
    reply: str = ""

    @property
    def subject(self) -> str:
        """The words that a context has if it answers the question."""
        return self.word if self.form in OF_A_WORD else self.name


class Snippet(NamedTuple):
    """A definition as it stands in a context. `lines`: of its body, () where it is left out."""

    module: str
    name: str
    header: str
    docstring: str
    lines: tuple[str, ...]
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def text(self) -> str:
        quoted = [f'{INDENT}"""{self.docstring}"""'] if self.docstring else []
        return "\n".join([self.header, *quoted, *self.lines])


def list_snippets(module: Module) -> list[Snippet]:
    """Return the module's classes and functions that are not too long, nested ones after those around them."""
    nodes = [node for node in ast.walk(module.tree) if isinstance(node, DEFINITION)]
    return [snippet for node in nodes if (snippet := make_snippet(module.name, node))]


def make_snippet(module: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Snippet | None:
    """Return the snippet of a definition; None if it is too long, or nothing but a header.

    >>> source = "def half(x, up=False):\\n  '''Halve\\n  a number. '''\\n  # rounded?\\n  return round(x / 2)"
    >>> print(make_snippet("m", ast.parse(source).body[0]).text)
    def half(x, up=False):
        \"\"\"Halve a number.\"\"\"
        return round(x / 2)
    """
    text = ast.get_docstring(node)
    docstring = shorten_docstring(without_surrogates(text)) if text else ""
    body = node.body[1:] if text is not None else node.body
    if isinstance(node, ast.ClassDef):
        methods = [each for each in body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")]
        lines = [f"{INDENT}{header_of(each)}" for each in methods[:METHODS]]
    elif body and body[-1].end_lineno - body[0].lineno >= LINES:
        lines = []
    else:
        lines = [f"{INDENT}{line}" for each in body for line in without_surrogates(ast.unparse(each)).splitlines()]
    snippet = Snippet(module, node.name, header_of(node), docstring, tuple(lines), node)
    if len(snippet.text) > SNIPPET:
        snippet = snippet._replace(lines=())
    return snippet if len(snippet.text) <= SNIPPET and (snippet.docstring or len(snippet.lines) > 1) else None


def header_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the first line of a definition, without decorators.

    >>> header_of(ast.parse("@final\\nclass A(B): pass").body[0])
    'class A(B):'
    """
    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": [ast.Pass()], "decorator_list": []})
    return ast.unparse(ast.fix_missing_locations(bare)).splitlines()[0]


def shorten_docstring(text: str) -> str:
    """Return the first sentences of a docstring's prose, as many as fit in DOCSTRING characters; at least one."""
    found = ""
    for sentence in (each for paragraph in paragraphs(text) for each in sentences(paragraph)):
        if found and len(found) + 1 + len(sentence) > DOCSTRING:
            break
        found += " " * bool(found) + sentence
    return found


def ask(snippet: Snippet) -> list[Question]:
    """Return the questions that a snippet answers, and those about it that it does not (their reply is "")."""
    of_kind = ask_class if isinstance(snippet.node, ast.ClassDef) else ask_function
    found = [*of_kind(snippet), *ask_docstring(snippet), *ask_lines(snippet)]
    return [question for question in found if len(question.reply) <= REPLY and question.reply in snippet.text]


def ask_class(snippet: Snippet) -> Iterator[Question]:
    if len(snippet.node.bases) == 1 and not snippet.node.keywords:
        yield Question("base", snippet.name, reply=ast.unparse(snippet.node.bases[0]))


def ask_function(snippet: Snippet) -> Iterator[Question]:
    name, arguments, body = snippet.name, snippet.node.args, list(own_nodes(snippet.node))
    if snippet.lines:
        returned = [ast.unparse(each.value) for each in body if isinstance(each, ast.Return) and each.value is not None]
        raised = {ast.unparse(getattr(each.exc, "func", each.exc)) for each in body if isinstance(each, ast.Raise) and each.exc}
        if RETURN.search(snippet.docstring):
            returned = [*returned, ""]  # two answers, in words and in code
        found = {"returns": returned, "raises": sorted(raised)}
    else:
        matches = {"returns": RETURN.search(snippet.docstring), "raises": None}
        matches["raises"] = RAISE.search(snippet.docstring) or RAISED.search(snippet.docstring)
        found = {form: [match["answer"]] if match else [] for form, match in matches.items()}
    for form, mentions in (("returns", MENTIONS["return"]), ("raises", MENTIONS["exception"])):
        if len(found[form]) == 1:
            yield Question(form, name, reply=found[form][0])
        elif not found[form] and not mentions.search(snippet.text) and (form == "raises" or not snippet.lines):
            yield Question(form, name)  # a body without `return` does tell: None
    if written := ast.unparse(arguments):
        yield Question("arguments", name, reply=written)
    in_order = [*arguments.posonlyargs, *arguments.args]
    for first, second in pairwise(in_order):
        if first.arg not in ("self", "cls"):
            yield Question("next", name, first.arg, second.arg)
    values = [None] * (len(in_order) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
    for each, value in zip([*in_order, *arguments.kwonlyargs], values, strict=True):
        if value is not None:
            yield Question("default", name, each.arg, ast.unparse(value))


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a function consists of, without the functions and classes in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, DEFINITION | ast.Lambda):
            yield child
            yield from own_nodes(child)


def ask_docstring(snippet: Snippet) -> Iterator[Question]:
    found = sentences(snippet.docstring)
    if found and len(found[0].split()) in WORDS:
        yield Question("summary", snippet.name, reply=found[0])
    for sentence in found:
        words = sentence.split()
        shown = min(5, len(words) // 2)
        if shown >= 3 and len(words) in WORDS:
            yield Question("sentence", snippet.name, " ".join(words[:shown]), " ".join(words[shown:]))


def ask_lines(snippet: Snippet) -> Iterator[Question]:
    lines = [line.strip() for line in snippet.lines]
    for first, second in pairwise(lines):
        is_telling = all(re.search(r"\w{3}", line) for line in (first, second))
        if is_telling and len(first) <= LINE and snippet.text.count(first) == 1:
            yield Question("line", snippet.name, first, second)
