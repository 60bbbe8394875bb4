"""T5: an encoder-decoder with relative positions, RMSNorm, no biases and unscaled scores; 1.1 and Flan gate the MLP.

Source: Raffel et al. 2019, arXiv 1910.10683; version 1.1 (gated GELU, an untied head, no dropout in pretraining) by its
published code. Its feed-forward overflows float16: there its output matrix stays in float32.
"""

from model.config import HeadSpec
from model.families._shared import ACTIVATIONS, refuse_unless, token_ids, write_token_ids

MODEL_TYPE = "t5"

_FAMILY = {
    "family": MODEL_TYPE,
    "architecture": "encoder-decoder",
    "norm": "rmsnorm",
    "position": "relative",
    "score_scale": 1.0,
    "projection": "separate",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "init": "fan_in",
    "init_std": 1.0,
}


def _published(width: int, depth: int, heads: int, mlp_width: int) -> dict:
    sizes = {"width": width, "depth": depth, "decoder_depth": depth, "heads": heads, "kv_heads": heads, "mlp_width": mlp_width}
    ids = {"eos_id": 1, "pad_id": 0, "decoder_start_id": 0}
    free = {"free_head_width": None if width == 64 * heads else 64}
    return _FAMILY | sizes | free | ids | _dropouts(0.1) | {"vocab_size": 32128, "context": 512, "norm_eps": 1e-6}


def _dropouts(rate: float) -> dict:
    return dict.fromkeys(("dropout", "attention_dropout", "mlp_dropout", "output_dropout"), rate)


_FIRST = {"mlp": "plain", "activation": "relu", "tie_embeddings": True, "scale_head": True}
_GATED = {"mlp": "gated", "activation": "gelu_tanh", "tie_embeddings": False}
_TINY = {"width": 128, "depth": 3, "decoder_depth": 3, "heads": 4, "kv_heads": 4, "mlp_width": 512, "free_head_width": None}
_SMALL_INIT = {"depth": 2, "decoder_depth": 2, "init": "same", "init_std": 0.02}
PRESETS = {
    # The default of --objective seq2seq: trains in about two minutes on two CPU cores.
    "tiny-seq2seq": _published(128, 3, 4, 512) | _FIRST | _TINY | {"vocab_size": 2048, "context": 128},
    # The default of --objective span, with initial weights that a small network learns from sooner.
    "tiny-t5": _published(128, 2, 4, 512) | _GATED | _TINY | _SMALL_INIT | {"vocab_size": 2048, "context": 64},
    "t5-small": _published(512, 6, 8, 2048) | _FIRST,
    "t5-base": _published(768, 12, 12, 3072) | _FIRST,
    "t5-large": _published(1024, 24, 16, 4096) | _FIRST,
    "flan-t5-small": _published(512, 8, 6, 1024) | _GATED,
    "flan-t5-base": _published(768, 12, 12, 2048) | _GATED,
}


_RANGE = "initializer_range"  # one standard deviation for all weights, as in other families


def read_config(hf: dict) -> dict:
    refuse_unless(hf, is_encoder_decoder=True, is_decoder=False)
    heads, width, depth = hf.get("num_heads", 8), hf.get("d_model", 512), hf.get("num_layers", 6)
    head_width, feed_forward = hf.get("d_kv", 64), hf.get("feed_forward_proj", "relu")
    gate, _, activation = feed_forward.rpartition("-")
    # "gated-gelu" has always meant the tanh approximation; any other name is itself
    activation = "gelu_tanh" if feed_forward == "gated-gelu" else ACTIVATIONS.get(activation)
    if gate not in ("", "gated") or activation is None:
        raise ValueError(f"feed_forward_proj={feed_forward!r} is not supported; supported: relu, gated-gelu, gated-silu …")
    # The first version ties its embeddings and scales the head's input, 1.1 does neither: one flag once meant both.
    # transformers 5 has a separate flag for the scale, always writes the other as true, and ties by whether the file holds a
    # second matrix (`model.ties`).
    tied = hf.get("tie_word_embeddings", True) is not False
    return (
        _FAMILY
        | {
            "vocab_size": hf.get("vocab_size", 32128),
            "width": width,
            "depth": depth,
            "decoder_depth": hf.get("num_decoder_layers") or depth,
            "heads": heads,
            "kv_heads": heads,
            "free_head_width": None if head_width * heads == width else head_width,
            "mlp_width": hf.get("d_ff", 2048),
            "context": hf.get("n_positions", 512),
            "norm_eps": hf.get("layer_norm_epsilon", 1e-6),
            "mlp": "gated" if gate else "plain",
            "activation": activation,
            "tie_embeddings": tied,
            "scale_head": hf.get("scale_decoder_outputs", tied) is not False,
            "relative_buckets": hf.get("relative_attention_num_buckets", 32),
            "relative_distance": hf.get("relative_attention_max_distance", 128),
            **({"init": "same", "init_std": hf[_RANGE]} if _RANGE in hf else {"init_std": hf.get("initializer_factor", 1.0)}),
            "decoder_start_id": hf.get("decoder_start_token_id", hf.get("pad_token_id", 0)),
        }
        | _dropouts(hf.get("dropout_rate", 0.1))
        | token_ids(hf, eos=1, pad=0)
    )


def write_config(config) -> dict:
    rates = {name: getattr(config, name) for name in DROPOUTS}
    if len(set(rates.values())) > 1:
        raise ValueError(f"a t5 config.json has one rate for all dropouts, not {rates}")
    if config.second_stack != config:
        raise ValueError(f"a t5 config.json has one size for both stacks, not decoder_mlp_width={config.decoder_mlp_width}")
    spelled = {"gelu_tanh": "gelu" if config.mlp == "gated" else "gelu_new"}.get(config.activation, config.activation)
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "num_layers": config.depth,
        "num_decoder_layers": config.decoder_depth,
        "num_heads": config.heads,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": f"gated-{spelled}" if config.mlp == "gated" else spelled,
        # false would mean "not scaled" to transformers 4, and to 5 without the next field
        "tie_word_embeddings": config.tie_embeddings or config.scale_head,
        "scale_decoder_outputs": config.scale_head,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        # transformers knows a factor of the published initial weights alone, and only for weights that a folder lacks
        "initializer_factor": 1.0 if config.init == "same" else config.init_std,
        "decoder_start_token_id": config.decoder_start_id,
        "dropout_rate": config.dropout,
        **({_RANGE: config.init_std} if config.init == "same" else {}),
    } | write_token_ids(config)


def _stack(ours: str, published: str, layer: str, mlp: int, gated: bool) -> tuple[tuple, ...]:
    """Return the rows of one stack; `mlp`: the published number of its feed-forward sublayer."""
    block, t5_block = f"body.{ours}.blocks.{{{layer}}}", f"{{body}}{published}.block.{{{layer}}}.layer"

    def attention(name: str, norm: str, sublayer: int, t5_name: str) -> tuple[tuple, ...]:
        projections = (("project.query", "q"), ("project.key", "k"), ("project.value", "v"), ("out", "o"))
        matrices = tuple(
            (f"{block}.{name}.{mine}.weight", f"{t5_block}.{sublayer}.{t5_name}.{theirs}.weight", "matrix")
            for mine, theirs in projections
        )
        return (*matrices, (f"{block}.{norm}.weight", f"{t5_block}.{sublayer}.layer_norm.weight", "norm"))

    wide = f"{t5_block}.{mlp}.DenseReluDense"
    ups = (("gate", "wi_0"), ("up", "wi_1")) if gated else (("up", "wi"),)
    return (
        (
            f"body.{ours}.relative.weight",
            f"{{body}}{published}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "position",
        ),
        *attention("attention", "attention_norm", 0, "SelfAttention"),
        *(attention("cross", "cross_norm", 1, "EncDecAttention") if mlp == 2 else ()),
        *((f"{block}.mlp.{mine}.weight", f"{wide}.{theirs}.weight", "matrix") for mine, theirs in ups),
        (f"{block}.mlp.down.weight", f"{wide}.wo.weight", "matrix", "wide"),
        (f"{block}.mlp_norm.weight", f"{t5_block}.{mlp}.layer_norm.weight", "norm"),
        (f"body.{ours}.norm.weight", f"{{body}}{published}.final_layer_norm.weight", "norm"),
    )


def weights(config) -> tuple[tuple, ...]:
    gated = config.mlp == "gated"
    return (
        ("body.embedding.weight", "{body}shared.weight", "embedding"),
        *_stack("encoder", "encoder", "layer", 1, gated),
        *_stack("decoder", "decoder", "decoder_layer", 2, gated),
    )


_SEQUENCE = (
    ("head.dense.weight", "classification_head.dense.weight", "matrix"),
    ("head.dense.bias", "classification_head.dense.bias", "bias"),
    ("head.out.weight", "classification_head.out_proj.weight", "head"),
    ("head.out.bias", "classification_head.out_proj.bias", "bias"),
)
_QA = (("head.out.weight", "qa_outputs.weight", "head"), ("head.out.bias", "qa_outputs.bias", "bias"))
HEADS = {
    "lm": HeadSpec("T5ForConditionalGeneration", (("head.weight", "lm_head.weight", "head"),), bias=False),
    "sequence": HeadSpec("T5ForSequenceClassification", _SEQUENCE, pool="last", dense=True, prefix="transformer."),
    "qa": HeadSpec("T5ForQuestionAnswering", _QA),
    "none": HeadSpec("T5Model"),
}
ALIASES = {
    "{body}encoder.embed_tokens.weight": "{body}shared.weight",
    "{body}decoder.embed_tokens.weight": "{body}shared.weight",
    "lm_head.weight": "{body}shared.weight",
}
RENAMED: dict[str, str] = {}
# An unused table in the first published files.
IGNORED = ("{body}decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
PREFIX = ""
FILE_TIES = True
DROPOUTS = ("dropout", "attention_dropout", "mlp_dropout", "output_dropout")
CONSTANTS: dict[str, str] = {}
