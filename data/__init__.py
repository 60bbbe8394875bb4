"""Text in, batches out.

    config      the data options, the entries of --corpus, and the one error of bad input     imports the standard library only
    sources/    files, records, shards, mixtures: where text and examples come from
    corpus/     built-in corpora and user's files as documents; duplicates removed; a validation split
    tokenizer/  one interface to all tokenizers
    example     one example: ids and labels, before packing
    transforms/ one file a way of making labels: causal, masked, seq2seq, labels, framing
    packing/    examples, or blocks of tokens, -> rows of a batch; the batch of a step is a pure function of (seed, step)
    prefetch    batches made ahead, in a thread
    sizes       bytes of text, where only its tokens are at hand
    notes       lines on text that was left out, mended or not spelled
    shell words commands as they are typed; numbers with their nouns, in messages

`python -m data prepare` builds the shards and prints what they hold.
In reading order: sources/find, sources/files, corpus/ingest, corpus/dedup, tokenizer/base, sources/shards, packing/blocks,
transforms/causal, transforms/masked, transforms/seq2seq.
"""
