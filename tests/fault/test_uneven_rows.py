"""Rows that are not whole blocks of four bits: right here on every processor, and said, for bitsandbytes reads them wrongly on
some."""

import warnings
from unittest.mock import patch

import bitsandbytes
import pytest
import torch

import model.hub
from quant.__main__ import main
from quant.config import FourBit, Int8
from quant.linear import quantized_layers
from tests.conftest import randomized, tiny_config
from tests.runs import command

SIZES = {"width": 64, "mlp_width": 96}  # rows of 96 are three blocks of 32, and one and a half of 64


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven") / "dense"
    model.hub.save(randomized(tiny_config("llama", **SIZES), dtype=torch.float32), folder)
    return folder


def saved(dense, folder, settings) -> list[str]:
    """What is warned of."""
    network = model.hub.load(dense, quantization=settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.hub.save(network, folder)
    return [str(each.message) for each in caught]


def test_saving_says_which(dense, tmp_path):
    (said,) = saved(dense, tmp_path / "64", FourBit(block_size=64))
    assert said.startswith("rows are not whole blocks of 64 in 2 of 14 matrices, such as model.layers.0.mlp.down_proj")
    assert "rows of 96" in said and "--block-size 32 (block_size=32) or --skip REGEX" in said
    assert not saved(dense, tmp_path / "32", FourBit(block_size=32))
    assert not saved(dense, tmp_path / "skip", FourBit("fp4", block_size=64, skip=("down",)))
    assert not saved(dense, tmp_path / "int8", Int8())
    (said,) = saved(dense, tmp_path / "128", FourBit("fp4", block_size=128, skip=("down",)))
    assert said.startswith("rows are not whole blocks of 128 in 12 of 12 matrices")
    assert "--block-size 64 (block_size=64)" in said


def test_the_command_says_which(dense, tmp_path):
    with patch("quant.plot.plot"):
        said = command("nf4", dense, "--out", tmp_path / "out", main=main)
        fitting = command("nf4", dense, "--out", tmp_path / "32", "--block-size", 32, main=main)
    assert said.code == fitting.code == 0 and not said.err
    (note,) = [line for line in said.out.splitlines() if line.startswith("note: ")]
    assert "2 of 14 matrices" in note and "--block-size 32" in note
    assert "note: " not in fitting.out


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_the_values_are_those_of_one_long_row(dense, scheme, tmp_path):
    """As its CUDA kernels read them, and its CPU kernels where the matrix is told to be one row: there they cannot be wrong."""
    saved(dense, tmp_path, FourBit(scheme, double_quantized=False))
    small, plain = model.hub.load(tmp_path), model.hub.load(dense)
    for path, layer in quantized_layers(small).items():
        weight = plain.get_parameter(f"{path}.weight").detach()
        packed, state = bitsandbytes.functional.quantize_4bit(weight.view(1, -1), blocksize=64, quant_type=scheme)
        expected = bitsandbytes.functional.dequantize_4bit(packed, state).view(weight.shape)
        assert torch.equal(layer.dequantize(), expected) and (expected - weight).abs().max() < 0.3
