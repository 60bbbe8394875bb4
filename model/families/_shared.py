"""What several families' config.json have in common: token ids, rotary positions, activations."""

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
    """Raise where a setting that changes the network has another value than the one that is built here."""
    for key, value in only.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key}={hf[key]!r} is not supported; supported: {value!r}")


def activation(hf: dict, key: str, default: str) -> str:
    name = hf.get(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def published_activation(name: str) -> str:
    return {"gelu_tanh": "gelu_new"}.get(name, name)


def token_ids(hf: dict, bos: int | None = None, eos: int | None = None, pad: int | None = None) -> dict:
    """bos, eos and pad; a list of ends is one end and further stops."""
    ends = hf.get("eos_token_id", eos)
    first, *others = ends if isinstance(ends, list) and ends else [None if isinstance(ends, list) else ends]
    return {
        "bos_id": hf.get("bos_token_id", bos),
        "eos_id": first,
        "stop_ids": tuple(others),
        "pad_id": hf.get("pad_token_id", pad),
    }


def write_token_ids(config) -> dict:
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": [config.eos_id, *config.stop_ids] if config.stop_ids else config.eos_id,
        "pad_token_id": config.pad_id,
    }


def read_rope(hf: dict, named: int, base: float) -> tuple[Rope, int]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` before it; and the longest text that it reaches.

    `named` is max_position_embeddings, which may name the trained length (vicuna-16k, Qwen2.5 with YaRN) or the extended one
    (DeepSeek): `reach` says what is then the longest text.
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
    trained = named if kind == "dynamic" else int(original or named)  # of dynamic ones transformers takes it so
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
    made = Rope(**rope, trained_context=trained)
    return made, extended_context(made, named)


def extended_context(rope: Rope, named: int) -> int:
    """The longest text of a network whose config.json has max_position_embeddings = `named`: factor times what it was trained
    with, unless more is named. llama3's files name the extended length always.

    >>> extended_context(Rope(kind="linear", factor=4.0, trained_context=4096), 4096)  # the trained length is named
    16384
    >>> extended_context(Rope(kind="yarn", factor=40.0, trained_context=4096), 163840)  # the extended one
    163840
    """
    return named if rope.kind in ("plain", "llama3") else max(named, int(rope.factor * rope.trained_context))


def published_context(config) -> int:
    """max_position_embeddings: as it was read, where that still says `context`; else what says it, if anything does."""
    rope, said = config.rope, config.extra.get("max_position_embeddings")
    if rope.kind == "dynamic":
        return rope.trained_context
    same = type(said) is int and said >= rope.trained_context and extended_context(rope, said) == config.context
    return said if same else config.context


def write_rope(rope: Rope, named: int) -> dict:
    """Both spellings: transformers 4 reads rope_theta and rope_scaling, version 5 rope_parameters."""
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
