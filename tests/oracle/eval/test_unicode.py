"""10,000 pairs of arbitrary Unicode through every score of texts, beside the libraries: each example, and all together."""

import collections
import re
import string

import nltk
import pytest
import rouge_score.rouge_scorer
import sacrebleu
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score

from eval.answers import Answers, answers_statistics
from eval.bleu import Bleu
from eval.chrf import Chrf
from eval.meteor import Meteor
from eval.rouge import Rouge, rouge_statistics
from eval.score import corpus_value
from tests.compare import absolute
from tests.pairs import unicode_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*letters of hypotheses:UserWarning")  # of arbitrary Unicode
COUNT = 10_000
SACREBLEU = f"sacrebleu {sacrebleu.__version__}"
REASON = "float64 rounding; logarithms and powers of torch"


@pytest.fixture(scope="module")
def pairs():
    return unicode_pairs(COUNT, seed=3)


@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "none"])
def test_bleu(pairs, parity, tokenize):
    hypotheses, references = pairs
    metric, library = Bleu(tokenize), sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
    statistics_BK = metric.statistics(hypotheses, [references])
    theirs = [library.sentence_score(*pair).score for pair in zip(hypotheses, [[text] for text in references], strict=True)]
    parity(f"any Unicode: BLEU {tokenize}", SACREBLEU, absolute(metric.examples(statistics_BK), theirs), 1e-9, REASON)
    whole = sacrebleu.BLEU(tokenize=tokenize).corpus_score(hypotheses, [references]).score
    parity(f"any Unicode: BLEU {tokenize}", SACREBLEU, absolute(corpus_value(metric, statistics_BK), whole), 1e-9, REASON)
    assert 0 < whole < 100 and len(set(theirs)) > 500  # not all of them nothing


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf(pairs, parity, word_order):
    hypotheses, references = pairs
    metric, library = Chrf(word_order=word_order), sacrebleu.CHRF(word_order=word_order)
    statistics_BK = metric.statistics(hypotheses, [references])
    theirs = [library.sentence_score(*pair).score for pair in zip(hypotheses, [[text] for text in references], strict=True)]
    parity(f"any Unicode: chrF {word_order}", SACREBLEU, absolute(metric.examples(statistics_BK), theirs), 1e-9, REASON)
    whole = library.corpus_score(hypotheses, [references]).score
    parity(f"any Unicode: chrF {word_order}", SACREBLEU, absolute(corpus_value(metric, statistics_BK), whole), 1e-9, REASON)


def test_rouge(pairs, parity):
    hypotheses, references = pairs
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    for stemmer in (False, True):
        metrics = [Rouge(kind, stemmer=stemmer) for kind in kinds]
        library = rouge_score.rouge_scorer.RougeScorer(kinds, use_stemmer=stemmer)
        theirs = [library.score(reference, hypothesis) for hypothesis, reference in zip(hypotheses, references, strict=True)]
        ours = rouge_statistics(metrics, hypotheses, [references])
        for metric, kind, statistics_BK in zip(metrics, kinds, ours, strict=True):
            error = absolute(metric.examples(statistics_BK), [score[kind].fmeasure for score in theirs])
            parity(f"any Unicode: {kind}", "rouge-score 0.1.2", error, 1e-9, REASON)


def test_meteor(pairs, parity):
    class NoWordNet:
        synsets = staticmethod(lambda word: [])

    kept = [place for place in range(COUNT) if all(side[place].split() for side in pairs)]  # NLTK fails on empty ones
    hypotheses, references = ([side[place] for place in kept] for side in pairs)
    metric, stemmer = Meteor(), PorterStemmer()
    statistics_BK = metric.statistics(hypotheses, [references])
    theirs = [
        meteor_score([reference.split()], hypothesis.split(), stemmer=stemmer, wordnet=NoWordNet)
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    error = absolute(metric.examples(statistics_BK), theirs)
    parity("any Unicode: METEOR", f"nltk {nltk.__version__}", error, 1e-9, REASON)
    assert len(kept) > 8000 and len(set(theirs)) > 500


def squad(text: str) -> list[str]:
    """SQuAD's normalisation, step by step."""
    text = "".join(mark for mark in text.lower() if mark not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def test_answers(pairs, parity):
    metrics = [Answers("f1"), Answers("exact")]
    f1_BK, exact_BK = answers_statistics(metrics, pairs[0], [pairs[1]])
    f1, exact = [], []
    for one, other in zip(*(map(squad, side) for side in pairs), strict=True):
        same = sum((collections.Counter(one) & collections.Counter(other)).values())
        exact.append(100.0 * (one == other))
        f1.append(200 * same / (len(one) + len(other)) if one and other else 100.0 * (one == other))
    parity("any Unicode: F1", "SQuAD, written out", absolute(metrics[0].examples(f1_BK), f1), 1e-9, REASON)
    error = absolute(metrics[1].examples(exact_BK), exact)
    parity("any Unicode: exact match", "SQuAD, written out", error, 0, "right or wrong")
