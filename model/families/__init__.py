"""One file per published family: strings and numbers, no torch (`_shared.py` holds what several of them share).

Each family's file has the same names:

    MODEL_TYPE      what config.json calls the family
    PRESETS         published sizes (and our own) as values of ModelConfig's fields
    read_config     Hugging Face's config.json -> values of ModelConfig's fields
    write_config    ModelConfig -> config.json
    weights         ModelConfig -> one row per kind of parameter of the body: (our name, published name, role[, layout]);
                    read in both directions by `model.hub`, and by everything that asks for a parameter's role: weight
                    decay, initialisation, adapter targets, quantization skips. A name without a row is an error.
    HEADS           the published heads: our name of the head -> HeadSpec, with the rows of its own weights. The first is
                    what a folder that names no architecture holds.
    PREFIX          what the body's published names begin with (`{body}` in the rows); absent in files that were saved
                    from the body alone
    DROPOUTS        which of ModelConfig's dropout fields the family has a place for
    ALIASES         published name -> the row's published name of which it is a copy (tied weights that were saved twice)
    RENAMED         endings of published names in old files -> what they are now
    CONSTANTS       published tensors without a parameter that transformers looks for: name -> model.weights.CONSTANTS
    FILE_TIES       true where the weights' files tell whether the head is the embedding, whatever config.json says; else absent
    COPIES_UNTIED   aliases that are written too where the head is not the embedding, as readers then tie nothing; or absent
    IGNORED         published tensors that hold no weight (constant buffers of old checkpoints)

In published names `{layer}` counts the layers, `{decoder_layer}` those of an encoder-decoder's second stack.
Roles: `embedding`, `position` (learned positions), `matrix` (hidden weight matrices), `head`, `norm`, `bias`.
Layouts: "transposed", published as I × O; "row", a vector published as 1 × V; "wide", kept in float32 where the rest is
float16; "interleaved", rows of q or k for neighbouring rotary pairs. A new family is a new file here:
its name is the family's (`model.config.FAMILIES`); names that begin with an underscore are no families.
"""
