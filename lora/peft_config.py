"""PEFT's adapter_config.json and our configs: one function per method in each direction.

A setting that would change the computation and has no counterpart here is refused by name (`refuse_unknown`). Settings that
only selected layers or initial values are ignored: the tensors are there.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import singledispatch
from typing import NamedTuple

from torch import nn

from lora.config import (
    AdaloraConfig,
    AdapterConfig,
    AdapterError,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    PtuningConfig,
)
from lora.installed import adapters, parts
from lora.layer import LayerName
from lora.methods import uses_virtual_tokens
from lora.peft_names import CLASSIFIER_MODULES, CLASSIFIERS, Entry, base_name, endings, linear_modules
from lora.targets import by_pattern
from model.weights import weight_table

OWN_PREFIX = "TOUCHSTONE_"  # of a peft_type that PEFT does not have: only we read it
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "qa": "QUESTION_ANS", "none": "FEATURE_EXTRACTION"}
IGNORED = {  # they do not change what is computed from the stored tensors
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type"),
    *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "fan_in_fan_out", "init_ia3_weights"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "init_weights", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}


class FileLayers(NamedTuple):
    """The layers that the tensors' names give: regular expressions for our modules."""

    targets: str
    modules_to_save: tuple[str, ...]
    scaled_inputs: str  # (IA)³: the layers whose input is scaled


# ---- in


def read_lora(peft_config: dict, layers: FileLayers) -> LoraConfig:
    first = peft_config.get("init_lora_weights", True)
    if isinstance(first, str) and not first.startswith(("gaussian", "eva", "orthogonal", "mica")):
        raise AdapterError(
            f"init_lora_weights={first!r} changed the base too, so that the adapter is no difference from it: convert it with "
            "PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion=…)"
        )
    kind = DoraConfig if peft_config.get("use_dora") else LoraConfig
    return kind(
        r=peft_config["r"],
        alpha=peft_config["lora_alpha"],
        targets=layers.targets,
        dropout=peft_config.get("lora_dropout", 0.0),
        rank_stabilized=peft_config.get("use_rslora", False),
        bias=BIASES[peft_config.get("bias", "none")],
        rank_pattern=peft_config.get("rank_pattern") or {},
        alpha_pattern=peft_config.get("alpha_pattern") or {},
        train_whole=layers.modules_to_save,
    )


def read_adalora(peft_config: dict, layers: FileLayers) -> AdaloraConfig:
    steps = peft_config.get("total_step") or 1
    return AdaloraConfig(
        r=peft_config["target_r"],
        initial_r=peft_config["init_r"],
        alpha=peft_config["lora_alpha"] if peft_config["lora_alpha"] > 0 else peft_config["init_r"],
        targets=layers.targets,
        dropout=peft_config.get("lora_dropout", 0.0),
        bias=BIASES[peft_config.get("bias", "none")],
        train_whole=layers.modules_to_save,
        warmup=peft_config.get("tinit", 0) / steps,
        final=peft_config.get("tfinal", 0) / steps,
        every=peft_config.get("deltaT", 1),
        beta1=peft_config.get("beta1", 0.85),
        beta2=peft_config.get("beta2", 0.85),
        orthogonality=peft_config.get("orth_reg_weight", 0.5),
    )


def read_ia3(peft_config: dict, layers: FileLayers) -> Ia3Config:
    return Ia3Config(targets=layers.targets, feedforward=layers.scaled_inputs, train_whole=layers.modules_to_save)


def read_prompt(peft_config: dict, layers: FileLayers) -> PromptConfig:
    """Read prompt tuning and P-tuning: the vectors that P-tuning's MLP computed are an ordinary prompt."""
    return PromptConfig(tokens=peft_config["num_virtual_tokens"], train_whole=layers.modules_to_save)


def read_prefix(peft_config: dict, layers: FileLayers) -> PrefixConfig:
    return PrefixConfig(tokens=peft_config["num_virtual_tokens"], train_whole=layers.modules_to_save)


def read_adapter(peft_config: dict, layers: FileLayers) -> AdapterConfig:
    return AdapterConfig(**{name: peft_config[name] for name in ADAPTER_KEYS}, train_whole=layers.modules_to_save)


BIASES = {"none": "none", "all": "all", "lora_only": "adapted"}
LORA_KEYS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "use_dora"),
    *("init_lora_weights", "ensure_weight_tying"),
}
ADALORA_KEYS = LORA_KEYS - {"use_dora"} | {  # PEFT does not read rank_pattern, alpha_pattern and use_rslora of it
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step", "orth_reg_weight"),
}
VIRTUAL_TOKEN_KEYS = {"num_virtual_tokens", "num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"}
PROMPT_KEYS = VIRTUAL_TOKEN_KEYS | {
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"),
    *("encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"),
}
ADAPTER_KEYS = {"width", "placement", "activation", "dropout"}
# peft_type → (its reader, the settings that it understands)
READERS: dict[str, tuple[Callable[[dict, FileLayers], object], set[str]]] = {
    "LORA": (read_lora, LORA_KEYS),
    "ADALORA": (read_adalora, ADALORA_KEYS),
    "IA3": (read_ia3, {"feedforward_modules"}),
    "PROMPT_TUNING": (read_prompt, PROMPT_KEYS),
    "P_TUNING": (read_prompt, PROMPT_KEYS),
    "PREFIX_TUNING": (read_prefix, VIRTUAL_TOKEN_KEYS | {"prefix_projection", "encoder_hidden_size"}),
}
READERS |= {OWN_PREFIX + kind: read for kind, read in READERS.items()} | {OWN_PREFIX + "ADAPTER": (read_adapter, ADAPTER_KEYS)}


def refuse_unknown(peft_config: dict) -> None:
    """Raise AdapterError for a method or a setting without a counterpart here."""
    kind = peft_config.get("peft_type")
    if kind not in READERS:
        raise AdapterError(f"peft_type={kind!r} is not supported; supported: {', '.join(READERS)}")
    for name, value in peft_config.items():
        if name not in READERS[kind][1] | IGNORED and value not in (None, False, [], {}, "", ()):
            raise AdapterError(f"{name}={value!r} is not supported")


def read_config(peft_config: dict, layers: FileLayers) -> object:
    """Return our config for an adapter_config.json and these layers."""
    try:
        return READERS[peft_config["peft_type"]][0](peft_config, layers)
    except (KeyError, TypeError) as error:
        raise AdapterError(f"cannot be read: {error!r}") from None


def refuse_what_peft_ignores(network: nn.Module, peft_config: dict, changed: Collection[str]) -> None:
    """Raise AdapterError for adapters of an encoder-decoder that have no effect in PEFT, and would have one here.

    PEFT wraps the shared embedding under the one of its three names that no stack reads: measured, its adapter changes nothing.
    A prefix of a classifier changes nothing either, and a prompt of one is an error there.
    """
    kind = str(peft_config.get("peft_type"))
    if network.config.architecture != "encoder-decoder" or kind.startswith(OWN_PREFIX):
        return
    if "body.embedding" in changed:
        raise AdapterError("the embedding that both stacks share: an adapter of it has no effect in PEFT, but has one here")
    if peft_config.get("ensure_weight_tying") and "head" in changed and network.config.tie_embeddings:
        raise AdapterError("ensure_weight_tying=True is not supported for an embedding that both stacks and the head share")
    if network.config.head in CLASSIFIERS and kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        raise AdapterError(f"{kind} of an encoder-decoder's classifier has no effect in PEFT, but has one here")


def targeted_modules(peft_config: dict, modules: Collection[str]) -> set[str] | None:
    """Return the published names of the modules that PEFT would adapt; None if the settings do not tell."""
    targets, excluded, named = map(peft_config.get, ("target_modules", "exclude_modules", "modules_to_save"))
    if targets is None or targets == "all-linear":
        return None

    def fits(rule: str | list[str] | None, module: str) -> bool:
        if isinstance(rule, str):
            return re.fullmatch(rule, module) is not None
        return any(module == end or module.endswith(f".{end}") for end in rule or ())

    found = {module for module in modules if fits(targets, module) and not fits(excluded, module)}
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in named or ()]
    found = {module for module in found if not any(rule.match(module) for rule in saved)}
    numbers = peft_config.get("layers_to_transform")
    if isinstance(targets, str) or numbers in (None, []):
        return found
    numbers = [numbers] if isinstance(numbers, int) else numbers
    patterns = peft_config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    layer = re.compile(rf"(?:^|.*?\.)(?:{'|'.join(patterns)})\.(\d+)\.")
    return {module for module in found if (match := layer.match(module)) and int(match[1]) in numbers}


# ---- out


def write_config(network: nn.Module, name: str, base: str | None, entries: dict[str, Entry]) -> dict:
    """Return the adapter_config.json of the adapter `name`. base: the base's folder."""
    config = adapters(network)[name]
    published = linear_modules(network)  # published → ours
    known = {row.published.rpartition(".")[0] for row in weight_table(network.config).values()} | set(published)
    adapted = {base_name(path.removesuffix(f".parts.{name}")): part for path, part in parts(network, name).items()}
    saved = {entry.module for entry in entries.values() if entry.in_module_to_save}
    layers = {module for module, ours in published.items() if ours in adapted} - saved
    kind, values = peft_settings(config, network)
    task_type = task(network, any(entry.in_module_to_save and entry.row.name.startswith("head.") for entry in entries.values()))
    two_stacks = network.config.architecture == "encoder-decoder"
    if two_stacks and (kind == "PREFIX_TUNING" or "body.embedding" in adapted):
        kind = OWN_PREFIX + kind  # PEFT computes something else: `refuse_what_peft_ignores`, `lora.prefix`
    elif uses_virtual_tokens(config) and (task_type is None or (two_stacks and task_type in TASKS.values())):
        kind = OWN_PREFIX + kind  # PEFT has no class for the head, and its general one ignores virtual tokens
    classifier = [module for module in saved if f"{module}.".startswith(CLASSIFIER_MODULES)]  # complete: `saved_head`
    names = [*endings(saved - {"", *classifier}, known), *sorted({module.partition(".")[0] for module in classifier})]
    values["modules_to_save"] = names or None
    if layers:
        is_ia3 = isinstance(config, Ia3Config)
        inputs = {entry.module for entry in entries.values() if is_ia3 and entry.shape[:1] == (1,)}  # scaled inputs
        values["target_modules"] = endings(layers - inputs, known) + endings(inputs, known)
        values["fan_in_fan_out"] = any(
            weight_table(network.config)[f"{published[m]}.weight"].layout == "transposed" for m in layers
        )
        if is_ia3:
            values["feedforward_modules"] = endings(inputs, known)
    if getattr(config, "rank_pattern", {}) or getattr(config, "alpha_pattern", {}):
        layer_names = {module: LayerName(published[module], module) for module in layers}
        for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.alpha)):
            values_of = {module: by_pattern(getattr(config, field), each, default) for module, each in layer_names.items()}
            others = set(values_of.values()) - {default}
            groups = {value: {module for module in values_of if values_of[module] == value} for value in others}
            values[field] = {re.escape(end): value for value, group in groups.items() for end in endings(group, layers)}
    common = {
        "peft_type": kind,
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    return common | values


def task(network: nn.Module, own_head: bool) -> str | None:
    """Return PEFT's task_type. With a classifying task PEFT expects that the head was trained in full."""
    config = network.config
    if config.head == "lm":
        return "SEQ_2_SEQ_LM" if config.architecture == "encoder-decoder" else "CAUSAL_LM"
    return TASKS.get(config.head) if own_head or config.head == "none" else None


@singledispatch
def peft_settings(config: object, network: nn.Module) -> tuple[str, dict]:
    """Return the peft_type of our config and its settings in PEFT's names; a function per config class."""
    raise AdapterError(f"a {type(config).__name__} has no form in PEFT's folders")


@peft_settings.register
def write_lora(config: LoraConfig, network: nn.Module) -> tuple[str, dict]:
    return "LORA", {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "use_dora": isinstance(config, DoraConfig),
        "bias": {ours: theirs for theirs, ours in BIASES.items()}[config.bias],
    }


@peft_settings.register
def write_adalora(config: AdaloraConfig, network: nn.Module) -> tuple[str, dict]:
    steps = 10_000  # our warmup and final are fractions; PEFT reads these numbers when it resumes training
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


@peft_settings.register
def write_ia3(config: Ia3Config, network: nn.Module) -> tuple[str, dict]:
    return "IA3", {}


@peft_settings.register(PromptConfig)
@peft_settings.register(PtuningConfig)
def write_prompt(config: PromptConfig | PtuningConfig, network: nn.Module) -> tuple[str, dict]:
    return "PROMPT_TUNING", virtual_token_sizes(config, network, network.config.heads, network.config.width)


@peft_settings.register
def write_prefix(config: PrefixConfig, network: nn.Module) -> tuple[str, dict]:
    kv_heads = network.config.kv_heads
    return "PREFIX_TUNING", virtual_token_sizes(config, network, kv_heads, kv_heads * network.config.head_width)


def virtual_token_sizes(config: object, network: nn.Module, heads: int, width: int) -> dict:
    sizes = network.config
    return {
        "num_virtual_tokens": config.tokens,
        "num_layers": len(sizes.decoder_layers) if sizes.architecture == "encoder-decoder" else sizes.depth,
        "num_attention_heads": heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }


@peft_settings.register
def write_adapter(config: AdapterConfig, network: nn.Module) -> tuple[str, dict]:
    values = asdict(config)
    values.pop("train_whole")
    return OWN_PREFIX + "ADAPTER", values
