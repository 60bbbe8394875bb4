"""Parts of the command line `python -m eval`, which may import anything.

    options      options of each subcommand, which build its metric
    reward_options  options of reward
    scorer       one metric, or several that share the work
    texts        files of texts, read batch by batch
    score_texts  bleu, chrf, rouge, meteor, bertscore, f1: one system or several
    score_model  perplexity and pseudo-perplexity
    reply_records  replies of a file as ids, and the pairs among them
    score_replies  reward: rewards of replies, rankings, accuracy on pairs
    scoring      a model folder or run with its tokenizer, and its documents
    held_out     the held-out text of a run, scored as its validation does
"""
