"""Adapters' folders that are damaged, or of another base: one line that names what is wrong, and a network as it was."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora.peft_io as peft_io
import model.hub
from lora.__main__ import main
from lora.base import check_base, digest
from lora.config import AdapterError, DoraConfig, LoraConfig
from lora.inject import activate, add_adapters, parts
from tests.conftest import randomized, tiny_config
from tests.damage import shorten

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture
def place(tmp_path):
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path / "base")
    network = add_adapters(model.hub.load(tmp_path / "base"), LoraConfig(r=2, targets="up$"))
    peft_io.save(network, tmp_path / "adapter")
    return tmp_path


def edit(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def say(folder, **values):
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said | values))


def note(folder, **values):
    said = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(said | values))


def rename(tensors):
    tensors["base_model.model.model.layers.1.mlp.up.lora_B.weight"] = tensors.pop(NAME)


def cut(folder):
    shorten(folder / TENSORS, 5)


def bin_file(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def whole_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors.pop(name)


FAULTS = {  # name: (what happens to the folder, what is said)
    "missing": (lambda f: edit(f, lambda t: t.pop(NAME)), f"lacks {NAME}"),
    "a whole layer": (
        lambda f: edit(f, whole_layer),
        f"{TENSORS} lacks the tensors of what {CONFIG} names: model.layers.1",
    ),
    "left over": (lambda f: edit(f, lambda t: t.update({"extra": torch.ones(1)})), "has no place for: extra"),
    "of another method": (
        lambda f: edit(f, lambda t: t.update({NAME.replace("lora_B.weight", "ia3_l"): torch.ones(40, 1)})),
        "has no place for: .*ia3_l",
    ),
    "another name": (lambda f: edit(f, rename), r"has no place for: .*mlp\.up\.lora_B"),
    "misshapen": (
        lambda f: edit(f, lambda t: t.update({NAME: torch.ones(7, 2)})),
        rf"{NAME}' has shape \(7, 2\), \(40, 2\) is expected",
    ),
    "another rank": (lambda f: say(f, r=3), r"has shape \(2, 24\), \(3, 24\) is expected"),
    "cut": (cut, f"{TENSORS}: the header describes .* the file holds"),
    "no safetensors": (lambda f: (f / TENSORS).write_bytes(b"pickle!" * 9), f"{TENSORS}: the header's length"),
    "pickle": (bin_file, r"adapter_model\.bin, a pickle, which can run code.*convert it with PEFT's save_pretrained"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"holds no {TENSORS}"),
    "no settings": (lambda f: (f / CONFIG).unlink(), f"is not an adapter's folder: it holds no {CONFIG}"),
    "half of the settings": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG} cannot be read"),
    "settings that are a list": (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG} is not a JSON object"),
    "no rank": (lambda f: say(f, r=None), f"{CONFIG}: lora: r=None must be an integer"),
    "unknown method": (lambda f: say(f, peft_type="VERA"), f"{CONFIG}: peft_type='VERA' is not supported; supported: LORA, "),
    "layers repeated": (lambda f: say(f, layer_replication=[[0, 2]]), r"layer_replication=\[\[0, 2\]\] is not supported"),
    "biases of adapters": (lambda f: say(f, lora_bias=True), "lora_bias=True is not supported"),
    "tokens alone": (lambda f: say(f, trainable_token_indices=[3]), r"trainable_token_indices=\[3\] is not supported"),
    "parameters": (lambda f: say(f, target_parameters=["w"]), r"target_parameters=\['w'\] is not supported"),
    "activated": (lambda f: say(f, alora_invocation_tokens=[3]), r"alora_invocation_tokens=\[3\] is not supported"),
    "a base that changed": (lambda f: say(f, init_lora_weights="pissa"), "'pissa' changed the base too"),
    "setting of tomorrow": (lambda f: say(f, use_magic=True), "use_magic=True is not supported"),
    "how the base was quantized": (lambda f: note(f, quantization="nf4"), r"base\.json cannot be read: AttributeError"),
    "an unknown scheme": (lambda f: note(f, quantization={"scheme": "nf3"}), r"base\.json cannot be read: QuantError"),
    "a note of the base": (lambda f: (f / "base.json").write_text("{}"), r"base\.json cannot be read: KeyError"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_folder_is_named_and_the_network_stays(name, place, capsys):
    harm, message = FAULTS[name]
    network = model.hub.load(place / "base")
    before = {key: (value.clone(), value.requires_grad) for key, value in network.named_parameters()}
    harm(place / "adapter")
    with pytest.raises(AdapterError, match=message):
        peft_io.load(network, place / "adapter")
    after = dict(network.named_parameters())
    assert after.keys() == before.keys() and not getattr(network, "adapters", {})
    assert all(torch.equal(after[key], value) and after[key].requires_grad == old for key, (value, old) in before.items())
    assert main(["merge", str(place / "base"), str(place / "adapter"), "--out", str(place / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "base"]


def test_other_adapters_stay_as_they_were(place):
    network = add_adapters(model.hub.load(place / "base"), DoraConfig(r=2), "first")
    add_adapters(network, LoraConfig(r=2), "third")
    with torch.no_grad():
        for part in parts(network, "third").values():
            part.B.fill_(0.1)
    activate(network, {"third": 0.5})
    wanted = network(torch.arange(3, 9)[None]).logits
    edit(place / "adapter", lambda t: t.update({NAME: torch.ones(7, 2)}))
    with pytest.raises(AdapterError, match="is expected"):
        peft_io.load(network, place / "adapter", "second")
    assert list(network.adapters) == ["first", "third"] and torch.equal(network(torch.arange(3, 9)[None]).logits, wanted)


def test_another_base_is_refused(place, capsys):
    shutil.copytree(place / "base", place / "other")
    tensors = load_file(place / "other" / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, place / "other" / "model.safetensors", metadata={"format": "pt"})
    other = model.hub.load(place / "other")
    with pytest.raises(AdapterError, match=rf"was trained on another base: on {place / 'base'}"):
        peft_io.load(other, place / "adapter")
    check_base(place / "adapter", place / "base")
    with pytest.raises(AdapterError, match=r"and those of .*other have [0-9a-f]{12}…"):
        check_base(place / "adapter", place / "other")
    given = ["merge", str(place / "other"), str(place / "adapter"), "--out", str(place / "out")]
    assert main(given) == 2 and "was trained on another base" in capsys.readouterr().err
    assert main([*given, "--any-base"]) == 0
    peft_io.load(other, place / "adapter", any_base=True)


def test_where_the_base_is(place):
    """The folder's own note, then PEFT's; a base that is gone must be given."""
    (place / "base").rename(place / "moved")
    with pytest.raises(AdapterError, match=rf"its base is not there \({place / 'base'}\): say where it is"):
        peft_io.open_network(place / "adapter")
    assert peft_io.open_network(place / "adapter", base=place / "moved").source == place / "moved"
    (place / "adapter" / "base.json").unlink()
    say(place / "adapter", base_model_name_or_path=str(place / "moved"))
    assert peft_io.open_network(place / "adapter").source == place / "moved"
    say(place / "adapter", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="no base is named"):
        peft_io.open_network(place / "adapter")


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_the_digest_is_of_the_tensors(family, tmp_path):
    """Not of how they lie in files, nor of their prefix, nor of copies of a tied matrix; but of every bit of them."""
    network = randomized(tiny_config(family), dtype=torch.float32)
    model.hub.save(network, tmp_path / "one")
    model.hub.save(network, tmp_path / "many", shard_bytes=5000)
    shutil.copytree(tmp_path / "one", tmp_path / "copies")
    path = tmp_path / "copies" / "model.safetensors"
    tensors = load_file(path)
    head = {"gpt2": "lm_head.weight", "t5": "lm_head.weight", "bert": "cls.predictions.decoder.weight"}[family]
    tensors[head] = network.head.weight.detach().clone()
    save_file({name.removeprefix("transformer."): value for name, value in tensors.items()}, path)
    assert digest(tmp_path / "one") == digest(tmp_path / "many") == digest(tmp_path / "copies")
    one = next(name for name in tensors if name.endswith("bias") or name.endswith("norm.weight"))
    tensors[one] = tensors[one].bfloat16().float()
    save_file(tensors, path)
    assert digest(tmp_path / "one") != digest(tmp_path / "copies")
    model.hub.save(network.to(torch.bfloat16), tmp_path / "half")
    assert digest(tmp_path / "one") != digest(tmp_path / "half")


def test_the_digest_is_of_formats_and_shapes(place):
    """The same bytes under them are another network; and a file that was written anew is read anew."""
    path, seen = place / "base" / "model.safetensors", [digest(place / "base")]
    written, tensors, name = path.stat().st_mtime_ns, load_file(path), "model.layers.0.mlp.up_proj.weight"
    value = tensors[name]
    for later, change in enumerate((value.view(torch.int32), value.reshape(value.shape[::-1]), value + 1), 1):
        save_file(tensors | {name: change}, path)
        os.utime(path, ns=(written, written + later * 10**9))  # its size is what it was
        seen.append(digest(place / "base"))
    assert len(set(seen)) == len(seen)


def test_an_embedding_that_was_resized_is_another_base(place):
    """PEFT saves the embedding along with an adapter beside it; nothing of ours would hold another one."""
    network = add_adapters(model.hub.load(place / "base"), LoraConfig(r=2, targets="embedding$"))
    peft_io.save(network, place / "second")
    own = network.body.embedding.base.weight.detach().clone()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(place / "second", lambda t: t.update({name: own}))
    peft_io.open_network(place / "second")
    edit(place / "second", lambda t: t.update({name: own + 1}))
    with pytest.raises(AdapterError, match=f"{name}' is not this base's own"):
        peft_io.open_network(place / "second")
