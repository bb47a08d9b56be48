"""GLUE's metrics, calibration, the agreement of importance scores, and kept ranks as a table: from arrays.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (ECE); Brier, "Verification of forecasts
expressed in terms of probability", 1950.
"""

import itertools
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy  # scipy.stats takes a while and is imported on its first use
from numpy.typing import ArrayLike


def task_metrics(task: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The metrics of a task, GLUE's or a choice task; the first is the one the task is judged by.

    Args:
        predictions, labels: (n,), class indices, or numbers for stsb.

    A correlation with something constant, and F1 where there is nothing positive, is 0.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not predictions.size:
        raise ValueError(f"metrics need predictions and labels (n,), not {predictions.shape}, {labels.shape}")
    if task in ("cola", "stsb"):
        constant = np.ptp(predictions) == 0 or np.ptp(labels) == 0
        pearson = 0.0 if constant else float(scipy.stats.pearsonr(predictions, labels).statistic)
        if task == "cola":  # of zeros and ones Matthews' correlation is Pearson's
            return {"matthews_correlation": pearson}
        spearman = 0.0 if constant else float(scipy.stats.spearmanr(predictions, labels).statistic)
        return {"pearson_spearman": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}
    metrics = {"accuracy": float(np.mean(predictions == labels))}
    if task in ("mrpc", "qqp"):
        positive, truly = predictions == 1, labels == 1
        metrics["f1"] = float(2 * (positive & truly).sum() / max(positive.sum() + truly.sum(), 1))
    return metrics


def class_metrics(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Accuracy, and macro F1: the mean F1 of the classes that occur in either. Class indices, (n,) each."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    occurring = np.union1d(predictions, labels)
    both = np.array([((predictions == c) & (labels == c)).sum() for c in occurring])
    either = np.array([(predictions == c).sum() + (labels == c).sum() for c in occurring])
    return {"accuracy": float(np.mean(predictions == labels)), "macro_f1": float((2 * both / either).mean())}


def calibration(probs: ArrayLike, labels: ArrayLike, bins: int = 10) -> dict[str, float]:
    """Accuracy, NLL, ECE and Brier score of predicted probabilities.

    NLL: mean of −ln p(label), with p not below float64's smallest normal number. Brier: squared error summed
    over classes, mean over examples. ECE: examples are binned by their top probability into `bins` intervals
    of equal width, open on the left and closed on the right; the bins' |accuracy − mean confidence|, weighted
    by their share of the examples.

    Args:
        probs: (n, classes), rows sum to 1.
        labels: (n,), class indices.
    """
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not labels.size:
        raise ValueError(f"calibration needs (n, classes) and (n,), not {probs.shape} and {labels.shape}")
    n, classes = probs.shape
    p_label = probs[np.arange(n), labels]
    counts, confidence, accuracy = reliability(probs, labels, bins)
    return {
        "accuracy": float((probs.argmax(axis=1) == labels).mean()),
        "nll": float(-np.log(np.maximum(p_label, np.finfo(np.float64).tiny)).mean()),
        "ece": float(np.nansum(counts * np.abs(accuracy - confidence)) / n),
        "brier": float(((probs - np.eye(classes)[labels]) ** 2).sum(axis=1).mean()),
    }


def reliability(probs: np.ndarray, labels: np.ndarray, bins: int = 10) -> tuple[np.ndarray, ...]:
    """Of each of `calibration`'s bins: examples, their mean confidence, their accuracy; (bins,) each.

    Mean confidence and accuracy of an empty bin are NaN.
    """
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    # right=True: edges[i − 1] < confidence ≤ edges[i]; i/bins is rounded once, as a literal 0.3 is.
    bin_of = np.digitize(confidence, np.arange(1, bins) / bins, right=True)
    counts, *sums = (np.bincount(bin_of, weights, minlength=bins) for weights in (None, confidence, right))
    with np.errstate(invalid="ignore"):
        return counts, sums[0] / counts, sums[1] / counts


def score_agreement(scores: Mapping[str, np.ndarray], k: int) -> dict[str, dict[str, float | None]]:
    """How far importance scores of the same n triplets agree, for each pair of them ("a/b").

    "spearman": the rank correlation of the two; None where one is the same for all triplets.
    "jaccard": of the two sets of k triplets with the highest scores (ties go to the earlier one), the size of
    their intersection over that of their union; 1 for k = 0.

    Args:
        scores: by name, (n,) each; at least two.
        k: 0 ≤ k ≤ n.
    """
    S = np.stack(list(scores.values()))
    with np.errstate(invalid="ignore"):
        spearman = np.corrcoef(scipy.stats.rankdata(S, axis=1))  # NaN where one is constant
    top = [set(best[:k].tolist()) for best in np.argsort(-S, axis=1, kind="stable")]
    agreement = {"spearman": {}, "jaccard": {}}
    for (i, a), (j, b) in itertools.combinations(enumerate(scores), 2):
        agreement["spearman"][f"{a}/{b}"] = None if np.isnan(spearman[i, j]) else float(spearman[i, j])
        agreement["jaccard"][f"{a}/{b}"] = len(top[i] & top[j]) / len(top[i] | top[j]) if k else 1.0
    return agreement


def rank_rows(ranks: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Ranks by adapter → by layer, the last number in a name ("" where there is none), and module in it.

    Where two adapters would be in one place (an encoder's and a decoder's), a layer has its whole name.
    """
    parts = [re.fullmatch(r"(?:(.*\.)?(\d+)\.)?(.+)", name).groups(default="") for name in ranks]
    whole = len({(layer, module) for _, layer, module in parts}) < len(ranks)
    rows: dict[str, dict[str, float]] = {}
    for (before, layer, module), rank in zip(parts, ranks.values(), strict=True):
        rows.setdefault(before * whole + layer, {})[module] = rank
    return rows


def rank_table(ranks: Mapping[str, float]) -> str:
    """Ranks by adapter as text: one row per layer, one column per module."""
    table = pd.DataFrame(rank_rows(ranks)).T.rename_axis("layer").reset_index()
    return table.to_string(index=False, na_rep="", float_format="{:g}".format)
