"""Porter's stemmer against nltk's, and the paper's own examples where nltk's mode keeps them."""

import random

from eval import porter
from eval.porter import measure, shape, stem
from tests.compare import count
from tests.pairs import unicode_pairs, word_pairs

SUFFIXES = [*porter.STEP_1A, *porter.STEP_2, *porter.STEP_3, *porter.STEP_4]
SUFFIXES += "y ed ing eed ied ion sion tion logi logies logy ll lle e ling ated bled ized tted ssing *d *ded yed yying".split()
ODD = "a Y ay ies ied ed ing eed ion yyy ayy ayying İ İİ İng ﬁning 1990s 3rd Σίσυφος naïvely a*ded *ded o*ding 's it's".split()
ODD += ["", "İS", "é" * 5 + "ing", "y" * 3000 + "ing", "x" * 40 + "ational", "\x00s"]


def words() -> list[str]:
    """Random letters, vowels often, with one to three endings; all short words of a few letters; text; what is no word."""
    draw = random.Random(0)
    made = []
    for _ in range(25_000):
        letters = draw.choices("aeiouybcdfghlmnprstwxzk", [4] * 5 + [3] + [1] * 17, k=draw.randint(0, 7))
        made.append("".join(letters) + "".join(draw.choices(SUFFIXES, k=draw.choice([1, 1, 2, 3]))))
    for _ in range(8_000):
        made.append("".join(draw.choices("aeysltidng*", k=draw.randint(3, 6))))
    texts = [text for side in (*word_pairs(200), *unicode_pairs(500)) for text in side]
    made += [word for text in texts for word in text.split()]
    return [*made, *porter.IRREGULAR, *map(str.upper, porter.IRREGULAR), *ODD]


def test_equals_nltk(parity):
    import nltk
    from nltk.stem.porter import PorterStemmer

    oracle, vocabulary = PorterStemmer(), sorted(set(words()))
    wrong = [word for word in vocabulary if stem(word) != oracle.stem(word)]
    assert not wrong, wrong[:20]
    assert len(vocabulary) > 30_000 and sum(stem(word) != word.lower() for word in vocabulary) > 18_000
    parity("Porter stemmer", f"nltk {nltk.__version__}", count(wrong), 0, "words with another stem")


def test_the_papers_examples():
    expected = "caresses:caress cats:cat feed:feed agreed:agre plastered:plaster motoring:motor sing:sing hopping:hop"
    expected += " falling:fall hissing:hiss filing:file happy:happi conditional:condit adoption:adopt replacement:replac"
    expected += " roll:roll controll:control"
    pairs = [pair.split(":") for pair in expected.split()]
    assert {word: stem(word) for word, _ in pairs} == dict(pairs)
    assert [measure(word) for word in "tr ee tree y by trouble oats trees ivy troubles private oaten orrery".split()] == (
        [0] * 5 + [1] * 4 + [2] * 4
    )
    assert shape("syzygy") == "cvcvcv" and measure("") == 0
