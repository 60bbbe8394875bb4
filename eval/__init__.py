"""Scores for text and for models: one file a metric, on strings, ids, tensors and callables.

    score           Score, and what every metric is: statistics of each example, and a score of their sum, or their mean
    ngram           n-grams of many pairs of texts at once, counted on tensors
    lcs             longest common subsequences of many pairs at once
    padding         batches of texts that differ in length
    tokenize        text to tokens; `mecab` cuts Japanese and Korean
    porter          Porter's stems
    wordnet         synonyms out of a WordNet database
    notes           what is said, once, of texts and settings that a score does not fit
    scripts         letters that a score's words drop, and sentences that they do not cut

    bleu            BLEU of a corpus and of a sentence
    chrf            chrF and chrF++
    rouge           ROUGE-1 to 9, L, Lsum, W
    meteor          METEOR; `chunks` finds the alignment with the fewest chunks
    bertscore       BERTScore, by any encoder
    answers         exact match and token F1 of short answers; `unanswered` notices "no answer" in words
    rates           precision, recall and F1 of counts, and their averages
    classification  accuracy, precision, recall, F1, MCC, confusion matrix, top-k accuracy
    multilabel      the same of label matrices, a column for each class
    entities        F1 of the entities that IOB2 tags spell
    calibration     calibration error, Brier score
    perplexity      a language model on text: per token, byte, character, word
    targets         which tokens of a text are scored, and what a network says of them
    baseline        n-gram baseline: bits of a text under unigrams and bigrams, beside a language model's loss

    bootstrap       how sure a score is; Wilson's interval
    significance    whether one system is better than another, and how many examples would tell

`python -m eval` scores files: `commands` has what it asks and reads them, `report` prints.
In reading order: score, ngram, bleu, rouge, lcs, meteor, bertscore, perplexity, bootstrap, significance.
"""
