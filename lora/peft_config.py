"""PEFT's adapter_config.json, and ours: a function a method, in each direction.

What would change the numbers and has no counterpart here is refused by name (`refuse_unknown`); what only chose layers or first
values says nothing any more, for the tensors are there.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import NamedTuple

from torch import nn

from lora.config import (
    CONFIGS,
    AdaloraConfig,
    AdapterConfig,
    AdapterError,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from lora.installed import adapters, parts
from lora.layer import LayerName
from lora.methods import uses_virtual_tokens
from lora.peft_names import CLASSIFIER_MODULES, CLASSIFIERS, Entry, endings, linear_modules, plain
from lora.targets import by_pattern
from model.weights import weight_table

OURS = "TOUCHSTONE_"  # what PEFT has no form for: only we read it
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "qa": "QUESTION_ANS", "none": "FEATURE_EXTRACTION"}
SILENT = {  # they say nothing about what is computed from the tensors that are there
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type"),
    *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "fan_in_fan_out", "init_ia3_weights"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "init_weights", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}


class Layers(NamedTuple):
    """What the tensors' names say: regular expressions for our modules."""

    targets: str
    whole: tuple[str, ...]
    inner: str  # (IA)³: the layers whose input is scaled


# ---- in


def read_lora(given: dict, layers: Layers) -> LoraConfig:
    first = given.get("init_lora_weights", True)
    if isinstance(first, str) and not first.startswith(("gaussian", "eva", "orthogonal", "mica")):
        raise AdapterError(
            f"init_lora_weights={first!r} has changed the base too, so that this is no difference from it: convert it with "
            "PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion=…)"
        )
    kind = DoraConfig if given.get("use_dora") else LoraConfig
    return kind(
        r=given["r"],
        alpha=given["lora_alpha"],
        targets=layers.targets,
        dropout=given.get("lora_dropout", 0.0),
        rank_stabilized=given.get("use_rslora", False),
        bias=BIASES[given.get("bias", "none")],
        rank_pattern=given.get("rank_pattern") or {},
        alpha_pattern=given.get("alpha_pattern") or {},
        train_whole=layers.whole,
    )


def read_adalora(given: dict, layers: Layers) -> AdaloraConfig:
    steps = given.get("total_step") or 1
    return AdaloraConfig(
        r=given["target_r"],
        initial_r=given["init_r"],
        alpha=given["lora_alpha"] if given["lora_alpha"] > 0 else given["init_r"],
        targets=layers.targets,
        dropout=given.get("lora_dropout", 0.0),
        bias=BIASES[given.get("bias", "none")],
        train_whole=layers.whole,
        warmup=given.get("tinit", 0) / steps,
        final=given.get("tfinal", 0) / steps,
        every=given.get("deltaT", 1),
        beta1=given.get("beta1", 0.85),
        beta2=given.get("beta2", 0.85),
        orthogonality=given.get("orth_reg_weight", 0.5),
    )


def read_ia3(given: dict, layers: Layers) -> Ia3Config:
    return Ia3Config(targets=layers.targets, feedforward=layers.inner, train_whole=layers.whole)


def read_prompt(given: dict, layers: Layers) -> PromptConfig:
    """Prompt tuning and P-tuning: what the second one's network had made is a prompt like any other."""
    return PromptConfig(tokens=given["num_virtual_tokens"], train_whole=layers.whole)


def read_prefix(given: dict, layers: Layers) -> PrefixConfig:
    return PrefixConfig(tokens=given["num_virtual_tokens"], train_whole=layers.whole)


def read_adapter(given: dict, layers: Layers) -> AdapterConfig:
    return AdapterConfig(**{name: given[name] for name in OF_ADAPTER}, train_whole=layers.whole)


BIASES = {"none": "none", "all": "all", "lora_only": "adapted"}
OF_LORA = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "use_dora"),
    *("init_lora_weights", "ensure_weight_tying"),
}
OF_ADALORA = OF_LORA - {"use_dora"} | {  # of which rank_pattern, alpha_pattern and use_rslora are unread there
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step", "orth_reg_weight"),
}
OF_VECTORS = {"num_virtual_tokens", "num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"}
OF_PROMPT = OF_VECTORS | {
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"),
    *("encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"),
}
OF_ADAPTER = {"width", "placement", "activation", "dropout"}
# peft_type -> what reads it, and the settings that it understands
READ: dict[str, tuple[Callable[[dict, Layers], object], set[str]]] = {
    "LORA": (read_lora, OF_LORA),
    "ADALORA": (read_adalora, OF_ADALORA),
    "IA3": (read_ia3, {"feedforward_modules"}),
    "PROMPT_TUNING": (read_prompt, OF_PROMPT),
    "P_TUNING": (read_prompt, OF_PROMPT),
    "PREFIX_TUNING": (read_prefix, OF_VECTORS | {"prefix_projection", "encoder_hidden_size"}),
}
READ |= {OURS + kind: read for kind, read in READ.items()} | {OURS + "ADAPTER": (read_adapter, OF_ADAPTER)}


def refuse_unknown(given: dict) -> None:
    """An error that names a method or a setting without a counterpart here."""
    kind = given.get("peft_type")
    if kind not in READ:
        raise AdapterError(f"peft_type={kind!r} is not supported; supported: {', '.join(READ)}")
    for name, value in given.items():
        if name not in READ[kind][1] | SILENT and value not in (None, False, [], {}, "", ()):
            raise AdapterError(f"{name}={value!r} is not supported")


def read_config(given: dict, layers: Layers) -> object:
    """adapter_config.json -> our config of these layers."""
    try:
        return READ[given["peft_type"]][0](given, layers)
    except (KeyError, TypeError) as error:
        raise AdapterError(f"cannot be read: {error!r}") from None


def refuse_what_peft_ignores(network: nn.Module, given: dict, changed: Collection[str]) -> None:
    """Of an encoder-decoder PEFT wraps the embedding under one of its three names, that which no stack looks at: measured, its
    adapter changes nothing. Nor does a prefix of its classifiers, and prompts of these are errors there. Ours change something,
    so that PEFT's cannot be put here, nor ours there."""
    kind = str(given.get("peft_type"))
    if network.config.architecture != "encoder-decoder" or kind.startswith(OURS):
        return
    if "body.embedding" in changed:
        raise AdapterError("an embedding that both stacks share: PEFT's adapter of it changes nothing, here it would")
    if given.get("ensure_weight_tying") and "head" in changed and network.config.tie_embeddings:
        raise AdapterError("ensure_weight_tying=True: of an embedding that both stacks and the head share, it is not supported")
    if network.config.head in CLASSIFIERS and kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        raise AdapterError(f"{kind} of an encoder-decoder's classifier changes nothing in PEFT, here it would")


def meant(given: dict, modules: Collection[str]) -> set[str] | None:
    """The modules (published names) that PEFT would put something beside; None where it cannot be told."""
    targets, excluded, whole = (given.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save"))
    if targets is None or targets == "all-linear":
        return None

    def fits(rule: str | list[str] | None, module: str) -> bool:
        if isinstance(rule, str):
            return re.fullmatch(rule, module) is not None
        return any(module == end or module.endswith(f".{end}") for end in rule or ())

    found = {module for module in modules if fits(targets, module) and not fits(excluded, module)}
    found = {module for module in found if not any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in whole or ())}
    numbers = given.get("layers_to_transform")
    if isinstance(targets, str) or numbers in (None, []):
        return found
    numbers = [numbers] if isinstance(numbers, int) else numbers
    patterns = given.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    layer = re.compile(rf"(?:^|.*?\.)(?:{'|'.join(patterns)})\.(\d+)\.")
    return {module for module in found if (match := layer.match(module)) and int(match[1]) in numbers}


# ---- out


def write_config(network: nn.Module, name: str, base: str | None, entries: dict[str, Entry]) -> dict:
    """Our config of the adapter `name` -> adapter_config.json."""
    config = adapters(network)[name]
    published = linear_modules(network)  # published -> ours
    known = {row.published.rpartition(".")[0] for row in weight_table(network.config).values()} | set(published)
    adapted = {plain(path.removesuffix(f".parts.{name}")): part for path, part in parts(network, name).items()}
    whole = {entry.module for entry in entries.values() if entry.whole}
    layers = {module for module, ours in published.items() if ours in adapted} - whole
    kind, values = WRITE[config.method](network, config, entries)
    task_type = task(network, any(entry.whole and entry.row.name.startswith("head.") for entry in entries.values()))
    two_stacks = network.config.architecture == "encoder-decoder"
    if two_stacks and (kind == "PREFIX_TUNING" or "body.embedding" in adapted):
        kind = OURS + kind  # PEFT computes another thing: see `refuse_what_peft_ignores`; of a prefix it reads another layer's
    elif uses_virtual_tokens(config) and (task_type is None or (two_stacks and task_type in TASKS.values())):
        kind = OURS + kind  # PEFT has no class for the head, and its general one leaves out what stands before the text
    inside = [module for module in whole if f"{module}.".startswith(CLASSIFIER_MODULES)]  # all of them: `whole_head`
    saved = [*endings(whole - {"", *inside}, known), *sorted({module.partition(".")[0] for module in inside})]
    values["modules_to_save"] = saved or None
    if layers:
        inner = {entry.module for entry in entries.values() if entry.shape[:1] == (1,)} if config.method == "ia3" else set()
        values["target_modules"] = endings(layers - inner, known) + endings(inner, known)
        values["fan_in_fan_out"] = any(
            weight_table(network.config)[f"{published[m]}.weight"].layout == "transposed" for m in layers
        )
        if config.method == "ia3":
            values["feedforward_modules"] = endings(inner, known)
    if getattr(config, "rank_pattern", {}) or getattr(config, "alpha_pattern", {}):
        places = {module: LayerName(published[module], module) for module in layers}
        for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.alpha)):
            said = {module: by_pattern(getattr(config, field), place, default) for module, place in places.items()}
            groups = {value: {module for module in said if said[module] == value} for value in set(said.values()) - {default}}
            values[field] = {re.escape(end): value for value, group in groups.items() for end in endings(group, layers)}
    common = {
        "peft_type": kind,
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    return common | values


def task(network: nn.Module, own_head: bool) -> str | None:
    """With a classifying task PEFT takes for granted that the head was trained whole."""
    config = network.config
    if config.head == "lm":
        return "SEQ_2_SEQ_LM" if config.architecture == "encoder-decoder" else "CAUSAL_LM"
    return TASKS.get(config.head) if own_head or config.head == "none" else None


def write_lora(network: nn.Module, config: LoraConfig, entries: dict[str, Entry]) -> tuple[str, dict]:
    return "LORA", {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.method == "dora",
        "bias": {ours: theirs for theirs, ours in BIASES.items()}[config.bias],
    }


def write_adalora(network: nn.Module, config: AdaloraConfig, entries: dict[str, Entry]) -> tuple[str, dict]:
    steps = 10_000  # ours are fractions; PEFT reads these numbers when it trains on
    return "ADALORA", {
        "target_r": config.r,
        "init_r": config.initial_r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": {ours: theirs for theirs, ours in BIASES.items()}[config.bias],
        "total_step": steps,
        "tinit": round(config.warmup * steps),
        "tfinal": round(config.final * steps),
        "deltaT": config.every,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality,
    }


def write_ia3(network: nn.Module, config: Ia3Config, entries: dict[str, Entry]) -> tuple[str, dict]:
    return "IA3", {}


def write_before(network: nn.Module, config: object, entries: dict[str, Entry]) -> tuple[str, dict]:
    """A prompt, from whatever it was made, or a prefix."""
    sizes, prefix = network.config, config.method == "prefix"
    return "PREFIX_TUNING" if prefix else "PROMPT_TUNING", {
        "num_virtual_tokens": config.tokens,
        "num_layers": len(sizes.decoder_layers) if sizes.architecture == "encoder-decoder" else sizes.depth,
        "num_attention_heads": sizes.kv_heads if prefix else sizes.heads,
        "token_dim": sizes.kv_heads * sizes.head_width if prefix else sizes.width,
        "num_transformer_submodules": 1,
    }


def write_adapter(network: nn.Module, config: AdapterConfig, entries: dict[str, Entry]) -> tuple[str, dict]:
    values = asdict(config)
    values.pop("train_whole")
    return OURS + "ADAPTER", values


WRITE: dict[str, Callable[[nn.Module, object, dict[str, Entry]], tuple[str, dict]]] = {
    "lora": write_lora,
    "dora": write_lora,
    "adalora": write_adalora,
    "ia3": write_ia3,
    "adapter": write_adapter,
    "prompt": write_before,
    "ptuning": write_before,
    "prefix": write_before,
}
assert set(WRITE) == set(CONFIGS)
