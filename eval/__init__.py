"""Scores for text and for models: one file a metric, on strings, ids, tensors and callables.

    score      Score, and what every metric is: whole-number statistics of each example, and a score of their sum
    ngram      counting on tensors: n-grams of many pairs of texts at once
    tokenize   text to tokens for BLEU
    bleu       BLEU of a corpus and of a sentence
    baseline   what counting alone achieves on a text, the baseline beside a language model's loss
"""
