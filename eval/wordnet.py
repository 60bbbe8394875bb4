"""WordNet synonyms, read from a folder of its database files (for example of Debian's package wordnet-base).

    index.noun   lemma  pos  synsets  pointers [symbols]  senses  tagged  offset …     one line a lemma
    data.noun    offset  file  type  words (hexadecimal)  lemma id  lemma id …  | …    one line a synset, at that byte
    noun.exc     irregular form  lemma …

and likewise for verb, adj and adv. A word is looked up unchanged and in its base forms: from the exception list if it is in it,
else by the detachment rules (men -> man).
Source: the manual pages wndb(5WN) and morphy(7WN); Miller 1995. Forms and synsets are those of NLTK's
`WordNetCorpusReader.synsets`: an exception replaces the rules, and the last line of a repeated form counts.
"""

import re
from functools import cached_property
from pathlib import Path

# Part of speech in file names: its letter, and the suffix replacements of the detachment rules.
PARTS = {
    "noun": ("n", "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y"),
    "verb": ("v", "s: ies:y es:e es: ed:e ed: ing:e ing:"),
    "adj": ("a", "er: est: er:e est:e"),
    "adv": ("r", ""),
}
FILES = tuple(name.format(part) for part in PARTS for name in ("index.{}", "data.{}", "{}.exc"))
MARKER = re.compile(r"\([^()]*\)$")  # syntactic marker of an adjective, as in afraid(p)
VERSION = re.compile(r"WordNet (\d+(?:\.\d+)?\+?) Copyright")


class WordNet:
    """A WordNet database folder; indexes are read on first use, synsets at their byte offsets.

    Errors: a missing file (FileNotFoundError with folder and file); a malformed line (ValueError with the file, and the line
    of an index or the byte of a synset).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if missing := [name for name in FILES if not (self.folder / name).is_file()]:
            raise FileNotFoundError(f"{self.folder} is not a WordNet database folder: missing {', '.join(missing)}")
        self._parts = [_Part(self.folder, name, letter, endings) for name, (letter, endings) in PARTS.items()]

    def synonyms(self, word: str) -> frozenset[str]:
        """Return the word and the single-word lemmas of all its synsets, of any part of speech."""
        form = word.lower()
        return frozenset((word,)).union(*(part.lemmas(form) for part in self._parts))

    @cached_property
    def version(self) -> str:
        """WordNet version in the licence at the head of data.adj, or "?"."""
        with open(self.folder / "data.adj", encoding="utf-8", errors="replace") as file:
            head = "".join(line for line, _ in zip(file, range(30), strict=False))
        return found[1] if (found := VERSION.search(head)) else "?"


class _Part:
    """Index, exceptions and synsets of one part of speech."""

    def __init__(self, folder: Path, name: str, letter: str, endings: str) -> None:
        self.folder, self.name, self.letter = folder, name, letter
        self.endings = [pair.split(":") for pair in endings.split()]
        self.synsets: dict[int, list[str]] = {}

    @cached_property
    def index(self) -> dict[str, tuple[int, str]]:
        """Lemma → (line number, line) of the index; the indented licence at its head is skipped."""
        lines = _lines(self.folder / f"index.{self.name}")
        return {line.split(None, 1)[0]: (place, line) for place, line in lines if line.strip() and line[0] != " "}

    @cached_property
    def exceptions(self) -> dict[str, list[str]]:
        lines = (line.split() for _, line in _lines(self.folder / f"{self.name}.exc"))
        return {form: lemmas for form, *lemmas in filter(None, lines)}

    def lemmas(self, form: str) -> list[str]:
        return [name for base in self.bases(form) for offset in self.offsets(base) for name in self.synset(offset)]

    def bases(self, form: str) -> set[str]:
        """Return the form and its possible base forms that are lemmas."""
        detached = [form[: -len(old)] + new for old, new in self.endings if form.endswith(old)]
        return {form, *self.exceptions.get(form, detached)} & self.index.keys()

    def offsets(self, lemma: str) -> list[int]:
        place, line = self.index[lemma]
        try:
            _, letter, synsets, pointers, *rest = line.split()
            senses, _, *offsets = rest[int(pointers) :]
            if letter != self.letter or not 0 < int(synsets) == int(senses) <= len(offsets):
                raise ValueError
            return [int(offset) for offset in offsets[: int(synsets)]]
        except ValueError:
            raise ValueError(f"{self.folder / f'index.{self.name}'}, line {place}: damaged: {line!r:.80}") from None

    def synset(self, offset: int) -> list[str]:
        """Read the single-word lemmas of the synset at this byte offset."""
        if offset not in self.synsets:
            path = self.folder / f"data.{self.name}"
            with open(path, "rb") as file:
                file.seek(offset)
                line = file.readline()
            try:
                fields = line.decode().partition(" | ")[0].split()
                names = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                if fields[0] != f"{offset:08}" or not len(names) == int(fields[3], 16) > 0:
                    raise ValueError
            except (ValueError, IndexError):
                raise ValueError(f"{path}, byte {offset}: not a synset: {line!r:.80}") from None
            self.synsets[offset] = [MARKER.sub("", name) for name in names if "_" not in MARKER.sub("", name)]
        return self.synsets[offset]


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        return list(enumerate(path.read_text(encoding="utf-8").split("\n"), 1))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8") from None
