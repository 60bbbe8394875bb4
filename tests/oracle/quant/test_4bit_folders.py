"""Folders in bitsandbytes' 4-bit form, transformers' and ours, each opened by the other: the same codes, the same logits.

Rows of every matrix are whole blocks here: where they are not, bitsandbytes' own values depend on the processor (`believed`).
"""

import json
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import model.hub
from model.generate import generate
from model.rope import halves_to_interleaved
from model.weights import to_published, weight_table
from quant.bnb_io import read_config
from quant.config import FourBit
from quant.layer import QuantizedLinear, ReorderedLinear
from quant.linear import dense_weight, quantize_linears
from tests.compare import count, differing, relative
from tests.conftest import randomized, tiny_config
from tests.oracle.believed import without_packing
from tests.oracle.lora.test_peft_io import inputs
from tests.oracle.model.test_network import CLASSES, how

LIBRARY = f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
EXACT = (0, "numbers whose bits differ")
ROUNDING = {
    torch.float32: (5e-6, "float32 rounding; sums in another order, through two layers"),
    torch.bfloat16: (2**-5, "bfloat16 rounds to 2^-8 at each step; dense networks of the two are as far apart"),
}

SIZES = {"width": 64, "mlp_width": 128}
CASES = {  # name: (family, changes, scheme, double, dtype, what else BitsAndBytesConfig is told)
    "llama": ("llama", {"tie_embeddings": False}, "nf4", True, torch.float32, {}),
    "llama, bf16": ("llama", {"tie_embeddings": False}, "nf4", False, torch.bfloat16, {"bnb_4bit_compute_dtype": "bfloat16"}),
    "gpt2": ("gpt2", {}, "fp4", False, torch.float32, {}),
    "bert": ("bert", {}, "nf4", False, torch.float32, {}),
    "roformer": ("roformer", {}, "fp4", True, torch.float32, {}),
    "t5": ("t5", {"free_head_width": 32}, "nf4", True, torch.float32, {}),
    "qwen2": ("qwen2", {}, "nf4", True, torch.float32, {"bnb_4bit_quant_storage": torch.bfloat16}),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Case:
    """The dense folder of a random network, and what transformers makes of it in four bits."""

    def __init__(self, name: str, root: Path):
        family, changes, self.scheme, self.double_quantized, self.dtype, more = CASES[name]
        self.config = tiny_config(family, **(SIZES | changes))
        self.dense, self.folder = root / "dense", root / "4-bit"
        model.hub.save(randomized(self.config, dtype=self.dtype), self.dense)
        asked = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=self.scheme, bnb_4bit_use_double_quant=self.double_quantized, **more
        )
        self.theirs = opened(self.config, self.dense, quantization_config=asked)
        self.theirs.save_pretrained(self.folder)
        self.batch = inputs(self.config)
        self.settings = FourBit(self.scheme, self.double_quantized)

    @torch.no_grad()
    def logits(self, network: nn.Module) -> Tensor:
        return network(**self.batch).logits.float()


def opened(config, folder, **options) -> nn.Module:
    kind = CLASSES[config.architecture]
    return without_packing(kind.from_pretrained(folder, attn_implementation=how(config), **options).eval())


@pytest.fixture(scope="module")
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture
def label(request) -> str:
    return request.node.callspec.params["case"]


each = pytest.mark.parametrize("case", CASES, ids=list(CASES), indirect=True)


def small_layers(case, network) -> dict[str, QuantizedLinear]:
    """By the published name of the layer."""
    table = weight_table(case.config)
    layers = {path: module for path, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    return {table[f"{path}.weight"].published.removesuffix(".weight"): layer for path, layer in layers.items()}


def their_layers(theirs) -> dict[str, nn.Module]:
    return {path: module for path, module in theirs.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def tensors(folder) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def settings(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@each
def test_ours_reads_theirs(case, parity, label):
    ours, expected = model.hub.load(case.folder), case.logits(case.theirs)
    assert relative(case.logits(model.hub.load(case.dense)), expected) > 0.1  # four bits are seen, and other weights would be
    parity(f"4-bit folders, in: {label}", LIBRARY, relative(case.logits(ours), expected), *ROUNDING[case.dtype])
    mine, theirs = small_layers(case, ours), their_layers(case.theirs)
    assert set(mine) == set(theirs) and len(mine) >= 8
    apart = 0.0
    for name, layer in mine.items():
        weight = theirs[name].weight
        apart += differing(layer.weight.dequantize(), bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
        turned = isinstance(layer, ReorderedLinear)
        assert turned == (label == "roformer" and ("query" in name or "key" in name))
        rows = halves_to_interleaved(dense_weight(layer), case.config.head_width) if turned else dense_weight(layer)
        apart += differing(rows, layer.weight.dequantize())
    parity(f"4-bit folders, weights: {label}", LIBRARY, count(apart), *EXACT)


@each
def test_theirs_reads_ours(case, parity, label, tmp_path):
    """Quantized as it is read; and what is written is what transformers writes, where both quantize."""
    ours = model.hub.load(case.dense, quantization=case.settings)
    model.hub.save(ours, tmp_path)
    theirs = opened(case.config, tmp_path)
    mine = small_layers(case, ours)
    assert set(mine) == set(their_layers(theirs))
    parity(f"4-bit folders, out: {label}", LIBRARY, relative(case.logits(ours), case.logits(theirs)), *ROUNDING[case.dtype])
    written, expected = tensors(tmp_path), tensors(case.folder)
    both = {name for layer in mine for name in expected if name.startswith(f"{layer}.weight")}
    assert both == {name for name in written if any(name.startswith(f"{layer}.weight") for layer in mine)}
    assert len(both) == len(mine) * (6 if case.double_quantized else 4)
    apart = 0.0
    for name in both:
        if ".quant_state." in name:
            assert json.loads(bytes(written[name].tolist())) == json.loads(bytes(expected[name].tolist()))
        else:
            apart += differing(written[name], expected[name].view(written[name].dtype).view(written[name].shape))
    parity(f"4-bit folders, bytes: {label}", LIBRARY, count(apart), *EXACT)
    assert settings(tmp_path).keys() == settings(case.folder).keys()
    linear = {path for path, module in theirs.named_modules() if type(module) is nn.Linear}
    assert set(settings(tmp_path)["llm_int8_skip_modules"]) >= linear
    loaded = model.hub.load(tmp_path)
    assert torch.equal(case.logits(loaded), case.logits(ours))


@each
def test_theirs_reads_quantize_linears(case, parity, label, tmp_path):
    skip = {"t5": (r"mlp\.down",), "roformer": ("query", "key")}.get(label, ())
    ours = quantize_linears(model.hub.load(case.dense), case.scheme, skip, double_quantized=case.double_quantized)
    model.hub.save(ours, tmp_path)
    theirs = opened(case.config, tmp_path)
    assert set(small_layers(case, ours)) == set(their_layers(theirs))
    parity(f"4-bit folders, out: {label}", LIBRARY, relative(case.logits(ours), case.logits(theirs)), *ROUNDING[case.dtype])


@pytest.mark.parametrize("case", ["llama", "gpt2"], indirect=True)
def test_several_files(case, parity, label, tmp_path):
    """A weight's parts may lie in several; in ours they do."""
    case.theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    ours = model.hub.load(tmp_path / "theirs")
    error = relative(case.logits(ours), case.logits(case.theirs))
    parity(f"4-bit folders, in: {label}, shards", LIBRARY, error, *ROUNDING[case.dtype])
    model.hub.save(ours, tmp_path / "ours", shard_bytes=2100)
    files = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(file != files[name.partition(".absmax")[0]] for name, file in files.items() if name.endswith(".weight.absmax"))
    theirs = opened(case.config, tmp_path / "ours")
    error = relative(case.logits(theirs), case.logits(ours))
    parity(f"4-bit folders, out: {label}, shards", LIBRARY, error, *ROUNDING[case.dtype])
    assert torch.equal(case.logits(model.hub.load(tmp_path / "ours")), case.logits(ours))


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_greedy_tokens(case):
    ids = case.batch["input_ids"]
    expected = case.theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = generate(model.hub.load(case.folder), ids, max_new_tokens=20, temperature=0)
    assert torch.equal(found, expected[:, ids.size(1) :])
    assert len(found.unique()) > 5


@pytest.mark.parametrize("case", ["llama", "roformer"], indirect=True)
def test_gradients(case, parity, label):
    """Of everything that has one in transformers: embeddings, norms, heads; through all four-bit layers."""
    ours, theirs = model.hub.load(case.folder), case.theirs
    for network in (ours, theirs):
        network.zero_grad()
        logits = network(**case.batch).logits
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        (logits * direction).sum().backward()
    table = weight_table(case.config)
    gradients = {
        table[name].published: to_published(table[name], parameter.grad, case.config)
        for name, parameter in ours.named_parameters()
        if parameter.grad is not None
    }
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(expected) and len(expected) >= 7
    error = relative(gradients, expected)
    parity(f"4-bit folders, gradients: {label}", LIBRARY, error, *ROUNDING[case.dtype])


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_the_format_of_products(case, parity, tmp_path):
    """A float32 network whose folder says bfloat16."""
    case.theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, theirs = model.hub.load(tmp_path), opened(case.config, tmp_path)
    found, expected = ours(**case.batch).logits, theirs(**case.batch).logits
    assert found.dtype == expected.dtype == torch.float32
    assert relative(found, case.logits(case.theirs)) > 1e-3  # not as in float32
    parity("4-bit folders, products in bf16: llama", LIBRARY, relative(found, expected), *ROUNDING[torch.bfloat16])
    mine, one_step = small_layers(case, ours), (2**-8, "bfloat16 rounding, once")
    for name, layer in their_layers(theirs).items():
        x = torch.randn(3, 5, layer.in_features)
        assert mine[name](x).dtype == torch.float32
        parity("4-bit folders, products in bf16: a layer", LIBRARY, relative(mine[name](x), layer(x)), *one_step)


def test_what_is_not_said_is_their_default():
    theirs = transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    assert read_config({"load_in_4bit": True}) == replace(read_config(theirs), compute=None) == FourBit("fp4", False, skip=())
