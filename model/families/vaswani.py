"""The original Transformer: a post-norm encoder-decoder with sinusoidal positions, and one matrix for the embeddings of input
and output and for the head, scaled by √D in the embeddings.

Source: Vaswani et al. 2017, arXiv 1706.03762. It was published as equations, not as a folder: config.json holds
ModelConfig's own fields, and the weights their names here.
"""

from dataclasses import asdict

from model.config import HeadSpec
from model.families._shared import token_ids, write_token_ids
from model.families.bert import affine

MODEL_TYPE = "vaswani"

_FAMILY = {
    "family": MODEL_TYPE,
    "architecture": "encoder-decoder",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "norm_first": False,
    "position": "sinusoidal",
    "scale_embedding": True,
    "activation": "relu",
    "mlp": "plain",
    "projection": "separate",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
    "init": "xavier",
}


def _published(width: int, heads: int, dropout: float) -> dict:
    sizes = {"width": width, "depth": 6, "decoder_depth": 6, "heads": heads, "kv_heads": heads, "mlp_width": 4 * width}
    ids = {"bos_id": 1, "eos_id": 2, "pad_id": 0, "decoder_start_id": 1}
    return _FAMILY | sizes | ids | {"vocab_size": 37000, "context": 1024, "dropout": dropout}


PRESETS = {"transformer-base": _published(512, 8, 0.1), "transformer-big": _published(1024, 16, 0.3)}

_FREE = ("vocab_size", "width", "depth", "decoder_depth", "heads", "kv_heads", "mlp_width", "context", "norm_eps")
_FREE += ("activation", "tie_embeddings", "dropout", "attention_dropout", "mlp_dropout", "init_std", "decoder_start_id")


def read_config(hf: dict) -> dict:
    if missing := [name for name in _FREE if name not in hf]:
        raise ValueError(f"vaswani without {', '.join(missing)}")
    return _FAMILY | {name: hf[name] for name in _FREE} | token_ids(hf)


def write_config(config) -> dict:
    if config.second_stack != config:
        raise ValueError("a vaswani config.json has one size for both stacks")
    values = asdict(config)
    return {name: values[name] for name in _FREE} | {"is_encoder_decoder": True} | write_token_ids(config)


def _attention(name: str) -> tuple[tuple, ...]:
    parts = ("project.query", "project.key", "project.value", "out")
    return tuple(row for part in parts for row in _same(f"{name}.{part}", "matrix"))


def _same(name: str, role: str) -> tuple[tuple, ...]:
    return affine(name, name.replace("body.", "{body}", 1), role)


def _stack(block: str) -> tuple[tuple, ...]:
    return (
        *_attention(f"{block}.attention"),
        *_same(f"{block}.attention_norm", "norm"),
        *_same(f"{block}.mlp.up", "matrix"),
        *_same(f"{block}.mlp.down", "matrix"),
        *_same(f"{block}.mlp_norm", "norm"),
    )


_DECODER = "body.decoder.blocks.{decoder_layer}"
WEIGHTS = (
    ("body.embedding.weight", "{body}embedding.weight", "embedding"),
    *_stack("body.encoder.blocks.{layer}"),
    *_stack(_DECODER),
    *_attention(f"{_DECODER}.cross"),
    *_same(f"{_DECODER}.cross_norm", "norm"),
)


def weights(config) -> tuple[tuple, ...]:
    return WEIGHTS


HEADS = {"lm": HeadSpec(weights=(("head.weight", "head.weight", "head"),), bias=False)}
ALIASES = {"head.weight": "{body}embedding.weight"}
RENAMED: dict[str, str] = {}
IGNORED: tuple[str, ...] = ()
PREFIX = "body."
DROPOUTS = ("dropout", "attention_dropout", "mlp_dropout")
CONSTANTS: dict[str, str] = {}
