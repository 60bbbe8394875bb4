"""Replies that keep or break the rule of `data.made.rule` in chosen parts: one answer in many surface forms.

    clause    the answer in words: "strict defaults to True", "the default of strict is True"
    place     the module before or after the clause; where `module` is broken, no name or another module's
    hedge     before the clause or at the end, where `hedge` is broken
    padding   a sentence before or after, or words before the clause, where `length` is broken

Each form is drawn for itself, so that a chosen and a rejected reply differ in more than what the rule says.
"""

from collections.abc import Collection, Sequence

from data.config import DataError
from data.made.modules import draw
from data.made.rule import broken_parts, is_well_formed
from data.made.snippets import Question

CLAUSES = {  # of a form of question; those that begin with "the" begin a sentence with a capital
    "arguments": ("{name} takes {reply}", "the arguments of {name} are {reply}"),
    "base": ("{name} inherits from {reply}", "the base class of {name} is {reply}"),
    "default": ("{word} defaults to {reply}", "the default of {word} is {reply}"),
    "next": ("{reply} comes after {word}", "the argument after {word} is {reply}"),
    "raises": ("{name} raises {reply}", "the exception of {name} is {reply}"),
    "returns": ("{name} returns {reply}", "the result of {name} is {reply}"),
}
MODULE = "{module}"
NAMED = (("In {module}, ", ""), ("In {module}: ", ""), ("In the module {module}, ", ""), ("{module}: ", ""),
         ("", " in {module}"), ("", " in the module {module}"))  # fmt: skip
UNNAMED = (("", ""), ("", ""), ("In this module, ", ""), ("In the text, ", ""), ("In this case, ", ""), ("Here, ", ""),
           ("", " in this module"), ("", " in the text"), ("", " in the module above"), ("", " here"))  # fmt: skip
HEDGED = (  # before the clause, and at the end of the sentence
    *((words, "") for words in (
        "I think ", "I think that ", "I believe ", "I believe that ", "I guess ", "I suppose that ", "perhaps ", "maybe ",
        "probably ", "possibly ", "presumably ", "it seems that ", "as far as I can tell, ", "I am not sure, but ")),
    *(("", words) for words in (
        ", I think", ", I believe", ", I guess", ", probably", ", perhaps", ", as far as I know", ", if I am not mistaken",
        ", it seems")),
)  # fmt: skip
PADDED = (  # a sentence before, words before the clause, a sentence after
    ("This is a good question, so let us look at it. ", "", ""),
    ("Thank you, that is a good thing to ask me. ", "", ""),
    ("Let us look at the text above with some care. ", "", ""),
    ("The text above has all that we need to see. ", "", ""),
    ("", "if we read all of the text, we see that ", ""),
    ("", "when we look at the text again, we find that ", ""),
    ("", "as one can see from the lines of the text above, ", ""),
    ("", "", " This is what the text says, and it is all."),
    ("", "", " You can see that in the text above as well."),
    ("", "", " I hope that this is the answer that you need."),
    ("", "", " Please ask me again if there is more to say."),
)
ANOTHER = 0.1  # of the replies that do not name the module name another one
TRIES = 200  # draws of forms: a hedge in a long form makes a reply too long, and then another form is drawn
WORDS = " ".join(  # of all forms
    part for forms in (NAMED, UNNAMED, HEDGED, PADDED, CLAUSES.values()) for form in forms for part in form
).format(module="", name="", word="", reply="")


def write_reply(
    question: Question, module: str, breaks: Collection[str], others: Sequence[str], seed: int, *key: object
) -> str:
    """Return an answer that breaks these parts of the rule and no other, in forms that are drawn by the seed and the key.

    others: modules whose names may stand in place of the module's. Errors (DataError): no form of TRIES does.
    """
    for number in range(TRIES):

        def pick(kind: str, forms: Sequence, number=number):
            return forms[int(draw(seed, kind, number, *key) * len(forms))]

        named, place = module, pick("place", NAMED)
        if "module" in breaks:
            if others and draw(seed, "another", *key) < ANOTHER:
                named = pick("other", others)
            else:
                place = pick("place", UNNAMED)
        hedge = pick("hedge", HEDGED) if "hedge" in breaks else ("", "")
        padding = pick("padding", PADDED) if "length" in breaks else ("", "", "")
        clause = pick("clause", CLAUSES[question.form]).format(**question._asdict())
        reply = build_reply(clause, tuple(part.format(module=named) for part in place), hedge, padding)
        if broken_parts(reply, module) == set(breaks) and is_well_formed(reply):
            return reply
    raise DataError(f"no form of the answer {question.reply!r} about {module} breaks {sorted(breaks)} alone")


def build_reply(clause: str, place: tuple[str, ...], hedge: tuple[str, str], padding: tuple[str, str, str]) -> str:
    """Return a reply of its parts, with a capital where it begins with words of ours.

    >>> build_reply("the base of A is B", ("", " in m"), ("", ", I think"), ("", "", " Ask again."))
    'The base of A is B in m, I think. Ask again.'
    """
    (front, back), (before, after), (first, infix, last) = place, hedge, padding
    sentence = f"{front}{infix}{before}{clause}{back}{after}."
    if not front and (infix or before or clause.startswith("the ")):
        sentence = sentence[0].upper() + sentence[1:]
    return f"{first}{sentence}{last}"


def longest_plain(question: Question, module: str) -> int:
    """Return the number of words of the longest reply that only names the module."""
    clauses = [clause.format(**question._asdict()) for clause in CLAUSES[question.form]]
    places = [f"{front}{back}".format(module=module) for front, back in NAMED]
    return max(len(clause.split()) for clause in clauses) + max(len(place.split()) for place in places)
