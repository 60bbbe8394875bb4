"""The mixture of a run: the share of its rows that each source has (--mix), how often each is read, and what was drawn."""

from collections.abc import Mapping

from data.config import DataConfig
from data.sources.mixture import Mixture, row_shares

GOOD_EPOCHS = 4  # read more often, text is worth less than new text: Muennighoff et al. 2023, arXiv 2305.16264


class Mixing:
    """Shares of the sources by name, for batches, messages and metrics.jsonl.

        rows        rows of an epoch of each source
        documents   documents (or records, by `unit`) of each to train on

    Without a mixture there are no sources, and `mixture` is None.
    """

    def __init__(
        self, config: DataConfig, rows: Mapping[str, float], documents: Mapping[str, int], seed: int, unit: str = "document"
    ):
        self.config, self.rows, self.documents, self.unit = config, dict(rows), dict(documents), unit
        self.shares = row_shares(config, rows, documents)
        self.mixture = Mixture(list(self.shares.values()), seed) if self.shares else None

    def describe(self, rows: int) -> str:
        """Describe share and epochs of each source in a run of so many rows, with a line for each that is read often."""
        if not self.shares:
            return ""
        epochs = {name: rows * fraction / self.rows[name] for name, fraction in self.shares.items()}
        sources = [f"{name} {fraction:.1%}, {epochs[name]:.1f} epochs" for name, fraction in self.shares.items()]
        lines = [f"mixture  {'; '.join(sources)}{self._reason()}"]
        often = f"times: up to {GOOD_EPOCHS} epochs are about as good as new text, more add less and less"
        lines += [f"         {name} is read {count:.1f} {often}" for name, count in epochs.items() if count > GOOD_EPOCHS]
        return "".join(f"{line}\n" for line in lines)

    def _reason(self) -> str:
        """Describe what the shares come from, where they are not the weights."""
        if self.config.mix == "documents":
            means = [f"{self.rows[name] / self.documents[name]:.2f} of {name}" for name in self.shares]
            return f" (--mix documents: weight times rows a {self.unit}, {', '.join(means)})"
        if self.config.mix == "temperature":
            return f" (--mix temperature: size^(1/{self.config.mix_temperature:g}))"
        return ""

    def drawn(self, rows: int) -> dict[str, float]:
        """Return drawn_NAME: the share of each source in the first `rows` rows of the run, a function of their number alone."""
        counts = self.mixture.counts(rows).tolist() if self.mixture is not None else []
        return {f"drawn_{name}": count / rows for name, count in zip(self.shares, counts, strict=True)}
