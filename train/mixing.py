"""The mixture of a run: the share of its rows that each source has (--mix), how often each is read, and what was drawn."""

from collections.abc import Collection, Mapping

from data.config import DataConfig
from data.sources.mixture import Mixture, row_shares

GOOD_EPOCHS = 4  # read more often, text is worth less than new text: Muennighoff et al. 2023, arXiv 2305.16264
FAR = 2  # times a source's share in the held-out text that its share in batches may be, or the reverse


class Mixing:
    """Shares of the sources by name, for batches, messages and metrics.jsonl.

        rows        rows of an epoch of each source; a row is `context` tokens of text (fractions count), or a padded or packed
                    row of records, of --mlm.nsp a pair of segments
        documents   documents (or records, by `unit`) of each to train on

    Without a mixture there are no sources, and `mixture` is None.
    """

    def __init__(
        self, config: DataConfig, rows: Mapping[str, float], documents: Mapping[str, int], seed: int, unit: str = "document"
    ):
        self.config, self.rows, self.documents, self.unit = config, dict(rows), dict(documents), unit
        self.shares = row_shares(config, rows, documents)
        self.mixture = Mixture(list(self.shares.values()), seed, list(self.shares)) if self.shares else None

    def describe(self, rows: int, held_out: Mapping[str, float], scored: Collection[str] = ()) -> str:
        """Describe share and epochs of each source in a run of so many rows, with a line for each that is read often.

        held_out: rows of each source that are held out, {} where nobody knows whose they are. scored: sources with a loss_NAME.
        """
        if not self.shares:
            return ""
        epochs = {name: rows * fraction / self.rows[name] for name, fraction in self.shares.items()}
        sources = [f"{name} {fraction:.1%}, {epochs[name]:.1f} epochs" for name, fraction in self.shares.items()]
        lines = [f"mixture  {'; '.join(sources)}{self._reason()}"]
        often = f"times: up to {GOOD_EPOCHS} epochs are about as good as new text, more add less and less"
        lines += [f"         {name} is read {count:.1f} {often}" for name, count in epochs.items() if count > GOOD_EPOCHS]
        return "".join(f"{line}\n" for line in [*lines, *self._weighed(held_out, scored)])

    def _weighed(self, held_out: Mapping[str, float], scored: Collection[str]) -> list[str]:
        """Describe what the validation loss weighs sources by, where that is far from their shares."""
        total = sum(held_out.values())
        held = {name: held_out.get(name, 0) / total for name in self.shares} if total else {}
        pairs = [(self.shares[name], fraction) for name, fraction in held.items()]
        if not any(max(pair) > FAR * min(pair) for pair in pairs):
            return []
        parts = ", ".join(f"{name} {fraction:.1%}" for name, fraction in held.items())
        line = f"         held out are {parts}: so the validation loss weighs them, and the best checkpoint"
        watched = [name for name in scored if 0 < held.get(name, 0) < 1]  # the loss of all held-out text is no source's
        if not watched:
            return [line]
        lightest = max(watched, key=lambda name: self.shares[name] / held[name])
        return [f"{line}; --early-stop-on loss_{lightest} watches one"]

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
