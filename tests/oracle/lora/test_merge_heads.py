"""A classifier's adapter on the folder of the language model that it was trained from: merged it is PEFT's classifier, which
transformers opens by its class; told by the adapter, or asked for."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from torch import nn

import lora.peft_io as peft_io
import model.hub
from lora.__main__ import main
from lora.config import AdapterError, LoraConfig
from lora.inject import add_adapters
from tests.compare import relative
from tests.conftest import randomized, tiny_config
from tests.oracle.lora.test_peft_io import inputs, peft_folder, shake
from tests.oracle.lora.test_prompted_classifiers import HEADS

LIBRARY = f"peft {peft.__version__}, transformers {transformers.__version__}"
ROUNDING = (1e-12, "float64 rounding; W + s B A in another order")
CASES = {  # name: (family, the base's head, the adapter's, targets, more of PEFT's config)
    "llama": ("llama", "lm", "sequence", ["q_proj"], {}),
    "llama, answers": ("llama", "lm", "qa", ["q_proj"], {}),
    "gpt2": ("gpt2", "lm", "sequence", ["c_attn"], {"fan_in_fan_out": True}),
    "gpt2, tokens, DoRA": ("gpt2", "lm", "token", ["c_attn"], {"fan_in_fan_out": True, "use_dora": True}),
    "qwen2": ("qwen2", "lm", "sequence", ["k_proj"], {"bias": "lora_only"}),
    "bert": ("bert", "pretraining", "sequence", ["query"], {"bias": "all"}),
    "bert, tokens": ("bert", "mlm", "token", ["query", "dense"], {}),
    "roberta": ("roberta", "mlm", "sequence", ["query"], {}),
    "roformer, answers": ("roformer", "mlm", "qa", ["query", "key"], {}),
    "t5": ("t5", "lm", "sequence", ["q", "wo"], {"modules_to_save": ["classification_head"]}),
    "bart": ("bart", "lm", "sequence", ["q_proj"], {"modules_to_save": ["classification_head"]}),
    "another number of labels": ("llama", "sequence", "sequence", ["q_proj"], {}),
}


def folders(name: str, root):
    """The base's folder, PEFT's adapter and PEFT's model."""
    family, before, head, targets, more = CASES[name]
    pad = {"pad_id": 0} if family in ("llama", "gpt2", "qwen2") else {}  # without it transformers takes one row at a time alone
    model.hub.save(randomized(tiny_config(family, head=before, **pad)), root / "base")
    made = model.hub.load(root / "base", head=head, labels=3)
    model.hub.save(made, root / "classifier")
    theirs = by_class(head, root / "classifier")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type=HEADS[head][1], init_lora_weights=False, **more)
    peft_folder(theirs, config, root / "adapter")
    shutil.rmtree(root / "classifier")
    return theirs, made.config


def by_class(head: str, folder) -> nn.Module:
    return HEADS[head][0].from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def said_by(network: nn.Module, config) -> torch.Tensor:
    ids = inputs(config)["input_ids"]
    ids[:, -1] = 2  # T5's and BART's classes are read off the last end of the text
    found = network(input_ids=ids)
    return torch.stack((found.start_logits, found.end_logits), -1) if config.head == "qa" else found.logits


@pytest.mark.parametrize(
    ("name", "asked"), [*((name, False) for name in CASES), ("llama", True), ("llama, answers", True), ("roberta", True)]
)
def test_it_is_pefts_classifier(name, asked, tmp_path, parity, capsys):
    theirs, config = folders(name, tmp_path)
    expected, head = said_by(theirs, config), config.head
    options = ["--head", head, *(["--labels", "3"] if head != "qa" else [])] if asked else []
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), *options]) == 0
    shown = capsys.readouterr()
    assert ("read as with --head" in shown.err) == (not asked)
    assert f"try it:  python -m model info {tmp_path / 'out'}" in shown.out
    merged = by_class(head, tmp_path / "out")
    parity(f"merged classifiers: {name}", LIBRARY, relative(said_by(merged, config), expected), *ROUNDING)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == [type(merged).__name__] and "head" not in settings
    assert head == "qa" or len(settings["id2label"]) == len(settings["label2id"]) == 3
    labels = {"labels": 3} if head != "qa" else {"labels": config.labels}
    assert model.hub.load(tmp_path / "out").config.replace(**labels) == config  # and nothing is there but what it needs
    with pytest.warns(UserWarning, match="read as with --head"):
        beside = peft_io.open_network(tmp_path / "adapter", base=tmp_path / "base")
    tolerance = 1e-12 if "bert" in name else 1e-5  # transformers casts RMS norms to float32
    assert relative(said(beside, config), expected) < tolerance


def said(network: nn.Module, config) -> torch.Tensor:
    ids = inputs(config)["input_ids"]
    ids[:, -1] = 2
    return network(ids).logits


def test_names_of_labels_travel(tmp_path):
    """Those of the base's config.json, if they are as many."""
    for labels, kept in (("abc", True), ("ab", False)):
        root = tmp_path / labels
        folders("another number of labels" if not kept else "llama", root)
        settings = json.loads((root / "base" / "config.json").read_text())
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
        (root / "base" / "config.json").write_text(json.dumps(settings))
        assert main(["merge", str(root / "base"), str(root / "adapter"), "--out", str(root / "out")]) == 0
        names = by_class("sequence", root / "out").config.id2label
        assert names == (dict(enumerate("abc")) if kept else {n: f"LABEL_{n}" for n in range(3)})


@pytest.mark.parametrize("family", ["llama", "roberta", "t5"])
def test_our_own_says_its_head(family, tmp_path, parity):
    """`base.json` has it, and PEFT opens the folder too, with the whole head that it takes for granted."""
    before = {"roberta": "mlm"}.get(family, "lm")
    model.hub.save(randomized(tiny_config(family, head=before, pad_id={"roberta": 1}.get(family, 0))), tmp_path / "base")
    network = model.hub.load(tmp_path / "base", head="sequence", labels=3)
    model.hub.save(network, tmp_path / "classifier")
    add_adapters(network, LoraConfig(r=2, targets="query-value", train_whole=("^head",))).eval()
    shake(network)
    peft_io.save(network, tmp_path / "adapter")
    expected = said(network, network.config)
    theirs = peft.PeftModel.from_pretrained(by_class("sequence", tmp_path / "classifier"), tmp_path / "adapter").double().eval()
    assert relative(said_by(theirs, network.config), expected) < (1e-12 if family == "roberta" else 1e-5)
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 0
    merged = model.hub.load(tmp_path / "out")
    error = relative(said(merged, merged.config), expected)
    parity(f"merged classifiers: ours, {family}", "ours, beside the base", error, *ROUNDING)
    assert relative(said(peft_io.open_network(tmp_path / "adapter"), network.config), expected) == 0


def say(folder, **values) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | values))


REFUSED = {  # name: (case, what the settings say, options, what is said)
    "nothing tells the head": (
        "llama",
        {"task_type": None},
        (),
        "base_model.model.score.weight; they are of the head 'sequence': --head sequence --labels N",
    ),
    "answers": ("llama, answers", {"task_type": None}, (), "they are of the head 'qa': --head qa (head="),
    "another number": ("llama", {}, ("--head", "sequence", "--labels", "5"), "is expected"),
    "an unknown head": ("llama", {}, ("--head", "sequences"), "unknown head 'sequences'; heads: lm, mlm, "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_to_say_where_nothing_tells(name, tmp_path, capsys):
    case, values, options, message = REFUSED[name]
    folders(case, tmp_path)
    say(tmp_path / "adapter", **values)
    given = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main([*given, *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    if not options:
        asked = ("--head", "sequence", "--labels", "3") if case == "llama" else ("--head", "qa")
        assert main([*given, *asked]) == 0


def test_a_head_that_is_nowhere_is_named(tmp_path, capsys):
    """A masked-language model's folder has no pooler, and PEFT saves none: its classifier read random numbers."""
    model.hub.save(randomized(tiny_config("bert")), tmp_path / "base")
    model.hub.save(model.hub.load(tmp_path / "base", head="sequence", labels=3), tmp_path / "classifier")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft_folder(by_class("sequence", tmp_path / "classifier"), config, tmp_path / "adapter")
    lacks = r"neither .*base nor .*adapter_model\.safetensors holds bert\.pooler\.dense\.\w+, bert\.pooler\.dense\.\w+, of the"
    with pytest.warns(UserWarning), pytest.raises(AdapterError, match=lacks):
        peft_io.open_network(tmp_path / "adapter", base=tmp_path / "base")
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 2
    assert "bert.pooler.dense.weight" in capsys.readouterr().err and not (tmp_path / "out").exists()
    model.hub.save(randomized(tiny_config("gpt2")), tmp_path / "lm")  # all layers of the adapter are the head's
    model.hub.save(randomized(tiny_config("gpt2", head="none")), tmp_path / "body")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path / "of head")
    assert main(["merge", str(tmp_path / "body"), str(tmp_path / "of head"), "--out", str(tmp_path / "out")]) == 2
    assert "lm_head.lora_B.weight; they are of the head 'lm': --head lm" in capsys.readouterr().err
