"""Texts to score that are not as they should be: each is told with its file and line, and nothing is scored."""

import gzip
import io
import json
import sys

import pytest

from data.config import DataError
from eval.commands.texts import HYPOTHESIS_FIELDS, REFERENCE_FIELDS, EvalError, Source, Sources


def sources(hypothesis, *references) -> Sources:
    return Sources(
        {"": Source(str(hypothesis), HYPOTHESIS_FIELDS, is_reference=False)},
        [Source(str(reference), REFERENCE_FIELDS, is_reference=True) for reference in references],
    )


def written(folder, name: str, content: bytes | str):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*paths, size: int = 2):
    """Hypotheses and streams of references, put together again."""
    found = sources(*paths)
    batches = list(found.batches(size))
    hypotheses = [text for batch in batches for text in batch.hypotheses[""]]
    assert [batch.first for batch in batches] == list(range(0, found.read, size))
    return hypotheses, [[*batch.references] for batch in batches]


def test_lines_end_at_line_feeds_alone(tmp_path):
    """Other characters that break lines are text; the end of the last line makes no further one, an empty line is one."""
    content = "\ufeffone\u2028still one\r\n\ntwo\x85\x0cstill\n"
    hypotheses, references = read(written(tmp_path, "a", content), written(tmp_path, "b", "x\ny\nz"), size=5)
    assert hypotheses == ["one\u2028still one", "", "two\x85\x0cstill"]
    assert references == [[["x", "y", "z"]]]
    assert list("one\u2028still one".splitlines()) != hypotheses[:1]  # the mutant: str.splitlines


def test_json_lines_in_every_form(tmp_path):
    lines = ['"a"', '{"id": 3, "prediction": "b\\nb"}', '{"prediction": "c"}']
    references = ['{"references": ["a", "A"]}', '"b"', '["c", "C", "č"]']
    hypotheses, streams = read(
        written(tmp_path, "a.jsonl", "\n".join(lines)), written(tmp_path, "b.jsonl", "\n".join(references)), size=3
    )
    assert hypotheses == ["a", "b\nb", "c"]
    assert streams == [[["a", "b", "c"], ["A", None, "C"], [None, None, "č"]]]


RECORDS = [{"id": "1", "prediction": "a, b\nb", "reference": "r1"}, {"id": "2", "prediction": "c", "reference": "r2"}]
TABLES = {
    "a.json": json.dumps(RECORDS),
    "b.json": "\ufeff" + json.dumps(RECORDS, indent=2),
    "c.json": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "d.csv": '\ufeffid;prediction;reference\r\n1;"a, b\nb";r1\r\n2;c;r2\r\n',
    "e.TSV": 'id\tprediction\treference\n1\t"a, b\nb"\tr1\n2\tc\tr2\n',
    "f.JSONL": "".join(json.dumps(record) + "\n" for record in RECORDS),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_and_arrays_give_fields_as_json_lines_do(tmp_path, name, capsys):
    """Not their syntax, line by line: against itself that scored 100."""
    path = written(tmp_path, name, TABLES[name])
    assert read(path, path) == (["a, b\nb", "c"], [[["r1", "r2"]]])
    fields = {"hypotheses": "prediction", "references": "reference"}
    notes = [f"note: {path}: the {which} are the field {field!r} of its records\n" for which, field in fields.items()]
    assert capsys.readouterr().err == "".join(notes)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(TABLES[name].encode()))
    assert read(packed, path) == read(path, packed)


def test_an_array_of_texts(tmp_path):
    path = written(tmp_path, "a.json", '["one", "two"]')
    assert read(path, written(tmp_path, "b.json", '[["1", "eins"], "2"]')) == (["one", "two"], [[["1", "2"], ["eins", None]]])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "blue is the sky,the grass\nno,yes\n", ", record 1: none of the fields .*but blue is the sky, the grass"),
        ("b.csv", "text\nHello, world\n", ", record 1: 2 fields .*the header has 1"),
        ("c.csv", 'text\n"open\n', ", record 1: unexpected end of data"),
        ("d.csv", b"text\nfine\nbr\xffken\n", ", line 3: not UTF-8 .byte 0xff at its byte 3"),
        ("f.json", '{"predictions": ["a", "b"]}', ": one object, with the keys 'predictions', and no list of records"),
        ("g.json", '[{"text": "a"}, {"text": null}]', ", record 2, field 'text': expected a text, got None"),
        ("h.json", '["a",', ": not JSON .Expecting value at character"),
        ("i.json", '"a"\n\n"b"\n', ", line 2: not JSON"),
        ("j.json", "a text\n", ": not JSON"),
        ("k.parquet", b"PAR1", ": not a Parquet file that can be read"),
        ("l.arrow.gz", b"x", ": Arrow is not read yet; convert it: gunzip -k .* && python -c "),
    ],
)
def test_tables_and_arrays_that_hold_no_texts(tmp_path, name, content, told):
    bad = written(tmp_path, name, content)
    with pytest.raises((EvalError, DataError), match=told) as error:
        read(bad, written(tmp_path, "good", "a\nb\n"))
    assert str(error.value).startswith(str(bad))


def test_compressed_files_and_standard_input(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'"one"\n"two"\n'))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1\n2\n")))
    assert read(tmp_path / "a.jsonl.gz", "-") == (["one", "two"], [[["1", "2"]]])


def refused(*paths) -> str:
    with pytest.raises(EvalError) as error:
        read(*paths)
    return str(error.value)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_unequal_numbers_of_lines_say_all(tmp_path, size):
    few, many = written(tmp_path, "few.txt", "1\n" * 3), written(tmp_path, "many.txt", "1\n" * 1200)
    for one, other in ((few, many), (many, few)):
        with pytest.raises(EvalError, match="unequal numbers of lines") as error:
            list(sources(one, other, other).batches(size))
        assert f"{few} has 3" in str(error.value) and f"{many} has 1,200" in str(error.value)


def test_broken_utf8_names_the_line_and_the_byte(tmp_path):
    bad, good = written(tmp_path, "bad.txt", b"fine\nbr\xffken\n"), written(tmp_path, "good.txt", "a\nb\n")
    assert refused(bad, good) == f"{bad}, line 2: not UTF-8 (byte 0xff at its byte 3)"
    assert refused(good, bad) == f"{bad}, line 2: not UTF-8 (byte 0xff at its byte 3)"


def test_files_that_cannot_be_read(tmp_path):
    good = written(tmp_path, "good.txt", "a\n")
    assert refused(tmp_path / "none.txt", good) == f"{tmp_path / 'none.txt'}: no such file"
    assert "is a folder" in refused(tmp_path, good)
    assert "is empty" in refused(written(tmp_path, "e", ""), written(tmp_path, "f", ""))
    assert "is empty" in refused(written(tmp_path, "header.csv", "text\n"), written(tmp_path, "empty.json", "[]"))
    assert "full of NUL bytes (UTF-16?" in refused(written(tmp_path, "utf16", "a text\n".encode("utf-16-le")), good)
    torn = written(tmp_path, "torn.gz", gzip.compress(b"a\n" * 999)[:-9])
    assert f"{torn}: it cannot be read" in refused(torn, good)
    assert f"{good}.gz: it cannot be read" in refused(written(tmp_path, "good.txt.gz", "a\n"), good)
    with pytest.raises(EvalError, match="standard input"):
        sources("-", "-")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON|nested too deep"),
        ('{"instruction": "x", "id": 1}', "hypothesis, prediction.*instruction, id.*--hypothesis-field"),
        ("{}", "nothing"),
        ("3", "expected a text, got 3"),
        ('{"text": null}', "field 'text': expected a text, got None"),
        ('["a", "b"]', "2 texts, expected one hypothesis"),
        ("[]", "0 texts"),
        ('["a", 2]', "expected a text"),
    ],
)
def test_json_lines_that_hold_no_text(tmp_path, line, told):
    bad = written(tmp_path, "bad.jsonl", f'"fine"\n{line}\n')
    with pytest.raises(EvalError, match=told) as error:
        read(bad, written(tmp_path, "good", "a\nb\n"))
    assert str(error.value).startswith(f"{bad}, line 2")


def test_a_reference_may_be_several_and_not_none(tmp_path):
    good = written(tmp_path, "good", "a\n")
    assert "0 texts, expected at least one" in refused(good, written(tmp_path, "bad.jsonl", "[]"))
    assert "or a list of texts" in refused(good, written(tmp_path, "bad.jsonl", "{\"references\": {}}"))
    assert json.loads('"\\ud800"') == read(good, written(tmp_path, "half.jsonl", '"\\ud800"'))[1][0][0][0]
