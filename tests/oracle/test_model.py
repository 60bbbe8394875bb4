"""Our networks against transformers': float64, every logit, every layer's hidden state, every parameter's gradient."""

import pytest
import torch
import transformers
from torch import nn

import model.hub
from model.config import ModelConfig
from model.network import Network
from model.weights import to_published, weight_table
from tests.conftest import randomized, tiny_config

LIBRARY = f"transformers {transformers.__version__}"
CLASSES = {"decoder": transformers.AutoModelForCausalLM, "encoder": transformers.AutoModelForMaskedLM}
CLASSES["encoder-decoder"] = transformers.AutoModelForSeq2SeqLM


def published(network: Network, folder) -> nn.Module:
    """The same weights in transformers' own class, float64."""
    model.hub.save(network, folder)
    kind = CLASSES[network.config.architecture]
    return kind.from_pretrained(folder, dtype=torch.float64, attn_implementation=how(network.config)).eval()


def how(config: ModelConfig) -> str:
    return "eager" if config.family == "roformer" else "sdpa"  # transformers has no other for it


def widen(theirs: nn.Module) -> None:
    """Undo transformers' casts to float32 in RMS norms and rotary tables, with torch's own RMSNorm and the formula."""
    for name, module in list(theirs.named_modules()):
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            norm = nn.RMSNorm(module.weight.numel(), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            owner, _, leaf = name.rpartition(".")
            setattr(theirs.get_submodule(owner), leaf, norm)

    body = getattr(theirs, "model", getattr(theirs, "transformer", None))  # the second, where questions are answered

    def rotary(x, position_ids):
        half = body.layers[0].self_attn.head_dim // 2
        base = theirs.config.rope_parameters["rope_theta"]
        frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
        phase = (position_ids[..., None].double() * frequency).repeat(1, 1, 2)
        return phase.cos(), phase.sin()

    if hasattr(body, "rotary_emb"):
        body.rotary_emb.forward = rotary


ROUNDING = (1e-12, "float64 rounding; sums in another order")
CASTS = (1e-5, "transformers casts RMS norms and rotary tables to float32, also in float64")
TABLES = (1e-6, "transformers' rotary table is float32, also in float64")
UNDONE = (1e-12, "those casts undone: float64 rounding")
BIASES = {"qkv_bias": True, "out_bias": True}
CASES = {  # name: (family, changes, casts undone, tolerance and its reason)
    "gpt2": ("gpt2", {}, False, ROUNDING),
    "gpt2-untied": ("gpt2", {"tie_embeddings": False}, False, ROUNDING),
    "llama": ("llama", {}, False, CASTS),
    "llama-wide": ("llama", {}, True, UNDONE),
    "llama-biases": ("llama", BIASES | {"mlp_bias": True}, True, UNDONE),
    "llama-free-heads": ("llama", {"free_head_width": 10, "tie_embeddings": False}, True, UNDONE),
    "mistral": ("mistral", {}, False, CASTS),
    "mistral-wide": ("mistral", {}, True, UNDONE),
    "qwen2": ("qwen2", {}, False, CASTS),
    "qwen2-wide": ("qwen2", {}, True, UNDONE),
    "qwen3": ("qwen3", {}, False, CASTS),
    "qwen3-wide": ("qwen3", {}, True, UNDONE),
    "qwen3-biases": ("qwen3", BIASES | {"windows": (None, 6)}, True, UNDONE),
    "bert": ("bert", {}, False, ROUNDING),
    "roberta": ("roberta", {}, False, ROUNDING),
    "roformer": ("roformer", {}, False, TABLES),
    "t5": ("t5", {}, False, CASTS),
    "t5-wide": ("t5", {}, True, UNDONE),
    "t5-gated": ("t5-gated", {}, False, CASTS),
    "t5-gated-wide": ("t5-gated", {}, True, UNDONE),
    "bart": ("bart", {}, False, ROUNDING),
    "bart-scaled": ("bart", {"scale_embedding": True}, False, ROUNDING),
}


def inputs(config: ModelConfig, padded: bool) -> tuple[dict, dict, torch.Tensor, list[torch.Tensor]]:
    """Our arguments, theirs, and which outputs count: of the logits, and of each list of hidden states.

    A pad's own output means nothing, and differs: ours attends to no key, transformers' to whatever its mask leaves.
    """
    ids, mask = torch.randint(3, 61, (3, 19)), torch.ones(3, 19, dtype=torch.long)
    if padded and config.architecture == "decoder":
        mask[0, :5], mask[1, :11] = 0, 0
    elif padded:
        mask[0, 12:], mask[1, 7:] = 0, 0
    ids[mask == 0] = config.pad_id or 0
    ours = {"input_ids": ids, "attention_mask": mask if padded else None}
    theirs = {"input_ids": ids, "attention_mask": mask}
    real = mask.bool()
    if config.architecture == "decoder":
        return ours, theirs | {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}, real, [real]
    if config.architecture == "encoder":
        kinds = torch.randint(0, config.token_types, (3, 19))
        return ours | {"token_type_ids": kinds}, theirs | {"token_type_ids": kinds}, real, [real]
    output, output_mask = torch.randint(3, 61, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    if padded:
        output_mask[0, 6:] = 0
    second = {"decoder_input_ids": output, "decoder_attention_mask": output_mask if padded else None}
    return ours | second, theirs | second, output_mask.bool(), [output_mask.bool(), real]


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_logits_states_and_gradients(case, padded, tmp_path, parity):
    family, changes, wide, (tolerance, reason) = CASES[case]
    part, network = case.removesuffix("-wide"), randomized(tiny_config(family, **changes))
    theirs = published(network, tmp_path)
    if wide:
        widen(theirs)
    mine, their_inputs, scored, real = inputs(network.config, padded)
    ours, other = network(**mine, hidden_states=True), theirs(**their_inputs, output_hidden_states=True)
    errors = [(ours.logits - other.logits)[scored].abs().max() / (1 + other.logits.abs().max())]
    lists = [(ours.hidden_states, other.decoder_hidden_states if len(real) == 2 else other.hidden_states)]
    lists += [(ours.memory_states, other.encoder_hidden_states)] if len(real) == 2 else []
    for (mine, their_states), which in zip(lists, real, strict=True):
        assert len(mine) == len(their_states)
        errors += [(a - b)[which].abs().max() / (1 + b.abs().max()) for a, b in zip(mine, their_states, strict=True)]
    parity(f"{part}: logits, states{', padded' * padded}", LIBRARY, max(errors), tolerance, reason)

    direction = torch.randn_like(ours.logits) * scored[..., None]
    (ours.logits * direction).sum().backward()
    (other.logits * direction).sum().backward()
    table, gradients = weight_table(network.config), dict(theirs.named_parameters())
    errors = []
    for name, parameter in network.named_parameters():
        row = table[name]
        if not parameter.requires_grad:  # BART's constant bias: a buffer there
            assert row.published not in gradients
            continue
        expected = gradients.pop(row.published).grad
        errors.append((to_published(row, parameter.grad, network.config) - expected).abs().max() / (1 + expected.abs().max()))
    assert not [name for name, value in gradients.items() if value.grad is not None]
    parity(f"{part}: gradients{', padded' * padded}", LIBRARY, max(errors), tolerance, reason)


PACKED = ["gpt2", "llama-wide", "mistral-wide", "qwen2-wide", "qwen3-wide", "bert", "roberta", "roformer"]


@pytest.mark.parametrize("case", PACKED)
def test_packed(case, tmp_path, parity):
    """Three documents in one row here, one after the other there: logits, and the sum of the gradients."""
    family, changes, wide, (tolerance, reason) = CASES[case]
    network = randomized(tiny_config(family, **changes))
    theirs = published(network, tmp_path)
    if wide:
        widen(theirs)
    documents = [torch.randint(3, 61, (1, length)) for length in (9, 12, 4)]
    places = {"position_ids": torch.cat([torch.arange(document.size(1)) for document in documents])[None]}
    places["document_ids"] = torch.cat([torch.full((document.size(1),), n) for n, document in enumerate(documents)])[None]
    ours = network(torch.cat(documents, 1), **places).logits
    other = torch.cat([theirs(input_ids=document).logits for document in documents], 1)
    errors = [(ours - other).abs().max() / (1 + other.abs().max())]
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (other * direction).sum().backward()
    table, gradients = weight_table(network.config), dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        expected = gradients[table[name].published].grad
        difference = to_published(table[name], parameter.grad, network.config) - expected
        errors.append(difference.abs().max() / (1 + expected.abs().max()))
    parity(f"{case.removesuffix('-wide')}: packed", LIBRARY, max(errors), tolerance, reason)


def test_default_network_in_float32(tmp_path, parity):
    network = randomized(ModelConfig.preset("tiny"), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 2048, (2, 256))
    ours, other = network(ids).logits, theirs(ids).logits
    error = (ours - other).abs().max() / other.abs().max()
    parity("tiny logits, float32", LIBRARY, error, 1e-5, "float32 rounding over four layers")


COUNTS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts(preset):
    with torch.device("meta"):
        network = Network(ModelConfig.preset(preset))
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_sizes(preset)))
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[preset]
    assert sum(parameter.numel() for parameter in theirs.parameters()) == COUNTS[preset]


def hf_sizes(preset: str) -> dict:
    config = ModelConfig.preset(preset)
    return {"n_embd": config.width, "n_layer": config.depth, "n_head": config.heads}
