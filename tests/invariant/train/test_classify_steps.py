"""Steps of classification: what a batch holds and counts, cut into micro-batches and among ranks; weights, baselines."""

import json
import math
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from tests.invariant.train.test_step import Recorder
from tests.oracle.train.test_classify import write_labelled
from train.config import NetworkConfig, OptimizerConfig, RunConfig, TrainConfig
from train.evaluate import evaluate
from train.label_objective import LabelObjective
from train.label_scores import multiclass_scores, prior_baseline
from train.parallel.ranks import Ranks, own_rows
from train.registry import config_type
from train.step import train_step
from train.tasks.classify import ClassifySettings, ClassifyTask


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_labelled(folder / "corpus.jsonl")
    return folder


def task_of(place: Path, *, batch_size: int = 8, accumulate: int = 1, context: int = 32, **settings) -> ClassifyTask:
    """The task of the run above."""
    data = DataConfig(corpus=(str(place / "corpus.jsonl"),), val_fraction=0.2, cache=place / "cache", vocab_size=300)
    config: TrainConfig = config_type("classify")(
        run=RunConfig(objective="classify"),
        data=data,
        network=NetworkConfig(context=context),
        optimizer=OptimizerConfig(batch_size=batch_size, accumulate=accumulate),
        classify=ClassifySettings(**settings),
    )
    return ClassifyTask(config, ClassifyTask.open_data(config, None, print))


def network_of(task: ClassifyTask, **changes) -> torch.nn.Module:
    changes = {"vocab_size": task.tokenizer.vocab_size, "head": "sequence", "pad_id": 0, "token_types": 1} | changes
    base = tiny_config("roformer", **changes)
    return randomized(ClassifyTask.network(task.config, base, task.data))


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_four_times_two_is_eight(several, place):
    """Micro-batches of one global batch, and the two halves that ranks have of it, give its gradients."""
    asked = {"label": "tags", "multi": True, "pair": "second"} if several else {"balance": True}
    whole, parted = (task_of(place, batch_size=8 // n, accumulate=n, **asked) for n in (1, 4))
    network = network_of(whole)
    results, gradients = [], []
    for task in (whole, parted):
        objective = task.objective(network, None).train()
        recorder = Recorder(objective)
        results.append(train_step(objective, task.source.batches(3), recorder))
        gradients.append(recorder.gradients)
    assert absolute(*gradients) < 1e-12 and results[0].loss.item() == pytest.approx(results[1].loss.item(), abs=1e-12)
    assert results[0].count == results[1].count == 8
    (batch,), total = whole.source.batches(3), 0
    objective = whole.objective(network, None).train()
    for rank in range(2):
        total = total + objective(own_rows(batch, Ranks(rank, 2))).terms["loss"].sum
    objective.zero_grad()
    (total / 8).backward()
    assert absolute([parameter.grad for parameter in network.parameters()], gradients[0]) < 1e-12


def test_what_fills_a_batch_up_is_not_scored(place):
    """Whatever the size of a batch, validation scores each held-out text once."""
    totals = []
    for size in (1, 5, 64):
        task = task_of(place, batch_size=size)
        totals.append(evaluate(LabelObjective(network_of(task)), task.validation))
    for found in totals:
        assert found["loss"][1] == len(task.data.validation) and found["loss"][0] == pytest.approx(totals[0]["loss"][0])
        assert torch.equal(found["confusion"][0], totals[0]["confusion"][0]) and found["confusion"][0].sum() == found["loss"][1]


def test_labels_as_many_as_tokens_are_still_of_the_text(tmp_path):
    """Four labels of texts of four tokens: no axis of them is one of tokens."""
    rows = [{"text": f"{a}{b}", "label": [a, b]} for a, b in ("ab", "cd", "ac", "bd", "bc", "ad")]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    for length in (3, 4, 5):  # <s> a b </s>, cut or not
        task = task_of_file(tmp_path, max_length=length, multi=True)
        (batch,) = task.source.batches(0)
        assert batch["labels"].shape == (2, 1, 4) and batch["labels"].sum() == 4


def task_of_file(folder: Path, **settings) -> ClassifyTask:
    data = DataConfig(corpus=(str(folder / "corpus.jsonl"),), cache=folder / "cache", val_fraction=0.3)
    config = config_type("classify")(
        run=RunConfig(objective="classify"),
        data=data,
        network=NetworkConfig(context=16),
        optimizer=OptimizerConfig(batch_size=2),
        classify=ClassifySettings(**settings),
    )
    return ClassifyTask(config, ClassifyTask.open_data(config, None, print))


def test_weights_make_a_text_weigh_one_on_average(place):
    task = task_of(place, balance=True)
    weights, counts = task.weights(), task.train_counts
    assert sum(w * n for w, n in zip(weights, counts, strict=True)) == pytest.approx(sum(counts))
    assert len({round(w * n, 9) for w, n in zip(weights, counts, strict=True)}) == 1  # all classes weigh the same
    objective, (batch,) = task.objective(network_of(task), None), task.source.batches(0)
    plain = LabelObjective(objective.network)
    assert objective.train()(batch).terms["loss"].sum != plain.train()(batch).terms["loss"].sum
    assert objective.eval()(batch).terms["loss"].sum == plain.eval()(batch).terms["loss"].sum  # held out: unweighted


def test_a_pair_has_token_types_where_the_network_tells_them_apart(place):
    """The tokenizer that is trained for a run gives none, as transformers opens it; BERT's gives them."""
    task = task_of(place, pair="second", context=64)
    (batch,) = task.source.batches(0)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "token_type_ids"}
    assert not batch["token_type_ids"].any()
    batch["token_type_ids"] = (torch.arange(batch["input_ids"].size(1)) > 9).long() * batch["attention_mask"]
    two = network_of(task, token_types=2)
    changed = batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    objective = LabelObjective(two).eval()
    assert objective(batch).terms["loss"].sum != objective(changed).terms["loss"].sum
    alike = tiny_config("roformer", head="sequence", labels=3, vocab_size=320, token_types=1, context=64)
    other = LabelObjective(randomized(alike)).eval()
    assert other(batch).terms["loss"].sum == other(changed).terms["loss"].sum  # one type: they are not told apart
    with pytest.raises(ValueError, match="spans"):
        objective(batch | {"spans": batch["labels"]})


def test_weights_of_several_labels_are_not_of_held_out_texts(place):
    task = task_of(place, balance=True, multi=True, label="tags")
    objective, (batch,) = task.objective(network_of(task), None), task.source.batches(0)
    assert task.weights() == pytest.approx([(len(task.data.train) - n) / n for n in task.train_counts])
    plain = LabelObjective(objective.network)
    assert objective.train()(batch).terms["loss"].sum != plain.train()(batch).terms["loss"].sum
    assert objective.eval()(batch).terms["loss"].sum == plain.eval()(batch).terms["loss"].sum


def test_classes_that_never_come_are_no_part_of_the_mean():
    """As scikit-learn averages F1: over classes that are true or predicted somewhere. F1 of the two: 0.8 and 2/3."""
    found = multiclass_scores(torch.tensor([[2, 0, 0], [1, 1, 0], [0, 0, 0]]), 0.25)
    assert found["f1"] == pytest.approx((0.8 + 2 / 3) / 2) and found["accuracy"] == 0.75
    assert found["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert "confusion" not in multiclass_scores(torch.eye(13).long(), 0.0)


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_long_texts_are_counted(overlong, place):
    task = task_of(place, max_length=24, overlong=overlong)
    rows = [*task.data.train.values, *task.data.validation.values]
    long = sum(task.framer(row["text"]).truncated > 0 for row in rows)
    what = {"cut": "cut to", "drop": "left out, longer than"}[overlong]
    assert 0 < long < len(rows) and f"{long} of {len(rows)} texts {what} 24 tokens" in task.introduction()
    made = [task.transform(row, None) for row in rows]
    assert sum(map(len, made)) == len(rows) - long * (overlong == "drop")
    first, last = task.tokenizer.affixes.prefix[0], task.tokenizer.affixes.suffix[0]
    assert all(len(e.ids) <= 24 and e.ids[0] == first and e.ids[-1] == last for examples in made for e in examples)


def test_a_baseline_by_hand():
    batches = [{"labels": torch.tensor([0, 1, 1, -100])}, {"labels": torch.tensor([2, -100, -100, -100])}]
    found = prior_baseline(batches, [5, 3, 2], 10, multi=False)
    expected = -(math.log(0.5) + 2 * math.log(0.3) + math.log(0.2)) / 4
    assert found.loss == pytest.approx(expected) and (found.accuracy, found.texts, found.counts) == (0.25, 4, (1, 2, 1))
    several = [{"labels": torch.tensor([[[1, 0]], [[1, 1]], [[-100, -100]]])}]
    found = prior_baseline(several, [8, 2], 8, multi=True)
    expected = -(2 * math.log(0.9) + math.log(0.7) + math.log(0.3)) / 4
    assert found.loss == pytest.approx(expected) and (found.accuracy, found.counts) == (0.5, (2, 1))
