"""The loss of replies: packed as unpacked, a mean over records by hand, and its chunked cross-entropy; each with its mutant."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from data.packing.collate import PADDING_DOCUMENT
from tests.bench.loss import peak_bytes
from tests.chat_runs import CHATML, open_sft, whole_epoch, write_base, write_conversations
from tests.compare import absolute, relative
from tests.conftest import randomized, tiny_config
from tests.invariant.train.test_step import Recorder
from tests.oracle.train.test_losses import OPTIONS, case, with_gradients
from tests.ranks import in_two_ranks
from train.chat_objective import WEIGHTS, ChatObjective, embedding_noise, record_lengths
from train.losses.choose import LOSSES
from train.losses.weighted import ROWS, weighted_linear_cross_entropy
from train.parallel.mesh import build_mesh
from train.parallel.parallelize import parallelize, unwrapped
from train.parallel.ranks import Ranks, own_rows
from train.step import train_step

PACKED = ("document_ids", "position_ids")
RECORDS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("chat")
    write_base(place / "base", CHATML)
    write_conversations(place / "train.jsonl", RECORDS)
    write_conversations(place / "held_out.jsonl", 3, seed=1)
    return place


def opened(place: Path, **settings):
    """The task on `RECORDS` conversations, and a small random network in float64."""
    settings = {"template": "chatml"} | settings
    return open_sft(place / "base", place / "train.jsonl", validation=place / "held_out.jsonl", **settings)[0]


def network_of(task, family: str = "llama"):
    return randomized(tiny_config(family, vocab_size=task.tokenizer.vocab_size, context=128))


def gradients(task, network, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(the summed loss, its gradients)."""
    term = task.objective(network, LOSSES["chunked"]).train()(batch).terms["loss"]
    return term.sum, list(torch.autograd.grad(term.sum, list(network.parameters())))


# ---- packing


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_as_unpacked(place, family):
    """Gradients to 1e-12. Mutants: each of the two things that keep packed records apart is taken away, then both."""
    packed, padded = (opened(place, packing=packing) for packing in ("first_fit", "pad"))
    network, batch = network_of(packed, family), whole_epoch(packed)
    assert len(batch["labels"]) < RECORDS and (batch["document_ids"].amax(1) > 0).any()
    expected = gradients(padded, network, whole_epoch(padded))
    assert len(expected[1]) > 15
    assert absolute(gradients(packed, network, batch), expected) < 1e-12
    shared_BT = torch.where(batch["document_ids"] == PADDING_DOCUMENT, PADDING_DOCUMENT, 0)
    mutants = {
        "positions alone": {key: value for key, value in batch.items() if key != "document_ids"},
        "a shared mask": batch | {"document_ids": shared_BT},
        "neither": {key: value for key, value in batch.items() if key not in PACKED},
    }
    if family == "gpt2":  # RoPE's scores depend on distances alone
        mutants["a mask alone"] = {key: value for key, value in batch.items() if key != "position_ids"}
    for name, mutant in mutants.items():
        assert relative(gradients(packed, network, mutant)[1], expected[1]) > 1e-3, name


def test_a_record_does_not_see_its_neighbours(place):
    """Other tokens in the first record of a row leave the hidden states of the second one bit-identical."""
    task = opened(place)
    network, batch = network_of(task), {key: whole_epoch(task)[key][:1] for key in ("input_ids", *PACKED)}
    changed = batch | {"input_ids": torch.where(batch["document_ids"] == 0, 7, batch["input_ids"])}
    is_second_BT = batch["document_ids"] == 1
    one, other = (network.body(**each).hidden for each in (batch, changed))
    assert is_second_BT.any() and torch.equal(one[is_second_BT], other[is_second_BT])
    assert not torch.equal(one[~is_second_BT], other[~is_second_BT])


# ---- a mean over records


def mean_over_records(task, network) -> torch.Tensor:
    """By hand: each record by itself, with transformers' shift; its nats over its learned tokens, then over the records."""
    means = []
    for talk in task.data.train.values:
        (tokens,) = talk.examples
        logits_TV = network(torch.from_numpy(tokens.ids)[None]).logits[0]
        nats_T = F.cross_entropy(logits_TV[:-1], torch.from_numpy(tokens.ids[1:]), reduction="none")
        means.append(nats_T[torch.from_numpy(tokens.is_learned[1:])].mean())
    return torch.stack(means).mean()


def step_gradients(objective, batches, ranks=None):
    recorder = Recorder(objective)
    return train_step(objective, batches, recorder, ranks=ranks), recorder.gradients


def split(batch: dict, size: int) -> list[dict]:
    pieces = {key: value.split(size) for key, value in batch.items()}
    return [dict(zip(pieces, each, strict=True)) for each in zip(*pieces.values(), strict=True)]


@pytest.mark.parametrize("packing", ["pad", "first_fit"])
def test_a_mean_over_records(place, packing):
    """By hand, in one batch and in micro-batches of one row; a mean over tokens is another number."""
    task = opened(place, packing=packing, loss="record")
    network, batch = network_of(task), whole_epoch(task)
    expected = mean_over_records(task, network)
    wanted = list(torch.autograd.grad(expected, list(network.parameters())))
    objective = task.objective(network, LOSSES["chunked"]).train()
    for batches in ([batch], split(batch, 1)):
        result, found = step_gradients(objective, batches)
        assert absolute(result.loss, expected) < 1e-12 and absolute(found, wanted) < 1e-12
        assert result.count == (batch["labels"] != -100).sum(), "tokens are reported"
    assert abs(float(ChatObjective.counts(batch)["loss"]) - RECORDS) < 1e-12
    plain = opened(place, packing=packing)
    by_token, _ = step_gradients(plain.objective(network, LOSSES["chunked"]).train(), [whole_epoch(plain)])
    assert abs(by_token.loss - expected) > 1e-3
    if packing == "pad":  # the mutant: the mean of micro-batches' means over tokens, 4 rows each
        terms = [plain.objective(network, LOSSES["chunked"])(each).terms["loss"] for each in split(whole_epoch(plain), 4)]
        assert abs(sum(term.sum / term.count for term in terms) / len(terms) - expected) > 1e-4


def test_a_part_of_a_record_alone_in_a_step(place):
    """An example of each reply: a step may hold less than one record, and its loss is still a mean."""
    task = opened(place, per_reply=True, loss="record", packing="pad")
    network = network_of(task)
    row = next(i for i in range(task.source.rows_in_epoch(0)) if float(task.source.batch(i)[WEIGHTS][:1].sum()) < 0.9)
    batch = {key: value[:1] for key, value in task.source.batch(row).items()}
    result, _ = step_gradients(task.objective(network, LOSSES["chunked"]).train(), [batch])
    logits_NV = network(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    assert absolute(result.loss, F.cross_entropy(logits_NV, batch["labels"].flatten())) < 1e-12


def test_validation_is_a_mean_over_tokens(place):
    task = opened(place, loss="record")
    network, batch = network_of(task), task.validation[0]
    result = task.objective(network, LOSSES["chunked"]).eval()(batch)
    term = result.terms["loss"]
    logits_NV = network(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    assert absolute(term.sum / term.count, F.cross_entropy(logits_NV, batch["labels"].flatten())) < 1e-12
    scored_N = batch["labels"].flatten() != -100
    right = (logits_NV.argmax(-1) == batch["labels"].flatten())[scored_N].sum()
    assert result.metrics["accuracy"].sum == right and result.metrics["accuracy"].count == scored_N.sum() == term.count


def on_two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    ranks, device = Ranks(rank, 2), torch.device("cpu")
    task = opened(folder, loss="record")
    network = network_of(task)
    objective = parallelize(task.objective(network, LOSSES["chunked"]), build_mesh("replicate", ranks, device), device)
    batches = [own_rows(batch, ranks) for batch in split(whole_epoch(task), 3)]
    result, found = step_gradients(objective, batches, ranks=ranks)
    assert unwrapped(objective).network is network
    torch.save([result.loss, *found], folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_mean_over_records_on_two_ranks(place):
    """Packed rows hold different numbers of records, and the ranks different numbers of rows."""
    in_two_ranks(on_two_ranks, place)
    task = opened(place, loss="record")
    network = network_of(task)
    expected = mean_over_records(task, network)
    wanted = [expected, *torch.autograd.grad(expected, list(network.parameters()))]
    for rank in (0, 1):
        assert absolute(torch.load(place / f"rank-{rank}.pt"), wanted) < 1e-12


# ---- its cross-entropy


@pytest.mark.parametrize("name", OPTIONS)
def test_weighted_cross_entropy(name, parity, monkeypatch):
    """Beside torch's of the scored rows, with gradients by hidden states, matrix and bias; in chunks of 3 rows too."""
    inputs, labels = case()
    weights = torch.rand(labels.shape, dtype=torch.float64)
    scored, (hidden, weight, bias) = labels.flatten() != -100, inputs
    logits = F.linear(hidden.flatten(0, 1)[scored], weight, bias)
    smoothing, z_loss = OPTIONS[name].get("smoothing", 0), OPTIONS[name].get("z_loss", 0)
    nats = F.cross_entropy(logits, labels.flatten()[scored], reduction="none", label_smoothing=smoothing)
    nats = nats + z_loss * logits.exp().sum(-1).log().square()
    expected = with_gradients((weights.flatten()[scored] * nats).sum(), inputs, 3.7)
    for rows in (ROWS, 3):
        monkeypatch.setattr("train.losses.weighted.ROWS", rows)
        total, plain = weighted_linear_cross_entropy(hidden, weight, labels, weights, bias, **OPTIONS[name])
        ours = with_gradients(total, inputs, 3.7)
        part = f"weighted cross-entropy: {name}, {rows} rows"
        parity(part, f"torch {torch.__version__}", absolute(ours, expected), 1e-12, "float64 rounding; sums in another order")
        assert absolute(plain, nats.sum()) < 1e-12 and not plain.requires_grad
    ones, _ = weighted_linear_cross_entropy(hidden, weight, labels, torch.ones_like(weights), bias, **OPTIONS[name])
    assert absolute(ones, LOSSES["plain"](hidden, weight, labels, bias, **OPTIONS[name])[0]) < 1e-12


def test_weights_of_another_shape_and_no_label():
    (hidden, weight, bias), labels = case()
    with pytest.raises(ValueError, match=r"label_weights \(7, 2\): expected one for each label, \(2, 7\)"):
        weighted_linear_cross_entropy(hidden, weight, labels, torch.ones(7, 2), bias)
    none = torch.full_like(labels, -100)
    total, plain = weighted_linear_cross_entropy(hidden, weight, none, torch.ones(2, 7), bias)
    assert total == plain == 0 and not torch.autograd.grad(total, hidden)[0].any()


def test_ignored_rows_and_few_bits():
    """NaN where no label is scored stays there; from bfloat16 hidden states the sums are float32."""
    (hidden, weight, bias), labels = case()
    weights = torch.rand(labels.shape, dtype=torch.float64)
    expected = with_gradients(weighted_linear_cross_entropy(hidden, weight, labels, weights, bias)[0], (hidden, weight, bias))
    few = [each.detach().bfloat16() for each in (hidden, weight, bias)]
    total, plain = weighted_linear_cross_entropy(few[0], few[1], labels, weights, few[2])
    assert total.dtype == plain.dtype == torch.float32 and relative(total, expected[0]) < 2e-2
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    found = with_gradients(weighted_linear_cross_entropy(hidden, weight, labels, weights, bias)[0], (hidden, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_logits_of_all_labels_never_exist():
    rows, words, width = 4 * ROWS, 2048, 8
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(words, width, requires_grad=True)
    labels, weights = torch.randint(0, words, (rows,)), torch.rand(rows)

    def step(loss):
        torch.autograd.backward(loss(hidden, weight, labels)[0])

    step(weighted := partial(lambda h, w, y: weighted_linear_cross_entropy(h, w, y, weights)))  # allocates the gradients
    one_chunk = ROWS * words * 4
    assert peak_bytes(lambda: step(weighted))[0] < 4 * one_chunk < peak_bytes(lambda: step(LOSSES["plain"]))[0]


# ---- NEFTune


def test_noise_is_each_records_own(place):
    """A packed record's noise has the scale of its own tokens, and evaluation has none."""
    task = opened(place, neftune=5.0)
    network, batch = network_of(task), whole_epoch(task)
    embedding = network.body.embedding
    with embedding_noise(embedding, batch, 5.0):
        noise_BTD = embedding(batch["input_ids"]) - embedding.weight[batch["input_ids"]]
    lengths = []
    for document in range(int(batch["document_ids"][0].max()) + 1):
        is_own_T = batch["document_ids"][0] == document
        bound = 5 / (int(is_own_T.sum()) * network.config.width) ** 0.5
        assert 0.95 * bound < noise_BTD[0][is_own_T].abs().max() <= bound * (1 + 1e-6)
        lengths.append(int(is_own_T.sum()))
        assert record_lengths(batch)[0][is_own_T].unique().tolist() == lengths[-1:]
    assert len(set(lengths)) > 1
    assert absolute(embedding(batch["input_ids"]), embedding.weight[batch["input_ids"]]) == 0, "the hook is gone"

    objective = task.objective(network, LOSSES["chunked"])
    loss = [objective.train(mode)(batch).terms["loss"].sum.item() for mode in (True, True, False, False)]
    assert loss[0] != loss[1] and loss[2] == loss[3]
