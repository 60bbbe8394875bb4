"""A downloaded folder through every command: what lies beside its weights, and what its config says beyond what is modelled,
are there in each folder that comes out, with ordinary permissions; and a run is found again from another working directory."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

import lora.__main__
import model.__main__
import model.hub
import quant.__main__
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, change_json, llama, write_tokenizer
from tests.runs import arguments, command, last_checkpoint, stopped_at, write_corpus

BESIDE = {
    "chat_template.jinja": "{{ messages[0].content }}",
    "added_tokens.json": '{"<pad>": 332}',
    "LICENSE": "do as you like",
    "README.md": "# A model",
}
SAID = {  # of config.json: nothing here knows what these mean
    "pretraining_tp": 3,
    "task_specific_params": {"summary": {"max_length": 9}},
    "rope_interleaved": [1, 2],
}
GENERATION = {"eos_token_id": [331, 5], "top_p": 0.75, "repetition_penalty": 1.25, "watermarking_config": {"bias": 2.0}}
LABELS = {"id2label": {"0": "sad", "1": "glad", "2": "so so"}, "label2id": {"sad": 0, "glad": 1, "so so": 2}}
LABELS |= {"problem_type": "single_label_classification"}

FEW = {"context": 16, "batch-size": 2, "steps": 3, "val-fraction": 0.2, "eval-tokens": 200, "log-every": 1, "sample-every": 0}
FEW |= {"threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("travels")
    write_corpus(place / "corpus")
    llama(place / "base", vocab_size=333)
    special = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    write_tokenizer(place / "base", byte_level(["<s>", "</s>", "<pad>"], "<s>"), ["<s>", "</s>", "<pad>"], **special)
    for name, text in BESIDE.items():
        (place / "base" / name).write_text(text)
    change_json(place / "base" / "config.json", **SAID)
    (place / "base" / "generation_config.json").write_text(json.dumps(GENERATION))
    return place


@pytest.fixture(scope="module")
def out(place) -> dict[str, Path]:
    """What each command makes of it."""
    few = FEW | {"corpus": place / "corpus", "cache": place / "cache", "eval-every": 2}
    made = {name: place / name for name in ("run", "exported", "tuned", "merged", "nf4", "resized", "qat")}

    def done(main, *words: object) -> None:
        said = command(*words, **({} if main is None else {"main": main}))
        assert said.code == 0, said.err

    done(None, "--init", place / "base", *arguments(few), "--out", made["run"])
    done(None, "--init", made["run"], "--qat", "int8", *arguments(few), "--out", made["qat"])
    done(None, "--init", made["run"], "--adapter", "lora", *arguments(few), "--out", made["tuned"])
    done(model.__main__.main, "export", made["run"], "--out", made["exported"])
    done(lora.__main__.main, "merge", made["run"], made["tuned"], "--out", made["merged"])
    done(quant.__main__.main, "nf4", made["merged"], "--no-perplexity", "--out", made["nf4"])
    done(model.__main__.main, "resize", made["merged"], "--vocab-size", "400", "--out", made["resized"])
    return made


ENDS = ("run", "qat", "exported", "merged", "nf4", "resized")


@pytest.mark.parametrize("name", ENDS)
def test_what_lies_beside_the_weights(name, out):
    folder = last_checkpoint(out[name]) if name in ("run", "qat") else out[name]
    for file, text in BESIDE.items():
        assert (folder / file).read_text() == text, file
    said = json.loads((folder / "generation_config.json").read_text())
    assert {key: said[key] for key in GENERATION} == GENERATION
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in SAID} == SAID
    assert model.hub.load(folder).config.stop_ids == (5,) or 5 in said["eos_token_id"]
    assert (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()


def test_an_adapter_takes_its_tokenizer_along(out):
    folder = last_checkpoint(out["tuned"])
    assert (folder / "chat_template.jinja").read_text() == BESIDE["chat_template.jinja"]
    assert not (folder / "README.md").exists(), "a base's page is not the adapter's"


def test_files_have_ordinary_permissions(place, out):
    """Those of a file that is made now: readable for whom the umask lets."""
    (place / "new").touch()
    (place / "folder").mkdir()
    usual = {False: stat.S_IMODE((place / "new").stat().st_mode), True: stat.S_IMODE((place / "folder").stat().st_mode)}
    for made in (*out.values(), place / "cache"):
        for path in (made, *made.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == usual[path.is_dir()], path


def test_a_run_is_found_from_another_folder(place, out, tmp_path, monkeypatch):
    """Relative paths were those of the folder that it began in."""
    monkeypatch.chdir(place)
    few = FEW | {"corpus": "corpus", "cache": "cache", "save-every": 1, "init": "run", "adapter": "ia3"}
    said = command(*arguments(few), "--out", "relative")
    assert said.code == 0, said.err
    whole = (last_checkpoint(Path("relative")) / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(last_checkpoint(Path("relative")))
    monkeypatch.chdir(tmp_path)
    again = command("--resume", os.path.relpath(place / "relative"))
    assert again.code == 0, again.err
    assert (last_checkpoint(place / "relative") / "adapter_model.safetensors").read_bytes() == whole
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_names_of_labels(family, tmp_path):
    network = randomized(tiny_config(family, head="sequence", labels=3), dtype=torch.float32)
    model.hub.save(network, tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", **LABELS)
    model.hub.save(model.hub.load(tmp_path / "base"), tmp_path / "saved")
    made = [tmp_path / "saved"]
    int8 = ("int8-dynamic", tmp_path / "base", "--no-perplexity")
    for main, words in ((quant.__main__.main, int8), (model.__main__.main, ("resize", tmp_path / "base", "--vocab-size", 70))):
        said = command(*words, "--out", tmp_path / words[0], main=main)
        assert said.code == 0, said.err
        made.append(tmp_path / words[0])
    for folder in made:
        config = json.loads((folder / "config.json").read_text())
        assert {key: config[key] for key in LABELS} == LABELS, folder
    other = model.hub.load(tmp_path / "base", head="sequence", labels=5)
    model.hub.save(other, tmp_path / "other")
    assert len(json.loads((tmp_path / "other" / "config.json").read_text())["id2label"]) == 5, "the names were of other classes"


def test_after_a_resume_too(place, tmp_path):
    """From the checkpoint that it goes on from: the folder of --init may be gone by then."""
    shutil.copytree(place / "base", tmp_path / "base")
    few = FEW | {"corpus": place / "corpus", "cache": place / "cache", "save-every": 1, "init": tmp_path / "base", "steps": 4}
    said = stopped_at(2, *arguments(few), "--out", tmp_path / "run")
    assert said.code == 130, said.err
    shutil.rmtree(tmp_path / "base")
    said = command("--resume", tmp_path / "run")
    assert said.code == 0, said.err
    folder = last_checkpoint(tmp_path / "run")
    assert folder.name == "step-4"
    for file, text in BESIDE.items():
        assert (folder / file).read_text() == text, file
