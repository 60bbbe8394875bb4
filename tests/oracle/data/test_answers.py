"""Windows of a question over its context, beside transformers' tokenizers: ids, token types and offsets of each."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import transformers
from tokenizers import processors

from data.config import MASK
from data.tokenizer.open import load_tokenizer
from data.tokenizer.training import train_tokenizer
from data.transforms.answers import answer_tokens, answer_windows, cut_answer, window_labels, window_ranges
from data.transforms.framing import Framer
from tests.compare import count
from tests.folders import byte_level, write_tokenizer
from tests.oracle.model.test_folders import BOS, EOS, SPECIALS
from tests.oracle.model.test_network import LIBRARY
from tests.oracle.train.test_classify import PAIRED

QUESTIONS = ["the?", " What is  listed\tby x?"]
CONTEXTS = [
    "Return  the list of names, please.\n" * 4,
    "the quick brown fox \u00fcml\u00e4\u00fct \U0001f600x jumps over " * 3 + "</s> x [SEP]",
    " \u00e9\U0001f600\U0001f600 ",
    "x",
]
SIZES = [(16, 0), (16, 3), (24, 5), (120, 40)]
EXACT = "the same integers"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the list of x y ##s < > / s fox return names , . quick jumps over please umlaut".split()


def bert(folder: Path, side: str) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "truncation_side": side}))


def roberta(folder: Path, side: str) -> None:
    specials = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    named = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    named |= {"truncation_side": side, "pad_token": "<pad>", "unk_token": "<unk>", "tokenizer_class": "RobertaTokenizer"}
    around = processors.RobertaProcessing(EOS, BOS, add_prefix_space=False)
    write_tokenizer(folder, byte_level(specials, around), specials, **named)


def own(folder: Path, side: str) -> None:
    """A tokenizer as a new run trains one; transformers opens its tokenizer.json."""
    train_tokenizer([*CONTEXTS, *QUESTIONS] * 9, 330, [MASK]).save(folder)


def template(name: str):
    return lambda folder, side: write_tokenizer(folder, byte_level(SPECIALS, PAIRED[name]), SPECIALS, truncation_side=side)


KINDS = {name: template(name) for name in ("none", "bytes", "bos", "both", "two", "llama", "types", "inner")}
KINDS |= {"bert": bert, "roberta": roberta, "own": own}
PUBLISHED = [(kind, side) for kind in KINDS for side in ("right", "left") if (kind, side) != ("own", "left")]


@pytest.mark.parametrize(("kind", "side"), PUBLISHED)
def test_windows_are_those_of_transformers(kind, side, tmp_path, parity):
    """All ids, token types and offsets. Where ByteLevel has add_prefix_space ("inner"), the library leaves white space to
    the first token of a window, which is not compared; our own tokenizers have no token types (their networks have none)."""
    KINDS[kind](tmp_path, side)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    wrong, compared = [], 0
    options = dict.fromkeys(("return_overflowing_tokens", "return_offsets_mapping", "return_token_type_ids"), True)
    for max_length, stride in SIZES:
        framer = Framer(ours, max_length=max_length, is_pair=True)
        for question in QUESTIONS:
            room = max_length - framer.special_count - len(ours.encode(question, parse_special=True))
            if room <= stride:
                continue
            for context in CONTEXTS:
                window = {"truncation": "only_second", "max_length": max_length, "stride": stride}
                found = theirs([question], [context], **window, **options)
                windows = answer_windows(framer, question, context, stride)
                expected = list(zip(found["input_ids"], found["token_type_ids"], strict=True))
                assert len(windows) == len(expected)
                compared += len(windows)
                for number, (window, (ids, types)) in enumerate(zip(windows, expected, strict=True)):
                    inside = [place for place, text in enumerate(found.sequence_ids(number)) if text == 1]
                    offsets = [list(found["offset_mapping"][number][place]) for place in inside]
                    if kind == "inner":
                        offsets[0] = window.offset_C2[0].tolist()
                    same = window.ids.tolist() == ids and (kind == "own" or window.type_ids.tolist() == types)
                    same &= inside == list(range(window.begin, window.begin + len(inside)))
                    if not (same and window.offset_C2.tolist() == offsets):
                        wrong.append((question, context, number))
    assert compared > 12
    parity(f"question answering: windows, {kind}", LIBRARY, count(wrong), 0, EXACT)


def test_offsets_of_a_lossy_sentencepiece_model_are_the_librarys(tmp_path, parity):
    options = {"vocab_size": 30, "model_type": "unigram", "minloglevel": 2, "model_prefix": str(tmp_path / "spiece")}
    texts = iter(["the quick brown fox returns a list of names"] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, hard_vocab_limit=False, **options)
    tokenizer = load_tokenizer(tmp_path / "spiece.model")
    assert not tokenizer.is_lossless
    text = "  the  \ufb01x \U0001f600\u00e9 names</s> of"
    ids, offset_N2 = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text, parse_special=True) and tokenizer.eos_id in ids
    head = text[: text.index("</s>")]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    expected = theirs.encode(head, return_type="offset_mapping")["offsets"]
    wrong = [place for place, pair in enumerate(expected) if tuple(offset_N2[place]) != tuple(pair)]
    parity("offsets: SentencePiece", f"sentencepiece {sentencepiece.__version__}", count(wrong), 0, EXACT)
    begin, end = offset_N2[len(expected)]
    assert text[begin:end] == "</s>" and offset_N2[-1][1] == len(text) and offset_N2[len(expected) + 1][0] >= end


def test_labels_cover_the_answer_and_nothing_else(tmp_path):
    """Every span of a context, in every window: the label's tokens spell it; a window without all of it says none."""
    bert(tmp_path, "right")
    tokenizer = load_tokenizer(tmp_path)
    context, framer = "the lists of x, names. ys over", Framer(tokenizer, max_length=11, is_pair=True)
    windows = answer_windows(framer, "x y", context, 2)
    assert len(windows) > 2
    _, offset_N2 = tokenizer.encode_with_offsets(context)
    held = 0
    for first in range(len(offset_N2)):
        for last in range(first, len(offset_N2)):
            answer = cut_answer(context, int(offset_N2[first][0]), int(offset_N2[last][1]))
            assert answer_tokens(offset_N2, answer.start, answer.end) == (first, last)
            labels = window_labels(windows, answer)
            inside = [w.first <= first and last < w.first + len(w.offset_C2) for w in windows]
            assert (labels is None) == (not any(inside))
            for window, label, is_held in zip(windows, labels or [], inside, strict=False):
                assert (label != (0, 0)) == is_held
                if is_held:
                    held += 1
                    start, end = (window.offset_C2[place - window.begin] for place in label)
                    assert context[start[0] : end[1]] == answer.text
    assert held > 20


def test_an_answer_of_bytes_has_all_their_tokens(tmp_path):
    """A character that is spelled in several tokens, each with the offsets of all of it, does not turn start and end round."""
    own(tmp_path, "right")
    tokenizer = load_tokenizer(tmp_path)
    _, offset_N2 = tokenizer.encode_with_offsets("x \u6f22 y")
    place = [n for n, (begin, end) in enumerate(offset_N2.tolist()) if (begin, end) == (2, 3)]
    assert len(place) == 3 and answer_tokens(offset_N2, 2, 3) == (place[0], place[-1])
    assert tokenizer.encode_with_offsets("")[1].shape == (0, 2)
    marked, offsets = tokenizer.encode_with_offsets("a</s>b")
    assert marked == tokenizer.encode("a</s>b", parse_special=True) and offsets.tolist() == [[0, 1], [1, 5], [5, 6]]


@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 40])
def test_ranges_cover_all_tokens(total):
    for room, stride in ((8, 0), (8, 3), (8, 7), (1, 0)):
        for from_end in (False, True):
            ranges = window_ranges(total, room, stride, from_end=from_end)
            assert set().union(*(range(*pair) for pair in ranges)) == set(range(total))
            assert all(end - first <= room for first, end in ranges)
            assert all(min(a[1], b[1]) - max(a[0], b[0]) == stride for a, b in pairwise(ranges))
    assert np.array(window_ranges(20, 8, 3)).tolist() == [[0, 8], [5, 13], [10, 18], [15, 20]]
