"""Pairs of texts to score: hypotheses that share words with their references, of made-up words and of arbitrary Unicode."""

import random

ODD = ["", " ", "\t", "\n", "\u00a0", "\u2028", "\x85", "\u200b", "\x00"]
ODD += ["-\n", "&amp;", "&quot;", "<skipped>", "...", "1,000.5", "5-", "-5"]
SHARED = ["the", "The", "cats", "running", "a", "1.5", "x,y", "«oui»", "l'été", "naïve", "ß", "İ", "ﬁne"]
RANGES = [(0x20, 0x7F)] * 3 + [(0xA0, 0x250), (0x370, 0x530), (0x600, 0x700), (0x900, 0x980), (0x2000, 0x2070)]
RANGES += [(0x3040, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1F300, 0x1F650), (0x300, 0x370), (0x0, 0x20)]
RANGES += [(0x10000, 0x10FFFF)]
ENDINGS = ["", "", "", "", "s", "ed", "ing", "ly", "ation", "ness", "ies", "'s"]


def word_pairs(count: int, seed: int = 0, shortest: int = 10, longest: int = 40, vocabulary: int = 5000, kept: float = 0.7):
    """(hypotheses, references): made-up words, frequent and rare ones, with inflections, capitals and punctuation; about `kept`
    of a reference's words are its hypothesis', some in another place."""
    draw = random.Random(seed)
    stems = [
        draw.choice("bcdfglmnprst") + draw.choice("aeiou") + "".join(draw.choices("lmnrstdkp", k=draw.randint(1, 4)))
        for _ in range(vocabulary)
    ]
    weights = [1 / (rank + 1) for rank in range(vocabulary)]

    def text(words: list[str]) -> str:
        marked = [word + (draw.choice([",", ".", ";", "-based", " 3.5", "%"]) if draw.random() < 0.1 else "") for word in words]
        return " ".join(marked).capitalize() + draw.choice([".", "!", "?", ""])

    hypotheses, references = [], []
    for _ in range(count):
        words = [word + draw.choice(ENDINGS) for word in draw.choices(stems, weights, k=draw.randint(shortest, longest))]
        changed = [word if draw.random() < kept else draw.choice(stems) + draw.choice(ENDINGS) for word in words]
        if len(changed) > 3 and draw.random() < 0.5:  # a phrase moves
            cut = draw.randrange(1, len(changed) - 1)
            changed = changed[cut:] + changed[:cut]
        if draw.random() < 0.3:
            del changed[draw.randrange(len(changed)) :: 3]
        references.append(text(words))
        hypotheses.append(text(changed))
    return hypotheses, references


def unicode_pairs(count: int, seed: int = 0, longest: int = 12):
    """(hypotheses, references) of arbitrary characters: every script, controls, white space of all kinds, combining marks, what
    is not assigned, but no surrogates; a few words to a text, shared by chance or moved, and empty texts."""
    draw = random.Random(seed)

    def word() -> str:
        if draw.random() < 0.15:
            return draw.choice(ODD)
        if draw.random() < 0.3:
            return draw.choice(SHARED)
        low, high = draw.choice(RANGES)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 4)))

    hypotheses, references = [], []
    for _ in range(count):
        words = [word() for _ in range(draw.randint(0, longest))]
        references.append(draw.choice([" ", " ", " ", "", "\n"]).join(words))
        changed = [word() if draw.random() < 0.4 else kept for kept in words]
        if draw.random() < 0.3:
            draw.shuffle(changed)
        hypotheses.append(draw.choice([" ", " ", " ", "", "\n"]).join(changed))
    return hypotheses, references
