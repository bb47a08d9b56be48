"""scores.py against scipy, 80-digit decimals, plain NumPy loops, hand-worked numbers."""

import io
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy import stats

import scores

torch.set_num_threads(1)

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def erf(z: Decimal) -> Decimal:
    """erf by its series of positive terms, 2/√π · e^{−z²} · Σ 2ⁿ z^{2n+1} / (2n+1)!!: nothing cancels."""
    term = total = z
    n = 0
    while term > total * Decimal("1e-60"):
        n += 1
        term = term * 2 * z * z / (2 * n + 1)
        total += term
    return 2 / PI.sqrt() * (-z * z).exp() * total


def exact_snr_abs(mu: float, sigma: float) -> float:
    """SNR(abs θ) exactly as it is defined, in 80 digits.

    From x = 15 on it is x: there E|θ|/σ − x = δ < e^{−112}, 30 orders of magnitude below float64's
    last digit.
    """
    with localcontext() as context:
        context.prec = 80
        x = abs(Decimal(mu)) / Decimal(sigma)
        if x > 15:
            return float(x)
        mean = (2 / PI).sqrt() * (-x * x / 2).exp()
        if x > 0:
            mean += x * erf(x / Decimal(2).sqrt())
        return float(mean / (1 + x * x - mean * mean).sqrt())


def x_grid(points: int = 400) -> np.ndarray:
    """0, then [1e-8, 1e8], closest where the formula bends."""
    return np.concatenate(
        [
            [0.0],
            np.geomspace(1e-8, 1e8, points),
            np.linspace(0.05, 12.0, points),
            [14.9, 15.1, 40.0, 1e3, 5e3],
        ]
    )


def relative_error(got: torch.Tensor, want: list[float]) -> float:
    want_array = np.asarray(want)
    return float(np.max(np.abs(got.double().numpy() - want_array) / want_array))


# --- SNR of |θ| ---------------------------------------------------------------------------------------------


def test_the_decimal_reference_agrees_with_scipy_so_the_two_references_are_one():
    for x in (0.0, 0.1, 1.0, 3.0, 8.0):
        mean, variance = stats.foldnorm.stats(x, moments="mv")
        assert exact_snr_abs(x, 1.0) == pytest.approx(float(mean / np.sqrt(variance)), rel=1e-11)


def test_snr_abs_is_scipys_mean_over_standard_deviation_of_the_folded_normal():
    rng = np.random.default_rng(0)
    mu = rng.normal(size=2000) * 10 ** rng.uniform(-4, 1, 2000)
    sigma = 10 ** rng.uniform(-1.5, 2, 2000)
    mean, variance = stats.foldnorm.stats(np.abs(mu) / sigma, moments="mv")
    got = scores.snr_abs(torch.from_numpy(mu), torch.from_numpy(sigma)).numpy()
    # scipy's variance 1 + c² − mean² loses c²·2⁻⁵² of itself; c stays below 2,000 here
    np.testing.assert_allclose(got, mean / np.sqrt(variance), rtol=2e-9)


def test_snr_abs_in_float32_is_within_1e_6_of_the_exact_value_from_0_to_1e8():
    mu = torch.tensor(x_grid(), dtype=torch.float32)
    sigma = torch.ones_like(mu)
    want = [exact_snr_abs(m, 1.0) for m in mu.tolist()]
    assert relative_error(scores.snr_abs(mu, sigma), want) < 1e-6


def test_snr_abs_in_float64_is_within_1e_13_of_the_exact_value_from_0_to_1e8():
    mu = torch.tensor(x_grid(), dtype=torch.float64)
    want = [exact_snr_abs(m, 1.0) for m in mu.tolist()]
    assert relative_error(scores.snr_abs(mu, torch.ones_like(mu)), want) < 1e-13


def test_snr_abs_in_float32_is_within_1e_6_when_sigma_is_not_one():
    rng = np.random.default_rng(1)
    mu = torch.tensor(rng.normal(size=500) * 10 ** rng.uniform(-6, 2, 500), dtype=torch.float32)
    sigma = torch.tensor(10 ** rng.uniform(-6, 1, 500), dtype=torch.float32)
    want = [exact_snr_abs(m, s) for m, s in zip(mu.tolist(), sigma.tolist(), strict=True)]
    assert relative_error(scores.snr_abs(mu, sigma), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snr_abs_at_mu_zero_is_that_of_the_half_normal(dtype: torch.dtype):
    got = scores.snr_abs(torch.zeros(3, dtype=dtype), torch.tensor([1e-6, 1.0, 1e6], dtype=dtype))
    want = math.sqrt(2 / math.pi) / math.sqrt(1 - 2 / math.pi)
    assert want == pytest.approx(1.3236, abs=5e-5)
    np.testing.assert_allclose(got.numpy(), want, rtol=4 * torch.finfo(dtype).eps)


def test_snr_abs_tends_to_mu_over_sigma():
    x = torch.tensor([20.0, 1e3, 4e3, 1e6, 1e8])
    torch.testing.assert_close(scores.snr_abs(x, torch.ones(5)), x, rtol=2.5e-7, atol=0)


def test_snr_abs_does_not_see_the_sign_of_mu():
    mu = torch.tensor(x_grid(), dtype=torch.float32)
    sigma = torch.rand(mu.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.equal(scores.snr_abs(mu, sigma), scores.snr_abs(-mu, sigma))


@pytest.mark.parametrize("scale", [2.0**-40, 1e-3, 3.0, 1e5])
def test_snr_abs_does_not_change_when_mu_and_sigma_are_scaled_together(scale: float):
    mu = torch.tensor(x_grid(), dtype=torch.float64)
    sigma = torch.full_like(mu, 0.7)
    torch.testing.assert_close(
        scores.snr_abs(scale * mu, scale * sigma), scores.snr_abs(mu, sigma), rtol=1e-13, atol=0
    )


def test_snr_abs_never_falls_as_x_grows():
    x = torch.cat([torch.linspace(0, 20, 4001, dtype=torch.float64), torch.logspace(1.31, 8, 500).double()])
    got = scores.snr_abs(x, torch.ones_like(x))
    rounding = 8 * torch.finfo(torch.float64).eps * got[1:]  # near 0 the curve is flat to fourth order
    assert bool((got.diff() >= -rounding).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snr_abs_is_never_nan_however_small_sigma_is(dtype: torch.dtype):
    subnormal = float(torch.finfo(dtype).tiny) / 1024
    least = float(np.nextafter(np.array(0, "f4" if dtype == torch.float32 else "f8"), 1, dtype=None))
    values = [0.0, least, subnormal, float(torch.finfo(dtype).tiny), 1e-30, 1e-10, 1.0, 1e10, 1e30]
    sigma, mu = torch.meshgrid(
        torch.tensor(values, dtype=dtype), torch.tensor(values, dtype=dtype), indexing="ij"
    )
    got = torch.cat([scores.snr_abs(mu, sigma), scores.snr_abs(-mu, sigma)])
    assert not bool(got.isnan().any())
    assert bool((got >= 1.3236).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snr_abs_of_a_parameter_without_noise_is_infinite_unless_it_is_zero(dtype: torch.dtype):
    got = scores.snr_abs(torch.tensor([1.0, -1e-6, 0.0], dtype=dtype), torch.zeros(3, dtype=dtype)).tolist()
    assert got[:2] == [math.inf, math.inf]
    assert got[2] == pytest.approx(exact_snr_abs(0.0, 1.0), rel=1e-6)


def test_snr_abs_of_two_subnormals_is_that_of_their_ratio():
    tiny = torch.tensor([1e-40])
    assert scores.snr_abs(tiny, tiny).item() == pytest.approx(exact_snr_abs(1.0, 1.0), rel=1e-6)


# --- the plain scores ---------------------------------------------------------------------------------------


def test_snr_mu_and_inv_sigma_are_their_formulas():
    mu, sigma = torch.tensor([3.0, -3.0, 0.0, -0.5]), torch.tensor([0.5, 2.0, 4.0, 0.125])
    assert scores.snr(mu, sigma).tolist() == [6.0, 1.5, 0.0, 4.0]
    assert scores.mu(mu, sigma).tolist() == [3.0, 3.0, 0.0, 0.5]
    assert scores.inv_sigma(mu, sigma).tolist() == [2.0, 0.5, 0.25, 8.0]


def test_mu_needs_no_sigma():
    assert scores.mu(torch.tensor([-2.0, 1.0])).tolist() == [2.0, 1.0]


def test_snr_without_noise_is_infinite_and_zero_for_a_zero_parameter():
    assert scores.snr(torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3)).tolist() == [math.inf, math.inf, 0.0]


@pytest.mark.parametrize("name", scores.SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0,)])
def test_an_elementwise_score_keeps_shape_and_dtype(name: str, dtype: torch.dtype, shape: tuple[int, ...]):
    first, second = torch.randn(shape).to(dtype), (torch.rand(shape) + 0.1).to(dtype)
    kept = first.clone(), second.clone()
    got = scores.SCORES[name].elementwise(first, second)
    assert (got.shape, got.dtype) == (torch.Size(shape), dtype)
    assert torch.equal(first, kept[0])  # the arguments are read, not written
    assert torch.equal(second, kept[1])


# --- sensitivity --------------------------------------------------------------------------------------------


def test_sensitivity_is_the_magnitude_of_parameter_times_gradient():
    theta, grad = torch.tensor([2.0, -3.0, 0.0, 0.5]), torch.tensor([-4.0, -1.0, 7.0, 0.5])
    assert scores.sensitivity(theta, grad).tolist() == [8.0, 3.0, 0.0, 0.25]


def test_the_smoothed_sensitivity_of_two_steps_is_the_hand_worked_one():
    ema = scores.SensitivityEMA(beta1=0.5, beta2=0.75)
    ema.update("λ", torch.tensor([2.0]), torch.tensor([4.0]))
    # I = 8, Ī = 4, Ū = ¼·|8 − 4| = 1
    assert ema.score("λ").tolist() == [4.0]
    ema.update("λ", torch.tensor([-1.0]), torch.tensor([2.0]))
    # I = 2, Ī = ½·4 + ½·2 = 3, Ū = ¾·1 + ¼·|2 − 3| = 1
    assert ema.score("λ").tolist() == [3.0]


@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.5, 0.95), (0.0, 0.3)])
def test_the_smoothed_sensitivity_is_a_plain_float64_loop(betas: tuple[float, float]):
    beta1, beta2 = betas
    rng = np.random.default_rng(2)
    ema = scores.SensitivityEMA(beta1=beta1, beta2=beta2)
    I_bar, U_bar = np.zeros((4, 3)), np.zeros((4, 3))
    for _ in range(60):
        theta, grad = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
        ema.update("P", torch.from_numpy(theta), torch.from_numpy(grad))
        I = np.abs(theta * grad)
        I_bar = beta1 * I_bar + (1 - beta1) * I
        U_bar = beta2 * U_bar + (1 - beta2) * np.abs(I - I_bar)
        np.testing.assert_allclose(ema.score("P").numpy(), I_bar * U_bar, rtol=1e-12)


def test_the_smoothing_constants_are_085_unless_given():
    given, default = scores.SensitivityEMA(beta1=0.85, beta2=0.85), scores.SensitivityEMA()
    for ema in (given, default):
        ema.update("a", torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]))
    assert torch.equal(given.score("a"), default.score("a"))


def test_every_key_has_its_own_averages():
    together, alone = scores.SensitivityEMA(), scores.SensitivityEMA()
    for step in range(1, 4):
        together.update("a", torch.ones(2) * step, torch.ones(2))
        together.update("b", torch.ones(3) * 100, torch.ones(3) * step)
        alone.update("a", torch.ones(2) * step, torch.ones(2))
    assert torch.equal(together.score("a"), alone.score("a"))
    assert together.score("b").shape == (3,)


def test_the_averages_do_not_follow_the_tensors_they_were_made_from():
    ema = scores.SensitivityEMA()
    theta, grad = torch.ones(3), torch.ones(3)
    ema.update("a", theta, grad)
    before = ema.score("a").clone()
    theta.fill_(7.0)
    grad.zero_()
    assert torch.equal(ema.score("a"), before)


def test_the_averages_of_a_trained_parameter_hold_no_autograd_graph():
    ema = scores.SensitivityEMA()
    ema.update("a", torch.nn.Parameter(torch.ones(3)), torch.ones(3))
    assert not ema.score("a").requires_grad


@pytest.mark.parametrize("betas", [(1.0, 0.85), (0.85, 1.0), (-0.1, 0.85), (0.85, -0.1)])
def test_a_smoothing_constant_outside_0_to_1_is_refused(betas: tuple[float, float]):
    with pytest.raises(ValueError, match=r"beta1 and beta2 must lie in \[0, 1\)"):
        scores.SensitivityEMA(*betas)


def test_a_parameter_that_was_never_followed_has_no_smoothed_score():
    with pytest.raises(KeyError):
        scores.SensitivityEMA().score("P")


def test_saved_and_loaded_averages_go_on_exactly_as_the_unsaved_ones():
    steps = [(torch.randn(3, 2), torch.randn(3, 2)) for _ in range(8)]
    whole, first, second = (scores.SensitivityEMA() for _ in range(3))
    for theta, grad in steps:
        whole.update("Q", theta, grad)
    for theta, grad in steps[:4]:
        first.update("Q", theta, grad)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for theta, grad in steps[4:]:
        second.update("Q", theta, grad)
    assert torch.equal(second.score("Q"), whole.score("Q"))


# --- triplets -----------------------------------------------------------------------------------------------


def test_a_triplets_score_is_lambda_plus_the_means_of_its_column_and_its_row():
    s_P = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0], [7.0, 1.0]])  # column means 4, 4
    s_lam = torch.tensor([10.0, 0.5])
    s_Q = torch.tensor([[3.0, 6.0, 9.0], [0.0, 0.0, 1.5]])  # row means 6, 0.5
    assert scores.triplet_scores(s_P, s_lam, s_Q).tolist() == [20.0, 5.0]


def test_orthonormal_factors_add_to_mu_what_their_sizes_alone_decide():
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(d, 3, generator=generator))[0] for d in (400, 200))
    S = scores.triplet_scores(scores.mu(P), torch.zeros(3), scores.mu(Q.T))
    expected = math.sqrt(2 / math.pi) * (1 / math.sqrt(400) + 1 / math.sqrt(200))
    assert S.tolist() == pytest.approx([expected] * 3, rel=0.05)


def test_a_batch_of_modules_is_scored_like_each_module_alone():
    s_P, s_lam, s_Q = torch.rand(4, 6, 3).double(), torch.rand(4, 3).double(), torch.rand(4, 3, 5).double()
    together = scores.triplet_scores(s_P, s_lam, s_Q)
    assert together.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            by_hand = s_lam[i, j].item()
            by_hand += sum(s_P[i, :, j].tolist()) / 6 + sum(s_Q[i, j, :].tolist()) / 5
            assert together[i, j].item() == pytest.approx(by_hand, rel=1e-14)
        alone = scores.triplet_scores(s_P[i], s_lam[i], s_Q[i])
        torch.testing.assert_close(together[i], alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triplet_scores_keep_the_dtype_and_are_one_for_each_triplet(dtype: torch.dtype):
    rank = 3
    got = scores.triplet_scores(
        torch.rand(7, rank, dtype=dtype), torch.rand(rank, dtype=dtype), torch.rand(rank, 4, dtype=dtype)
    )
    assert (got.shape, got.dtype) == (torch.Size([rank]), dtype)


def test_lambda_alone_is_the_singular_values_own_score():
    s_lam = torch.tensor([10.0, 0.5])
    got = scores.lambda_alone(torch.ones(4, 2), s_lam, torch.ones(2, 3))
    assert torch.equal(got, s_lam)


@pytest.mark.parametrize("name", scores.SCORES)
def test_every_rows_triplet_score_of_a_stack_is_that_of_each_adapter(name: str):
    s_P, s_lam, s_Q = torch.rand(4, 6, 3).double(), torch.rand(4, 3).double(), torch.rand(4, 3, 5).double()
    together = scores.SCORES[name].triplet(s_P, s_lam, s_Q)
    alone = [scores.SCORES[name].triplet(s_P[i], s_lam[i], s_Q[i]) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-14, atol=0)


# --- the table of names -------------------------------------------------------------------------------------

PAPERS = {  # name: what it needs, and whether λ alone decides
    "sensitivity": ("smoothed", False),
    "raw_sensitivity": ("gradient", False),
    "snr_abs": ("sigma", False),
    "snr": ("sigma", False),
    "inv_sigma": ("sigma", False),
    "mu": ("nothing", False),
    "lambda": ("nothing", True),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_table_says_what_each_of_the_papers_scores_needs(name: str):
    needs, lambda_decides = PAPERS[name]
    row = scores.SCORES[name]
    assert row.needs == needs
    assert row.triplet is (scores.lambda_alone if lambda_decides else scores.triplet_scores)


def test_each_row_of_the_papers_computes_its_formula():
    theta, given = torch.tensor([3.0, -3.0, -0.5]), torch.tensor([0.5, 2.0, 0.125])
    expected = {
        "sensitivity": [0.5, 2.0, 0.125],  # the smoothed value itself
        "raw_sensitivity": [1.5, 6.0, 0.0625],
        "snr_abs": [exact_snr_abs(6.0, 1.0), exact_snr_abs(1.5, 1.0), exact_snr_abs(4.0, 1.0)],
        "snr": [6.0, 1.5, 4.0],
        "inv_sigma": [2.0, 0.5, 8.0],
        "mu": [3.0, 3.0, 0.5],
        "lambda": [3.0, 3.0, 0.5],
    }
    for name, want in expected.items():
        assert scores.SCORES[name].elementwise(theta, given).tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", scores.SCORES)
def test_every_row_needs_something_that_the_allocator_can_give(name: str):
    assert scores.SCORES[name].needs in {"nothing", "sigma", "gradient", "smoothed"}


@pytest.mark.parametrize("name", [name for name, row in scores.SCORES.items() if row.needs == "nothing"])
def test_a_score_that_needs_nothing_is_given_none(name: str):
    assert scores.SCORES[name].elementwise(torch.tensor([-2.0, 1.0]), None).shape == (2,)


@pytest.mark.parametrize("name", scores.SCORES)
def test_the_table_describes_every_score_in_one_line(name: str):
    about = scores.SCORES[name].about
    assert about.strip()
    assert len(about.splitlines()) == 1
