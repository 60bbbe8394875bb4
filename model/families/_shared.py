"""Fields that several families' config.json have in common: token ids, rotary positions, activations."""

from model.config import Rope

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ROPE_TYPES = {"default": "plain", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}


def refuse_unless(hf: dict, **only) -> None:
    """Raise ValueError where a setting that changes the network has another value than the supported one."""
    for key, value in only.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key}={hf[key]!r} is not supported; supported: {value!r}")


def activation(hf: dict, key: str, default: str) -> str:
    """Return our name of a published activation."""
    name = hf.get(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def published_activation(name: str) -> str:
    """Return the published name of an activation."""
    return {"gelu_tanh": "gelu_new"}.get(name, name)


def token_ids(hf: dict, bos: int | None = None, eos: int | None = None, pad: int | None = None) -> dict:
    """Read the ids of bos, eos and pad; a list of eos ids becomes one eos_id and stop_ids."""
    ends = hf.get("eos_token_id", eos)
    first, *others = ends if isinstance(ends, list) and ends else [None if isinstance(ends, list) else ends]
    return {
        "bos_id": hf.get("bos_token_id", bos),
        "eos_id": first,
        "stop_ids": tuple(others),
        "pad_id": hf.get("pad_token_id", pad),
    }


def write_token_ids(config) -> dict:
    """Return the fields of `token_ids`."""
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": [config.eos_id, *config.stop_ids] if config.stop_ids else config.eos_id,
        "pad_token_id": config.pad_id,
    }


def read_rope(hf: dict, named: int, base: float) -> tuple[Rope, int]:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`; returns them with the longest context.

    `named`: max_position_embeddings, which may be the trained context (vicuna-16k, Qwen2.5 with YaRN) or the extended one
    (DeepSeek); `extended_context` gives the longest.
    """
    values = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    published = values.get("rope_type", values.get("type", "default"))
    if published not in ROPE_TYPES:
        raise ValueError(f"rope_type={published!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    for owner in (hf, values):
        refuse_unless(owner, partial_rotary_factor=1.0)
    kind, base = ROPE_TYPES[published], float(values.get("rope_theta") or hf.get("rope_theta") or base)
    if kind == "plain":
        return Rope(base), named
    original = hf.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    trained = named if kind == "dynamic" else int(original or named)  # as in transformers, for dynamic
    factor = values.get("factor")
    if factor is None and kind != "yarn":
        raise ValueError(f"rope_type={published!r} needs a factor")
    rope = {"base": base, "kind": kind, "factor": float(named / trained if factor is None else factor)}
    if kind == "llama3":
        rope |= {"slow": float(values["low_freq_factor"]), "fast": float(values["high_freq_factor"])}
    elif kind == "yarn":
        refuse_unless(values, mscale=None, mscale_all_dim=None)
        rope |= {"slow": float(values.get("beta_slow") or 1), "fast": float(values.get("beta_fast") or 32)}
        rope |= {"attention_factor": values.get("attention_factor"), "truncate": values.get("truncate", True)}
    result = Rope(**rope, trained_context=trained)
    return result, extended_context(result, named)


def extended_context(rope: Rope, named: int) -> int:
    """Return the longest context of a network with max_position_embeddings = `named`: factor times the trained context, or
    `named` if larger. llama3's files always name the extended context.

    >>> extended_context(Rope(kind="linear", factor=4.0, trained_context=4096), 4096)  # the trained context is named
    16384
    >>> extended_context(Rope(kind="yarn", factor=40.0, trained_context=4096), 163840)  # the extended one
    163840
    """
    return named if rope.kind in ("plain", "llama3") else max(named, int(rope.factor * rope.trained_context))


def published_context(config) -> int:
    """Return max_position_embeddings: as it was read where that still means `context`, else `context` itself."""
    rope, stored = config.rope, config.extra.get("max_position_embeddings")
    if rope.kind == "dynamic":
        return rope.trained_context
    same = type(stored) is int and stored >= rope.trained_context and extended_context(rope, stored) == config.context
    return stored if same else config.context


def write_rope(rope: Rope, named: int) -> dict:
    """Return both spellings: rope_theta and rope_scaling for transformers 4, rope_parameters for version 5."""
    values: dict = {"rope_type": {ours: published for published, ours in ROPE_TYPES.items()}[rope.kind]}
    if rope.kind != "plain":
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn") or (rope.kind == "linear" and rope.trained_context not in (0, named)):
        values["original_max_position_embeddings"] = rope.trained_context
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    if rope.kind == "yarn":
        values |= {"beta_slow": rope.slow, "beta_fast": rope.fast, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            values["attention_factor"] = rope.attention_factor
    scaling = {} if rope.kind == "plain" else {"rope_scaling": values | {"rope_theta": rope.base}}
    return {"rope_theta": rope.base, "rope_parameters": values | {"rope_theta": rope.base}} | scaling
