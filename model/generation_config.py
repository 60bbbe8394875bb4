"""`generation_config.json`: the ids that end, pad or are forced into a text, and the default settings of generation.

A folder of transformers 4 may have these fields in config.json instead. Settings that would change a text and are not
supported are listed in `GenerationConfig.unsupported`, for a command to report.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from model.config import ModelConfig
from model.constraints import Constraints
from model.folders import HubError

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
NUMBERS = {  # transformers' name -> ours: defaults that a caller may override
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "num_beams": "beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_length",
}
LIMITS = ("min_length", "min_new_tokens", "no_repeat_ngram_size")
LISTS = ("suppress_tokens", "begin_suppress_tokens")
SUPPORTED = {*IDS, *NUMBERS, *LIMITS, *LISTS, "do_sample"}
# Other settings that choose tokens, and their values without effect.
UNSUPPORTED = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ({},),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "exponential_decay_length_penalty": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "forced_decoder_ids": ([],),
    "watermarking_config": (),
    "stop_strings": ([],),
    "max_time": (),
    "token_healing": (False,),
    "num_return_sequences": (1,),
}
# Settings that change no text: of speed, memory and further outputs.
HARMLESS = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    # of speculative decoding, by a second network or a lookup
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "use_mtp"),
    *("transformers_version", "_from_model_config"),
}


@dataclass(frozen=True)
class GenerationConfig:
    """The generation settings of a folder. `defaults`: the names of `NUMBERS` that it sets (temperature 0 for do_sample false);
    `unsupported`: settings that would change a text and are ignored; `raw`: the file as it was read."""

    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    decoder_start_id: int | None = None
    constraints: Constraints = field(default_factory=Constraints)
    defaults: Mapping[str, float] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    raw: Mapping[str, object] = field(default_factory=dict)


def read_generation_config(folder: str | Path, config: ModelConfig) -> GenerationConfig:
    """Read a model folder's generation settings; missing ids come from config.json. Errors: HubError."""
    path = Path(folder) / FILE
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise HubError(f"{path} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise HubError(f"{path} is not a JSON object")
    else:
        path, known = Path(folder) / "config.json", SUPPORTED | UNSUPPORTED.keys()
        fields = {key: value for key, value in config.extra.items() if key in known}
    try:
        return parse_generation_config({key: value for key, value in fields.items() if value is not None}, config, fields)
    except (ValueError, TypeError) as error:
        raise HubError(f"{path}: {error}") from None


def parse_generation_config(fields: dict, config: ModelConfig, raw: dict) -> GenerationConfig:
    """Convert transformers' fields to a GenerationConfig. Errors: a value of a wrong kind (ValueError)."""
    defaults = {ours: number(fields, theirs) for theirs, ours in NUMBERS.items() if theirs in fields}
    if fields.get("do_sample") is False:
        defaults = {name: value for name, value in defaults.items() if name not in ("top_k", "top_p", "min_p")}
        defaults["temperature"] = 0.0
    end_ids = [i for i in (config.eos_id, *config.stop_ids) if i is not None]
    constraints = Constraints(
        min_length=whole_number(fields, "min_length"),
        min_new_tokens=whole_number(fields, "min_new_tokens"),
        no_repeat_ngram=whole_number(fields, "no_repeat_ngram_size"),
        forced_first=(*ids(fields, "forced_bos_token_id"), None)[0],
        forced_last=ids(fields, "forced_eos_token_id"),
        suppressed=ids(fields, "suppress_tokens"),
        suppressed_first=ids(fields, "begin_suppress_tokens"),
    )
    return GenerationConfig(
        stop_ids=ids(fields, "eos_token_id") or tuple(end_ids),
        pad_id=(*ids(fields, "pad_token_id"), config.pad_id)[0],
        decoder_start_id=(*ids(fields, "decoder_start_token_id"), config.decoder_start_id)[0],
        constraints=constraints,
        defaults=defaults,
        unsupported=tuple(unsupported_settings(fields)),
        raw=raw,
    )


def with_stop_ids(config: ModelConfig, folder: str | Path) -> ModelConfig:
    """Return the config with the ids that end a text in a folder's generation_config.json; unchanged without that file."""
    if not (Path(folder) / FILE).is_file():
        return config
    ends = read_generation_config(folder, config).stop_ids
    return config.replace(eos_id=ends[0], stop_ids=ends[1:]) if ends else config


def unsupported_settings(fields: dict) -> Iterator[str]:
    """Yield the settings that would change a text and are ignored."""
    yield from (key for key, idle in UNSUPPORTED.items() if key in fields and fields[key] not in idle)
    if fields.get("early_stopping") == "never":
        yield "early_stopping 'never'"
    if fields.get("do_sample") and number(fields, "num_beams", 1) > 1:
        yield "do_sample beside num_beams"


def ids(fields: dict, key: str) -> tuple[int, ...]:
    """Return a field's ids: one, a list, or none."""
    value = fields.get(key, ())
    value = (value,) if type(value) is int else value
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        raise ValueError(f"{key}={value!r} is neither an id nor a list of ids")
    return tuple(i for i in value if i >= 0)  # Whisper writes -1 for none


def number(fields: dict, key: str, default: float = 0.0) -> float:
    """Return a field's number."""
    value = fields.get(key, default)
    if not isinstance(value, int | float) and not (key == "early_stopping" and value == "never"):
        raise ValueError(f"{key}={value!r} is not a number")
    return value


def whole_number(fields: dict, key: str) -> int:
    """Return a field's whole number, 0 where it is missing; JSON may write it as 5.0."""
    value = number(fields, key)
    if value % 1:  # of infinity and NaN too
        raise ValueError(f"{key}={value!r} is not a whole number")
    return int(value)


def generation_json(config: ModelConfig, raw: Mapping[str, object]) -> str:
    """Return the file of a network: as it was read (`raw`), else with the ids of config.json, for tools that read only it."""
    ends = [i for i in (config.eos_id, *config.stop_ids) if i is not None]
    values = {
        "bos_token_id": config.bos_id,
        "eos_token_id": ends if len(ends) > 1 else config.eos_id,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.decoder_start_id,
    }
    fields = {key: value for key, value in values.items() if value is not None}
    return json.dumps(dict(raw) or fields, indent=2, ensure_ascii=False) + "\n"
