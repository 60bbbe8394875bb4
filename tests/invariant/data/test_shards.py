"""The split, and shards that are built once."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data.corpus.prepare
import data.tokenizer.training
from data.config import MASK, DataConfig, DataError
from data.corpus.dedup import deduplicate
from data.corpus.ingest import read_corpus
from data.corpus.prepare import prepare
from data.corpus.split import split_documents
from data.sources.files import Document, ReadReport
from data.sources.shards import DamagedError, Split, open_shards
from data.tokenizer.training import VocabularyError, train_tokenizer
from tests.damage import flip_bit, shorten
from tests.texts import prose


@pytest.fixture
def config(tmp_path):
    """A small corpus of 60 documents in a .jsonl."""
    records = ({"text": prose(n), "body": prose(n + 100)} for n in range(60))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(
        corpus=(str(tmp_path / "text.jsonl"),), vocab_size=300, val_fraction=0.2, cache=tmp_path / "cache"
    )


def test_shards_hold_the_documents(stdlib_docs, documents):
    kept, _ = deduplicate(documents)
    parts = split_documents(kept, DataConfig().val_fraction)
    assert stdlib_docs.report["documents"] == len(documents)
    for name in ("train", "validation"):
        part, ids = getattr(stdlib_docs, name), getattr(stdlib_docs, name).ids
        assert isinstance(ids, np.memmap) and ids.dtype == np.uint16
        assert len(ids) == part.tokens and (ids == 1).sum() == (ids == 2).sum() == part.documents == len(parts[name])
        assert stdlib_docs.tokenizer.byte_lengths[ids].sum() == part.bytes
        assert part.targets == part.tokens - part.documents
        assert stdlib_docs.tokenizer.decode(ids[: 1 + int(np.argmax(ids == 2))]) == parts[name][0].text
    assert stdlib_docs.validation.bytes > 50_000
    assert stdlib_docs.tokenizer.vocab_size == 2048
    assert stdlib_docs.train.bytes / stdlib_docs.train.tokens > 2.8


def test_tokenizer_sees_the_training_split_alone(config):
    shards = prepare(config)
    kept, _ = deduplicate(list(read_corpus(config)))
    parts = split_documents(kept, config.val_fraction)
    assert train_tokenizer((d.text for d in parts["train"]), 300).sha256 == shards.tokenizer.sha256
    assert train_tokenizer((d.text for d in kept), 300).sha256 != shards.tokenizer.sha256, "the mutant"


def test_split_ignores_position():
    documents = [Document(str(n), prose(n)) for n in range(100)]
    parts, turned = split_documents(documents, 0.2), split_documents(documents[::-1], 0.2)
    assert {d.name for d in parts["validation"]} == {d.name for d in turned["validation"]}
    alone = split_documents(documents[:50], 0.2)
    assert {d.name for d in alone["validation"]} == {d.name for d in parts["validation"]} & {
        d.name for d in documents[:50]
    }
    assert 5 < len(parts["validation"]) < 40


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_no_split_is_empty(count, fraction):
    parts = split_documents([Document(str(n), prose(n)) for n in range(count)], fraction)
    assert parts["train"] and parts["validation"] and sum(map(len, parts.values())) == count


def test_second_call_reuses_and_reads_nothing(stdlib_docs, config, monkeypatch):
    prepare(config)
    monkeypatch.setattr(data.corpus.prepare, "read_corpus", None)
    start = time.perf_counter()
    assert not prepare(config).is_new
    again = prepare(DataConfig(cache=stdlib_docs.folder.parent))
    assert time.perf_counter() - start < 0.5
    assert stdlib_docs.is_new and not again.is_new and again.folder == stdlib_docs.folder


CHANGES = [{"vocab_size": 310}, {"val_fraction": 0.3}, {"dedup": False}, {"text_key": "body"}, {"on_bad_text": "replace"}]


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_builds_anew(config, change):
    first = prepare(config)
    second = prepare(DataConfig(**{**vars(config), **change}))
    assert second.is_new and second.folder != first.folder


def test_changed_corpus_builds_anew(config):
    first = prepare(config)
    with open(config.corpus[0], "a") as stream:
        stream.write(json.dumps({"text": prose(1000)}) + "\n")
    second = prepare(config)
    assert second.is_new and second.report["documents"] == first.report["documents"] + 1


def test_given_tokenizer_is_used(config):
    tokenizer = train_tokenizer([prose(n) for n in range(500, 520)], 290)
    shards = prepare(config, tokenizer=tokenizer)
    assert shards.tokenizer.sha256 == tokenizer.sha256
    assert not prepare(config, tokenizer=tokenizer).is_new and prepare(config).is_new


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_are_equal_byte_for_byte(config, tmp_path):
    first = contents(prepare(config).folder)
    shutil.rmtree(config.cache)
    assert contents(prepare(config).folder) == first


def test_many_pieces_take_four_bytes(config):
    tokenizer = train_tokenizer([prose(n) for n in range(20)], 290)
    tokenizer.vocab_size = 70_000
    tokenizer.encode = lambda text: [69_999] * 3
    shards = prepare(config, tokenizer=tokenizer)
    assert shards.train.ids.dtype == np.uint32 and shards.train.ids[1] == 69_999


DAMAGE = {
    "train.bin has": lambda folder: shorten(folder / "train.bin", 2),
    "tokenizer.model": lambda folder: flip_bit(folder / "tokenizer.model", 100),
    "validation.bin: No such file": lambda folder: (folder / "validation.bin").unlink(),
    "index.json cannot be read": lambda folder: (folder / "index.json").write_text("{"),
    "index.json has format": lambda folder: (folder / "index.json").write_text('{"format": 999}'),
    "index.json: No such file": lambda folder: (folder / "index.json").unlink(),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_damaged_cache_is_noticed_and_rebuilt(config, why):
    first = prepare(config)
    whole = contents(first.folder)
    DAMAGE[why](first.folder)
    said = []
    again = prepare(config, info=said.append)
    assert again.is_new and contents(again.folder) == whole
    assert any("damaged" in line and why in line for line in said)
    assert [path.name for path in config.cache.iterdir()] == [first.folder.name], "something was left behind"


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_at_once(config, damaged):
    if damaged:
        shorten(prepare(config).folder / "train.bin", 2)
    code = (
        "import sys; from pathlib import Path; from data.config import DataConfig; from data.corpus.prepare import prepare;"
        f"config = DataConfig({config.corpus!r}, vocab_size=300, val_fraction=0.2, cache=Path(sys.argv[1]));"
        "made = prepare(config);"
        "print(made.folder, len(made.train.ids))"
    )
    command = [sys.executable, "-c", code, str(config.cache)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate() for process in both]
    assert answers[0][0] and answers[0] == answers[1] and not answers[0][1], answers
    assert len(list(config.cache.iterdir())) == 1


def test_failed_build_leaves_nothing(config, monkeypatch):
    monkeypatch.setattr(data.corpus.prepare, "write_split", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config)
    assert list(config.cache.iterdir()) == []


def test_one_long_file_is_cut(tmp_path):
    (tmp_path / "book.txt").write_text("".join(prose(n, 80) for n in range(300)))
    said = []
    shards = prepare(DataConfig(corpus=(str(tmp_path),), vocab_size=300, cache=tmp_path / "cache"), info=said.append)
    assert shards.report["documents"] == 1 and shards.report["cut_into"] > 40
    assert shards.validation.documents >= 1 and any("cut after blank lines" in line for line in said)


SHAPES = {
    "one line": (["{}"], " and long lines at white space, into"),
    "two lines of two files": (["{}", "{}"], " and long lines at white space, into"),
    "one of them short": (["{}\nThe end.\n"], " and long lines at white space, into"),
    "a JSON line": (['{{"text": "{}"}}'], " and long lines at white space, into"),
    "old line ends": (["{}"], "cut after blank lines into"),
    "lines": (["{}"], "cut after blank lines into"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_few_lines_can_be_split(tmp_path, shape):
    (tmp_path / "text").mkdir()
    files, how = SHAPES[shape]
    end = {"old line ends": "\r\r", "lines": "\n\n"}.get(shape, " ")
    for n, form in enumerate(files):
        text = form.format("".join(prose(100 * n + k, 80).strip() + end for k in range(60)))
        (tmp_path / "text" / f"{n}{'.jsonl' if 'JSON' in shape else '.txt'}").write_bytes(text.encode())
    said = []
    shards = prepare(DataConfig(corpus=(str(tmp_path / "text"),), vocab_size=300, cache=tmp_path / "cache"), info=said.append)
    assert [line for line in said if how in line]
    assert shards.report["documents"] == len(files) and shards.report["cut_into"] > 40
    assert 0 < shards.validation.bytes < shards.train.bytes / 4
    assert shards.train.bytes + shards.validation.bytes > 0.9 * sum(p.stat().st_size for p in (tmp_path / "text").iterdir())


# --- a vocabulary that nobody asked for -------------------------------------------------------------------------------

FEW = "the text can fill {:,} pieces, fewer than the default 2,048: the tokenizer has these"


@pytest.mark.parametrize("controls", [(), (MASK,)])
def test_an_unset_vocabulary_is_what_the_text_can_fill(config, controls):
    unset, said = replace(config, vocab_size=None), []
    shards = prepare(unset, controls=controls, info=said.append)
    size = shards.tokenizer.vocab_size
    assert 300 < size < 2048 and FEW.format(size) in said and shards.is_new
    assert (shards.tokenizer.mask_id == 3) == bool(controls)
    again = prepare(unset, controls=controls, info=said.append)
    resolved = prepare(replace(config, vocab_size=size), controls=controls)
    assert not again.is_new and not resolved.is_new and shards.folder == again.folder == resolved.folder
    assert said.count(FEW.format(size)) == 2 and len([line for line in said if "training" in line]) == 1
    for more in (2048, size + 1):
        with pytest.raises(DataError, match=f"--vocab-size {more} is more than this text can fill.* --vocab-size {size},"):
            prepare(replace(config, vocab_size=more), controls=controls)
    shutil.rmtree(shards.folder)
    assert prepare(unset, controls=controls).tokenizer.sha256 == shards.tokenizer.sha256
    shutil.rmtree(config.cache)
    assert prepare(replace(config, vocab_size=size), controls=controls).tokenizer.sha256 == shards.tokenizer.sha256


def test_a_text_that_fills_the_default_has_the_shards_that_it_had(stdlib_docs):
    """Named by the same key, whether 2,048 is asked for or not."""
    config = DataConfig(cache=stdlib_docs.folder.parent)
    assert prepare(config).folder == prepare(replace(config, vocab_size=2048)).folder == stdlib_docs.folder
    assert not list(config.cache.glob("*.json")), "no note is needed"


def test_a_damaged_note_is_made_again(config):
    unset = replace(config, vocab_size=None)
    shards = prepare(unset)
    (note,) = config.cache.glob("*.json")
    for content in ("{", "[]", '{"vocab_size": null}', ""):
        note.write_text(content)
        again = prepare(unset)
        assert again.folder == shards.folder and json.loads(note.read_text()) == {"vocab_size": shards.tokenizer.vocab_size}


def test_a_text_that_fills_too_little(tmp_path):
    (tmp_path / "a.txt").write_text("a"), (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match=r"this text can fill 26\d pieces, and a tokenizer has 264 at the least: use more text"):
        prepare(DataConfig(corpus=(str(tmp_path),), cache=tmp_path / "cache"))


def test_a_smaller_vocabulary_may_be_filled_still_less(monkeypatch, config):
    """It has room for fewer characters: sizes are tried until one is filled."""
    tried, largest = [], {2048: 900, 900: 400}

    def limited(texts, size, controls):
        tried.append(size)
        if size in largest:
            raise VocabularyError("too many", largest[size])
        return train_tokenizer(texts, size, controls)

    monkeypatch.setattr(data.tokenizer.training, "train_tokenizer", limited)
    assert prepare(replace(config, vocab_size=None)).tokenizer.vocab_size == 400 and tried == [2048, 900, 400]


# --- reports ----------------------------------------------------------------------------------------------------------


def test_report_counts_what_was_left_out(tmp_path):
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(prose(n))
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    report = ReadReport()
    list(read_corpus(DataConfig(corpus=(str(tmp_path),), on_bad_text="skip"), report))
    assert (report.documents, report.empty, report.skipped) == (5, 1, [str(tmp_path / "bad.txt")])


# --- command line -----------------------------------------------------------------------------------------------------


def test_help_and_config_import_no_torch():
    start = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-m", "data", "prepare", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 3 and "--on-bad-text" in shown.stdout  # 0.3 s on a machine that is not busy
    code = "import sys, data.config, data.__main__; print({'torch', 'numpy', 'sentencepiece'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_command_prepares_and_names_errors(config):
    arguments = [
        sys.executable,
        "-m",
        "data",
        "prepare",
        "--vocab-size",
        "300",
        "--cache",
        str(config.cache),
        "--corpus",
    ]
    done = subprocess.run([*arguments, config.corpus[0]], capture_output=True, text=True, check=True)
    assert "bytes/token" in done.stdout and str(config.cache) in done.stdout and not done.stderr
    failed = subprocess.run([*arguments, str(Path(config.corpus[0]) / "no")], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


def test_shards_open_again_by_themselves(config):
    """Without a tokenizer or with the one they were made with; with another, or with a byte less, not at all."""
    made = prepare(config)
    again = open_shards(made.folder, is_new=False)
    assert isinstance(again.train, Split) and not again.is_new and again.tokenizer.sha256 == made.tokenizer.sha256
    for name in ("train", "validation"):
        mine, other = getattr(made, name), getattr(again, name)
        assert np.array_equal(mine.ids, other.ids) and (mine.tokens, mine.documents, mine.bytes) == (
            other.tokens, other.documents, other.bytes
        )  # fmt: skip
        assert other.targets == other.tokens - other.documents and other.smallest_source == other.tokens
    stranger = train_tokenizer((prose(n) for n in range(40)), 280)
    with pytest.raises(DamagedError, match="is not the one they were made with"):
        open_shards(made.folder, False, stranger)
    path = again.validation.path
    shorten(path)
    with pytest.raises(DamagedError, match=path.name):
        open_shards(made.folder, is_new=False)
