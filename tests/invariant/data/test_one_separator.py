"""Shards and batches of a tokenizer whose one token both begins and ends documents, as GPT-2's <|endoftext|> does."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from data.config import MASK, DataConfig, DataError
from data.corpus.dedup import deduplicate
from data.corpus.ingest import read_corpus
from data.corpus.prepare import prepare
from data.corpus.split import split_documents
from data.packing.blocks import BlockStream, MixedBlocks, sequential_blocks
from data.tokenizer.open import load_tokenizer
from data.tokenizer.pieces import byte_alphabet
from data.transforms.causal import IGNORE, clm_batch
from tests.texts import prose

END = 256


def byte_tokenizer(folder, **roles):
    """256 bytes and <|endoftext|>, in the form of GPT-2's tokenizer.json."""
    pytest.importorskip("tokenizers")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": END, "content": "<|endoftext|>", "special": True} | flags],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": byte_alphabet(), "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": None} | roles))
    return load_tokenizer(folder)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": prose(n, 30)}) + "\n" for n in range(60)))
    return DataConfig(corpus=(str(tmp_path / "text.jsonl"),), val_fraction=0.2, cache=tmp_path / "cache")


@pytest.fixture
def shards(config, tmp_path):
    return prepare(config, tokenizer=byte_tokenizer(tmp_path))


def test_shards_have_one_separator(config, shards):
    tokenizer, parts = shards.tokenizer, split_documents(deduplicate(list(read_corpus(config)))[0], config.val_fraction)
    assert tokenizer.bos_id == tokenizer.eos_id == END and tokenizer.is_lossless
    for name in ("train", "validation"):
        part = getattr(shards, name)
        ids = np.array(part.ids)
        assert part.documents == len(parts[name]) == (ids == END).sum() - 1 and ids[0] == ids[-1] == END
        assert not ((ids[1:] == END) & (ids[:-1] == END)).any()
        assert part.targets == part.tokens - 1 == part.bytes + part.documents
        assert tokenizer.byte_lengths[ids[1:]].sum() == part.bytes == sum(len(d.text.encode()) for d in parts[name])
        assert [tokenizer.decode(d) for d in np.split(ids, np.flatnonzero(ids == END))[1:-1]] == [d.text for d in parts[name]]
    again = prepare(config, tokenizer=tokenizer)
    assert not again.is_new and again.train.targets == shards.train.targets


def test_what_ends_a_source_is_its_own(config, tmp_path):
    """The token that begins the next one; each target of the whole split is one of just one source."""
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": prose(n, 30)}) + "\n" for n in range(100, 140)))
    corpus = (f"a={config.corpus[0]}:1", f"b={tmp_path / 'more.jsonl'}:1")
    shards = prepare(replace(config, corpus=corpus), tokenizer=byte_tokenizer(tmp_path))
    for part in (shards.train, shards.validation):
        (a, middle), (begins, end) = part.ranges["a"], part.ranges["b"]
        assert (a, begins, end) == (0, middle - 1, part.tokens) and part.ids[begins] == END
        blocks = [block for name in "ab" for block in sequential_blocks(part.ids[slice(*part.ranges[name])], 16, 4)]
        scored = sum(int((clm_batch(block, END, END)["labels"] != IGNORE).sum()) for block in blocks)
        assert scored == part.targets
    stream = MixedBlocks(shards.train.ids, list(shards.train.ranges.values()), (1, 1), 16, 4, seed=0)
    for step in range(40):
        block = stream.batch(step)
        joint = (block[:, 1:] == END) & (block[:, :-1] == END)
        assert ((clm_batch(block, END, END)["labels"] == IGNORE) == joint).all()


def test_padding_survives_the_cache(config, shards, tmp_path):
    padded = load_tokenizer(tmp_path, vocab_size=300)
    again = prepare(config, tokenizer=padded)
    assert not again.is_new and again.tokenizer.vocab_size == 300 and again.folder == shards.folder


@pytest.mark.parametrize("context, batch_size", [(7, 3), (64, 2), (100_000, 2)])
def test_every_target_is_scored_once_and_every_end_with_it(shards, context, batch_size):
    ids = np.array(shards.validation.ids, dtype=np.int64)
    batches = [clm_batch(block, END, END) for block in sequential_blocks(ids, context, batch_size)]
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    scored = labels[labels != IGNORE]
    assert torch.equal(scored, torch.from_numpy(ids[1:]))  # in order, the last document's end too, no filler
    assert (scored == END).sum() == shards.validation.documents
    assert min(int(batch["input_ids"].min()) for batch in batches) >= 0
    # The mutants: ends hidden by their id; fillers that are a real token.
    hidden = [clm_batch(block, END)["labels"] for block in sequential_blocks(ids, context, batch_size)]
    assert sum(int((label == END).sum()) for label in hidden) == 0
    blocks = sequential_blocks(ids, context, batch_size)
    filled = [clm_batch(block.where(block >= 0, 5), END, END)["labels"] for block in blocks]
    assert sum(int((label != IGNORE).sum()) for label in filled) > len(scored)


def test_documents_do_not_see_each_other(shards):
    ids = np.array(shards.validation.ids, dtype=np.int64)
    (block,) = sequential_blocks(ids, len(ids) - 1, 1)
    batch = {name: value[0] for name, value in clm_batch(block, END, END).items()}
    starts = np.flatnonzero(ids == END)
    for number, (start, end) in enumerate(pairwise(starts)):
        here = batch["document_ids"] == number
        assert torch.equal(batch["input_ids"][here], torch.from_numpy(ids[start:end]))
        assert torch.equal(batch["labels"][here], torch.from_numpy(ids[start + 1 : end + 1])), "its own end is its last target"
        assert torch.equal(batch["position_ids"][here], torch.arange(end - start))


def test_the_joint_of_the_ring_ends_nothing():
    ids = np.array([END, 1, 2, END, 3, END])
    labels = torch.cat([clm_batch(BlockStream(ids, 2, 3, seed=0).batch(step), END, END)["labels"] for step in range(4)])
    scored = labels[labels != IGNORE].tolist()
    assert {id: scored.count(id) for id in (1, 2, 3)} == {1: 4, 2: 4, 3: 4}
    assert scored.count(END) == 2 * 4, "two documents end, an epoch"


def test_filler_equals_bos_in_the_layout_with_two_tokens():
    ids = np.array([1, 5, 6, 2, 1, 7, 2])
    for context, batch_size in ((4, 2), (3, 4), (20, 1)):
        new, old = sequential_blocks(ids, context, batch_size), sequential_blocks(ids, context, batch_size, 1)
        for block, filled in zip(new, old, strict=True):
            assert all(map(torch.equal, clm_batch(block, 1, 2).values(), clm_batch(filled, 1).values()))


def test_masks_need_a_mask_token(config, tmp_path):
    with pytest.raises(DataError, match=r"needs a mask token.*tokenizer\.json.*257 ids.*has none.*random weights"):
        prepare(config, tokenizer=byte_tokenizer(tmp_path), controls=[MASK])


def test_mask_makes_a_tokenizer_that_has_one(config):
    config = DataConfig(**vars(config) | {"vocab_size": 300})
    plain, masked = prepare(config), prepare(config, controls=[MASK])
    assert plain.tokenizer.mask_id is None and masked.tokenizer.mask_id == 3 and masked.folder != plain.folder
    assert not prepare(config, controls=[MASK]).is_new
    assert masked.tokenizer.vocab_size == 300 and not (masked.train.ids == 3).any()
    given = prepare(config, tokenizer=masked.tokenizer, controls=[MASK])
    assert given.tokenizer is masked.tokenizer and given.train.targets == masked.train.targets


def test_another_separator_builds_anew(config, tmp_path):
    """The same text and tokenizer: ids that were parted by another token are not taken from the cache."""
    byte_tokenizer(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": END + 1, "content": "<|end|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    for separator, first in ((None, END), ("<|end|>", END + 1), (None, END)):
        made = prepare(replace(config, separator=separator), tokenizer=load_tokenizer(tmp_path))
        assert made.train.ids[0] == made.train.ids[-1] == made.tokenizer.bos_id == first
