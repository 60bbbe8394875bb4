"""Text in, batches out.

    config    the settings with the entries of --corpus, and the one error of bad input     imports the standard library only
    find      files that a path, a folder or a glob names; and what is left out
    files     user's files into documents: .txt .md .py and files of records, plain or .gz
    records   records of .jsonl .json .csv .tsv, with their places; scores read their files by it too
    parquet   those of .parquet
    shell     names of files in commands that are printed; `words` numbers of things in messages
    notes     lines on text that was left out, mended or not spelled
    corpus    built-in corpora and user's files -> documents; long ones cut
    dedup     exact and near duplicates
    tokenizer one interface to all tokenizers; the kind by the files of a folder
        tokenizer_sentencepiece    SentencePiece models: ours, lossless on any text, and others
        tokenizer_training         our SentencePiece BPE, trained on all of a text
        tokenizer_json             tokenizer.json and vocab.txt, by the library `tokenizers`
        tokenizer_export           ours as tokenizer.json
    split     training and validation by a hash of the text; few documents cut, so that some can be held out
    shards    documents -> train.bin, validation.bin, the tokenizer's files, index.json, built once
    sources/  more than files of text: records with columns, several sources by weight
    example   what a transform makes of a record
    packing/  examples, or blocks of tokens, -> rows of a batch; the batch of a step is a pure function of (seed, step)
    framing   one text or two with the control tokens around them, cut so that these stay
    labels    labels of records: their names, sorted into ids
    prefetch  batches made ahead, in a thread
    sizes     bytes of text, where only its tokens are at hand
    clm       blocks -> inputs and labels of causal language modelling
    mlm       blocks -> inputs with gaps and labels of masked language modelling
    seq2seq   a source and a target -> what encoder and decoder read, and labels

`python -m data prepare` builds the shards and prints what they hold.
In reading order: find, files, records, corpus, dedup, tokenizer, shards, packing/blocks, clm, mlm, seq2seq.
"""
