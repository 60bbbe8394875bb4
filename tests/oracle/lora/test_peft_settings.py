"""adapter_config.json as PEFT writes it: settings that say nothing about the tensors open, and give what PEFT gives; those that
change what is computed are refused by their name, before any tensor is looked at."""

import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, EvaConfig, KasaConfig, MontecloraConfig, VeloraConfig

import lora.peft_io as peft_io
import model.hub
from lora.config import AdapterError
from lora.merge_folder import merge_to_folder
from tests.conftest import randomized, tiny_config
from tests.oracle.lora.test_peft_io import CAUSAL, ROUNDING, gap, inputs, opened_by_peft, peft_folder, shake, twin
from tests.oracle.wide import widen

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
ADALORA = {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["q_proj"]}
P = CAUSAL | {"num_virtual_tokens": 3}
TYING = {"ensure_weight_tying": True}
OPEN = {  # name: (tied, PEFT's config)
    "ties nothing: untied": (False, peft.LoraConfig(**LORA, **TYING)),
    "ties nothing: untied ends": (False, peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], **TYING)),
    "ties nothing: neither end": (True, peft.LoraConfig(**LORA, **TYING)),
    "ties nothing: AdaLoRA": (True, peft.AdaLoraConfig(**ADALORA, **TYING)),
    "ties two copies": (True, peft.LoraConfig(**LORA, modules_to_save=["lm_head"], **TYING)),
    "ties two parts": (True, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], **TYING)),
    "excludes": (False, peft.LoraConfig(**LORA, exclude_modules=["layers.1.self_attn.q_proj"])),
    "some layers": (False, peft.LoraConfig(**LORA, layers_to_transform=[1], layers_pattern="layers")),
    "first values": (False, peft.LoraConfig(**LORA, init_lora_weights="orthogonal")),
    "first values of data": (False, peft.LoraConfig(**LORA, init_lora_weights="eva", eva_config=EvaConfig())),
    "a revision": (False, peft.LoraConfig(**LORA, revision="main", megatron_core="other")),
    "all linear": (False, peft.LoraConfig(r=2, target_modules="all-linear")),
    "words (P)": (False, peft.PromptTuningConfig(**P, prompt_tuning_init="SAMPLE_VOCAB")),
    "an LSTM (P)": (False, peft.PromptEncoderConfig(**P, encoder_reparameterization_type="LSTM", encoder_hidden_size=4)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("settings")
    for tied in (False, True):
        model.hub.save(randomized(tiny_config("llama", tie_embeddings=tied)), root / f"tied={tied}")
    return root


@pytest.mark.parametrize("name", OPEN)
def test_what_changes_nothing_opens(name, bases, tmp_path, parity):
    tied, config = OPEN[name]
    base = bases / f"tied={tied}"
    network = model.hub.load(base)
    peft_folder(twin(network.config, base), config, tmp_path)
    expected = opened_by_peft(network.config, base, tmp_path)(**inputs(network.config)).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = peft_io.load(network, tmp_path).eval()(**inputs(network.config)).logits
    told = [str(each.message) for each in said if "further training here separates them" in str(each.message)]
    assert bool(told) == name.startswith("ties two")
    parity(f"peft settings: {name}", f"peft {peft.__version__}", gap(ours, expected), *ROUNDING)


@pytest.mark.parametrize("name", ["ties two copies", "ties two parts"])
def test_what_is_tied_merges_into_one_matrix(name, bases, tmp_path, parity):
    """Without --untie: both ends were changed alike."""
    base = bases / "tied=True"
    network = model.hub.load(base)
    peft_folder(twin(network.config, base), OPEN[name][1], tmp_path / "adapter")
    with pytest.warns(UserWarning, match="further training here separates them"):
        merge_to_folder(base, tmp_path / "adapter", tmp_path / "out")
    merged = model.hub.load(tmp_path / "out")
    assert merged.head.weight is merged.body.embedding.weight
    expected = opened_by_peft(network.config, base, tmp_path / "adapter")(**inputs(network.config)).logits
    error = gap(merged(**inputs(network.config)).logits, expected)
    parity(f"peft settings: {name}, merged", f"peft {peft.__version__}", error, *ROUNDING)


MICA = LORA | {"init_lora_weights": "mica"}


def test_mica(tmp_path, parity):
    """Its B is of the base's least singular vectors, which the base keeps. (PEFT makes it in 32 bits and fewer.)"""
    model.hub.save(randomized(tiny_config("llama"), dtype=torch.float32), tmp_path / "base")
    network = model.hub.load(tmp_path / "base")
    adapted = peft.get_peft_model(twin(network.config, tmp_path / "base").float(), peft.LoraConfig(**MICA))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(twin(network.config, tmp_path / "base").float(), tmp_path / "adapter").double()
    widen(theirs.get_base_model())  # once more: its tables were in 32 bits meanwhile
    expected = theirs.eval()(**inputs(network.config)).logits
    ours = peft_io.load(network.double(), tmp_path / "adapter").eval()(**inputs(network.config)).logits
    parity("peft settings: MiCA", f"peft {peft.__version__}", gap(ours, expected), *ROUNDING)


REFUSED = {  # setting: PEFT's config
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3]} | CAUSAL,
    "use_bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)},
    "use_qalora": {"use_qalora": True},
    "kasa_config": {"kasa_config": KasaConfig()},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "velora_config": {"velora_config": VeloraConfig(num_groups=4)},
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_changes_something_is_named(setting, bases, tmp_path):
    base = bases / "tied=False"
    network = model.hub.load(base)
    peft_folder(twin(network.config, base), peft.LoraConfig(**(LORA | REFUSED[setting])), tmp_path)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {setting}=.* is not supported"):
        peft_io.load(network, tmp_path)
