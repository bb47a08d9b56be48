"""tools.compare: paired t-intervals by scipy and by hand, Holm's correction by a worked table."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.task import UsageError
from tools.compare import MEASURES, compared, differences, holm


def measures(values: dict[tuple[str, str], list[float]], measure: str = "score") -> pd.DataFrame:
    """By (row, task), a number a seed; seeds from 1."""
    lines = [
        {"row": row, "how": "mean", "task": task, "seed": seed, measure: value}
        for (row, task), of_seeds in values.items()
        for seed, value in enumerate(of_seeds, start=1)
    ]
    return pd.DataFrame(lines).reindex(columns=["row", "how", "task", "seed", *MEASURES])


A, B = [0.50, 0.54, 0.49, 0.58, 0.52], [0.47, 0.50, 0.48, 0.51, 0.48]


def test_the_interval_and_p_are_those_of_the_paired_t_test():
    table = compared(measures({("a", "cola"): A, ("b", "cola"): B}), ["a", "b"])
    (line,) = table.itertuples()
    d = 100 * (np.array(A) - B)
    half = stats.t.ppf(0.975, 4) * d.std(ddof=1) / np.sqrt(5)
    assert (line.difference, line.n) == (pytest.approx(d.mean()), 5)
    assert (line.low, line.high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert line.p == pytest.approx(stats.ttest_rel(A, B).pvalue)


def test_holms_correction_is_the_worked_table():
    # 0.01·4, 0.02·3, 0.03·2, 0.5·1, each at least the one before.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])


def test_the_words_follow_the_corrected_p_and_the_direction_that_is_better():
    high, low = [0.90, 0.91, 0.92, 0.90, 0.91], [0.50, 0.52, 0.51, 0.50, 0.53]
    same = [0.50, 0.52, 0.50, 0.49, 0.54]
    for measure, word in (("score", "better"), ("nll", "worse"), ("ece", "worse"), ("brier", "worse")):
        of = measures({("a", "cola"): high, ("b", "cola"): low, ("c", "cola"): same}, measure)
        (line,) = compared(of, ["a", "b"]).itertuples()
        points = 100 if measure in ("score", "ece") else 1
        assert (line.verdict, line.difference) == (word, pytest.approx(points * 0.396))
        assert list(compared(of, ["b", "c"])["verdict"]) == ["not distinguishable"]


def test_one_p_below_a_twentieth_is_no_claim_among_many():
    rows = {("a", "cola"): A, **{(name, "cola"): B for name in "bcdefg"}}
    table = compared(measures(rows), ["a", *"bcdefg"])
    assert (table["p"] < 0.05).all()
    assert set(table["verdict"]) == {"not distinguishable"}


def test_differences_that_are_all_the_same_are_no_claim():
    of = measures({("a", "cola"): [363 / 400, 364 / 400], ("b", "cola"): [362 / 400, 363 / 400]})
    (line,) = compared(of, ["a", "b"]).itertuples()
    assert (line.difference, line.p, line.verdict) == (pytest.approx(0.25), 1, "not distinguishable")


def test_over_tasks_the_seeds_count_that_all_tasks_have():
    of = measures({("a", "cola"): A, ("b", "cola"): B, ("a", "rte"): A[:3], ("b", "rte"): B[::-1][:3]})
    found = differences(of, "a", "b", "score")
    assert {task: len(d) for task, d in found.items()} == {"cola": 5, "rte": 3, "mean of 2": 3}
    cola, rte = np.array(A[:3]) - B[:3], np.array(A[:3]) - B[::-1][:3]
    assert found["mean of 2"] == pytest.approx(50 * (cola + rte))


def test_a_task_without_common_seeds_leaves_no_mean_over_tasks():
    of = measures({("a", "cola"): A, ("b", "cola"): B, ("a", "rte"): A, ("b", "rte"): B})
    of.loc[(of["row"] == "b") & (of["task"] == "rte"), "seed"] += 100
    found = differences(of, "a", "b", "score")
    assert {task: len(d) for task, d in found.items()} == {"cola": 5, "rte": 0, "mean of 2": 0}
    assert set(compared(of, ["a", "b"])["task"]) == {"cola"}


def test_seeds_are_paired_by_number_and_not_by_order():
    of = measures({("a", "cola"): A, ("b", "cola"): B}).sample(frac=1, random_state=0)
    assert differences(of, "a", "b", "score")["cola"] == pytest.approx(100 * (np.array(A) - B))


def test_a_row_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UsageError, match="no evaluated row c; there are a, b"):
        compared(measures({("a", "cola"): A, ("b", "cola"): B}), ["a", "c"])
    with pytest.raises(UsageError, match="b has no evaluation 'tau=1', only mean"):
        compared(measures({("a", "cola"): A, ("b", "cola"): B}), ["a", "b:tau=1"])


def test_two_runs_with_one_seed_are_refused():
    twice = pd.concat([measures({("a", "cola"): A}), measures({("a", "cola"): B, ("b", "cola"): B})])
    with pytest.raises(UsageError, match="a: two of its runs have the same task and seed"):
        compared(twice, ["a", "b"])
