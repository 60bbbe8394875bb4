"""Baselines of pairs of texts without a network: a linear model of word counts, fitted to the training records.

    words     log(1 + count) of each word, of either text apart (a bag of words, hashed to BUCKETS columns a text)
    shared    the words that both texts have, hashed likewise, and three shares of them: what counting equal words can know

A class is predicted by logistic regression, a number by ridge regression: Σ loss + penalty / 2 · ‖w‖² without the intercept, to
the optimum of scikit-learn's LogisticRegression(C=1/penalty) (two classes: C=2/penalty) and Ridge(alpha=penalty / 2). The
penalty is the one of PENALTIES with the lowest loss on every fourth training record after a fit to the others. B texts, J
columns, C classes.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BUCKETS, RECORDS, EVERY = 512, 20_000, 4
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
WORD = re.compile(r"\w+")
Pair = tuple[str, str]


def bucket(word: str) -> int:
    """Return a word's column, the same in every process."""
    return zlib.crc32(word.encode(errors="surrogatepass")) % BUCKETS


def features(pairs: Sequence[Pair], kind: str) -> Tensor:
    """Return the columns of each pair, B J in float64."""
    return torch.stack([COLUMNS[kind](*(WORD.findall(text.lower()) for text in texts)) for texts in pairs])


def counts(words: Iterable[str]) -> Tensor:
    """Return log(1 + count) of each bucket."""
    columns = torch.tensor([bucket(word) for word in words], dtype=torch.long)
    return torch.bincount(columns, minlength=BUCKETS).double().log1p()


def word_columns(first: list[str], second: list[str]) -> Tensor:
    """Return the words of each text, 2 · BUCKETS columns."""
    return torch.cat([counts(first), counts(second)])


def shared_columns(first: list[str], second: list[str]) -> Tensor:
    """Return the words of both texts, and their number over those of either, over those of the shorter text, and alone."""
    ours, theirs = set(first), set(second)
    sizes = (len(ours | theirs), min(len(ours), len(theirs)), 1)
    shares = [len(ours & theirs) / max(size, 1) for size in sizes]
    return torch.cat([counts(ours & theirs), torch.tensor(shares, dtype=torch.float64)])


COLUMNS: dict[str, Callable[[list[str], list[str]], Tensor]] = {"words": word_columns, "shared": shared_columns}


def fit_classes(x_BJ: Tensor, label_B: Tensor, classes: int, penalty: float) -> Tensor:
    """Return the weights J + 1, C of logistic regression, the intercepts last: full-batch L-BFGS from 0."""
    x_BJ = F.pad(x_BJ, (0, 1), value=1.0)
    weight_JC = torch.zeros(x_BJ.size(1), classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_JC], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        nats = F.cross_entropy(x_BJ @ weight_JC, label_B, reduction="sum")
        total = (nats + penalty / 2 * weight_JC[:-1].square().sum()) / len(x_BJ)
        total.backward()
        return total

    optimizer.step(closure)
    return weight_JC.detach()


def fit_numbers(x_BJ: Tensor, number_B: Tensor, penalty: float) -> Tensor:
    """Return the weights J + 1, 1 of ridge regression, the intercept last: Σ (y - x w - b)² + penalty / 2 · ‖w‖²."""
    mean_J, mean = x_BJ.mean(0), number_B.mean()
    centred_BJ = x_BJ - mean_J
    gram_JJ = centred_BJ.mT @ centred_BJ + penalty / 2 * torch.eye(x_BJ.size(1), dtype=torch.float64)
    weight_J = torch.linalg.solve(gram_JJ, centred_BJ.mT @ (number_B - mean))
    return torch.cat([weight_J, (mean - mean_J @ weight_J)[None]])[:, None]


def predict(x_BJ: Tensor, weight_JC: Tensor) -> Tensor:
    """Return the logits B C, or the numbers B 1."""
    return F.pad(x_BJ, (0, 1), value=1.0) @ weight_JC


def losses(output_BC: Tensor, target_B: Tensor) -> Tensor:
    """Return the mean loss: cross-entropy in nats of classes, squared error of numbers."""
    return F.mse_loss(output_BC[:, 0], target_B) if target_B.is_floating_point() else F.cross_entropy(output_BC, target_B)


def baseline_outputs(train: Sequence[Pair], target_B: Tensor, held_out: Sequence[Pair], kind: str, classes: int = 0) -> Tensor:
    """Fit to training pairs, the first RECORDS of them, and return the outputs for the held-out ones, M C (numbers: M 1).

    target_B: classes as int64, or numbers as float64. Deterministic: no random choice.
    """
    target_B = target_B[:RECORDS]
    x_BJ = features(train[:RECORDS], kind)

    def fit(rows_B: Tensor, penalty: float) -> Tensor:
        if target_B.is_floating_point():
            return fit_numbers(x_BJ[rows_B], target_B[rows_B], penalty)
        return fit_classes(x_BJ[rows_B], target_B[rows_B], classes, penalty)

    is_checked_B = torch.arange(len(x_BJ)) % EVERY == EVERY - 1
    penalty = PENALTIES[-1]
    if is_checked_B.any():
        checked = [
            float(losses(predict(x_BJ[is_checked_B], fit(~is_checked_B, penalty)), target_B[is_checked_B]))
            for penalty in PENALTIES
        ]
        penalty = PENALTIES[checked.index(min(checked))]
    return predict(features(held_out, kind), fit(torch.ones_like(is_checked_B), penalty))
