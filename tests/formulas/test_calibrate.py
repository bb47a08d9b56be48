"""tools.calibrate: temperature scaling, TFB, pruning and MC dropout against what they are by definition."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from adalora import inject
from harness.batches import Split
from harness.prediction import predict, predict_from_draws
from tools import calibrate


class Classifier(nn.Module):
    """Logits of vectors: two maps to adapt, dropout between them."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(6, 5), nn.Linear(5, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor):
        class Output:
            logits = self.last(self.dropout(torch.tanh(self.first(x))))

        return Output


def adapted(kind: str) -> tuple[Classifier, dict[str, nn.Module], Split]:
    """A classifier with random adapters, and 64 labelled examples."""
    torch.manual_seed(0)
    model = Classifier()
    layers = inject(model, ["first", "last"], rank=2, alpha=4, kind=kind)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.5)
    x = torch.randn(64, 6)
    return model, layers, Split([{"x": x[:40]}, {"x": x[40:]}], torch.arange(64), torch.randint(3, (64,)))


def test_the_scaling_temperature_has_the_least_nll_and_undoes_a_known_one():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(20_000, 3)) * 2)
    p = logits.softmax(-1)
    labels = torch.tensor([rng.choice(3, p=row / row.sum()) for row in p.numpy()])
    T = calibrate.fit_scaling((3 * logits).softmax(-1), labels)
    assert pytest.approx(3, rel=0.03) == T

    def loss(T: float) -> float:
        return -torch.log_softmax(3 * logits / T, -1)[range(len(labels)), labels].mean().item()

    assert pytest.approx(optimize.minimize_scalar(loss, bounds=(1, 9), method="bounded").x, rel=1e-3) == T
    assert torch.allclose(calibrate.scaled((3 * logits).softmax(-1), 3.0), p)


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_tfb_leaves_the_product_as_it_is_and_its_noise_has_one_size_in_every_direction(kind: str):
    """B' = U diag(d), A' + (σ_q/d)·ε: a column of the noise is σ_q·U ε, of covariance σ_q²·U Uᵀ."""
    _, layers, _ = adapted(kind)
    before = {name: layer.delta().clone() for name, layer in layers.items()}
    sigma = calibrate.prepare_tfb_(layers)
    assert set(sigma) == {f"{name}.{'Q' if kind == 'svd' else 'A'}" for name in layers}
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta(), before[name])
        left = layer.scaling * (layer.P * layer.lam if kind == "svd" else layer.B)
        (unit,) = (s for key, s in sigma.items() if key.startswith(name))
        covariance = left * unit[:, 0].square() @ left.T
        projector = left @ torch.linalg.pinv(left)
        torch.testing.assert_close(covariance, projector, atol=1e-5, rtol=1e-4)


def test_tfbs_deviation_is_the_largest_whose_nll_is_allowed():
    model, layers, split = adapted("svd")
    split = split._replace(labels=predict(model, split).argmax(-1))  # so that noise is a loss
    unit = calibrate.prepare_tfb_(layers)
    most = 1.01 * calibrate.nll(predict(model, split), split.labels)
    q = calibrate.fit_tfb(model, split, unit, most, samples=20, seed=0)
    low, high = calibrate.TFB_RANGE
    width = (high - low) / 2**calibrate.TFB_BISECTIONS

    def at(q: float) -> float:
        sigma = {name: q * x for name, x in unit.items()}
        return calibrate.nll(predict_from_draws(model, split, sigma, 20, 1.0, 0), split.labels)

    assert low < q < high - 2 * width
    assert at(q) <= most < at(q + width)


def test_tfb_gives_a_direction_without_any_weight_no_noise():
    _, layers, _ = adapted("svd")
    first = next(iter(layers.values()))
    first.lam.data[0] = 0
    before = first.delta().clone()
    sigma = calibrate.prepare_tfb_(layers)
    torch.testing.assert_close(first.delta(), before)
    unit = sigma[f"{next(iter(layers))}.Q"]
    assert (unit[-1] == 0).all()  # singular values are in descending order
    assert (unit[:-1] > 0).all()
    assert all(torch.isfinite(x).all() for x in sigma.values())


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_tfb_on_a_map_with_fewer_outputs_than_the_rank(kind: str):
    model = nn.Sequential(nn.Linear(6, 2))
    layers = inject(model, ["0"], 4, 4, kind=kind)
    for p in layers["0"].parameters():
        p.data.normal_()
    before = layers["0"].delta().clone()
    (sigma,) = calibrate.prepare_tfb_(layers).values()
    torch.testing.assert_close(layers["0"].delta(), before)
    assert sigma.gt(0).sum(0).tolist() == [2] * 6


def test_the_share_with_the_smallest_signal_to_noise_ratio_is_zero_for_that_prediction_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    model = nn.Linear(3, 2)
    model.weight.data = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    sigma = {"weight": torch.tensor([[1.0, 1.0, 30.0], [1.0, 50.0, 1.0]])}  # |μ|/σ: 1, 2, 0.1, 4, 0.1, 6
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(calibrate, "predict", lambda model, _: model.weight.clone())
    assert calibrate.predict_pruned(model, None, sigma, 0.5).tolist() == [[0, -2, 0], [4, 0, -6]]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_mc_dropout_averages_passes_with_dropout_and_can_be_repeated():
    model, _, split = adapted("svd")
    one, again, other = (calibrate.dropout_average(model, split, 400, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.allclose(one, other, atol=0.1)
    assert not torch.allclose(one, predict(model, split), atol=0.01)


def test_every_rival_is_fitted_on_one_split_and_predicts_another():
    model, layers, split = adapted("svd")
    sigma = {name: torch.full_like(p, 0.05) for name, p in model.named_parameters() if p.requires_grad}
    found, mean = {}, predict(model, split)

    def nll_of(predictions: Tensor) -> float:
        return calibrate.nll(predictions, split.labels)

    own = {name: s for name, s in sigma.items() if name.rpartition(".")[0] in layers}
    least = {
        "draws at the fitted τ": min(
            nll_of(predict_from_draws(model, split, sigma, 5, tau, 0)) for tau in (0.1, 0.3, 1, 3)
        ),
        "pruned": min(nll_of(calibrate.predict_pruned(model, split, own, n / 10)) for n in range(10)),
    }
    for rival in calibrate.fitted(model, layers, sigma, split, 5, 0):
        found[rival.how] = rival.predict(split)
        assert found[rival.how].sum(-1).numpy() == pytest.approx(np.ones(64))
        assert math.isfinite(rival.value)
    assert {how: nll_of(found[how]) for how in least} == pytest.approx(least)
    assert nll_of(mean) < nll_of(found["TFB"]) <= 1.003 * nll_of(mean)
    assert list(found) == [
        "temperature scaling", "MC dropout", "draws at the fitted τ", "pruned", "TFB"
    ]  # fmt: skip
    assert nll_of(found["temperature scaling"]) <= nll_of(mean)
