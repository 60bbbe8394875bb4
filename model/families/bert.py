"""BERT: a post-norm encoder with learned positions and segments; masked tokens and next sentence.

Source: Devlin et al. 2018, arXiv 1810.04805. The pooler, tanh(h W + b) of the first token, belongs to the body in the
published names, and here to the heads that use it.
"""

from model.config import HeadSpec
from model.families._shared import activation, published_activation, refuse_unless, token_ids, write_token_ids

MODEL_TYPE = "bert"

FAMILY = {
    "family": MODEL_TYPE,
    "architecture": "encoder",
    "norm": "layernorm",
    "norm_first": False,
    "embedding_norm": True,
    "position": "learned",
    "mlp": "plain",
    "projection": "separate",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "init": "same",
    "head": "mlm",
}


def published(width: int, depth: int, heads: int) -> dict:
    """Return the field values of a published size."""
    return {
        "width": width,
        "depth": depth,
        "heads": heads,
        "kv_heads": heads,
        "mlp_width": 4 * width,
        "context": 512,
        "activation": "gelu",
        "tie_embeddings": True,
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }


SEGMENTS = {"vocab_size": 30522, "norm_eps": 1e-12, "token_types": 2, "pad_id": 0}
PRESETS = {
    "bert-base": FAMILY | published(768, 12, 12) | SEGMENTS,
    "bert-large": FAMILY | published(1024, 24, 16) | SEGMENTS,
    "tiny-bert": FAMILY | published(128, 3, 4) | SEGMENTS | {"vocab_size": 2048, "context": 128},
}


def read_common(hf: dict, family: dict, *, bos: int | None, eos: int | None, pad: int) -> dict:
    """Read the fields that BERT and RoBERTa have in common."""
    refuse_unless(hf, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute", tie_word_embeddings=True)
    return (
        family
        | {
            "vocab_size": hf.get("vocab_size", 30522),
            "width": hf.get("hidden_size", 768),
            "depth": hf.get("num_hidden_layers", 12),
            "heads": hf.get("num_attention_heads", 12),
            "kv_heads": hf.get("num_attention_heads", 12),
            "mlp_width": hf.get("intermediate_size", 3072),
            "context": hf.get("max_position_embeddings", 512),
            "norm_eps": hf.get("layer_norm_eps", 1e-12),
            "activation": activation(hf, "hidden_act", "gelu"),
            "tie_embeddings": True,  # an untied head has two biases, of which one is never used
            "token_types": hf.get("type_vocab_size", 2),
            "dropout": hf.get("hidden_dropout_prob", 0.1),
            "attention_dropout": hf.get("attention_probs_dropout_prob", 0.1),
            "init_std": hf.get("initializer_range", 0.02),
        }
        | token_ids(hf, bos, eos, pad)
    )


def read_config(hf: dict) -> dict:
    return read_common(hf, FAMILY, bos=None, eos=None, pad=0)


def write_config(config) -> dict:
    if not config.tie_embeddings:
        raise ValueError(f"a {config.family} folder has one table for embedding and head: tie_embeddings=False cannot be saved")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": published_activation(config.activation),
        "type_vocab_size": config.token_types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
    } | write_token_ids(config)


def affine(ours: str, published: str, role: str) -> tuple[tuple, ...]:
    """Return the rows of weight and bias of a layer."""
    return ((f"{ours}.weight", f"{published}.weight", role), (f"{ours}.bias", f"{published}.bias", "bias"))


_BLOCK, _LAYER = "body.blocks.{layer}", "{body}encoder.layer.{layer}"
WEIGHTS = (
    ("body.embedding.weight", "{body}embeddings.word_embeddings.weight", "embedding"),
    ("body.position.weight", "{body}embeddings.position_embeddings.weight", "position"),
    ("body.token_type.weight", "{body}embeddings.token_type_embeddings.weight", "embedding"),
    *affine("body.embedding_norm", "{body}embeddings.LayerNorm", "norm"),
    *affine(f"{_BLOCK}.attention.project.query", f"{_LAYER}.attention.self.query", "matrix"),
    *affine(f"{_BLOCK}.attention.project.key", f"{_LAYER}.attention.self.key", "matrix"),
    *affine(f"{_BLOCK}.attention.project.value", f"{_LAYER}.attention.self.value", "matrix"),
    *affine(f"{_BLOCK}.attention.out", f"{_LAYER}.attention.output.dense", "matrix"),
    *affine(f"{_BLOCK}.attention_norm", f"{_LAYER}.attention.output.LayerNorm", "norm"),
    *affine(f"{_BLOCK}.mlp.up", f"{_LAYER}.intermediate.dense", "matrix"),
    *affine(f"{_BLOCK}.mlp.down", f"{_LAYER}.output.dense", "matrix"),
    *affine(f"{_BLOCK}.mlp_norm", f"{_LAYER}.output.LayerNorm", "norm"),
)


def weights(config) -> tuple[tuple, ...]:
    return WEIGHTS


_POOLER = affine("head.dense", "{body}pooler.dense", "matrix")
_WORDS = (
    *affine("head.dense", "cls.predictions.transform.dense", "matrix"),
    *affine("head.norm", "cls.predictions.transform.LayerNorm", "norm"),
    ("head.weight", "cls.predictions.decoder.weight", "head"),
    ("head.bias", "cls.predictions.bias", "bias"),
)
_PAIR = (*affine("head.pair.dense", "{body}pooler.dense", "matrix"), *affine("head.pair.out", "cls.seq_relationship", "head"))
HEADS = {
    "mlm": HeadSpec("BertForMaskedLM", _WORDS),
    "nsp": HeadSpec("BertForNextSentencePrediction", _POOLER + affine("head.out", "cls.seq_relationship", "head"), dense=True),
    "pretraining": HeadSpec("BertForPreTraining", _WORDS + _PAIR, dense=True),
    "sequence": HeadSpec("BertForSequenceClassification", _POOLER + affine("head.out", "classifier", "head"), dense=True),
    "token": HeadSpec("BertForTokenClassification", affine("head.out", "classifier", "head")),
    "qa": HeadSpec("BertForQuestionAnswering", affine("head.out", "qa_outputs", "head")),
    "pooler": HeadSpec("BertModel", _POOLER, dense=True),
    "none": HeadSpec("BertModel"),
}

ALIASES = {
    "cls.predictions.decoder.weight": "{body}embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
RENAMED = {".gamma": ".weight", ".beta": ".bias"}  # norms in files converted from TensorFlow
IGNORED = ("{body}embeddings.position_ids", "{body}embeddings.token_type_ids")  # buffers of transformers before 4.31
PREFIX = "bert."
DROPOUTS = ("dropout", "attention_dropout")
CONSTANTS: dict[str, str] = {}
