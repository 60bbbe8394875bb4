"""Options of `python -m eval reward`. No torch at import time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

FILE = tyro.conf.arg(metavar="FILE")
DIR = tyro.conf.arg(metavar="DIR")


@dataclass(frozen=True)
class Reward:
    """Rewards of replies by a reward model (--objective reward), the ranking of the replies to each prompt, and on pairs its
    accuracy, mean margin and calibration."""

    model: Annotated[Path, tyro.conf.Positional, DIR]
    """A run (its best checkpoint, else its last), a checkpoint, a model folder or an adapter's."""
    file: Annotated[Path, tyro.conf.Positional, FILE]
    """Records in .jsonl .json .csv .tsv (each also .gz) or .parquet, whose shapes may be mixed: pairs (prompt, chosen,
    rejected); prompt and responses, with or without scores or ranking; a single reply (prompt, completion; messages)."""
    out: Annotated[Path | None, FILE] = None
    """Write each reply's reward and rank to this new file, one JSON object per line."""
    show: int = 5
    """Number of prompts whose ranking is shown."""
    limit: int | None = None
    """Read this many records. Default: all."""
    overlong: Literal["error", "cut", "drop"] = "error"
    """A prompt and reply longer than the network's context: stop; drop the prompt's oldest turns, then cut the ends of the
    replies; or leave the record out."""
    template: str | None = None
    """The chat template: one of ours by its name (chatml, llama-3, …), or a further one of the folder. Default: the folder's
    own."""
    batch_size: int = 32
    """Replies at a time; the results do not depend on it."""
    json: bool = False
    """Print JSON."""
    samples: int = 1000
    """Resamples of the intervals, which draw prompts."""
    seed: int = 12345
    """Random seed of the resamples."""
    base: Annotated[Path | None, DIR] = None
    """For an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    NEEDS: ClassVar = ()
