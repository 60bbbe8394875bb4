"""Shares of masks against transformers' collator: both are random, so rates are compared."""

import math

import tokenizers
import torch
import transformers

from data.transforms.causal import IGNORE
from data.transforms.masked import mlm_batch
from tests.compare import Error

V, CLS, SEP, MASK = 1000, 1, 2, 3


def collator():
    names = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]
    vocabulary = {name: id for id, name in enumerate(names + [f"w{id}" for id in range(len(names), V)])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    roles = dict(zip(("unk_token", "cls_token", "sep_token", "mask_token", "pad_token"), names, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)


def rates(block, batch):
    """Of ordinary tokens, those chosen; of the chosen, those that became the mask and those left as they were."""
    chosen = batch["labels"] != IGNORE
    masked, kept = chosen & (batch["input_ids"] == MASK), chosen & (batch["input_ids"] == block)
    special = block < 5
    assert not (chosen & special).any() and torch.equal(batch["labels"][chosen], block[chosen])
    return [(chosen, ~special), (masked, chosen), (kept, chosen)]


def test_rates_equal_transformers(parity):
    block = torch.randint(5, V, (500, 400))
    block[:, 0], block[:, 200] = CLS, SEP
    theirs = collator()([{"input_ids": row} for row in block])
    specials = frozenset(range(5))
    ours = mlm_batch(
        block, seed=0, step=0, first_row=0, mask_id=MASK, special_ids=specials, vocab_size=V, bos_id=CLS, mlm_probability=0.15
    )
    for name, mine, other in zip(("chosen", "masked", "kept"), rates(block, ours), rates(block, theirs), strict=True):
        (p, n), (q, m) = [(float(part.sum() / whole.sum()), int(whole.sum())) for part, whole in (mine, other)]
        sigmas = Error(abs(p - q) / math.sqrt(p * (1 - p) / n + q * (1 - q) / m), "standard errors")
        library = f"transformers {transformers.__version__}"
        parity(f"masks: share {name}", library, sigmas, 4, "two random shares")
