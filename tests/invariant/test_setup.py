"""What setup makes of options and shards."""

from dataclasses import replace

import pytest
import torch

from data.config import DataConfig
from data.shards import prepare
from tests.runs import write_corpus
from train.config import TrainConfig, TrainError
from train.setup import TASKS, network_config
from train.tasks.causal import CausalTask
from train.tasks.task import validation_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setup")
    corpus = str(write_corpus(folder / "corpus"))
    data = DataConfig(corpus=(corpus,), vocab_size=320, val_fraction=0.2, cache=folder / "cache")
    config = TrainConfig(data=data)
    return replace(config, network=replace(config.network, context=32)), prepare(data)


@pytest.fixture(scope="module")
def masked(made):
    config, _ = made
    return replace(config, run=replace(config.run, objective="mlm")), prepare(config.data, mask=True)


def test_validation_scores_each_byte_once(made):
    config, shards = made
    batches = CausalTask(config, shards)
    assert batches.validation_bytes == shards.validation.bytes
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches.validation) == shards.validation.targets


def test_part_of_the_split_has_the_bytes_of_its_targets(made):
    config, shards = made
    config = replace(config, report=replace(config.report, eval_tokens=501))
    ids = validation_ids(config, shards)
    text = shards.tokenizer.decode(ids[1:].tolist())
    assert len(ids) == 501 and CausalTask(config, shards).validation_bytes == len(text.encode())


@pytest.mark.parametrize("objective", TASKS)
def test_micro_batches_are_the_global_batch_cut(objective, made, masked):
    config, shards = made if objective == "clm" else masked
    whole, cut = (
        TASKS[objective](replace(config, optimizer=replace(config.optimizer, batch_size=b, accumulate=a)), shards)
        for b, a in ((8, 1), (2, 4))
    )
    for step in (0, 7):
        (one,), parts = whole.step(step), cut.step(step)
        assert len(parts) == 4
        assert all(torch.equal(one[name], torch.cat([part[name] for part in parts])) for name in one)


def test_masks_of_validation_are_fixed_and_whole(masked):
    """Every chosen token is a gap, about 15 % are chosen, and neither the step nor the batch size plays a part."""
    config, shards = masked
    small = replace(config, optimizer=replace(config.optimizer, batch_size=4))
    one, other = TASKS["mlm"](config, shards), TASKS["mlm"](small, shards)
    rows = [torch.cat([batch[name] for batch in task.validation])[: len(one.held_out) // 32] for task in (one, other)
            for name in ("input_ids", "labels")]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3])
    ids, labels = rows[:2]
    assert (ids[labels != -100] == shards.tokenizer.mask_id).all()
    assert 0.12 < (labels != -100).float().mean() < 0.18
    (first,), (second,) = one.step(0), one.step(1)
    kept = first["input_ids"][first["labels"] != -100] == first["labels"][first["labels"] != -100]
    assert kept.any() and not torch.equal(first["labels"], second["labels"])  # training leaves some as they are


@pytest.mark.parametrize(("objective", "preset"), [("clm", "bert-base"), ("mlm", "tiny"), ("mlm", "t5-small")])
def test_an_objective_on_the_wrong_architecture_names_those_that_fit(objective, preset, made):
    config, shards = made
    config = replace(config, run=replace(config.run, objective=objective), network=replace(config.network, preset=preset))
    with pytest.raises(TrainError, match=f"--objective {objective} trains .* --preset {preset} is .* Those that fit: "):
        network_config(config, shards.tokenizer)


@pytest.mark.parametrize("preset", ["tiny-encoder", "roberta-base"])
def test_an_encoder_gets_a_pad_that_no_text_holds(preset, masked):
    config, shards = masked
    has = network_config(replace(config, network=replace(config.network, preset=preset)), shards.tokenizer)
    assert has.pad_id == 0 and shards.tokenizer.bytes_of[0] == b"" and has.head == "mlm"
    assert has.position_offset == (1 if preset == "roberta-base" else 0)
