"""A run of `--objective qa` opened by transformers: the same logits, and the answers that its own search finds in them."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers.pipelines.document_question_answering import decode_spans

import model.__main__
import model.hub
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from tests.folders import byte_level, write_tokenizer
from tests.oracle.model.test_folders import SPECIALS
from tests.oracle.model.test_network import LIBRARY
from tests.oracle.train.test_classify import PAIRED, word_piece
from tests.questions import write_questions
from tests.runs import command, last_checkpoint

START = {
    "bert": word_piece,
    "llama": lambda folder: write_tokenizer(folder, byte_level(SPECIALS, PAIRED["llama"]), SPECIALS),
    "own": None,
}
LENGTH, STRIDE, LONGEST = 48, 12, 8


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "llama" else name for name in START])
def test_predictions_of_a_run(name, tmp_path, parity):
    """Windows by the library's tokenizer, logits by its class, spans by decode_spans of each, the best of all; the text is cut
    by its offsets. No answer where the first token scores more. "own": a run from nothing, its tokenizer too."""
    corpus = write_questions(tmp_path / "corpus.jsonl", 40)
    options = ["--steps", 6, "--batch-size", 4, "--val-fraction", 0.3, "--threads", 1, "--device", "cpu", "--sample-every", 0]
    options += ["--qa.max-length", LENGTH, "--qa.stride", STRIDE, "--qa.max-answer", LONGEST, "--corpus", corpus]
    if START[name] is None:
        options += ["--width", 32, "--depth", 1, "--heads", 2, "--cache", tmp_path / "cache"]
    else:
        START[name](tmp_path / "base")
        config = tiny_config(name, vocab_size=340, context=64, pad_id=0)
        model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "base")
        options += ["--init", tmp_path / "base"]
    said = command("--objective", "qa", *options, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    folder, out = last_checkpoint(tmp_path / "run"), tmp_path / "predicted.jsonl"
    done = command("predict", folder, corpus, "--top", 3, "--score", "--out", out, main=model.__main__.main)
    assert done.code == 0 and "exact match" in done.out and "(40 questions)" in done.out, done.err
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer, errors, answered = transformers.AutoTokenizer.from_pretrained(folder), [], 0
    for row in map(json.loads, out.read_text().splitlines()):
        found = tokenizer(
            [row["question"]], [row["context"]], truncation="only_second", max_length=LENGTH, stride=STRIDE,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )
        best, null = {}, np.inf
        for number, ids in enumerate(found["input_ids"]):
            types = {"token_type_ids": torch.tensor([found["token_type_ids"][number]])} if name == "bert" else {}
            with torch.no_grad():
                output = theirs(input_ids=torch.tensor([ids]), **types)
            start_1T, end_1T = output.start_logits.double().numpy(), output.end_logits.double().numpy()
            inside = np.array([[float(text == 1) for text in found.sequence_ids(number)]])
            spans = decode_spans(np.exp(start_1T) * inside, np.exp(end_1T) * inside, 20, LONGEST, inside)
            null = min(null, np.exp(start_1T[0, 0] + end_1T[0, 0]))
            for start, end, score in zip(*spans, strict=True):
                offsets = found["offset_mapping"][number]
                place = offsets[start][0], offsets[end][1]
                best[place] = max(best.get(place, 0), score)
        ordered = sorted(best.items(), key=lambda item: -item[1])[:20]
        total = sum(score for _, score in ordered) + null
        candidates = [(row["context"][slice(*place)].strip(), score / total) for place, score in ordered] + [("", null / total)]
        candidates.sort(key=lambda item: -item[1])
        text, chance = candidates[0]
        assert row["predicted"] == text
        assert [each["text"] for each in row["top"]] == [each for each, _ in candidates[:3]]
        errors += [absolute(row["probability"], chance)]
        errors += [absolute([each["probability"] for each in row["top"]], [each for _, each in candidates[:3]])]
        if text:
            answered += 1
            assert row["context"][row["start"] :].startswith(text)
        else:
            assert row["start"] is None
    assert answered or name != "bert"
    parity(f"question answering run: {name}", LIBRARY, max(errors), 1e-5, "float32 rounding")


def test_a_classifier_becomes_an_answerer(tmp_path):
    """--init of a network with three classes: two outputs, and no names of classes, so that transformers opens it."""
    word_piece(tmp_path / "base")
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = tiny_config("bert", head="sequence", labels=3, vocab_size=340, context=64, extra=names)
    model.hub.save(randomized(config, dtype=torch.float32), tmp_path / "base")
    corpus = write_questions(tmp_path / "corpus.jsonl", 30)
    options = ["--steps", 1, "--batch-size", 4, "--val-fraction", 0.3, "--threads", 1, "--device", "cpu"]
    said = command("--objective", "qa", "--init", tmp_path / "base", "--corpus", corpus, *options, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    folder = last_checkpoint(tmp_path / "run")
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    assert theirs.qa_outputs.weight.shape == (2, config.width) and theirs.config.num_labels == 2
    ours, ids = model.hub.load(folder), torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        other = theirs.eval()(input_ids=ids)
        logits_BT2 = ours(input_ids=ids).logits
    error = absolute(logits_BT2, torch.stack([other.start_logits, other.end_logits], -1))
    assert error < 1e-5
