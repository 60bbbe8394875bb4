"""Options of `python -m data self-instruct`. Standard library only."""

import math
from dataclasses import dataclass

from data.config import DataError


@dataclass(frozen=True, kw_only=True)
class SelfInstructSettings:
    """Settings that decide which instructions are written; a folder goes on with equal ones alone."""

    seed: int = 0
    """Seed of the examples and of sampling: the same seed writes the same files."""
    batch_size: int = 8
    """Requests of a round, written together. A killed command goes on from the last finished round."""
    seed_examples: int = 6
    """Seed instructions in a request."""
    made_examples: int = 2
    """Instructions of the network's own in a request; as long as there are none, seeds in their place."""
    overlap: float = 0.7
    """Reject an instruction whose ROUGE-L F with a seed or an accepted one is above this."""
    list_tokens: int = 512
    """Maximal tokens of a list of instructions."""
    reply_tokens: int = 512
    """Maximal tokens of a reply. An instruction whose reply is cut is rejected."""
    temperature: float = 0.7
    """Temperature of lists."""
    top_p: float = 0.5
    """Lists are sampled among the best tokens that together have this probability."""
    reply_temperature: float = 0.0
    """Temperature of replies; 0: always the best token."""

    @property
    def examples(self) -> int:
        """Instructions in a request."""
        return self.seed_examples + self.made_examples

    def __post_init__(self) -> None:
        """Raise DataError for a number that cannot be."""
        least = {"seed": 0, "batch_size": 1, "seed_examples": 1, "made_examples": 0, "list_tokens": 1, "reply_tokens": 1}
        for name, most in least.items():
            if getattr(self, name) < most:
                raise DataError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {most}")
        for name in ("temperature", "reply_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be finite and at least 0")
        if not 0 < self.top_p <= 1:
            raise DataError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise DataError(f"--overlap {self.overlap}: is a ROUGE-L F, from 0 to 1 (1: only equal ones are rejected)")
