"""Rows of finished runs against each other: paired differences over seeds, with a verdict.

A row is a folder of runs and the name that they share without task and seed: "results/study/lora-ivon" for
`results/study/cola/lora-ivon-s11` and so on. "…:HOW" is one of the ways to predict that tools.evaluate has
recorded (without it, "mean").
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from harness.task import UsageError
from tools.finished import find_runs, read_evaluations, skip

MEASURES = {"score": 100, "nll": 1, "ece": 100, "brier": 1}  # and what they are multiplied by
LOWER_IS_BETTER = ("nll", "ece", "brier")


def read_measures(rows: list[str], split: str) -> pd.DataFrame:
    """All evaluated runs in the rows' folders, one line per run and way to predict: row (with its folder),
    how, task, seed, MEASURES (NaN where a task has none). Those of `rows` that cannot be read are named.
    """
    found, asked = [], {without_how(row) for row in rows}
    for folder in dict.fromkeys(Path(row).parent for row in rows):
        for run in find_runs([folder]):
            task, seed = run.task, run.config["seed"]
            row = str(folder / run.folder.name.removeprefix(f"{task.name}-").removesuffix(f"-s{seed}"))
            try:
                lines = read_evaluations(run, split)
            except UsageError as error:
                if row in asked:
                    skip(run.folder, error)
                continue
            found.append(lines.assign(row=row, task=task.name, seed=seed, score=lines[task.metric]))
    if not found:
        raise UsageError(f"no run there has an evaluation of {split}: run tools.evaluate")
    return pd.concat(found, ignore_index=True).reindex(columns=["row", "how", "task", "seed", *MEASURES])


def without_how(row: str) -> str:
    return str(Path(row).parent / Path(row).name.partition(":")[0])


def differences(measures: pd.DataFrame, a: str, b: str, measure: str) -> dict[str, np.ndarray]:
    """Row a minus row b for each task, over the seeds that both rows have. "mean of n" averages the n tasks
    that both have, over the seeds that both have on all of them."""

    def of(row: str) -> pd.DataFrame:
        name, _, how = Path(row).name.partition(":")
        own = measures[measures["row"] == without_how(row)]
        if own.empty:
            there = sorted({Path(other).name for other in measures["row"]})
            raise UsageError(f"there is no evaluated row {name}; there are {', '.join(there)}")
        there, own = set(own["how"]), own[own["how"] == (how or "mean")]
        if own.empty:
            raise UsageError(f"{name} has no evaluation {how!r}, only {', '.join(sorted(there))}")
        if own.duplicated(["seed", "task"]).any():
            raise UsageError(f"{row}: two of its runs have the same task and seed")
        return own.pivot(index="seed", columns="task", values=measure).dropna(axis=1, how="all")

    first, second = of(a), of(b)
    both = MEASURES[measure] * (first - second)[first.columns.intersection(second.columns)]
    found = {task: both[task].dropna().to_numpy() for task in both}
    mean = both.dropna().mean(axis=1).to_numpy()
    return found | ({f"mean of {len(found)}": mean} if len(found) > 1 else {})


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values corrected for their number: the i-th smallest of n times n − i + 1, or the one before if that
    is larger. Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p = np.asarray(list(p), dtype=float)
    order = p.argsort()
    corrected = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    return np.minimum(corrected[order.argsort()], 1)


def compared(measures: pd.DataFrame, rows: list[str]) -> pd.DataFrame:
    """The first row against each of the others: mean difference, 95% t-interval, n, p, Holm's p, verdict.

    Where all differences are the same there is nothing to estimate an error from: p is 1.
    """
    first, lines = rows[0], []
    for other in rows[1:]:
        for measure in MEASURES:
            for task, d in differences(measures, first, other, measure).items():
                if len(d) > 1:
                    test = stats.ttest_1samp(d, 0) if d.std() > 1e-9 else None
                    low, high = test.confidence_interval(0.95) if test else (d.mean(), d.mean())
                    p = test.pvalue if test else 1.0
                    lines.append([first, other, measure, task, d.mean(), low, high, len(d), p])
    names = ["row", "against", "measure", "task", "difference", "low", "high", "n", "p"]
    table = pd.DataFrame(lines, columns=names)
    if table.empty:
        raise UsageError("these rows have no two seeds in common")
    table["holm"] = holm(table["p"])
    lower = table["measure"].isin(LOWER_IS_BETTER)
    verdict = np.where((table["difference"] < 0) == lower, "better", "worse")
    table["verdict"] = np.where(table["holm"] < 0.05, verdict, "not distinguishable")
    return table


def print_compare(rows: list[str], split: str) -> pd.DataFrame:
    """Print the comparison as Markdown, score and ECE in points, and return it."""
    if len(rows) < 2:
        raise UsageError("give two rows or more: the first is compared with the others")
    table = compared(read_measures(rows, split), rows)
    if len({Path(row).name for row in rows}) == len(set(rows)):  # unique without their folders
        table[["row", "against"]] = table[["row", "against"]].map(lambda row: Path(row).name)
    print("| row | against | measure | task | difference [95%] | n | p | Holm's p | verdict |")
    print("| --- " * 9 + "|")
    for line in table.itertuples():
        digits = 2 if MEASURES[line.measure] == 100 else 4
        interval = f"{line.difference:+.{digits}f} [{line.low:+.{digits}f}, {line.high:+.{digits}f}]"
        what = f"{line.row} | {line.against} | {line.measure} | {line.task} | {interval}"
        print(f"| {what} | {line.n} | {line.p:.2g} | {line.holm:.2g} | {line.verdict} |")
    return table
