"""One optimizer step: what it divides by, and that it can learn."""

from functools import partial

import pytest
import torch

from model.init import build_network
from model.weights import role_of
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from train.evaluate import evaluate
from train.objective import Metric, Objective, Result, Term
from train.optimizers.build import build_optimizer
from train.optimizers.scaler import GradScaler
from train.step import train_step


def uneven_batch(rows: int = 8) -> dict[str, torch.Tensor]:
    """Rows with 1 to 20 scored labels: means of micro-batches weigh them wrongly."""
    ids = torch.randint(3, 61, (rows, 21))
    labels = ids[:, 1:].clone()
    for row in range(rows):
        labels[row, 1 + 19 * row // (rows - 1) :] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def split(batch: dict, parts: int) -> list[dict]:
    pieces = {name: value.chunk(parts) for name, value in batch.items()}
    return [{name: chunks[i] for name, chunks in pieces.items()} for i in range(parts)]


class Recorder:
    """In the optimizer's place: keeps the gradients of a step."""

    def __init__(self, objective):
        self.objective = objective
        self.param_groups = [{"params": list(objective.parameters())}]

    def step(self):
        self.gradients = [parameter.grad.clone() for parameter in self.objective.parameters()]

    def zero_grad(self, set_to_none=True):
        self.objective.zero_grad(set_to_none=set_to_none)


def gradients_of(network, micro_batches, mean_of_means: bool = False):
    objective = Objective(network)
    recorder = Recorder(objective)
    if mean_of_means:  # the mutant: each micro-batch divides by its own count
        counts = [Objective.counts(batch)["loss"] for batch in micro_batches]
        for batch, count in zip(micro_batches, counts, strict=True):
            (objective(batch).terms["loss"].sum / count / len(micro_batches)).backward()
        recorder.step()
        return None, recorder.gradients
    result = train_step(objective, micro_batches, recorder)
    return result, recorder.gradients


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_one_batch(parts):
    network, batch = randomized(tiny_config("llama")), uneven_batch()
    whole, expected = gradients_of(network, [batch])
    result, gradients = gradients_of(network, split(batch, parts))
    assert absolute(gradients, expected) < 1e-12
    assert result.loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    assert result.grad_norm.item() == pytest.approx(whole.grad_norm.item(), abs=1e-12)
    assert result.count == whole.count == (batch["labels"] != -100).sum()


def test_mutant_that_averages_means_is_caught():
    network, batch = randomized(tiny_config("llama")), uneven_batch()
    _, expected = gradients_of(network, [batch])
    _, mutant = gradients_of(network, split(batch, 8), mean_of_means=True)
    assert absolute(mutant, expected) > 1e-3


def test_a_micro_batch_without_labels_weighs_nothing():
    network, batch = randomized(tiny_config("gpt2")), uneven_batch()
    empty = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)}
    _, expected = gradients_of(network, [batch])
    _, gradients = gradients_of(network, [batch, empty])
    assert absolute(gradients, expected) < 1e-12
    result, gradients = gradients_of(network, [empty])
    assert result.loss == 0 and all((gradient == 0).all() for gradient in gradients)


def test_evaluation_does_not_depend_on_the_batch():
    network, batch = randomized(tiny_config("llama", attention_dropout=0.5)).train(), uneven_batch(24)
    objective = Objective(network)
    totals = [evaluate(objective, split(batch, parts))["loss"] for parts in (1, 3, 8, 24)]
    assert objective.training  # and the mode is as before
    for nats, count in totals:
        assert nats == pytest.approx(totals[0][0], rel=1e-12) and count == totals[0][1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_overfits_one_batch(family, optimizer):
    config = tiny_config(family)
    network = build_network(config, seed=0)
    ids = torch.randint(3, 61, (4, 25))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    rates = {"lr": 1e-2, "matrix_lr": 2e-2, "weight_decay": 0.0}
    optimizers = build_optimizer(optimizer, network.named_parameters(), lambda n: role_of(config, n), **rates)
    objective = Objective(network)
    for step in range(400):
        optimizers.set_lr(1 - step / 400)
        loss = train_step(objective, [batch], optimizers, max_norm=1.0).loss
    assert loss < 0.01


def test_every_parameter_is_trained_and_decayed_by_role():
    for family in ("gpt2", "llama"):
        config = tiny_config(family)
        network = build_network(config, seed=0)
        optimizers = build_optimizer(
            "muon", network.named_parameters(), partial(role_of, config), lr=1e-3, matrix_lr=1e-2, weight_decay=0.1
        )
        names = [name for group in optimizers.param_groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, _ in network.named_parameters())
        kept = {n for group in optimizers.param_groups if group["weight_decay"] == 0 for n in group["names"]}
        assert kept == {n for n in names if "norm" in n or n.endswith("bias")}


def test_forwards_run_under_autocast():
    network, batch = randomized(tiny_config("llama"), dtype=torch.float32), uneven_batch()
    seen = []
    network.body.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    train_step(Objective(network), split(batch, 2), Recorder(network), autocast=cast)
    evaluate(Objective(network), split(batch, 2), autocast=cast)
    assert seen == [True] * 4


def test_a_step_needs_a_micro_batch():
    with pytest.raises(ValueError, match="a micro-batch at least"):
        gradients_of(randomized(tiny_config("llama")), [])


def test_terms_weigh_as_they_say():
    class Weighed(Objective):
        def result(self, hidden, labels):
            total, count, _ = super().result(hidden, labels).terms["loss"]
            return Result({"loss": Term(total, count, weight=0.25)})

    network, batch = randomized(tiny_config("llama")), uneven_batch()
    expected = train_step(Objective(network), [batch], Recorder(Objective(network)))
    weighed = train_step(Weighed(network), [batch], Recorder(Objective(network)))
    assert weighed.loss.item() == pytest.approx(expected.loss.item() / 4, rel=1e-12)
    assert weighed.grad_norm.item() == pytest.approx(expected.grad_norm.item() / 4, rel=1e-12)


def test_a_scale_changes_neither_the_norm_nor_what_is_clipped():
    network, batch = randomized(tiny_config("llama")), uneven_batch()
    objective, found = Objective(network), []
    for enabled in (False, True):
        recorder = Recorder(objective)
        result = train_step(objective, [batch], recorder, max_norm=0.1, scaler=GradScaler(enabled=enabled))
        found.append([result.grad_norm, *recorder.gradients])
    assert found[0][0] > 0.1 and absolute(*found) < 1e-12


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_no_number_moves_nothing(where):
    """Either alone is enough: a loss may overflow where its gradient does not."""

    class Spoilt(Objective):
        def result(self, hidden, labels):
            total, count, _ = super().result(hidden, labels).terms["loss"]
            if where == "gradient":
                total.register_hook(lambda gradient: gradient * torch.inf)
            return Result({"loss": Term(total + torch.inf if where == "loss" else total, count)})

    network = randomized(tiny_config("llama"))
    recorder = Recorder(Objective(network))
    assert not train_step(Spoilt(network), [uneven_batch()], recorder).is_updated and not hasattr(recorder, "gradients")
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_penalty_counts_once_a_step():
    """However many micro-batches there are; and it is not in the loss."""
    network, batch, seen = randomized(tiny_config("llama")), uneven_batch(), []
    plain, without = gradients_of(network, [batch])
    for parts in (1, 4):
        objective = Objective(network)
        recorder = Recorder(objective)
        result = train_step(
            objective, split(batch, parts), recorder, penalty=lambda: sum(p.square().sum() for p in network.parameters())
        )
        seen.append(absolute(recorder.gradients, [g + 2 * p for g, p in zip(without, network.parameters(), strict=True)]))
        assert result.loss.item() == pytest.approx(plain.loss.item(), abs=1e-12)
    assert max(seen) < 1e-11


class Classes(Objective):
    """Two terms and two metrics of a class a row: what a step counts is the first term's, once."""

    def result(self, hidden, labels):
        term = super().result(hidden, labels).terms["loss"]
        metrics = {"seen": Metric(term.count * 2.0, term.count), "unseen": Metric(torch.zeros(()), 0)}
        return Result({"loss": term, "again": Term(term.sum, term.count, weight=0.5)}, metrics)

    @staticmethod
    def counts(batch):
        return dict.fromkeys(("loss", "again"), Objective.counts(batch)["loss"])


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_counts_its_first_term_alone(parts):
    """81 labels that two terms score are 81, not 162."""
    network, batch = randomized(tiny_config("llama")), uneven_batch()
    assert (batch["labels"] != -100).sum() == 81
    result = train_step(Classes(network), split(batch, parts), Recorder(Objective(network)))
    plain = train_step(Objective(network), [batch], Recorder(Objective(network)))
    assert result.count == 81 and result.loss.item() == pytest.approx(1.5 * plain.loss.item(), rel=1e-12)


def test_a_metric_that_nothing_counts_towards_is_left_out():
    """A mean of nothing is no number: neither an error, nor a NaN in metrics.jsonl."""
    network, batch = randomized(tiny_config("llama")), uneven_batch()
    result = train_step(Classes(network), split(batch, 2), Recorder(Objective(network)))
    assert result.metrics == {"seen": 2.0}
    assert evaluate(Classes(network), [batch])["unseen"] == (0.0, 0)


def test_sums_with_axes_add_up():
    class Tables(Objective):
        def result(self, hidden, labels):
            term = super().result(hidden, labels).terms["loss"]
            return Result({"loss": term}, {"table": Metric(torch.ones(2, 3, dtype=torch.long) * term.count, term.count)})

    batch = uneven_batch()
    table, count = evaluate(Tables(randomized(tiny_config("llama"))), split(batch, 4))["table"]
    assert count == 81 and torch.equal(table, torch.full((2, 3), 81.0, dtype=torch.float64))


def test_updated_is_called_after_an_update_and_only_then():
    network, batch, calls = randomized(tiny_config("llama")), uneven_batch(), []
    optimizer = build_optimizer("adamw", network.named_parameters(), lambda name: "matrix", lr=1e-2)
    weight = network.body.blocks[0].mlp.up.weight
    before = weight.detach().clone()

    def updated():
        calls.append(not torch.equal(weight, before) and weight.grad is not None)

    train_step(Objective(network), [batch], optimizer, on_update=updated)
    assert calls == [True]
    result = train_step(Objective(network), [batch], optimizer, penalty=lambda: weight.sum() * torch.nan, on_update=updated)
    assert not result.is_updated and calls == [True]
