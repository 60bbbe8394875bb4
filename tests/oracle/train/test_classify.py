"""Classifying texts, beside transformers: ids of one text and of two, loss and gradients of a batch, predictions of a run."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F

import model.__main__
import model.hub
from data.tokenizer.open import load_tokenizer
from data.transforms.framing import Framer
from model.predict import Text, pad_batch, probabilities
from model.weights import head_spec, to_published, weight_table
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, write_tokenizer
from tests.oracle.model.test_folders import PROCESSORS, SPECIALS, template
from tests.oracle.model.test_network import LIBRARY, ROUNDING, how
from tests.oracle.wide import widen
from tests.runs import WORDS, command, last_checkpoint
from train.label_objective import LabelObjective, multiclass_loss

BOS, EOS = ("<s>", 330), ("</s>", 331)
PAIRED = PROCESSORS | {
    "llama": processors.TemplateProcessing(single="<s> $A", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[BOS]),
    "t5": processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B:0 </s>:0", special_tokens=[EOS]),
    "types": processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[BOS, EOS]
    ),
    "inner": processors.Sequence([processors.ByteLevel(), template("<s> $A", BOS)]),
}
TEXTS = ["the list", "", "Return the list of names, please.", "x <s> y</s>", "the quick brown fox jumps over the lazy dog " * 2]


@pytest.mark.parametrize("around", PAIRED)
def test_ids_are_those_of_transformers(around, tmp_path):
    """Of each two texts, cut to all lengths that the frame leaves room for; a control token that is written out too."""
    write_tokenizer(tmp_path, byte_level(SPECIALS, PAIRED[around]), SPECIALS)
    compare_ids(tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["BertTokenizer", "RobertaTokenizer"])
def test_ids_of_published_kinds(kind, side, tmp_path):
    if kind == "BertTokenizer":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "list", "of", "x", "y", "##s", "<", ">", "/", "s"]
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "truncation_side": side}))
    else:
        specials = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
        named = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
        around = processors.RobertaProcessing(EOS, BOS, add_prefix_space=False)
        named |= {"truncation_side": side, "pad_token": "<pad>", "unk_token": "<unk>", "tokenizer_class": kind}
        write_tokenizer(tmp_path, byte_level(specials, around), specials, **named)
    compare_ids(tmp_path)


def compare_ids(folder: Path) -> None:
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for room in (7, 8, 11, 24, 99):
        one, two = Framer(ours, max_length=room), Framer(ours, max_length=room, is_pair=True)
        for first in TEXTS:
            options = {"truncation": True, "max_length": room, "return_token_type_ids": True}
            expected = theirs(first, **options)
            if expected["input_ids"]:
                assert one(first).ids == expected["input_ids"], (room, first)
            for second in TEXTS:
                expected = theirs([first], [second], **options)  # of a list: alone, an empty second text would be none
                if expected["input_ids"][0]:
                    framed = two(first, second)
                    assert framed.ids == expected["input_ids"][0], (room, first, second)
                    assert framed.type_ids == expected["token_type_ids"][0], (room, first, second)
                    assert framed.truncated == len(theirs([first], [second])["input_ids"][0]) - len(framed.ids)


FAMILIES = ("bert", "roberta", "roformer", "gpt2", "llama", "qwen3", "t5", "t5-gated", "bart")


def batch_of(config, *, several: bool) -> dict[str, torch.Tensor]:
    """Four texts of 9 to 3 tokens, the last of which only fills the batch up; each ends as BART's head looks for."""
    ids, mask = torch.randint(3, 61, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    for row, length in enumerate((9, 6, 4, 3)):
        ids[row, length:], mask[row, length:], ids[row, length - 1] = config.pad_id, 0, config.eos_id
    types = (torch.arange(9) > 2).long().expand(4, 9) * mask
    labels = torch.tensor([[[1, 0, 1]], [[0, 0, 0]], [[0, 1, 0]], [[-100] * 3]]) if several else torch.tensor([2, 0, 1, -100])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, several, tmp_path, parity):
    kind = "multi_label_classification" if several else "single_label_classification"
    named = {"problem_type": kind, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = tiny_config(family, head="sequence", labels=3, pad_id=1 if family == "roberta" else 0, extra=named)
    config = config.replace(token_types=2) if family == "roformer" else config
    network = randomized(config)
    model.hub.save(network, tmp_path)
    published = getattr(transformers, head_spec(config).architecture)
    theirs = widen(published.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation=how(config)).eval())
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"} and theirs.config.problem_type == kind
    batch, objective = batch_of(config, several=several), LabelObjective(network)
    result = objective.train()(batch)
    assert objective.counts(batch)["loss"] == result.terms["loss"].count == 3 and not result.metrics
    ours = result.terms["loss"].sum / result.terms["loss"].count
    own = {name: value[:3] for name, value in batch.items()}
    own["labels"] = own["labels"][:, 0].double() if several else own["labels"]
    if config.token_types < 2:
        own.pop("token_type_ids")
    other = theirs(**own)
    ours.backward()
    other.loss.backward()
    errors, table, gradients = [mixed(ours, other.loss)], weight_table(config), dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        errors.append(mixed(to_published(table[name], parameter.grad, config), gradients[table[name].published].grad))
    parity(f"{family}: classification, {'several labels' if several else 'one label'}", LIBRARY, max(errors), *ROUNDING)


def test_weights_follow_torchs_sum(parity):
    """Each text's share is its class's weight over the number of texts; smoothing beside weights as torch has it."""
    logits_BC, labels_B = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, -100, 1, 1, 0])
    weight_C = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    there = [(row, int(label)) for row, label in enumerate(labels_B) if label >= 0]
    by_hand = -sum(weight_C[label] * logits_BC[row].log_softmax(-1)[label] for row, label in there)
    theirs = torch.nn.CrossEntropyLoss(weight_C, reduction="sum", label_smoothing=0.1)(logits_BC, labels_B)
    errors = [mixed(multiclass_loss(logits_BC, labels_B, weight_C), by_hand)]
    errors.append(mixed(multiclass_loss(logits_BC, labels_B, weight_C, smoothing=0.1), theirs))
    parity("classification: class weights", f"torch {torch.__version__}", max(errors), *ROUNDING)


def test_weights_of_several_labels_are_torchs(parity):
    logits_BC = torch.randn(5, 3, dtype=torch.float64)
    labels_BC = torch.randint(0, 2, (5, 3))
    weight_C = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    objective = LabelObjective(randomized(tiny_config("bert", head="sequence", labels=3)), weight_C=weight_C)
    objective.network.forward = lambda **_: type("Output", (), {"logits": logits_BC})
    ours = objective.train()({"input_ids": labels_BC, "labels": labels_BC[:, None]}).terms["loss"]
    theirs = F.binary_cross_entropy_with_logits(logits_BC, labels_BC.double(), pos_weight=weight_C)
    parity("classification: label weights", f"torch {torch.__version__}", mixed(ours.sum / ours.count, theirs), *ROUNDING)


# ---- runs


def write_labelled(path: Path, records: int = 160, seed: int = 0) -> Path:
    """A word decides the class; a text is short or long."""
    draw = random.Random(seed)
    marks = {"good": ["default", "open"], "bad": ["raised", "error"], "10": ["buffer"]}
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            label = draw.choices(list(marks), [5, 3, 2])[0]
            words = [draw.choice(marks[label]), f"{number}", *draw.choices(WORDS[:12], k=draw.randint(2, 14))]
            tags = [label, "long"] if len(words) > 9 else [label] * (label != "10")
            second = " ".join(draw.choices(WORDS[:12], k=draw.randint(1, 9)))
            file.write(json.dumps({"text": " ".join(words), "second": second, "label": label, "tags": tags}) + "\n")
    return path


def word_piece(folder: Path) -> None:
    """BERT's kind of tokenizer, trained on the words of these tests."""
    made = Library(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator([" ".join(WORDS) + " 0 1 2 3 4 5 6 7 8 9"] * 9, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=specials, show_progress=False
    ))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    roles = dict(zip(("pad", "unk", "cls", "sep", "mask"), specials, strict=True))
    write_tokenizer(folder, made, specials, **{f"{role}_token": name for role, name in roles.items()})


NAMED = {"pad_token": "<pad>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
START = {  # what a run begins with: family, options, its tokenizer
    "bert pairs": ("bert", ["--classify.pair", "second"], word_piece),
    "bert several": ("bert", ["--classify.label", "tags", "--classify.multi"], word_piece),
    "gpt2": ("gpt2", [], lambda folder: write_tokenizer(folder, byte_level(["<|endoftext|>"]), ["<|endoftext|>"])),
    "llama": ("llama", [], lambda folder: write_tokenizer(folder, byte_level(SPECIALS, "<s>"), SPECIALS)),
    "t5": ("t5", ["--classify.pair", "second"], lambda folder: write_tokenizer(
        folder, byte_level(["<pad>", "</s>"], PAIRED["t5"]), ["<pad>", "</s>"], **NAMED
    )),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "llama" else name for name in START])
def test_predictions_of_a_run_are_the_pipelines(name, tmp_path, parity):
    """Begun from a folder without a head, trained, predicted; and opened by transformers' pipeline with the names of labels."""
    family, options, write = START[name]
    write(tmp_path / "base")
    ids = {"eos_id": 331} if family == "t5" else {"eos_id": None, "bos_id": None}
    config = tiny_config(family, vocab_size=340, pad_id=0 if family == "bert" else None, **ids, context=64)
    config = config if family == "t5" else config.replace(head="none" if family == "bert" else "lm")
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "base")
    corpus = write_labelled(tmp_path / "corpus.jsonl")
    settings = ["--steps", 6, "--batch-size", 4, "--val-fraction", 0.2, "--sample-every", 6, "--threads", 1, "--device", "cpu"]
    said = command(
        "--objective", "classify", "--init", tmp_path / "base", "--corpus", corpus, *settings, *options,
        "--out", tmp_path / "run",
    )
    assert said.code == 0, said.err
    folder, out = last_checkpoint(tmp_path / "run"), tmp_path / "predicted.jsonl"
    done = command("predict", folder, corpus, "--out", out, main=model.__main__.main)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    pipeline = transformers.pipeline(
        "text-classification", model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), top_k=None,
        truncation=True, max_length=64,
    )
    pair = "--classify.pair" in options
    errors = []
    for row in rows[:40]:
        given = {"text": row["text"], "text_pair": row["second"]} if pair else row["text"]
        found = pipeline(given)
        found = found[0] if isinstance(found[0], list) else found
        chances = {each["label"]: each["score"] for each in found}
        errors.append(absolute(chances, row["probabilities"]))
        if "--classify.multi" in options:
            assert row["predicted"] == [label for label, chance in row["probabilities"].items() if chance > 0.5]
        else:
            assert row["predicted"] == max(chances, key=chances.get)
    parity(f"classification run: {name}", LIBRARY, max(errors), 1e-5, "float32 rounding")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoders_last_token_is_found_by_its_pad(family, tmp_path, parity):
    """A batch of unequal texts: transformers looks for the last id that is no pad, we for the last that is seen."""
    config = tiny_config(family, head="sequence", labels=3, pad_id=0)
    network = randomized(config)
    model.hub.save(network, tmp_path)
    theirs = widen(transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=how(config)
    ).eval())
    texts = [Text([5, 7, 2]), Text([9, 8, 7, 6, 5]), Text([4])]
    with torch.no_grad():
        other = theirs(**pad_batch(texts, 0, types=False)).logits.softmax(-1)
    parity(f"{family}: classification, padded", LIBRARY, mixed(probabilities(network, texts), other), *ROUNDING)
