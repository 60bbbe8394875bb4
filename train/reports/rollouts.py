"""`rollouts.png`: the curves of a reinforcement run, from metrics.jsonl."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from train.reports.log import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "rollouts.png"


class Panel(NamedTuple):
    """A panel: its title, the unit, and the columns of training and of validation lines with their names."""

    title: str
    unit: str
    train: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...] = ()
    scale: str = "linear"


PANELS = (
    Panel(
        "reward",
        "mean of a reply",
        (("reward", "rollouts"),),
        (("reward", "held out, sampled"), ("reward_greedy", "held out, greedy")),
    ),
    Panel("parts of the reward", "mean of a reply", ()),
    Panel("entropy", "nats per token", (("entropy", "of the policy"),)),
    Panel("KL divergence", "nats per token", (("kl", "to the reference"), ("old_kl", "to the rollout's policy"))),
    Panel("clipped", "share", (("clipped_low", "below, advantage < 0"), ("clipped_high", "above, advantage > 0"))),
    Panel("ratio", "π / π_old", (("ratio_max", "greatest"), ("ratio", "mean"), ("ratio_min", "least"))),
    Panel("length of a reply", "tokens", (("reply_length", "mean"), ("reply_length_max", "longest"))),
    Panel("replies and groups", "share", (("ended", "replies that ended"), ("agreed", "groups of equal rewards"))),
    Panel("advantages", "standard deviation", (("advantage_std", "of the rollout"), ("reward_std", "rewards"))),
    Panel("critic: explained variance of returns", "share", (("explained_variance", "of the rollout"),)),
    Panel("critic: value and return", "mean of a token", (("value", "value"), ("return", "return"))),
    Panel("KL divergence of a reply", "nats", (("kl_reply", "to the reference"),)),
    Panel("weight of the KL divergence", "κ", (("kl_coefficient", "of the rollout"),)),
    Panel("speed", "tokens/s", (("rollout_tokens_per_s", "rollout"), ("update_tokens_per_s", "update")), (), "log"),
)
OTHERS = ("reward_std", "reward_greedy")  # not parts of the reward


def reward_parts(rows: list[dict]) -> tuple[tuple[str, str], ...]:
    """Return the columns of a reward's parts.

    >>> reward_parts([{"step": 1, "reward": 1.5, "reward_exact": 0.5, "reward_format": 1.0, "reward_std": 0.1}])
    (('reward_exact', 'exact'), ('reward_format', 'format'))
    """
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("reward_") and key not in OTHERS)
    return tuple((key, key.removeprefix("reward_")) for key in keys)


def plot_rollouts(folder: Path) -> str:
    """Draw FOLDER/rollouts.png; return the line that names it, or says why it is missing."""
    rows = read_metrics(folder / METRICS)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(rollout_panels(rows)).print_figure(folder / PICTURE, dpi=100, format="png")
    except ImportError:
        return "rollouts not drawn: matplotlib is not installed (pip install matplotlib)"
    except OSError as error:
        return f"rollouts not drawn: {error}"
    return f"rollouts {folder / PICTURE}"


def rollout_panels(rows: list[dict]) -> "Figure":
    """Draw the panels; columns that a run does not have are left out."""
    from matplotlib.figure import Figure

    train = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] in ("before", "validation")]
    parts = reward_parts(train)
    panels = [panel._replace(train=parts) if panel.title == "parts of the reward" else panel for panel in PANELS]
    panels = [panel for panel in panels if any(key in row for key, _ in panel.train for row in train)]
    figure = Figure(figsize=(12, 3 * -(-max(len(panels), 1) // 2)), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number)
        for source, columns, marker in ((train, panel.train, "."), (held_out, panel.held_out, "o")):
            for key, name in columns:
                points = [(row["step"], row[key]) for row in source if isinstance(row.get(key), int | float)]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3, linewidth=1)
        axes.set(title=panel.title, ylabel=panel.unit, yscale=panel.scale)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
