"""Metrics of texts and models: one file per metric, on strings, ids, tensors and callables.

    score             Score, and the interface of a metric: statistics per example, and a score of their sum or mean
    ngram             n-gram counts and clipped matches of many pairs of texts at once
    lcs               longest common subsequences of many pairs of texts at once
    padding           padded batches of texts of different lengths
    tokenize          tokenizers by sacrebleu's names; `mecab` segments Japanese and Korean
    porter            Porter stemmer
    wordnet           synonyms from a WordNet database
    notes             notes about texts and settings that do not suit a metric, each reported once
    scripts           notes about dropped letters and unsegmented sentences
    choices           names that the metrics and the command line choose from

    bleu              BLEU of a corpus and of a sentence
    chrf              chrF and chrF++
    rouge             ROUGE-1 to 9, L, Lsum, W; `rouge_bootstrap` resamples as rouge-score does
    meteor            METEOR; `meteor_alignment` aligns words, `chunks` searches for the fewest chunks
    bertscore         BERTScore with any encoder; `bertscore_inputs` has token ids, idf weights and baselines
    answers           exact match and token F1 of short answers; `unanswered` notes "no answer" in words
    error_rate        word and character error rate
    rates             precision, recall and F1 from counts, and their averages
    classification    accuracy, precision, recall, F1, MCC, confusion matrix, top-k accuracy
    multilabel        the same for indicator matrices, one column per class
    entities          entity F1 of IOB2, IOBES and BILOU tags
    correlation       Pearson's and Spearman's correlation of two series of numbers
    calibration       calibration error, Brier score
    pair_rewards      accuracy, margin and calibration of a reward model on pairs; correlation of rewards with length
    perplexity        perplexity of a language model per token, byte, character and word
    targets           targets of a language model: rows, batches and log-probabilities
    baseline          n-gram baseline: bits of a text under unigrams and bigrams

    bootstrap         bootstrap confidence interval of a score; Wilson's interval
    significance      paired bootstrap, approximate randomisation, number of examples needed

`python -m eval` scores files: `commands` holds its options and reads them, `report` formats the results.
In reading order: score, ngram, bleu, rouge, lcs, meteor, bertscore, perplexity, bootstrap, significance.
"""

from importlib import import_module

PUBLIC = {  # file: the names that it offers; `from eval import corpus_bleu` is the stable interface
    "score": ("Metric", "Proportion", "Score", "corpus_value"),
    "notes": ("Notes",),
    "tokenize": (
        "tokenize_13a",
        "tokenize_char",
        "tokenize_intl",
        "tokenize_none",
        "tokenize_texts",
        "tokenize_unicode",
        "tokenize_zh",
    ),
    "porter": ("stem",),
    "wordnet": ("WordNet",),
    "bleu": ("Bleu", "bleu_reference", "corpus_bleu", "sentence_bleu"),
    "error_rate": ("ErrorRate", "edit_distance", "error_rate_scores"),
    "chrf": ("Chrf", "corpus_chrf", "sentence_chrf"),
    "rouge": ("Rouge", "rouge_scores", "summary_lcs_reference"),
    "rouge_bootstrap": ("bootstrap_aggregate",),
    "lcs": ("lcs_reference", "weighted_lcs_reference"),
    "meteor": ("Meteor", "meteor_score"),
    "bertscore": ("BertScore", "bert_score"),
    "bertscore_inputs": ("idf_weights",),
    "answers": ("Answers", "answer_scores"),
    "classification": (
        "Classification",
        "classification_scores",
        "confusion_matrix",
        "is_in_top_k",
        "scores_from_confusion",
        "top_k_accuracy",
    ),
    "multilabel": ("Multilabel", "multilabel_scores"),
    "correlation": ("average_ranks", "pearson", "spearman"),
    "entities": ("Entities", "entity_scores", "find_entities"),
    "calibration": ("Calibration", "calibration_error"),
    "perplexity": ("Perplexity", "PseudoPerplexity", "perplexity_score", "pseudo_perplexity"),
    "baseline": ("KneserNey", "kneser_ney_bits", "unigram_bits"),
    "bootstrap": ("Interval", "bootstrap_interval", "confidence_interval", "wilson_interval"),
    "significance": (
        "Comparison",
        "approximate_randomisation",
        "examples_needed",
        "min_differing_examples",
        "paired_bootstrap",
        "smallest_p_value",
    ),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str):
    if name in _FILE_OF:
        return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
