"""Where IVON's h rests, and how it gets there, with gradients of known noise and curvature (docs/method.md).

With Price's estimator h performs, to first order in a = 1 − β2, a square-root diffusion around h* = H + ½·a·v
with v = ess·E[ĝ²]. Its stationary distribution is a gamma distribution of mean h* and variance ½·a·v·h*, so
of shape 2h*/(a·v): an exponential one where gradient noise dominates.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from harness.diagnostics import diagnostics
from ivon import IVON

N, STEPS, BETA2 = 4_000, 700, 0.99


def simulate(
    ess: float, h0: float = 1e-5, hess_approx: str = "price", steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h of N entries after `steps` steps at lr 0, their curvatures H, and their E[ĝ²]."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    s = 10 ** (2 * torch.rand(N, generator=generator, dtype=torch.float64) - 4)  # noise, 1e-4 to 1e-2
    H = 32 * s**2
    p = nn.Parameter(torch.zeros(N, dtype=torch.float64))
    opt = IVON([p], 0.0, ess, hess_init=h0, beta2=BETA2, weight_decay=0, hess_approx=hess_approx)
    for _ in range(steps):
        with opt.sampled_params(train=True):
            p.grad = H * p.detach() + s * torch.randn(N, generator=generator, dtype=torch.float64)
        opt.step()
    h, H, s = opt.state[p]["h"].numpy(), H.numpy(), s.numpy()
    sigma_squared = 1 / (ess * (H + 0.5 * (1 - BETA2) * ess * s**2))
    return h, H, s**2 + H**2 * sigma_squared


@pytest.mark.parametrize("ess", [1e5, 2e3], ids=["noise dominates", "curvature counts"])
def test_h_rests_at_the_curvature_plus_half_of_1_minus_beta2_times_ess_times_the_squared_gradient(ess: float):
    h, H, squared = simulate(ess)
    second = 0.5 * (1 - BETA2) * ess * squared
    ratio = h / (H + second)
    assert ratio.mean() == pytest.approx(1, abs=0.04)
    shape = (H + second) / second
    assert shape.std() < 0.01 * shape.mean()
    law = stats.gamma(shape.mean(), scale=1 / shape.mean())
    assert ratio.std() == pytest.approx(law.std(), rel=0.08)  # to first order in a = 0.01
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert (ratio < law.ppf(q)).mean() == pytest.approx(q, abs=0.03)


def test_h_goes_1_minus_beta2_of_the_way_to_where_it_rests_in_each_step():
    ess, h0, steps = 1e5, 1e-4, 10
    h, H, squared = simulate(ess, h0, steps=steps)
    rest = H + 0.5 * (1 - BETA2) * ess * squared
    on_average = rest + (h0 - rest) * BETA2**steps
    for those in (rest < h0, (h0 < rest) & (rest < 30 * h0), 30 * h0 < rest):
        assert (h / on_average)[those].mean() == pytest.approx(1, abs=0.06)
    far = 100 * h0 < rest  # (1 − β2)·T is 0.1, and yet h has left h0
    assert (h / h0)[far].mean() > 10


def test_with_squared_gradients_h_rests_at_ess_times_their_mean():
    h, _, squared = simulate(1e5, 1e-3, "gradsq")
    ratio = h / (1e5 * squared)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    # An average over 1/(1 − β2) squares of normal numbers, each with a variance of 2.
    assert ratio.std() == pytest.approx(np.sqrt(2 * (1 - BETA2) / (1 + BETA2)), rel=0.05)


def test_the_diagnostics_say_which_share_of_h_gradient_noise_explains():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(N, dtype=torch.float64))
    opt = IVON([p], 0.0, 2e3, hess_init=4e-3, beta2=BETA2, weight_decay=0)
    for _ in range(STEPS):
        with opt.sampled_params(train=True):
            p.grad = 32e-4 * p.detach() + 1e-2 * torch.randn(N, dtype=torch.float64)
        opt.step()
    # s² = 1e-4, H = 32 s²: h* = 32 s² + 10 s², of which the second term is 10/42.
    assert diagnostics(opt, [p])["law"] == pytest.approx(10 / 42, rel=0.05)


def test_with_several_draws_of_one_batch_gradient_noise_makes_their_share_of_h():
    """ĥ is their mean: its variance is a fourth of one draw's, that of ĝ is not."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(N, dtype=torch.float64))
    opt = IVON([p], 0.0, 1e5, hess_init=1e-2, beta2=BETA2, weight_decay=0, mc_samples=4)
    for _ in range(STEPS):
        batch = 1e-2 * torch.randn(N, dtype=torch.float64)
        for _ in range(4):
            with opt.sampled_params(train=True):
                p.grad = batch.clone()
        opt.step()
    h = opt.state[p]["h"].mean().item()
    assert h == pytest.approx(0.5 * (1 - BETA2) * 1e5 * 1e-4 / 4, rel=0.1)
    assert diagnostics(opt, [p])["law"] == pytest.approx(1, rel=0.1)
