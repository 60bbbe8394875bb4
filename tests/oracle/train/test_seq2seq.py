"""Teacher forcing against transformers: ids, loss and gradients of the same records, and the texts of an exported folder."""

import pytest
import torch
import transformers

import model.__main__
import model.hub
from model.weights import to_published, weight_table
from tests.compare import absolute, mixed
from tests.oracle.wide import widen
from tests.runs import command
from tests.seq2seq import gradients, opened, write_folder, write_pairs
from train.losses.choose import LOSSES

LIBRARY = f"transformers {transformers.__version__}"
PREFIX = "turn round: "


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / request.param
    write_folder(folder, request.param)
    return folder


def their_batch(folder, task) -> dict[str, torch.Tensor]:
    """The training records as transformers' users make a batch: unshifted labels, -100 where the tokenizer pads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = task.data.train.values
    batch = tokenizer([pair.source for pair in rows], padding=True, return_tensors="pt")
    labels = tokenizer(text_target=[pair.target for pair in rows], padding=True, return_tensors="pt")
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
    }


def test_ids_are_those_of_transformers(folder, pairs):
    task, _ = opened(folder, pairs, prefix=PREFIX)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for pair in task.data.train.values:
        assert pair.source.startswith(PREFIX) and pair.source_ids.tolist() == tokenizer(pair.source)["input_ids"]
        assert pair.target_ids.tolist() == tokenizer(text_target=pair.target)["input_ids"]
    cut, _ = opened(folder, pairs, overlong="cut", max_source=9, max_target=7)
    for pair in cut.data.train.values:
        assert pair.source_ids.tolist() == tokenizer(pair.source, truncation=True, max_length=9)["input_ids"]
        assert pair.target_ids.tolist() == tokenizer(text_target=pair.target, truncation=True, max_length=7)["input_ids"]


@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_loss_and_gradients(folder, pairs, loss, parity):
    size = len(opened(folder, pairs)[0].data.train)
    task, network = opened(folder, pairs, prefix=PREFIX, batch_size=size)  # one batch of every record
    objective = task.objective(network, LOSSES[loss]).train()
    (batch,) = task.source.batches(0)
    term = objective(batch).terms["loss"]
    (term.sum / term.count).backward()
    kind = transformers.AutoModelForSeq2SeqLM
    theirs = widen(kind.from_pretrained(folder, dtype=torch.float64).train())
    expected = theirs(**their_batch(folder, task)).loss
    expected.backward()
    name = folder.name
    parity(f"seq2seq: {name} loss, {loss}", LIBRARY, absolute(term.sum / term.count, expected), 1e-12, "float64 rounding")
    table, other, errors = weight_table(network.config), dict(theirs.named_parameters()), []
    for key, gradient in gradients(network).items():
        row = table[key]
        errors.append(mixed(to_published(row, gradient, network.config), other[row.published].grad))
    assert len(errors) >= 30
    parity(f"seq2seq: {name} gradients, {loss}", LIBRARY, max(errors), 1e-12, "float64 rounding; sums in another order")


def test_accuracy_is_that_of_their_logits(folder, pairs):
    task, network = opened(folder, pairs)
    objective = task.objective(network, LOSSES["chunked"]).eval()
    right = count = 0
    for batch in task.validation:
        result = objective(batch)
        right, count = right + int(result.metrics["accuracy"].sum), count + int(result.metrics["accuracy"].count)
    theirs = widen(transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval())
    tokenizer, expected, labels = transformers.AutoTokenizer.from_pretrained(folder), 0, 0
    for pair in task.data.validation.values:
        target = tokenizer(text_target=pair.target, return_tensors="pt")["input_ids"]
        logits = theirs(**tokenizer(pair.source, return_tensors="pt"), labels=target).logits
        expected, labels = expected + int((logits.argmax(-1) == target).sum()), labels + target.numel()
    assert (right, count) == (expected, labels) and count == sum(len(pair.target_ids) for pair in task.data.validation.values)


@pytest.mark.parametrize("beams", [1, 2])
def test_texts_are_those_of_generate(folder, pairs, beams):
    """Of several sources at once; greedy where nothing is asked for, as there."""
    sources = ["Return the list", "hello", "quick brown fox jumps over"]
    options = ["--max-new-tokens", 12, *(["--beams", beams] if beams > 1 else [])]
    said = command("generate", folder, "--source", *sources, *options, main=model.__main__.main)
    assert said.code == 0, said.err
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    texts = []
    for source in sources:
        ids = theirs.generate(**tokenizer(source, return_tensors="pt"), max_new_tokens=12, num_beams=beams, do_sample=False)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    assert said.out == "".join(f"{text}\n" for text in texts)
