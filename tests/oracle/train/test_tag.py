"""Tagging words, beside transformers and seqeval: loss, gradients and scores of a batch."""

import warnings

import pytest
import torch
import transformers
from seqeval.metrics import accuracy_score
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

import model.hub
from eval.entities import Entities, find_entities
from model.weights import head_spec, to_published, weight_table
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.eval.test_entities import LIBRARY as SEQEVAL
from tests.oracle.model.test_network import LIBRARY, ROUNDING, how
from tests.oracle.wide import widen
from train.label_objective import multiclass_loss
from train.tag_objective import TagObjective

LABELS = ("O", "B-MODULE", "I-MODULE", "B-CLASS", "I-CLASS")


def batch_of(config, rows: int = 5) -> dict[str, torch.Tensor]:
    """Rows of 9 to 2 tokens, labels at about half of the positions; the last row only fills the batch up."""
    ids, mask = torch.randint(3, 61, (rows, 9)), torch.ones(rows, 9, dtype=torch.long)
    labels = torch.where(torch.rand(rows, 9) < 0.6, torch.randint(0, len(LABELS), (rows, 9)), -100)
    for row in range(rows):
        length = max(2, 9 - 2 * row)
        ids[row, length:], mask[row, length:], labels[row, length:] = config.pad_id or 0, 0, -100
    labels[0, 0], labels[-1] = 1, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


IN_SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("roberta", "gpt2", "llama")]


@pytest.mark.parametrize("family", ["bert", "roformer", "qwen2", *IN_SLOW])
def test_loss_and_gradients(family, tmp_path, parity):
    config = tiny_config(family, head="token", labels=len(LABELS), pad_id=1 if family == "roberta" else 0)
    network = randomized(config)
    model.hub.save(network, tmp_path)
    published = getattr(transformers, head_spec(config).architecture)
    theirs = widen(published.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation=how(config)).eval())
    batch, objective = batch_of(config), TagObjective(network)
    result = objective.train()(batch)
    count = (batch["labels"] != -100).sum()
    assert objective.counts(batch)["loss"] == result.terms["loss"].count == count and not result.metrics
    ours, other = result.terms["loss"].sum / result.terms["loss"].count, theirs(**batch).loss
    ours.backward()
    other.backward()
    errors, table, gradients = [mixed(ours, other)], weight_table(config), dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        errors.append(mixed(to_published(table[name], parameter.grad, config), gradients[table[name].published].grad))
    parity(f"{family}: token classification", LIBRARY, max(errors), *ROUNDING)


def test_smoothing_is_of_training_only():
    config = tiny_config("bert", head="token", labels=len(LABELS))
    objective, batch = TagObjective(randomized(config), smoothing=0.1, z_loss=1e-3), batch_of(config)
    logits_NC, labels_N = objective.network(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1), batch["labels"]
    expected = multiclass_loss(logits_NC, labels_N.flatten(), smoothing=0.1, z_loss=1e-3)
    assert mixed(objective.train()(batch).terms["loss"].sum, expected) < 1e-12
    assert mixed(objective.eval()(batch).terms["loss"].sum, multiclass_loss(logits_NC, labels_N.flatten())) < 1e-12


def test_a_16_bit_network_has_a_loss_in_32():
    config = tiny_config("bert", head="token", labels=len(LABELS))
    objective, batch = TagObjective(randomized(config, dtype=torch.bfloat16)), batch_of(config)
    with torch.no_grad():
        logits_NC = objective.network(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    total = objective.eval()(batch).terms["loss"].sum
    assert logits_NC.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert total.item() == pytest.approx(multiclass_loss(logits_NC.float(), batch["labels"].flatten()).item(), rel=1e-6)


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES"])
def test_scores_of_batches_are_seqevals(scheme, parity):
    """Counts of several batches, added up: accuracy, precision, recall and F1 of all sentences together."""
    labels = LABELS if scheme == "IOB2" else ("O", *(f"{mark}-{kind}" for kind in ("MODULE", "CLASS") for mark in "BIES"))
    config = tiny_config("bert", head="token", labels=len(labels))
    objective = TagObjective(randomized(config), entities=find_entities(labels)).eval()
    assert objective.entities.scheme == scheme and find_entities(LABELS, "IOB2") == Entities(LABELS)
    predicted, true, sums, right = [], [], 0, 0
    for _ in range(8):
        batch = batch_of(config)
        batch["labels"] = torch.where(batch["labels"] >= 0, torch.randint(0, len(labels), batch["labels"].shape), -100)
        metrics = objective(batch).metrics
        sums, right = sums + metrics["entities"].sum, right + metrics["accuracy"].sum
        best_BT = objective.network(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
        for best_T, label_T in zip(best_BT, batch["labels"], strict=True):
            predicted.append([labels[id] for id in best_T[label_T >= 0]])
            true.append([labels[id] for id in label_T[label_T >= 0]])
    score = objective.entities.score(sums[None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = precision_recall_fscore_support(true, predicted, average="micro")[:3]
    assert score.correct > 0
    ours = [score.precision, score.recall, score.f1, int(right) / sum(map(len, true))]
    error = absolute(ours, [*expected, accuracy_score(true, predicted)])
    parity(f"token classification: scores, {scheme}", SEQEVAL, error, 1e-15, "the same counts")
