"""GPT-2: a pre-norm decoder with learned positions, LayerNorm, GELU, one fused matrix for q, k and v.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names as in the weights that
OpenAI published and transformers reads. Their linear layers are `Conv1D`, stored I × O: "transposed" here.
"""

from model.config import HeadSpec
from model.families._shared import activation, published_activation, refuse_unless, token_ids, write_token_ids

MODEL_TYPE = "gpt2"

_FAMILY = {
    "family": MODEL_TYPE,
    "norm": "layernorm",
    "position": "learned",
    "mlp": "plain",
    "projection": "fused",
    "qkv_bias": True,
    "out_bias": True,
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


def read_config(hf: dict) -> dict:
    refuse_unless(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    if hf.get("embd_pdrop", 0.1) != hf.get("resid_pdrop", 0.1):
        raise ValueError(f"embd_pdrop={hf.get('embd_pdrop')} != resid_pdrop={hf.get('resid_pdrop')} is not supported")
    return _FAMILY | {
        "vocab_size": hf.get("vocab_size", 50257),
        "width": hf.get("n_embd", 768),
        "depth": hf.get("n_layer", 12),
        "heads": hf.get("n_head", 12),
        "kv_heads": hf.get("n_head", 12),
        "mlp_width": hf.get("n_inner") or 4 * hf.get("n_embd", 768),
        "context": hf.get("n_positions", 1024),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": activation(hf, "activation_function", "gelu_new"),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "dropout": hf.get("resid_pdrop", 0.1),
        "attention_dropout": hf.get("attn_pdrop", 0.1),
        "init_std": hf.get("initializer_range", 0.02),
    } | token_ids(hf, bos=50256, eos=50256)


def write_config(config) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": published_activation(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
    } | write_token_ids(config)


WEIGHTS = (
    ("body.embedding.weight", "{body}wte.weight", "embedding"),
    ("body.position.weight", "{body}wpe.weight", "position"),
    ("body.blocks.{layer}.attention_norm.weight", "{body}h.{layer}.ln_1.weight", "norm"),
    ("body.blocks.{layer}.attention_norm.bias", "{body}h.{layer}.ln_1.bias", "bias"),
    ("body.blocks.{layer}.attention.project.qkv.weight", "{body}h.{layer}.attn.c_attn.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.attention.project.qkv.bias", "{body}h.{layer}.attn.c_attn.bias", "bias"),
    ("body.blocks.{layer}.attention.out.weight", "{body}h.{layer}.attn.c_proj.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.attention.out.bias", "{body}h.{layer}.attn.c_proj.bias", "bias"),
    ("body.blocks.{layer}.mlp_norm.weight", "{body}h.{layer}.ln_2.weight", "norm"),
    ("body.blocks.{layer}.mlp_norm.bias", "{body}h.{layer}.ln_2.bias", "bias"),
    ("body.blocks.{layer}.mlp.up.weight", "{body}h.{layer}.mlp.c_fc.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.mlp.up.bias", "{body}h.{layer}.mlp.c_fc.bias", "bias"),
    ("body.blocks.{layer}.mlp.down.weight", "{body}h.{layer}.mlp.c_proj.weight", "matrix", "transposed"),
    ("body.blocks.{layer}.mlp.down.bias", "{body}h.{layer}.mlp.c_proj.bias", "bias"),
    ("body.norm.weight", "{body}ln_f.weight", "norm"),
    ("body.norm.bias", "{body}ln_f.bias", "bias"),
)


def weights(config) -> tuple[tuple, ...]:
    return WEIGHTS


def _out(name: str) -> tuple[tuple, ...]:
    return (("head.out.weight", f"{name}.weight", "head"), ("head.out.bias", f"{name}.bias", "bias"))


HEADS = {
    "lm": HeadSpec("GPT2LMHeadModel", (("head.weight", "lm_head.weight", "head"),), bias=False),
    "sequence": HeadSpec("GPT2ForSequenceClassification", _out("score")[:1], pool="last", bias=False),
    "token": HeadSpec("GPT2ForTokenClassification", _out("classifier")),
    "qa": HeadSpec("GPT2ForQuestionAnswering", _out("qa_outputs")),
    "none": HeadSpec("GPT2Model"),
}
ALIASES = {"lm_head.weight": "{body}wte.weight"}
RENAMED: dict[str, str] = {}

# Causal masks that old versions saved as buffers; the published GPT-2 files carry them.
IGNORED = ("{body}h.{layer}.attn.bias", "{body}h.{layer}.attn.masked_bias")
PREFIX = "transformer."  # absent where the body alone was saved, as in the published GPT-2 files
DROPOUTS = ("dropout", "attention_dropout")
CONSTANTS: dict[str, str] = {}
