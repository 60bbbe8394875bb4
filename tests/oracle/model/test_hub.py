"""Folders in the Hugging Face layout, both ways, and what is refused."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.hub
from model.hub import HubError
from model.weights import weight_table
from tests.conftest import TINY_FAMILIES, randomized, tiny_config
from tests.oracle.model.test_network import CLASSES


def same(one, other) -> bool:
    names = dict(other.named_parameters())
    return len(names) == len(dict(one.named_parameters())) and all(
        torch.equal(value, names[name]) for name, value in one.named_parameters()
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_round_trip(family, tied, tmp_path):
    if family in ("bert", "roberta", "roformer") and not tied:
        with pytest.raises(ValueError, match="cannot be saved"):
            model.hub.save(randomized(tiny_config(family, tie_embeddings=False)), tmp_path)
        return
    changes = {"tie_embeddings": tied} | ({"scale_head": tied} if family.startswith("t5") else {})
    network = randomized(tiny_config(family, **changes), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    loaded = model.hub.load(tmp_path)
    assert same(network, loaded) and loaded.config == network.config
    assert (loaded.head.weight is loaded.body.embedding.weight) == tied
    head = weight_table(network.config)["head.weight"].published
    assert (head in load_file(tmp_path / "model.safetensors")) == (not tied)  # saved once


@pytest.mark.parametrize("family", [family for family in TINY_FAMILIES if family != "vaswani"])
def test_reads_what_transformers_writes(family, tmp_path):
    network = randomized(tiny_config(family), dtype=torch.float32)
    model.hub.save(network, tmp_path / "ours")
    theirs = CLASSES[network.config.architecture].from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in ("whole", "sharded"):
        loaded = model.hub.load(tmp_path / folder)
        assert same(network, loaded)
        assert loaded.config.replace(pad_id=network.config.pad_id) == network.config


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_transformers_reads_our_shards(family, tmp_path):
    network = randomized(tiny_config(family), dtype=torch.float32)
    model.hub.save(network, tmp_path, shard_bytes=8000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert same(network, model.hub.load(tmp_path))
    theirs, ids = CLASSES[network.config.architecture].from_pretrained(tmp_path), torch.randint(3, 61, (2, 7))
    second = {"decoder_input_ids": ids} if family == "t5" else {}
    assert torch.allclose(theirs(ids, **second).logits, network(ids, **second).logits, rtol=0, atol=1e-5)
    model.hub.save(network, tmp_path)  # again, in one file: neither shards nor index may stay, or another reader takes them
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    assert same(network, model.hub.load(tmp_path))
    model.hub.save(network, tmp_path, shard_bytes=8000)  # and in shards: one file would be read before them
    assert not (tmp_path / "model.safetensors").exists() and same(network, model.hub.load(tmp_path))


def test_a_tied_weight_may_stand_under_any_of_its_names(tmp_path):
    """Old T5 and BART folders hold the embedding three or four times, or under one of the copies' names alone."""
    network = randomized(tiny_config("t5"), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    shared = load_file(tmp_path / "model.safetensors")["shared.weight"]
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    edit(tmp_path, lambda t: t.update({name: shared.clone() for name in copies}))
    assert same(network, model.hub.load(tmp_path))
    edit(tmp_path, lambda t: [t.pop(name) for name in ("shared.weight", *copies[:2])])
    assert same(network, model.hub.load(tmp_path))
    edit(tmp_path, lambda t: t.update({copies[0]: shared + 1}))
    with pytest.raises(HubError, match=r"'lm_head.weight' differs from 'shared.weight'"):
        model.hub.load(tmp_path)


def test_reads_names_of_old_files(tmp_path):
    """The first published BERT: gamma and beta, both heads and the pooler in a folder that says BertForMaskedLM."""
    network = randomized(tiny_config("bert", head="pretraining"), dtype=torch.float32)
    model.hub.save(network, tmp_path)

    def age(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(32)[None]

    edit(tmp_path, age)
    assert same(network, model.hub.load(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.warns(UserWarning, match=r"left out .*'mlm': .*(pooler|seq_relationship)"):
        loaded = model.hub.load(tmp_path)
    assert torch.equal(loaded.head.dense.weight, network.head.dense.weight)


def test_another_head_is_new_and_reproducible(tmp_path):
    network = randomized(tiny_config("bert"), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    one, same_seed = (model.hub.load(tmp_path, head="sequence", labels=5, seed=3) for _ in range(2))
    other = model.hub.load(tmp_path, head="sequence", labels=5, seed=4)
    assert same(one, same_seed) and not same(one, other)
    assert one.head.out.weight.shape == (5, 24)
    assert torch.equal(one.body.blocks[1].mlp.up.weight, network.body.blocks[1].mlp.up.weight)
    bodies = model.hub.load(tmp_path, head="none")
    assert same(bodies.body, network.body)
    model.hub.save(bodies, tmp_path / "body")
    assert same(bodies, model.hub.load(tmp_path / "body", head="none"))


def test_reads_a_body_saved_alone(tmp_path):
    """The published GPT-2 files: no prefix, and causal masks as buffers."""
    network = randomized(tiny_config("gpt2"), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(network, model.hub.load(tmp_path))


def test_dtype_on_loading(tmp_path):
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.bfloat16), tmp_path)
    assert model.hub.load(tmp_path).head.weight.dtype == torch.bfloat16
    assert model.hub.load(tmp_path, dtype=torch.float64).head.weight.dtype == torch.float64


@pytest.fixture
def folder(tmp_path):
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path)
    return tmp_path


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME}"),
        (lambda t: t.update({"model.layers.7.extra": torch.ones(1)}), "model.layers.7.extra"),
        (lambda t: t.update({NAME: torch.ones(3, 4)}), rf"{NAME}.*\(3, 4\).*\(40, 24\)"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_wrong_weights_are_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(HubError, match=message):
        model.hub.load(folder)


def test_refused_folders(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(HubError, match=r"'mamba' is not supported; supported: bart, bert, gpt2, llama, "):
        model.hub.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "longrope"}}))
    with pytest.raises(HubError, match="rope_type='longrope' is not supported; supported: default"):
        model.hub.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"pickle.*convert it with"):
        model.hub.load(folder)
    with pytest.raises(HubError, match="nothing does not exist"):
        model.hub.load(folder / "nothing")
    (folder / "empty" / "checkpoints" / "step-3").mkdir(parents=True)
    with pytest.raises(HubError, match=r"no config\.json; a run's are .*step-3"):
        model.hub.load(folder / "empty")


def test_an_index_cannot_leave_its_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NAME: "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match="outside its folder"):
        model.hub.load(folder)


def test_a_cut_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HubError, match=r"model\.safetensors: the header"):
        model.hub.load(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "bart", "t5", "bert"])
def test_a_tied_head_saved_apart(family, tmp_path):
    """Equal to the embedding it is the embedding; another one is read beside it, as transformers reads it, and told. (BERT has
    no place for two.)"""
    network = randomized(tiny_config(family, tie_embeddings=True), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    published = weight_table(network.config)["head.weight"].published
    head = network.head.weight.detach().clone()
    edit(tmp_path, lambda t: t.update({published: head}))
    assert same(network, model.hub.load(tmp_path))
    edit(tmp_path, lambda t: t.update({published: head + 1}))
    if family == "bert":
        with pytest.raises(HubError, match=r"'cls\.predictions\.decoder\.weight' differs from 'bert\.embeddings"):
            model.hub.load(tmp_path)
        return
    told = contextlib.nullcontext() if family == "t5" else pytest.warns(UserWarning, match="and the files hold two that differ")
    with told:
        loaded = model.hub.load(tmp_path)
    assert torch.equal(loaded.head.weight, head + 1) and torch.equal(loaded.body.embedding.weight, head)
    theirs, ids = CLASSES[network.config.architecture].from_pretrained(tmp_path), torch.randint(3, 61, (2, 7))
    second = {"decoder_input_ids": ids} if family in ("t5", "bart") else {}
    assert torch.allclose(theirs(ids, **second).logits, loaded(ids, **second).logits, rtol=1e-5, atol=1e-4)
    model.hub.save(loaded, tmp_path / "again")
    assert same(loaded, model.hub.load(tmp_path / "again"))


def test_a_broken_index_or_shard_is_named(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    for text in ("{", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(HubError, match=r"index\.json cannot be read"):
            model.hub.load(folder)
    (folder / "part.safetensors").write_bytes(b"not safetensors")
    index.write_text(json.dumps({"weight_map": {NAME: "part.safetensors"}}))
    with pytest.raises(HubError, match=r"part\.safetensors: the header"):
        model.hub.load(folder)


@pytest.mark.parametrize("head", ["none", "sequence", "value", "mlm", "nsp"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "t5-gated"])
def test_an_untied_head_gives_way_to_another(family, head, tmp_path):
    network = randomized(tiny_config(family, tie_embeddings=False), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    loaded = model.hub.load(tmp_path, head=head)
    assert same(loaded.body, network.body) and loaded.config.head == head


def test_a_loaded_network_is_in_eval_mode(tmp_path):
    model.hub.save(randomized(tiny_config("bert", dropout=0.5), dtype=torch.float32), tmp_path)
    network, ids = model.hub.load(tmp_path), torch.randint(3, 61, (2, 7))
    assert not network.training and torch.equal(network(ids).logits, network(ids).logits)


def test_the_body_of_an_unknown_architecture_can_be_had(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForMultipleChoice"]}))
    with pytest.raises(HubError, match="'LlamaForMultipleChoice' is not supported; supported: LlamaForCausalLM"):
        model.hub.load(folder)
    assert model.hub.load(folder, head="none").config.head == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": "x"}, "AttributeError"),
        ({"hidden_size": 48.0}, "width=48.0 is not an integer"),
        ({"num_hidden_layers": True}, "depth=True is not an integer"),
        ({"eos_token_id": "</s>"}, "eos_id='</s>' is not an id"),
        ({"tie_word_embeddings": "false"}, "tie_embeddings='false' is neither"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps='1e-5' is not a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "must be above 0"),
        ({"architectures": "LlamaForCausalLM"}, "is not a list"),
    ],
)
def test_wrong_values_in_config_are_named(changes, message, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(HubError, match=f"config.json: .*{message}"):
        model.hub.load(folder)


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="cannot hold dropout"):
        model.hub.save(randomized(tiny_config("llama", dropout=0.1)), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_settings_that_are_easily_misread(folder):
    """Published configs: a window that is not used, a trained context beside dynamic scaling, T5's three activations."""
    config = json.loads((folder / "config.json").read_text())
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 7}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": dynamic}))
    assert model.hub.read_config(folder).rope.trained_context == 32  # as transformers has it: max_position_embeddings
    unused = {"model_type": "qwen2", "architectures": None, "use_sliding_window": False, "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(config | unused | {"max_window_layers": 0}))
    assert {spec.window for spec in model.hub.read_config(folder).layers} == {None}
    from model.families import t5

    published = {name: t5.read_config({"feed_forward_proj": name}) for name in ("relu", "gelu", "gated-gelu", "gated-silu")}
    assert [(values["mlp"], values["activation"]) for values in published.values()] == [
        *(("plain", "relu"), ("plain", "gelu")),
        *(("gated", "gelu_tanh"), ("gated", "silu")),
    ]


def test_regression_says_so(tmp_path):
    model.hub.save(randomized(tiny_config("bert", head="sequence", labels=1), dtype=torch.float32), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == "regression"
    assert model.hub.load(tmp_path).config.labels == 1
