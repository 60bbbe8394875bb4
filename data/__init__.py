"""Text in, batches out.

    config    the settings, and the one error of bad input     imports the standard library only
    files     user's files: .txt .md .py .jsonl, plain or .gz
    corpus    built-in corpora and user's files -> documents
    dedup     exact and near duplicates
    tokenizer SentencePiece BPE, lossless on any text
    shards    documents -> train.bin, validation.bin, tokenizer.model, index.json, built once
    stream    shards -> blocks of tokens; the batch of a step is a pure function of (seed, step)
    clm       blocks -> inputs and labels of causal language modelling

`python -m data prepare` builds the shards and prints what they hold.
In reading order: corpus, dedup, tokenizer, shards, stream, clm.
"""
