"""One file per published family: strings and numbers, no torch (`_shared.py`: fields that several families have in common).

Each family's file has the same names:

    MODEL_TYPE      the family's name in config.json
    PRESETS         published sizes (and our own) as values of ModelConfig's fields
    read_config     Hugging Face's config.json -> values of ModelConfig's fields
    write_config    ModelConfig -> config.json
    weights         ModelConfig -> one row per kind of parameter of the body: (our name, published name, role[, layout]);
                    used in both directions by `model.hub`, and for a parameter's role by weight decay, initialization,
                    adapter targets and quantization skips. A name without a row is an error.
    HEADS           the published heads: our name of the head -> HeadSpec, with the rows of its own weights. The first is
                    that of a folder that names no architecture.
    PREFIX          the prefix of the body's published names (`{body}` in the rows); absent in files that were saved from
                    the body alone
    DROPOUTS        the dropout fields of ModelConfig that the family's config.json can hold
    ALIASES         published name -> the row's published name that it repeats (tied weights that were saved twice)
    RENAMED         endings of published names in old files -> the present ones
    CONSTANTS       published tensors without a parameter that transformers looks for: name -> model.weights.CONSTANTS
    FILE_TIES       true where the weight files decide whether the head is the embedding, not config.json; else absent
    COPIES_UNTIED   aliases that are written too where the head is untied, as readers then tie nothing; or absent
    IGNORED         published tensors that are no weights (constant buffers of old checkpoints)

In published names `{layer}` counts the layers, `{decoder_layer}` those of an encoder-decoder's second stack.
Roles: `embedding`, `position` (learned positions), `matrix` (hidden weight matrices), `head`, `norm`, `bias`.
Layouts: "transposed", published as I × O; "row", a vector published as 1 × V; "wide", kept in float32 where the rest is
float16; "interleaved", rows of q or k for neighbouring rotary pairs. A new family is a new file here:
its name is the family's (`model.config.FAMILIES`); names that begin with an underscore are no families.
"""
