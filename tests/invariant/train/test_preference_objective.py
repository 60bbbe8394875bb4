"""The objectives of dpo and kto by hand, in float64: values of step 0, micro-batches, references, terms, metrics."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import model.hub
from data.transforms.causal import IGNORE
from tests.chat_runs import CHATML, write_base
from tests.compare import absolute
from tests.conftest import RATES, randomized, tiny_config
from tests.preference_runs import build_objective, open_network, open_preference, perturb, rated, write_pairs
from tests.records import write_rows
from train.evaluate import evaluate
from train.losses.preference import PREFERENCE_DETAILS, PREFERENCE_LOSSES
from train.optimizers.sgd import SGD
from train.parallel.ranks import Ranks, own_rows
from train.preference_objective import scored_pairs, text_labels
from train.reference import CopyReference, StoredReference, remove_dropout, reply_log_probs
from train.step import train_step

PAIRS, HELD_OUT = 8, 5
OF_PAIRS = [name for name in PREFERENCE_LOSSES if name != "kto"]
SMOOTHED = [name for name in OF_PAIRS if "label_smoothing" in PREFERENCE_DETAILS[name].settings]
STEP_0 = {  # β = 0.1, ε = 0.1
    **dict.fromkeys(("sigmoid", "conservative", "robust", "sigmoid_norm", "dpop", "aot", "aot_unpaired"), math.log(2)),
    "hinge": 1,
    "ipo": 25,
    "ipo_sum": 25,
    "exo_pair": -math.log(2) - math.log(0.1 * 0.9) / 2,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50,
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": math.log(2) / 2 + 0.5,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("preferences")
    write_base(place / "base", CHATML)
    write_pairs(place / "pairs.jsonl", PAIRS, longest=4)
    write_pairs(place / "held_out.jsonl", HELD_OUT, seed=1)
    write_rows(place / "rated.jsonl", rated(PAIRS))
    write_rows(place / "rated_held_out.jsonl", rated(HELD_OUT, seed=1))
    return place


def opened(place: Path, objective: str = "dpo", *, scale: float = 0.05, base: str = "base", **settings) -> SimpleNamespace:
    """The task, its objective in training mode with a policy that has moved by `scale`, and the whole epoch as a batch."""
    corpus, held_out = ("pairs", "held_out") if objective == "dpo" else ("rated", "rated_held_out")
    smoothing = {} if objective == "kto" or settings.get("loss", "sigmoid") not in SMOOTHED else {"label_smoothing": 0.1}
    beta = {} if "=" in settings.get("loss", "") else {"beta": 0.1}
    files = {"validation": place / f"{held_out}.jsonl", "batch_size": PAIRS}
    task, network = open_preference(objective, place / base, place / f"{corpus}.jsonl", **files | beta | smoothing | settings)
    made = build_objective(task, network, place / base).train()
    if scale:
        perturb(network, scale)
    return SimpleNamespace(task=task, network=network, objective=made, batch=task.source.batch(0))


def mean(objective, batch: dict[str, Tensor], name: str = "loss") -> Tensor:
    term = objective(batch).terms[name]
    return term.sum / term.count


def rows_of(batch: dict[str, Tensor], rows: slice | list[int]) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


def split(batch: dict[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Micro-batches of so many pairs."""
    pieces = {name: value.split([2 * size for size in sizes]) for name, value in batch.items()}
    return [{name: parts[i] for name, parts in pieces.items()} for i in range(len(sizes))]


def token_log_probs(network, batch: dict[str, Tensor], labels_BT: Tensor | None = None) -> Tensor:
    """log p of each label by all logits; 0 where there is none."""
    labels_BT = batch["labels"] if labels_BT is None else labels_BT
    logits_BTV = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p_BT = logits_BTV.log_softmax(-1).gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    return log_p_BT.masked_fill(labels_BT == IGNORE, 0)


def sums(made: SimpleNamespace, weights_BT: Tensor | float = 1.0) -> tuple[Tensor, ...]:
    """(policy of chosen, of rejected, reference of chosen, of rejected), by hand."""
    reference = open_network(made.task, made.task.config.run.init)
    both = (token_log_probs(network, made.batch) * weights_BT for network in (made.network, reference))
    return tuple(log_p_BT.sum(-1)[row::2] for log_p_BT in both for row in (0, 1))


def lengths(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    length_B = (batch["labels"] != IGNORE).sum(-1).double()
    return length_B[::2], length_B[1::2]


# ---- values


@pytest.mark.parametrize("name", STEP_0)
def test_values_of_step_0(name, place):
    made = opened(place, scale=0, loss=name)
    assert mean(made.objective, made.batch).item() == pytest.approx(STEP_0[name], rel=1e-7)
    metrics = made.objective(made.batch).metrics
    assert all(metrics[key].sum == 0 for key in ("reward_chosen", "reward_rejected", "margin", "accuracy", "kl"))


def test_values_of_step_0_are_those_of_every_loss_with_a_reference():
    assert {name for name in OF_PAIRS if PREFERENCE_DETAILS[name].needs_reference} == STEP_0.keys()


def test_value_of_kto_at_step_0(place):
    made = opened(place, "kto", scale=0)
    assert mean(made.objective, made.batch).item() == pytest.approx(0.5, abs=1e-12)
    assert made.objective(made.batch).metrics["z"].sum == 0
    other = opened(place, "kto", scale=0, desirable_weight=3.0, undesirable_weight=0.5)
    is_good_B = other.batch["is_good"][::2].bool()
    expected = (3.0 * is_good_B + 0.5 * ~is_good_B).mean() / 2
    assert 0 < is_good_B.sum() < PAIRS and mean(other.objective, other.batch).item() == pytest.approx(expected.item())


def test_gradient_of_step_0(place):
    """-β/2 (∇ log π(chosen) - ∇ log π(rejected)), and not 0."""
    made = opened(place, scale=0)
    weights = list(made.network.parameters())
    ours = torch.autograd.grad(mean(made.objective, made.batch), weights)
    log_p_B = token_log_probs(made.network, made.batch).sum(-1)
    expected = torch.autograd.grad(-0.05 * (log_p_B[::2] - log_p_B[1::2]).mean(), weights)
    assert absolute(ours, expected) < 1e-12 and max(gradient.abs().max() for gradient in ours) > 1e-3


@pytest.mark.parametrize("name", OF_PAIRS)
def test_losses_by_hand(name, place):
    made = opened(place, loss=name)
    chosen_length, rejected_length = lengths(made.batch)
    settings = {"beta": 0.1, "chosen_length": chosen_length, "rejected_length": rejected_length}
    settings |= {"label_smoothing": 0.1} if name in SMOOTHED else {}
    four = sums(made)
    assert absolute(four[0], four[2]) > 0.1
    expected = PREFERENCE_LOSSES[name](*four, **settings).mean()
    assert absolute(mean(made.objective, made.batch), expected) < 1e-12 * max(1, abs(expected.item()))


def test_divergences_weights_and_long_replies(place):
    """f-DPO, WPO and LD-DPO by their formulas."""
    plain = opened(place)
    c_P, r_P = (policy - reference for policy, reference in zip(sums(plain)[:2], sums(plain)[2:], strict=True))
    for settings, values in (
        ({"divergence": "forward_kl"}, (-(-c_P).exp(), -(-r_P).exp())),
        ({"divergence": "js"}, (F.logsigmoid(c_P), F.logsigmoid(r_P))),
        ({"divergence": "alpha", "divergence_alpha": 0.3}, ((-0.7 * c_P).exp() / -0.7, (-0.7 * r_P).exp() / -0.7)),
    ):
        made = opened(place, **settings)
        expected = -F.logsigmoid(0.1 * (values[0] - values[1])).mean()
        assert absolute(mean(made.objective, made.batch), expected) < 1e-12, settings

    made = opened(place, wpo=True)
    weights_P = sum(log_p / length for log_p, length in zip(sums(plain)[:2], lengths(plain.batch), strict=True)).exp()
    loss_P = -F.logsigmoid(0.1 * (c_P - r_P))
    assert absolute(mean(made.objective, made.batch), (weights_P * loss_P).mean()) < 1e-12
    parameters = list(made.network.parameters())
    ours = torch.autograd.grad(mean(made.objective, made.batch), parameters)
    four = sums(made)
    expected = (weights_P.detach() * -F.logsigmoid(0.1 * (four[0] - four[1] - four[2] + four[3]))).mean()
    assert absolute(ours, torch.autograd.grad(expected, parameters)) < 1e-12, "the weights are constants"

    made = opened(place, ld_alpha=0.3)
    scored_BT = made.batch["labels"] != IGNORE
    shorter_B = torch.minimum(*lengths(made.batch)).repeat_interleave(2)
    weights_BT = torch.where(scored_BT.cumsum(-1) <= shorter_B[:, None], 1.0, torch.tensor(0.3, dtype=torch.float64))
    four = sums(made, weights_BT)
    expected = -F.logsigmoid(0.1 * (four[0] - four[2] - four[1] + four[3])).mean()
    assert absolute(mean(made.objective, made.batch), expected) < 1e-12
    assert absolute(mean(made.objective, made.batch), mean(plain.objective, plain.batch)) > 1e-4


# ---- one forward, batches, padding


def test_a_reply_s_log_probability_is_what_it_is_alone(place):
    """One forward of [chosen; rejected] pairs, padded to one length = a forward of each reply without padding."""
    made = opened(place)
    pairs, _ = made.objective.pairs(made.batch, scored_pairs(made.batch))
    lengths_B = made.batch["attention_mask"].sum(-1).tolist()
    assert len(set(lengths_B)) > 4
    for network, found in ((made.network, pairs[:2]), (made.objective.frozen["reference"], pairs[2:4])):
        alone = []
        for row, length in enumerate(lengths_B):
            one = {name: made.batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask", "labels")}
            alone.append(reply_log_probs(network, made.objective.inputs_of(one), one["labels"]))
        assert absolute(torch.stack(found, dim=1).flatten(), torch.cat(alone)) < 1e-12
    wider = {name: F.pad(value, (0, 5), value=IGNORE if name == "labels" else 0) if value.dim() == 2 else value
             for name, value in made.batch.items()}
    assert absolute(mean(made.objective, wider), mean(made.objective, made.batch)) < 1e-12


def test_what_is_scored(place):
    """Of each row the reply and its terminator; the two rows of a pair are neighbours and have one group."""
    made = opened(place)
    batch, by_id = made.batch, {compared.row_id: compared for compared in made.task.data.train.values}
    assert (batch["group"] == torch.arange(PAIRS).repeat_interleave(2)).all()
    assert sorted(batch["row_ids"].tolist()) == list(range(2 * PAIRS))
    for row, id in enumerate(batch["row_ids"].tolist()):
        compared = by_id[id - id % 2]
        labels_T = batch["labels"][row]
        assert labels_T[labels_T != IGNORE].tolist() == compared.replies[id % 2].tolist() and id % 2 == row % 2
        whole = [*compared.prompt.tolist(), *compared.replies[id % 2].tolist()]
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == whole[:-1]


# ---- steps


def step(made: SimpleNamespace, micro_batches: list[dict[str, Tensor]]) -> tuple:
    """(loss, metrics, the gradients), from the weights that a step of gradient descent moves; they are put back."""
    before = [parameter.detach().clone() for parameter in made.network.parameters()]
    result = train_step(made.objective, micro_batches, SGD(made.network.parameters(), lr=1.0))
    gradients = [old - new.detach() for old, new in zip(before, made.network.parameters(), strict=True)]
    with torch.no_grad():
        for old, parameter in zip(before, made.network.parameters(), strict=True):
            parameter.copy_(old)
    return result.loss, result.metrics, gradients, result.count


STEPS = {name: ("dpo", {"loss": name}) for name in OF_PAIRS}
STEPS["a mixture"] = ("dpo", {"loss": "sigmoid=0.5,aot=0.5,aot_unpaired=1,cpo=0.2,orpo=0.3,sft=0.7", "beta": 0.1})
STEPS["wpo, ld-dpo, aot"] = ("dpo", {"loss": "aot", "wpo": True, "ld_alpha": 0.4})
STEPS["kto"] = ("kto", {"desirable_weight": 1.5})


@pytest.mark.parametrize("name", STEPS)
def test_micro_batches_are_one_batch(name, place):
    """A step of 8 pairs, and of 1 + 4 + 3: loss, metrics and gradients."""
    objective, settings = STEPS[name]
    made = opened(place, objective, **settings)
    loss, metrics, gradients, count = step(made, [made.batch])
    assert count == PAIRS and max(gradient.abs().max() for gradient in gradients) > 1e-6
    for sizes in ((1, 4, 3), *[(1,) * PAIRS] * (name in ("sigmoid", "kto", "a mixture"))):
        others = step(made, split(made.batch, sizes))
        size = max(1.0, abs(loss.item()))
        assert absolute(loss, others[0]) < 1e-12 * size and absolute(gradients, others[2]) < 1e-12 * size
        assert others[3] == count and metrics == pytest.approx(others[1], rel=1e-11, abs=1e-12)


def test_z_of_a_micro_batch_is_another_one(place):
    """--kto.z micro-batch, TRL's: the loss depends on how a step is divided."""
    made = opened(place, "kto", z="micro-batch")
    whole, parts = step(made, [made.batch]), step(made, split(made.batch, (4, 4)))
    usual = opened(place, "kto")
    assert absolute(whole[0], step(usual, [usual.batch])[0]) < 1e-12 and absolute(whole[0], parts[0]) > 1e-5
    alone = [step(made, [part])[0] for part in split(made.batch, (4, 4))]
    assert absolute(parts[0], sum(alone) / 2) < 1e-12


def test_mutants_of_a_step_are_seen(place):
    """Pairs that are compared within each micro-batch alone, and a step's values that a later step still uses."""
    made = opened(place, loss="aot")
    loss, _, gradients, _ = step(made, [made.batch])
    made.objective.begin_step = lambda *rest: None
    mutant = step(made, split(made.batch, (1, 4, 3)))
    assert absolute(loss, mutant[0]) > 1e-3 and absolute(gradients, mutant[2]) > 1e-4


@pytest.mark.parametrize("name", ["aot", "kto"])
def test_a_step_uses_no_values_of_the_last_one(name, place):
    """Other weights and one micro-batch, after a step of several."""
    objective, settings = STEPS[name]
    made = opened(place, objective, **settings)
    step(made, split(made.batch, (1, 4, 3)))
    perturb(made.network, seed=1)
    found, fresh = step(made, [made.batch]), opened(place, objective, **settings)
    perturb(fresh.network, seed=1)
    expected = step(fresh, [fresh.batch])
    assert torch.equal(found[0], expected[0]) and absolute(found[2], expected[2]) == 0


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_rank_without_a_pair(objective, place):
    """No row: terms of 0, gradients of 0 by every weight, no NaN in a metric."""
    made = opened(place, objective, **({"loss": "aot=1,sft=1,orpo=1", "beta": 0.1} if objective == "dpo" else {}))
    terms, metrics = made.objective(rows_of(made.batch, slice(0, 0)))
    assert all(term.sum == 0 and term.count == 0 for term in terms.values())
    assert all(metric.sum == 0 and metric.count == 0 for metric in metrics.values())
    sum(term.sum for term in terms.values()).backward()
    grads = [parameter.grad for parameter in made.network.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


# ---- held-out pairs


@pytest.mark.parametrize("settings", [{"loss": "sigmoid"}, {"loss": "aot=1,sft=1,orpo=2", "beta": 0.1}])
def test_held_out_pairs(settings, place):
    """Five pairs in batches of 8, 3 and 1: rows that fill a batch up are not scored, and the batch's size does not matter."""
    found = {}
    for size in (8, 3, 1):
        made = opened(place, batch_size=size, **settings, **({"accumulate": 2} if size == 1 else {}))
        found[size] = evaluate(made.objective, made.task.validation)
        assert [int(scored_pairs(batch).sum()) for batch in made.task.validation] == {8: [5], 3: [3, 2], 1: [1] * 5}[size]
    assert found[8]["loss"][1] == found[3]["loss"][1] == 5
    for size in (3, 1):
        assert found[size].keys() == found[8].keys()
        for name, (total, count) in found[size].items():
            assert (total, count) == (pytest.approx(found[8][name][0], rel=1e-12, abs=1e-12), found[8][name][1]), name


def test_held_out_rated_replies(place):
    found = {}
    for size in (8, 3, 1):
        made = opened(place, "kto", batch_size=size, **({"accumulate": 2} if size == 1 else {}))
        found[size] = evaluate(made.objective, made.task.validation)
    assert found[8]["loss"][1] == 5 and found[8]["reward_good"][1] + found[8]["reward_bad"][1] == 5
    for size in (3, 1):
        for name, (total, count) in found[size].items():
            assert (total, count) == (pytest.approx(found[8][name][0], rel=1e-12, abs=1e-12), found[8][name][1]), name


# ---- references


def test_references_agree_bit_for_bit(place):
    """Adapter off, a frozen copy, and a table of what the copy found."""
    made = opened(place, adapter=True)
    ours = made.objective(made.batch)
    assert type(made.objective.reference).__name__ == "AdapterOffReference" and not len(made.objective.frozen)
    copied = opened(place, adapter=True, reference="copy")
    assert type(copied.objective.reference) is CopyReference
    base = open_network(opened(place).task, place / "base")
    copied.objective.frozen["reference"] = base.requires_grad_(False).eval()
    stored = opened(place, adapter=True, reference="precomputed")
    inputs = stored.objective.inputs_of(stored.batch)
    table_N = torch.zeros(stored.task.row_count, dtype=torch.float64)
    with torch.no_grad():
        table_N[stored.batch["row_ids"]] = reply_log_probs(base, inputs, stored.batch["labels"])
    assert type(stored.objective.reference) is StoredReference
    with pytest.raises(RuntimeError, match="have not been computed yet"):
        stored.objective(stored.batch)
    stored.objective.reference.fill(table_N)
    for other in (copied, stored):
        theirs = other.objective(other.batch)
        assert torch.equal(ours.terms["loss"].sum, theirs.terms["loss"].sum)
        assert all(torch.equal(ours.metrics[name].sum, theirs.metrics[name].sum) for name in ours.metrics)
    assert ours.metrics["kl"].sum != 0


def test_a_reference_gets_no_gradient_and_stays(place):
    made = opened(place, scale=0)
    before = [parameter.clone() for parameter in made.objective.frozen.parameters()]
    train_step(made.objective, [made.batch], SGD(made.network.parameters(), lr=0.1))
    assert all(torch.equal(*pair) for pair in zip(before, made.objective.frozen.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in made.objective.frozen.parameters())
    assert made.network.training and not made.objective.frozen["reference"].training
    assert mean(made.objective, made.batch) < math.log(2)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_dropout_is_off(objective, place, tmp_path):
    """Every rate of GPT-2, at the embeddings too: in training mode step 0 is as without. LoRA's likewise."""
    rates = dict.fromkeys(RATES, 0.4)
    network = randomized(tiny_config("gpt2", vocab_size=334, context=128, **rates), dtype=torch.float64)
    model.hub.save(network, tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, tmp_path / "gpt2" / name)
    for each in place.glob("*.jsonl"):
        shutil.copy(each, tmp_path)
    made = opened(tmp_path, objective, base="gpt2", scale=0)
    expected = math.log(2) if objective == "dpo" else 0.5
    assert made.network.config.dropout == 0.4, "what a checkpoint says of the network stays"
    assert made.network.training and mean(made.objective, made.batch).item() == pytest.approx(expected, abs=1e-12)
    made.network.body.output_dropout = 0.4  # T5's
    assert remove_dropout(made.network).body.output_dropout == 0
    adapted = opened(place, objective, scale=0, adapter=True)
    parts = [module for module in adapted.network.modules() if "Lora" in type(module).__name__]
    for part in parts:
        part.dropout = 0.4
    perturb(adapted.network)
    noisy = {mean(adapted.objective, adapted.batch).item() for _ in range(2)}
    build_objective(adapted.task, adapted.network, place / "base")
    still = {mean(adapted.objective, adapted.batch).item() for _ in range(2)}
    assert len(parts) > 4 and len(noisy) == 2 and len(still) == 1


# ---- terms


def text_by_hand(network, made: SimpleNamespace) -> tuple[Tensor, int]:
    """(nats, tokens) of prompt and chosen reply of every pair, one text after the other."""
    nats, count = 0.0, 0
    for compared in made.task.data.train.values:
        ids = torch.tensor([[*compared.prompt.tolist(), *compared.replies[0].tolist()]])
        logits = network(ids[:, :-1]).logits[0]
        nats, count = nats + F.cross_entropy(logits, ids[0, 1:], reduction="sum"), count + ids.size(1) - 1
    return nats, count


def test_cross_entropy_terms(place):
    """sft and cpo: of the chosen replies; orpo: of prompt and chosen reply, whose first token has no prediction."""
    made = opened(place, loss="sigmoid=1,sft=0.2,cpo=0.5,orpo=0.25", beta=0.1, nll_weight=3.0)
    result = made.objective(made.batch)
    chosen_length, _ = lengths(made.batch)
    four = sums(made)
    assert result.terms["nll"].count == chosen_length.sum() and result.terms["nll"].weight == pytest.approx(0.2 + 1.5)
    assert absolute(result.terms["nll"].sum, -four[0].sum()) < 1e-10
    nats, count = text_by_hand(made.network, made)
    assert result.terms["text_nll"].count == count and result.terms["text_nll"].weight == pytest.approx(0.75)
    assert absolute(result.terms["text_nll"].sum, nats) < 1e-10
    assert {name: int(value) for name, value in made.objective.counts(made.batch).items()} == {
        "loss": PAIRS,
        "nll": int(chosen_length.sum()),
        "text_nll": count,
    }
    weights = list(made.network.parameters())
    ours = torch.autograd.grad(result.terms["text_nll"].sum, weights)
    assert absolute(ours, torch.autograd.grad(nats, weights)) < 1e-10
    filler = made.batch | {"labels": made.batch["labels"].clone()}
    filler["labels"][2:4] = IGNORE
    assert (text_labels(filler)[2:4] == IGNORE).all() and (text_labels(filler)[:2] != IGNORE).any(-1).all()
    assert made.objective.counts(filler)["loss"] == PAIRS - 1


def test_sft_with_long_replies_counts_whole_replies(place):
    """LD-DPO's weights are of the comparison: the cross-entropy beside it weighs each token 1."""
    made = opened(place, loss="sigmoid=1,sft=1", beta=0.1, ld_alpha=0.2)
    assert absolute(made.objective(made.batch).terms["nll"].sum, -sums(made)[0].sum()) < 1e-10


def test_mixtures_are_weighted_sums(place):
    text = "sigmoid=0.8,bco_pair=0.2,ipo=0.01"
    made = opened(place, loss=text, beta=0.1)
    parts = (float(part.partition("=")[2]) * mean(*either) for part in text.split(",")
             for either in [(opened(place, loss=part.partition("=")[0]).objective, made.batch)])
    assert absolute(mean(made.objective, made.batch), sum(parts)) < 1e-12
    assert made.objective.loss_of_pairs.nll_weights == {} and list(made.objective(made.batch).terms) == ["loss"]


# ---- metrics


def test_metrics_of_pairs(place):
    made = opened(place)
    metrics = {name: (metric.sum / metric.count).item() for name, metric in made.objective(made.batch).metrics.items()}
    policy_c, policy_r, reference_c, reference_r = (each.detach() for each in sums(made))
    chosen, rejected = 0.1 * (policy_c - reference_c), 0.1 * (policy_r - reference_r)
    length_c, length_r = lengths(made.batch)
    nats = (reference_c + reference_r - policy_c - policy_r).sum()
    expected = {
        "reward_chosen": chosen.mean(),
        "reward_rejected": rejected.mean(),
        "margin": (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).double().mean(),
        "log_prob_chosen": policy_c.mean(),
        "log_prob_rejected": policy_r.mean(),
        "length_chosen": length_c.mean(),
        "length_rejected": length_r.mean(),
        "kl": nats / (length_c + length_r).sum(),
    }
    assert metrics == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-11)
    assert 0 < metrics["accuracy"] < 1
    free = opened(place, loss="simpo")
    assert "kl" not in free.objective(free.batch).metrics, "there is no reference"
    assert free.objective.reference is None and not len(free.objective.frozen)


def test_kl_is_positive_where_replies_are_the_reference_s(place):
    """Greedy replies of the reference: the policy, which has moved, finds them less likely."""
    made = opened(place, scale=0.3)
    with torch.no_grad():
        batch = {name: value.clone() for name, value in made.batch.items()}
        logits = made.objective.frozen["reference"](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        batch["labels"] = torch.where(batch["labels"] != IGNORE, logits.argmax(-1), IGNORE)
        assert made.objective(batch).metrics["kl"].sum > 0


def test_loss_and_metrics_of_rated_replies(place):
    made = opened(place, "kto", desirable_weight=2.0)
    batch = made.batch
    reference = open_network(made.task, place / "base")
    policy_B, reference_B = (token_log_probs(network, batch).sum(-1).detach() for network in (made.network, reference))
    ratio_B, is_good_B = (policy_B - reference_B)[::2], batch["is_good"][::2].bool()
    mismatched_B = (policy_B - reference_B)[1::2]
    z = mismatched_B.mean().clamp(min=0)
    loss_B = torch.where(is_good_B, 2 * torch.sigmoid(-0.1 * (ratio_B - z)), torch.sigmoid(-0.1 * (z - ratio_B)))
    result = made.objective(batch)
    assert absolute(mean(made.objective, batch), loss_B.mean()) < 1e-12
    metrics = {name: (metric.sum / metric.count).item() for name, metric in result.metrics.items()}
    length_B = (batch["labels"][::2] != IGNORE).sum(-1)
    expected = {
        "accuracy": ((ratio_B > z) == is_good_B).double().mean(),
        "z": z,
        "reward_good": 0.1 * ratio_B[is_good_B].mean(),
        "reward_bad": 0.1 * ratio_B[~is_good_B].mean(),
        "log_prob_good": policy_B[::2][is_good_B].mean(),
        "log_prob_bad": policy_B[::2][~is_good_B].mean(),
        "length": length_B.double().mean(),
        "kl": -ratio_B.sum() / length_B.sum(),
    }
    assert metrics == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-11)


def test_z_above_zero_is_a_constant(place):
    """Where mismatched replies became likelier; no gradient goes through z, nor do mismatched replies get one."""
    made = opened(place, "kto")
    sign = 1 if made.objective(made.batch).metrics["z"].sum > 0 else -1
    if sign < 0:  # the other way round: policy and reference change places
        made.objective.frozen["reference"], made.objective.network = made.network, made.objective.frozen["reference"]
        made.network = made.objective.network.requires_grad_(True)
    z = made.objective(made.batch).metrics["z"].sum / PAIRS
    assert z > 0
    weights = [each for each in made.network.parameters() if each.requires_grad]
    ours = torch.autograd.grad(mean(made.objective, made.batch), weights)
    own = rows_of(made.batch, slice(0, None, 2))
    with torch.no_grad():
        reference_B = token_log_probs(made.objective.frozen["reference"], own).sum(-1)
    ratio_B, is_good_B = token_log_probs(made.network, own).sum(-1) - reference_B, own["is_good"].bool()
    loss = torch.where(is_good_B, torch.sigmoid(-0.1 * (ratio_B - z)), torch.sigmoid(-0.1 * (z - ratio_B))).mean()
    assert absolute(ours, torch.autograd.grad(loss, weights)) < 1e-12


def test_mismatched_replies(place):
    """Each prompt with the reply to another one; all of these are replies of the data; the same for every order of files."""
    made = opened(place, "kto")
    replies = {rating.own.replies[0].tobytes(): rating.own.prompt.tobytes() for rating in made.task.data.train.values}
    for rating in made.task.data.train.values:
        assert replies[rating.other.tobytes()] != rating.own.prompt.tobytes()
    batch = made.batch
    mask_BT = batch["labels"] == IGNORE
    for row in range(0, len(mask_BT), 2):  # the prompt of both rows
        length = int((~mask_BT[row]).int().argmax()) + 1
        assert batch["input_ids"][row, :length].tolist() == batch["input_ids"][row + 1, :length].tolist()
        assert batch["labels"][row].tolist() != batch["labels"][row + 1].tolist()
    assert (batch["is_good"][::2] == batch["is_good"][1::2]).all()


def test_mismatched_replies_are_of_another_prompt(place):
    """Pairs as rated replies: two neighbours have one prompt, and neither gets the other's reply."""
    files = {"validation": place / "held_out.jsonl", "batch_size": PAIRS}
    task, _ = open_preference("kto", place / "base", place / "pairs.jsonl", **files)
    ratings = [*task.data.train.values, *task.data.validation.values]
    prompts = {rating.own.replies[0].tobytes(): rating.own.prompt.tobytes() for rating in ratings}
    assert len(ratings) == 2 * (PAIRS + HELD_OUT)
    assert all(prompts[rating.other.tobytes()] != rating.own.prompt.tobytes() for rating in ratings)


def test_rows_of_a_pair_stay_together(place):
    made = opened(place)
    for world in (2, 3, 5):
        parts = [own_rows(made.batch, Ranks(rank, world)) for rank in range(world)]
        assert all(len(part["labels"]) % 2 == 0 for part in parts)
        assert torch.equal(torch.cat([part["row_ids"] for part in parts]), made.batch["row_ids"])
