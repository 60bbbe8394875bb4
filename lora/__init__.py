"""Small trainable parts on a frozen network: LoRA and its kin.

    config     what an adapter is told, a dataclass a method (no torch)
    inject     add_adapters, activate, merge, unmerge, remove: all methods alike
    layer      a frozen layer with parts beside it
    targets    which layers: names and regular expressions
    methods    the registry: method -> how its parts come to a network

One file a method: `lora` `dora` `adalora` `ia3` `adapter` (parts beside layers), `prompt` `ptuning` `prefix` (before the text).

    fused, kernels/         a layer and its LoRA as one operation; the same in Triton
    combine                 several LoRA adapters made into one
    peft_io                 PEFT's folders, in and out: save, load, open_network
    peft_names, peft_config   their names and settings, as tables that are read both ways
    peft_read, peft_load      the names in a file, understood; the steps of loading
    vocabulary, task_head     an adapter of another vocabulary than its base's, of another head
    base                    on which network an adapter was trained
    merge_folder, __main__  python -m lora merge, a weight at a time
    base_weights, merged      the base's folder, read so; each weight as it becomes, and the account of all tensors
    side_files                what stands beside the weights
"""
