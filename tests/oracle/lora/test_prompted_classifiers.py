"""Prompts, p-tuning and prefixes of classifiers: PEFT's folders opened here, and ours there, say the same; float64, whole
tensors. PEFT keeps prompt vectors in float32: those that are compared are such numbers, so that nothing is rounded."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lora.peft_io as peft_io
import model.hub
import model.stack
from lora.config import AdapterError, PrefixConfig, PromptConfig
from lora.inject import add_adapters
from tests.compare import relative
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import how, widen

LIBRARY = f"peft {peft.__version__}"
ROUNDING = (1e-12, "float64 rounding; sums in another order")
TABLES = (1e-6, "transformers' rotary table of RoFormer is float32, also in float64")
HEADS = {
    "sequence": (transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
    "token": (transformers.AutoModelForTokenClassification, "TOKEN_CLS"),
    "qa": (transformers.AutoModelForQuestionAnswering, "QUESTION_ANS"),
}
P = {"num_virtual_tokens": 4}
METHODS = {
    "prompt": (peft.PromptTuningConfig, P),
    "ptuning": (peft.PromptEncoderConfig, P | {"encoder_hidden_size": 16}),
    "prefix": (peft.PrefixTuningConfig, P),
}
# What PEFT computes: it has no prompt of an encoder-decoder's classifier (T5's and BART's take no vectors), nor a prefix of
# RoFormer's (transformers indexes its cache).
CASES = [
    *((family, "sequence", method) for family in ("bert", "roberta", "gpt2", "llama") for method in METHODS),
    *((family, "token", method) for family in ("bert", "gpt2", "llama") for method in ("prompt", "prefix")),
    *((family, "qa", method) for family in ("roberta", "llama") for method in ("prompt", "prefix")),
    *(("roformer", head, "prompt") for head in ("token", "qa")),
]


def twin(config, folder) -> nn.Module:
    kind = HEADS[config.head][0]
    theirs = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation=how(config)).eval()
    widen(theirs)
    return theirs


def base(family: str, head: str, folder):
    """A random classifier's folder. A decoder's needs pad_id, or transformers takes one row at a time alone."""
    pad = {"pad_id": 0} if family in ("gpt2", "llama") else {}
    network = randomized(tiny_config(family, head=head, labels=2 if head == "qa" else 3, **pad))
    model.hub.save(network, folder)
    return network.config


def logits_of(theirs: nn.Module, head: str, length: int) -> torch.Tensor:
    ids, mask = inputs(theirs.config.model_type)
    said = theirs(input_ids=ids, attention_mask=mask)
    if head == "qa":
        return torch.stack((said.start_logits, said.end_logits), -1)[:, -length:]
    return said.logits[:, -length:] if head == "token" else said.logits


def inputs(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An encoder's second row is padded. A decoder's is not: PEFT hands transformers vectors, which do not show pads."""
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if family in ("bert", "roberta", "roformer"):
        mask[1, 6:], ids[1, 6:] = 0, 1
    return ids, mask


@torch.no_grad()
def shake(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((parameter + 0.3 * noise).float())


def by_peft(config, folder, adapter) -> nn.Module:
    return peft.PeftModel.from_pretrained(twin(config, folder), adapter, autocast_adapter_dtype=False).double().eval()


@pytest.mark.parametrize(("family", "head", "method"), CASES)
def test_there_and_back(family, head, method, tmp_path, parity):
    config = base(family, head, tmp_path / "base")
    kind, settings = METHODS[method]
    made = peft.get_peft_model(twin(config, tmp_path / "base"), kind(task_type=HEADS[head][1], **settings))
    shake(made)
    made.save_pretrained(tmp_path / "theirs")
    ids, mask = inputs(family)
    network = peft_io.load(model.hub.load(tmp_path / "base"), tmp_path / "theirs").eval()
    plain, ours = model.hub.load(tmp_path / "base")(ids, mask).logits, network(ids, mask).logits
    expected = logits_of(by_peft(config, tmp_path / "base", tmp_path / "theirs"), head, 9)
    real = mask.bool() if head != "sequence" else slice(None)
    bound = TABLES if family == "roformer" else ROUNDING
    parity(f"prompted classifiers, in: {family}, {head}, {method}", LIBRARY, relative(ours[real], expected[real]), *bound)
    assert relative(plain[real], expected[real]) > 1e-2

    peft_io.save(network, tmp_path / "ours")
    kept, said = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "ours"))
    assert kept.keys() == said.keys()
    assert all(torch.equal(value.double(), said[name].double()) for name, value in kept.items())
    back = logits_of(by_peft(config, tmp_path / "base", tmp_path / "ours"), head, 9)
    parity(f"prompted classifiers, out: {family}, {head}, {method}", LIBRARY, relative(back[real], expected[real]), *bound)


MADE = {
    "prompt": PromptConfig(tokens=3),
    "prompt, head": PromptConfig(tokens=3, train_whole=("^head",)),
    "prefix": PrefixConfig(tokens=3),
    "prefix, head": PrefixConfig(tokens=3, train_whole=("^head",)),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_made_here_it_opens_in_peft(family, name, tmp_path, parity):
    """A head that stands frozen too is written along: PEFT takes it for granted."""
    config = base(family, "sequence", tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), MADE[name]).eval()
    shake(network)
    peft_io.save(network, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    ids, mask = inputs(family)
    theirs = logits_of(by_peft(config, tmp_path / "base", tmp_path / "ours"), "sequence", 9)
    ours = network(ids, mask).logits
    parity(f"prompted classifiers, out: {family}, made here, {name}", LIBRARY, relative(ours, theirs), *ROUNDING)
    assert torch.equal(peft_io.open_network(tmp_path / "ours")(ids, mask).logits, ours)


def test_the_comparison_sees_where_the_head_looks(tmp_path, monkeypatch):
    """Of BERT the prompt's first vector speaks; the text's own first token would say something else."""
    config = base("bert", "sequence", tmp_path / "base")
    made = peft.get_peft_model(twin(config, tmp_path / "base"), peft.PromptTuningConfig(task_type="SEQ_CLS", **P))
    shake(made)
    made.save_pretrained(tmp_path / "theirs")
    expected = logits_of(by_peft(config, tmp_path / "base", tmp_path / "theirs"), "sequence", 9)
    network = peft_io.load(model.hub.load(tmp_path / "base"), tmp_path / "theirs").eval()
    ids, mask = inputs("bert")
    assert relative(network(ids, mask).logits, expected) < 1e-12
    split = model.stack.split_prompt
    monkeypatch.setattr(model.stack, "split_prompt", lambda *inputs: split(*inputs)._replace(prompt=None))
    assert relative(network(ids, mask).logits, expected) > 1e-2


def test_what_peft_has_no_class_for_is_ours_alone(tmp_path):
    """Its general class would leave out what stands before the text, and say nothing."""
    model.hub.save(randomized(tiny_config("bert")), tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), PromptConfig(tokens=3)).eval()
    peft_io.save(network, tmp_path / "ours")
    with pytest.raises(Exception, match="TOUCHSTONE_PROMPT_TUNING"):
        peft.PeftConfig.from_pretrained(tmp_path / "ours")
    ids = torch.arange(3, 12)[None]
    assert torch.equal(peft_io.open_network(tmp_path / "ours")(ids).logits, network(ids).logits)


def test_another_spelling_is_named(tmp_path):
    base("bert", "sequence", tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), PromptConfig(tokens=3, train_whole=("^head",)))
    peft_io.save(network, tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_model.safetensors"
    tensors = {name.replace("base_model.", "base_model.model."): value for name, value in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"has no place for: base_model\.model\.(bert|classifier)"):
        peft_io.open_network(tmp_path / "ours")


def test_of_two_stacks_peft_computes_nothing_with_it(tmp_path):
    """T5's answers are the same with two prefixes: such a folder is refused. Ours change them, and have a type of ours."""
    config, settings = base("t5", "qa", tmp_path / "base"), {"num_layers": 3, "num_attention_heads": 4, "token_dim": 40}
    asked = peft.PrefixTuningConfig(task_type="QUESTION_ANS", **P, **settings)
    made, said = peft.get_peft_model(twin(config, tmp_path / "base"), asked).double().eval(), []
    for _ in range(2):
        with torch.no_grad():
            made.prompt_encoder.default.embedding.weight.normal_()
        said.append(logits_of(made, "qa", 9))
    assert torch.equal(*said)
    made.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match="PREFIX_TUNING of an encoder-decoder's classifier has no effect in PEFT"):
        peft_io.open_network(tmp_path / "theirs", base=tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), PrefixConfig(tokens=3)).eval()
    shake(network)
    peft_io.save(network, tmp_path / "ours")
    with pytest.raises(Exception, match="TOUCHSTONE_PREFIX_TUNING"):
        peft.PeftConfig.from_pretrained(tmp_path / "ours")
    ids = torch.arange(3, 12)[None]
    assert torch.equal(peft_io.open_network(tmp_path / "ours")(ids).logits, network(ids).logits)
