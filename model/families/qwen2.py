"""Qwen2 and Qwen2.5: LLaMA with biases on q, k and v; some layers may have a sliding window.

Source: Yang et al. 2024, arXiv 2407.10671, section 2.2.
"""

from model.config import Rope
from model.families import llama

MODEL_TYPE = "qwen2"
_FAMILY = llama.FAMILY | {"family": MODEL_TYPE, "qkv_bias": True}
END = {"bos_id": None, "eos_id": 151643}


def _published(width: int, depth: int, heads: int, kv_heads: int, mlp_width: int, **other) -> dict:
    sizes = {"width": width, "depth": depth, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
    shared = {"vocab_size": 151936, "context": 131072, "norm_eps": 1e-6, "tie_embeddings": True, "rope": Rope(1e6)}
    return _FAMILY | sizes | shared | END | other


PRESETS = {
    "qwen2-0.5b": _published(896, 24, 14, 2, 4864),
    "qwen2-1.5b": _published(1536, 28, 12, 2, 8960),
    "qwen2-7b": _published(3584, 28, 28, 4, 18944, vocab_size=152064, tie_embeddings=False),
}


def read_windows(hf: dict, depth: int) -> tuple[int | None, ...]:
    """Read each layer's window: by `layer_types` (transformers 5), else from layer `max_window_layers` on."""
    if not hf.get("use_sliding_window", False):
        return (None,)
    window, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types holds {sorted(unknown)[0]!r}; supported: sliding_attention, full_attention")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else (None,)


def write_windows(config) -> dict:
    """Return the fields of `read_windows`. Error: windows of several sizes (ValueError)."""
    windows = [spec.window for spec in config.layers]
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise ValueError(f"a {config.family} config.json has one size of window, not {sizes}")
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "max_window_layers": windows.index(sizes[0]) if sizes else config.depth,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def read_config(hf: dict) -> dict:
    values = llama.read_common(hf, _FAMILY, context=32768, mlp_width=22016, kv_heads=32)
    return values | {"windows": read_windows(hf, values["depth"])}


def write_config(config) -> dict:
    return llama.write_common(config) | write_windows(config)


weights, ALIASES, RENAMED, IGNORED = llama.weights, llama.ALIASES, llama.RENAMED, llama.IGNORED
PREFIX, DROPOUTS = llama.PREFIX, llama.DROPOUTS
HEADS = llama.heads("Qwen2", qa_prefix="transformer.")
CONSTANTS: dict[str, str] = {}
