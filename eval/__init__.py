"""Scores for text and for models: one file a metric, on strings, ids, tensors and callables.

    score           Score, and what every metric is: statistics of each example, and a score of their sum, or their mean
    ngram           counting on tensors: n-grams of many pairs of texts at once
    lcs             longest common subsequences of many pairs at once
    tokenize        text to tokens for BLEU
    porter          Porter's stems
    wordnet         synonyms out of a WordNet database

    bleu            BLEU of a corpus and of a sentence
    chrf            chrF and chrF++
    rouge           ROUGE-1 to 9, L, Lsum, W
    meteor          METEOR; `chunks` finds the alignment with the fewest chunks
    bertscore       BERTScore, by any encoder
    answers         exact match and token F1 of short answers
    classification  accuracy, precision, recall, F1, MCC, confusion matrix, top-k accuracy
    entities        F1 of the entities that IOB2 tags spell
    calibration     calibration error, Brier score
    perplexity      a language model on text: per token, byte, character, word
    targets         which tokens of a text are scored, and what a network says of them
    baseline        what counting alone achieves on a text, the baseline beside a language model's loss

    bootstrap       how sure a score is
    significance    whether one system is better than another, and how many examples would tell

`python -m eval` scores files: `options` is what it asks, `commands.texts` reads them, `report` prints.
In reading order: score, ngram, bleu, rouge, lcs, meteor, bertscore, perplexity, bootstrap, significance.
"""
