"""The network and its weights.

Where to read first: `config` (the hyperparameters of a network), then bottom up, as a paper would introduce the parts:

    norm · position · rope · mask · linear · attention · cache · mlp · block    the parts
    virtual_tokens · stack · decoder · encoder · encoder_decoder         the bodies
    heads · network                                                      their outputs, and the whole network
    families/ · weights                                                  one table per published family, and its use
    init · safetensors_file · finite · matching · hub                    initialization; folders in the Hugging Face layout
    folders · config_json · generation_config · ties                     the files of such a folder, beside the weights
    decoding · sampling · constraints · stopping · generate · beam · streaming   text generation
    rollouts                                                             sampled replies with their log-probabilities
    chat_session                                                         replies of a chat, whose cache stays over turns
    fill                                                                 mask filling by a masked-language model
    predict · predict_tags · answer_spans                                class probabilities, numbers, tags, answers
    reward                                                               rewards of replies by a reward model
    parameters · flops · training · activations · memory · account       the cost of a network, before it is built
    resize                                                               another vocabulary size
    words                                                                lists of names in messages

and `python -m model` is the command line (`commands/`): chat, generate, fill, predict, info, resize, export.

`from model import load` works for every name in `PUBLIC`. A function with the name of its file is imported from it: `from
model.generate import generate`, `from model.fill import fill`.

The legend of shapes. A tensor's name ends in the letters of its axes, in order, and they mean the same in every file:

    B batch             T query positions     S key positions     N tokens, flattened
    D model width       H query heads         G key/value heads   K head width
    F feed-forward      V vocabulary          R adapter rank      L layers          E experts
    O, I   a weight's out and in features     C classes, candidates or chunks       P virtual tokens

so `q_BHTK @ k_BHSK.mT` is `score_BHTS`. A letter that is absent is an axis that is not there; `1` is an axis of size one.
"""

from importlib import import_module

PUBLIC = {  # file: the names that it offers; `from model import load` is the stable interface
    "config": ("ConfigError", "ModelConfig", "Rope", "presets"),
    "network": ("Network",),
    "stack": ("EncoderOutput", "Output"),
    "init": ("build_network", "initialize"),
    "hub": ("load", "save"),
    "config_json": ("read_config",),
    "folders": ("HubError",),
    "generation_config": ("GenerationConfig", "read_generation_config"),
    "norm": ("LayerNorm", "RMSNorm", "layer_norm_reference", "rms_norm_reference"),
    "position": ("positions_from_mask", "relative_bucket", "sinusoid"),
    "rope": ("halves_to_interleaved", "interleaved_to_halves", "rope_tables", "rotate"),
    "mask": ("AttentionInputs", "Mask"),
    "attention": ("attention_reference", "attention_sdpa"),
    "mlp": ("GatedMlp", "Mlp", "gelu_tanh"),
    "block": ("PostNormBlock", "PreNormBlock"),
    "cache": ("Cache",),
    "sampling": ("Sampling", "filter_logits", "keep_min_p", "keep_top_k", "keep_top_p", "penalize"),
    "constraints": ("Constraints",),
    "stopping": ("Stop",),
    "beam": ("Beams", "beam_search"),
    "streaming": ("TextStream",),
    "rollouts": ("SampledReply", "sample_replies"),
    "answer_spans": ("find_answers", "rank_spans"),
    "resize": ("resize_vocabulary",),
    "parameters": ("CacheBytes", "adapter_parameters", "cache_bytes", "parameters_by_part"),
    "flops": ("Flops", "flops_per_token"),
    "training": ("Training",),
    "activations": ("activation_bytes",),
    "memory": ("MemoryEstimate", "training_memory"),
    "safetensors_file": ("WeightFile", "WeightFileError"),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str):
    if name in _FILE_OF:
        return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
