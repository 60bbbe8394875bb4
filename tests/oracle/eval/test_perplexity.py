"""Perplexity against direct computation, plain loops and transformers; training's validation; what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from data.packing.blocks import sequential_blocks
from data.transforms.causal import clm_batch
from eval import perplexity as module
from eval import targets
from eval.bootstrap import bootstrap_interval
from eval.calibration import calibration_error
from eval.perplexity import Perplexity, PseudoPerplexity, perplexity_score, pseudo_perplexity
from eval.score import exact_sum
from tests.compare import absolute, relative
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import published
from tests.oracle.wide import widen
from train.evaluate import bits_per_byte, evaluate
from train.objective import Objective

DIRECT = "direct computation"
ROUNDING = (1e-12, "float64 rounding")
BOS, EOS, VOCAB = 1, 2, 61
LENGTHS = (40, 0, 7, 1, 33, 2, 64, 12)
NETWORKS = {}


def network(family: str = "llama", dtype: torch.dtype = torch.float64):
    if (family, dtype) not in NETWORKS:
        NETWORKS[family, dtype] = randomized(tiny_config(family), dtype=dtype)
    return NETWORKS[family, dtype]


def documents(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def framed(document: list[int], bos: bool, eos: bool) -> torch.Tensor:
    return torch.tensor([BOS] * bos + document + [EOS] * eos)


@torch.no_grad()
def log_softmax(ids: torch.Tensor, family: str = "llama") -> torch.Tensor:
    return network(family)(ids[None]).logits[0].log_softmax(-1)


def direct(ids: torch.Tensor) -> torch.Tensor:
    """-log p of every target, over the whole document at once."""
    return -log_softmax(ids)[:-1].gather(1, ids[1:, None])[:, 0] if len(ids) > 1 else torch.zeros(0, dtype=torch.float64)


def strided(ids: torch.Tensor, length: int, stride: int) -> list[tuple[float, int, int]]:
    """Windows of `length` tokens, targets among them, as in Hugging Face's guide: (Σ of new targets, their number, and the
    number that the guide takes for it)."""
    windows, scored = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        nll = direct(ids[start:end])[max(0, scored - start - 1) :]  # the first token of a window is no target
        windows.append((float(nll.sum()), len(nll), end - scored))
        scored = end
        if end == len(ids):
            return windows


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_one_window_equals_direct_computation(bos, eos, parity):
    told = {"bos_id": BOS if bos else None, "eos_id": EOS if eos else None}
    score = perplexity_score(network(), documents(), context=70, **told)
    nll = torch.cat([direct(framed(document, bos, eos)) for document in documents()])
    parity("Perplexity: one window", DIRECT, relative(score.value, float(nll.mean().exp())), *ROUNDING)
    assert score.targets == len(nll) == sum(max(0, length + bos + eos - 1) for length in LENGTHS)
    assert (score.documents, score.skipped) == (8, sum(length + bos + eos < 2 for length in LENGTHS))


@pytest.mark.parametrize(("context", "stride"), [(2, 1), (2, 2), (8, 1), (8, 3), (8, 8), (13, 5), (39, 20), (40, 40)])
def test_strided_windows_equal_a_plain_loop(context, stride, parity):
    """Our window reads `context` tokens and scores the token after each; the loop's has that last target as one token more."""
    found = [window for d in documents() if len(d) > 1 for window in strided(torch.tensor(d), context + 1, stride)]
    total, count, _ = (sum(column) for column in zip(*found, strict=True))
    score = perplexity_score(network(), documents(), context=context, stride=stride)
    assert count == score.targets == sum(max(0, length - 1) for length in LENGTHS)
    parity("Perplexity: strided windows", "plain loop", relative(score.value, math.exp(total / count)), *ROUNDING)
    averaged = math.exp(sum(nll / n for nll, n, _ in found) / len(found))
    weighted = math.exp(sum(nll / n * wrong for nll, n, wrong in found) / sum(wrong for *_, wrong in found))
    assert relative(score.value, averaged) > 1e-3 and relative(score.value, weighted) > 1e-5
    parts = [torch.cat(direct(torch.tensor(d)).split(stride)[1:] or [torch.zeros(0)]) for d in documents() if len(d) > stride]
    dropped = total - sum(float(nll[:1].sum()) for nll in parts)
    assert relative(score.value, math.exp(dropped / count)) > 1e-3


@pytest.mark.parametrize(("context", "stride", "eos"), [(2, 1, 0), (3, 2, 1), (8, 3, 1), (8, 8, 0), (40, 5, 1)])
def test_a_bos_in_every_window_equals_direct_computation(context, stride, eos, parity):
    """Each target by the first window that reaches it, which is read on its own: a bos, and what stands before the target."""
    total, count, given = 0.0, 0, documents((20, 0, 7, 1, 33))
    for document in given:
        tokens, read = document + [EOS] * eos, {}
        for t in range(len(tokens)):
            start = max(0, -(-(t + 1 - context) // stride)) * stride
            if start not in read:
                read[start] = direct(torch.tensor([BOS, *tokens[start : start + context]]))
            total, count = total + float(read[start][t - start]), count + 1
    for size in (1, 3, None):
        settings = {"context": context, "stride": stride, "bos_id": BOS, "eos_id": EOS if eos else None, "batch_size": size}
        score = perplexity_score(network(), given, bos_at="every-window", **settings)
        parity("Perplexity: a bos in every window", DIRECT, relative(score.value, math.exp(total / count)), *ROUNDING)
        assert score.targets == count == sum(len(document) + eos for document in given)
        whole = perplexity_score(network(), given, **settings)
        assert whole.targets == count and (relative(whole.value, score.value) > 1e-6) == (context < 33)  # else one window
    end = f"|top_k:1,5|bins:15|context:{context}|stride:{stride}"
    assert score.signature == f"per:token|bos:1|eos:{EOS if eos else 'none'}{end}|bos_at:every-window"
    assert whole.signature == score.signature.removesuffix("|bos_at:every-window")


def test_the_picture_of_a_bos_in_every_window():
    letters = np.array([BOS, *range(ord("a"), ord("i") + 1)])
    rows = list(Perplexity(context=5, stride=3, bos_id=BOS, bos_at="every-window").rows(letters))
    assert [row.input_T.tolist() for row in rows] == [[BOS, *map(ord, window)] for window in ("abcd", "defg", "gh")]
    scored = [row.label_T[row.label_T != targets.IGNORE].tolist() for row in rows]
    assert scored == [[*map(ord, labels)] for labels in ("abcde", "fgh", "i")]
    assert [row.place for row in rows] == [0, 3, 6]
    windows = list(Perplexity(context=5, stride=3).rows(letters[1:]))  # the picture without one
    assert ["".join(map(chr, row.input_T)) for row in windows] == ["abcde", "defgh"]


def test_each_target_is_scored_once_with_its_context():
    for length, context, stride in [(50, 8, 3), (50, 8, 8), (9, 8, 3), (8, 8, 3), (3, 2, 1), (2, 2, 2), (100, 7, 5)]:
        metric, ids = Perplexity(context=context, stride=stride), np.arange(length)
        seen = []
        for row in metric.rows(ids):
            scored = np.flatnonzero(row.label_T != targets.IGNORE)
            assert 1 <= len(row.input_T) <= context and len(scored)
            assert (row.label_T[scored] == row.input_T[scored] + 1).all() and row.place == row.input_T[0] + 1
            assert all(t + 1 >= min(context - stride + 1, row.label_T[t]) for t in scored)
            seen += row.label_T[scored].tolist()
        assert seen == list(range(1, length))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_size_of_a_batch_does_not_matter(dtype, tolerance, parity):
    metric = Perplexity(context=16, stride=5, bos_id=BOS)
    one, *others = (metric.statistics(network(dtype=dtype), documents(), batch_size=size) for size in (1, 3, 8, None))
    whole = [0, 2, 3, 4, 5, 6, 7, 8]
    for other in others:
        assert torch.equal(one[:, whole], other[:, whole])
        difference = relative(metric.score(other).value, metric.score(one).value)
        parity("Perplexity: batch sizes", "one by one", difference, tolerance, f"rounding of {dtype}".replace("torch.", ""))
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def test_splits_merge(parity):
    """Row by row, whatever is read together; with one row at a time to the last bit."""
    metric, given = Perplexity(context=16, bos_id=BOS), documents((*LENGTHS, 9, 90))
    texts = ["words " * len(document) for document in given]
    for size, exact in ((1, True), (8, False)):
        told = {"batch_size": size, "unit": "document"}
        whole = metric.statistics(network(), given, texts=texts, **told)
        for cuts in ([0, 1, 10], [0, 3, 4, 7, 10], [0, 0, 10, 10]):
            pieces = [slice(*cut) for cut in pairwise(cuts)]
            streams = [((d for d in given[piece]), iter(texts[piece])) for piece in pieces]
            parts = torch.cat([metric.statistics(network(), d, texts=t, **told) for d, t in streams])
            assert not exact or torch.equal(parts, whole)
            same = relative(metric.score(parts).value, metric.score(whole).value)
            parity("Perplexity: merged parts", "the whole set", same, *((0, "exact") if exact else ROUNDING))


def test_groups_of_rows_change_nothing(monkeypatch):
    metric = Perplexity(context=8, stride=2)
    whole = metric.statistics(network(), documents(), batch_size=1)
    monkeypatch.setattr(module, "ROWS", 3)
    monkeypatch.setattr(targets, "SOFTMAX", VOCAB)
    assert torch.equal(metric.statistics(network(), documents(), batch_size=1), whole)


def test_one_document_has_a_row_for_each_window():
    metric, (document,) = Perplexity(context=8, bos_id=BOS), documents((64,))
    told = {"texts": ["naïve 😀 " * 9], "batch_size": 1}
    windows = metric.statistics(network(), [document], **told)
    whole = metric.statistics(network(), [document], unit="document", **told)
    assert len(windows) == 15 and len(whole) == 1  # 64 targets: 8, then 4 a window
    assert torch.allclose(exact_sum(windows)[1:], whole[0, 1:], rtol=1e-14, atol=0)
    assert exact_sum(windows)[2:7].tolist() == whole[0, 2:7].tolist() == [64, 12 * 9, 8 * 9, 18, 1]
    assert (windows[:, 0] == 1).all() and whole[0, 0] == 1 and windows[:, 6].tolist() == [1] + [0] * 14
    assert metric.score(windows).parts.keys() == metric.score(whole).parts.keys()
    interval = bootstrap_interval(metric, windows, samples=100)
    assert interval.low < metric.score(windows).value < interval.high
    rows = metric.statistics(network(), documents(), unit="window")
    assert torch.equal(rows[:, 6].sum(), torch.tensor(8.0).double()) and len(rows) > 8


def test_equals_transformers(tmp_path, parity):
    ours, (document,) = network("gpt2"), documents((32,))
    theirs = widen(published(ours, tmp_path))  # else its loss is float32
    ids, library = torch.tensor([document]), f"transformers {transformers.__version__}"
    score = perplexity_score(ours, [document], context=32)
    with torch.no_grad():
        output = theirs(ids, labels=ids)
    nll = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    parity("Perplexity: GPT2LMHeadModel", library, relative(score.value, float(nll.exp())), *ROUNDING)
    parity("Perplexity: GPT2LMHeadModel's loss", library, absolute(score.loss, output.loss), *ROUNDING)
    one, other = (perplexity_score(network, [document], context=20, stride=7) for network in (ours, theirs))
    parity("Perplexity: their network, our windows", library, relative(one.value, other.value), *ROUNDING)


def test_equals_validation_in_training(parity):
    """bos and eos as in training, each document in one window: however the blocks of training pack them."""
    given = [document for document in documents() if document]
    stream = np.concatenate([framed(document, True, True).numpy() for document in given])
    batches = [clm_batch(block, BOS, EOS) for block in sequential_blocks(stream, len(stream), 1)]
    nats, count = evaluate(Objective(network()), batches)["loss"]
    size = 3 * count
    score = perplexity_score(network(), given, context=70, bos_id=BOS, eos_id=EOS, bytes=[3 * len(d) + 3 for d in given])
    assert score.targets == count and score.bytes == size
    parity("Perplexity: validation", "train.evaluate", relative(score.value, math.exp(nats / count)), *ROUNDING)
    parity("Perplexity: bits per byte", "train.evaluate", relative(score.bits_per_byte, bits_per_byte(nats, size)), *ROUNDING)
    (one,) = documents((50,))
    batches = [clm_batch(block, BOS, EOS) for block in sequential_blocks(framed(one, True, True).numpy(), 16, 2)]
    nats, count = evaluate(Objective(network()), batches)["loss"]  # a document longer than the context: stride = context
    strided = perplexity_score(network(), [one], context=16, stride=16, bos_id=BOS, eos_id=EOS)
    assert strided.targets == count
    parity("Perplexity: validation in blocks", "train.evaluate", relative(strided.value, math.exp(nats / count)), *ROUNDING)


def test_units_by_hand():
    def halves(input_ids):
        return torch.tensor([0, 0, math.log(2)], dtype=torch.float64).expand(*input_ids.shape, 3)  # ¼, ¼, ½

    score = perplexity_score(halves, [[0, 1, 2], [], [2]], context=4, bos_id=1, texts=["né 😀\n", "x y", "ab"])
    assert score.targets == 4 and score.skipped == 1 and score.documents == 3
    # bits: 2 + 2 + 1 + 1; the empty document's text is not counted
    assert (score.bytes, score.characters, score.words) == (9 + 2, 5 + 2, 2 + 1)
    for unit, count in (("token", 4), ("byte", 11), ("character", 7), ("word", 3)):
        assert getattr(score, f"bits_per_{unit}") == pytest.approx(6 / count, rel=1e-15)
    assert score.value == pytest.approx(2 ** (6 / 4), rel=1e-15)
    assert score.perplexity_per_word == pytest.approx(2 ** (6 / 3), rel=1e-15)
    assert score.accuracy == 0.5 and score.top_k_accuracy == {1: 0.5, 5: 1.0}
    assert score.calibration_error == pytest.approx(0, abs=1e-15)
    assert score.signature == "per:token|bos:1|eos:none|top_k:1,5|bins:15|context:4|stride:2"
    bare = perplexity_score(halves, [[0, 1, 2]], context=2, bytes=[7])
    assert bare.bits_per_byte == pytest.approx(3 / 7, rel=1e-15) and "words" not in bare.parts
    with pytest.raises(AttributeError, match="no part 'bits_per_word'"):
        _ = bare.bits_per_word


def test_ranks_and_calibration_equal_a_loop(parity):
    """Logits of few different values: most are ties, of which the lower id is guessed first."""
    for digits in (0, 12):
        table = (2 * torch.randn(VOCAB, VOCAB, dtype=torch.float64)).round(decimals=digits)
        score = perplexity_score(lambda ids, table=table: table[ids], documents(), context=9, top_k=(3, 1, 10), bins=7)
        pairs = [pair for document in documents() for pair in pairwise(document)]
        order = [sorted(range(VOCAB), key=lambda v, row=row: (-row[v], v)) for row in table.tolist()]
        rank = [order[a].index(b) for a, b in pairs]
        assert score.top_k_accuracy == {k: sum(r < k for r in rank) / len(rank) for k in (3, 1, 10)}
        assert score.accuracy == score.top_k_accuracy[1]
        context, target = map(list, zip(*pairs, strict=True))
        theirs = calibration_error(table[context].softmax(-1), target, bins=7)
        parity("Calibration error: of tokens", "eval.calibration", absolute(score.calibration_error, theirs.value), *ROUNDING)


def test_a_confidence_at_the_edge_is_of_the_lower_bin():
    """Id 0 is followed by 0 or 1 (½), others by any of three (⅓): both in the first of two bins, 1 right of 5/6 expected."""
    table = torch.zeros(3, 3, dtype=torch.float64)
    table[0, 2] = -math.inf
    score = perplexity_score(lambda ids: table[ids], [[0, 0], [1, 2]], context=2, bins=2)
    assert score.calibration_error == pytest.approx((1 - 5 / 6) / 2, rel=1e-15)


class Watch(TorchDispatchMode):
    """The largest tensor that is made, but for the statistics that are kept: 54 numbers a document."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.size()[-1:] != (54,):
            self.largest = max(self.largest, output.numel())
        return output


def test_memory_is_flat(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 64)
    largest = []
    for count in (20, 200):
        given = (documents((60, 7, 33))[i % 3] for i in range(count))
        with Watch() as watch:
            kept = Perplexity(context=32).statistics(network(dtype=torch.float32), given, batch_size=4)
        assert kept.shape == (count, 54)
        largest.append(watch.largest)
    assert largest == [4 * 32 * VOCAB] * 2  # the logits of one batch


def test_batches_stay_under_the_budget(monkeypatch):
    shapes = []

    def watched(input_ids):
        shapes.append(tuple(input_ids.shape))
        return torch.zeros(*input_ids.shape, VOCAB)

    monkeypatch.setattr(targets, "LOGITS", 50 * VOCAB)
    perplexity_score(watched, documents(), context=20)
    assert shapes[0] == (1, 1) and max(rows * length for rows, length in shapes) <= 50  # the first asks for the vocabulary
    assert any(rows > 1 for rows, _ in shapes)


def test_low_precision_logits_are_widened():
    table = torch.randn(VOCAB, VOCAB).bfloat16()
    score = perplexity_score(lambda ids: table[ids], documents(), context=64)
    wide = perplexity_score(lambda ids: table.float()[ids], documents(), context=64)
    assert score.parts == wide.parts and score.value == wide.value
    exact = perplexity_score(lambda ids: table.double()[ids], documents(), context=64)
    assert relative(score.value, exact.value) < 1e-6


def test_dropout_is_off_and_comes_back():
    dropping = randomized(tiny_config("gpt2", dropout=0.5)).train()
    score = perplexity_score(dropping, documents((20,)), context=32)
    assert dropping.training and score.value == perplexity_score(dropping.eval(), documents((20,)), context=32).value
    assert not dropping.training


def test_pseudo_perplexity_equals_a_loop(parity):
    for family in ("bert", "roberta"):
        total, count, correct = 0.0, 0, 0
        for document in documents((9, 0, 1, 14, 9)):
            ids = framed(document, True, True)
            for place in range(1, len(ids) - 1):
                masked = ids.clone()
                masked[place] = 4
                logp = log_softmax(masked, family)[place]
                total, count, correct = total - float(logp[ids[place]]), count + 1, correct + int(logp.argmax() == ids[place])
        for size in (1, 3, None):
            told = {"mask_id": 4, "bos_id": BOS, "eos_id": EOS, "batch_size": size}
            score = pseudo_perplexity(network(family), documents((9, 0, 1, 14, 9)), **told)
            assert (score.targets, score.skipped, score.accuracy) == (count, 1, correct / count) == (33, 1, correct / 33)
            parity(f"Pseudo-perplexity: {family}", "plain loop", relative(score.value, math.exp(total / count)), *ROUNDING)
    assert score.signature == "per:token|bos:1|eos:2|top_k:1,5|bins:15|mask:4"
    bare = pseudo_perplexity(network("bert"), [[5, 6, 7]], mask_id=4)
    assert bare.targets == 3


def broken(value: float, place: int = 0, trigger: int = 5):
    """Where `trigger` is read, the logit of id 0 at position `place` is `value`."""

    def logits(input_ids):
        found = torch.zeros(*input_ids.shape, VOCAB)
        found[(input_ids == trigger).any(1), min(place, input_ids.size(1) - 1), 0] = value
        return found

    return logits


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named(value, batch_size):
    """In the second window, whose position 8 reads token 14; what is not scored may be anything."""
    given, told = [[3] * 20, [*range(6, 25)]], {"context": 12, "stride": 6, "batch_size": batch_size}
    with pytest.raises(ValueError, match="document 1, token 15: -log p = nan is not finite"):
        perplexity_score(broken(value, 8, trigger=23), given, **told)
    assert perplexity_score(broken(value, 3, trigger=23), given, **told).value == pytest.approx(VOCAB)


def test_a_probability_of_zero():
    impossible = broken(-math.inf, 0)  # of id 0 alone
    assert perplexity_score(impossible, [[5, 6]], context=2).value == pytest.approx(VOCAB - 1)
    with pytest.raises(ValueError, match=r"document 0, token 1: -log p = inf"):
        perplexity_score(impossible, [[5, 0]], context=2)
    steep = broken(1e30, 0)
    assert perplexity_score(steep, [[5, 6]], context=2).value == math.inf


GIVEN = [[3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("error", "message", "given", "told"),
    [
        (ValueError, "context=1 must be at least 2", GIVEN, {"context": 1}),
        (ValueError, "bos_at='start': one of document, every-window", GIVEN, {"bos_at": "start"}),
        (ValueError, "bos_at='every-window' without a bos_id", GIVEN, {"bos_at": "every-window"}),
        (ValueError, "stride=0 must be from 1 to context=8", GIVEN, {"stride": 0}),
        (ValueError, "stride=9 must be from 1 to context=8", GIVEN, {"stride": 9}),
        (ValueError, r"top_k=\(0,\) and bins=15 must be at least 1", GIVEN, {"top_k": (0,)}),
        (ValueError, "bins=0 must be at least 1", GIVEN, {"bins": 0}),
        (ValueError, "batch_size=0 must be at least 1", GIVEN, {"batch_size": 0}),
        (ValueError, "unit='word': one of", GIVEN, {"unit": "word"}),
        (ValueError, "document 1, token 2: id 61 is outside the vocabulary of 61", [[3], [4, 5, 61]], {}),
        (ValueError, "document 0, token 0: id -1 is outside", [[-1, 5]], {}),
        (ValueError, "bos_id=61 is outside the vocabulary of 61", GIVEN, {"bos_id": 61}),
        (ValueError, "document 1 has its bos_id=6 or eos_id=None already", GIVEN, {"bos_id": 6}),
        (ValueError, "document 0 has its bos_id=1 or eos_id=5 already", GIVEN, {"bos_id": 1, "eos_id": 5}),
        (TypeError, "document 0 is not a sequence of token ids: 'text'", ["text"], {}),
        (TypeError, r"document 0 is not a sequence of token ids: 3", [3, 4], {}),
        (TypeError, "document 0 is not a sequence of token ids: .0.5", [[0.5, 1.0]], {}),
        (ValueError, "there is no target in 2 documents", [[], [3]], {}),
        (ValueError, "there is no target in 0 documents", [], {}),
        (ValueError, "there are 1 texts but more documents", GIVEN, {"texts": ["one"]}),
        (ValueError, "there are 2 documents but more bytes", GIVEN, {"bytes": [1, 2, 3]}),
        (ValueError, "there are 1 documents and words but more bytes", GIVEN[:1], {"bytes": [1, 2], "words": [1]}),
        (TypeError, "got one string, or both", GIVEN, {"texts": ["a", "b"], "words": [1, 1]}),
        (TypeError, "got one string, or both", GIVEN, {"texts": "ab"}),
    ],
)
def test_bad_input(error, message, given, told):
    with pytest.raises(error, match=message):
        perplexity_score(network(), given, **({"context": 8} | told))


def test_networks_of_another_kind():
    with pytest.raises(ValueError, match="perplexity needs a network of architecture 'decoder', this is 'encoder'"):
        perplexity_score(network("bert"), GIVEN, context=8)
    with pytest.raises(ValueError, match="pseudo-perplexity needs a network of architecture 'encoder', this is 'decoder'"):
        pseudo_perplexity(network(), GIVEN, mask_id=4)
    with pytest.raises(ValueError, match="mask_id=99 is outside"):
        PseudoPerplexity(mask_id=99).statistics(network("bert"), GIVEN)
    with pytest.raises(ValueError, match=r"logits of shape \(1, 61\) for ids of shape \(1, 1\)"):
        perplexity_score(lambda ids: torch.zeros(len(ids), VOCAB), GIVEN, context=8)


def test_ids_of_any_kind():
    one = perplexity_score(network(), GIVEN, context=8)
    kinds = (torch.tensor, np.array, lambda d: np.array(d, np.uint16), tuple, lambda d: torch.tensor(d, dtype=torch.int32))
    for kind in kinds:
        assert perplexity_score(network(), map(kind, GIVEN), context=8).value == one.value
