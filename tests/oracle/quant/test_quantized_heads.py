"""Folders whose language head is quantized too, opened by transformers and by us: the same logits, text and loss.

Of a config.json that ties head and embedding the quantized head has codes of its own, in transformers as here. (bitsandbytes
ties them to a matrix with all its bits, and then fails: such folders there are none.)
"""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import model.hub
from data.transforms.causal import IGNORE
from eval.perplexity import perplexity_score
from lora.config import AdapterError, LoraConfig
from lora.inject import add_adapters, merge, remove, unmerge
from lora.merge_folder import merge_to_folder
from lora.peft_io import load
from model.generate import generate
from quant.config import FourBit
from quant.linear import quantized_layers
from tests.compare import relative
from tests.conftest import randomized, tiny_config
from tests.oracle.lora.test_peft_io import inputs, peft_folder
from tests.oracle.quant.test_4bit_folders import opened as opened_4bit
from tests.oracle.quant.test_int8_folders import BITSANDBYTES, THEIRS, TOKEN, between_codes, compressed, opened
from tests.oracle.quant.test_int8_folders import TENSOR as STATIC
from train.losses.choose import LOSSES
from train.objective import MaskedObjective, Objective

ROUNDING = (5e-6, "float32 rounding; sums in another order, through two layers")
CHANNEL = {"strategy": "channel", "symmetric": True}
WIDE = {"width": 64, "mlp_width": 128}
CASES = {  # name: (family, changes, of compressed-tensors the settings of inputs, or the bits of bitsandbytes)
    "llama, static": ("llama", {"tie_embeddings": False}, STATIC | {"symmetric": False}),
    "llama, tied, static": ("llama", {"tie_embeddings": True}, STATIC | {"symmetric": True}),
    "llama, dynamic": ("llama", {"tie_embeddings": False}, TOKEN | {"symmetric": True}),
    "gpt2, tied, dynamic": ("gpt2", {"tie_embeddings": True}, TOKEN | {"symmetric": False}),
    "t5, tied and scaled, static": ("t5", {}, STATIC | {"symmetric": False}),
    "bart, tied, with a bias, static": ("bart", {}, STATIC | {"symmetric": True}),
    "bert, tied, static": ("bert", {}, STATIC | {"symmetric": False}),
    "llama, 4 bits": ("llama", WIDE | {"tie_embeddings": False}, 4),
    "qwen2, LLM.int8()": ("qwen2", WIDE, 8),
}


class Case:
    """The folder of a random network that transformers quantized, its head with it, opened there and here."""

    def __init__(self, name: str, root: Path):
        family, changes, how = CASES[name]
        self.config, self.folder, self.bits = tiny_config(family, **changes), root / "small", how if how in (4, 8) else None
        model.hub.save(randomized(self.config, dtype=torch.float32), root / "dense")
        if self.bits is None:
            weights = {"type": "int", "num_bits": 8} | CHANNEL
            compressed(self.config, self.folder, root / "dense", weights, how, torch.float32, ignore=())
        else:
            asked = {f"load_in_{self.bits}bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 2.5}
            asked = transformers.BitsAndBytesConfig(**asked, llm_int8_skip_modules=["none"])
            opened(self.config, root / "dense", quantization_config=asked).save_pretrained(self.folder)
        self.library = THEIRS if self.bits is None else BITSANDBYTES
        self.theirs = (opened_4bit if self.bits == 4 else opened)(self.config, self.folder)
        self.batch = inputs(self.config)
        self.ours = model.hub.load(self.folder)

    @property
    def layer(self) -> nn.Module:
        return quantized_layers(self.ours)["head"]


@pytest.fixture(scope="module")
def case(request, tmp_path_factory) -> Case:
    transformers.logging.set_verbosity_error()
    return Case(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture
def label(request) -> str:
    return request.node.callspec.params["case"]


each = pytest.mark.parametrize("case", CASES, ids=list(CASES), indirect=True)


def mean_of(network: nn.Module, batch: dict, labels: Tensor, loss: str) -> Tensor:
    kind = MaskedObjective if network.config.head == "mlm" else Objective
    hidden = network.body(**batch).hidden
    term = kind(network, LOSSES[loss]).eval().result(hidden, labels).terms["loss"]
    return term.sum / term.count


@each
def test_logits(case, parity, label):
    """Those of the network, and those that the head makes of what transformers' head is given."""
    given = []
    head = case.theirs.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, y: given.append((args[0], y)))
    with torch.no_grad():
        expected, found = case.theirs(**case.batch).logits, case.ours(**case.batch).logits
        hook.remove()
        ((x, y),) = given
        mine = case.layer.multiply(x, case.ours.head.bias)
        if case.ours.config.family == "bart":  # which adds its bias behind the layer
            y = y + case.theirs.final_logits_bias
    clear = ~between_codes(case.layer, x).any(-1) if case.bits is None else torch.ones(x.shape[:-1], dtype=torch.bool)
    assert clear.float().mean() > 0.3
    parity(f"quantized heads: {label}, the head", case.library, relative(mine[clear], y[clear]), *ROUNDING)
    if "dynamic" not in label:  # of which one code that falls on a border is seen in all that follows
        parity(f"quantized heads: {label}, logits", case.library, relative(found, expected), *ROUNDING)
    plain = model.hub.load(case.folder.parent / "dense")
    with torch.no_grad():
        assert relative(plain.head(x), y) > 1e-3  # it is seen that it is rounded


@each
def test_the_loss_is_that_of_the_logits(case, label):
    """`features`, `weight` and `bias` instead of logits; and the gradient of what the head reads, by either way."""
    options = case.batch
    hidden = case.ours.body(**options).hidden.detach().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 61, hidden.shape[:2], generator=generator).masked_fill(torch.arange(hidden.size(1)) == 1, IGNORE)
    scored, head = labels != IGNORE, case.ours.head
    with torch.no_grad():
        assert relative(F.linear(head.features(hidden), head.weight, head.bias), head(hidden)) < 2e-6
    direct = F.cross_entropy(case.ours.head(hidden)[scored], labels[scored])
    (slope,) = torch.autograd.grad(direct, hidden)
    for loss in ("plain", "chunked"):
        total, count = LOSSES[loss](head.features(hidden), head.weight, labels, head.bias)
        assert abs(float((total / count - direct).detach())) < 1e-5 * float(direct.detach())
        (other,) = torch.autograd.grad(total / count, hidden)
        assert slope.abs().max() > 1e-3 and relative(other, slope) < 1e-4
        with torch.no_grad():
            assert abs(float(mean_of(case.ours, options, labels, loss) - direct)) < 1e-5 * float(direct.detach())
    if case.bits != 4:  # of INT8 the head's input is rounded too: without, another loss
        total, count = LOSSES["plain"](head.transform(hidden), head.weight, labels, head.bias)
        assert abs(float((total / count - direct).detach())) > 1e-5


@pytest.mark.parametrize("case", ["llama, tied, static", "llama, 4 bits", "qwen2, LLM.int8()", "t5, tied and scaled, static"],
                         indirect=True)  # fmt: skip
def test_greedy_text(case):
    ids = case.batch["input_ids"][:1]
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = case.theirs.generate(ids, use_cache=case.config.family != "t5", **options)[:, -9:]
    assert torch.equal(generate(case.ours, ids, max_new_tokens=9, temperature=0), expected)


@pytest.mark.parametrize("case", ["llama, tied, static", "llama, 4 bits", "qwen2, LLM.int8()"], indirect=True)
@torch.no_grad()
def test_perplexity(case, parity, label):
    document = torch.randint(3, 61, (20,)).tolist()
    ids = torch.tensor([document])
    direct = F.cross_entropy(case.theirs(ids[:, :-1]).logits[0], ids[0, 1:]).exp()  # LLM.int8() looks at all rows together
    found = perplexity_score(case.ours, [document], context=32).value
    parity(f"quantized heads: {label}, perplexity", case.library, relative(found, direct), *ROUNDING)


@pytest.mark.parametrize("case", ["llama, tied, static", "gpt2, tied, dynamic", "llama, 4 bits", "qwen2, LLM.int8()"],
                         indirect=True)  # fmt: skip
def test_written_again(case, tmp_path, parity, label):
    model.hub.save(case.ours, tmp_path)
    again = model.hub.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**case.batch).logits, case.ours(**case.batch).logits)
        theirs = (opened_4bit if case.bits == 4 else opened)(case.config, tmp_path)
        error = relative(theirs(**case.batch).logits, case.theirs(**case.batch).logits)
    parity(f"quantized heads: {label}, written", case.library, error, 0, "the same codes")


@each
def test_it_is_not_trained_whole(case):
    with pytest.raises(AdapterError, match="train_whole: head has a quantized weight, which cannot be trained"):
        add_adapters(case.ours, LoraConfig(r=2, targets="mlp", train_whole=("^head$",)))


@pytest.mark.parametrize("case", ["llama, 4 bits"], indirect=True)
def test_an_adapter_beside_it(case, tmp_path, parity):
    """LoRA on a head of four bits is PEFT's; merged, in memory and in a folder, the head has all its bits again."""
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    folder = peft_folder(opened_4bit(case.config, case.folder), config, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(opened_4bit(case.config, case.folder), folder).eval()
    network = load(model.hub.load(case.folder), folder).eval()
    with torch.no_grad():
        expected, beside = theirs(**case.batch).logits, network(**case.batch).logits
        parity("quantized heads: 4 bits, LoRA", f"peft {peft.__version__}", relative(beside, expected), *ROUNDING)
        assert relative(case.ours(**case.batch).logits, expected) > 1e-2
        assert relative(merge(network)(**case.batch).logits, expected) < 1e-5
        assert torch.equal(unmerge(network)(**case.batch).logits, beside)
        merge_to_folder(case.folder, folder, tmp_path / "out")
        merged = model.hub.load(tmp_path / "out")
        assert not quantized_layers(merged) and relative(merged(**case.batch).logits, expected) < 1e-5


@pytest.mark.parametrize("case", ["llama, tied, static", "bert, tied, static"], indirect=True)
def test_merged_into_a_tied_base_it_is_a_matrix_of_its_own(case, tmp_path):
    """The head's codes are not the embedding's: what is written has two matrices, and its config says so."""
    network = add_adapters(model.hub.load(case.folder), LoraConfig(r=2, targets="^head$|query"))
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value.add_(0.1)
        part, own = network.head.parts["default"], case.ours.head.weight
        remove(merge(network))
        assert not network.config.tie_embeddings
        assert torch.equal(network.body.embedding.weight, case.ours.body.embedding.weight)
        assert relative(network.head.weight, own + 8 * part.B @ part.A) < 1e-6
        assert relative(own, network.body.embedding.weight) > 1e-3
    if case.config.family == "bert":  # its folder has no place for two, other than a quantized one
        with pytest.raises(ValueError, match="tie_embeddings=False cannot be saved"):
            model.hub.save(network, tmp_path)
        return
    model.hub.save(network, tmp_path)
    assert torch.equal(model.hub.load(tmp_path).head.weight, network.head.weight)


def test_what_is_quantized_as_it_is_read_leaves_the_head(tmp_path):
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path)
    network = model.hub.load(tmp_path, quantization=FourBit(skip=()))
    assert network.head.packed is None and network.head.weight is network.body.embedding.weight
