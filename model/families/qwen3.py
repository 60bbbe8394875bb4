"""Qwen3: LLaMA with RMSNorm of each head of q and k before the rotation, and heads of any width.

Source: Yang et al. 2025, arXiv 2505.09388, section 2; q/k norms from Dehghani et al. 2023, arXiv 2302.05442.
"""

from model.config import Rope
from model.families import llama, qwen2
from model.families._shared import refuse_unless

MODEL_TYPE = "qwen3"
_FAMILY = llama.FAMILY | {"family": MODEL_TYPE, "qk_norm": True}


def _published(width: int, depth: int, heads: int, mlp_width: int, *, tied: bool = True) -> dict:
    sizes = {"width": width, "depth": depth, "heads": heads, "kv_heads": 8, "mlp_width": mlp_width}
    shared = {"vocab_size": 151936, "context": 40960, "norm_eps": 1e-6, "rope": Rope(1e6), "tie_embeddings": tied}
    free = {"free_head_width": None if width == 128 * heads else 128}
    return _FAMILY | sizes | shared | free | qwen2.END


PRESETS = {
    "qwen3-0.6b": _published(1024, 28, 16, 3072),
    "qwen3-1.7b": _published(2048, 28, 16, 6144),
    "qwen3-4b": _published(2560, 36, 32, 9728),
    "qwen3-8b": _published(4096, 36, 32, 12288, tied=False),
}


def read_config(hf: dict) -> dict:
    refuse_unless(hf, mlp_bias=False)
    bias = hf.get("attention_bias", False)
    values = llama.read_common(hf, _FAMILY, context=32768, mlp_width=22016, kv_heads=32, head_width=128)
    return values | {"qkv_bias": bias, "out_bias": bias, "windows": qwen2.read_windows(hf, values["depth"])}


def write_config(config) -> dict:
    if config.qkv_bias != config.out_bias:
        raise ValueError(f"a qwen3 config.json has one field for qkv_bias={config.qkv_bias} and out_bias={config.out_bias}")
    return llama.write_common(config) | qwen2.write_windows(config) | {"attention_bias": config.qkv_bias}


_ATTENTION = "{body}layers.{layer}.self_attn"
_NORMS = (
    ("body.blocks.{layer}.attention.query_norm.weight", f"{_ATTENTION}.q_norm.weight", "norm"),
    ("body.blocks.{layer}.attention.key_norm.weight", f"{_ATTENTION}.k_norm.weight", "norm"),
)


def weights(config) -> tuple[tuple, ...]:
    return llama.WEIGHTS + _NORMS


ALIASES, RENAMED, IGNORED = llama.ALIASES, llama.RENAMED, llama.IGNORED
PREFIX, DROPOUTS = llama.PREFIX, llama.DROPOUTS
HEADS = llama.heads("Qwen3", qa_prefix="transformer.")
CONSTANTS: dict[str, str] = {}
