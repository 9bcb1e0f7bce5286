"""A picture of lengths: the histogram of rows by their tokens, with the length at which they are cut."""

from pathlib import Path

import numpy as np

from genai_pl.atomic_io import write_atomic

INSTALL = "pip install -e '.[plots]'"
BINS = 40


def draw_lengths(lengths: list[int], limit: int, path: Path, *, title: str) -> Path | None:
    """The path of a PNG with the histogram, or None where matplotlib is not installed.

    Bins are of equal width up to twice the 99th percentile; the last one holds all longer rows.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    # a few very long rows must not press all others into one bar
    values = np.asarray(lengths)
    top = max(min(int(values.max()), 2 * int(np.percentile(values, 99))), 1)
    edges = np.linspace(0, top, BINS + 1)
    within = np.minimum(values, top)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    longer = values > limit
    parts = {"within the limit": ~longer, f"{longer.sum():,} longer, cut": longer}
    shown = {label: within[where] for label, where in parts.items() if where.any()}
    colors = ["#4477aa", "#cc6677"][-len(shown) :] if longer.any() else ["#4477aa"]
    axes.hist(list(shown.values()), bins=edges, stacked=True, color=colors, label=list(shown))
    if limit <= top:
        axes.axvline(limit, color="0.3", linestyle="--", label=f"limit: {limit:,} tokens")
    for percent in (50, 90, 99):
        value = np.percentile(values, percent)
        axes.axvline(value, color="0.6", linewidth=0.8, zorder=0)
        axes.annotate(
            f"{percent} %", (value, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8
        )
    axes.set(xlabel="tokens of a row", ylabel="rows", xlim=(0, top))
    axes.set_title(f"{len(values):,} rows of {title}", pad=18)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)
    return path


def picture_line(path: Path | None) -> str:
    """The line that says where the picture is, or how to get one."""
    return f"picture     {path}" if path else f"picture     none, it is drawn with matplotlib: {INSTALL}"
