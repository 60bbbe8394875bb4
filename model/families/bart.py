"""BART: a post-norm encoder-decoder with learned positions (from row 2 of their tables).

Source: Lewis et al. 2019, arXiv 1910.13461; names as in fairseq's weights that transformers reads.
"""

from model.config import HeadSpec
from model.families._shared import activation, published_activation, refuse_unless, token_ids, write_token_ids
from model.families.bert import affine

MODEL_TYPE = "bart"

_FAMILY = {
    "family": MODEL_TYPE,
    "architecture": "encoder-decoder",
    "norm": "layernorm",
    "norm_first": False,
    "embedding_norm": True,
    "position": "learned",
    "position_offset": 2,
    "mlp": "plain",
    "projection": "separate",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "norm_eps": 1e-5,
    "init": "same",
}


def _published(width: int, depth: int, heads: int) -> dict:
    sizes = {"width": width, "depth": depth, "decoder_depth": depth, "heads": heads, "kv_heads": heads, "mlp_width": 4 * width}
    ids = {"bos_id": 0, "eos_id": 2, "pad_id": 1, "decoder_start_id": 2}
    shared = {"vocab_size": 50265, "context": 1024, "activation": "gelu", "tie_embeddings": True, "dropout": 0.1}
    return _FAMILY | sizes | ids | shared


PRESETS = {
    # The default of --objective denoise: trains in about two minutes on two CPU cores.
    "tiny-bart": _published(128, 2, 4) | {"vocab_size": 512, "context": 32},
    "bart-base": _published(768, 6, 12),
    "bart-large": _published(1024, 12, 16),
}


def read_config(hf: dict) -> dict:
    refuse_unless(hf, is_decoder=False, encoder_layerdrop=0.0, decoder_layerdrop=0.0, normalize_before=False)
    refuse_unless(hf, add_final_layer_norm=False, normalize_embedding=True)
    heads, decoder_heads = hf.get("encoder_attention_heads", 16), hf.get("decoder_attention_heads", 16)
    mlp_width, decoder_mlp_width = hf.get("encoder_ffn_dim", 4096), hf.get("decoder_ffn_dim", 4096)
    return (
        _FAMILY
        | {
            "vocab_size": hf.get("vocab_size", 50265),
            "width": hf.get("d_model", 1024),
            "depth": hf.get("encoder_layers", 12),
            "decoder_depth": hf.get("decoder_layers", 12),
            "heads": heads,
            "kv_heads": heads,
            "decoder_heads": None if decoder_heads == heads else decoder_heads,
            "mlp_width": mlp_width,
            "decoder_mlp_width": None if decoder_mlp_width == mlp_width else decoder_mlp_width,
            "context": hf.get("max_position_embeddings", 1024),
            "activation": activation(hf, "activation_function", "gelu"),
            "tie_embeddings": hf.get("tie_word_embeddings", True),
            "scale_embedding": hf.get("scale_embedding", False),
            "dropout": hf.get("dropout", 0.1),
            "attention_dropout": hf.get("attention_dropout", 0.0),
            "mlp_dropout": hf.get("activation_dropout", 0.0),
            "init_std": hf.get("init_std", 0.02),
            "decoder_start_id": hf.get("decoder_start_token_id", 2),
        }
        | token_ids(hf, bos=0, eos=2, pad=1)
    )


def write_config(config) -> dict:
    if config.norm_eps != 1e-5:
        raise ValueError(f"a bart config.json cannot hold norm_eps={config.norm_eps}: it is 1e-5")
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "encoder_layers": config.depth,
        "decoder_layers": config.decoder_depth,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.second_stack.heads,
        "encoder_ffn_dim": config.mlp_width,
        "decoder_ffn_dim": config.second_stack.mlp_width,
        "max_position_embeddings": config.context,
        "activation_function": published_activation(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "scale_embedding": config.scale_embedding,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.mlp_dropout,
        "init_std": config.init_std,
        "decoder_start_token_id": config.decoder_start_id,
    } | write_token_ids(config)


def _attention(ours: str, published: str) -> tuple[tuple, ...]:
    names = (("project.query", "q_proj"), ("project.key", "k_proj"), ("project.value", "v_proj"), ("out", "out_proj"))
    rows = (affine(f"{ours}.{mine}", f"{published}.{theirs}", "matrix") for mine, theirs in names)
    return tuple(row for pair in rows for row in pair)


def _stack(ours: str, published: str, layer: str) -> tuple[tuple, ...]:
    block, bart_block = f"body.{ours}.blocks.{{{layer}}}", f"{{body}}{published}.layers.{{{layer}}}"
    rows = (
        (f"body.{ours}.position.weight", f"{{body}}{published}.embed_positions.weight", "position"),
        *affine(f"body.{ours}.embedding_norm", f"{{body}}{published}.layernorm_embedding", "norm"),
        *_attention(f"{block}.attention", f"{bart_block}.self_attn"),
        *affine(f"{block}.attention_norm", f"{bart_block}.self_attn_layer_norm", "norm"),
        *affine(f"{block}.mlp.up", f"{bart_block}.fc1", "matrix"),
        *affine(f"{block}.mlp.down", f"{bart_block}.fc2", "matrix"),
        *affine(f"{block}.mlp_norm", f"{bart_block}.final_layer_norm", "norm"),
    )
    if ours == "encoder":
        return rows
    cross = _attention(f"{block}.cross", f"{bart_block}.encoder_attn")
    return (*rows, *cross, *affine(f"{block}.cross_norm", f"{bart_block}.encoder_attn_layer_norm", "norm"))


WEIGHTS = (
    ("body.embedding.weight", "{body}shared.weight", "embedding"),
    *_stack("encoder", "encoder", "layer"),
    *_stack("decoder", "decoder", "decoder_layer"),
)


def weights(config) -> tuple[tuple, ...]:
    return WEIGHTS


_LM = (("head.weight", "lm_head.weight", "head"), ("head.bias", "final_logits_bias", "bias", "row"))
_SEQUENCE = (
    *affine("head.dense", "classification_head.dense", "matrix"),
    *affine("head.out", "classification_head.out_proj", "head"),
)
HEADS = {
    "lm": HeadSpec("BartForConditionalGeneration", _LM),
    "sequence": HeadSpec("BartForSequenceClassification", _SEQUENCE, pool="last", dense=True),
    "qa": HeadSpec("BartForQuestionAnswering", affine("head.out", "qa_outputs", "head")),
    "none": HeadSpec("BartModel"),
}
ALIASES = {
    "{body}encoder.embed_tokens.weight": "{body}shared.weight",
    "{body}decoder.embed_tokens.weight": "{body}shared.weight",
    "lm_head.weight": "{body}shared.weight",
}
# transformers 5 ties no embeddings where it ties no head: then these are written too.
COPIES_UNTIED = ("{body}encoder.embed_tokens.weight", "{body}decoder.embed_tokens.weight")
RENAMED: dict[str, str] = {}
IGNORED: tuple[str, ...] = ()
PREFIX = "model."
DROPOUTS = ("dropout", "attention_dropout", "mlp_dropout")
CONSTANTS: dict[str, str] = {}
