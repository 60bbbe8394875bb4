"""Span corruption and denoising of published folders beside transformers: the same loss and gradients on the same batch."""

import pytest
import torch
import transformers

import model.hub
from data.config import DataConfig
from data.tokenizer.open import load_tokenizer
from data.transforms.fill_spans import fill_spans
from data.transforms.span import find_sentinels
from model.weights import to_published, weight_table
from tests.compare import absolute, mixed
from tests.oracle.wide import widen
from tests.runs import write_corpus
from tests.seq2seq import gradients, write_folder
from train.config import NetworkConfig, OptimizerConfig, RecordedConfig, RunConfig
from train.losses.cross_entropy import linear_cross_entropy
from train.registry import config_type, load

LIBRARY = f"transformers {transformers.__version__}"
SENTINELS = [f"<extra_id_{number}>" for number in range(9, -1, -1)]  # as in T5's vocabulary: the first has the highest id
FOLDERS = {"t5": ("span", SENTINELS), "bart": ("denoise", ["<mask>"])}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    place = tmp_path_factory.mktemp("source")
    write_corpus(place / "corpus", 8)
    return place


@pytest.fixture(scope="module", params=list(FOLDERS))
def opened(request, corpus):
    """The folder, the task as a run with --init makes it, and the network in float64."""
    family, (objective, further) = request.param, FOLDERS[request.param]
    folder = corpus / family
    write_folder(folder, family, further)
    network = model.hub.load(folder, dtype=torch.float64)
    config = config_type(objective)(
        run=RunConfig(objective=objective, init=folder),
        data=DataConfig(corpus=(str(corpus / "corpus"),), val_fraction=0.3, cache=corpus / "cache"),
        network=NetworkConfig(context=40),
        optimizer=OptimizerConfig(batch_size=6),
        recorded=RecordedConfig(decoder_start_id=network.config.decoder_start_id),
    )
    data = load(objective).open_data(config, load_tokenizer(folder, network.config.vocab_size), lambda line: None)
    return folder, load(objective)(config, data), network


def test_loss_and_gradients(opened, parity):
    """Of a training batch, and of the last validation batch, whose rows differ in length. Their decoder inputs are theirs."""
    folder, task, network = opened
    objective = task.objective(network, linear_cross_entropy).train()
    theirs = widen(transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).train())
    batches = [task.source.batches(0)[0], {k: v for k, v in task.validation[-1].items() if not k.startswith("shuffled_")}]
    assert "attention_mask" in batches[1]
    errors, worst = [], []
    for batch in batches:
        term = objective(batch).terms["loss"]
        (term.sum / term.count).backward()
        theirs.zero_grad()
        labels = {"labels": batch["labels"], "attention_mask": batch.get("attention_mask")}
        expected = theirs(input_ids=batch["input_ids"], **labels).loss
        expected.backward()
        errors.append(absolute(term.sum / term.count, expected))
        published, table = dict(theirs.named_parameters()), weight_table(network.config)
        for key, gradient in gradients(network).items():
            other = published[table[key].published].grad
            worst.append(mixed(to_published(table[key], gradient, network.config), other))
    kind = task.config.run.objective
    parity(f"{kind}: loss of a batch", LIBRARY, max(errors), 1e-12, "float64 rounding")
    parity(f"{kind}: gradients of a batch", LIBRARY, max(worst), 1e-11, "float64 rounding; sums in another order")


def test_ids_are_those_of_its_tokenizer(opened):
    """Sentinels and the mask by name; affixes as transformers adds them; what is written back is the text."""
    folder, task, _ = opened
    tokenizer, batch = transformers.AutoTokenizer.from_pretrained(folder), task.source.batches(3)[0]
    block_BT = task.stream.batch(3)[:, :-1]
    if task.config.run.objective == "denoise":
        assert (batch["input_ids"] == tokenizer.mask_token_id).any(1).all()
        assert (batch["decoder_input_ids"][:, :2] == torch.tensor([tokenizer.eos_token_id, tokenizer.bos_token_id])).all()
        assert torch.equal(batch["labels"][:, 1:-1], block_BT)
    else:
        assert find_sentinels(task.tokenizer) == tokenizer.convert_tokens_to_ids(SENTINELS[::-1])
        assert find_sentinels(task.tokenizer)[0] == max(tokenizer.get_vocab().values())
        assert (batch["labels"][:, 0] == tokenizer.convert_tokens_to_ids("<extra_id_0>")).all()
        for source, target, ids in zip(batch["input_ids"], batch["labels"], block_BT, strict=True):
            assert fill_spans(source[:-1].tolist(), target[:-1].tolist(), find_sentinels(task.tokenizer)) == ids.tolist()
