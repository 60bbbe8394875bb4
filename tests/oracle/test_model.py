"""Our networks against transformers': float64, every logit, every layer's hidden state, every parameter's gradient."""

import pytest
import torch
import transformers
from torch import nn

import model.hub
from model.config import ModelConfig
from model.decoder import LanguageModel
from model.weights import weight_table
from tests.conftest import randomized, tiny_config

LIBRARY = f"transformers {transformers.__version__}"


def published(network: LanguageModel, folder) -> nn.Module:
    """The same weights in transformers' own class, float64."""
    model.hub.save(network, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    return theirs.eval()


def widen(theirs: nn.Module) -> None:
    """Undo transformers' casts to float32 in LLaMA's norms and rotary tables, with torch's own RMSNorm and its formula."""
    for name, module in list(theirs.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.numel(), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            owner, _, leaf = name.rpartition(".")
            setattr(theirs.get_submodule(owner), leaf, norm)

    def rotary(x, position_ids):
        half = theirs.config.hidden_size // theirs.config.num_attention_heads // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        phase = (position_ids[..., None].double() * frequency).repeat(1, 1, 2)
        return phase.cos(), phase.sin()

    theirs.model.rotary_emb.forward = rotary


CASES = {
    "gpt2": ("gpt2", {}, False, 1e-12, "float64 rounding; sums in another order"),
    "gpt2-untied": ("gpt2", {"tie_embeddings": False}, False, 1e-12, "float64 rounding; sums in another order"),
    "llama": ("llama", {}, False, 1e-5, "transformers casts norms and rotary tables to float32, also in float64"),
    "llama-wide": ("llama", {}, True, 1e-12, "as above with those casts undone: float64 rounding"),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, True, 1e-12, "casts undone: float64 rounding"),
}


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_logits_states_and_gradients(case, padded, tmp_path, parity):
    family, changes, wide, tolerance, reason = CASES[case]
    network = randomized(tiny_config(family, **changes))
    theirs = published(network, tmp_path)
    if wide:
        widen(theirs)
    ids = torch.randint(0, 61, (3, 19))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5], mask[1, :11] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    real = mask.bool()

    ours = network(ids, mask if padded else None, hidden_states=True)
    other = theirs(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    # a pad's own output means nothing, and differs: ours attends to no key, transformers' to whatever its mask leaves
    errors = [(ours.logits - other.logits)[real].abs().max()]
    assert len(ours.hidden_states) == len(other.hidden_states)
    errors += [(a - b)[real].abs().max() for a, b in zip(ours.hidden_states, other.hidden_states, strict=True)]
    parity(f"{case} logits, states{', padded' * padded}", LIBRARY, max(errors), tolerance, reason)

    direction = torch.randn_like(ours.logits) * real[..., None]
    (ours.logits * direction).sum().backward()
    (other.logits * direction).sum().backward()
    table, gradients = weight_table(network.config), dict(theirs.named_parameters())
    errors = []
    for name, parameter in network.named_parameters():
        row = table[name]
        expected = gradients[row.published].grad
        expected = expected.T if row.transposed else expected
        errors.append((parameter.grad - expected).abs().max() / (1 + expected.abs().max()))
    parity(f"{case} gradients{', padded' * padded}", LIBRARY, max(errors), tolerance, reason)


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
        network = LanguageModel(ModelConfig.preset(preset))
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_sizes(preset)))
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[preset]
    assert sum(parameter.numel() for parameter in theirs.parameters()) == COUNTS[preset]


def hf_sizes(preset: str) -> dict:
    config = ModelConfig.preset(preset)
    return {"n_embd": config.width, "n_layer": config.depth, "n_head": config.heads}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_tokens_equal_transformers(family, tmp_path):
    """Twenty prompts, one batch, left-padded, on a random network: the same tokens as transformers' generate."""
    from model.generate import generate

    network = randomized(tiny_config(family, context=64))
    theirs = published(network, tmp_path)
    lengths = torch.randint(1, 20, (20,)).tolist()
    ids, mask = torch.full((20, 20), 0), torch.zeros(20, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = torch.randint(3, 61, (length,)), 1
    ours = generate(network, ids, attention_mask=mask, max_new_tokens=24, temperature=0)
    options = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(ids, attention_mask=mask, **options)[:, 20:]
    assert torch.equal(ours, expected)
    for row, length in enumerate(lengths):  # and padding changes nothing
        alone = generate(network, ids[row : row + 1, -length:], max_new_tokens=24, temperature=0)
        assert torch.equal(alone[0], ours[row])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 5, None), (1.3, None, 0.8), (1.0, 9, 0.6)])
def test_filters_equal_transformers(temperature, top_k, top_p, parity):
    from model.generate import filter_logits

    logits = torch.randn(50, 61, dtype=torch.float64)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    ours = filter_logits(logits, temperature, top_k, top_p)
    assert torch.equal(ours.isinf(), expected.isinf())
    kept = ~expected.isinf()
    error = (ours - expected)[kept].abs().max()
    parity(f"sampling filters t={temperature} k={top_k} p={top_p}", LIBRARY, error, 0.0, "the same operations")
