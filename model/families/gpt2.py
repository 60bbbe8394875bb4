"""GPT-2: learned positions, LayerNorm before each sublayer, GELU, one fused matrix for q, k and v.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names as in the weights that
OpenAI published and transformers reads. Their linear layers are `Conv1D`, that is, stored I × O: "transposed" here.
"""

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"

_FAMILY = {
    "family": MODEL_TYPE,
    "norm": "layernorm",
    "position": "learned",
    "mlp": "plain",
    "projection": "fused",
    "attention_bias": True,
    "mlp_bias": True,
}


def _published(width: int, depth: int, heads: int) -> dict:
    return _FAMILY | {
        "vocab_size": 50257,
        "width": width,
        "depth": depth,
        "heads": heads,
        "kv_heads": heads,
        "mlp_width": 4 * width,
        "context": 1024,
        "norm_eps": 1e-5,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "bos_id": 50256,
        "eos_id": 50256,
    }


PRESETS = {
    "gpt2": _published(768, 12, 12),
    "gpt2-medium": _published(1024, 24, 16),
    "gpt2-large": _published(1280, 36, 20),
    "gpt2-xl": _published(1600, 48, 25),
}

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def read_config(hf: dict) -> dict:
    for key, only in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if hf.get(key, only) != only:
            raise ValueError(f"gpt2 with {key}={hf[key]} is not supported")
    if hf.get("embd_pdrop", 0.1) != hf.get("resid_pdrop", 0.1):
        raise ValueError(f"gpt2 with embd_pdrop={hf.get('embd_pdrop')} != resid_pdrop={hf.get('resid_pdrop')} is not supported")
    if hf.get("activation_function", "gelu_new") not in ACTIVATIONS:
        raise ValueError(f"gpt2 with activation_function={hf['activation_function']!r}; supported: {', '.join(ACTIVATIONS)}")
    return _FAMILY | {
        "vocab_size": hf.get("vocab_size", 50257),
        "width": hf.get("n_embd", 768),
        "depth": hf.get("n_layer", 12),
        "heads": hf.get("n_head", 12),
        "kv_heads": hf.get("n_head", 12),
        "mlp_width": hf.get("n_inner") or 4 * hf.get("n_embd", 768),
        "context": hf.get("n_positions", 1024),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": ACTIVATIONS[hf.get("activation_function", "gelu_new")],
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "dropout": hf.get("resid_pdrop", 0.1),
        "attention_dropout": hf.get("attn_pdrop", 0.1),
        "init_std": hf.get("initializer_range", 0.02),
        "bos_id": hf.get("bos_token_id", 50256),
        "eos_id": hf.get("eos_token_id", 50256),
        "pad_id": hf.get("pad_token_id"),
    }


def write_config(config) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


WEIGHTS = (
    ("body.embedding.weight", "transformer.wte.weight", "embedding"),
    ("body.position.weight", "transformer.wpe.weight", "position"),
    ("body.blocks.{layer}.attention_norm.weight", "transformer.h.{layer}.ln_1.weight", "norm"),
    ("body.blocks.{layer}.attention_norm.bias", "transformer.h.{layer}.ln_1.bias", "bias"),
    ("body.blocks.{layer}.attention.project.qkv.weight", "transformer.h.{layer}.attn.c_attn.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.attention.project.qkv.bias", "transformer.h.{layer}.attn.c_attn.bias", "bias"),
    ("body.blocks.{layer}.attention.out.weight", "transformer.h.{layer}.attn.c_proj.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.attention.out.bias", "transformer.h.{layer}.attn.c_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp_norm.weight", "transformer.h.{layer}.ln_2.weight", "norm"),
    ("body.blocks.{layer}.mlp_norm.bias", "transformer.h.{layer}.ln_2.bias", "bias"),
    ("body.blocks.{layer}.mlp.up.weight", "transformer.h.{layer}.mlp.c_fc.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.mlp.up.bias", "transformer.h.{layer}.mlp.c_fc.bias", "bias"),
    ("body.blocks.{layer}.mlp.down.weight", "transformer.h.{layer}.mlp.c_proj.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.mlp.down.bias", "transformer.h.{layer}.mlp.c_proj.bias", "bias"),
    ("body.norm.weight", "transformer.ln_f.weight", "norm"),
    ("body.norm.bias", "transformer.ln_f.bias", "bias"),
    ("head.weight", "lm_head.weight", "head"),
)

# Causal masks that old versions saved as buffers; the published GPT-2 files carry them.
IGNORED = ("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias")
PREFIX = "transformer."  # absent where the body alone was saved, as in the published GPT-2 files
DROPOUTS = ("dropout", "attention_dropout")  # which of ModelConfig's fields the family has a place for
