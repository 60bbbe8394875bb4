"""What can go wrong with `python -m quant`: one line that begins with "error: ", code 2, and nothing left behind."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lora.peft_io as peft_io
import model.hub
from lora.config import LoraConfig
from lora.inject import add_adapters
from quant.__main__ import main
from tests.conftest import randomized, tiny_config
from tests.damage import shorten
from tests.fault.test_command import assert_one_clear_line
from tests.runs import command, last_checkpoint

FILE = "model.safetensors"


@pytest.fixture
def place(tmp_path):
    """A folder `in` without a tokenizer, and so without perplexity."""
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path / "in")
    return tmp_path


def quantized(place, *options, folder="in", kind="nf4"):
    """The command, without the second that a picture takes."""
    with patch("quant.plot.plot"):
        return command(kind, place / folder, "--out", place / "out", *options, main=main)


def assert_refused(place, said, *words):
    assert_one_clear_line(said, *words)
    assert not [path for path in place.iterdir() if "out" in path.name], "nothing of DIR, and nothing half-made beside it"


BAD_VALUES = {
    "--block-size 48": ("block_size=48: sizes are 32, 64, 128, 256, 512, 1024, 2048, 4096",),
    "--block-size 0": ("block_size=0: sizes are 32",),
    "--skip .": ("no matrix is left to quantize, with --skip .",),
    "--skip attn mlp": ("no matrix is left to quantize, with --skip attn mlp",),
    "--skip (": ("not regular expressions",),
    "--threads -1": ("--threads -1: must be at least 0",),
    "--threads 9999": ("--threads 9999: must be at most 1024",),
    "--eval-tokens 1": ("--eval-tokens 1: must be at least 2",),
    "--device nonsense": ("--device nonsense: not a device",),
    "--device cuda:99": ("--device cuda:99",),
    "--corpus nowhere": ("no tokenizer can be read there",),
}


@pytest.mark.parametrize("given", BAD_VALUES)
def test_a_bad_value(given, place):
    assert_refused(place, quantized(place, *given.split()), *BAD_VALUES[given])


TOO_FEW = ("nf4", "nf4 --out DIR", "nf4 FOLDER")
UNKNOWN = ("nf3 FOLDER --out DIR", "nf4 FOLDER --out DIR --bits 3", "nf4 FOLDER --out DIR --block-size many")


@pytest.mark.parametrize("given", TOO_FEW + UNKNOWN)
def test_arguments_that_are_too_few_or_unknown(given):
    said = command(*given.split(), main=main)
    assert said.code == 2 and said.err and not said.out
    assert "Traceback" not in said.err


def test_a_corpus_that_is_not_there(finished, tmp_path):
    said = command("nf4", finished, "--out", tmp_path / "out", "--corpus", tmp_path / "nothing", main=main)
    assert_one_clear_line(said, "nothing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantized_already(kind, place):
    assert quantized(place, kind=kind).code == 0
    (place / "out").rename(place / "small")
    assert_refused(place, quantized(place, folder="small"), f"is quantized already ({kind})")
    settings = json.loads((place / "small" / "config.json").read_text())
    del settings["quantization_config"]
    (place / "small" / "config.json").write_text(json.dumps(settings))
    assert_refused(place, quantized(place, folder="small"), "is quantized, but config.json has no quantization_config")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_named(value, place):
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(place / "in" / FILE)
    tensors[name][3, 5] = value
    save_file(tensors, place / "in" / FILE)
    assert_refused(place, quantized(place), f"{name}: the value at [3, 5] is {value}")


def test_a_place_that_is_taken(place):
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("keep this")
    assert_one_clear_line(quantized(place), "is there already, and is not an empty folder")
    assert [path.name for path in (place / "out").iterdir()] == ["mine"]
    shutil.rmtree(place / "out")
    (place / "out").write_text("a file")
    assert_one_clear_line(quantized(place), "is there already, and is not an empty folder")
    assert (place / "out").read_text() == "a file"
    (place / "out").unlink()
    (place / "out").mkdir()
    assert quantized(place).code == 0 and (place / "out" / FILE).is_file()
    assert sorted(path.name for path in place.iterdir()) == ["in", "out"]


def test_a_place_that_is_taken_meanwhile(place):
    def take(*_):
        (place / "out").mkdir()
        (place / "out" / "mine").write_text("keep this")

    with patch("model.folders.copy_auxiliary_files", side_effect=take):
        assert_one_clear_line(quantized(place), "not empty")
    assert [path.name for path in (place / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in place.iterdir()) == ["in", "out"]


def test_folders_that_are_none(place):
    network = add_adapters(model.hub.load(place / "in"), LoraConfig(r=2))
    peft_io.save(network, place / "adapter")
    (place / "empty").mkdir()
    shutil.copytree(place / "in", place / "pickle")
    (place / "pickle" / FILE).rename(place / "pickle" / "pytorch_model.bin")
    shutil.copytree(place / "in", place / "cut")
    shorten(place / "cut" / FILE, 7)
    for folder, words in {
        "adapter": "holds an adapter, not a network",
        "nowhere": "does not exist",
        "empty": "neither a run (no best.json, no last.json) nor a model folder",
        "pickle": "a pickle, which can run code",
        "cut": "the header describes",
    }.items():
        assert_refused(place, quantized(place, folder=folder), words)


def test_a_checkpoint_that_was_changed(halfway, tmp_path):
    with open(last_checkpoint(halfway) / FILE, "r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    said = command("nf4", last_checkpoint(halfway), "--out", tmp_path / "new" / "out", main=main)
    assert_one_clear_line(said, "was changed after it was written")
    assert not (tmp_path / "new").exists()


FULL = "No space left on device"


@pytest.mark.parametrize("error", [SafetensorError(f"I/O error: {FULL}"), OSError(28, FULL)], ids=["safetensors", "system"])
def test_a_full_disk(error, place):
    with patch("model.hub.save_file", side_effect=error):
        assert_refused(place, quantized(place), FULL)


def test_an_end_while_it_is_scored(finished, tmp_path):
    with patch("eval.commands.held_out.evaluate", side_effect=KeyboardInterrupt):
        said = command("nf4", finished, "--out", tmp_path / "out", main=main)
    assert (said.code, said.err) == (130, "interrupted\n") and not list(tmp_path.iterdir())


def test_a_folder_that_could_not_be_put_in_place_is_refused_at_once(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("nf4", finished, "--out", ".", "--no-perplexity", main=main)
    assert said.code == 2 and "runs in" in said.err
    said = command("nf4", finished, "--out", last_checkpoint(finished) / "q", "--no-perplexity", main=main)
    assert said.code == 2 and "lies in the folder that is read" in said.err
