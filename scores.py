"""How important is a parameter, and how important is a singular triplet?

A parameter θ has a posterior N(μ, σ²); μ is the parameter itself and σ comes from an optimizer that has a
posterior (ivon.py). An elementwise score s(θ) maps those, or θ and its gradient, to a tensor of the
parameter's shape. A triplet G_i = (P[:, i], λ_i, Q[i, :]) of an SVD-parameterised adapter W + s·P diag(λ) Q
then gets one number from the scores of its entries (`triplet_scores`).

Everything here is a function of tensors; only `SensitivityEMA` remembers anything.

[A] Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
[C] Chen and Garner, "A Bayesian Interpretation of Adaptive Low-Rank Adaptation", arXiv 2409.10673.
[L] Li et al., "Training Bayesian Neural Networks with Sparse Subspace Variational Inference", ICLR 2024.
"""

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor


def mu(mu: Tensor, sigma: Tensor | None = None) -> Tensor:
    """|μ|, elementwise. σ is ignored. Source: [C]."""
    return mu.abs()


def inv_sigma(mu: Tensor | None, sigma: Tensor) -> Tensor:
    """1/σ, elementwise; +inf where σ = 0. μ is ignored. Source: [C]."""
    return sigma.reciprocal()


def snr(mu: Tensor, sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio |μ|/σ, elementwise; +inf where σ = 0, but 0 wherever μ = 0. Source: [C]."""
    return torch.where(mu == 0, 0, mu.abs() / sigma)


def snr_abs(mu: Tensor, sigma: Tensor) -> Tensor:
    """SNR(|θ|) = E|θ| / sd|θ| of θ ~ N(μ, σ²), elementwise (the folded normal's mean over its deviation).

    By definition it is E|θ| / sqrt(σ² + μ² − (E|θ|)²) with E|θ| = μ(2Φ(μ/σ) − 1) + (2σ/√(2π))·exp(−μ²/2σ²), a
    difference of nearly equal numbers where |μ| ≫ σ. With x = |μ|/σ and
    e = E|θ|/σ − x = √(2/π)·exp(−x²/2) − x·erfc(x/√2) ≥ 0 the same quantity is (x + e) / sqrt(1 − 2xe − e²),
    in which nothing large cancels: float32 is within 1e-6 of the exact value for every x. It is 1.3236 at
    x = 0 and tends to x.

    Source: [L], [C].
    """
    x = snr(mu, sigma)
    z = x.clamp(max=40.0)  # exp(−z²/2) is 0 from here on, in float64 too; an infinite x would give 0·inf
    e = math.sqrt(2 / math.pi) * torch.exp(-0.5 * z * z) - z * torch.special.erfc(z * math.sqrt(0.5))
    return (x + e) / torch.sqrt(1 - 2 * z * e - e * e)


def sensitivity(theta: Tensor, grad: Tensor) -> Tensor:
    """I(θ) = |θ·∂L/∂θ|, elementwise: to first order, how much setting θ to 0 changes the loss. [A] eq. 8."""
    return (theta * grad).abs()


class SensitivityEMA:
    """Smoothed sensitivity Ī·Ū: a moving average of I times a moving average of its own deviation.

        Ī ← β1 Ī + (1 − β1) I,    Ū ← β2 Ū + (1 − β2)|I − Ī| (Ī already updated),    s(θ) = Ī·Ū

    Both start at 0. Tensors are identified by a key of the caller's choosing. Source: [A] eq. 9–11.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85):
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"sensitivity's beta1 and beta2 must lie in [0, 1), not {beta1} and {beta2}")
        self.beta1, self.beta2 = beta1, beta2
        self.I_bar: dict[Hashable, Tensor] = {}
        self.U_bar: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def update(self, key: Hashable, theta: Tensor, grad: Tensor) -> None:
        """Take in one step's parameter and gradient (one shape, the same for this key at every step)."""
        I = sensitivity(theta, grad)
        if key not in self.I_bar:
            self.I_bar[key], self.U_bar[key] = torch.zeros_like(I), torch.zeros_like(I)
        I_bar = self.I_bar[key].lerp_(I, 1 - self.beta1)
        self.U_bar[key].lerp_((I - I_bar).abs_(), 1 - self.beta2)

    def score(self, key: Hashable) -> Tensor:
        """Ī·Ū in the parameter's shape; KeyError if the key was never updated."""
        return self.I_bar[key] * self.U_bar[key]

    def state_dict(self) -> dict:
        return {"I_bar": dict(self.I_bar), "U_bar": dict(self.U_bar)}

    def load_state_dict(self, state: dict) -> None:
        self.I_bar = {key: value.clone() for key, value in state["I_bar"].items()}
        self.U_bar = {key: value.clone() for key, value in state["U_bar"].items()}


def triplet_scores(s_P: Tensor, s_lam: Tensor, s_Q: Tensor) -> Tensor:
    """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij), from the entries' scores. Source: [A] eq. 7.

    Shapes: s_P (…, d_out, r), s_lam (…, r), s_Q (…, r, d_in) → (…, r); leading dimensions stand for
    several adapters of one shape.
    """
    return s_lam + s_P.mean(-2) + s_Q.mean(-1)


def lambda_alone(s_P: Tensor, s_lam: Tensor, s_Q: Tensor) -> Tensor:
    """S_i = s(λ_i): the singular value decides alone. Source: [A] table 4."""
    return s_lam


def as_smoothed(theta: Tensor, smoothed: Tensor) -> Tensor:
    """Ī·Ū as it is: `SensitivityEMA` has computed it from every step's gradient."""
    return smoothed


class Score(NamedTuple):
    """A row of SCORES.

    elementwise: (θ, what the score needs) → s(θ), of θ's shape.
    needs: "nothing" (None is given), "sigma" (σ), "gradient" (this step's) or "smoothed" (Ī·Ū).
    about: for --help.
    triplet: (s(P), s(λ), s(Q)) → a number for each triplet, shapes as in `triplet_scores`.
    """

    elementwise: Callable[[Tensor, Tensor], Tensor]
    needs: str
    about: str
    triplet: Callable[[Tensor, Tensor, Tensor], Tensor] = triplet_scores


SCORES = {
    "sensitivity": Score(as_smoothed, "smoothed", "smoothed |θ·gradient| times its smoothed deviation"),
    "snr_abs": Score(snr_abs, "sigma", "signal-to-noise ratio of |θ| under the posterior"),
    "snr": Score(snr, "sigma", "|μ|/σ"),
    "mu": Score(mu, "nothing", "|μ|"),
    "inv_sigma": Score(inv_sigma, "sigma", "1/σ"),
    "raw_sensitivity": Score(sensitivity, "gradient", "|θ·gradient| of the current step"),
    "lambda": Score(mu, "nothing", "|λ| of the triplet alone", lambda_alone),
}
