"""The built-in corpus, and the duplicates that must not reach the validation split."""

import hashlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import regex

from data.corpus.cut import cut_at_blank_lines, cut_at_spaces, cut_long_lines
from data.corpus.dedup import deduplicate, find_covered, shingle_overlap, shingles
from data.sources.files import Document
from tests.texts import prose

# --- corpus -----------------------------------------------------------------------------------------------------------


def test_built_in_documentation(documents):
    assert len(documents) > 500
    assert 1_200_000 < sum(len(document.text.encode()) for document in documents) < 4_000_000
    names = [document.name for document in documents]
    assert len(set(names)) == len(names)
    assert not [name for name in names if ".test" in name or "site-packages" in name]
    text = {document.name: document.text for document in documents}
    assert (
        "JSONEncoder.encode(o)\n\nReturn a JSON string representation of a Python" in text["stdlib-docs:json.encoder"]
    )
    assert sum("topic " in name for name in names) > 50


def test_built_in_corpus_imports_nothing():
    names = ["antigravity", "this", "turtle", "pydoc_data.topics"]
    code = (
        "import sys; from data.corpus.stdlib import list_files, read_docs;"
        "paths = [p for p in list_files() if p.stem in ('antigravity', 'this', 'turtle', 'topics')];"
        "found = list(read_docs(paths));"
        f"print(len(found) > 50, set({names}) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"


def test_cut_loses_nothing():
    text = "".join(prose(n, 40) for n in range(50)) + "no end"
    pieces = cut_at_blank_lines(Document("book", text), 1000)
    assert len(pieces) > 8 and "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) < 2000
    unbroken = "line\n" * 5000
    assert "".join(piece.text for piece in cut_at_blank_lines(Document("list", unbroken), 1000)) == unbroken
    assert len(cut_at_blank_lines(Document("list", unbroken), 1000)) > 4


WORDS = "word don\u2019t Zu\u0308rich \U0001f469\u200d\U0001f52c \U0001f1e9\U0001f1ea \u0928\u093f\u0930 \ud55c\uae00".split()


def one_line(seed: int, words: int, spaces: str = " ") -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(spaces.split("|")) for _ in range(words))


LINES = {
    "words": one_line(0, 3000),
    "wide spaces": one_line(1, 2000, " |\u3000|  \t|\x0b\r\n|\u2028"),
    "accents behind spaces": "a \u0301bc  \u0301" * 2000,
    "no space": one_line(2, 3000, ""),
    "characters of four bytes": "\U0001f600" * 5000,
    "lines of two characters": "\r\n" * 5000,
    "accents alone": "\u0301" * 9000,
}


@pytest.mark.parametrize("name", LINES)
def test_one_line_is_cut_where_a_reader_would(name):
    text, size = LINES[name], 300
    pieces = [piece.text for piece in cut_at_spaces(Document("line", text), size)]
    assert "".join(pieces) == text and len(pieces) > 15
    assert all(size - 4 < len(piece.encode()) and len(piece) <= 2 * size for piece in pieces[:-1])
    if name == "accents alone":  # one character for a reader, and longer than any piece
        return
    inside = {found.start() for found in regex.finditer(r"\X", text)}
    borders = np.cumsum([len(piece) for piece in pieces])[:-1].tolist()
    assert set(borders) <= inside
    if name in ("words", "wide spaces"):
        assert all(text[at - 1].isspace() and not text[at].isspace() for at in borders)


def test_cutting_one_line_takes_time_like_its_length():
    """0.04 s here; a cut that copies what is left after each piece moves 24 GB."""
    text = "word " * 8_000_000
    start = time.perf_counter()
    assert len(cut_at_spaces(Document("line", text), 1 << 14)) == 2442
    assert time.perf_counter() - start < 2


def test_what_lines_cut_stays_as_it_was():
    """But for a piece that is most of the text; and what they did not cut is cut at spaces, if it is long."""
    chapters, line = "".join(one_line(n, 400) + "\n" for n in range(9)), one_line(9, 2000)
    most, size = len(chapters.encode()) // 4, len(chapters.encode()) // 80
    pieces = cut_at_blank_lines(Document("book", chapters), size)
    assert len(pieces) == 9 and cut_long_lines(pieces, size, most) == pieces
    again = cut_long_lines(cut_at_blank_lines(Document("book", f"{line}\nThe end.\n"), size), size, most)
    assert len(again) > 40 and again[-1].text == "The end.\n"
    assert len(cut_long_lines(cut_at_blank_lines(Document("line", line), size), size, most)) > 40
    short = Document("line", line[:size])
    assert cut_long_lines(cut_at_blank_lines(short, size), size, most) == [short]


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_exact_and_near_duplicates_go():
    a, b, c = prose(1), prose(2), prose(3, 600)
    texts = {
        "a": a,
        "b": b,
        "c": c,
        "A": "  " + a.upper(),
        "in c": c[500:1200],
        "a+b": a + b,
        "near": c.replace("tan", "tann", 1),
    }
    kept, report = deduplicate([Document(name, text) for name, text in texts.items()])
    assert report.exact == [("A", "a")]
    gone = {name: (holder, share) for name, holder, share in report.near}
    assert gone["in c"][0] in ("c", "near") and gone["in c"][1] > 0.9
    assert {"a", "b"} <= set(gone), "they stand in a+b, and the longest stays"
    assert ("c" in gone) != ("near" in gone)
    assert [document.name for document in kept] == [name for name in texts if name not in gone and name != "A"]
    assert [d.name for d in deduplicate([Document(n, t) for n, t in texts.items()], near=False)[0]] == [
        n for n in texts if n != "A"
    ]


def test_text_put_together_from_several_is_found():
    parts = [prose(n, 400) for n in range(4)]
    patchwork = "".join(" ".join(part.split()[:60]) + " " for part in parts)
    assert set(find_covered([*parts, patchwork])) == {4}
    # The mutant: compared with one text at a time, no text holds half of it.
    assert all(1 not in find_covered([part, patchwork]) for part in parts)


def test_sampling_agrees_with_comparing_everything(monkeypatch):
    texts = [prose(n, 2000) for n in range(6)]
    texts += [texts[0][:6000], texts[1][:2000] + prose(99, 2000)]
    everything = find_covered(texts)
    monkeypatch.setattr("data.corpus.dedup.SAMPLE_ABOVE", 2000)
    sampled = find_covered(texts)
    assert set(sampled) == set(everything) == {6}


def test_texts_without_words():
    assert find_covered(["...", "", "!!"]) == {} and find_covered([]) == {}


def leak(documents, rounds=12):
    """Mean share of the validation split's distinct shingles that training has, over splits by several hashes."""
    hashes = [np.unique(shingles(document.text, 8)) for document in documents]
    ids = np.unique(np.concatenate(hashes), return_inverse=True)[1]
    owner = np.repeat(np.arange(len(documents)), [len(h) for h in hashes])
    shares = []
    for salt in range(rounds):
        digests = [hashlib.sha256(f"{salt}{document.text}".encode()).digest() for document in documents]
        held = np.array([digest[0] < 13 for digest in digests])[owner]
        seen = np.zeros(ids.max() + 1, dtype=bool)
        seen[ids[~held]] = True
        shares.append(seen[np.unique(ids[held])].mean())
    return sum(shares) / rounds


def test_validation_does_not_leak(documents):
    kept, _ = deduplicate(documents)
    after, before = leak(kept), leak(documents)  # 0.02 and 0.10 with Python 3.11
    assert after < 0.04
    assert before > 2 * after, "the mutant: nothing dropped"


def test_default_validation_split_does_not_leak(stdlib_docs):
    texts = [stdlib_docs.tokenizer.decode(getattr(stdlib_docs, name).ids) for name in ("validation", "train")]
    assert shingle_overlap(texts[:1], texts[1:]) < 0.1
