"""Further corpora that each validation scores (--eval-corpus NAME=PATH): opened, named and described. They choose nothing."""

from collections.abc import Iterable, Mapping
from typing import Any

from data.config import DataError
from train.config import TrainConfig
from train.runs.errors import TrainError
from train.task import EvalCorpus, Info, Scores, Task


def open_eval_corpora(config: TrainConfig, task: Task, data: Any, info: Info) -> list[EvalCorpus]:
    """Open the corpora of --eval-corpus. data: what the task's `open_data` returned. Errors: DataError for
    a corpus that cannot be read, or has nothing to score."""
    corpora = []
    for name, paths in config.report.eval_corpora.items():
        try:
            corpora.append(task.open_eval_corpus(data, name, paths, info))
        except DataError as error:
            raise DataError(f"--eval-corpus {name}: {error}") from error
    return corpora


def named(corpus: EvalCorpus, scores: Scores, taken: Mapping[str, object]) -> Scores:
    """Return the scores of a corpus by names that end in its own: loss_NAME. Errors (TrainError): such a name is `taken`."""
    found = {f"{score}_{corpus.name}": value for score, value in scores.items()}
    if same := sorted(found.keys() & taken.keys()):
        raise TrainError(f"--eval-corpus {corpus.name}: this run has a score {same[0]} of its own: choose another name")
    return found


def identity(corpora: Iterable[EvalCorpus]) -> dict[str, str]:
    """Return the hash of each corpus, which a resume must find unchanged, or its scores would be of other text."""
    return {corpus.name: corpus.sha256 for corpus in corpora}


def introduction(corpora: Iterable[EvalCorpus]) -> str:
    """Describe the corpora, a line or more each."""
    return "".join(f"scored   {corpus.name}: {corpus.introduction}\n" for corpus in corpora)
