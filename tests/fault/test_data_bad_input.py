"""Bad corpora: the error names the file, the place in it, and what to do."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from data.config import DataConfig, DataError
from data.corpus.ingest import read_corpus
from data.corpus.prepare import prepare
from data.sources.files import ReadReport
from data.tokenizer.open import load_tokenizer


def read(*corpus, **settings):
    report = ReadReport()
    return list(read_corpus(DataConfig(corpus=tuple(map(str, corpus)), **settings), report)), report


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_every_kind_of_file_is_read(tmp_path):
    for name in ("a.txt", "b.md", "c.py", "d.txt.gz", "E.TXT"):
        write(tmp_path / name, f"text of {name}\r\n")
    for name in ("f.jsonl", "g.jsonl.gz"):
        write(tmp_path / name, "".join(json.dumps({"text": f"{name} {n}\n\ud83d\ude00"}) + "\n\n" for n in range(2)))
    write(tmp_path / "photo.png", b"\xff")
    write(tmp_path / ".hidden.txt", "hidden")
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "h.txt", "\ufeffbelow")
    documents, report = read(tmp_path)
    texts = [document.text for document in documents]
    assert sorted(texts) == sorted(
        [f"text of {name}\r\n" for name in ("a.txt", "b.md", "c.py", "d.txt.gz", "E.TXT")]
        + [f"{name} {n}\n\U0001f600" for name in ("f.jsonl", "g.jsonl.gz") for n in range(2)]
        + ["below"]
    )
    assert report.documents == 10 and report.bytes == sum(len(text.encode()) for text in texts)
    assert [document.name for document in read(tmp_path)[0]] == [document.name for document in documents]
    assert "text of a.txt\r\n" in [document.text for document in read(tmp_path / "*.txt")[0]]
    assert len(read(tmp_path / "**")[0]) == 10 and len(read(tmp_path, tmp_path / "a.txt")[0]) == 10


def test_path_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"stdlib-doc: .*glob.*stdlib-docs, stdlib-code.*Did you mean stdlib-docs\?"
    ) as caught:
        read("stdlib-doc")
    assert str(tmp_path / "stdlib-doc") in str(caught.value)
    with pytest.raises(DataError, match=r"\*\.txt: no such file or folder"):
        read(tmp_path / "*.txt")


def test_nothing_that_is_read(tmp_path):
    write(tmp_path / "a.pdf", "x")
    for corpus in (tmp_path, tmp_path / "*.pdf"):
        with pytest.raises(DataError, match=r"holds no file that is read.*\.txt \.md \.py \.jsonl"):
            read(corpus)
    with pytest.raises(DataError, match=r"a\.pdf: its suffix.*\.txt \.md \.py \.jsonl"):
        read(tmp_path / "a.pdf")


def test_empty_corpus(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", " \n\t")
    with pytest.raises(DataError, match=r"is empty: no text in it \(2 empty documents"):
        read(tmp_path)


def test_unreadable_file_and_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        read(path)


def test_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read(tmp_path / "pipe.txt")


BROKEN = b"good line\ncaf\xe9 and more"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_broken_utf8(tmp_path, name):
    path = write(tmp_path / name, BROKEN)
    write(tmp_path / "other.txt", "other")
    with pytest.raises(DataError, match=rf"{name}: broken UTF-8 at byte 13 \(0xe9\).*--on-bad-text"):
        read(tmp_path)
    documents, report = read(tmp_path, on_bad_text="replace")
    assert documents[0].text == "good line\ncaf\ufffd and more" and report.replaced == [str(path)]
    documents, report = read(tmp_path, on_bad_text="skip")
    assert [document.text for document in documents] == ["other"] and report.skipped == [str(path)]


def test_utf16_is_guessed(tmp_path):
    with pytest.raises(DataError, match="UTF-16"):
        read(write(tmp_path / "a.txt", "text".encode("utf-16")))


def test_everything_skipped(tmp_path):
    with pytest.raises(DataError, match="1 left out by --on-bad-text skip"):
        read(write(tmp_path / "a.txt", BROKEN), on_bad_text="skip")


GOOD = '{"text": "good"}\n'
BAD_LINES = {
    r":2: not a JSON line": '{"text": "a',
    r":2: a JSON line must be an object or a string, this is a list": "[1, 2]",
    r":2: no key 'text'; its keys: 'body', 'id'\..*--text-key": '{"body": "a", "id": 3}',
    r":2: the value of 'text' is a number, not a string$": '{"text": 3}',
    r":2: not a JSON line \(max": "[" * 100_000,
}


@pytest.mark.parametrize("message", BAD_LINES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_json_line(tmp_path, name, message):
    with pytest.raises(DataError, match=rf"{name}{message}"):
        read(write(tmp_path / name, GOOD + BAD_LINES[message] + "\n" + GOOD))


def test_text_key(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "found"}\n')
    assert read(path, text_key="body")[0][0].text == "found"


@pytest.mark.parametrize(
    "line, message, mended",
    [
        (b'{"text": "a\\ud800b"}\n', r"a\.jsonl:2: lone surrogate \\ud800 in 'text'", "a\ufffdb"),
        (b'{"text": "a\xffb"}\n', r"a\.jsonl:2: broken UTF-8 at byte 28 \(0xff\)", "a\ufffdb"),
    ],
)
def test_bad_text_in_a_json_line(tmp_path, line, message, mended):
    path = write(tmp_path / "a.jsonl", GOOD.encode() + line + GOOD.encode())
    with pytest.raises(DataError, match=message):
        read(path)
    documents, report = read(path, on_bad_text="replace")
    assert documents[1].text == mended and report.replaced == [f"{path}:2"]
    documents, report = read(path, on_bad_text="skip")
    assert len(documents) == 2 and report.skipped == [f"{path}:2"]


@pytest.mark.parametrize(
    "content", [gzip.compress(b"text" * 1000, mtime=0)[:-20], b"no gzip at all", gzip.compress(b"x" * 99, mtime=0)[:5]]
)
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_broken_gzip(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: broken or truncated gzip"):
        read(tmp_path)


def test_corpus_of_one_short_document(tmp_path):
    path = write(tmp_path / "a.txt", "To be, or not to be.")
    with pytest.raises(DataError, match=r"has 1 document, and training and validation need one each\. Add files"):
        prepare(DataConfig(corpus=(str(path),), cache=tmp_path / "cache"))


def test_vocabulary_that_the_corpus_cannot_fill(tmp_path):
    for n in range(30):
        write(tmp_path / f"{n}.txt", f"Document {n} of few words.")
    with pytest.raises(DataError, match=r"--vocab-size 2048 is more than this text can fill.*--vocab-size \d+"):
        prepare(DataConfig(corpus=(str(tmp_path),), vocab_size=2048, cache=tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "cache", "a file stands there")
    with pytest.raises(DataError, match="--cache"):
        prepare(DataConfig(corpus=(str(tmp_path / "a.txt"),), cache=tmp_path / "cache"))


def test_full_disk(tmp_path, monkeypatch):
    for n in range(30):
        write(tmp_path / f"{n}.txt", f"Document {n} of few words. " * 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.corpus.prepare.write_split", full)
    with pytest.raises(DataError, match=r"No space left on device.*--cache"):
        prepare(DataConfig(corpus=(str(tmp_path),), vocab_size=280, cache=tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"corpus": "stdlib-docs"}, "is a string"),
        ({"corpus": ()}, "corpus is empty"),
        ({"vocab_size": 100}, r"--vocab-size 100: from 264 \(3 control ids, 256 bytes, 5 characters\)"),
        ({"val_fraction": 0.0}, r"--val-fraction 0\.0"),
        ({"val_fraction": 1.0}, r"--val-fraction 1\.0"),
        ({"on_bad_text": "ignore"}, "--on-bad-text 'ignore'"),
        ({"corpus": ("a.txt", "")}, "--corpus '': an empty name"),
    ],
)
def test_settings(setting, message):
    with pytest.raises(DataError, match=message):
        DataConfig(**setting)


# --- tokenizers of a folder -------------------------------------------------------------------------------------------

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\n"


def spec(**changes):
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    model["vocab"] = {piece: id for id, piece in enumerate(VOCABULARY.split())}
    added = [{"id": 4, "content": "[MASK]", "special": True} | FLAGS]
    return {"version": "1.0", "added_tokens": added, "model": model} | changes


def test_folder_without_a_tokenizer(tmp_path):
    write(tmp_path / "vocab.json", "{}")
    with pytest.raises(DataError, match=r"no tokenizer can be read there: none of tokenizer\.model, .*vocab\.txt") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match=r"nowhere: no tokenizer can be read there \(No such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"notes\.bin: not a tokenizer's file; readable are tokenizer\.model"):
        load_tokenizer(write(tmp_path / "notes.bin", "x"))


DAMAGED = [
    "{",
    "[]",
    "null",
    "{}",
    '{"model": {}}',
    b"\xff",
    json.dumps(spec(model={"type": "WordPiece", "vocab": [1]})),
    json.dumps(spec(model={"type": "WordPiece", "vocab": {"a": "b"}})),
    json.dumps(spec(pre_tokenizer={"type": "NoSuchThing"})),
    json.dumps(spec(added_tokens=[{"id": 0}])),
    json.dumps(spec())[:-40],
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_tokenizer_json(tmp_path, content):
    pytest.importorskip("tokenizers")
    load_tokenizer(write(tmp_path / "tokenizer.json", json.dumps(spec())))
    write(tmp_path / "tokenizer.json", content)
    with pytest.raises(DataError, match=r"tokenizer\.json: .*(is damaged|cannot read it)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token": {}}'])
def test_damaged_settings_beside_it(tmp_path, name, content):
    write(tmp_path / "tokenizer.json", json.dumps(spec()))
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"tokenizer\.json: the file, or .*{name}.* is damaged"):
        load_tokenizer(tmp_path)


def test_vocab_txt_that_is_none(tmp_path):
    with pytest.raises(DataError, match=r"vocab\.txt: .*no line of it is \[UNK\]"):
        load_tokenizer(write(tmp_path / "vocab.txt", "a\nb\n"))


@pytest.mark.parametrize("id, given", [(3, 4), (10, 4)])
def test_added_token_with_another_id(tmp_path, id, given):
    pytest.importorskip("tokenizers")
    added = {"id": id, "content": "[MASK]", "special": True} | FLAGS
    write(tmp_path / "tokenizer.json", json.dumps(spec(added_tokens=[added])))
    with pytest.raises(DataError, match=rf"tokenizer\.json: it says that '\[MASK\]' has id {id}, .* gives it {given}"):
        load_tokenizer(tmp_path)


def test_no_token_ends_a_document(tmp_path):
    model = spec()["model"] | {"vocab": {"[UNK]": 0, "a": 1}}
    write(tmp_path / "tokenizer.json", json.dumps(spec(model=model, added_tokens=[])))
    tokenizer = load_tokenizer(tmp_path)  # it reads texts; documents to train on need something between them
    assert tokenizer.encode("a") == [1] and (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    with pytest.raises(DataError, match="no token of this tokenizer ends or begins a document"):
        prepare(DataConfig(cache=tmp_path / "cache"), tokenizer=tokenizer)


@pytest.mark.parametrize("name, content", [("tokenizer.json", json.dumps(spec())), ("vocab.txt", VOCABULARY)])
def test_library_that_is_not_installed(tmp_path, monkeypatch, name, content):
    write(tmp_path / name, content)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"library tokenizers: pip install -c constraints\.txt -e '\.\[hub\]'") as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)


def test_model_whose_ids_others_shift(tmp_path):
    write(tmp_path / "sentencepiece.bpe.model", "any")
    with pytest.raises(DataError, match=r"sentencepiece\.bpe\.model: .*shift its ids.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_lone_surrogate_says_which(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer.json", json.dumps(spec())))
    with pytest.raises(UnicodeEncodeError, match="position 1"):
        tokenizer.encode("a\ud800")
