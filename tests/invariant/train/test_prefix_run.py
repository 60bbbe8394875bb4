"""Prefix language modelling: what sees what, generation as in training, and runs through the real command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval.__main__
import model.__main__
import model.hub
import model.stack
from data.config import DataConfig
from data.transforms.prefix import VALIDATION_STEP, prefix_batch
from model.config import ConfigError
from model.generate import generate
from model.mask import Mask
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from tests.invariant.lora.test_prompts import adapted
from tests.runs import SETTINGS, arguments, command, further, last_checkpoint, write_corpus
from train.config import NetworkConfig, RunConfig, TrainConfig
from train.reports.log import read_metrics
from train.runs.errors import TrainError
from train.tasks.prefix import PrefixTask

PREFIX = SETTINGS | {"objective": "prefix", "optimizer": "muon", "steps": 30, "save-every": 10, "eval-every": 10}
FAMILIES = ("gpt2", "mistral")


def leak(network, split: int, token: int) -> float:
    """Return the change of the logits before `token` with it, which no rule shows to them."""
    ids = torch.randint(3, 61, (1, 16))
    other = ids.clone()
    other[0, token] = (ids[0, token] + 1) % 61
    visible = torch.tensor([split])
    before, after = (network(each, visible_lengths=visible).logits[:, :token] for each in (ids, other))
    return absolute(before, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_sees_itself_and_no_more(family, monkeypatch):
    network = randomized(tiny_config(family))
    assert all(leak(network, 7, token) == 0 for token in (7, 8, 15)) and leak(network, 7, 6) > 1e-3
    with monkeypatch.context() as broken:  # the whole row in both directions: the target of each position is in its input
        both = lambda causal, **rules: Mask(causal, **rules | {"visible_lengths": torch.tensor([16])})  # noqa: E731
        broken.setattr(model.stack, "Mask", both)
        assert leak(network, 7, 8) > 1e-3


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_before_a_prefix(method):
    """They are in front of all, see no text, and leave its positions the same rule; the cache holds both."""
    network = adapted("llama", method)
    assert leak(network, 7, 7) == leak(network, 7, 15) == 0 and leak(network, 7, 6) > 1e-3
    network.config = network.config.replace(bidirectional_prompt=True)
    prompt, options = torch.randint(3, 61, (8, 7)), {"max_new_tokens": 6, "temperature": 0.0}
    text = generate(network, prompt, use_cache=False, **options)
    assert torch.equal(generate(network, prompt, **options), text)
    logits = network(prompt, visible_lengths=torch.full((8,), 7)).logits[:, -1]
    assert torch.equal(logits.argmax(-1), text[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_reads_the_prompt_as_training_read_the_prefix(family):
    """Cached, not cached, left-padded, and beyond the context: the best token by a forward of the whole text each time."""
    network = randomized(tiny_config(family, bidirectional_prompt=True, context=24))
    text = prompt = torch.randint(3, 61, (8, 7))
    for _ in range(10):
        logits = network(text, visible_lengths=torch.full((8,), 7)).logits
        text = torch.cat((text, logits[:, -1:].argmax(-1)), 1)
    causal = randomized(tiny_config(family, context=24))
    options = {"max_new_tokens": 10, "temperature": 0.0}
    for cached in (True, False):
        assert torch.equal(generate(network, prompt, use_cache=cached, **options), text[:, 7:])
    assert not torch.equal(generate(causal, prompt, **options), text[:, 7:])
    padded = torch.cat((torch.zeros(8, 3, dtype=torch.long), prompt), 1), torch.tensor([[0] * 3 + [1] * 7] * 8)
    other = torch.full((1, 10), 9), torch.ones(1, 10, dtype=torch.long)
    ids, mask = map(torch.cat, zip(padded, other, strict=True))
    assert torch.equal(generate(network, ids, attention_mask=mask, **options)[:8], text[:, 7:])
    long = {"max_new_tokens": 40, "temperature": 0.0}
    assert torch.equal(generate(network, prompt, **long), generate(network, prompt, use_cache=False, **long))


def test_only_a_decoder_reads_a_prompt_so():
    with pytest.raises(ConfigError, match="only a decoder reads a prompt so"):
        tiny_config("bert", bidirectional_prompt=True)
    with pytest.raises(ConfigError, match="bidirectional_prompt='yes'"):
        tiny_config("gpt2", bidirectional_prompt="yes")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return arguments(PREFIX | {"corpus": write_corpus(folder / "corpus"), "cache": folder / "cache"})


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix") / "run"
    said = command(*options, "--sample-every", 30, "--out", folder)
    assert said.code == 0, said.err
    return folder, said.out


def test_a_run_learns(run):
    folder, out = run
    held_out = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "validation"]
    assert held_out[-1]["loss"] < held_out[0]["loss"] and held_out[-1]["shuffled_loss"] > 0
    assert "with another row's prefix" in out and "transformers would read it causally" in out and "[…]" in out


def test_a_folder_says_how_it_reads(run, tmp_path):
    """Generation obeys it; perplexity refuses; an export says so; training with another objective takes it away."""
    folder = last_checkpoint(run[0])
    assert model.hub.read_config(folder).bidirectional_prompt
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    network = model.hub.load(folder).eval()
    whole = network(ids, visible_lengths=torch.tensor([5])).logits[:, -1].argmax(-1)
    assert generate(network, ids, max_new_tokens=1, temperature=0.0)[:, 0] == whole
    model.hub.save(network, tmp_path / "again")
    assert model.hub.read_config(tmp_path / "again").bidirectional_prompt
    said = command("perplexity", run[0], main=eval.__main__.main)
    assert said.code == 2 and "it continues a prompt that it reads in both directions" in said.err
    said = command("export", run[0], "--out", tmp_path / "out", main=model.__main__.main)
    assert said.code == 0 and "transformers would read it causally" in said.out
    assert command("generate", run[0], "--prompt", "the file", "--max-new-tokens", 3, main=model.__main__.main).code == 0


def test_another_objective_takes_it_away(run, options, tmp_path):
    plain = [part if part != "prefix" else "clm" for part in further(options)]
    said = command(*plain, "--init", run[0], "--steps", 2, "--out", tmp_path / "clm")
    assert said.code == 0, said.err
    written = json.loads((last_checkpoint(tmp_path / "clm") / "config.json").read_text())
    assert "bidirectional_prompt" not in written
    adapted = ("--adapter", "lora", "--optimizer", "adamw", "--steps", 2)
    refused = command(*plain, "--init", run[0], *adapted, "--out", tmp_path / "one")
    assert refused.code == 2 and "reads a prompt in both directions, which an adapter cannot change" in refused.err
    refused = command(*further(options), "--init", tmp_path / "clm", *adapted, "--out", tmp_path / "two")
    assert refused.code == 2 and "reads a prompt causally, which an adapter cannot change" in refused.err


def test_the_wrong_prefix_is_scored_with_the_same_labels():
    """Equal ids give equal losses, and other ids others; in training there is no second loss."""
    from train.context_objective import ContextObjective

    objective = ContextObjective(randomized(tiny_config("gpt2")))
    ids = torch.randint(3, 61, (2, 9))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "visible_lengths": torch.tensor([3, 4]), "shuffled_ids": ids}
    result = objective.eval()(batch)
    assert absolute(result.metrics["shuffled_loss"].sum, result.terms["loss"].sum) == 0
    assert result.metrics["shuffled_loss"].count == 18
    other = objective(batch | {"shuffled_ids": ids.flip(0)})
    assert torch.equal(other.terms["loss"].sum, result.terms["loss"].sum)
    assert other.metrics["shuffled_loss"].sum != result.terms["loss"].sum
    assert not objective.train()(batch).metrics


def test_scores_and_the_shortest_row(options):
    """A row of two tokens has one split; one of a single token is refused before the text is read."""
    corpus, cache = (options[options.index(f"--{name}") + 1] for name in ("corpus", "cache"))
    data = DataConfig(corpus=(corpus,), cache=Path(cache), vocab_size=320, val_fraction=0.2)
    config = TrainConfig(run=RunConfig(objective="prefix"), data=data, network=NetworkConfig(context=2))
    task = PrefixTask(config, PrefixTask.open_data(config, None, lambda line: None))
    assert set(task.batch(task.stream.batch(0), 0, 0)["visible_lengths"].tolist()) == {1}
    labels = torch.cat([batch["labels"].flatten() for batch in task.validation])
    ids = torch.from_numpy(task.shards.train.ids.astype("int64"))
    counts = 1 + torch.bincount(ids[ids != task.tokenizer.bos_id], minlength=320).double()
    nats = -(counts / counts.sum()).log()[labels[labels >= 0]].mean()
    scores = task.scores({"loss": (6.0, 3), "shuffled_loss": (9.0, 3)})
    assert scores["loss"] == 2.0 and scores["shuffled_loss"] == 3.0 and math.isclose(scores["perplexity"], math.e**2)
    assert abs(scores["baseline_loss"] - nats) < 1e-9
    assert "1.0 % below the unigram baseline" in task.verdict(scores | {"loss": 0.99 * scores["baseline_loss"]})
    assert task.objective(randomized(tiny_config("gpt2")), sum, held_out=max).losses == {True: sum, False: max}
    longer = PrefixTask(replace(config, network=NetworkConfig(context=30)), task.shards)
    for i in (0, 3):
        fixed = prefix_batch(torch.ones(16, 31).long(), seed=0, step=VALIDATION_STEP, first_row=16 * i, bos_id=1)
        assert torch.equal(longer.validation[i]["visible_lengths"], fixed["visible_lengths"])
    with pytest.raises(TrainError, match="--context 1: a row has a prefix and a rest"):
        PrefixTask(replace(config, network=NetworkConfig(context=1)), task.shards)
