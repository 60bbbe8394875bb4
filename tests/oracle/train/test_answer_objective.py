"""Extractive question answering beside transformers' AutoModelForQuestionAnswering: loss and gradients, padded too."""

import pytest
import torch
import transformers

import model.hub
from model.weights import head_spec, to_published, weight_table
from tests.compare import mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, ROUNDING, how
from tests.oracle.wide import widen
from train.answer_objective import AnswerObjective, span_loss

FAMILIES = ("bert", "roberta", "roformer", "gpt2", "llama", "qwen3", "t5", "bart")
LABELS = [[2, 5], [0, 0], [8, 8], [99, 9], [9, 100]]  # the last two lie outside a window of nine tokens, and are not scored


def published(family, folder):
    """A network of ours with a question-answering head, and the same in transformers' class."""
    config = tiny_config(family, head="qa", pad_id=1 if family == "roberta" else 0)
    config = config.replace(token_types=2) if family == "roformer" else config
    network = randomized(config)
    model.hub.save(network, folder)
    assert type(transformers.AutoModelForQuestionAnswering.from_pretrained(folder)).__name__ == head_spec(config).architecture
    kind = getattr(transformers, head_spec(config).architecture)
    return network, widen(kind.from_pretrained(folder, dtype=torch.float64, attn_implementation=how(config)).eval())


def batch_of(network) -> tuple[dict, dict]:
    """Five windows of nine tokens, for the objective and for transformers."""
    ids, labels = torch.randint(3, 61, (len(LABELS), 9)), torch.tensor(LABELS)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = inputs | {"token_type_ids": (torch.arange(9) > 2).long().expand(len(ids), 9), "labels": labels[:, None]}
    theirs = inputs | {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    return ours, theirs | ({"token_type_ids": ours["token_type_ids"]} if network.config.token_types > 1 else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, tmp_path, parity):
    """Positions beyond the window are ignored."""
    network, theirs = published(family, tmp_path)
    own, other = batch_of(network)
    objective = AnswerObjective(network)
    term = objective.train()(own).terms["loss"]
    assert int(term.count) == 3 == int(objective.counts(own)["loss"])
    loss = term.sum / term.count
    library = theirs(**other)
    loss.backward()
    library.loss.backward()
    errors, table, gradients = [mixed(loss, library.loss)], weight_table(network.config), dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        errors.append(mixed(to_published(table[name], parameter.grad, network.config), gradients[table[name].published].grad))
    parity(f"{family}: question answering", LIBRARY, max(errors), *ROUNDING)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_takes_no_part(family, tmp_path, parity):
    """Windows of several lengths in one batch: the sum of transformers' losses of each alone. -100 is ignored."""
    network, theirs = published(family, tmp_path)
    own, other = batch_of(network)
    lengths, alone = (9, 4, 9, 6), []
    for row, length in enumerate(lengths):
        own["attention_mask"][row, length:] = 0
        if row < 3:
            alone.append(theirs(**{key: value[row : row + 1, :length] if value.dim() > 1 else value[row : row + 1]
                                   for key, value in other.items()}).loss)
    own["labels"][3:] = torch.tensor([[[-100, -100]], [[3, -100]]])  # a window with one position alone is not scored either
    term = AnswerObjective(network).eval()(own).terms["loss"]
    assert int(term.count) == 3
    parity(f"{family}: question answering, padded", LIBRARY, mixed(term.sum, sum(alone)), *ROUNDING)


def test_half_precision_logits_are_summed_in_float32():
    logits_BT2 = torch.randn(2, 5, 2).to(torch.bfloat16).requires_grad_()
    labels_B2 = torch.tensor([[1, 2], [0, 0]])
    loss = span_loss(logits_BT2, labels_B2, torch.ones(2, 5))
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits_BT2.float(), labels_B2, reduction="sum") / 2
    torch.testing.assert_close(loss, expected)
