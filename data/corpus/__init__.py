"""From files to clean documents, and to shards.

    ingest   documents of a corpus: built-in corpora and the user's files
    stdlib   the built-in corpora: docstrings and code of Python's standard library
    dedup    drops exact and near duplicates
    cut      cuts long documents into pieces
    split    training and validation by a hash of the text
    prepare  corpus -> shards: read, deduplicate, split, train a tokenizer, encode; cached
    eval_text    text that is only scored: encoded, and compared with the training text
"""

from importlib import import_module

MOVED = {"find_corpus": "ingest", "read_corpus": "ingest"}  # forwarded for one version


def __getattr__(name: str):
    if name in MOVED:
        return getattr(import_module(f"{__name__}.{MOVED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
