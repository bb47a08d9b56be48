"""What is recorded of IVON with an evaluation; "law" is tested in test_hessian_law.py."""

import pytest
import torch
from torch import nn

from harness.diagnostics import diagnostics
from ivon import IVON


def test_the_diagnostics_are_of_the_last_step_and_of_the_state_after_it():
    p, q = (nn.Parameter(torch.zeros(n)) for n in (3, 1))
    opt = IVON([p, q], 1.0, 1e12, hess_init=1.0, beta2=1.0, weight_decay=0, clip_radius=0.5)
    with opt.sampled_params(train=True):
        p.grad, q.grad = torch.tensor([0.25, -0.6, 3.0]), torch.zeros(1)
    opt.step()
    found = diagnostics(opt, [p, q])
    assert found["clipped"] == 0.5
    assert found["mean_step"] == pytest.approx((0.5 + 1 + 1 + 0) / 4, rel=1e-4)
    assert [found[f"h_{q}"] for q in ("05", "50", "95")] == pytest.approx([1, 1, 1])
    assert found["sigma"] == pytest.approx(1e-6)
    assert found["sigma_cv"] == pytest.approx(0, abs=1e-6)
    assert found["law"] == 0  # h is held
    assert diagnostics(opt, [q])["clipped"] == 0
    assert diagnostics(opt, [p])["clipped"] == pytest.approx(2 / 3)


def test_the_step_that_is_clipped_has_the_decay_in_it():
    p = nn.Parameter(torch.ones(2))
    opt = IVON([p], 1.0, 1e12, hess_init=0.75, beta2=1.0, weight_decay=0.25, clip_radius=0.5)
    with opt.sampled_params(train=True):
        p.grad = torch.tensor([0.0, 0.5])
    opt.step()  # m ← 1 − 1·clip((ĝ + 0.25·1)/1, ±0.5)
    found = diagnostics(opt, [p])  # of the mean after the step: (0 + 0.25·0.75, 0.5 + 0.25·0.5)/0.5
    assert found["clipped"] == 0.5
    assert found["mean_step"] == pytest.approx((0.25 * 0.75 / 0.5 + 1) / 2, rel=1e-4)


def test_after_t_steps_the_law_is_1_minus_beta2_to_the_t_and_h_is_in_units_of_h0():
    p = nn.Parameter(torch.zeros(4))  # ĥ = ess·ĝ² = 10 = h0: h stays
    opt = IVON([p], 0.0, 10.0, hess_init=10.0, beta2=0.9, weight_decay=0, hess_approx="gradsq")
    for share in (0.1, 0.19):
        with opt.sampled_params(train=True):
            p.grad = torch.ones(4)
        opt.step()
        found = diagnostics(opt, [p])
        assert (found["law"], found["h_50"]) == (pytest.approx(share), pytest.approx(1))


def test_the_diagnostics_are_the_same_after_loading_the_state():
    p = nn.Parameter(torch.ones(4))
    opt = IVON([p], 0.1, 100, hess_init=0.1, beta2=0.9, clip_radius=0.5)
    for _ in range(3):
        with opt.sampled_params(train=True):
            p.square().sum().backward()
        opt.step()
    before = diagnostics(opt, [p])
    opt.load_state_dict(opt.state_dict())
    assert diagnostics(opt, [p]) == before


def test_an_optimizer_without_h_has_no_diagnostics():
    p = nn.Parameter(torch.ones(4))
    opt = torch.optim.AdamW([p])
    p.square().sum().backward()
    opt.step()
    assert diagnostics(opt, [p]) == {}
