"""Score a model folder on held-out text as validation during training does, each target once."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

from data.config import DataConfig, DataError
from data.messages import format_count
from data.tokenizer.open import load_tokenizer
from model.config import ModelConfig
from train.config import NetworkConfig, OptimizerConfig, ReportConfig, RunConfig, TrainConfig
from train.config_toml import read_settings
from train.evaluate import evaluate
from train.losses.choose import LOSSES, choose_loss
from train.registry import load, names
from train.runs.errors import TrainError
from train.task import Scores, Task

WINDOW = 2048  # longest window in tokens
BATCH_TOKENS = 2048  # tokens in a batch of short windows


def objective_of(config: ModelConfig) -> str | None:
    """Name of the objective whose validation is the network's perplexity; None if it has no perplexity."""
    return next((name for name in names() if is_perplexity_of(load(name), config)), None)


def is_perplexity_of(task: type[Task], config: ModelConfig) -> bool:
    """True if the task's validation is this network's perplexity. A network that reads a prompt in both directions has none:
    it has learned to continue a prompt, and here nothing would be one."""
    return not config.bidirectional_prompt and config.architecture in task.architectures and config.head in task.perplexity_of


def explain_no_objective(config: ModelConfig) -> str:
    """Explain why a network has no perplexity."""
    if config.bidirectional_prompt:
        return "this network was trained with --objective prefix: it continues a prompt that it reads in both directions"
    article = "a" if config.architecture == "decoder" else "an"
    return f"it is that of words in plain text, and this is {article} {config.architecture} with the head {config.head!r}"


def open_text(
    folder: Path,
    config: ModelConfig,
    *,
    corpus: tuple[str, ...] = (),
    cache: Path | None = None,
    eval_tokens: int,
    info: Callable[[str], None] = print,
    **reading: str | None,
) -> Task | str:
    """Open held-out text in the tokens of the folder, as a task; or return the reason why there is none.

    The corpus defaults to the one that the run was trained on, else the built-in one. `reading` overrides the run's text_key
    and on_bad_text. Errors (DataError, TrainError) are raised only for a given `corpus`; otherwise they are the reason.
    """
    objective = objective_of(config)
    if objective is None:
        return explain_no_objective(config)
    try:
        tokenizer = load_tokenizer(folder, config.vocab_size)
        run = folder.parent.parent
        is_run = folder.parent.name == "checkpoints" and (run / "config.toml").is_file()
        data = read_settings(run).data if is_run else DataConfig()
        given = {"corpus": corpus, "cache": cache, **reading}
        if corpus:  # a given corpus has a validation split of its own, and is mixed by its own weights if at all
            data = data.of(corpus)
        data = replace(data, **{name: value for name, value in given.items() if value})
        kind = load(objective)
        read = TrainConfig(run=RunConfig(objective=objective), data=data)
        shards = kind.open_data(read, tokenizer, info, progress=sys.stderr.isatty())
        # No window is longer than the text: padding costs time and is not scored.
        text = min(shards.validation.tokens, eval_tokens, shards.train.smallest_source)
        context = max(1, min(config.context, WINDOW, text - 1))
        scoring = TrainConfig(
            run=RunConfig(objective=objective),
            data=data,
            network=NetworkConfig(context=context),
            optimizer=OptimizerConfig(batch_size=max(1, BATCH_TOKENS // context)),
            report=ReportConfig(eval_tokens=eval_tokens),
        )
        return kind(scoring, shards)
    except (DataError, TrainError) as error:
        if corpus:
            raise
        return str(error)


def score(network: nn.Module, task: Task, what: str) -> Scores:
    """Sum scores and counts over all of the held-out text; `what` is shown in the progress bar."""
    config, device = task.config, next(network.parameters()).device
    rows = config.optimizer.batch_size * config.network.context
    loss = LOSSES[choose_loss(rows, network.config.vocab_size, device)]
    objective = task.objective(network, loss, loss)
    shown = tqdm(task.validation, unit="batch", desc=f"scoring {what}", disable=not sys.stderr.isatty(), leave=False)
    batches = ({name: value.to(device) for name, value in batch.items()} for batch in shown)
    return task.scores(evaluate(objective, batches))


def describe(task: Task) -> str:
    """Describe the scored text: corpus, tokens, windows."""
    scored, total = len(task.held_out), task.shards.validation.tokens
    tokens = format_count(scored, "token") if scored == total else f"the first {scored:,} of {total:,} tokens"
    return f"{' '.join(task.config.data.corpus)}, {tokens} in windows of {task.config.network.context:,}"
