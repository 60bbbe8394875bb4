"""Adapters: small trainable parts on a frozen network, LoRA and other methods.

Where to read first: `lora` (the equation, `LoraLinear`), then `layer` and `inject`.

    config       settings of each method, one dataclass per method (imports no torch)
    inject       add_adapters, activate, remove: the same for all methods; and merge, unmerge of `merging`
    layer        a frozen layer with the parts of its adapters beside it
    targets      selects layers by names and regular expressions
    installed    the adapters that a network has
    foreign      networks of other libraries, transformers' Conv1D
    methods      registry: method → the function that builds its parts

One file per method: `lora` `dora` `adalora` `ia3` `adapter` (parts beside layers), `prompt` `ptuning` `prefix` (virtual
tokens).

    fused, kernels/         a linear layer and its LoRA as one autograd operation; its Triton kernel
    combine                 several LoRA adapters combined into one
    peft_io                 PEFT's folders, in and out: save, load, open_network
    peft_names, peft_config   PEFT's parameter names and settings, as tables that are read both ways
    peft_read, peft_load      the names in an adapter's file, parsed; the steps of loading
    vocabulary, task_head     an adapter whose vocabulary, or head, differs from its base's
    base                    identifies the base that an adapter was trained on
    merge_folder, __main__  python -m lora merge, one weight at a time
    base_weights, merged_weights    reads the base's weights; merges each one, and checks that all tensors are used
    side_files              copies tokenizer and other files beside the weights
"""

from importlib import import_module

PUBLIC = {  # file: the names that it offers; `from lora import LoraLinear` is the stable interface
    "adalora": ("RankAllocator", "cubic_budget"),
    "base": ("check_base",),
    "combine": ("combine_adapters",),
    "config": (
        "AdaloraConfig",
        "AdapterConfig",
        "AdapterError",
        "DoraConfig",
        "Ia3Config",
        "LoraConfig",
        "PrefixConfig",
        "PromptConfig",
        "PtuningConfig",
    ),
    "dora": ("dora_reference",),
    "fused": ("lora_linear",),
    "inject": ("activate", "add_adapters", "remove"),
    "lora": ("LoraLinear", "lora_reference"),
    "merge_folder": ("merge_to_folder",),
    "merging": ("merge", "unmerge"),
    "peft_io": ("load_adapter", "open_network", "save_adapter"),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str):
    if name in _FILE_OF:
        return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
