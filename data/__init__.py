"""Text in, batches out.

    config    the settings, and the one error of bad input     imports the standard library only
    files     user's files: .txt .md .py .jsonl, plain or .gz
    corpus    built-in corpora and user's files -> documents
    dedup     exact and near duplicates
    tokenizer one interface to all tokenizers; the kind by the files of a folder
        tokenizer_sentencepiece    SentencePiece models: ours, lossless on any text, and others
        tokenizer_training         our SentencePiece BPE, trained on all of a text
        tokenizer_json             tokenizer.json and vocab.txt, by the library `tokenizers`
    shards    documents -> train.bin, validation.bin, the tokenizer's files, index.json, built once
    stream    shards -> blocks of tokens; the batch of a step is a pure function of (seed, step)
    clm       blocks -> inputs and labels of causal language modelling
    mlm       blocks -> inputs with gaps and labels of masked language modelling

`python -m data prepare` builds the shards and prints what they hold.
In reading order: corpus, dedup, tokenizer, shards, stream, clm, mlm.
"""
