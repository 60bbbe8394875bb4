"""The parts of a run that its reports read; `train.loop.Run` has them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from train.anchored_run import Anchoring
from train.config import TrainConfig
from train.engine import Engine
from train.parallel.ranks import Ranks
from train.reports.log import Console
from train.reports.phases import Phases
from train.task import EvalCorpus, Task


class RunView(Protocol):
    config: TrainConfig
    out: Path
    device: torch.device
    ranks: Ranks
    task: Task
    eval_corpora: Sequence[EvalCorpus]  # scored in each validation too
    engine: Engine
    anchoring: Anchoring | None  # of --anchor
    console: Console
    phases: Phases
    step: int
    tokens: int  # scored labels since step 0
    best: dict | None  # the best validation
    label_fraction: float | None  # scored labels per position, in the first micro-batch of this session
    introduction: str  # the lines before the first step of this session
    defaulted: tuple[str, ...]  # the learning rates that no option gave
