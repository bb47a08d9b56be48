"""The papers' figures, from plain data: each function returns a matplotlib figure, `save` writes it."""

import math
import os
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.metrics import rank_rows, reliability
from harness.task import UsageError

try:
    import matplotlib

    matplotlib.use("Agg")  # no screen
    import matplotlib.pyplot as plt
except ImportError:  # text needs no pictures
    plt = None


def check_available() -> None:
    """Raise UsageError if figures cannot be drawn."""
    if plt is None:
        raise UsageError("pictures need matplotlib: pip install matplotlib")


def save(figure: "plt.Figure", path: Path) -> None:
    """All of it or nothing: written beside and renamed."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.new")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        figure.savefig(beside, dpi=150, format=path.suffix.removeprefix(".") or "png")
        os.replace(beside, path)
    except (OSError, ValueError) as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"-o {path} cannot be written: {error}") from None
    print(path)


def ranks(patterns: dict[str, dict[str, float]]) -> "plt.Figure":
    """[C] figure 1: for each title a heat map of ranks by layer and module, on one colour scale."""
    across = min(len(patterns), 2)
    down = math.ceil(len(patterns) / across)
    example = rank_rows(next(iter(patterns.values())))
    modules = list(dict.fromkeys(module for row in example.values() for module in row))
    width = 0.4 * len(example) + 0.6
    titles = {name: "\n".join(textwrap.wrap(name, max(20, int(14 * width)))) for name in patterns}
    title_height = 0.13 * max(title.count("\n") for title in titles.values())
    size = (2.2 + across * width, 0.6 + down * (0.32 * len(modules) + 0.7 + title_height))
    figure, axes = plt.subplots(
        down, across, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    top = max(max(ranks.values()) for ranks in patterns.values())
    panels = list(axes.flat[: len(patterns)])
    for axis in axes.flat[len(patterns) :]:
        axis.remove()
    for axis, (name, ranks) in zip(panels, patterns.items(), strict=True):
        rows = rank_rows(ranks)
        grid = np.array([[row.get(module, math.nan) for row in rows.values()] for module in modules])
        image = axis.imshow(grid, vmin=0, vmax=max(top, 1), cmap="viridis", aspect="auto")
        for (y, x), rank in np.ndenumerate(grid):
            colour = "black" if rank > 0.6 * top else "white"
            text = "" if math.isnan(rank) else f"{round(rank, 1):g}"
            axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=7)
        axis.set_title(titles[name], fontsize=8)
        axis.set_xticks(range(len(rows)), rows, fontsize=7)
        axis.tick_params(labelbottom=axis in panels[-across:])
        axis.set_yticks(range(len(modules)), modules, fontsize=7)
    figure.supxlabel("layer", fontsize=8)
    figure.colorbar(image, ax=panels, label="rank", shrink=0.8)
    return figure


class Curve(NamedTuple):
    """A line in each of two panels; `row` decides its colour. Values: a line a seed, a column a step."""

    name: str
    row: str
    panel: str
    metric: str
    scores: pd.DataFrame
    budgets: pd.DataFrame


def curves(lines: list[Curve]) -> "plt.Figure":
    """For each task, the score against the step and the budget under it: mean, and range over seeds."""
    tasks = list(dict.fromkeys(line.panel for line in lines))
    labels = {line.name: "\n".join(textwrap.wrap(line.name, 72)) for line in lines}
    most = max(sum(1 + labels[x.name].count("\n") for x in lines if x.panel == task) for task in tasks)
    size = (1 + 5 * len(tasks), 5.7 + 0.15 * most)
    figure, axes = plt.subplots(
        2, len(tasks), figsize=size, squeeze=False, sharex="col", height_ratios=(3, 1), layout="constrained"
    )
    colours = {row: f"C{i}" for i, row in enumerate(dict.fromkeys(line.row for line in lines))}
    for line in lines:
        (score, budget), colour = axes[:, tasks.index(line.panel)], colours[line.row]
        values = line.scores.dropna(axis=1)  # steps that all seeds have
        score.plot(values.mean(), label=labels[line.name], color=colour)
        low, high = values.min(), values.max()
        score.fill_between(values.columns, low, high, alpha=0.15, color=colour, linewidth=0)
        budget.plot(line.budgets.dropna(axis=1).mean(), color=colour)
        score.set(title=line.panel, ylabel=line.metric)
        budget.set(xlabel="step", ylabel="triplets")
    for score, budget in axes.T:
        score.grid(alpha=0.3)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.4), "borderaxespad": 0}
        budget.legend(*score.get_legend_handles_labels(), fontsize=7, **below)
    return figure


class Agreement(NamedTuple):
    """How far scores agree in runs that differ in the seed alone: means over allocations and seeds."""

    spearman: pd.DataFrame  # (scores, scores), NaN where it is not defined
    jaccard: pd.DataFrame
    chance: float  # Jaccard of two scores that have nothing in common
    sigma_cv: dict[int, float]  # by step, mean over seeds; {} without a posterior

    def both(self) -> pd.DataFrame:
        """Spearman above the diagonal, Jaccard below it."""
        upper = np.triu(np.ones_like(self.spearman, dtype=bool))
        return self.spearman.where(upper, self.jaccard).mask(np.eye(len(upper), dtype=bool))


def agreement(found: dict[str, Agreement]) -> "plt.Figure":
    """A matrix for each setting, Spearman above the diagonal and Jaccard below; σ's variation under them."""
    posterior = any(agreement.sigma_cv for agreement in found.values())
    across = min(len(found), 3)
    down = math.ceil(len(found) / across)
    figure = plt.figure(figsize=(0.5 + 3.6 * across, 3.6 * down + 2.4 * posterior), layout="constrained")
    grid = figure.add_gridspec(down + posterior, across, height_ratios=[3.6] * down + [2.0] * posterior)
    for i, (name, agreement) in enumerate(found.items()):
        axis = figure.add_subplot(grid[i // across, i % across])
        both = agreement.both()
        axis.imshow(both, vmin=0, vmax=1, cmap="viridis")
        for (y, x), value in np.ndenumerate(both):
            if math.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
        axis.set_xticks(range(len(both)), both.columns, fontsize=7, rotation=40, ha="right")
        axis.set_yticks(range(len(both)), both.index, fontsize=7)
        text = f"{chr(97 + i)}) {name} (Jaccard by chance {agreement.chance:.2f})"
        axis.set_title("\n".join(textwrap.wrap(text, 46)), fontsize=8)
    if posterior:
        axis = figure.add_subplot(grid[down, :])
        for i, agreement in enumerate(found.values()):
            if agreement.sigma_cv:
                axis.semilogy(*zip(*agreement.sigma_cv.items(), strict=True), label=f"{chr(97 + i)})")
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("σ: sd / mean", fontsize=8)
        axis.legend(fontsize=7, ncols=len(found))
        axis.grid(alpha=0.3)
    figure.suptitle("Agreement of scores: Spearman above the diagonal, Jaccard of the kept below", fontsize=9)
    return figure


def reliability_diagrams(panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> "plt.Figure":
    """Accuracy against confidence, all seeds together, and how many examples are in each bin under it.

    `panels`: by title, by kind of prediction, probabilities (n, classes) and labels (n,).
    """
    across = min(len(panels), 4)
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(
        2 * down, across, figsize=(0.5 + 3.2 * across, 4.2 * down), squeeze=False, sharex=True,
        height_ratios=(3, 1) * down, layout="constrained",
    )  # fmt: skip
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
        diagram.set_title("\n".join(textwrap.wrap(name, 40)), fontsize=8)
        diagram.set(xlim=(0, 1), ylim=(0, 1))
        diagram.legend(fontsize=7)
        diagram.set_ylabel("accuracy", fontsize=8)
        histogram.set_ylabel("examples", fontsize=8)
        histogram.set_xlabel("confidence", fontsize=8)
    return figure


def temperature(lines: dict[str, list[Any]]) -> "plt.Figure":
    """[V] figure 1: error (100 − the score in percent) and NLL against τ, with their range over seeds.

    `lines`: by name, the two as pandas groups by τ; regression has no NLL.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, (name, both) in enumerate(lines.items()):
        for axis, values in zip(axes, both, strict=False):
            mean, low, high = values.mean(), values.min(), values.max()
            axis.plot(mean, marker="o", markersize=3, color=f"C{i}", label=name)
            axis.fill_between(mean.index, low, high, alpha=0.15, color=f"C{i}", linewidth=0)
    axes[0].set(xlabel="τ", ylabel="error: 100 − score in percent")
    axes[1].set(xlabel="τ", ylabel="NLL")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center")
    return figure
