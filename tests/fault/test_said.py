"""What does not fit is said or refused: text that a tokenizer cannot spell, text that is left out, prompts too long."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import data.__main__
import eval.__main__
import lora.__main__
import lora.peft_io
import model.__main__
import model.hub
import quant.__main__
from data.config import DataConfig, DataError
from data.corpus.ingest import read_corpus
from data.corpus.prepare import prepare
from data.sizes import text_bytes
from data.tokenizer.open import load_tokenizer
from data.transforms.masked import unigram_baseline
from lora.config import LoraConfig
from lora.inject import add_adapters
from model.commands.try_it import example_command
from model.generation_config import HARMLESS, SUPPORTED, UNSUPPORTED, parse_generation_config
from tests.conftest import randomized, tiny_config
from tests.fault.test_command import assert_one_clear_line
from tests.folders import byte_level, llama, write_tokenizer
from tests.runs import SETTINGS, arguments, command, further, write_corpus
from train.runs.lock import refuse_taken

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "list", "of", "words", "."]
ENGLISH, RUSSIAN = "a list of words. ", "список слов. "


def wordpiece(folder: Path, family: str) -> Path:
    """A network with a tokenizer of five words: all others are the unknown token."""
    settings = {"vocab_size": len(VOCABULARY), "bos_id": 2, "eos_id": 3, "pad_id": 0}
    settings |= {"head": "mlm"} if family == "bert" else {}
    model.hub.save(randomized(tiny_config(family, **settings), dtype=torch.float32), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return wordpiece(tmp_path_factory.mktemp("decoder"), "llama")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return wordpiece(tmp_path_factory.mktemp("encoder"), "bert")


def records(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# ---- text that a tokenizer cannot spell


@pytest.fixture
def mixed(tmp_path) -> Path:
    """40 documents; of each one's 11 tokens, 2 are unknown. (No two are duplicates.)"""
    orders = [np.random.default_rng(seed).permutation(["a", "list", "of", "words", "words"]) for seed in range(200)]
    texts = dict.fromkeys(" ".join([*order, "список", "of", *order[:3]]) + "." for order in orders)
    return records(tmp_path / "mixed.jsonl", list(texts)[:40])


def test_shards_say_how_much_is_unknown_when_built_and_when_reused(decoder, mixed, tmp_path):
    config = DataConfig(corpus=(str(mixed),), cache=tmp_path / "cache", dedup=False, val_fraction=0.2)
    tokenizer, heard = load_tokenizer(decoder, len(VOCABULARY)), []
    for _ in range(2):
        said: list[str] = []
        shards = prepare(config, tokenizer=tokenizer, info=said.append)
        heard.append([line for line in said if "unknown" in line])
    (line,), again = heard
    assert heard[0] == again and not shards.is_new
    assert line.startswith("9.1 % of the tokens (40 of 440) are the unknown token ([UNK])")
    split = shards.validation
    assert split.bytes == sum(len(text.encode()) for text in texts_of(split, mixed, tokenizer))
    assert text_bytes(split, tokenizer, split.tokens) == split.bytes > tokenizer.byte_lengths[split.ids[:]].sum()
    half = text_bytes(split, tokenizer, split.tokens // 2)
    assert abs(half / split.bytes - 0.5) < 0.15


def texts_of(split, path, tokenizer) -> list[str]:
    """The documents of a split, found by their ids."""
    ids = np.array(split.ids).tolist()
    text = " ".join(map(str, ids))
    found = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [each for each in found if " ".join(map(str, tokenizer.as_document(tokenizer.encode(each)))) in text]


def test_perplexity_of_unknown_text(decoder, mixed):
    said = command("perplexity", decoder, mixed, "--json", main=eval.__main__.main)
    assert said.code == 0 and "9.1 % of the tokens (40 of 440) are the unknown token" in said.err
    (score,) = json.loads(said.out)["scores"]
    assert score["parts"]["bytes"] == sum(len(json.loads(line)["text"].encode()) for line in mixed.read_text().splitlines())
    assert score["signature"].endswith("|dtype:float32")


def test_quantization_says_it_of_the_text_that_is_scored(decoder, mixed, tmp_path):
    where = ("--cache", tmp_path / "cache", "--out", tmp_path / "small")
    said = command("nf4", decoder, "--corpus", mixed, *where, main=quant.__main__.main)
    assert said.code == 0 and "9.1 % of the tokens (40 of 440) are the unknown token" in said.out, said.err


def test_prompts_and_gaps(decoder, encoder):
    said = command("generate", decoder, "--prompt", ENGLISH + RUSSIAN, "--max-new-tokens", 1, main=model.__main__.main)
    assert said.code == 0 and "25.0 % of the tokens of --prompt (2 of 8) are the unknown token ([UNK])" in said.err
    assert "('список', 'слов.')" in said.err
    said = command("fill", encoder, "a [MASK] слов", main=model.__main__.main)
    assert said.code == 0 and "50.0 % of the tokens of the text (1 of 2)" in said.err
    assert "unknown" not in command("fill", encoder, "a [MASK] of words", main=model.__main__.main).err


def test_a_masked_objective_names_the_cause():
    labels = [torch.tensor([-100, -100])]
    with pytest.raises(DataError, match=r"all tokens of the text are special, as the unknown token is"):
        unigram_baseline(np.array([2, 1, 1, 3]), labels, frozenset({1, 2, 3}), 9)
    with pytest.raises(DataError, match=r"Use more text, or a higher rate"):
        unigram_baseline(np.array([2, 5, 1, 3]), labels, frozenset({1, 2, 3}), 9)


# ---- text that is left out


def test_empty_documents_and_files_are_counted(decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    records(Path("notes/a.jsonl"), [*(f"{ENGLISH}{'a ' * n}" for n in range(30)), *["", " \n"] * 90])
    Path("notes/b.csv").write_text("id,text\n")
    Path("notes/.c.txt").write_text("hidden")
    expected = ["180 empty documents left out", "no record in notes/b.csv", "left out of notes/: 1 hidden file"]
    for _ in range(2):
        options = ("prepare", "--corpus", "notes", "--cache", "cache", "--no-dedup")
        said = command(*options, main=data.__main__.main)
        assert said.code == 0 and all(line in said.out for line in expected), said.out
    said = command("perplexity", decoder, "notes", "--samples", 40, main=eval.__main__.main)
    assert said.code == 0 and all(f"note: {line}" in said.err for line in expected), said.err


def test_counts_of_documents_are_true(tmp_path):
    said: list[str] = []
    (tmp_path / "a.txt").write_text("To be, or not to be.")
    with pytest.raises(DataError, match=r"the corpus has 1 document, and"):
        prepare(DataConfig(corpus=(str(tmp_path),), cache=tmp_path / "cache"), info=said.append)
    assert not any("cut" in line for line in said)
    (tmp_path / "b.txt").write_text("To be, or not to be.")
    with pytest.raises(DataError, match=r"the corpus has 1 document after 1 duplicate was dropped, and"):
        prepare(DataConfig(corpus=(str(tmp_path),), cache=tmp_path / "cache"), info=said.append)


def test_an_array_of_strings_is_read(tmp_path):
    (tmp_path / "a.json").write_text('["one", "two"]')
    said = command("prepare", "--corpus", tmp_path / "a.json", "--text-key", "body", main=data.__main__.main)
    assert_one_clear_line(said, "a.json, record 1: a plain string, which has no key 'body': leave --text-key out")
    assert [each.text for each in read_corpus(DataConfig(corpus=(str(tmp_path / "a.json"),)))] == ["one", "two"]


@pytest.mark.parametrize("kind", ["perplexity", "quant"])
def test_a_table_in_another_encoding_can_be_scored(decoder, tmp_path, kind):
    path = tmp_path / "table.csv"
    rows = [f'{n},"a list of words {"of " * n}caf\xe9"\n' for n in range(60)]
    path.write_bytes(("id,body\n" + "".join(rows)).encode("cp1252"))
    if kind == "perplexity":
        main, line = eval.__main__.main, ["perplexity", decoder, path, "--samples", 40]
    else:
        main, line = quant.__main__.main, ["nf4", decoder, "--corpus", path, "--cache", tmp_path, "--out", tmp_path / "small"]
    refused = command(*line, "--text-key", "body", main=main)
    assert_one_clear_line(refused, "--on-bad-text replace puts U+FFFD in its place, --on-bad-text skip leaves the document out")
    said = command(*line, "--text-key", "body", "--on-bad-text", "replace", main=main)
    assert said.code == 0 and "60 documents of bad text mended with U+FFFD" in said.out + said.err


# ---- prompts that are too long


def test_a_prompt_that_is_cut_and_a_window_that_slides(decoder):
    words, main = ("generate", decoder, "--temperature", 0, "--prompt"), model.__main__.main
    cut = command(*words, "a list " * 20, "--max-new-tokens", 1, main=main)
    assert "the last 32 of 42 tokens of --prompt are read" in cut.err and "grew past" not in cut.err  # with [CLS] and [SEP]
    slid = command(*words, "a list " * 15, "--max-new-tokens", 1, main=main)
    assert slid.code == 0 and "of --prompt are read" not in slid.err and "grew past" not in slid.err


def test_the_note_of_a_window_comes_with_its_first_slide(tmp_path):
    special = ["<s>", "</s>"]
    ids = write_tokenizer(tmp_path, byte_level(special), special, bos_token="<s>", eos_token="</s>")
    llama(tmp_path, eos_token_id=339, bos_token_id=ids["<s>"])
    for count, is_noted in ((25, False), (26, True)):  # 40 tokens and 25 new ones: the last of these is not read
        options = ("--prompt", "zq" * 20, "--max-new-tokens", count, "--temperature", 0)
        said = command("generate", tmp_path, *options, main=model.__main__.main)
        assert said.code == 0 and ("grew past the 64 tokens of the context" in said.err) == is_noted, count


# ---- weights that are no numbers


def spoil(source: Path, folder: Path, value: float = torch.nan) -> Path:
    shutil.copytree(source, folder)
    network = model.hub.load(source)
    with torch.no_grad():
        network.body.blocks[1].mlp.down.weight[3, 5] = value
    model.hub.save(network, folder)
    return folder


def test_a_folder_with_a_weight_that_is_no_number(decoder, encoder, mixed, tmp_path):
    where = r"model.safetensors: in 'model.layers.1.mlp.down_proj.weight' the value at [3, 5] is nan"
    folder, out = spoil(decoder, tmp_path / "spoilt"), ("--out", tmp_path / "out")
    lines = {
        model.__main__.main: [
            ("generate", folder, "--prompt", "a"),
            ("resize", folder, "--vocab-size", 12, *out),
            ("export", folder, *out),
        ],
        eval.__main__.main: [("perplexity", folder, mixed)],
    }
    for main, each in lines.items():
        for line in each:
            assert_one_clear_line(command(*line, main=main), where)
    options = (*arguments({"corpus": mixed, "cache": tmp_path / "cache", "context": 16}), "--init", folder)
    assert_one_clear_line(command(*options, *out), where)
    assert not (tmp_path / "out").exists()
    masked = spoil(encoder, tmp_path / "masked", -torch.inf)
    said = command("fill", masked, "a [MASK]", main=model.__main__.main)
    assert_one_clear_line(said, "bert.encoder.layer.1.output.dense.weight' the value at [3, 5] is -inf")


def test_an_adapter_or_its_base_with_a_weight_that_is_no_number(decoder, tmp_path):
    network = add_adapters(model.hub.load(decoder), LoraConfig(r=2, targets="query-value"))
    lora.peft_io.save(network, tmp_path / "adapter")
    copied, adapted = ("model.layers.1.mlp.down_proj.weight", [3, 5]), ("model.layers.0.self_attn.q_proj.weight", [2, 1])
    base = spoil(decoder, tmp_path / "base")
    options = ("--any-base", "--out", tmp_path / "out")
    said = command("merge", base, tmp_path / "adapter", *options, main=lora.__main__.main)
    assert_one_clear_line(said, f"in {copied[0]!r} the value at {copied[1]} is nan")
    network = model.hub.load(decoder)
    with torch.no_grad():
        network.body.blocks[0].attention.project.query.weight[2, 1] = torch.inf
    model.hub.save(network, base)
    said = command("merge", base, tmp_path / "adapter", *options, main=lora.__main__.main)
    assert_one_clear_line(said, f"in {adapted[0]!r} the value at {adapted[1]} is inf")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = sorted(tensors)[0]
    tensors[name][1, 2] = torch.nan
    safetensors.torch.save_file(tensors, file)
    said = command("generate", tmp_path / "adapter", "--prompt", "a", main=model.__main__.main)
    assert_one_clear_line(said, f"in {name!r} the value at [1, 2] is nan")
    assert not (tmp_path / "out").exists()


def test_logits_that_overflow_end_in_no_traceback(decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "large")
    network = model.hub.load(decoder)
    with torch.no_grad():
        network.body.norm.weight.fill_(3e38)
    model.hub.save(network, tmp_path / "large")
    said = command("generate", tmp_path / "large", "--prompt", "a", main=model.__main__.main)
    assert said.code == 2 and said.err.endswith("error: the network's logits are not finite (in float32)\n")


# ---- names and folders


def test_a_folder_that_is_taken(tmp_path):
    for name in ("metrics.jsonl", "notes.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(ValueError, match="is there already, and is not an empty folder"):
            refuse_taken(tmp_path / name)
    (tmp_path / "died").mkdir()
    (tmp_path / "died" / ".config.toml").write_text("half of a fi")  # a kill before the first file was whole
    refuse_taken(tmp_path / "died")


def test_a_run_that_died_before_its_first_file_begins_anew(options, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml").write_text("")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert command(*options, "--steps", 1, "--out", tmp_path / "run").code == 0


@pytest.mark.parametrize("line", [("--corpus", ""), ("--corpus", "a.txt", ""), ("--out", ""), ("--out=",), ("--cache", "")])
def test_empty_names(line, options):
    assert_one_clear_line(command(*options, *line), f"{line[0].rstrip('=')} '': an empty name")
    for main, words in ((model.__main__.main, ("generate", "")), (quant.__main__.main, ("nf4", "x", "--out", ""))):
        assert_one_clear_line(command(*words, main=main), "'': an empty name")


def test_names_that_begin_with_a_dash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-dash.txt").write_text(ENGLISH)
    assert_one_clear_line(command("--corpus", "-dash.txt"), "-dash.txt: a name that begins with a dash", "write ./-dash.txt")
    said = command("bleu", "-dash.txt", "./-dash.txt", main=eval.__main__.main)
    assert_one_clear_line(said, "write ./-dash.txt")


def test_init_of_the_other_architecture_names_the_objective(options, encoder, tmp_path):
    said = command(*further(options), "--init", encoder, "--out", tmp_path / "run")
    assert_one_clear_line(said, "is one of 'encoder': add --objective classify or mlm")


def test_an_output_that_was_closed_early(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "text")

    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    def said_into_nothing(*_):
        monkeypatch.setattr(sys, "stdout", Closed())

    monkeypatch.setattr("train.loop.introduction", lambda run: (said_into_nothing(), "")[1])
    said = command(*arguments(SETTINGS | {"corpus": corpus, "cache": tmp_path / "cache"}), "--out", tmp_path / "run")
    assert said.code == 2 and f"--resume {tmp_path / 'run'} goes on from step 0, for it has no checkpoint yet" in said.err


def test_a_place_that_cannot_be_written_names_the_option(decoder, tmp_path):
    (tmp_path / "file").write_text("")
    said = command("resize", decoder, "--vocab-size", 12, "--out", tmp_path / "file" / "x", main=model.__main__.main)
    assert_one_clear_line(said, "cannot be made (Not a directory): choose another --out")


# ---- advice, and settings that are not obeyed


def test_the_printed_prompt_has_rows(tmp_path):
    special = ["<s>", "</s>"]
    write_tokenizer(tmp_path / "whole", byte_level(special), special, bos_token="<s>", eos_token="</s>")
    llama(tmp_path / "whole")
    assert example_command(tmp_path / "whole").endswith("--prompt The")
    letter = load_tokenizer(tmp_path / "whole").encode("A")[0]
    for rows, expected in ((letter + 1, "--prompt A"), (letter, "--prompt 1"), (2, f"model info {tmp_path / 'small-2'}")):
        small = tmp_path / f"small-{rows}"
        said = command("resize", tmp_path / "whole", "--vocab-size", rows, "--out", small, main=model.__main__.main)
        assert said.code == 0 and example_command(small).endswith(expected), rows


def test_every_key_of_a_generation_config_is_obeyed_listed_or_harmless():
    keys = set(vars(transformers.GenerationConfig()))
    assert keys <= SUPPORTED | UNSUPPORTED.keys() | HARMLESS, keys - SUPPORTED - UNSUPPORTED.keys() - HARMLESS
    assert not (SUPPORTED & UNSUPPORTED.keys() or SUPPORTED & HARMLESS or UNSUPPORTED.keys() & HARMLESS)


@pytest.mark.parametrize(
    "said, unread",
    [
        ({"num_return_sequences": 3}, ("num_return_sequences",)),
        ({"num_return_sequences": 1, "use_cache": True, "transformers_version": "5.0"}, ()),
        ({"num_beams": 2, "early_stopping": "never"}, ("early_stopping 'never'",)),
        ({"num_beams": 2, "do_sample": True}, ("do_sample beside num_beams",)),
    ],
)
def test_what_is_not_obeyed_is_listed(said, unread):
    assert parse_generation_config(said, tiny_config("llama"), said).unsupported == unread
