"""budget.py against exact fractions, hand-worked tables, a plain sort."""

import math
import random
from fractions import Fraction

import pytest
import torch

import budget

torch.set_num_threads(1)


def reference_budget(b0: int, bT: int, T: int, t_i: int, t_f: int, t: int) -> int:
    """b(t) as AdaLoRA eq. 12 has it, in exact fractions."""
    if t <= t_i:
        return b0
    if t > T - t_f:
        return bT
    return math.floor(bT + (b0 - bT) * (1 - Fraction(t - t_i, T - t_f - t_i)) ** 3)


def reference_due(T: int, t_i: int, t_f: int, interval: int, t: int) -> bool:
    """Every ΔT-th update of the middle stretch t_i < t ≤ T − t_f, and its last one in any case."""
    return t == T - t_f or (t_i < t < T - t_f and t % interval == 0)


def random_settings(count: int) -> list[tuple[int, int, int, int, int, int]]:
    draw = random.Random(0)
    settings = []
    for _ in range(count):
        T = draw.choice([1, 2, 7, 30, 200, 6700, 10**6])
        t_i = draw.randrange(T)
        t_f = draw.randrange(T - t_i)
        b0 = draw.choice([0, 1, 9, 216, 10**5])
        settings.append((b0, draw.randint(0, b0), T, t_i, t_f, draw.choice([1, 2, 3, 10, 100])))
    return settings


def steps_to_try(T: int, t_i: int, t_f: int) -> list[int]:
    """Everything in a short run; the ends, their neighbours and some of the middle in a long one."""
    if T <= 30:
        return list(range(T + 1))
    corners = [c + d for c in (0, t_i, T - t_f, T) for d in (-1, 0, 1)]
    return sorted(
        {t for t in corners + [random.Random(T).randrange(T + 1) for _ in range(20)] if 0 <= t <= T}
    )


# --- the schedule -------------------------------------------------------------------------------------------


def test_the_budget_of_a_thousand_random_settings_is_that_of_exact_fractions():
    for b0, bT, T, t_i, t_f, interval in random_settings(1000):
        schedule = budget.CubicBudget(b0, bT, T, t_i, t_f, interval)
        for t in steps_to_try(T, t_i, t_f):
            assert schedule(t) == reference_budget(b0, bT, T, t_i, t_f, t), (b0, bT, T, t_i, t_f, t)


def test_an_allocation_of_a_thousand_random_settings_is_due_when_the_plain_rule_says_so():
    for b0, bT, T, t_i, t_f, interval in random_settings(1000):
        schedule = budget.CubicBudget(b0, bT, T, t_i, t_f, interval)
        for t in steps_to_try(T, t_i, t_f):
            assert schedule.due(t) == reference_due(T, t_i, t_f, interval, t), (T, t_i, t_f, interval, t)


def test_a_hand_worked_schedule():
    schedule = budget.CubicBudget(
        initial=100, target=20, total_steps=10, warmup_steps=2, final_steps=4, interval=2
    )
    # M = 4: 20 + 80·(27/64, 8/64, 1/64, 0) = 53.75, 30, 21.25, 20
    assert [schedule(t) for t in range(11)] == [100, 100, 100, 53, 30, 21, 20, 20, 20, 20, 20]
    assert [t for t in range(11) if schedule.due(t)] == [4, 6]


def test_the_last_allocation_happens_even_when_the_interval_does_not_meet_it():
    schedule = budget.CubicBudget(
        initial=12, target=8, total_steps=20, warmup_steps=3, final_steps=5, interval=4
    )
    assert [t for t in range(21) if schedule.due(t)] == [4, 8, 12, 15]


def test_an_interval_longer_than_the_run_leaves_the_one_last_allocation():
    schedule = budget.CubicBudget(
        initial=12, target=8, total_steps=20, warmup_steps=3, final_steps=5, interval=99
    )
    assert [t for t in range(21) if schedule.due(t)] == [15]


def test_nothing_is_due_at_the_end_of_the_warm_up_itself():
    schedule = budget.CubicBudget(
        initial=12, target=8, total_steps=20, warmup_steps=4, final_steps=4, interval=4
    )
    assert [t for t in range(21) if schedule.due(t)] == [8, 12, 16]


def test_nothing_is_due_before_the_first_update():
    assert not budget.CubicBudget(12, 8, 20, warmup_steps=0, final_steps=0, interval=5).due(0)


def test_without_a_final_phase_the_last_update_reaches_the_target():
    schedule = budget.CubicBudget(12, 8, 20, warmup_steps=0, final_steps=0, interval=7)
    assert (schedule(20), schedule.due(20)) == (8, True)


def test_the_budget_starts_at_the_initial_and_ends_at_the_target():
    for b0, bT, T, t_i, t_f, interval in random_settings(200):
        schedule = budget.CubicBudget(b0, bT, T, t_i, t_f, interval)
        assert {schedule(0), schedule(t_i)} == {b0}
        assert {schedule(T - t_f), schedule(T)} == {bT}


def test_the_budget_never_grows():
    schedule = budget.CubicBudget(216, 144, 500, 60, 120, 1)
    values = [schedule(t) for t in range(501)]
    assert values == sorted(values, reverse=True)


def test_a_target_equal_to_the_start_never_moves():
    schedule = budget.CubicBudget(144, 144, 500, 60, 120, 10)
    assert {schedule(t) for t in range(501)} == {144}


def test_a_budget_is_an_int():
    schedule = budget.CubicBudget(216, 144, 500, 60, 120, 10)
    assert all(type(schedule(t)) is int for t in range(501))


def test_a_triplet_too_many_from_rounding_does_not_appear_in_a_long_run():
    # 1 − u/M rounded to float64 puts floor() on the wrong side where the exact value is an integer
    M = 3 * 10**5
    schedule = budget.CubicBudget(M**3, 0, M, 0, 0, 1)
    assert all(schedule(t) == (M - t) ** 3 for t in range(0, M + 1, 997))


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": 60, "final_steps": 40},  # t_i + t_f = T
        {"warmup_steps": 90, "final_steps": 40},  # t_i + t_f > T
        {"target": 13},  # above the start
        {"interval": 0},
        {"interval": -1},
        {"initial": -1, "target": -2},
        {"target": -1},
        {"warmup_steps": -1},
        {"final_steps": -1},
        {"total_steps": 0, "warmup_steps": 0, "final_steps": 0},
        {"total_steps": -5, "warmup_steps": 0, "final_steps": 0},
    ],
    ids=str,
)
def test_an_impossible_schedule_is_refused_with_words(wrong: dict[str, int]):
    right = {
        "initial": 12,
        "target": 8,
        "total_steps": 100,
        "warmup_steps": 10,
        "final_steps": 20,
        "interval": 5,
    }
    budget.CubicBudget(**right)
    with pytest.raises(ValueError, match=r"\S"):
        budget.CubicBudget(**{**right, **wrong})


# --- which triplets -----------------------------------------------------------------------------------------


def reference_keep(values: list[float], k: int) -> list[bool]:
    """The k largest; of two equal ones the earlier."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = set(order[:k])
    return [i in kept for i in range(len(values))]


def test_keep_top_is_a_plain_sort_on_scores_full_of_ties():
    draw = random.Random(1)
    for _ in range(500):
        values = [float(draw.randint(0, 4)) for _ in range(draw.randint(1, 40))]
        k = draw.randint(0, len(values))
        assert budget.keep_top(torch.tensor(values), k).tolist() == reference_keep(values, k), (values, k)


def test_keep_top_is_a_plain_sort_on_a_long_vector_full_of_ties():
    # long enough that an unstable sort shows itself
    values = random.Random(2).choices([0.0, 1.0, 2.0], k=10_000)
    for k in (1, 777, 5000, 9999):
        assert budget.keep_top(torch.tensor(values), k).tolist() == reference_keep(values, k)


def test_keep_top_with_infinities_is_a_plain_sort():
    draw = random.Random(4)
    for _ in range(200):
        values = draw.choices([-math.inf, -1.0, 0.0, 2.5, math.inf], k=15)
        k = draw.randint(0, 15)
        assert budget.keep_top(torch.tensor(values), k).tolist() == reference_keep(values, k), (values, k)


@pytest.mark.parametrize("k", range(8))
def test_keep_top_keeps_exactly_k_when_all_scores_are_equal_and_they_are_the_first(k: int):
    assert budget.keep_top(torch.ones(7), k).tolist() == [i < k for i in range(7)]


@pytest.mark.parametrize("value", [-math.inf, math.inf, 0.0])
def test_keep_top_keeps_the_first_k_even_when_every_score_is(value: float):
    assert budget.keep_top(torch.full((5,), value), 2).tolist() == [True, True, False, False, False]


def test_keep_top_of_nothing_keeps_nothing():
    assert budget.keep_top(torch.tensor([]), 0).tolist() == []


def test_keep_top_zero_keeps_none_and_n_keeps_all():
    values = torch.tensor([0.3, -1.0, 5.0])
    assert not bool(budget.keep_top(values, 0).any())
    assert bool(budget.keep_top(values, 3).all())


def test_keep_top_does_not_confuse_minus_zero_with_less_than_zero():
    assert budget.keep_top(torch.tensor([-0.0, 0.0]), 1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keep_top_answers_with_booleans_of_the_same_length(dtype: torch.dtype):
    values = torch.tensor([3.0, 1.0, 2.0], dtype=dtype)
    kept = budget.keep_top(values, 2)
    assert kept.dtype == torch.bool
    assert kept.tolist() == [True, False, True]
    assert values.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("k", [-1, 4])
def test_keeping_less_than_none_or_more_than_there_are_is_refused_with_words(k: int):
    with pytest.raises(ValueError, match=r"\S"):
        budget.keep_top(torch.ones(3), k)
