"""harness/metrics.py against hand-worked tables, scipy, slow loops."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
from scipy import stats

from harness.metrics import calibration, class_metrics, score_agreement, task_metrics

TASKS = {
    "cola": {"matthews_correlation"},
    "stsb": {"pearson_spearman", "pearson", "spearman"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    "sst2": {"accuracy"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
}

# 6 true positives, 3 true negatives, 1 false positive, 2 false negatives
LABELS = [1] * 6 + [0] * 3 + [0] + [1] * 2
PREDICTIONS = [1] * 6 + [0] * 3 + [1] + [0] * 2


# --- GLUE's metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_own_metrics_as_plain_floats(task: str):
    got = task_metrics(task, np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]))
    assert set(got) == TASKS[task]
    assert all(isinstance(value, float) for value in got.values())


def test_matthews_of_the_hand_worked_table():
    # (6·3 − 1·2) / √(7·8·4·5) = 16/√1120
    got = task_metrics("cola", PREDICTIONS, LABELS)
    assert got["matthews_correlation"] == pytest.approx(16 / math.sqrt(1120), rel=1e-12)


def test_matthews_is_pearsons_correlation_of_zeros_and_ones():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = rng.integers(0, 2, 40)
        predictions = np.where(rng.random(40) < 0.3, 1 - labels, labels)
        got = task_metrics("cola", predictions, labels)["matthews_correlation"]
        assert got == pytest.approx(stats.pearsonr(predictions, labels).statistic, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("flip", "want"), [(False, 1.0), (True, -1.0)])
def test_matthews_of_all_right_is_one_and_of_all_wrong_minus_one(flip: bool, want: float):
    labels = np.array([0, 1, 1, 0, 1])
    got = task_metrics("cola", 1 - labels if flip else labels, labels)
    assert got["matthews_correlation"] == pytest.approx(want, abs=1e-12)


def test_matthews_of_a_data_set_as_large_as_qqp_does_not_overflow():
    # four counts of 3·10⁵ multiply to 8·10²¹, above int64
    labels = np.tile(np.array([0, 1, 0, 1], dtype=np.int32), 150_000)
    predictions = np.tile(np.array([0, 1, 1, 1], dtype=np.int32), 150_000)
    got = task_metrics("cola", predictions, labels)["matthews_correlation"]
    assert got == pytest.approx((2 * 1 - 1 * 0) / math.sqrt(3 * 2 * 2 * 1), rel=1e-9)


@pytest.mark.parametrize("constant", [0, 1])
def test_matthews_of_a_constant_prediction_is_zero(constant: int):
    assert task_metrics("cola", [constant] * 5, [0, 1, 1, 0, 1]) == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_accuracy_and_f1_of_the_hand_worked_table(task: str):
    got = task_metrics(task, PREDICTIONS, LABELS)
    # 9 of 12 right; 2·6 / (2·6 + 1 + 2)
    assert got == pytest.approx({"accuracy": 0.75, "f1": 0.8}, rel=1e-12)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [0, 0, 0, 0]])
def test_f1_without_a_positive_prediction_is_zero(labels: list[int]):
    assert task_metrics("mrpc", [0, 0, 0, 0], labels)["f1"] == 0.0


def test_accuracy_counts_the_classes_of_mnli():
    assert task_metrics("mnli", [0, 1, 2, 2, 1], [0, 2, 2, 2, 0])["accuracy"] == pytest.approx(0.6)


def test_stsb_is_scipys_pearson_and_spearman_and_their_mean():
    rng = np.random.default_rng(1)
    labels = np.round(rng.uniform(0, 5, 200), 1)  # ties, as in the real data
    predictions = labels + rng.normal(size=200)
    got = task_metrics("stsb", predictions, labels)
    pearson, spearman = stats.pearsonr(predictions, labels)[0], stats.spearmanr(predictions, labels)[0]
    want = {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    assert got == pytest.approx(want, rel=1e-10)


def test_spearman_of_the_hand_worked_table_averages_the_ranks_of_ties():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    got = task_metrics("stsb", [0.0, 1.0, 1.0, 7.0], [0.0, 1.0, 2.0, 3.0])
    assert got["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5), rel=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 2.7, 1e6 / 3])
def test_correlations_of_a_constant_prediction_are_zero(constant: float):
    # 0.1 and its like: the mean of seven of them is not 0.1, so a variance looks positive
    got = task_metrics("stsb", np.full(7, constant), [0.0, 1.0, 2.5, 3.0, 4.0, 5.0, 1.5])
    assert got == {"pearson_spearman": 0.0, "pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("task", TASKS)
def test_lists_and_arrays_are_the_same_to_it(task: str):
    predictions, labels = [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]
    arrays = task_metrics(task, np.array(predictions), np.array(labels))
    assert task_metrics(task, predictions, labels) == arrays


# --- metrics of one's own classes ---------------------------------------------------------------------------


def test_macro_f1_of_the_hand_worked_table():
    labels = [0, 0, 0, 1, 1, 2, 2, 2]
    predictions = [0, 0, 1, 1, 2, 2, 2, 5]
    # F1 of 0: 2·2/(2 + 3); of 1: 2·1/(2 + 2); of 2: 2·2/(3 + 3); of 5, which is only predicted: 0
    got = class_metrics(predictions, labels)
    assert got["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3 + 0) / 4, rel=1e-12)
    assert got["accuracy"] == 5 / 8


def test_macro_f1_of_two_classes_is_the_mean_of_f1_either_way_round():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, (2, 50))
    f1 = (
        task_metrics("mrpc", predictions, labels)["f1"],
        task_metrics("mrpc", 1 - predictions, 1 - labels)["f1"],
    )
    assert class_metrics(predictions, labels)["macro_f1"] == pytest.approx(sum(f1) / 2, rel=1e-12)


# --- calibration --------------------------------------------------------------------------------------------


def slow_ece(probs: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Σ_b |B_b|/n · |accuracy(B_b) − confidence(B_b)| over the intervals (b/bins, (b+1)/bins]."""
    total = 0.0
    for b in range(bins):
        inside = []
        for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
            confidence = max(row)
            if b / bins < confidence <= (b + 1) / bins:
                inside.append((confidence, float(row.index(confidence) == label)))
        if inside:
            gap = sum(right for _, right in inside) - sum(confidence for confidence, _ in inside)
            total += abs(gap) / len(probs)
    return total


def random_probabilities(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.7), n)
    labels = np.array([rng.choice(classes, p=0.5 * p + 0.5 / classes) for p in probs])
    return probs, labels


def two_classes(*top: float) -> np.ndarray:
    return np.array([[p, 1 - p] for p in top])


def five_classes(*top: float) -> np.ndarray:
    """Class 0 has the top probability, the other four share the rest."""
    return np.array([[p] + [(1 - p) / 4] * 4 for p in top])


def test_calibration_of_the_hand_worked_table():
    probs = np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    got = calibration(probs, np.array([0, 1, 1]))
    want = {
        "accuracy": 2 / 3,
        "nll": -(math.log(0.8) + math.log(0.4) + math.log(0.7)) / 3,
        "brier": (2 * 0.2**2 + 2 * 0.6**2 + 2 * 0.3**2) / 3,
        "ece": (abs(1 - 0.8) + abs(0 - 0.6) + abs(1 - 0.7)) / 3,
    }
    assert got == pytest.approx(want, rel=1e-12)


def test_the_nll_of_a_label_without_probability_is_that_of_float64s_smallest_number():
    assert calibration([[1.0, 0.0]], [1])["nll"] == pytest.approx(-math.log(sys.float_info.min))


def test_calibration_of_three_classes_by_hand():
    probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    got = calibration(probs, np.array([1, 2]))
    want = {
        "accuracy": 0.5,
        "nll": -(math.log(0.3) + math.log(0.8)) / 2,
        "brier": (0.25 + 0.49 + 0.04 + 0.01 + 0.01 + 0.04) / 2,
        "ece": (0.5 + 0.2) / 2,
    }
    assert got == pytest.approx(want, rel=1e-12)


def test_calibration_of_confident_and_right_predictions_is_perfect():
    got = calibration(np.eye(3), np.arange(3))
    assert got == {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0}


def test_calibration_is_plain_floats():
    assert all(isinstance(v, float) for v in calibration(two_classes(0.7, 0.9), [0, 1]).values())


@pytest.mark.parametrize("edge", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_a_probability_on_an_edge_is_in_the_interval_below_it(edge: float):
    below = edge - 0.05  # right; the one on the edge is wrong
    got = calibration(five_classes(below, edge), np.array([0, 1]))
    assert got["ece"] == pytest.approx(abs(0.5 - (below + edge) / 2), rel=1e-9)


@pytest.mark.parametrize("edge", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_probability_on_an_edge_is_not_in_the_interval_above_it(edge: float):
    above = edge + 0.05  # right; the one on the edge is wrong
    got = calibration(five_classes(above, edge), np.array([0, 1]))
    assert got["ece"] == pytest.approx(((1 - above) + edge) / 2, rel=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_is_a_slow_loop_over_the_bins(classes: int, bins: int):
    probs, labels = random_probabilities(600, classes, seed=classes)
    got = calibration(probs, labels, bins=bins)["ece"]
    assert got == pytest.approx(slow_ece(probs, labels, bins), rel=1e-10)


def test_the_bins_are_ten_unless_given():
    probs, labels = random_probabilities(300, 3, seed=5)
    assert calibration(probs, labels) == calibration(probs, labels, bins=10)


def test_ece_with_one_bin_is_accuracy_against_mean_confidence():
    probs, labels = random_probabilities(300, 3, seed=6)
    gap = np.mean(probs.argmax(1) == labels) - probs.max(1).mean()
    assert calibration(probs, labels, bins=1)["ece"] == pytest.approx(abs(gap), rel=1e-10)


def test_nll_brier_and_accuracy_are_slow_loops_over_the_examples():
    probs, labels = random_probabilities(400, 4, seed=7)
    nll = brier = right = 0.0
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        nll -= math.log(row[label])
        brier += sum((p - (c == label)) ** 2 for c, p in enumerate(row))
        right += row.index(max(row)) == label
    got = calibration(probs, labels)
    want = {"nll": nll / 400, "brier": brier / 400, "accuracy": right / 400}
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-10)


def test_calibration_takes_lists_and_float32():
    probs, labels = random_probabilities(50, 3, seed=8)
    want = calibration(probs, labels)
    assert calibration(probs.tolist(), labels.tolist()) == pytest.approx(want, rel=1e-12)
    assert calibration(probs.astype(np.float32), labels) == pytest.approx(want, rel=1e-5)


# --- agreement of scores ------------------------------------------------------------------------------------


def test_agreement_of_the_hand_worked_table():
    # Ranks of a: 4 3 2 1, of b: 3 4 1 2; Σd² = 4, so Spearman is 1 − 6·4/(4·15) = 0.6. The best two of both
    # are the first two; of c they are the last two, and of a and c together all four.
    scores = {"a": [9.0, 4.0, 3.0, -1.0], "b": [0.3, 0.4, 0.1, 0.2], "c": [1.0, 2.0, 3.0, 4.0]}
    agreement = score_agreement({name: np.array(values) for name, values in scores.items()}, 2)
    assert agreement["spearman"] == pytest.approx({"a/b": 0.6, "a/c": -1.0, "b/c": -0.6})
    assert agreement["jaccard"] == {"a/b": 1.0, "a/c": 0.0, "b/c": 0.0}
    assert score_agreement({"a": np.array(scores["a"]), "c": np.array(scores["c"])}, 3)["jaccard"] == {
        "a/c": 0.5
    }


@pytest.mark.parametrize("ties", [False, True])
def test_agreement_is_scipys_spearman_and_the_sets_own_jaccard(ties: bool):
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=50) for name in "abc"}
    if ties:
        scores = {name: values.round(0) for name, values in scores.items()}
    for k in (1, 17, 50):
        agreement = score_agreement(scores, k)
        for a, b in itertools.combinations("abc", 2):
            want = stats.spearmanr(scores[a], scores[b]).statistic
            assert agreement["spearman"][f"{a}/{b}"] == pytest.approx(want, abs=1e-12)
            kept = [set(sorted(range(50), key=lambda i: -scores[name][i])[:k]) for name in (a, b)]
            assert agreement["jaccard"][f"{a}/{b}"] == len(kept[0] & kept[1]) / len(kept[0] | kept[1])


def test_agreement_with_a_constant_score_or_infinite_ones_is_defined_where_it_can_be():
    scores = {"a": np.array([1.0, np.inf, 2.0]), "constant": np.ones(3), "b": np.array([1.0, 9.0, 2.0])}
    agreement = score_agreement(scores, 0)
    assert agreement["spearman"] == {"a/constant": None, "a/b": 1.0, "constant/b": None}
    assert agreement["jaccard"] == {"a/constant": 1.0, "a/b": 1.0, "constant/b": 1.0}
    assert json.loads(json.dumps(agreement)) == agreement
