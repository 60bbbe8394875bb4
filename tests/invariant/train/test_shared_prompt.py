"""Replies behind one prompt in one row: the hidden states, losses and gradients of separate rows."""

from unittest.mock import patch

import pytest
import torch

from data.packing.collate import PADDING_DOCUMENT
from lora.config import PromptConfig
from lora.inject import add_adapters
from model.mask import SHARED, Mask
from tests.chat_runs import CHATML, write_base
from tests.compare import absolute, relative
from tests.conftest import randomized, tiny_config
from tests.preference_runs import build_objective, open_preference, perturb, write_pairs
from train import shared_prompt
from train.shared_prompt import choose_joint_rows, choose_read, join_rows, read_groups, read_pairs, read_rows

KINDS = ("Llama", "Qwen2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("pairs")
    for kind in KINDS:
        write_base(place / kind, CHATML, kind=kind)
    write_pairs(place / "pairs.jsonl", 8, longest=20)
    write_pairs(place / "held_out.jsonl", 2, seed=1)
    return place


def opened(place, kind: str = "Llama", **settings):
    files = {"validation": place / "held_out.jsonl", "context": 256}
    return open_preference("dpo", place / kind, place / "pairs.jsonl", **files, **settings)


def gradients(objective, batch) -> list[torch.Tensor]:
    objective.zero_grad()
    result = objective(batch)
    sum(term.weight * term.sum for term in result.terms.values()).backward()
    found = [parameter.grad.clone() for parameter in objective.network.parameters() if parameter.grad is not None]
    return [result.terms["loss"].sum.detach(), *found]


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(shared_prompt, "WORTH", 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_real_positions(place, kind, always, parity):
    task, network = opened(place, kind)
    batch = task.source.batches(0)[0]
    inputs, is_real_BT = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()
    rows, pairs = (read(network, inputs, batch["labels"])[is_real_BT] for read in (read_rows, read_pairs))
    parity(f"replies behind one prompt: hidden states, {kind}", "two rows", absolute(pairs, rows), 1e-12, "float64")


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "sigmoid=1,sft=0.5"])
def test_losses_and_gradients(place, loss, always, parity):
    task, network = opened(place, loss=loss)
    objective, batch = build_objective(task, network, place / "Llama"), task.source.batches(0)[0]
    perturb(network)
    found = {}
    for read in (read_rows, read_pairs):
        objective.read = read
        if objective.reference is not None:
            objective.reference.read = read
        found[read] = gradients(objective.train(), batch)
    error = max(relative(one, other) for one, other in zip(found[read_pairs], found[read_rows], strict=True))
    parity(f"replies behind one prompt: loss and gradients, {loss}", "two rows", error, 1e-9, "float64, relative")


def test_one_row_holds_the_prompt_once(place, always, monkeypatch):
    task, network = opened(place)
    batch, seen = task.source.batches(0)[0], {}
    forward = network.body.forward
    monkeypatch.setattr(network.body, "forward", lambda **inputs: seen.update(inputs) or forward(**inputs))
    read_pairs(network, {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"])
    records = {each.row_id: each for each in task.data.train.values}
    for row, ids_U, document_U, place_U in zip(
        batch["row_ids"][::2].tolist(), seen["input_ids"], seen["document_ids"], seen["position_ids"], strict=True
    ):
        prompt, (chosen, rejected) = records[row].prompt.tolist(), (reply[:-1].tolist() for reply in records[row].replies)
        length = len(prompt) + len(chosen) + len(rejected)
        assert ids_U[:length].tolist() == prompt + chosen + rejected
        assert document_U[:length].tolist() == [SHARED] * len(prompt) + [0] * len(chosen) + [1] * len(rejected)
        behind = [len(prompt) + i for reply in (chosen, rejected) for i in range(len(reply))]
        assert place_U[:length].tolist() == [*range(len(prompt)), *behind]
        assert set(document_U[length:].tolist()) <= {PADDING_DOCUMENT}


def test_replies_do_not_see_each_other(place, always):
    """Another chosen reply changes nothing of the rejected one."""
    task, network = opened(place)
    batch = task.source.batches(0)[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before = read_pairs(network, inputs, batch["labels"])[1::2]
    labelled_BT = batch["labels"] != -100
    other = {**inputs, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][::2][:, 1:][labelled_BT[::2][:, :-1]] = 5  # inputs behind the first label: the chosen replies' tokens
    after = read_pairs(network, other, batch["labels"])[1::2]
    real_BT = batch["attention_mask"][1::2].bool()
    assert torch.equal(before[real_BT], after[real_BT])
    assert not torch.equal(inputs["input_ids"], other["input_ids"])


def test_the_mask_shares_keys_of_its_document():
    allowed_TS = Mask(document_ids=torch.tensor([[SHARED, 0, 1, -2]])).allowed(4, 4)[0, 0].int().tolist()
    assert allowed_TS == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


def test_where_places_in_the_row_count_rows_are_read_as_they_are(place):
    _, network = opened(place)
    assert choose_read(network.config) is read_pairs
    assert choose_read(network.config.replace(windows=(16,))) is read_rows
    assert choose_read(network.config.replace(bidirectional_prompt=True)) is read_rows


def test_a_prompt_that_saves_little_is_read_twice(place, monkeypatch):
    task, network = opened(place)
    batch = task.source.batches(0)[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    monkeypatch.setattr(shared_prompt, "WORTH", 0.0)
    assert torch.equal(read_pairs(network, inputs, batch["labels"]), read_rows(network, inputs, batch["labels"]))
    assert read_pairs(network, {name: value[:0] for name, value in inputs.items()}, batch["labels"][:0]).shape[0] == 0


def test_learned_positions_hold_both_replies_or_are_read_twice(always):
    """A row of both replies may be longer than the table of positions, from which virtual tokens take some too."""
    ids_BT, prompt = torch.randint(3, 40, (2, 10)), 4
    ids_BT[1, :prompt] = ids_BT[0, :prompt]
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, prompt - 1 :] = 7
    for context, is_shared in ((16, True), (15, False)):  # 4 + 6 + 6 places
        network = randomized(tiny_config("gpt2", vocab_size=40, context=context)).double()
        with patch.object(network.body, "forward", wraps=network.body.forward) as forward:
            pairs = read_pairs(network, inputs, labels_BT)
        assert forward.call_args.kwargs["input_ids"].size(1) == (16 if is_shared else 10)
        assert absolute(pairs, read_rows(network, inputs, labels_BT)) < 1e-12
    virtual = randomized(tiny_config("gpt2", vocab_size=40, context=16)).double()
    add_adapters(virtual, PromptConfig(tokens=2))
    assert absolute(read_pairs(virtual, inputs, labels_BT), read_rows(virtual, inputs, labels_BT)) < 1e-12


def test_rewards_of_averaging_losses_are_per_token(place):
    """Accuracy and margin are those of the loss: simpo's of means, sigmoid's of sums."""
    for loss in ("simpo", "sigmoid"):
        task, network = opened(place, loss=loss)
        objective, batch = build_objective(task, network, place / "Llama"), task.source.batches(0)[0]
        perturb(network)
        pairs, _ = objective.pairs(batch, torch.ones(8, dtype=torch.bool))
        chosen, rejected = pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected
        if loss == "simpo":
            chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
        margin = task.pair_loss.beta * (chosen - rejected)
        found = objective(batch).metrics
        assert absolute(found["margin"].sum, margin.sum()) < 1e-12 and float(found["accuracy"].sum) == int((margin > 0).sum())


# ---- more than two replies


def grouped(sizes: list[int], *, longest: int = 9) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Rows of groups of these sizes in a drawn order, with prompts of 3 to 8 tokens and replies of 1 to `longest`."""
    draw = torch.Generator().manual_seed(5)
    rows = []
    for group, size in enumerate(sizes):
        prompt = torch.randint(3, 40, (3 + 5 * group % 6,), generator=draw).tolist()
        for _ in range(size):
            length = int(torch.randint(1, longest + 1, (1,), generator=draw))
            rows.append((group, prompt, torch.randint(3, 40, (length,), generator=draw).tolist()))
    rows = [rows[index] for index in torch.randperm(len(rows), generator=draw).tolist()]
    width = max(len(prompt) + len(reply) for _, prompt, reply in rows)
    ids = [prompt + reply for _, prompt, reply in rows]
    ids_BT = torch.tensor([each + [0] * (width - len(each)) for each in ids])
    mask_BT = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in ids])
    group_B, prompt_B = torch.tensor([[group, len(prompt)] for group, prompt, _ in rows]).T
    return {"input_ids": ids_BT, "attention_mask": mask_BT}, group_B, prompt_B


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_groups_of_any_size_in_any_order(family, always, parity):
    network = randomized(tiny_config(family, vocab_size=40, context=64)).double()
    inputs, group_B, prompt_B = grouped([5, 1, 8, 2])
    real_BT = inputs["attention_mask"].bool()
    weight_BTD = torch.randn(*real_BT.shape, network.config.width, generator=torch.Generator().manual_seed(1)).double()
    found = {}
    with patch.object(network.body, "forward", wraps=network.body.forward) as forward:
        for name, read in (("rows", read_rows), ("groups", lambda *given: read_groups(*given, group_B, prompt_B))):
            network.zero_grad()
            hidden_BTD = read(network, inputs)
            (hidden_BTD * weight_BTD)[real_BT].sum().backward()
            found[name] = [hidden_BTD[real_BT].detach(), *(p.grad.clone() for p in network.body.parameters())]
    assert forward.call_args.kwargs["input_ids"].numel() < 0.8 * real_BT.numel()
    error = max(relative(one, other) for one, other in zip(found["groups"], found["rows"], strict=True))
    name = f"replies of groups behind one prompt: hidden states and gradients, {family}"
    parity(name, "separate rows", error, 1e-12, "float64, relative")


def test_a_reply_of_a_group_sees_no_other(always):
    network = randomized(tiny_config("llama", vocab_size=40, context=64)).double()
    inputs, group_B, prompt_B = grouped([4, 4])
    before = read_groups(network, inputs, group_B, prompt_B)
    other = inputs["input_ids"].clone()
    other[0, prompt_B[0] :] = 5
    after = read_groups(network, {**inputs, "input_ids": other}, group_B, prompt_B)
    real_BT = inputs["attention_mask"].bool()
    assert torch.equal(before[1:][real_BT[1:]], after[1:][real_BT[1:]]) and not torch.equal(before[0], after[0])


def test_joint_rows_are_chosen_by_their_cost():
    """Long prompts are read once for all; beside wide attention and short prompts rows stay apart; a limit splits them."""
    config = tiny_config("llama").replace(width=512, heads=8)
    lengths, groups = [164] * 16, [0] * 8 + [1] * 8
    joint = choose_joint_rows(config, 164, 1 << 62, lengths, [100] * 16, groups)
    assert joint.count == 2 and joint.width == 100 + 8 * 64
    assert choose_joint_rows(config, 164, 400, lengths, [100] * 16, groups) == join_rows(lengths, [100] * 16, groups, 4)
    assert choose_joint_rows(config.replace(width=16, heads=2), 164, 1 << 62, lengths, [10] * 16, groups) is None
    assert choose_joint_rows(config, 164, 1 << 62, lengths, [100] * 16, list(range(16))) is None
