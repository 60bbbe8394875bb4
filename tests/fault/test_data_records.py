"""Tables and JSON arrays as corpora: each record is a document, or the error names the file, the record and its columns."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import DataError
from tests.fault.test_data_bad_input import read, write

LONG = "x" * 200_000  # csv's own limit of a field is 131,072
TEXTS = ["one", 'two\nlines; "q", \ttab', " 三 ", LONG]
ROWS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]


def quoted(separator: str, end: str, mark: str = "") -> str:
    """As spreadsheets write it: each text in quotes, which are doubled in it."""
    rows = ["".join((f"{n}", separator, '"', text.replace('"', '""'), '"', end)) for n, text in enumerate(TEXTS)]
    return f"{mark}id{separator}text{end}" + "".join(rows)


FILES = {
    "commas.csv": quoted(",", "\n"),
    "semicolons.csv": quoted(";", "\r\n", "\ufeff"),
    "tabs.csv": quoted("\t", "\n"),
    "stated.csv": "sep=|\r\n" + quoted("|", "\r\n"),
    "blank.csv": quoted(",", "\n\n") + "\n",
    "old.csv": quoted(",", "\r"),
    "tabs.tsv": quoted("\t", "\r\n"),
    "array.json": json.dumps(ROWS),
    "printed.json": "\n" + json.dumps(ROWS, indent=1, ensure_ascii=False),
    "marked.json": "\ufeff" + json.dumps(ROWS),
    "lines.json": "".join(f"{json.dumps(row)}\n\n" for row in ROWS),
    "appended.jsonl": "".join(f"\ufeff{json.dumps(row)}\n" for row in ROWS),
}


@pytest.mark.parametrize("gz", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("name", FILES)
def test_each_record_is_a_document(tmp_path, name, gz):
    content = FILES[name].encode()
    path = tmp_path / (name.upper() if gz == ".GZ" else name + gz)
    path.write_bytes(gzip.compress(content, mtime=0) if gz else content)
    if gz == ".GZ":
        path = path.rename(f"{path}.GZ")
    documents, report = read(tmp_path)
    assert [document.text for document in documents] == TEXTS and report.documents == 4
    places = [f"{path}:{2 * n + 1}" for n in range(4)] if name == "lines.json" else [f"{path}, record {n}" for n in range(1, 5)]
    assert [document.name for document in documents] == places or name == "appended.jsonl"


def test_text_key_is_a_column(tmp_path):
    write(tmp_path / "a.csv", "body,text\nfound,other\n")
    assert read(tmp_path, text_key="body")[0][0].text == "found"


BAD = {
    "columns.csv": ("id,body\n1,one\n", r", record 1: no column 'text'; its columns: 'id', 'body'\. .*--text-key.* a glob"),
    "keys.json": ('[{"text": "a"}, {"body": "b"}]', r", record 2: no key 'text'; its keys: 'body'\. .*--text-key"),
    "few.csv": ("id,text\n1,one\n2\n", r", record 2: 1 fields \(line 3, separated by ','\), and the header has 2: 'id',"),
    "many.csv": ("text\nHello, world\n", r", record 1: 2 fields .*the header has 1: 'text'"),
    "many.tsv": ("id\ttext\n1\ta\tb\n", r", record 1: 3 fields .*separated by '\\t'"),
    "twice.csv": ("text,id,text\na,b,c\n", r", header: 'text': more than one column"),
    "again.csv": ("id,text\n1,a\n\ufeffid,text\n2,b\n", r", record 2: the header once more"),
    "open.csv": ('id,text\n1,a\n2,"open\n3,b\n4,c\n', r", record 2: unexpected end of data \(line 5\): a quote"),
    "stated.csv": ('sep=;\nid;text\n1;"a\n', r", record 1: unexpected end of data \(line 3\)"),
    "stated-few.csv": ("sep=;\nid;text\n1\n", r", record 1: 1 fields \(line 3, separated by ';'\)"),
    "quote.tsv": ('id\ttext\n1\t"Oh" he said\n', r", record 1: '\t' expected after '\"' \(line 2\): a quote"),
    "null.json": ('[{"text": "a"}, {"text": null}]', r", record 2: the value of 'text' is null, not a string"),
    "nested.json": ('[{"text": {"en": "a"}}]', r", record 1: the value of 'text' is an object, not a string"),
    "list.json": ('[["a"]]', r", record 1: a record must be an object or a string, this is a list"),
    "null-record.json": ('["a", null]', r", record 2: a record must be an object or a string, this is null"),
    "chat.json": (
        '[{"text": [{"role": "user", "content": "Hi"}], "title": "a", "n": 1}]',
        r": the value of 'text' is a list, .*; strings are in 'title': name one by --text-key\. It holds a conversation",
    ),
    "spaced.csv": ("id,text, text\n1,a,b\n", r", header: 'text', ' text': names of columns that differ by white space only"),
    "lines.json": ('{"text": "a"}\n{"text": 3}\n', r":2: the value of 'text' is a number"),
    "broken.json": ('[{"text": "a"},\n{"text": "b"', r": not JSON \(.*line 2 column 13"),
    "broken-lines.json": ('{"text": "a"}\n{"text"\n', r":2: not a JSON line"),
    "deep.json": ("[" * 100_000, r": not JSON \(maximum recursion depth"),
    "object.json": ('{\n"version": 1,\n"data": []}', r": one object, with the keys 'version', 'data', and no list of records"),
    "one.json": ('{"text": "a"}\n', r": one object, with the keys 'text', and no list of records: .*an array, or JSON lines"),
    "empty.csv": ("", r"is empty: no text in it"),
    "header.csv": ("id,text\n", r"is empty: no text in it"),
    "empty.json": ("[]", r"is empty: no text in it"),
    "none.json": ("\n", r"is empty: no text in it"),
    "nulls.csv": ("id,text\n1,\n2,\n", r"is empty: no text in it \(2 empty documents\)"),
    "utf16.csv": ("id,text\n1,a\n".encode("utf-16"), r":1: broken UTF-8 at byte 0 .*UTF-16\? convert it"),
    "utf16-le.tsv": ("id\ttext\n1\ta\n".encode("utf-16-le"), r":1: full of NUL bytes \(UTF-16\? convert it"),
    "utf16-be.txt": ("a text".encode("utf-16-be"), r": full of NUL bytes \(UTF-16\? convert it"),
    "texts.csv": (2 * (",".join(f"{n}{LONG}" for n in range(30)) + "\n\n") + "1" + 29 * ",2", r"the header once more"),
    "headless.csv": (",".join(f"{n}{LONG}" for n in range(30)) + "\n1" + 29 * ",2", r"columns: .{1,2000}and 10 more\."),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_says_where(tmp_path, name):
    content, message = BAD[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json"])
def test_broken_utf8_is_one_documents(tmp_path, name):
    """Also in a record of several lines, of which leaving one out would ruin those behind it."""
    separator = "\t" if name == "a.tsv" else ","
    text = f'id{separator}text\n1{separator}"caf\xe9\nmore"\n2{separator}good\n'
    if name == "a.json":
        text = '[{"text": "caf\xe9\\nmore"},\n{"text": "good"}]'
    path = write(tmp_path / name, text.encode("latin-1"))
    with pytest.raises(DataError, match=r": broken UTF-8 at byte \d+ \(0xe9\)\. --on-bad-text"):
        read(path)
    documents, report = read(path, on_bad_text="replace")
    assert [document.text for document in documents] == ["caf\ufffd\nmore", "good"]
    assert report.replaced == [f"{path}, record 1"]
    documents, report = read(path, on_bad_text="skip")
    assert [document.text for document in documents] == ["good"] and report.skipped == [f"{path}, record 1"]


def test_utf16_without_a_mark_is_mended_or_left_out(tmp_path):
    path = write(tmp_path / "a.txt", "hi".encode("utf-16-le"))
    assert read(path, on_bad_text="replace")[0][0].text == "h\ufffdi\ufffd"
    write(tmp_path / "b.txt", "a text with \0 in it")
    documents, report = read(tmp_path, on_bad_text="skip")
    assert [document.text for document in documents] == ["a text with \0 in it"] and report.skipped == [str(path)]


# --- Arrow ------------------------------------------------------------------------------------------------------------

PYARROW = """
class ipc:
    def open_stream(content):
        return type("Stream", (), {"read_pandas": lambda self: content})()
class memory_map:
    def __init__(self, path): self.content = open(path, "rb").read()
    def to_json(self, path, orient, lines, force_ascii): open(path, "wb").write(self.content)
"""


@pytest.mark.parametrize("name", ["x.arrow", "it's $HOME \"x\".arrow.gz", "caf\udce9.ARROW"])
@pytest.mark.parametrize("entry", ["{}", "*.*", "**", "."])
def test_arrow_is_refused_with_a_command_that_works(tmp_path, monkeypatch, name, entry):
    """Pasted into bash, with a library in pyarrow's place that hands the bytes on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    write(tmp_path / "lib" / "pyarrow.py", PYARROW)
    write(tmp_path / "text.txt", "a text")
    content = b'{"text": "converted"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=r"Arrow is not read yet; convert it: ") as error:
        read(entry.format(name))
    refused, _, command = str(error.value).partition("convert it: ")
    assert name in refused
    environment = os.environ | {"PYTHONPATH": "lib", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", os.fsencode(command)], check=True, env=environment)
    assert read(*tmp_path.glob("*.jsonl"))[0][0].text == "converted"


def test_arrow_and_hidden_parquet(tmp_path):
    write(tmp_path / ".x.parquet", "x"), write(tmp_path / "a.txt", "a text")
    assert len(read(tmp_path)[0]) == 1
    with pytest.raises(DataError, match=r"x\.arrow: Arrow is not read yet; convert it: python -c .*open_stream"):
        read(write(tmp_path / "x.arrow", "x"))
