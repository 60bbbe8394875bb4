"""From files to clean documents, and to shards.

    ingest   documents of a corpus: built-in corpora and the user's files
    stdlib   the built-in corpora: docstrings and code of Python's standard library
    dedup    drops exact and near duplicates
    cut      cuts long documents into pieces
    split    training and validation by a hash of the text
    prepare  corpus -> shards: read, deduplicate, split, train a tokenizer, encode; cached
"""
