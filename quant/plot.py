"""Plot `quantization.png`: the error of each matrix by depth, and the folder's bytes before and after."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from quant.report import Layer, amount, by_kind, together

MARKERS = "osD^v"  # the next marker when the ten colors repeat


def labels(kinds: Sequence[str]) -> dict[str, str]:
    """Return kind → its name without the shared prefix.

    >>> labels(["h.N.attn.c_attn", "h.N.mlp.c_fc"])
    {'h.N.attn.c_attn': 'attn.c_attn', 'h.N.mlp.c_fc': 'mlp.c_fc'}
    """
    parts = [kind.split(".")[:-1] for kind in kinds]
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return {kind: ".".join(kind.split(".")[shared:]) for kind in kinds}


def plot(
    layers: Sequence[Layer],
    unquantized: Mapping[str, tuple[int, int]],
    path: Path,
    *,
    what: str,
    title: str,
    caption: str = "",
    normal: float | None = None,
) -> None:
    """Plot the error by depth, a color for each kind of matrix, above the bytes before and after; needs matplotlib.

    what: name of the quantized layers · unquantized: part → (numbers, bytes) · normal: the error of normally distributed
    numbers, drawn as a dotted line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    errors, bytes_ = figure.subplots(2, 1, height_ratios=(3, 1))

    kinds = by_kind(layers)
    for place, (kind, label) in enumerate(labels(list(kinds)).items()):
        errors.plot(
            [layer.depth for layer in kinds[kind]],
            [layer.error for layer in kinds[kind]],
            label=label,
            color=f"C{place % 10}",
            marker=MARKERS[place // 10 % len(MARKERS)],
            markersize=4,
            linewidth=1,
            alpha=0.8,
        )
    if normal is not None:
        errors.axhline(normal, color="grey", linestyle=":", label="normal numbers")
    there = [layer.error for layer in layers] + ([] if normal is None else [normal])
    low, high = min(there), max(there)
    room = max(0.1 * (high - low), 0.05 * high - (high - low) / 2, 1e-4)  # differences of a percent should look small
    errors.set(title="error of a matrix, ‖W − Ŵ‖ / ‖W‖", xlabel="layer", ylabel="error", ylim=(low - room, high + room))
    errors.xaxis.set_major_locator(MaxNLocator(integer=True))
    errors.grid(alpha=0.3)
    errors.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)

    total = together(what, layers)
    parts = {total.name: (total.before, total.after)} | {name: (size, size) for name, (_, size) in unquantized.items()}
    reached = [0, 0]
    colors = ("tab:blue", *(str(grey) for grey in (0.75, 0.6, 0.45, 0.3)))
    for (name, both), color in zip(parts.items(), colors, strict=False):
        bytes_.barh(["before", "after"], both, left=reached, label=name, color=color)
        reached = [begin + size for begin, size in zip(reached, both, strict=True)]
    for row, size in enumerate(reached):
        bytes_.annotate(f" {amount(size)}", (size, row), va="center")
    bytes_.invert_yaxis()
    bytes_.set(title="bytes of weights", xlim=(0, 1.15 * max(reached)), xticks=[])
    bytes_.spines[["top", "right", "bottom"]].set_visible(False)
    bytes_.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)

    # A folder's name may hold bytes that are not text, and `$`, which does not begin a formula here.
    figure.suptitle(title.encode(errors="surrogateescape").decode(errors="replace"), parse_math=False)
    figure.supxlabel(caption, fontsize=10, wrap=True)
    figure.savefig(path, dpi=110, format="png")
