"""Early stopping: end a run once no watched score improves any more."""

from collections.abc import Iterable, Mapping, Sequence

from data.messages import format_count
from train.runs.errors import TrainError
from train.task import Task

LOWER_IS_BETTER = {"loss", "perplexity", "bits"}  # words in the names of such scores; of all others higher is better
# Words in the names of what no step improves: what a guess reaches, and what counting words does (--objective pairs).
CONSTANT = {"baseline", "unigram", "bigram", "words", "shared"}


class EarlyStopping:
    """The validations since one in which a watched score was better than its best so far by more than `min_delta`.

    patience: the run ends after this many; 0: never. names: the watched scores; without any, the one that chooses the task's
    best checkpoint. One watched score that improves is enough to go on. corpora: names behind scores, as of --eval-corpus.
    """

    def __init__(self, patience: int, names: Sequence[str], min_delta: float, task: Task, corpora: Iterable[str] = ()):
        self.patience, self.min_delta, self.task, self.corpora = patience, min_delta, task, tuple(corpora)
        self.names = tuple(dict.fromkeys(names)) or (task.best,)
        self.watched: dict[str, float] = {}  # the best value of each watched score
        self.bad_evaluations = 0

    def check(self, scores: Mapping[str, float]) -> None:
        """Raise TrainError where a watched score is not among those that training changes."""
        known = [n for n, value in scores.items() if isinstance(value, int | float) and not CONSTANT & self.words(n)]
        if missing := [name for name in self.names if name not in known]:
            raise TrainError(f"--early-stop-on {' '.join(missing)}: what training improves in this run is {', '.join(known)}")

    def update(self, scores: Mapping[str, float]) -> None:
        """Count a validation."""
        better = [
            name
            for name in self.names
            if name not in self.watched
            or is_better(scores[name], self.watched[name], higher=self.higher_is_better(name), by=self.min_delta)
        ]
        self.watched |= {name: scores[name] for name in better}
        self.bad_evaluations = 0 if better else self.bad_evaluations + 1

    def higher_is_better(self, name: str) -> bool:
        if name == self.task.best:
            return self.task.higher_is_better
        return not LOWER_IS_BETTER & self.words(name)

    def words(self, name: str) -> set[str]:
        """Return the words of a score's name, without the corpus that it is of."""
        for corpus in self.corpora:
            name = name.removesuffix(f"_{corpus}")
        return set(name.split("_"))

    def reason(self) -> str:
        """Return the reason to stop, or ""."""
        if not 0 < self.patience <= self.bad_evaluations:
            return ""
        what = "" if self.names == (self.task.best,) else f" of {' or '.join(self.names)}"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"early: {format_count(self.bad_evaluations, 'validation')} without a new best{what}{by}"

    def state_dict(self) -> dict:
        return {"bad_evaluations": self.bad_evaluations, "watched": self.watched}

    def load_state_dict(self, state: Mapping, best: Mapping | None) -> None:
        """Load a checkpoint's state. `best`: the scores of the run's best validation, which stand for the watched ones in a
        checkpoint of an older version, which has none."""
        self.bad_evaluations = state["bad_evaluations"]
        self.watched = dict(state["watched"]) if "watched" in state else {n: best[n] for n in self.names if best and n in best}


def is_better(score: float, old: float, *, higher: bool, by: float = 0.0) -> bool:
    """Tell whether a score beats the old one by more than `by`.

    >>> is_better(0.9, 1.0, higher=False), is_better(0.9, 1.0, higher=False, by=0.2), is_better(0.9, 1.0, higher=True)
    (True, False, False)
    """
    return score > old + by if higher else score < old - by
