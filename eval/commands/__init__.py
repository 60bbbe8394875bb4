"""Parts of the command line `python -m eval`, which may import anything.

    options      options of each subcommand, which build its metric
    scorer       one metric, or several that share the work
    texts        files of texts, read batch by batch
    score_texts  bleu, chrf, rouge, meteor, bertscore, f1: one system or several
    score_model  perplexity and pseudo-perplexity
    scoring      a model folder or run with its tokenizer, and its documents
    held_out     the held-out text of a run, scored as its validation does
"""
