"""Mistral: LLaMA with a sliding window of 4,096 positions.

Source: Jiang et al. 2023, arXiv 2310.06825, section 2. Later releases dropped the window.
"""

from model.config import Rope
from model.families import llama

MODEL_TYPE = "mistral"
_FAMILY = llama.FAMILY | {"family": MODEL_TYPE}

PRESETS = {
    "mistral-7b": _FAMILY
    | {
        "vocab_size": 32000,
        "width": 4096,
        "depth": 32,
        "heads": 32,
        "kv_heads": 8,
        "mlp_width": 14336,
        "context": 32768,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
        "rope": Rope(),
        "windows": (4096,),
        "bos_id": 1,
        "eos_id": 2,
    },
}


def read_config(hf: dict) -> dict:
    values = llama.read_common(hf, _FAMILY, context=131072, mlp_width=14336, kv_heads=8, bos=1, eos=2)
    return values | {"windows": (hf.get("sliding_window", 4096),)}


def write_config(config) -> dict:
    if len(config.windows) != 1:
        raise ValueError(f"a mistral config.json has one window for all layers, not windows={config.windows}")
    return llama.write_common(config) | {"sliding_window": config.windows[0]}


weights, ALIASES, RENAMED, IGNORED = llama.weights, llama.ALIASES, llama.RENAMED, llama.IGNORED
PREFIX, DROPOUTS = llama.PREFIX, llama.DROPOUTS
HEADS = llama.heads("Mistral", qa_prefix="model.")
CONSTANTS: dict[str, str] = {}
