"""adalora.py's orthogonality penalty against NumPy loops and finite differences."""

import numpy as np
import pytest
import torch
from small_runs import mixed_adapters, random_adapter
from torch import Tensor, nn

from adalora import LoRALinear, SVDLinear, add_penalty_gradients, orthogonality_penalty


def penalty_by_loop(layers: dict[str, SVDLinear], squared: bool) -> float:
    """Matrix by matrix in NumPy."""
    norms = []
    for layer in layers.values():
        P, Q = layer.P.detach().numpy(), layer.Q.detach().numpy()
        norms += [np.linalg.norm(gram - np.eye(len(gram))) for gram in (P.T @ P, Q @ Q.T)]
    return sum(norm**2 for norm in norms) if squared else float(np.mean(norms))


def finite_differences(layers: dict[str, SVDLinear], p: Tensor, squared: bool) -> Tensor:
    """The central differences of `penalty_by_loop` over the entries of `p`."""
    gradient, step = torch.zeros_like(p), 1e-6
    with torch.no_grad():
        for i in range(p.numel()):
            entry, values = p.view(-1)[i : i + 1], []
            for sign in (1, -2, 1):
                entry += sign * step
                values.append(penalty_by_loop(layers, squared))
            gradient.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("squared", [False, True])
def test_the_penalty_is_that_of_a_loop_over_matrices(squared: bool):
    layers = mixed_adapters()
    expected = penalty_by_loop(layers, squared)
    assert orthogonality_penalty(layers, squared).item() == pytest.approx(expected, rel=1e-12)


def test_the_penalty_of_the_hand_worked_matrices():
    # PᵀP = (4 0; 0 1), so ‖PᵀP − I‖ = 3; QQᵀ = (1 1; 1 1), so ‖QQᵀ − I‖ = √2.
    layer = SVDLinear(nn.Linear(2, 3), 2, alpha=1)
    with torch.no_grad():
        layer.P.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        layer.Q.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert orthogonality_penalty({"it": layer}).item() == pytest.approx((3 + 2**0.5) / 2)
    assert orthogonality_penalty({"it": layer}, squared=True).item() == pytest.approx(9 + 2)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 5, 4), (5, 5, 7), (4, 7, 4), (3, 3, 3)], ids=["neither", "P", "Q", "both"]
)
def test_the_gradient_is_that_of_finite_differences_also_where_a_factor_is_square(
    shape: tuple[int, int, int], squared: bool
):
    """Shapes are (rank, d_out, d_in); the ids say which factor is square."""
    layers = {"it": random_adapter(*shape), "other": random_adapter(seed=1)}
    add_penalty_gradients(layers, 0.3, squared)
    for p in (layers["it"].P, layers["it"].Q):
        expected = 0.3 * finite_differences(layers, p, squared)
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_the_gradient_of_adapters_of_several_shapes_is_that_of_finite_differences(squared: bool):
    layers = mixed_adapters()
    add_penalty_gradients(layers, 1.0, squared)
    for layer in layers.values():
        for p in (layer.P, layer.Q):
            expected = finite_differences(layers, p, squared)
            torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_the_gradient_at_orthonormal_matrices_is_zero_and_not_nan(squared: bool):
    layer = SVDLinear(nn.Linear(6, 6), 3, alpha=1)
    with torch.no_grad():
        layer.P.copy_(torch.eye(6)[:, :3])
        layer.Q.copy_(torch.eye(6)[3:])
    penalty = orthogonality_penalty({"it": layer}, squared)
    penalty.backward()
    assert penalty == 0
    assert torch.equal(layer.P.grad, torch.zeros(6, 3))
    assert torch.equal(layer.Q.grad, torch.zeros(3, 6))


def test_the_penalty_of_an_adapter_of_rank_0_is_0():
    assert orthogonality_penalty({"it": SVDLinear(nn.Linear(4, 5), 0, alpha=32)}) == 0


@pytest.mark.parametrize("squared", [False, True])
def test_the_gradients_are_added_to_those_there_are(squared: bool):
    layers, alone = mixed_adapters(), mixed_adapters()
    for layer in layers.values():
        layer.P.grad = torch.full_like(layer.P, 7.0)
    add_penalty_gradients(layers, 0.3, squared)
    add_penalty_gradients(alone, 0.3, squared)
    for layer, other in zip(layers.values(), alone.values(), strict=True):
        torch.testing.assert_close(layer.P.grad, other.P.grad + 7)
        torch.testing.assert_close(layer.Q.grad, other.Q.grad)
        assert layer.lam.grad is None


def test_the_gradients_are_proportional_to_gamma():
    layers, twice = mixed_adapters(), mixed_adapters()
    add_penalty_gradients(layers, 0.1)
    add_penalty_gradients(twice, 0.2)
    for layer, other in zip(layers.values(), twice.values(), strict=True):
        torch.testing.assert_close(2 * layer.P.grad, other.P.grad)


def test_what_is_not_trained_gets_no_gradient():
    layers = mixed_adapters()
    layers["0"].P.requires_grad_(False)
    add_penalty_gradients(layers, 0.1)
    assert layers["0"].P.grad is None
    assert layers["0"].Q.grad is not None


def test_adapters_of_plain_lora_have_no_penalty_and_do_not_count():
    lora, svd = LoRALinear(nn.Linear(4, 5), 2, alpha=2), random_adapter()
    alone = random_adapter()
    add_penalty_gradients({"lora": lora, "svd": svd}, 0.1)
    add_penalty_gradients({"svd": alone}, 0.1)
    assert torch.equal(svd.P.grad, alone.P.grad)
    assert lora.A.grad is None
    assert lora.B.grad is None


@pytest.mark.parametrize("layers", [{}, {"lora": LoRALinear(nn.Linear(4, 5), 2, alpha=2)}])
def test_without_an_adapter_that_has_p_and_q_nothing_happens(layers: dict):
    add_penalty_gradients(layers, 0.1)
    assert all(p.grad is None for layer in layers.values() for p in layer.parameters())


def test_with_gamma_0_nothing_happens():
    layers = mixed_adapters()
    add_penalty_gradients(layers, 0.0)
    assert all(p.grad is None for layer in layers.values() for p in layer.parameters())
