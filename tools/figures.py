"""The papers' figures, from plain data: each function returns a matplotlib figure, `save` writes it."""

import io
import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.files import check_writable, write_atomically
from harness.metrics import rank_rows, reliability
from harness.task import UsageError
from tools.compare import LOWER_IS_BETTER, MEASURES

try:
    import matplotlib

    matplotlib.use("Agg")  # no screen
    import matplotlib.pyplot as plt
except ImportError:  # text needs no pictures
    plt = None


def save(figure: "plt.Figure", path: Path) -> None:
    """Written atomically. Raises UsageError, OSError."""
    path, content = path.resolve(), io.BytesIO()
    check_writable(path, f"-o {path}")
    try:
        figure.savefig(content, dpi=150, format=path.suffix.removeprefix(".") or "png")
    except (ValueError, OverflowError) as error:
        raise UsageError(f"-o {path} cannot be written: {error}") from None
    write_atomically(path, content.getbuffer())
    print(path)


def plot_heat_map(axis: "plt.Axes", values: pd.DataFrame, top: float, digits: int) -> Any:
    """Colours from 0 to `top`, with the numbers on them. Returns the image."""
    image = axis.imshow(values, vmin=0, vmax=top, cmap="viridis")
    for (y, x), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "black" if value > 0.6 * top else "white"
            text = f"{value:.{digits}f}".removesuffix(".0")
            axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=7)
    axis.set_xticks(range(values.shape[1]), values.columns, fontsize=7)
    axis.set_yticks(range(values.shape[0]), values.index, fontsize=7)
    return image


def plot_range(axis: "plt.Axes", values: pd.DataFrame, colour: str, **line: Any) -> None:
    """The column "mean" as a line, with the range from "min" to "max"."""
    axis.plot(values["mean"], color=colour, **line)
    axis.fill_between(values.index, values["min"], values["max"], alpha=0.15, color=colour, linewidth=0)


def ranks(patterns: dict[str, dict[str, float]]) -> "plt.Figure":
    """[C] figure 1: for each title a heat map of ranks by layer and module, on one colour scale."""
    maps = {name: pd.DataFrame(rank_rows(ranks)) for name, ranks in patterns.items()}
    modules, layers = next(iter(maps.values())).shape
    across = min(len(maps), 2)
    down = math.ceil(len(maps) / across)
    width = 0.4 * layers + 0.6
    titles = [textwrap.fill(name, max(20, int(14 * width))) for name in maps]
    title_height = 0.13 * max(title.count("\n") for title in titles)
    size = (2.2 + across * width, 0.6 + down * (0.32 * modules + 0.7 + title_height))
    shared = {"squeeze": False, "sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(down, across, figsize=size, **shared)
    top = max(1, *(values.max(axis=None) for values in maps.values()))
    panels = list(axes.flat[: len(maps)])
    for axis in axes.flat[len(maps) :]:
        axis.remove()
    for axis, title, values in zip(panels, titles, maps.values(), strict=True):
        image = plot_heat_map(axis, values, top, digits=1)
        axis.set_aspect("auto")
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelbottom=axis in panels[-across:])
    figure.supxlabel("layer", fontsize=8)
    figure.colorbar(image, ax=panels, label="rank", shrink=0.8)
    return figure


def curves(found: dict[str, pd.DataFrame]) -> "plt.Figure":
    """For each task, the score against the step and the budget under it: mean, and range over seeds.

    `found`: by name, a table of updates and evaluations: step, score, budget, folder, row, title, measure.
    """
    titles, rows = (list(dict.fromkeys(of[key].iloc[0] for of in found.values())) for key in ("title", "row"))
    labels = [textwrap.fill(name, 72) for name in found]
    size = (1 + 5 * len(titles), 5.2 + 0.15 * sum(1 + label.count("\n") for label in labels))
    shared = {"squeeze": False, "sharex": "col", "height_ratios": (3, 1), "layout": "constrained"}
    figure, axes = plt.subplots(2, len(titles), figsize=size, **shared)
    for label, lines in zip(labels, found.values(), strict=True):
        row, title, measure = lines[["row", "title", "measure"]].iloc[0]
        score, budget = axes[:, titles.index(title)]
        plot_range(score, over_seeds(lines, "score"), f"C{rows.index(row)}", label=label, marker=".")
        plot_range(budget, over_seeds(lines, "budget"), f"C{rows.index(row)}")
        score.set(title=title, ylabel=measure.replace("_", " "))
        budget.set(xlabel="step", ylabel="triplets")
        score.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center")
    return figure


def over_seeds(lines: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean, min and max by step, at the steps that all seeds have."""
    values = lines.dropna(subset=value).groupby("step")[value].agg(["mean", "min", "max", "count"])
    return values[values["count"] == lines["folder"].nunique()]


class Agreement(NamedTuple):
    """How far scores agree in runs that differ in the seed alone."""

    matrix: pd.DataFrame  # (scores, scores), at the end: Spearman above the diagonal, Jaccard below
    chance: float  # Jaccard of two unrelated scores
    history: pd.DataFrame  # by step, means over seeds: "spearman.a/b", …, "sigma_cv"

    def pairs(self) -> dict[str, str]:
        """The columns of `history` to plot, with their labels: Spearman of mu and each other score."""
        names = self.history.filter(like="spearman.").dropna(axis=1, how="all").columns
        pairs = {name: name.partition(".")[2].split("/") for name in names}
        return {name: " and ".join(pair) for name, pair in pairs.items() if "mu" in pair}


def agreement(found: dict[str, Agreement]) -> "plt.Figure":
    """By setting, the last allocation's matrix; under it the history of correlations and σ's variation."""
    n = len(found)
    shared = {"squeeze": False, "layout": "constrained", "height_ratios": (3.4, 2, 1.3)}
    figure, axes = plt.subplots(3, n, figsize=(0.5 + 3.8 * n, 8.5), **shared)
    for (name, agreement), (matrix, history, variation) in zip(found.items(), axes.T, strict=True):
        plot_heat_map(matrix, agreement.matrix, 1, digits=2).set_clim(-1, 1)
        plt.setp(matrix.get_xticklabels(), rotation=40, ha="right")
        matrix.set_title(textwrap.fill(f"{name} (Jaccard by chance {agreement.chance:.2f})", 46), fontsize=8)
        for column, label in agreement.pairs().items():
            history.plot(agreement.history[column], label=label)
        history.set(ylim=(-1.05, 1.05), ylabel="Spearman")
        history.legend(fontsize=6, ncols=2)
        if agreement.history["sigma_cv"].notna().any():
            variation.semilogy(agreement.history["sigma_cv"])
        variation.set(xlabel="step", ylabel="σ: sd / mean")
        for axis in (history, variation):
            axis.grid(alpha=0.3)
    title = "Spearman above the diagonal, Jaccard of the kept below: at the last allocation"
    figure.suptitle(title, fontsize=9)
    return figure


def differences(table: pd.DataFrame) -> "plt.Figure":
    """Paired differences with their 95% intervals, a panel a measure; filled where they are better or worse.

    `table`: as `compare.compared` returns it.
    """
    pairs = list(dict.fromkeys(zip(table["row"], table["against"], strict=True)))
    tasks, measures = (list(dict.fromkeys(table[name])) for name in ("task", "measure"))
    size = (2.5 + 2.6 * len(measures), 1.2 + (0.25 + 0.07 * len(tasks)) * len(pairs))
    shared = {"squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(measures), figsize=size, **shared)
    for axis, measure in zip(axes.flat, measures, strict=True):
        for line in table[table["measure"] == measure].itertuples():
            i = tasks.index(line.task)
            y = pairs.index((line.row, line.against)) + 0.6 * ((i + 0.5) / len(tasks) - 0.5)
            fill = "white" if line.verdict == "not distinguishable" else f"C{i}"
            axis.plot([line.low, line.high], [y, y], color=f"C{i}", linewidth=1)
            axis.plot(line.difference, y, "o", color=f"C{i}", markerfacecolor=fill, markersize=4)
        name = {"nll": "NLL", "ece": "ECE", "brier": "Brier score"}.get(measure, measure)
        unit = ", points" * (MEASURES[measure] == 100)
        better = "left" if measure in LOWER_IS_BETTER else "right"
        axis.set_title(f"{name}{unit} (better: {better})", fontsize=8)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(pairs)), [f"{row}\n− {against}" for row, against in pairs], fontsize=6)
    axes[0, 0].invert_yaxis()
    lines = [plt.Line2D([], [], marker="o", color=f"C{i}", label=task) for i, task in enumerate(tasks)]
    figure.legend(handles=lines, fontsize=7, loc="outside lower center", ncols=len(tasks))
    return figure


def reliability_diagrams(panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> "plt.Figure":
    """Accuracy against confidence, all seeds together, and how many examples are in each bin under it.

    `panels`: by title, by kind of prediction, probabilities (n, classes) and labels (n,).
    """
    across = min(len(panels), 4)
    down = math.ceil(len(panels) / across)
    size = (0.5 + 3.2 * across, 4.2 * down)
    shared = {"squeeze": False, "sharex": True, "height_ratios": (3, 1) * down, "layout": "constrained"}
    figure, axes = plt.subplots(2 * down, across, figsize=size, **shared)
    for axis in axes[-2:, len(panels) - across * (down - 1) :].flat:
        axis.remove()
    for n, (name, predictions) in enumerate(panels.items()):
        diagram, histogram = axes[2 * (n // across) : 2 * (n // across) + 2, n % across]
        diagram.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for i, (how, (probabilities, labels)) in enumerate(predictions.items()):
            counts, confidence, accuracy = reliability(probabilities, labels)
            diagram.plot(confidence, accuracy, marker="o", markersize=3, color=f"C{i}", label=how)
            left = np.arange(10) / 10 + 0.02 + 0.04 * i
            histogram.bar(left, counts, width=0.035, align="edge", color=f"C{i}")
        diagram.set_title(textwrap.fill(name, 40), fontsize=8)
        diagram.set(xlim=(0, 1), ylim=(0, 1))
        diagram.legend(fontsize=7)
        diagram.set_ylabel("accuracy", fontsize=8)
        histogram.set_ylabel("examples", fontsize=8)
        histogram.set_xlabel("confidence", fontsize=8)
    return figure


def temperature(lines: dict[str, pd.DataFrame]) -> "plt.Figure":
    """[V] figure 1: error (100 − the score in percent) and NLL against τ, with their range over seeds.

    `lines`: by name, one line per evaluation, with temperature, error and (but for regression) nll.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    about = {"error": "error: 100 − score in percent", "nll": "NLL"}
    for axis, (name, label) in zip(axes, about.items(), strict=True):
        for i, (title, frame) in enumerate(lines.items()):
            if name in frame:
                values = frame.groupby("temperature")[name].agg(["mean", "min", "max"])
                plot_range(axis, values, f"C{i}", marker="o", markersize=3, label=title)
        axis.set(xlabel="τ", ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center")
    return figure
