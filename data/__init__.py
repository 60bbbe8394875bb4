"""Text in, batches out.

    config    the settings, and the one error of bad input     imports the standard library only
    find      files that a path, a folder or a glob names; and what is left out
    files     user's files into documents: .txt .md .py and files of records, plain or .gz
    records   records of .jsonl .json .csv .tsv, with their places; scores read their files by it too
    shell     names of files in commands that are printed; `words` numbers of things in messages
    corpus    built-in corpora and user's files -> documents; long ones cut
    dedup     exact and near duplicates
    tokenizer one interface to all tokenizers; the kind by the files of a folder
        tokenizer_sentencepiece    SentencePiece models: ours, lossless on any text, and others
        tokenizer_training         our SentencePiece BPE, trained on all of a text
        tokenizer_json             tokenizer.json and vocab.txt, by the library `tokenizers`
        tokenizer_export           ours as tokenizer.json
    shards    documents -> train.bin, validation.bin, the tokenizer's files, index.json, built once
    sources/  more than files of text: records with columns, several sources by weight
    example   what a transform makes of a record
    packing/  examples, or blocks of tokens, -> rows of a batch; the batch of a step is a pure function of (seed, step)
    prefetch  batches made ahead, in a thread
    clm       blocks -> inputs and labels of causal language modelling
    mlm       blocks -> inputs with gaps and labels of masked language modelling
    seq2seq   a source and a target -> what encoder and decoder read, and labels

`python -m data prepare` builds the shards and prints what they hold.
In reading order: find, files, records, corpus, dedup, tokenizer, shards, packing/blocks, clm, mlm, seq2seq.
"""
