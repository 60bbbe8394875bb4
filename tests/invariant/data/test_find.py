"""Which files an entry of --corpus names: through links once each, by globs, and what is said to be left out."""

import gzip
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.config import DataConfig, DataError
from data.corpus.ingest import find_corpus, read_corpus
from data.corpus.prepare import prepare
from eval.commands.scoring import Opened, ReadingNotes, read_documents
from tests.texts import prose


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str = "") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or name)
    return path


def link(name: str, to: str | Path) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(to, name)


def found(*corpus: str) -> list[str]:
    return [str(path) for _, paths in find_corpus(DataConfig(corpus=corpus)) for path in paths]


def left_out(*corpus: str) -> list[str]:
    lines: list[str] = []
    find_corpus(DataConfig(corpus=corpus), lines)
    return lines


# --- links ------------------------------------------------------------------------------------------------------------


def test_linked_folders_and_files_are_read_once_each(place):
    """By the path that is no link, where there is one, so that what was found without links keeps its name."""
    for name in ("store/a.txt", "store/b/c.txt", "far/d.txt", "corpus/own.txt"):
        write(name)
    link("corpus/2-books", place / "store")
    link("corpus/1-again", "2-books")
    link("corpus/0-alias.txt", "own.txt")
    link("corpus/one.txt", "../far/d.txt")
    assert found("corpus") == ["corpus/1-again/a.txt", "corpus/1-again/b/c.txt", "corpus/one.txt", "corpus/own.txt"]
    assert found("corpus", "store", "far/d.txt") == found("corpus")
    assert len(found("store", "corpus")) == 4 and found("store", "corpus")[0] == "store/a.txt"
    assert not left_out("corpus")


@pytest.mark.parametrize("entry", ["corpus", "corpus/**", "corpus/**/*.txt", "corpus/*"])
def test_loops_end(entry):
    """Two links that lead up: a glob that goes round finds 2^40 paths, and does not end."""
    write("corpus/below/a.txt"), write("corpus/b.txt")
    link("corpus/below/up", "..")
    link("corpus/below/round", "../below")
    assert found(entry) == ["corpus/b.txt", "corpus/below/a.txt"]


def test_the_cache_is_no_text_where_it_stands_below():
    """Our own index.json would change the corpus with each build; a corpus that is the cache's folder is still one."""
    write("corpus/a.txt"), write("corpus/cache/key/index.json", "{}")
    for cache, names in (("corpus/cache", ["corpus/a.txt"]), ("corpus", ["corpus/a.txt", "corpus/cache/key/index.json"])):
        assert [str(path) for path in find_corpus(DataConfig(corpus=("corpus",), cache=Path(cache)))[0][1]] == names


def test_links_that_lead_nowhere():
    write("corpus/a.txt"), link("corpus/gone.txt", "/nowhere/b.txt"), link("corpus/self", "self"), link("gone.txt", "c.txt")
    assert found("corpus") == ["corpus/a.txt"]
    assert left_out("corpus") == ["left out of corpus/: links that lead nowhere: corpus/gone.txt, corpus/self"]
    assert left_out("corpus/*.txt") == ["left out of corpus/*.txt: links that lead nowhere: corpus/gone.txt"]
    with pytest.raises(DataError, match=r"gone\.txt: a link to c\.txt, and nothing is there"):
        found("gone.txt")


def test_a_folder_that_cannot_be_read(monkeypatch):
    write("corpus/a.txt"), write("store/b.txt"), link("corpus/books", "../store")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("books"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"corpus/books: cannot be read \(Permission denied\)"):
        found("corpus")


def test_a_file_that_cannot_be_looked_at(monkeypatch):
    write("corpus/a.txt")
    stat = Path.stat

    def refuse(self, **settings):
        if self.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **settings)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(DataError, match=r"corpus/a\.txt: cannot be read \(Permission denied\)"):
        found("corpus")


# --- globs and names --------------------------------------------------------------------------------------------------


def test_a_name_that_exists_is_no_glob():
    for name in ("data[1].txt", "data1.txt", "dir[1]/a.txt", "dir1/b.txt", "~nobody-has-this-name/c.txt"):
        write(name)
    assert found("data[1].txt") == ["data[1].txt"]
    assert found("data[1].tx?") == ["data1.txt"]
    assert found("dir[1]") == found("dir[1]/*.txt") == found("dir[1]/**") == ["dir[1]/a.txt"]
    assert found("di[r]1/*") == ["dir1/b.txt"]
    assert found("~nobody-has-this-name/c.txt") == ["~nobody-has-this-name/c.txt"]


def test_a_file_without_a_suffix_is_text_where_it_is_named(place):
    """text8 and enwik8 have none; in a folder such a file may be anything."""
    write("corpus/text8", "anarchism originated"), write("corpus/a.txt")
    Path("packed.gz").write_bytes(gzip.compress(b"as a term"))
    texts = [document.text for document in read_corpus(DataConfig(corpus=("corpus/text8", "packed.gz")))]
    assert texts == ["anarchism originated", "as a term"]
    assert found("corpus") == found("corpus/*") == ["corpus/a.txt"]
    assert left_out("corpus") == ["left out of corpus/: 1 file without a suffix"]


def test_globs_below_folders():
    for name in ("a/x.txt", "a/b/y.txt", "a/b/z.md", "a/b/c/w.TXT", "a/.hidden/v.txt", "a/.u.txt", "e/x.txt"):
        write(name)
    assert found("a/**/*.txt") == ["a/b/y.txt", "a/x.txt"]
    assert found("**/b/*") == ["a/b/c/w.TXT", "a/b/y.txt", "a/b/z.md"], "a folder that is named is read whole"
    assert found("a/**") == found("a") and len(found("a")) == 4
    assert found("[ae]/**/x.txt") == ["a/x.txt", "e/x.txt"]
    for nothing in ("nowhere/**/*.txt", "a/**/*.csv", "a/*.csv"):
        with pytest.raises(DataError, match="no such file or folder"):
            found(nothing)


def test_files_that_go_while_they_are_read(monkeypatch):
    write("corpus/a.txt"), write("corpus/b.txt")
    documents = read_corpus(DataConfig(corpus=("corpus",)))
    assert next(documents).text == "corpus/a.txt"
    os.unlink("corpus/b.txt")
    with pytest.raises(DataError, match=r"corpus/b\.txt: cannot be read \(No such file"):
        next(documents)
    monkeypatch.setattr("data.corpus.prepare.find_corpus", lambda *_: [("", [Path("corpus/b.txt")])])
    with pytest.raises(DataError, match=r"corpus/b\.txt: cannot be read \(No such file"):
        prepare(DataConfig(corpus=("corpus",), cache=Path("cache")))


# --- what is left out -------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted():
    for name in ("a.txt", "b.html", "c/d.HTML", "e.pdf", "README", "f.tar.gz", "g.gz", ".hidden.pdf", ".git/h.pdf", "i.csv"):
        write(f"corpus/{name}")
    os.mkfifo("corpus/pipe.txt")
    assert left_out("corpus") == [
        "left out of corpus/: 2 files of .html, 1 without a suffix, 1 of .pdf, 1 of .tar.gz, 1 of .gz; "
        "1 hidden file and 1 hidden folder; "
        "neither files nor folders: corpus/pipe.txt"
    ]
    assert left_out("corpus/[ab].*", "corpus/a.txt") == ["left out of corpus/[ab].*: 1 file of .html"]
    with pytest.raises(DataError, match=r"holds no file that is read .*; left out of corpus/c/: 1 file of \.html"):
        found("corpus/c")


def test_what_is_left_out_is_said_once():
    for number in range(30):
        write(f"corpus/{number}.txt", prose(number))
    write("corpus/page.html"), write("corpus/package.json", '{"name": "x"}')
    pages = "left out of corpus/: 1 file of .html"
    objects = "left out, as no list of records: corpus/package.json"
    for is_built in (True, False):
        said: list[str] = []
        prepare(DataConfig(corpus=("corpus",), cache=Path("corpus/cache")), info=said.append)
        assert said.count(pages) == 1 and said.count(objects) == 1
        assert is_built == any("preparing" in line for line in said)
    shutil.rmtree("corpus/cache")
    opened = Opened(Path("model"), None, SimpleNamespace(encode=list, unknown_id=None))
    notes = ReadingNotes()
    assert len(list(read_documents(opened, ("corpus",), notes=notes))) == 30
    assert notes.lines(opened.tokenizer) == [pages, objects]
    with pytest.raises(DataError, match=r"package\.json: one object, with the keys 'name', and no list of records"):
        list(read_corpus(DataConfig(corpus=("corpus/*.json",))))
    write("other/dataset.json", '{"data": []}')
    with pytest.raises(DataError, match=r"other is empty: .*no list of records: other/dataset\.json"):
        list(read_corpus(DataConfig(corpus=("other",))))
