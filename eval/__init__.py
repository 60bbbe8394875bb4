"""Scores for text and for models: one file a metric, on strings, ids and tensors.

- `ngram`: what counting alone achieves on a text, the baseline beside a language model's loss: unigrams, and bigrams
  with interpolated Kneser-Ney smoothing, in bits
"""
