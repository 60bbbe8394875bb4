"""Synonyms against nltk's reader of the same database folder."""

from itertools import chain

import pytest

from eval.wordnet import FILES, WordNet
from tests.compare import count
from tests.wordnet import EXCEPTIONS, SYNSETS, nltk_reader, write

ENDINGS = ("", "s", "es", "ses", "ves", "xes", "zes", "ches", "shes", "men", "ies", "ed", "ing", "er", "est", "d", "r", "e")
ODD = ["", "s", "es", "men", "er", " ", "rome", "ROME", "Rome", "İ", "motor_car", "Set_Up", "set up", "1", "2", "("]


def words() -> list[str]:
    """Lemmas and exceptional forms, also capital, with all endings at their end or in place of their last letters."""
    lemmas = [name.split("(")[0] for synsets in SYNSETS.values() for _, names in synsets for name in names.split()]
    stems = [*lemmas, *chain.from_iterable(line.split() for lines in EXCEPTIONS.values() for line in lines)]
    inflected = [stem[: len(stem) - cut] + ending for stem in stems for cut in range(3) for ending in ENDINGS]
    return [*dict.fromkeys([*inflected, *map(str.capitalize, stems), *map(str.upper, stems), *ODD])]


def nltk_synonyms(reader, word: str) -> set[str]:
    names = {lemma.name() for synset in reader.synsets(word) for lemma in synset.lemmas()}
    return {name for name in names if "_" not in name} | {word}


def test_synonyms_equal_nltk(tmp_path, parity):
    import nltk
    ours, oracle = WordNet(write(tmp_path)), nltk_reader(tmp_path)
    wrong = [word for word in words() if ours.synonyms(word) != nltk_synonyms(oracle, word)]
    assert not wrong, wrong
    assert len(words()) > 2000 and sum(ours.synonyms(word) != {word} for word in words()) > 250
    parity("WordNet synonyms", f"nltk {nltk.__version__}", count(wrong), 0, "words with another set; a small database")


def test_what_a_word_finds(tmp_path):
    wordnet = WordNet(write(tmp_path))
    assert wordnet.synonyms("Trips") == {"Trips", "trip", "journey", "voyage", "slip", "stumble"}
    assert wordnet.synonyms("axes") == {"axes", "axis", "axe", "ax"}  # the last line of a form is it
    assert wordnet.synonyms("running") == {"running", "run", "flee", "operate", "work"}  # the exception alone: no noun "run"
    assert wordnet.synonyms("works") == {"works", "see", "behold"}  # not "work", as the rules have it
    assert wordnet.synonyms("cars") == {"cars", "car", "automobile", "machine"}  # motor_car is of two words
    assert wordnet.synonyms("huger") == {"huger", "huge", "vast"} and wordnet.synonyms("mans") == {"mans", "man"}
    assert wordnet.synonyms("zebra") == {"zebra"}
    assert wordnet.version == "0.1"


def test_a_missing_file_and_damaged_lines_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a WordNet.*index\.noun, data\.noun.*adv\.exc"):
        WordNet(tmp_path / "nowhere")
    for name in FILES:
        (write(tmp_path) / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}.*: missing {name}$"):
            WordNet(tmp_path)
    damage = {  # of the word run: the file, what stands there, in its place, the message
        "a synset fewer": ("index.verb", "run v 2 ", "run v 3 ", r"index\.verb, line \d+: damaged: 'run"),
        "a noun": ("index.verb", "run v ", "run n ", r"index\.verb, line \d+: damaged: 'run"),
        "half a line": ("index.verb", "run v 2 2 @ ~ 2 0 ", "run v 2 \n", r"index\.verb, line \d+: damaged: 'run"),
        "no number": ("index.verb", "run v 2 2 @ ~ 2 0 0", "run v 2 2 @ ~ 2 0 O", r"index\.verb, line \d+: damaged: 'run"),
        "moved bytes": ("data.verb", "  1 This", "  1 Thus this", r"data\.verb, byte \d+: not a synset"),
        "more words": ("data.verb", " v 03 run", " v ff run", r"data\.verb, byte \d+: not a synset"),
        "a word for their number": ("data.verb", " v 03 run", " v zz run", r"data\.verb, byte \d+: not a synset"),
    }
    for name, (file, old, new, message) in damage.items():
        text = (write(tmp_path) / file).read_text(encoding="utf-8")
        assert old in text, name
        (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            WordNet(tmp_path).synonyms("run")
        assert WordNet(tmp_path).synonyms("nicer") == {"nicer", "nice"}, name  # only what is wanted is read
    (write(tmp_path) / "noun.exc").write_bytes(b"mice mouse\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"noun\.exc, byte 11: not UTF-8"):
        WordNet(tmp_path).synonyms("run")
