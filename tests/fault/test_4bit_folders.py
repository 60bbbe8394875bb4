"""Damaged and strange folders in 4-bit form, and weights that cannot be quantized: one HubError that names the thing."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import model.hub
from model.hub import HubError
from quant.bnb_io import to_tensors
from quant.config import FourBit
from quant.linear import quantize_linears
from quant.nf4 import quantize
from tests.conftest import randomized, tiny_config
from tests.damage import damaged, settings, without

NAME = "model.layers.1.mlp.up_proj.weight"  # 40 × 24: 480 bytes, 15 blocks
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    model.hub.save(randomized(tiny_config("llama", tie_embeddings=False), dtype=torch.float32), root / "dense")
    for name, double in {"double": True, "single": False}.items():
        model.hub.save(model.hub.load(root / "dense", quantization=FourBit(double_quantized=double)), root / name)
    return root


def part(name: str, change: Callable[[Tensor], Tensor]):
    """Of one weight; "" is that of the codes."""
    return lambda tensors, config: tensors.update({NAME + name: change(tensors[NAME + name])})


def coded(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def text(content: str):
    return part(STATE.removeprefix(NAME), lambda state: coded(content))


def state(**changes):
    """None takes a field away."""

    def change(old: Tensor) -> Tensor:
        fields = json.loads(bytes(old.tolist())) | changes
        return coded(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return part(STATE.removeprefix(NAME), change)


def quantized(name: str):
    """Another weight, too."""

    def change(tensors: dict, config: dict) -> None:
        small = quantize(tensors.pop(name).reshape(-1, 24))
        tensors.update({name + suffix: value for suffix, value in to_tensors(small).items()})

    return change


def shown(message: str) -> str:
    return re.escape(f"{NAME}: {message}")


UNREADABLE, SENSELESS = shown("its quant_state cannot be read: "), shown("its quant_state is invalid: ")
CASES = {  # name: (folder, change, message)
    "another method": (
        "double",
        settings(quant_method="gptq"),
        "quantization_config has the method 'gptq'; known methods: bitsandbytes, compressed-tensors",
    ),
    "a method that is no name": ("double", settings(quant_method={}), "quantization_config has the method {}"),
    "eight bits": (
        "double",
        settings(load_in_4bit=False, _load_in_4bit=False, load_in_8bit=True),
        "config.json has a quantization_config, but no weight is quantized",
    ),
    "neither 4 nor 8 bits": (
        "double",
        settings(load_in_4bit=False, _load_in_4bit=False),
        "quantization_config asks for neither 4 nor 8 bits",
    ),
    "settings are a list": (
        "double",
        lambda t, c: c.update(quantization_config=[1]),
        r"quantization_config is \[1\], not an object",
    ),
    "settings are a word": ("double", lambda t, c: c.update(quantization_config="nf4"), "is 'nf4', not an object"),
    "settings are false": ("dense", lambda t, c: c.update(quantization_config=False), "is False, not an object"),
    "an unknown scheme": ("double", settings(bnb_4bit_quant_type="nf3"), "unknown scheme 'nf3'; schemes: nf4, fp4"),
    "a list of schemes": ("double", settings(bnb_4bit_quant_type=["nf4"]), r"unknown scheme \['nf4'\]"),
    "products of integers": ("double", settings(bnb_4bit_compute_dtype="int8"), "compute='int8': formats are float32, "),
    "skip is a number": ("double", settings(llm_int8_skip_modules=5), "llm_int8_skip_modules is 5, not a list"),
    "no settings": (
        "double",
        without("quantization_config"),
        "weight' is quantized, but config.json has no quantization_config",
    ),
    "settings alone": (
        "dense",
        lambda t, c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "config.json has a quantization_config, but no weight is quantized",
    ),
    "no state": (
        "double",
        without(STATE),
        rf"model\.safetensors holds '{NAME}\.[a-z_]+', which llama with this config does not have",
    ),
    "not JSON": ("double", text('{"quant'), UNREADABLE + "JSONDecodeError"),
    "nothing": ("double", text(""), UNREADABLE + "JSONDecodeError"),
    "a JSON list": ("double", text("[1]"), UNREADABLE),
    "a JSON number": ("double", text("5"), UNREADABLE),
    "JSON without end": ("double", text("[" * 100_000), UNREADABLE + "RecursionError"),
    "not UTF-8": ("double", part(STATE.removeprefix(NAME), lambda s: 255 - s), UNREADABLE + "UnicodeDecodeError"),
    "state of floats": ("double", part(STATE.removeprefix(NAME), lambda s: s.float()), UNREADABLE),
    "huge shape": ("double", state(shape=[2**31, 2**31]), SENSELESS),
    "large shape": ("double", state(shape=[2**30, 2**30]), shown("packed has 480 numbers, [1073741824, 1073741824] wants ")),
    "negative shape": ("double", state(shape=[-40, -24]), SENSELESS),
    "empty shape": ("double", state(shape=[0, 24]), SENSELESS),
    "shape of fractions": ("double", state(shape=[40.0, 24]), SENSELESS),
    "three axes": ("double", state(shape=[2, 20, 24]), SENSELESS),
    "no shape": ("double", state(shape=None), UNREADABLE + re.escape("KeyError('shape')")),
    "turned": (
        "double",
        state(shape=[24, 40]),
        re.escape(f"{NAME} is of (24, 40), body.blocks.1.mlp.up.weight expects (40, 24)"),
    ),
    "a block of 48": ("double", state(blocksize=48), SENSELESS),
    "a block of 64.0": ("double", state(blocksize=64.0), SENSELESS),
    "a block of '64'": ("double", state(blocksize="64"), SENSELESS),
    "another block": ("double", state(blocksize=128), shown("absmax has 15 numbers, [40, 24] wants 8")),
    "no format": ("double", state(dtype="save"), SENSELESS),
    "no format of weights": ("double", state(dtype="int8"), SENSELESS),
    "a list of formats": ("double", state(dtype=[]), SENSELESS),
    "another type": ("double", state(quant_type="af4"), SENSELESS),
    "a list of types": ("double", state(quant_type=["nf4"]), UNREADABLE),
    "the other's type": ("double", state(quant_type="fp4"), shown("its sixteen values are not those of fp4")),
    "offset of NaN": ("double", state(nested_offset=math.nan), SENSELESS),
    "offset of inf": ("double", state(nested_offset=math.inf), SENSELESS),
    "offset beyond float32": ("double", state(nested_offset=1e300), SENSELESS),
    "offset beyond float64": ("double", state(nested_offset=10**400), SENSELESS),
    "offset in words": ("double", state(nested_offset="one"), UNREADABLE),
    "no offset": ("double", state(nested_offset=None), shown("its quant_state has no nested_offset")),
    "blocks of scales": ("double", state(nested_blocksize=128), shown("scales are quantized in blocks of 128, 256 is")),
    "no blocks of scales": ("double", state(nested_blocksize=None), shown("scales are quantized in blocks of None")),
    "scales of half": ("double", state(nested_dtype="float16"), SENSELESS),
    "no codes": ("double", without(NAME), f"lacks {NAME}"),
    "codes cut": ("double", part("", lambda packed: packed[:-1]), shown("packed has 479 numbers, [40, 24] wants 480")),
    "codes are one number": ("double", part("", lambda packed: torch.tensor(1.0)), shown("packed has 4 numbers")),
    "no absmax": ("double", without(f"{NAME}.absmax"), f"{NAME} has no part 'absmax'"),
    "absmax cut": ("double", part(".absmax", lambda a: a[:-1]), shown("absmax has 14 numbers, [40, 24] wants 15")),
    "absmax of floats": ("double", part(".absmax", lambda a: a.float()), shown("absmax is torch.float32, with nested_absmax")),
    "absmax of integers": (
        "double",
        part(".absmax", lambda a: a.long() + 999),
        shown("absmax is torch.int64, with nested_absmax"),
    ),
    "absmax of bytes": ("single", part(".absmax", lambda a: a.byte()), shown("absmax is torch.uint8, without nested_absmax")),
    "absmax of NaN": ("single", part(".absmax", lambda a: a * math.nan), shown("absmax is not all finite numbers")),
    "absmax of inf": ("single", part(".absmax", lambda a: a * math.inf), shown("absmax is not all finite numbers")),
    "no nested absmax": ("double", without(f"{NAME}.nested_absmax"), shown("absmax is torch.uint8, without nested_absmax")),
    "nested absmax of NaN": (
        "double",
        part(".nested_absmax", lambda a: a * math.nan),
        shown("nested_absmax is not all finite numbers"),
    ),
    "no nested map": (
        "double",
        without(f"{NAME}.nested_quant_map"),
        shown("nested_quant_map has 0 numbers, [40, 24] wants 256"),
    ),
    "nested map of NaN": (
        "double",
        part(".nested_quant_map", lambda m: m * math.nan),
        shown("nested_quant_map is not all finite numbers"),
    ),
    "no map": ("double", without(f"{NAME}.quant_map"), f"{NAME} has no part 'quant_map'"),
    "another map": ("double", part(".quant_map", lambda m: m + 1e-3), shown("its sixteen values are not those of nf4")),
    "map of NaN": ("double", part(".quant_map", lambda m: m * math.nan), shown("its sixteen values are not those of nf4")),
    "map cut": ("double", part(".quant_map", lambda m: m[:8]), shown("quant_map has 8 numbers, [40, 24] wants 16")),
    "embedding": (
        "double",
        quantized("model.embed_tokens.weight"),
        r"model\.embed_tokens\.weight is quantized: .* body\.embedding\.weight, which is not a linear layer's",
    ),
    "norm": ("double", quantized("model.norm.weight"), r"model\.norm\.weight is quantized: .*, which is not a linear layer's"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_refused(case, folders, tmp_path):
    source, change, message = CASES[case]
    with pytest.raises(HubError, match=message):
        model.hub.load(damaged(folders / source, tmp_path / "damaged", change))


ALIKE = {  # other shapes and formats of the same numbers
    "codes in a row": ("double", part("", lambda packed: packed.flatten())),
    "codes as floats": ("double", part("", lambda packed: packed.flatten().view(torch.float32)[:, None])),
    "absmax in a column": ("double", part(".absmax", lambda a: a[:, None])),
    "absmax in a column, single": ("single", part(".absmax", lambda a: a[:, None])),
    "absmax of float64": ("single", part(".absmax", lambda a: a.double())),
    "nested parts in columns": (
        "double",
        lambda t, c: [part(name, lambda v: v[:, None])(t, c) for name in (".nested_absmax", ".nested_quant_map", ".quant_map")],
    ),
    "parts in the other order": (
        "double",
        lambda t, c: [t.update({name: t.pop(name)}) for name in sorted(t, reverse=True)],
    ),
    "the other name for four bits": ("double", lambda t, c: c["quantization_config"].pop("load_in_4bit")),
    "torch's name of a format": ("double", settings(bnb_4bit_compute_dtype="torch.float32")),
    "nothing skipped": ("double", settings(llm_int8_skip_modules=None)),
}


@pytest.mark.parametrize("case", ALIKE)
def test_the_same_numbers_otherwise(case, folders, tmp_path):
    source, change = ALIKE[case]
    found = model.hub.load(damaged(folders / source, tmp_path / "changed", change))
    right, ids = model.hub.load(folders / source), torch.arange(3, 10)[None]
    assert torch.equal(found(ids).logits, right(ids).logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_named(value, folders, tmp_path):
    def spoil(tensors, config):
        tensors[NAME][3, 5] = tensors[NAME][9, 1] = value

    folder = damaged(folders / "dense", tmp_path / "damaged", spoil)
    message = f"the value at [3, 5] is {value}: only numbers finite in float32 can be quantized"
    with pytest.raises(HubError, match=shown(message)):
        model.hub.load(folder, quantization=FourBit())
    model.hub.load(folder, quantization=FourBit(skip=(r"1\.mlp\.up$",)))  # what is skipped is not looked at


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (("(",), r"skip=\['\('\]: not regular expressions: missing \)"),
        (("lm_head", "."), r"no linear layer to quantize, with skip=\['lm_head', '\.'\]"),
    ],
)
def test_what_is_skipped(skip, message, folders):
    with pytest.raises(HubError, match=message):
        model.hub.load(folders / "dense", quantization=FourBit(skip=skip))


def test_a_misshapen_weight_is_named(folders, tmp_path):
    folder = damaged(folders / "dense", tmp_path / "damaged", part("", lambda weight: weight[:3]))
    with pytest.raises(HubError, match=re.escape(f"{NAME!r} has shape (3, 24), body.blocks.1.mlp.up.weight expects (40, 24)")):
        model.hub.load(folder, quantization=FourBit())


@pytest.mark.parametrize(
    ("family", "skip", "name"),
    [
        ("roformer", ("query", "key"), "roformer.encoder.layer.0.attention.self.query.weight"),  # rows in another order there
        ("t5", (r"mlp\.down",), "encoder.block.0.layer.1.DenseReluDense.wo.weight"),  # which transformers keeps
    ],
)
def test_what_the_family_does_not_publish_so_is_not_written(family, skip, name, tmp_path):
    network = quantize_linears(randomized(tiny_config(family), dtype=torch.float32))
    with pytest.raises(
        HubError, match=rf"^{re.escape(name)} was quantized in another layout .* quantize the folder as it is read"
    ):
        model.hub.save(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.hub.save(quantize_linears(randomized(tiny_config(family), dtype=torch.float32), skip=skip), tmp_path / "out")


def test_two_schemes_in_a_network_are_not_written(tmp_path):
    network = quantize_linears(randomized(tiny_config("llama"), dtype=torch.float32), "nf4", ("mlp",))
    with pytest.raises(HubError, match="layers are quantized by two schemes: a quantization_config names one"):
        model.hub.save(quantize_linears(network, "fp4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
