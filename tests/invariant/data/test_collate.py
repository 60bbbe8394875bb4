"""Examples as batches of tensors: keys, shapes, types; and what cannot be one batch."""

import numpy as np
import pytest
import torch

from data.config import DataError
from data.example import Example
from data.packing.collate import pack_batch, pad_batch
from data.packing.examples import ExampleSource
from tests.invariant.data.test_packing import example, source


def test_pad_batch_has_what_examples_have():
    units = [[example(3, weight=np.full(3, 0.5, np.float32), score=np.float32(1.5), spans=np.array([[0, 1], [1, 2]]))]]
    units += [[example(9, weight=np.full(9, 2.0, np.float32), score=np.float32(0.5), spans=np.zeros((2, 2), int))]]
    batch = pad_batch(units, 7)
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items()} == {
        "input_ids": ((2, 16), torch.int64),
        "attention_mask": ((2, 16), torch.int64),
        "labels": ((2, 16), torch.int64),
        "weight": ((2, 16), torch.float32),
        "score": ((2,), torch.float32),
        "spans": ((2, 2, 2), torch.int64),
    }
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + 13 * [7] and batch["labels"][0].tolist() == [2, 3, 4] + 13 * [-100]
    assert batch["attention_mask"].sum(1).tolist() == [3, 9] and batch["weight"].sum(1).tolist() == [1.5, 18.0]
    assert pad_batch(units, 7, max_lengths=(12,))["labels"].shape == (2, 12)
    assert pad_batch(units, 7, max_lengths=(5,))["labels"].shape == (2, 9), "nothing is cut"


def test_pad_batch_of_an_encoder_decoder():
    units = [[Example(np.arange(1, 4), np.arange(2, 5), np.arange(1, n))] for n in (3, 12)]
    batch = pad_batch(units, 0)
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    assert shapes == {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 8), "labels": (2, 8)}
    assert batch["attention_mask"].sum(1).tolist() == [2, 11] and batch["decoder_input_ids"][0].tolist() == [1, 2, 3, *5 * [0]]


@pytest.mark.parametrize("labels", [np.array(2), np.array([1, 0, 1]), np.array([0.0, 1.0, 1.0], np.float32), np.float32(0.25)])
def test_labels_of_a_whole_text(labels):
    made = ExampleSource([3, 3, 5, 9], lambda n, random: [example(n, np.asarray(labels))], batch_size=2, max_lengths=(16,))
    for step in range(4):  # also where all texts of a batch have as many tokens as there are classes
        found = made.batches(step)[0]["labels"]
        assert found.shape == (2, *np.shape(labels)) and np.array_equal(found[1], labels)
        assert found.dtype == torch.from_numpy(np.asarray(labels)).dtype
    assert pad_batch([[example(3, np.array([1, 0, 1]))]], 0)["labels"].shape == (1, 8), "by its shape alone it is of positions"
    assert pad_batch([[example(3, np.array([1, 0, 1]))]], 0, sequence_level={"labels"})["labels"].tolist() == [[1, 0, 1]]


def test_groups_stand_side_by_side():
    batch = source("groups, pad").batches(0)[0]
    assert batch["group"].tolist() == [n for number in range(8) for n in (number, number)]
    assert (batch["input_ids"][::2, 0] == batch["input_ids"][1::2, 0]).all()
    assert "group" not in source("pad").batches(0)[0]


def test_pack_batch_has_what_examples_have():
    packs = [[[example(3, weight=np.full(3, 0.5))], [example(2, weight=np.ones(2))]], [[example(6, weight=np.zeros(6))]]]
    batch = pack_batch(packs, 7, (8,))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 2, 7, 7, 7], [1, 2, 3, 4, 5, 6, 7, 7]]
    assert batch["labels"].tolist() == [[2, 3, 4, 2, 3, -100, -100, -100], [2, 3, 4, 5, 6, 7, -100, -100]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, -2, -2, -2], 6 * [0] + 2 * [-2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 0, 0]]
    assert batch["weight"].tolist() == [[0.5, 0.5, 0.5, 1, 1, 0, 0, 0], 8 * [0.0]]
    sourced = [[[Example(np.ones(2, int), np.ones(2, int), np.ones(3, int))], [Example(*3 * [np.full(1, 5)])]]]
    batch = pack_batch(sourced, 0, (4, 6))
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    assert shapes == dict.fromkeys(["input_ids", "document_ids", "position_ids"], (1, 6)) | dict.fromkeys(
        ["decoder_input_ids", "decoder_document_ids", "decoder_position_ids", "labels"], (1, 4)
    )
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, -2, -2]]
    assert batch["decoder_document_ids"].tolist() == [[0, 0, 1, -2]]


def test_batches_that_cannot_be():
    with pytest.raises(DataError, match=r"the same keys: \['a'\], and \['b'\]"):
        pad_batch([[example(3, a=np.ones(3))], [example(3, b=np.ones(3))]], 0)
    with pytest.raises(DataError, match="either all examples of one task have source_ids, or none"):
        pad_batch([[example(3)], [example(3)._replace(source_ids=np.ones(3))]], 0)
    with pytest.raises(DataError, match=r"one shape in all examples, and here \(2,\) and \(4,\)"):
        pad_batch([[example(3, a=np.ones(2))], [example(3, a=np.ones(4))]], 0)
    for extra in ({"labels": np.array(1)}, {"a": np.ones(2)}, {"a": np.float32(1)}):
        with pytest.raises(DataError, match=r"(labels|a) of shape .* are of a whole text: .* are padded, not packed"):
            pack_batch([[[example(3, **extra)]]], 0, (8,))
    for make in (lambda: pad_batch([], 0), lambda: pack_batch([], 0, (8,))):
        with pytest.raises(DataError, match="one example at least"):
            make()
