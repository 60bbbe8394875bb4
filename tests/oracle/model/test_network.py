"""Our networks against transformers': float64, every logit, every layer's hidden state, every parameter's gradient."""

import pytest
import torch
import transformers
from torch import nn

import model.hub
from model.config import ModelConfig
from model.network import Network
from model.weights import to_published, weight_table
from tests.compare import Error, mixed, relative
from tests.conftest import randomized, tiny_config
from tests.oracle.wide import widen

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


ROUNDING = (1e-12, "float64 rounding; sums in another order")
BIASES = {"qkv_bias": True, "out_bias": True}
CASES = {  # name: (family, changes)
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_embeddings": False}),
    "llama": ("llama", {}),
    "llama-biases": ("llama", BIASES | {"mlp_bias": True}),
    "llama-free-heads": ("llama", {"free_head_width": 10, "tie_embeddings": False}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", BIASES | {"windows": (None, 6)}),
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "roformer": ("roformer", {}),
    "t5": ("t5", {}),
    "t5-gated": ("t5-gated", {}),
    "bart": ("bart", {}),
    "bart-scaled": ("bart", {"scale_embedding": True}),
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
    family, changes = CASES[case]
    network = randomized(tiny_config(family, **changes))
    states, gradients = errors_of(network, widen(published(network, tmp_path)), padded)
    parity(f"{case}: logits, states{', padded' * padded}", LIBRARY, states, *ROUNDING)
    parity(f"{case}: gradients{', padded' * padded}", LIBRARY, gradients, *ROUNDING)


def test_visible_prefix(tmp_path, parity):
    """Transformers' LLaMA with a four-axis mask, written position by position: documents, and a visible prefix in each row."""
    network = randomized(tiny_config("llama"))
    theirs = widen(published(network, tmp_path))
    ids, lengths = torch.randint(3, 61, (3, 12)), torch.tensor([5, 1, 9])
    documents, positions = torch.tensor([[0] * 12, [0] * 4 + [1] * 8, [0] * 7 + [1] * 5]), torch.arange(12).repeat(3, 1)
    positions[1, 4:] -= 4
    positions[2, 7:] -= 7
    allowed = torch.zeros(3, 1, 12, 12, dtype=torch.bool)
    for b in range(3):
        for t in range(12):
            for s in range(12):
                allowed[b, 0, t, s] = documents[b, t] == documents[b, s] and (s <= t or s < lengths[b])
    their_mask = torch.zeros(allowed.shape).double().masked_fill(~allowed, -1e300)
    for attention in ("sdpa", "reference"):
        ours = randomized(tiny_config("llama"), attention=attention)
        logits = ours(ids, document_ids=documents, position_ids=positions, visible_lengths=lengths).logits
        theirs.zero_grad()
        other = theirs(ids, attention_mask=their_mask, position_ids=positions)
        parity(f"llama: visible prefix, {attention}, logits", LIBRARY, mixed(logits, other.logits), *ROUNDING)
        gap = gradients_gap(ours, theirs, logits, other.logits, torch.randn_like(logits))
        parity(f"llama: visible prefix, {attention}, gradients", LIBRARY, gap, *ROUNDING)


# Of logits and states, and of gradients. LLaMA's own are 1.4e-7 and 5e-7 at best, over two to six layers and logits near 1.
CASTS = (5e-6, "as shipped: transformers casts norms and rotary tables to float32, also in float64")
SHIPPED = {
    "llama": CASTS,
    "mistral": CASTS,
    "qwen2": CASTS,
    "qwen3": CASTS,
    "roformer": (1e-6, "as shipped: transformers' rotary table is float32, also in float64"),
    "t5": (1e-5, "as shipped: transformers casts norms to float32, also in float64; scores are not scaled"),
    "t5-gated": (1e-5, "as shipped: transformers casts norms to float32, also in float64; scores are not scaled"),
}


@pytest.mark.parametrize("family", SHIPPED)
def test_as_shipped(family, tmp_path, parity):
    """Compare as a user of both would, in float64. The families that are not here cast nothing."""
    network = randomized(tiny_config(family))
    states, gradients = errors_of(network, published(network, tmp_path), padded=True)
    parity(f"{family}: as shipped, logits, states", LIBRARY, states, *SHIPPED[family])
    parity(f"{family}: as shipped, gradients", LIBRARY, gradients, *SHIPPED[family])
    assert max(states, gradients) > ROUNDING[0]  # else it belongs to the others


def errors_of(network: Network, theirs: nn.Module, padded: bool) -> tuple[Error, Error]:
    """The largest error of logits and hidden states, and that of the parameters' gradients."""
    mine, their_inputs, scored, real = inputs(network.config, padded)
    ours, other = network(**mine, hidden_states=True), theirs(**their_inputs, output_hidden_states=True)
    states = [mixed(ours.logits[scored], other.logits[scored])]
    lists = [(ours.hidden_states, other.decoder_hidden_states if len(real) == 2 else other.hidden_states)]
    lists += [(ours.encoder_hidden_states, other.encoder_hidden_states)] if len(real) == 2 else []
    for (mine, their_states), which in zip(lists, real, strict=True):
        states += [mixed(a[which], b[which]) for a, b in zip(mine, their_states, strict=True)]
    direction = torch.randn_like(ours.logits) * scored[..., None]
    return max(states), gradients_gap(network, theirs, ours.logits, other.logits, direction)


def gradients_gap(network: Network, theirs: nn.Module, logits, their_logits, direction: torch.Tensor) -> Error:
    """Over all parameters; of theirs no other may have a gradient."""
    (logits * direction).sum().backward()
    (their_logits * direction).sum().backward()
    table, gradients = weight_table(network.config), dict(theirs.named_parameters())
    errors = []
    for name, parameter in network.named_parameters():
        row = table[name]
        if not parameter.requires_grad:  # BART's constant bias: a buffer there
            assert row.published not in gradients
            continue
        errors.append(mixed(to_published(row, parameter.grad, network.config), gradients.pop(row.published).grad))
    assert not [name for name, value in gradients.items() if value.grad is not None]
    return max(errors)


PACKED = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "roformer"]


@pytest.mark.parametrize("family", PACKED)
def test_packed(family, tmp_path, parity):
    """Three documents in one row here, one after the other there: logits, and the sum of the gradients."""
    network = randomized(tiny_config(family))
    theirs = widen(published(network, tmp_path))
    documents = [torch.randint(3, 61, (1, length)) for length in (9, 12, 4)]
    places = {"position_ids": torch.cat([torch.arange(document.size(1)) for document in documents])[None]}
    places["document_ids"] = torch.cat([torch.full((document.size(1),), n) for n, document in enumerate(documents)])[None]
    ours = network(torch.cat(documents, 1), **places).logits
    other = torch.cat([theirs(input_ids=document).logits for document in documents], 1)
    error = max(mixed(ours, other), gradients_gap(network, theirs, ours, other, torch.randn_like(ours)))
    parity(f"{family}: packed", LIBRARY, error, *ROUNDING)


def test_default_network_in_float32(tmp_path, parity):
    network = randomized(ModelConfig.preset("tiny"), dtype=torch.float32)
    model.hub.save(network, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 2048, (2, 256))
    ours, other = network(ids).logits, theirs(ids).logits
    parity("tiny logits, float32", LIBRARY, relative(ours, other), 1e-5, "float32 rounding over four layers")


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
