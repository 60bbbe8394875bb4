"""Next-sentence prediction beside transformers' BertForPreTraining: rows, loss and gradients of a batch, a run's folder."""

import json

import pytest
import torch
import transformers

import model.hub
from data.packing.segments import SegmentPair
from data.tokenizer.open import load_tokenizer
from data.transforms.next_sentence import next_sentence_batch, segment_template
from model.weights import to_published, weight_table
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, ROUNDING
from tests.oracle.wide import widen
from tests.runs import SETTINGS, arguments, assert_same_end, command, last_checkpoint, stopped_at, write_corpus
from train.objective import PretrainingObjective
from train.reports.log import read_metrics

TEXTS = [("the list of x", "the y"), ("x", "the list list y s")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "list", "of", "x", "y", "##s", "s"]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return load_tokenizer(tmp_path)


def batch_of(tokenizer, **changes):
    pairs = [
        SegmentPair(*(torch.tensor(tokenizer.encode(text)).numpy() for text in texts), label, (0, label))
        for label, texts in enumerate(TEXTS)
    ]
    masking = {"seed": 0, "step": 1, "first_row": 0, "mask_id": 4, "bos_id": 2, "special_ids": tokenizer.special_ids}
    masking |= {"vocab_size": len(WORDS), "mlm_probability": 0.5}
    return next_sentence_batch(pairs, segment_template(tokenizer), length=16, pad_id=0, **masking | changes)


def test_rows_are_those_of_the_library_s_tokenizer(tokenizer, tmp_path):
    batch = batch_of(tokenizer, mask_replace_prob=0.0, random_replace_prob=0.0)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(*map(list, zip(*TEXTS, strict=True)), padding="max_length", max_length=16, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["pair_labels"].tolist() == [0, 1]
    chosen = batch["labels"] != -100
    assert 3 < chosen.sum() < 12 and torch.equal(batch["labels"][chosen], batch["input_ids"][chosen])
    assert not torch.isin(batch["labels"], torch.tensor(sorted(tokenizer.special_ids))).any()
    filled = batch_of(tokenizer, scored=1)
    assert filled["pair_labels"].tolist() == [0, -100]
    assert (filled["labels"][1] == -100).all() and (filled["labels"][0] >= 0).any()


@pytest.mark.parametrize("is_learning", [True, False])
def test_loss_and_gradients(is_learning, tokenizer, tmp_path, parity):
    """The sum of both terms, each divided by its own count; token types are read."""
    config = tiny_config("bert", head="pretraining", pad_id=0, vocab_size=len(WORDS))
    network = randomized(config)
    model.hub.save(network, tmp_path / "bert")
    published = transformers.BertForPreTraining
    theirs = widen(published.from_pretrained(tmp_path / "bert", dtype=torch.float64, attn_implementation="eager").eval())
    batch, objective = batch_of(tokenizer), PretrainingObjective(network).train(is_learning)
    result, counts = objective(batch), objective.counts(batch)
    assert {name: term.count for name, term in result.terms.items()} == counts and counts["nsp"] == 2
    ours = sum(term.weight * term.sum / term.count for term in result.terms.values())
    own = {name: value for name, value in batch.items() if name != "pair_labels"}
    other = theirs(**own, next_sentence_label=batch["pair_labels"])
    ours.backward()
    other.loss.backward()
    errors, table, gradients = [mixed(ours, other.loss)], weight_table(config), dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        errors.append(mixed(to_published(table[name], parameter.grad, config), gradients[table[name].published].grad))
    parity("next sentence: loss and gradients", LIBRARY, max(errors), *ROUNDING)
    if is_learning:
        assert [*result.metrics] == ["nsp_loss"] and torch.equal(result.metrics["nsp_loss"].sum, result.terms["nsp"].sum)
        return
    right = (other.seq_relationship_logits.argmax(-1) == batch["pair_labels"]).sum()
    assert result.metrics["nsp_accuracy"] == (right, 2)
    words, chosen = other.prediction_logits.argmax(-1), batch["labels"] != -100
    assert result.metrics["accuracy"] == ((words == batch["labels"])[chosen].sum(), chosen.sum())


def test_terms_without_a_label_and_networks_without_types(tokenizer):
    network = randomized(tiny_config("roformer", head="pretraining", vocab_size=len(WORDS), token_types=1))
    batch = batch_of(tokenizer, scored=0)
    result = PretrainingObjective(network)(batch)
    assert all(not term.sum and term.count == 0 for term in result.terms.values())
    batch = batch_of(tokenizer)
    other = batch | {"token_type_ids": 1 - batch["token_type_ids"]}
    nats = [PretrainingObjective(network).eval()(each).terms["nsp"].sum for each in (batch, other)]
    assert torch.equal(*nats), "a network without token types does not read them"


def test_a_roformer_folder_opens_in_transformers_without_its_pairs(tmp_path, parity):
    """It has no class of both heads: the weights stand under BERT's names, and RoFormerForMaskedLM finds its own."""
    network = randomized(tiny_config("roformer", head="pretraining", vocab_size=len(WORDS), token_types=2))
    model.hub.save(network, tmp_path)
    theirs, loading = transformers.RoFormerForMaskedLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert all("pooler" in key or "seq_relationship" in key for key in loading["unexpected_keys"])
    ids, types = torch.randint(5, len(WORDS), (2, 9)), torch.tensor([[0] * 4 + [1] * 5] * 2)
    ours, other = network(ids, token_type_ids=types), widen(theirs.eval())(ids, token_type_ids=types)
    parity("next sentence: RoFormer's masked tokens", LIBRARY, mixed(ours.logits, other.logits), *ROUNDING)
    loaded = model.hub.load(tmp_path).eval()
    assert torch.equal(loaded(ids, token_type_ids=types).pair_logits, ours.pair_logits)


# ---- through the real command

PAIRS = {k: v for k, v in SETTINGS.items() if k not in ("preset", "heads")}
PAIRS |= {"objective": "mlm", "preset": "tiny-bert", "steps": 24, "eval-every": 12, "save-every": 8, "heads": 2}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return [*arguments(PAIRS | {"corpus": write_corpus(folder / "corpus"), "cache": folder / "cache"}), "--mlm.nsp"]


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "run"
    said = command(*options, "--mlm.whole-words", "--sample-every", 24, "--out", folder)
    assert said.code == 0, said.err
    return folder, said.out


def test_what_it_says(run):
    folder, shown = run
    rows = read_metrics(folder / "metrics.jsonl")
    held_out = [row for row in rows if row["split"] == "validation"]
    assert all({"loss", "baseline_loss", "masked_accuracy", "nsp_loss", "nsp_accuracy"} <= set(row) for row in held_out)
    assert held_out[0]["nsp_baseline_loss"] == pytest.approx(0.6931, abs=1e-4) and held_out[0]["nsp_pairs"] % 2 == 0
    learning = [row for row in rows if row["split"] == "train"]
    assert all(0 < row["nsp_loss"] < row["loss"] for row in learning)
    for part in ("next sentence: loss", "(guessing: 50 %)", "is the next", "is another", "of two segments", "of 4 pairs"):
        assert part in shown, part


@pytest.mark.slow
def test_a_resume_ends_in_the_same_bytes(run, options, tmp_path):
    said = stopped_at(10, *options, "--mlm.whole-words", "--sample-every", 24, "--out", tmp_path / "run")
    assert said.code == 130, said.err
    assert command("--resume", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", run[0], steps=24)


def test_a_run_s_folder_opens_in_transformers(run, parity):
    folder = last_checkpoint(run[0])
    theirs, loading = transformers.BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    inputs = transformers.AutoTokenizer.from_pretrained(folder)("the file reads", "a list of objects", return_tensors="pt")
    tokenizer = load_tokenizer(folder)
    halves = [tokenizer.with_special_tokens(tokenizer.encode(text)) for text in ("the file reads", "a list of objects")]
    assert inputs["input_ids"].tolist() == [halves[0] + halves[1]]
    types = torch.tensor([[0] * len(halves[0]) + [1] * len(halves[1])])
    network = model.hub.load(folder).eval()
    with torch.no_grad():
        ours = network(inputs["input_ids"], token_type_ids=types)
        other = theirs.eval()(inputs["input_ids"], token_type_ids=types)
    pairs = ((ours.logits, other.prediction_logits), (ours.pair_logits, other.seq_relationship_logits))
    parity("next sentence: a run's folder", LIBRARY, max(absolute(*pair) for pair in pairs), 1e-5, "float32 rounding")
