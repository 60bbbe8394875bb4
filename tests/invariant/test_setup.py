"""What setup makes of options and shards."""

from dataclasses import replace

import pytest
import torch

from data.config import DataConfig
from data.shards import prepare
from tests.runs import write_corpus
from train.config import TrainConfig
from train.setup import open_batches, validation_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setup")
    corpus = str(write_corpus(folder / "corpus"))
    data = DataConfig(corpus=(corpus,), vocab_size=320, val_fraction=0.2, cache=folder / "cache")
    config = TrainConfig(data=data)
    return replace(config, network=replace(config.network, context=32)), prepare(data)


def test_validation_scores_each_byte_once(made):
    config, shards = made
    batches = open_batches(config, shards)
    assert batches.validation_bytes == shards.validation.bytes
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches.validation) == shards.validation.targets


def test_part_of_the_split_has_the_bytes_of_its_targets(made):
    config, shards = made
    config = replace(config, report=replace(config.report, eval_tokens=501))
    ids = validation_ids(config, shards)
    text = shards.tokenizer.decode(ids[1:].tolist())
    assert len(ids) == 501 and open_batches(config, shards).validation_bytes == len(text.encode())


def test_micro_batches_are_the_global_batch_cut(made):
    config, shards = made
    whole, cut = (
        open_batches(replace(config, optimizer=replace(config.optimizer, batch_size=b, accumulate=a)), shards)
        for b, a in ((8, 1), (2, 4))
    )
    for step in (0, 7):
        (one,), parts = whole.step(step), cut.step(step)
        assert len(parts) == 4
        assert all(torch.equal(one[name], torch.cat([part[name] for part in parts])) for name in one)
