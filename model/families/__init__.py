"""One file per published family: strings and numbers, no torch.

Each file has the same names:

    MODEL_TYPE      what config.json calls the family
    ARCHITECTURE    the class that transformers opens a language model of this family with
    PRESETS         published sizes (and our own) as values of ModelConfig's fields
    read_config     Hugging Face's config.json -> values of ModelConfig's fields
    write_config    ModelConfig -> config.json
    WEIGHTS         one row per kind of parameter: (our name, published name, role[, "transposed"]); read in both directions
                    by `model.hub`, and by everything that asks for a parameter's role: weight decay, initialisation,
                    adapter targets, quantization skips. A name without a row is an error.
    PREFIX          what published names begin with, absent in files that were saved from the body alone
    DROPOUTS        which of ModelConfig's dropout fields the family has a place for
    IGNORED         published tensors that hold no weight (constant buffers of old checkpoints)

Roles: `embedding`, `position` (learned positions), `matrix` (hidden weight matrices), `head`, `norm`, `bias`.
A new family is a new file here and a name in `model.config.FAMILIES`.
"""
