"""LLaMA: RMSNorm before each sublayer, rotary positions, a gated SiLU feed-forward, grouped key/value heads, no biases.

Source: Touvron et al. 2023, arXiv 2302.13971; grouped-query attention as in Llama 2 (arXiv 2307.09288); RoPE
scaled to long contexts as in Llama 3.1 (arXiv 2407.21783). Names as transformers reads them; their rotary halves are
split, not interleaved (see `model.rope`).
"""

from model.config import HeadSpec, Rope
from model.families._shared import activation, published_context, read_rope, token_ids, write_rope, write_token_ids

MODEL_TYPE = "llama"

FAMILY = {
    "family": MODEL_TYPE,
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "gated",
    "activation": "silu",
    "projection": "separate",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}
_PUBLISHED = FAMILY | {
    "width": 4096,
    "depth": 32,
    "heads": 32,
    "kv_heads": 8,
    "mlp_width": 14336,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}
_LLAMA_2 = {"vocab_size": 32000, "context": 4096, "rope": Rope(), "bos_id": 1, "eos_id": 2}
_LLAMA_3 = {"vocab_size": 128256, "bos_id": 128000, "eos_id": 128001}


def _scaled(factor: float) -> dict:
    return {"context": 131072, "rope": Rope(500000.0, "llama3", factor, trained_context=8192)}


PRESETS = {
    # The default run: trains in about two minutes on two CPU cores.
    "tiny": FAMILY
    | {
        "vocab_size": 2048,
        "width": 128,
        "depth": 3,
        "heads": 4,
        "kv_heads": 4,
        "mlp_width": 352,
        "context": 128,
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "rope": Rope(),
        "bos_id": 1,
        "eos_id": 2,
    },
    "llama-2-7b": _PUBLISHED | _LLAMA_2 | {"kv_heads": 32, "mlp_width": 11008},
    "llama-2-13b": _PUBLISHED
    | _LLAMA_2
    | {"width": 5120, "depth": 40, "heads": 40, "kv_heads": 40, "mlp_width": 13824},
    "llama-3-8b": _PUBLISHED | _LLAMA_3 | {"context": 8192, "rope": Rope(500000.0)},
    "llama-3.1-8b": _PUBLISHED | _LLAMA_3 | _scaled(8.0),
    "llama-3.1-70b": _PUBLISHED
    | _LLAMA_3
    | _scaled(8.0)
    | {"width": 8192, "depth": 80, "heads": 64, "mlp_width": 28672},
    "llama-3.2-1b": _PUBLISHED
    | _LLAMA_3
    | _scaled(32.0)
    | {"width": 2048, "depth": 16, "mlp_width": 8192, "tie_embeddings": True},
}


def read_common(hf: dict, family: dict, **default) -> dict:
    """Read the fields that LLaMA and later families have in common. `default`: values of absent fields."""
    default = {"heads": 32, "context": 2048, "base": 10000.0, "width": 4096, "mlp_width": 11008} | default
    heads, width = hf.get("num_attention_heads", default["heads"]), hf.get("hidden_size", default["width"])
    rope, context = read_rope(hf, hf.get("max_position_embeddings", default["context"]), default["base"])
    head_width = hf.get("head_dim", default.get("head_width"))
    return (
        family
        | {
            "vocab_size": hf.get("vocab_size", 32000),
            "width": width,
            "depth": hf.get("num_hidden_layers", 32),
            "heads": heads,
            "kv_heads": hf.get("num_key_value_heads") or default.get("kv_heads") or heads,
            "free_head_width": None if head_width is None or head_width * heads == width else head_width,
            "mlp_width": hf.get("intermediate_size", default["mlp_width"]),
            "context": context,
            "norm_eps": hf.get("rms_norm_eps", 1e-6),
            "activation": activation(hf, "hidden_act", "silu"),
            "tie_embeddings": hf.get("tie_word_embeddings", False),
            "rope": rope,
            "attention_dropout": hf.get("attention_dropout", 0.0),
            "init_std": hf.get("initializer_range", 0.02),
        }
        | token_ids(hf, default.get("bos"), default.get("eos"))
    )


def write_common(config) -> dict:
    """Return the fields of `read_common`."""
    if config.dropout:
        raise ValueError(f"a {config.family} config.json cannot hold dropout={config.dropout}; set it to 0 before saving")
    return (
        {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "intermediate_size": config.mlp_width,
            "max_position_embeddings": published_context(config),
            "rms_norm_eps": config.norm_eps,
            "hidden_act": config.activation,
            "tie_word_embeddings": config.tie_embeddings,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.init_std,
        }
        | write_rope(config.rope, published_context(config))
        | write_token_ids(config)
    )


def read_config(hf: dict) -> dict:
    bias = hf.get("attention_bias", False)
    values = read_common(hf, FAMILY, bos=1, eos=2)
    return values | {"qkv_bias": bias, "out_bias": bias, "mlp_bias": hf.get("mlp_bias", False)}


def write_config(config) -> dict:
    if config.qkv_bias != config.out_bias:
        raise ValueError(f"a llama config.json has one field for qkv_bias={config.qkv_bias} and out_bias={config.out_bias}")
    return write_common(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


WEIGHTS = (
    ("body.embedding.weight", "{body}embed_tokens.weight", "embedding"),
    ("body.blocks.{layer}.attention_norm.weight", "{body}layers.{layer}.input_layernorm.weight", "norm"),
    ("body.blocks.{layer}.attention.project.query.weight", "{body}layers.{layer}.self_attn.q_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.project.query.bias", "{body}layers.{layer}.self_attn.q_proj.bias", "bias"),
    ("body.blocks.{layer}.attention.project.key.weight", "{body}layers.{layer}.self_attn.k_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.project.key.bias", "{body}layers.{layer}.self_attn.k_proj.bias", "bias"),
    ("body.blocks.{layer}.attention.project.value.weight", "{body}layers.{layer}.self_attn.v_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.project.value.bias", "{body}layers.{layer}.self_attn.v_proj.bias", "bias"),
    ("body.blocks.{layer}.attention.out.weight", "{body}layers.{layer}.self_attn.o_proj.weight", "matrix"),
    ("body.blocks.{layer}.attention.out.bias", "{body}layers.{layer}.self_attn.o_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp_norm.weight", "{body}layers.{layer}.post_attention_layernorm.weight", "norm"),
    ("body.blocks.{layer}.mlp.gate.weight", "{body}layers.{layer}.mlp.gate_proj.weight", "matrix"),
    ("body.blocks.{layer}.mlp.gate.bias", "{body}layers.{layer}.mlp.gate_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp.up.weight", "{body}layers.{layer}.mlp.up_proj.weight", "matrix"),
    ("body.blocks.{layer}.mlp.up.bias", "{body}layers.{layer}.mlp.up_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp.down.weight", "{body}layers.{layer}.mlp.down_proj.weight", "matrix"),
    ("body.blocks.{layer}.mlp.down.bias", "{body}layers.{layer}.mlp.down_proj.bias", "bias"),
    ("body.norm.weight", "{body}norm.weight", "norm"),
)


def weights(config) -> tuple[tuple, ...]:
    return WEIGHTS


def out_rows(name: str) -> tuple[tuple, ...]:
    """Return the rows of a head's last layer."""
    return (("head.out.weight", f"{name}.weight", "head"), ("head.out.bias", f"{name}.bias", "bias"))


def heads(name: str, qa_prefix: str) -> dict[str, HeadSpec]:
    """Return LLaMA's heads under the class names of another family."""
    return {
        "lm": HeadSpec(f"{name}ForCausalLM", (("head.weight", "lm_head.weight", "head"),), bias=False),
        "sequence": HeadSpec(f"{name}ForSequenceClassification", out_rows("score")[:1], pool="last", bias=False),
        "token": HeadSpec(f"{name}ForTokenClassification", out_rows("score")),
        "qa": HeadSpec(f"{name}ForQuestionAnswering", out_rows("qa_outputs"), prefix=qa_prefix),
        "none": HeadSpec(f"{name}Model"),
    }


HEADS = heads("Llama", qa_prefix="transformer.")
ALIASES = {"lm_head.weight": "{body}embed_tokens.weight"}
RENAMED: dict[str, str] = {}

IGNORED = ("{body}layers.{layer}.self_attn.rotary_emb.inv_freq",)  # saved as a buffer by transformers before 4.32
PREFIX = "model."
DROPOUTS = ("attention_dropout",)
CONSTANTS: dict[str, str] = {}
