"""A rule for replies that a program can check, and whether a reply is well formed: the measures of a trained preference.

    keeps the rule   no part of PARTS is broken: at most MOST_WORDS words; no hedge; the module's name
    well formed      one sentence or two, closed quotes and brackets, no repetition: no part of FORM is broken

A policy that is trained towards the rule alone may write a name and nothing else, or repeat itself: count replies of which both
hold.
"""

import re

MOST_WORDS = 12
LEAST_WORDS = 3
REPEATED = range(2, 5)  # words of a sequence that may not follow itself; a single word may, once
PARTS = ("hedge", "length", "module")
FORM = ("sentences", "end", "brackets", "repetition", "characters")
HEDGES = (
    "apparently", "as far as i can tell", "as far as i know", "could be", "i am not sure", "i assume", "i believe", "i guess",
    "i suppose", "i think", "if i am not mistaken", "it looks like", "it seems", "likely", "may", "maybe", "might", "perhaps",
    "possibly", "presumably", "probably", "seemingly", "seems to",
)  # fmt: skip
HEDGE = re.compile(rf"(?<![\w.])(?:{'|'.join(HEDGES)})(?!\w|\.\w|\()", re.IGNORECASE)  # may_open, may.open, may(x) are names
SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)")
QUOTED = re.compile(r"(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"|`[^`]*`")
CLOSING = {")": "(", "]": "[", "}": "{"}


def keeps_rule(reply: str, module: str) -> bool:
    """Return True if a reply is short, has no hedge, and names the module.

    >>> keeps_rule("In json.decoder, strict defaults to True.", "json.decoder")
    True
    """
    return not broken_parts(reply, module)


def broken_parts(reply: str, module: str) -> set[str]:
    """Return the parts of the rule that a reply breaks: "hedge", "length", "module".

        hedge    it has one of HEDGES, as words, in any case; names such as may_open are none
        length   it has more than MOST_WORDS words, split at white space
        module   the module's dotted name stands nowhere in it, or only as a part of a longer name

    >>> sorted(broken_parts("I think that strict defaults to True in json.", "json.decoder"))
    ['hedge', 'module']
    """
    found = {"hedge": has_hedge(reply), "length": len(reply.split()) > MOST_WORDS, "module": not names_module(reply, module)}
    return {part for part, is_broken in found.items() if is_broken}


def has_hedge(text: str) -> bool:
    return HEDGE.search(text) is not None


def names_module(text: str, module: str) -> bool:
    """Return True if the module's name stands in a text, neither as a part of a name nor before a further part.

    >>> [names_module(text, "os") for text in ("In os: 3.", "It is os.", "In os.path: 3.", "In posix: 3.", "Call os().")]
    [True, True, False, False, True]
    """
    return re.search(rf"(?<![\w.]){re.escape(module)}(?!\w|\.\w)", text) is not None


def is_well_formed(reply: str) -> bool:
    """Return True if a reply breaks no part of FORM.

    >>> is_well_formed("In os, mode defaults to 'r'."), is_well_formed("In os, mode defaults to 'r.")
    (True, False)
    """
    return not broken_form(reply)


def broken_form(reply: str) -> set[str]:
    """Return what is wrong with a reply's form.

        sentences    not one or two sentences, by ".", "!" or "?" before white space or the end; or less than LEAST_WORDS words
        end          no full stop at the end
        brackets     an open or crossed bracket, or an open quotation mark; what stands in quotes is not looked at
        repetition   a word three times in a row, or a sequence of two to four words twice in a row, in any case
        characters   one that is not printable, such as a line feed, or U+FFFD, which stands for bytes that are no text

    >>> sorted(broken_form("it is it is (so"))
    ['brackets', 'end', 'repetition', 'sentences']
    """
    words = reply.split()
    found = {
        "sentences": len(words) < LEAST_WORDS or len(SENTENCE_END.findall(reply)) not in (1, 2),
        "end": not reply.endswith(".") or reply.endswith(".."),
        "brackets": not has_closed_brackets(reply),
        "repetition": repeats(words),
        "characters": not reply.isprintable() or "\N{REPLACEMENT CHARACTER}" in reply,
    }
    return {part for part, is_broken in found.items() if is_broken}


def has_closed_brackets(text: str) -> bool:
    """Return True if each bracket and quotation mark is closed; an apostrophe between letters is none.

    >>> [has_closed_brackets(text) for text in ("f(x[0])", "a ')' b", "it's f(", "f(x[0)]", "'a", "the \\"a")]
    [True, True, False, False, False, False]
    """
    rest = re.sub(r"(?<=\w)'(?=\w)", "", QUOTED.sub("", text))
    if re.search("['\"`]", rest):
        return False
    opened: list[str] = []
    for character in rest:
        if character in CLOSING.values():
            opened.append(character)
        elif character in CLOSING and (not opened or opened.pop() != CLOSING[character]):
            return False
    return not opened


def repeats(words: list[str]) -> bool:
    """Return True if a word stands three times in a row, or a sequence of words (REPEATED) twice.

    >>> [repeats(text.split()) for text in ("it had had it", "it had had had it", "in os in os", "a b c a b c d")]
    [False, True, True, True]
    """
    words = [word.casefold() for word in words]
    if any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2)):
        return True
    return any(words[i : i + n] == words[i + n : i + 2 * n] for n in REPEATED for i in range(len(words) - 2 * n + 1))
