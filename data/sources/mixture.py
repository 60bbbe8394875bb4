"""Mix sources by weight: the source of each row of a run is a pure function of (seed, row)."""

from collections.abc import Mapping, Sequence

import numpy as np

from data.config import DataConfig, DataError

STREAM = 0x6D6978  # "mix": separates these random numbers from other uses of the seed
PERIOD = 1024  # rows in which every source has its exact share, up to rounding


def row_shares(config: DataConfig, rows: Mapping[str, float], documents: Mapping[str, int]) -> dict[str, float]:
    """Return the share of a batch's rows that each source gets, by `config.mix` and its weights w:

        tokens        w_k
        documents     w_k · rows_k / documents_k: w_k is then the share of the documents
        temperature   rows_k^(1/T), T = config.mix_temperature: 1 reads each source equally often, ∞ draws from each equally

    each divided by their sum. rows: of an epoch of each source, in any unit that is the same for all (tokens, of plain text).
    documents: of each source (records of a task on records). Both may be {}: there is no mixture.
    Source: Raffel et al. 2020, arXiv 1910.10683, section 3.5.2, without their limit of a source's size; Conneau et al. 2020,
    arXiv 1911.02116, write the exponent 1/T as α = 0.3.

    >>> config = DataConfig(("a=x", "b=y"), mix="temperature", mix_temperature=2)
    >>> row_shares(config, {"a": 900, "b": 100}, {"a": 3, "b": 1})
    {'a': 0.75, 'b': 0.25}
    """
    if config.mix == "temperature":
        sizes = {name: (rows[name] / max(rows.values())) ** (1 / config.mix_temperature) for name in rows}
    elif config.mix == "documents":
        sizes = {name: config.weights[name] * rows[name] / documents[name] for name in rows}
    else:
        sizes = {name: config.weights[name] for name in rows}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


class Mixture:
    """Each period of PERIOD rows has w_k · PERIOD rows of source k (largest remainders), in an order drawn from (seed, period).

    Any row costs the same. Shares are exact, not random: after n rows source k is less than PERIOD rows off w_k · n.
    weights: positive, not necessarily normalized. names: of the sources, for errors. Errors: DataError for other weights, and
    for a share below 1 / PERIOD.

    >>> source, index = Mixture((0.75, 0.25), seed=0).rows(0, 1024)
    >>> (source == 0).sum(), sorted(index[source == 1])[-1]
    (np.int64(768), np.int64(255))
    """

    def __init__(self, weights: Sequence[float], seed: int, names: Sequence[str] = ()):
        share_K = np.asarray(weights, dtype=np.float64)
        if not (len(share_K) and np.isfinite(share_K).all() and (share_K > 0).all()):
            raise DataError(f"weights of sources must be above 0 and finite: {', '.join(f'{w:g}' for w in weights)}")
        share_K = share_K / share_K.sum()
        exact_K = share_K * PERIOD
        count_K = np.floor(exact_K).astype(np.int64)
        order = np.argsort(count_K - exact_K, kind="stable")  # largest remainders first
        count_K[order[: PERIOD - count_K.sum()]] += 1
        if not count_K.all():
            shown = ", ".join(f"{weight:g}" for weight in weights)
            never = ", ".join(name for name, count in zip(names, count_K, strict=False) if not count)
            few = f"a share below 1/{PERIOD} of the rows would never be read"
            raise DataError(f"{few}: give {never or 'such a source'} more, or leave it out (shares {shown})")
        self.count_K, self.seed = count_K, seed
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def counts(self, rows: int) -> np.ndarray:
        """Return how many of the first `rows` rows of the run each source has, int64 of (K,)."""
        whole, rest = divmod(rows, PERIOD)
        count_K = whole * self.count_K
        return count_K + np.bincount(self.period(whole)[0][:rest], minlength=len(count_K)) if rest else count_K

    def period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, index in it) of each row of a period; the last period is cached."""
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != period:
            random = np.random.Generator(np.random.PCG64([self.seed, period, STREAM]))
            source = random.permutation(np.repeat(np.arange(len(self.count_K)), self.count_K))
            index = np.empty(PERIOD, dtype=np.int64)
            for k, count in enumerate(self.count_K):
                index[source == k] = period * count + np.arange(count)
            last = self._last = (period, source, index)
        return last[1], last[2]

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, index in it), each int64 of (count,), of the rows first … first + count - 1 of the run."""
        parts = [self.period(p) for p in range(first // PERIOD, (first + count - 1) // PERIOD + 1)]
        skip = first % PERIOD
        source, index = (np.concatenate(each)[skip : skip + count] for each in zip(*parts, strict=True))
        return source, index
