"""A small WordNet database of our own writing, laid out as the real one, byte offsets and all."""

from pathlib import Path

# Part of speech: synsets of lemmas. "s" is an adjective beside the first of the synset before it; (p) marks its place.
SYNSETS = {
    "noun": [
        ("n", "journey voyage trip"),
        ("n", "trip slip"),
        ("n", "automobile car motor_car machine"),
        ("n", "machine device"),
        ("n", "mouse"),
        ("n", "man adult_male"),
        ("n", "fleet"),
        ("n", "rome Eternal_City Rome"),
        ("n", "box case"),
        ("n", "axis"),
        ("n", "ax axe"),
        ("n", "run streak"),
        ("n", "candidat john"),
        ("n", "mat rug"),
        ("n", "set"),
        ("n", "wolf"),
        ("n", "leaf lass fox quiz church bush woman lady"),
    ],
    "verb": [
        ("v", "run operate work"),
        ("v", "run flee"),
        ("v", "see behold"),
        ("v", "make create"),
        ("v", "sit sat"),
        ("v", "update refresh"),
        ("v", "stumble trip"),
        ("v", "carry convey"),
        ("v", "go pass"),
    ],
    "adj": [
        ("a", "large big"),
        ("s", "huge vast(a) set_up(p)"),
        ("a", "fleet(a) swift"),
        ("s", "afloat(p) awash(ip)"),
        ("a", "late"),
        ("a", "nice"),
    ],
    "adv": [("r", "quickly fast"), ("r", "well good"), ("r", "late belatedly")],
}
EXCEPTIONS = {
    "noun": ["mice mouse", "axes ax axis", "axes axis axe", "wolves wolf", "men man"],
    "verb": ["saw see", "ran run", "running run absent", "works see"],
    "adj": ["nicer nice", "best good"],
    "adv": ["best well"],
}
LICENCE = "  1 This small database was written for tests.  \n  2 WordNet 0.1 Copyright of nobody  \n"
LEXNAMES = ["adj.all", "adv.all", "noun.all", "verb.all"]


def write(folder: Path) -> Path:
    """Writes data.*, index.*, *.exc, lexnames; a pointer & leads from an adjective beside another to that one."""
    for part, synsets in SYNSETS.items():
        number, text, head, where = LEXNAMES.index(f"{part}.all"), LICENCE, 0, {}
        for kind, lemmas in synsets:
            offset, names = len(text.encode()), lemmas.split()
            pointers = f"001 & {head:08} a 0000" if kind == "s" else "000"
            frames = " 01 + 02 00" if kind == "v" else ""
            words = " ".join(f"{name} {place:x}" for place, name in enumerate(names))
            text += f"{offset:08} {number:02} {kind} {len(names):02x} {words} {pointers}{frames} | a gloss; \"an example\"  \n"
            head = offset if kind != "s" else head
            for name in names:
                where.setdefault(name.split("(")[0].lower(), []).append(offset)
        letter, lines = synsets[0][0], []
        for lemma, offsets in sorted(where.items()):
            offsets = list(dict.fromkeys(offsets))
            count = len(offsets)
            lines.append(f"{lemma} {letter} {count} 2 @ ~ {count} 0 {' '.join(f'{offset:08}' for offset in offsets)}  \n")
        (folder / f"data.{part}").write_text(text, encoding="utf-8")
        (folder / f"index.{part}").write_text(LICENCE + "".join(lines), encoding="utf-8")
        (folder / f"{part}.exc").write_text("".join(f"{line}\n" for line in EXCEPTIONS[part]), encoding="utf-8")
    (folder / "lexnames").write_text("".join(f"{place:02}\t{name}\t1\n" for place, name in enumerate(LEXNAMES)))
    return folder


def nltk_reader(folder: Path):
    """NLTK's reader of the folder, without its tables for other languages, which want more data."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    if str(folder) not in nltk.data.path:  # it opens no file elsewhere
        nltk.data.path.append(str(folder))

    class English(WordNetCorpusReader):
        def map_wn(self, version="wordnet"):
            return None

    return English(str(folder), object())  # it warns where there is no reader of other languages
