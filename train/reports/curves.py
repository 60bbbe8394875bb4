"""`curves.png`: the curves of a run, and a diagnosis (healthy, overfitting, underfitting …) with its reason."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERFITTING_RISE = 0.01  # the last validation loss this fraction above the best: overfitting
UNDERFITTING_FALL = 0.02  # the validation loss fell by this fraction towards the end: more steps would help


class Panel(NamedTuple):
    """A score of the validation beside its loss, and the n-gram baselines of that score."""

    key: str
    unit: str
    baselines: tuple[tuple[str, str, str], ...]  # key, name, style of the line


PANELS = (
    Panel(
        "bits_per_byte",
        "bits per byte",
        (
            ("unigram_bits_per_byte", "unigram count", ":"),
            ("bigram_bits_per_byte", "bigram count (Kneser-Ney)", "--"),
        ),
    ),
    Panel("masked_accuracy", "share of masked tokens", (("unigram_accuracy", "the most frequent token", ":"),)),
)


class Diagnosis(NamedTuple):
    verdict: str  # "healthy", "overfitting", "underfitting", "unstable", "no gain" or "too short to tell"
    why: str


def named_scores(rows: list[dict], scores: tuple[str, ...] = ("loss", "bits_per_byte")) -> list[str]:
    """Return the keys of validations that belong to one source or further corpus: loss_NAME, bits_per_byte_NAME.

    >>> named_scores([{"split": "validation", "loss": 1.0, "loss_code": 2.0, "baseline_loss": 3.0, "time": 0.0}])
    ['loss_code']
    """
    held_out = [row for row in rows if row["split"] in ("before", "validation")]
    keys = dict.fromkeys(key for row in held_out for key, value in row.items() if isinstance(value, int | float))
    return [key for score in scores for key in keys if key.startswith(f"{score}_")]


def diagnose(rows: list[dict]) -> Diagnosis:
    """Diagnose a run from the rows of metrics.jsonl.

    overfitting   the last validation loss is more than 1 % above the best, while the training loss went on falling
    unstable      as far above, and the training loss rose too
    underfitting  the validation score is worse than the n-gram baseline (bigrams; for masked tokens unigrams) or than what
                  needs no input (labels: a correlation of 0 too), or the loss still fell more than 2 % since the last
                  validation of the first four fifths
    no gain       no validation loss is below that of the weights which the run began with (--init)
    healthy       none of these
    """
    train = [(row["step"], row["loss"]) for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] == "validation"]
    if len(held_out) < 3 or len(train) < 2:
        return Diagnosis("too short to tell", f"validations: {len(held_out)}; a trend needs three")
    best, last = min(held_out, key=lambda row: row["loss"]), held_out[-1]
    before = next((row["loss"] for row in rows if row["split"] == "before"), math.inf)
    if "reward" in last:
        return diagnose_reward(rows)
    if best["loss"] >= before:
        return Diagnosis(
            "no gain",
            f"the weights that this run began with had validation loss {before:.3f}, and the best since is {best['loss']:.3f}: "
            "another --lr, or text that they do not know yet",
        )
    if last["loss"] > best["loss"] * (1 + OVERFITTING_RISE):
        near_best = [loss for step, loss in train if step <= best["step"]][-5:]
        latest = [loss for _, loss in train][-5:]
        if near_best and sum(latest) / len(latest) < sum(near_best) / len(near_best):
            return Diagnosis(
                "overfitting",
                f"validation loss was best at step {best['step']} ({best['loss']:.3f}) and is now {last['loss']:.3f}, "
                "while training loss went on falling: more text, dropout, or --early-stop",
            )
        return Diagnosis(
            "unstable",
            f"validation loss rose from {best['loss']:.3f} (step {best['step']}) to {last['loss']:.3f}, and training loss "
            "with it: a lower --lr",
        )
    perplexity, unigram = last.get("perplexity"), last.get("unigram_perplexity")
    if unigram is not None and perplexity >= unigram:
        return Diagnosis(
            "underfitting",
            f"pseudo-perplexity {perplexity:.1f} is no better than the unigram baseline ({unigram:.1f}): more steps would help",
        )
    bits, bigram = last.get("bits_per_byte"), last.get("bigram_bits_per_byte")
    if bits is not None and bigram is not None and bits >= bigram:
        return Diagnosis(
            "underfitting",
            f"{bits:.3f} bits per byte is no better than the bigram baseline ({bigram:.3f}): more steps, or a larger network",
        )
    without = last.get("baseline_loss", math.inf)
    if last["loss"] >= without or last.get("mcc", 1.0) <= 0:
        mcc = f", correlation (MCC) {last['mcc']:.3f}" if "mcc" in last else ""
        return Diagnosis(
            "underfitting",
            f"loss {last['loss']:.3f}, {without:.3f} without looking at the input{mcc}: more steps, or another --lr",
        )
    earlier = max((row for row in held_out if row["step"] <= 0.8 * last["step"]), key=lambda row: row["step"], default=None)
    if earlier is not None and last["loss"] < earlier["loss"] * (1 - UNDERFITTING_FALL):
        if "kl" in last:  # of preferences
            return Diagnosis("healthy", "validation loss still falls, as it does when replies already break: read samples")
        fall = 100 * (1 - last["loss"] / earlier["loss"])
        return Diagnosis(
            "underfitting",
            f"validation loss still fell {fall:.1f} % since step {earlier['step']}: more steps would help",
        )
    return Diagnosis("healthy", f"validation loss {last['loss']:.3f} is within 1 % of its best and hardly falls any more")


def diagnose_reward(rows: list[dict]) -> Diagnosis:
    """Diagnose a run of reinforcement from its held-out rewards: "no gain", "unstable" (the last is less than halfway from the
    first to the best), or "healthy"."""
    scored = [row for row in rows if row["split"] in ("before", "validation")]
    first, last, best = scored[0], scored[-1], max(scored, key=lambda row: row["reward"])
    if best["reward"] <= first["reward"]:
        return Diagnosis(
            "no gain",
            f"no held-out reward is above the first, {first['reward']:.3f}: another --lr, more replies to a prompt, or a start "
            "that is right more often",
        )
    if last["reward"] < (first["reward"] + best["reward"]) / 2:
        return Diagnosis(
            "unstable",
            f"held-out reward was best at step {best['step']} ({best['reward']:.3f}) and is now {last['reward']:.3f}: a lower "
            "--lr",
        )
    return Diagnosis("healthy", f"held-out reward {first['reward']:.3f} → {last['reward']:.3f}, best {best['reward']:.3f}")


def plot(rows: list[dict], path: Path, title: str = "", *, training: str = "training") -> Diagnosis:
    """Draw `panels` into a PNG, with the diagnosis as its caption; needs matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    diagnosis = diagnose(rows)
    with matplotlib.rc_context({"path.simplify": False}):  # every point, however many there are
        figure = panels(rows, title, training)
        figure.supxlabel(f"{diagnosis.verdict}: {diagnosis.why}", fontsize=10, wrap=True)
        temporary = path.with_name(f".{path.name}")
        FigureCanvasAgg(figure).print_figure(temporary, dpi=110, format="png")
    temporary.rename(path)
    return diagnosis


def panels(rows: list[dict], title: str = "", training: str = "training") -> "Figure":
    """Draw four panels: loss, a score beside n-gram baselines, learning rates, gradient norm; a mark for each row.

    Both losses are on one axis, in the same unit. `training` is the training loss's name in the legend; it mentions what
    the validation loss does not have (dropout, smoothing).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    train = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] in ("before", "validation")]
    figure = Figure(figsize=(10, 7), layout="constrained")
    (loss, score), (rate, norm) = figure.subplots(2, 2, sharex=True)

    def line(axes, rows, key, **style):
        present = [row for row in rows if key in row]
        axes.plot([row["step"] for row in present], [row[key] for row in present], **style)

    training_style = {"marker": ".", "markersize": 3, "linewidth": 1}
    line(loss, train, "loss", label=training, color="tab:blue", alpha=0.7, **training_style)
    line(loss, held_out, "loss", label="validation", color="tab:orange", marker="o", markersize=3)
    for number, key in enumerate(named_scores(rows, ("loss",)), start=2):  # of a source, or of a corpus of --eval-corpus
        style = {"label": f"validation: {key.removeprefix('loss_')}", "color": f"C{number % 10}", "linestyle": "--"}
        line(loss, held_out, key, **style, marker=".", markersize=3, linewidth=1)
    loss.set(title="loss", ylabel="nats per token")
    loss.legend()
    for panel in [panel for panel in PANELS if held_out and panel.key in held_out[-1]]:
        line(score, held_out, panel.key, label="validation", color="tab:orange", marker="o", markersize=3)
        for key, name, dashes in panel.baselines:
            score.axhline(held_out[-1][key], color="grey", linestyle=dashes, label=name)
        score.set(title="validation, beside n-gram baselines", ylabel=panel.unit)
        score.legend()
    line(rate, train, "lr", color="tab:green", label="lr", **training_style)
    if any("matrix_lr" in row for row in train):
        line(rate, train, "matrix_lr", color="tab:purple", label="matrix-lr (Muon)", **training_style)
        rate.legend()
    rate.set(title="learning rate", xlabel="step")
    line(norm, train, "grad_norm", color="tab:red", **training_style)
    norm.set(title="gradient norm, before clipping", xlabel="step")
    norms = [row["grad_norm"] for row in train]
    if norms and min(norms) > 0:  # a logarithm would leave a norm of 0 out
        norm.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        norm.yaxis.set_major_formatter(plain)
        norm.yaxis.set_minor_formatter(plain if max(norms) < 10 * min(norms) else NullFormatter())
    for axes in (loss, score, rate, norm):
        axes.grid(alpha=0.3)
        if axes.get_yscale() == "linear":
            axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    # A file name may hold bytes that are not UTF-8, and a `$` that starts no formula.
    figure.suptitle(title.encode(errors="surrogateescape").decode(errors="replace"), parse_math=False)
    return figure
