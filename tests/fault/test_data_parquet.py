"""Parquet as a corpus and as records: the same as JSON lines of the same rows, in bounded memory; and files that are not it."""

import datetime
import decimal
import gzip
import io
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.config import DataConfig, DataError
from data.sources.files import ReadReport, read_rows
from data.sources.parquet import BATCH_ROWS, INSTALL, read_parquet
from eval.commands.texts import EvalError, Source
from tests.fault.test_data_bad_input import read
from tests.runs import ROOT, command

RECORDS = [
    {"id": 1, "text": "one", "tags": ["a", "b"], "of": {"score": 0.5, "who": {"name": "x"}}, "is": True},
    {"id": 2, "text": 'two\nlines "é"', "tags": [], "of": {"score": -1.0, "who": {}}, "is": False},
    {"id": 3, "text": " 三 ", "of": {"who": {"name": "y"}}},
]


def saved(path, records=RECORDS, **options):
    table = records if isinstance(records, pyarrow.Table) else pyarrow.Table.from_pylist(records)
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, **options)
    path.write_bytes(gzip.compress(content.getvalue()) if path.suffix == ".gz" else content.getvalue())
    return path


def rows_of(path, on_bad_text="error"):
    report = ReadReport()
    return list(read_rows([path], on_bad_text, report)), report


@pytest.mark.parametrize("name", ["x.parquet", "x.PARQUET.gz"])
@pytest.mark.parametrize("options", [{}, {"row_group_size": 1}, {"use_dictionary": False, "compression": "zstd"}])
def test_rows_are_those_of_json_lines(tmp_path, name, options):
    path, lines = saved(tmp_path / name, **options), tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert [row for _, row in rows_of(path)[0]] == [row for _, row in rows_of(lines)[0]] == RECORDS
    assert [where for where, _ in rows_of(path)[0]] == [f"{path}, record {n}" for n in (1, 2, 3)]
    assert [d.text for d in read(path)[0]] == [d.text for d in read(lines)[0]]
    assert [d.text for d in read(tmp_path)[0]] == 2 * [record["text"] for record in RECORDS]
    with pytest.raises(DataError, match=r"record 1: no column 'body'; its columns: 'id', 'text', 'tags', 'of', 'is'"):
        read(path, text_key="body")
    with pytest.raises(DataError, match="record 1: the value of 'id' is a number, not a string"):
        read(path, text_key="id")


def test_what_is_null_is_missing(tmp_path):
    path = saved(tmp_path / "x.parquet", [{"text": "a", "label": None}, {"text": None, "label": 3}])
    assert [row for _, row in rows_of(path)[0]] == [{"text": "a"}, {"label": 3}]
    with pytest.raises(DataError, match="record 2: no column 'text'"):
        read(path)


def test_values_are_those_of_json(tmp_path):
    moment = datetime.datetime(2026, 11, 30, 1, 2, 3)
    table = pyarrow.table({
        "moment": pyarrow.array([moment], pyarrow.timestamp("ns")),
        "day": [moment.date()],
        "price": [decimal.Decimal("1.50")],
        "raw": [b"caf\xc3\xa9"],
        "map": pyarrow.array([[("k", 1), ("l", None)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "small": pyarrow.array([7], pyarrow.uint8()),
        "half": pyarrow.array(np.array([0.5], np.float16)),
        "word": pyarrow.array(["x"]).dictionary_encode(),
        "large": pyarrow.array(["y"], pyarrow.large_string()),
        "view": pyarrow.array(["z"], pyarrow.string_view()),
        "nested": [[{"deep": [b"b", None]}]],
    })
    ((_, row),) = rows_of(saved(tmp_path / "x.parquet", table))[0]
    assert json.loads(json.dumps(row)) == row
    assert row.pop("moment").startswith("2026-11-30 01:02:03")
    assert row == {
        "day": "2026-11-30", "price": "1.50", "raw": "café", "map": {"k": 1}, "small": 7, "half": 0.5, "word": "x",
        "large": "y", "view": "z", "nested": [{"deep": ["b", None]}],
    }  # fmt: skip


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.binary()])
def test_text_that_is_no_utf8(tmp_path, kind):
    bad = pyarrow.array([b"fine", b"br\xffken"], pyarrow.binary())
    column = bad.view(kind) if kind == pyarrow.string() else bad
    path = saved(tmp_path / "x.parquet", pyarrow.table({"text": column}))
    with pytest.raises(DataError, match=r"record 2: lone surrogate .*the byte 0xff.* in 'text'.*--on-bad-text"):
        read(path)
    assert [d.text for d in read(path, on_bad_text="replace")[0]] == ["fine", "br\ufffdken"]
    documents, report = read(path, on_bad_text="skip")
    assert [d.text for d in documents] == ["fine"] and report.skipped == [f"{path}, record 2"]
    assert [row for _, row in rows_of(path, "replace")[0]] == [{"text": "fine"}, {"text": "br\ufffdken"}]
    within = pyarrow.array([[b"br\xffken"]], pyarrow.list_(pyarrow.binary())).cast(pyarrow.list_(pyarrow.large_binary()))
    nested = saved(tmp_path / "y.parquet", pyarrow.table({"text": within}))
    with pytest.raises(DataError, match=r"record 1: lone surrogate .*the byte 0xff.* in 'text'.*--on-bad-text"):
        rows_of(nested)
    assert rows_of(nested, "replace")[0][0][1]["text"] == ["br\ufffdken"] and rows_of(nested, "skip")[0] == []


def broken(path, how):
    content = bytearray(saved(path, row_group_size=1).read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "bytes":
        content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    elif how == "empty":
        content = b""
    elif how == "text":
        content = b"text,label\n"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["cut", "bytes", "empty", "text"])
def test_files_that_are_not_it(tmp_path, how):
    path = broken(tmp_path / "x.parquet", how)
    with pytest.raises(DataError, match=r"x\.parquet(, record \d)?: not a Parquet file that can be read"):
        read(path)
    with pytest.raises(DataError, match="name the files to read by a glob"):
        read(tmp_path)
    said = command("--corpus", path, "--out", tmp_path / "run")
    assert said.code == 2 and said.err.startswith(f"error: {path}") and "Traceback" not in said.err
    with pytest.raises(EvalError, match=r"x\.parquet"), ExitStack() as stack:
        list(Source(str(path), ("text",), False).texts(stack))


def test_no_row_and_two_columns_of_one_name(tmp_path):
    path = saved(tmp_path / "x.parquet", pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))
    with pytest.raises(DataError, match="is empty: no text in it"):
        read(path)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match="several columns have one name: text, text"):
        rows_of(saved(tmp_path / "y.parquet", twice))


def test_scores_read_it(tmp_path):
    records = [{"prediction": "a", "references": ["b", "c"]}, {"prediction": "d", "references": ["e"]}]
    path = saved(tmp_path / "x.parquet", records)
    with ExitStack() as stack:
        assert list(Source(str(path), ("prediction",), False).texts(stack)) == [["a"], ["d"]]
        assert list(Source(str(path), ("references",), True).texts(stack)) == [["b", "c"], ["e"]]
    with pytest.raises(EvalError, match="no such file"), ExitStack() as stack:
        list(Source(str(tmp_path / "none.parquet"), ("references",), True).texts(stack))


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """64 MB of text in groups of 2,000 rows: 1 to 3 MB are held."""
    path = tmp_path / "x.parquet"
    schema = pyarrow.schema({"text": pyarrow.string(), "other": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
        for group in range(16):
            texts = [f"{group} {n} " + "x" * 990 for n in range(2000)]
            writer.write_table(pyarrow.table({"text": texts, "other": texts}))
    pool = pyarrow.default_memory_pool()
    before, most, rows = pool.bytes_allocated(), 0, 0
    with path.open("rb") as stream:
        for _ in read_parquet(stream, "text"):
            rows += 1
            most = max(most, pool.bytes_allocated() - before) if rows % 500 == 0 else most
    assert rows == 32_000 > 2 * BATCH_ROWS and most < 12_000_000


def test_without_pyarrow_the_command_is_told(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = command("--corpus", path, "--out", tmp_path / "run")
    told = f"error: {path}: Parquet is read by pyarrow, which is not installed: {INSTALL}\n"
    assert said.code == 2 and said.err == told and INSTALL == "pip install -c constraints.txt -e '.[parquet]'"
    with pytest.raises(EvalError, match="which is not installed"), ExitStack() as stack:
        list(Source(str(path), ("text",), False).texts(stack))
    constraints = (Path(ROOT) / "constraints.txt").read_text()
    assert f"pyarrow=={pyarrow.__version__}" in constraints and 'parquet = ["pyarrow' in (ROOT / "pyproject.toml").read_text()


def test_one_column_is_read_where_one_is_wanted(tmp_path, monkeypatch):
    asked, read_batches = [], pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, *args, **options: asked.append(options["columns"]) or read_batches(self, *args, **options),
    )
    path = saved(tmp_path / "x.parquet")
    read(path), rows_of(path)
    assert asked == [["text"], None] and DataConfig().text_key == "text"
