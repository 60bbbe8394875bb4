"""LLaMA: RMSNorm before each sublayer, rotary positions, a gated SiLU feed-forward, grouped key/value heads, no biases.

Source: Touvron et al. 2023, arXiv 2302.13971; grouped-query attention as in Llama 2 (arXiv 2307.09288). Names as
transformers reads them; their rotary halves are split, not interleaved (see `model.position`).
"""

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

_FAMILY = {
    "family": MODEL_TYPE,
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "gated",
    "projection": "separate",
}

PRESETS = {
    # The default run: trains in about two minutes on two CPU cores.
    "tiny": _FAMILY
    | {
        "vocab_size": 2048,
        "width": 128,
        "depth": 3,
        "heads": 4,
        "kv_heads": 4,
        "mlp_width": 352,
        "context": 128,
        "norm_eps": 1e-5,
        "activation": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_embeddings": True,
        "rope_base": 10000.0,
        "bos_id": 1,
        "eos_id": 2,
    },
}


def read_config(hf: dict) -> dict:
    heads, width = hf.get("num_attention_heads", 32), hf.get("hidden_size", 4096)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"llama with rope_type={kind!r} is not supported; supported: default")
    if hf.get("head_dim") not in (None, width // heads):
        raise ValueError(f"llama with head_dim={hf['head_dim']} != hidden_size / heads = {width // heads} is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"llama with hidden_act={hf['hidden_act']!r} is not supported; supported: silu")
    return _FAMILY | {
        "vocab_size": hf.get("vocab_size", 32000),
        "width": width,
        "depth": hf.get("num_hidden_layers", 32),
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "mlp_width": hf.get("intermediate_size", 11008),
        "context": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": "silu",
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "rope_base": float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "init_std": hf.get("initializer_range", 0.02),
        "bos_id": hf.get("bos_token_id", 1),
        "eos_id": hf.get("eos_token_id", 2),
        "pad_id": hf.get("pad_token_id"),
    }


def write_config(config) -> dict:
    if config.dropout:
        raise ValueError(f"a llama config.json has no place for dropout={config.dropout}; set it to 0 before saving")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_base,  # read by transformers 4; version 5 reads the next line
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


WEIGHTS = (
    ("body.embedding.weight", "model.embed_tokens.weight", "embedding"),
    ("body.blocks.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight", "norm"),
    ("body.blocks.{layer}.attention.project.query.weight", "model.layers.{layer}.self_attn.q_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.project.query.bias", "model.layers.{layer}.self_attn.q_proj.bias", "bias"),
    ("body.blocks.{layer}.attention.project.key.weight", "model.layers.{layer}.self_attn.k_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.project.key.bias", "model.layers.{layer}.self_attn.k_proj.bias", "bias"),
    ("body.blocks.{layer}.attention.project.value.weight", "model.layers.{layer}.self_attn.v_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.project.value.bias", "model.layers.{layer}.self_attn.v_proj.bias", "bias"),
    ("body.blocks.{layer}.attention.out.weight", "model.layers.{layer}.self_attn.o_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.out.bias", "model.layers.{layer}.self_attn.o_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", "norm"),
    ("body.blocks.{layer}.mlp.gate.weight", "model.layers.{layer}.mlp.gate_proj.weight", "matrix"),
    ("body.blocks.{layer}.mlp.gate.bias", "model.layers.{layer}.mlp.gate_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp.up.weight", "model.layers.{layer}.mlp.up_proj.weight", "matrix"),
    ("body.blocks.{layer}.mlp.up.bias", "model.layers.{layer}.mlp.up_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp.down.weight", "model.layers.{layer}.mlp.down_proj.weight", "matrix"),
    ("body.blocks.{layer}.mlp.down.bias", "model.layers.{layer}.mlp.down_proj.bias", "bias"),
    ("body.norm.weight", "model.norm.weight", "norm"),
    ("head.weight", "lm_head.weight", "head"),
)

IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)  # saved as a buffer by transformers before 4.32
PREFIX = "model."
DROPOUTS = ("attention_dropout",)  # which of ModelConfig's fields the family has a place for
