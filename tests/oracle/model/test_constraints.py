"""Forced and forbidden tokens against transformers' logits processors, at every length of a text."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from model.config import ConfigError
from model.constraints import Constraints
from tests.compare import count
from tests.oracle.model.test_network import LIBRARY

PROMPT, LIMIT, WORDS, STOP = 3, 9, 12, (2, 7)
CASES = {
    "min_length": (Constraints(min_length=6), lambda: transformers.MinLengthLogitsProcessor(6, list(STOP))),
    "min_new_tokens": (
        Constraints(min_new_tokens=4),
        lambda: transformers.MinNewTokensLengthLogitsProcessor(PROMPT, 4, list(STOP)),
    ),
    "no_repeat_ngram": (Constraints(no_repeat_ngram=2), lambda: transformers.NoRepeatNGramLogitsProcessor(2)),
    "forced_first": (Constraints(forced_first=5), lambda: transformers.ForcedBOSTokenLogitsProcessor(5)),
    "forced_last": (Constraints(forced_last=(2,)), lambda: transformers.ForcedEOSTokenLogitsProcessor(LIMIT, 2)),
    "suppressed": (Constraints(suppressed=(1, 4)), lambda: transformers.SuppressTokensLogitsProcessor([1, 4])),
    "suppressed_first": (
        Constraints(suppressed_first=(3, 9)),
        lambda: transformers.SuppressTokensAtBeginLogitsProcessor([3, 9], PROMPT),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_is_transformers(name, parity):
    constraints, processor = CASES[name]
    ids = torch.randint(1, 5, (6, LIMIT), generator=torch.Generator().manual_seed(1))  # few words: bigrams repeat
    prompt = 1 if name == "forced_first" else PROMPT
    wrong, acted = [], 0
    for end in range(prompt, LIMIT):
        logits = torch.randn(6, WORDS)
        text = SimpleNamespace(ids_BT=ids, end=end, prompt_length=prompt)
        ours = constraints.apply(logits, text, STOP, last=end == LIMIT - 1)
        theirs = processor()(ids[:, :end], logits.clone())
        wrong += [end] * (not torch.equal(ours, theirs))
        acted += not torch.equal(ours, logits)
        assert torch.equal(Constraints().apply(logits, text, STOP, last=False), logits)
    assert acted
    parity(f"constraints: {name}", LIBRARY, count(wrong), 0, "bit for bit")


def test_values_that_cannot_be():
    for name in ("min_length", "min_new_tokens", "no_repeat_ngram"):
        with pytest.raises(ConfigError, match=f"{name}=-1 must not be negative"):
            Constraints(**{name: -1})
