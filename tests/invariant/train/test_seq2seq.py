"""What holds for sequence to sequence whatever is learned: teacher forcing, packing, what is scored; each with a mutant."""

import pytest
import torch

from data.transforms.causal import IGNORE
from lora.config import PrefixConfig
from lora.inject import add_adapters
from tests.seq2seq import gradients, opened, write_folder, write_pairs
from train.losses.cross_entropy import linear_cross_entropy
from train.setup import compile_blocks


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / request.param
    write_folder(folder, request.param)
    return folder


def epoch_loss(task, network) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Sum, count and gradients over the training records, each once."""
    objective = task.objective(network, linear_cross_entropy).train()
    total, count = 0.0, 0
    for row in range(task.source.rows_in_epoch(0)):
        term = objective(task.source.collate([task.source.row_units(row)])).terms["loss"]
        term.sum.backward()
        total, count = total + float(term.sum.detach()), count + int(term.count)
    return total, count, gradients(network)


def test_the_decoder_reads_what_it_was_to_say(folder, pairs):
    """decoder_input[0] = start, decoder_input[t] = label[t - 1]; labels end with eos, and no input is -100."""
    task, network = opened(folder, pairs)
    start, eos = network.config.decoder_start_id, task.tokenizer.eos_id
    assert start is not None
    for batch in (*task.source.batches(0), *task.validation):
        inputs, labels = batch["decoder_input_ids"], batch["labels"]
        assert inputs.min() >= 0 and batch["input_ids"].min() >= 0 and (inputs[:, 0] == start).all()
        known = labels[:, 1:] != IGNORE
        assert torch.equal(inputs[:, 1:][known], labels[:, :-1][known])
        for row in labels:
            real = row[row != IGNORE]
            assert not len(real) or (real[-1] == eos and (real[:-1] != eos).all())


def test_eos_is_learned_where_it_pads_too(folder, pairs, monkeypatch):
    """Our own tokenizer has no pad: rows are filled with eos, and the one that ends a target is a label all the same."""
    task, network = opened(folder, pairs)
    expected = epoch_loss(task, network)
    monkeypatch.setattr(task.tokenizer, "pad_id", None)
    task.source.pad_id = task.pad_id
    assert task.pad_id == task.tokenizer.eos_id
    total, count, found = epoch_loss(task, network)
    assert count == expected[1] == sum(len(pair.target_ids) for pair in task.data.train.values)
    assert total == pytest.approx(expected[0], rel=1e-12)
    assert max((found[name] - value).abs().max() for name, value in expected[2].items()) < 1e-11


@pytest.mark.parametrize("mutant", [False, True], ids=["apart", "seen"])
def test_packed_rows_learn_what_padded_rows_do(folder, pairs, mutant, monkeypatch):
    task, network = opened(folder, pairs)
    total, count, expected = epoch_loss(task, network)
    packed, _ = opened(folder, pairs, packing="first_fit")
    assert packed.source.rows_in_epoch(0) < len(task.data.train) / 2
    if mutant:  # the pairs of a row see one another
        collate = packed.source.collate

        def seeing(packs):
            batch = collate(packs)
            for name in ("document_ids", "decoder_document_ids"):
                batch[name] = batch[name].clamp(max=0)
            return batch

        monkeypatch.setattr(packed.source, "collate", seeing)
    found_total, found_count, found = epoch_loss(packed, network)
    largest = max(value.abs().max() for value in expected.values())
    error = max((found[name] - value).abs().max() for name, value in expected.items()) / largest
    assert found_count == count
    assert (error < 1e-12 and found_total == pytest.approx(total, rel=1e-12)) != mutant
    assert not mutant or error > 1e-3


def test_a_prefix_stands_before_packed_rows_too(pairs, tmp_path):
    """Keys and values before both stacks, which every pair of a row sees. (T5's relative positions would differ: refused.)"""
    write_folder(tmp_path, "bart")
    task, network = opened(tmp_path, pairs)
    packed, _ = opened(tmp_path, pairs, packing="first_fit", context=64 - 3)
    add_adapters(network, PrefixConfig(tokens=3))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    (total, _, expected), (other, _, found) = epoch_loss(task, network), epoch_loss(packed, network)
    largest = max(value.abs().max() for value in expected.values())
    assert other == pytest.approx(total, rel=1e-12) and len(expected) >= 1
    assert max((found[name] - value).abs().max() for name, value in expected.items()) / largest < 1e-12


def test_every_key_is_read(folder, pairs):
    """Without decoder_input_ids the body would read its own input again: another loss, and no error."""
    task, network = opened(folder, pairs)
    objective = task.objective(network, linear_cross_entropy).eval()
    (batch,) = task.source.batches(0)
    assert {"input_ids", "attention_mask", "decoder_input_ids"} == objective.inputs_of(batch).keys()
    whole = float(objective(batch).terms["loss"].sum.detach())
    for key, other in (("decoder_input_ids", batch["decoder_input_ids"].roll(1, 1)), ("attention_mask", None)):
        changed = {name: value for name, value in batch.items() if name != key} | ({key: other} if other is not None else {})
        assert abs(float(objective(changed).terms["loss"].sum.detach()) / whole - 1) > 1e-4, key
    with pytest.raises(ValueError, match="the batch has decoder_inputs, which neither"):
        objective(batch | {"decoder_inputs": batch["decoder_input_ids"]})


def test_baseline_is_the_best_guess_without_the_input(folder, pairs):
    task, _ = opened(folder, pairs)
    counts = torch.ones(task.tokenizer.vocab_size, dtype=torch.float64)
    for pair in task.data.train.values:
        for id in pair.target_ids.tolist():
            counts[id] += 1
    labels = torch.cat([torch.from_numpy(pair.target_ids).long() for pair in task.data.validation.values])
    assert task.baseline == pytest.approx(float(-(counts / counts.sum()).log()[labels].mean()), rel=1e-12)


def test_exact_match_needs_the_end(folder, pairs, monkeypatch):
    """A text that goes on past the reference's tokens is not it; nor is one that has not ended."""
    task, network = opened(folder, pairs)
    pair = task.data.validation.values[0]
    ends = pair.target_ids.tolist()
    made = {"whole": [*ends, ends[-1]], "goes on": ends[:-1] * 2 + ends[-1:], "has not ended": ends[:-1]}
    for what, ids in made.items():
        monkeypatch.setattr("model.generate.generate", lambda network, input_ids, ids=ids, **told: torch.tensor([ids]))
        task.data.validation.values[:] = [pair]
        totals = task.generation_totals(network, torch.device("cpu"), None)
        assert totals["exact_match"] == (float(what == "whole"), 1), what


def test_generated_texts_do_not_depend_on_the_batch(folder, pairs):
    """Sources of several lengths side by side, padded, give what each gives alone, in the order of the records."""
    task, network = opened(folder, pairs, batch_size=5)
    some = task.data.validation.values
    together = task.generate_texts(network, torch.device("cpu"), some)
    longest = 2 * max(len(pair.target_ids) for pair in some)
    alone = []
    for pair in some:
        from model.generate import generate

        ids = torch.from_numpy(pair.source_ids).long()[None]
        new = generate(network, ids, max_new_tokens=longest, temperature=0.0, stop_ids=[task.tokenizer.eos_id])[0].tolist()
        ended = task.tokenizer.eos_id in new
        alone.append((task.tokenizer.decode(new[: new.index(task.tokenizer.eos_id)] if ended else new), ended))
    assert together == alone and len(set(together)) > 1


@pytest.mark.slow
def test_compiled_blocks_give_the_same(folder, pairs):
    task, network = opened(folder, pairs, packing="first_fit")  # rows of one length
    total, _, expected = epoch_loss(task, network)
    assert compile_blocks(network, print)
    compiled_total, _, found = epoch_loss(task, network)
    largest = max(value.abs().max() for value in expected.values())
    assert compiled_total == pytest.approx(total, rel=1e-10)
    assert max((found[name] - value).abs().max() for name, value in expected.items()) / largest < 1e-10
