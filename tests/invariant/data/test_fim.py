"""Fill in the middle: parts that join to the document, shares, lengths, ends, and a function of (seed, step, row) alone."""

import math

import numpy as np
import pytest
import torch

from data.config import DataError
from data.packing.blocks import FILLER
from data.packing.document_blocks import DocumentBlocks
from data.tokenizer.open import load_tokenizer
from data.tokenizer.sentencepiece import SentencePieceTokenizer
from data.tokenizer.training import train_tokenizer
from data.transforms.causal import IGNORE, clm_batch
from data.transforms.fim import (
    DOCUMENT,
    FORMATS,
    MID,
    MIDDLE,
    PRE,
    SUF,
    SUFFIX,
    VALIDATION_STEP,
    Choice,
    FillInMiddle,
    Format,
    find_format,
    keep_middle_labels,
    with_wrong_suffix,
)
from tests.texts import prose

TRAINED = ("starcoder", "santacoder", "codellama", "qwen", "deepseek")
TEXTS = [prose(seed, words=30) for seed in range(12)] + ["", "x", "é\U0001f600\u2581", "a <fim_suffix> b", " two  spaces\n\n"]


@pytest.fixture(scope="module")
def tokenizers():
    """One a format, all trained on the same text."""
    return {name: train_tokenizer(TEXTS, 480, tuple(FORMATS[name].names.values())) for name in TRAINED}


def parts_of(fim: FillInMiddle, ids: list[int]) -> dict[str, str]:
    """Read the parts of a transformed text back by its tokens, in either order; the last one ends with the end."""
    assert ids[-1] == fim.end_id
    pre, suf, mid = (ids.index(fim.ids[role]) for role in (PRE, SUF, MID))
    assert [ids.count(fim.ids[role]) for role in (PRE, SUF, MID)] == [1, 1, 1] and pre < suf < mid
    first, second, third = (fim.tokenizer.decode(part) for part in (ids[pre + 1 : suf], ids[suf + 1 : mid], ids[mid + 1 : -1]))
    return {"order": "psm" if suf > pre + 1 or not first else "spm", "a": first, "suffix": second, "b": third}


def joined(fim: FillInMiddle, ids: list[int]) -> str:
    """The document: in both orders what stands before the suffix, then what stands behind MID, then the suffix."""
    parts = parts_of(fim, ids)
    return parts["a"] + parts["b"] + parts["suffix"]


@pytest.mark.parametrize("name", TRAINED)
def test_parts_join_to_the_document(name, tokenizers):
    tokenizer = tokenizers[name]
    assert find_format(tokenizer) == name
    empty = set()
    for spm_rate in (0.0, 1.0):
        fim = FillInMiddle(tokenizer, name, rate=1.0, spm_rate=spm_rate, seed=3)
        for index, text in enumerate(TEXTS):
            for epoch in range(8):
                ids = fim.transform_document(tokenizer.encode(text), epoch, index)
                assert joined(fim, ids) == text
                assert ids[0] == fim.ids[PRE] and (ids[1] == fim.ids[SUF] or spm_rate == 0)
                empty |= {key for key, part in fim.split(text, fim.choose(1, epoch, index)).items() if not part and text}
    assert empty == {"prefix", "middle", "suffix"}


def test_a_wrong_order_is_seen(tokenizers, monkeypatch):
    """Mutants: SUF and MID exchanged, and the suffix last."""
    tokenizer, text = tokenizers["starcoder"], TEXTS[0]
    for psm in ((PRE, "prefix", MID, "middle", SUF, "suffix"), (PRE, "suffix", SUF, "prefix", MID, "middle")):
        monkeypatch.setitem(FORMATS, "starcoder", Format(FORMATS["starcoder"].names, {"psm": psm}, ("psm",)))
        fim = FillInMiddle(tokenizer, "starcoder", rate=1.0, spm_rate=0.0)
        ids = fim.transform_document(tokenizer.encode(text), 0, 0)
        with pytest.raises(AssertionError):
            assert joined(fim, ids) == text


@pytest.mark.parametrize("order", ["psm", "spm"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_prompt_is_a_training_row_up_to_its_middle(name, order, tokenizers):
    """Without a seam (Code Llama's spm) too, except where a token of the row has letters of both prefix and middle."""
    tokenizer, crossed, whole = tokenizers[name], 0, 0
    fim = FillInMiddle(tokenizer, name, rate=1.0, spm_rate=float(order == "spm"))
    for index, text in enumerate(TEXTS):
        for epoch in range(6):
            row = fim.transform_document(tokenizer.encode(text), epoch, index)
            parts = fim.split(text, fim.choose(DOCUMENT, epoch, index))
            prompt = fim.build_prompt(parts["prefix"], parts["suffix"], order)
            if order == "psm" or name != "codellama":
                assert row == [*prompt, *fim.encode(parts["middle"]), fim.end_id]
                continue
            begin = prompt.index(fim.ids[MID]) + 1
            assert row[:begin] == prompt[:begin]
            borders = {len(tokenizer.decode(row[begin:end])) for end in range(begin, len(row))}
            is_crossed = len(parts["prefix"]) not in borders
            crossed, whole = crossed + is_crossed, whole + (not is_crossed)
            assert is_crossed or row[: len(prompt)] == prompt
    assert (crossed > 20 and whole > 20) == (order == "spm" and name == "codellama")


def test_the_order_of_a_prompt(tokenizers):
    """By default the first published one; Codestral's has no other."""
    fim = FillInMiddle(tokenizers["qwen"], "qwen")
    assert fim.build_prompt("a", "b") == fim.build_prompt("a", "b", "psm") != fim.build_prompt("a", "b", "spm")
    tokenizer = train_tokenizer(TEXTS, 480, ("[PREFIX]", "[SUFFIX]"))
    fim = FillInMiddle(tokenizer, find_format(tokenizer))
    expected = [4, *fim.encode("the b"), 3, *tokenizer.encode("a")]
    assert fim.build_prompt("a", "the b") == fim.build_prompt("a", "the b", "spm") == expected
    with pytest.raises(DataError, match="the format codestral has no order psm: it has spm"):
        fim.build_prompt("a", "the b", "psm")


def test_shares_and_cuts(tokenizers):
    """Within 3 standard errors: transformed texts, those in spm, and the mean of each cut, 1/3 and 2/3 of the length."""
    fim = FillInMiddle(tokenizers["starcoder"], "starcoder", rate=0.7, spm_rate=0.2)
    choices = [fim.choose(0, step, row, piece) for step in range(20) for row in range(100) for piece in range(5)]
    count, moved = len(choices), [choice for choice in choices if choice.order]
    assert abs(len(moved) / count - 0.7) < 3 * math.sqrt(0.7 * 0.3 / count)
    spm = sum(choice.order == "spm" for choice in moved) / len(moved)
    assert abs(spm - 0.2) < 3 * math.sqrt(0.2 * 0.8 / len(moved))
    assert len(set(choices)) == count
    lengths = np.array([[len(part) for part in fim.split("x" * 9, choice).values()] for choice in choices])
    counts = np.bincount(lengths[:, 0] * 10 + lengths[:, 0] + lengths[:, 1], minlength=100).reshape(10, 10)
    expected = count / 100 * (np.triu(np.full((10, 10), 2.0), 1) + np.eye(10))  # two of 0 … 9, sorted
    scored = expected > 0
    assert (((counts - expected)[scored] ** 2 / expected[scored]).sum()) < 91.9 and not counts[~scored].any()  # 0.999, 54 d.f.


def rows(tokenizer, length=80, count=6, seed=0):
    """Blocks of packed documents of different lengths."""
    draw, ids = np.random.default_rng(seed), []
    while len(ids) < count * length:
        ids += tokenizer.as_document(tokenizer.encode(prose(int(draw.integers(1000)), words=int(draw.integers(1, 60)))))
    return torch.tensor(ids[: count * length]).view(count, length)


def pieces(row: list[int], bos_id: int) -> list[list[int]]:
    starts = sorted({0, *(t for t, id in enumerate(row) if id == bos_id)})
    return [row[start:end] for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]


@pytest.mark.parametrize("name", ["starcoder", "codellama"])
@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_a_piece_keeps_its_length_and_gets_an_end(name, spm_rate, tokenizers):
    tokenizer = tokenizers[name]
    fim, block = FillInMiddle(tokenizer, name, rate=1.0, spm_rate=spm_rate), rows(tokenizers[name])
    ids, kinds = fim.transform_blocks(block, 4, 0)
    assert ids.shape == kinds.shape == block.shape and torch.equal(ids == tokenizer.bos_id, block == tokenizer.bos_id)
    changed = truncated = 0
    for new, old in zip(ids.tolist(), block.tolist(), strict=True):
        for piece, before in zip(pieces(new, tokenizer.bos_id), pieces(old, tokenizer.bos_id), strict=True):
            if piece == before:
                continue
            text, found = tokenizer.decode(before), joined(fim, piece)
            assert text.startswith(found)
            changed, truncated = changed + 1, truncated + (found != text)
    assert changed >= 8 and truncated >= 4
    assert (kinds[ids == fim.end_id] == MIDDLE).any() and not (ids == FILLER).any()


def test_any_slice_of_a_step_is_the_same(tokenizers):
    tokenizer = tokenizers["starcoder"]
    fim, block = FillInMiddle(tokenizer, "starcoder", seed=5), rows(tokenizer)
    whole = fim.transform_blocks(block, 7, 10)[0]
    parts = torch.cat([fim.transform_blocks(block[first:end], 7, 10 + first)[0] for first, end in ((0, 1), (1, 4), (4, 6))])
    assert torch.equal(whole, parts)
    other = FillInMiddle(tokenizer, "starcoder", seed=6)
    for transform, step, first in ((fim, 8, 10), (fim, 7, 11), (other, 7, 10)):
        assert not torch.equal(whole, transform.transform_blocks(block, step, first)[0])
    assert torch.equal(FillInMiddle(tokenizer, "starcoder", rate=0.0).transform_blocks(block, 7, 10)[0], block)


def test_a_suffix_is_padded(tokenizers):
    """Text that is spelled in bytes becomes shorter when it is tokenized again: padding, or fillers where there is none."""
    for name, filled in (("starcoder", None), ("codellama", FILLER)):
        tokenizer = tokenizers[name]
        fim = FillInMiddle(tokenizer, name, rate=1.0)
        bytes_of = {content: id for id, content in reversed(list(enumerate(tokenizer.token_bytes))) if len(content) == 1}
        text = TEXTS[0][:60]
        body = [bytes_of[bytes([byte])] for byte in text.encode()]
        bits = Choice("psm", 15, 40)
        ids, kinds = fim.transform_piece([1, *body, 2], bits, is_last=True)
        filler = fim.pad_id if filled is None else filled
        assert len(ids) == len(body) + 2 == len(kinds) and ids.count(filler) > 5
        kept = [id for id in ids[1:] if id != filler]
        assert joined(fim, kept) == text
        inside = ids[ids.index(fim.ids[SUF]) : ids.index(fim.ids[MID])]
        assert inside.count(filler) == (ids.count(filler) if filled is None else 0)
        if filled is not None:
            labels = clm_batch(torch.tensor([ids]), 1, 2)["labels"]
            assert (labels[0, ids.index(FILLER) - 1 :] == IGNORE).all()


def test_what_stays_left_to_right(tokenizers):
    """A piece with fillers, one that begins inside a character, one whose suffix is too short for the tokens."""
    tokenizer = tokenizers["starcoder"]
    fim = FillInMiddle(tokenizer, "starcoder", rate=1.0)
    body = tokenizer.encode(TEXTS[0])
    first = Choice("psm", 0, 0)
    half = tokenizer.encode("\u4e2d")[1:] + body
    assert len(half) == len(body) + 2
    for piece, choice in (([1, *body, FILLER], first), ([*half, 2], first), ([1, *body, 2], Choice("psm", 3, len(TEXTS[0])))):
        assert fim.transform_piece(list(piece), choice, is_last=True)[0] == piece
    assert fim.transform_piece([1, *body, 2], first, is_last=True)[0] != [1, *body, 2]
    assert fim.transform_piece([1, 2], first, is_last=True)[0] == [1, 2]
    choices = [Choice("psm", 3, end) for end in range(100, len(TEXTS[0]) + 1)]
    short = [fim.transform_piece([1, *body, 2], choice, is_last=True)[0] for choice in choices]
    moved = [ids for ids in short if ids[1] == fim.ids[PRE]]
    assert min(ids.index(fim.ids[MID]) - ids.index(fim.ids[SUF]) for ids in moved) == 1  # a suffix may be truncated to nothing
    assert len(moved) < len(short)


def test_labels_of_middles(tokenizers):
    """Middles with their end alone, whose suffixes are those of other gaps in `shuffled_ids`."""
    tokenizer = tokenizers["starcoder"]
    fim = FillInMiddle(tokenizer, "starcoder", rate=1.0, spm_rate=0.0)
    ids, kinds = fim.transform_blocks(rows(tokenizer), VALIDATION_STEP, 0)
    batch = clm_batch(ids, tokenizer.bos_id, tokenizer.eos_id)
    labels = keep_middle_labels(batch["labels"], kinds, IGNORE)
    for row, own in zip(ids.tolist(), labels.tolist(), strict=True):
        expected, inside = [], False
        for id in row:
            expected.append(id if inside else IGNORE)
            inside = (inside or id == fim.ids[MID]) and id != fim.end_id
        assert own == expected[1:]
    wrong = with_wrong_suffix(batch, kinds, fim.pad_id)["shuffled_ids"]
    is_suffix = (kinds[:, :-1] == SUFFIX) & (batch["input_ids"] != fim.pad_id)
    assert torch.equal(wrong[~is_suffix], batch["input_ids"][~is_suffix])
    assert (wrong != batch["input_ids"])[is_suffix].double().mean() > 0.8


def test_a_wrong_suffix_is_that_of_another_gap():
    """Cut or repeated to its length; padding stays, and nothing of a gap's own suffix is left."""
    kinds = torch.tensor([[0, SUFFIX, SUFFIX, SUFFIX, 0, SUFFIX, 0], [0, SUFFIX, SUFFIX, 0, 0, 0, 0]])
    ids = torch.tensor([[1, 10, 11, 12, 1, 20, 1], [1, 30, 9, 1, 1, 1, 1]])
    wrong = with_wrong_suffix({"input_ids": ids[:, :-1]}, kinds, pad_id=9)["shuffled_ids"]
    assert wrong.tolist() == [[1, 20, 20, 20, 1, 30], [1, 10, 9, 1, 1, 1]]


def test_one_token_that_begins_and_ends(tokenizers):
    """Then the next document's bos ends a middle, and only the last piece of a row has an end of its own. Both are scored."""
    import copy

    tokenizer = copy.copy(tokenizers["starcoder"])
    tokenizer.bos_id = tokenizer.eos_id = 1
    tokenizer.affixes = type(tokenizer.affixes)()
    fim, body = FillInMiddle(tokenizer, "starcoder", rate=1.0, spm_rate=0.0), tokenizer.encode(TEXTS[0])
    row = [1, *body, 1, *tokenizer.encode(TEXTS[1])]
    ids, kinds = fim.transform_blocks(torch.tensor([row] * 8), 0, 0)
    labels = keep_middle_labels(clm_batch(ids, 1, 1)["labels"], kinds, IGNORE)
    changed = 0
    for new, scored in zip(ids.tolist(), labels.tolist(), strict=True):
        first_end, last_end = scored[len(body)], scored[-1]
        first, second = (new[: len(body) + 1], new[len(body) + 1 :])
        assert first[0] == second[0] == 1 and len(new) == len(row)
        if first[1:] != body:
            assert TEXTS[0].startswith(joined(fim, [*first[1:], 1])) and first_end == 1
            changed += 1
        assert (first_end == 1) == (first[1:] != body) and (last_end == 1) == (second != row[len(body) + 1 :])
        assert scored.count(1) == (first_end == 1) + (last_end == 1)
        if second != row[len(body) + 1 :]:
            assert second[-1] == 1 and TEXTS[1].startswith(joined(fim, second[1:]))
            changed += 1
    assert changed > 8
    assert joined(fim, [*fim.transform_document(body, 0, 0), 1]) == TEXTS[0] and fim.transform_document(body, 0, 0)[-1] != 1
    stays = FillInMiddle(tokenizer, "starcoder", rate=0.0)
    assert stays.transform_document(body, 0, 0) == body


def test_a_written_token_stays_text(tmp_path):
    """Qwen's tokens are not special: its tokenizer finds them in a text, also in the shards."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(TEXTS, trainer)
    library.add_tokens(list(FORMATS["qwen"].names.values()))
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=library, bos_token=end, eos_token=end).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "a <|fim_suffix|> b <|fim_prefix|><|fim_middle|> c"
    body = tokenizer.encode(text)
    for rate in (0.0, 1.0):
        fim = FillInMiddle(tokenizer, "qwen", rate=rate)
        assert fim.ids[SUF] in body and not set(fim.encode(text)) & set(fim.ids.values())
        for epoch in range(10):
            ids = fim.transform_document(body, epoch, 0)
            counts = [ids.count(fim.ids[role]) for role in (PRE, SUF, MID)]
            assert counts == ([1, 1, 1] if rate else [0, 0, 0])
            assert rate == 1 or tokenizer.decode(ids) == text
            new, _ = fim.transform_piece([0, *body], fim.choose(0, epoch, 0), is_last=True)
            assert len(new) == len(body) + 1 and new.count(fim.ids[SUF]) <= rate
    merged = next(id for id in tokenizer.encode(TEXTS[0]) if len(tokenizer.decode([id])) > 1)
    spelled = [id for letter in tokenizer.decode([merged]) for id in tokenizer.encode(letter)]
    assert FillInMiddle(tokenizer, "qwen", rate=0.0).as_text(spelled) == spelled


def test_missing_tokens_are_named(tokenizers):
    with pytest.raises(DataError, match=r"no <fim-prefix>, <fim-suffix>, <fim-middle>, which .* santacoder needs: it has"):
        FillInMiddle(tokenizers["starcoder"], "santacoder")
    cut = SentencePieceTokenizer(tokenizers["starcoder"].model_bytes, vocab_size=5)
    with pytest.raises(DataError, match="'<fim_pad>' has id 6, and the network's vocabulary ends with 4"):
        FillInMiddle(cut, "starcoder")
    plain = train_tokenizer(TEXTS, 480, ("<fim_prefix>", "<fim_middle>"))
    assert find_format(plain) is None
    with pytest.raises(DataError, match=r"no <fim_suffix>, which --fim.format starcoder needs: add .*model resize"):
        FillInMiddle(plain, "starcoder")


def document_blocks(tokenizer, fim, seed=2):
    ids = [id for text in TEXTS if text for id in tokenizer.as_document(tokenizer.encode(text))]
    common = {"context": 40, "batch_size": 5, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    return DocumentBlocks(np.array(ids), fim.transform_document, seed=seed, **common), ids


def test_documents_of_an_epoch(tokenizers):
    """Transformed whole, then packed; a pure function of (seed, step); each epoch anew."""
    tokenizer = tokenizers["starcoder"]
    fim = FillInMiddle(tokenizer, "starcoder")
    stream, ids = document_blocks(tokenizer, fim)
    texts = [text for text in TEXTS if text]
    for number in range(3):
        epoch, moved = stream.epoch(number), 0
        for start, end, text in zip(epoch.document_starts, [*epoch.document_starts[1:], len(epoch.ids)], texts, strict=True):
            document = epoch.ids[start:end].tolist()
            assert document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id
            is_moved = fim.ids[PRE] in document
            moved += is_moved
            assert (joined(fim, document[1:]) if is_moved else tokenizer.decode(document)) == text
        assert 2 <= moved <= len(texts) - 2
    assert stream.blocks == len(ids) // 40
    batches = [stream.batch(step) for step in range(12)]
    assert {batch.shape for batch in batches} == {(5, 41)}
    again = document_blocks(tokenizer, fim)[0]
    assert all(torch.equal(again.batch(step), batches[step]) for step in (11, 0, 5, 3, 4, 10))
    assert not torch.equal(document_blocks(tokenizer, fim, seed=3)[0].batch(0), batches[0])
    first = torch.cat([stream.batch(step) for step in range(12)])[: stream.blocks]
    assert len({tuple(row) for row in first.tolist()}) == stream.blocks  # each once
    ring = [*stream.epoch(0).ids.tolist()] * 3
    assert all(tuple(row) in {tuple(ring[i : i + 41]) for i in range(len(ring) // 3)} for row in first.tolist())
    for step in (0, 3):
        places = [(epoch.document_starts, i) for epoch, row in stream.rows(step) for i in row[:-1]]
        assert stream.document_indices(step) == sorted({int((starts <= i).sum()) - 1 for starts, i in places})


def test_a_document_without_its_tokens_is_refused(tokenizers):
    fim = FillInMiddle(tokenizers["starcoder"], "starcoder")
    stream = DocumentBlocks(np.arange(5, 90), fim.transform_document, context=8, batch_size=2, seed=0, bos_id=1, eos_id=2)
    with pytest.raises(DataError, match="does not begin with id 1"):
        stream.batch(0)
