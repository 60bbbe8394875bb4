"""Names that both the metrics and the command line choose from, each list in one place; imports no torch.

Tokenizers are in `eval.tokenize`, averages of classification metrics in `eval.rates`, kinds of ROUGE in `eval.rouge`.
"""

SMOOTH_VALUES = {"exp": None, "floor": 0.1, "add-k": 1.0, "none": None}  # BLEU's smoothings: the default value of each
ALIGNMENTS = ("nltk", "fewest-chunks")  # METEOR's
CORPUS_SCORES = {"mean": True, "sum": False}  # METEOR's: whether the corpus score is the mean over examples
SQUAD_VERSIONS = ("1.1", "2.0")
TESTS = {"bootstrap": "bs", "randomisation": "ar"}  # name of a significance test → its name in a signature, as in sacrebleu
