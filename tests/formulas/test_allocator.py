"""vilora.py: the budget is kept to the triplet, what is dropped is gone, the scores are a plain loop's."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small_runs import DELTA_T, MAPS, RANK, T_F, T_I, Run, T, random_adapter
from torch import Tensor, nn

import vilora
from adalora import SVDLinear, inject
from budget import CubicBudget
from scores import SCORES
from vilora import FixedRanks, RankAllocator

SIGMA_SCORES = [name for name, score in SCORES.items() if score.needs == "sigma"]
PARTS = ("P", "lam", "Q")


class FixedSigma(torch.optim.SGD):
    """An optimizer with a posterior of one σ, and no more than the protocol asks for."""

    def sigma(self, param: Tensor) -> Tensor:
        return torch.full_like(param, 0.25)

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        own = [p for group in self.param_groups for p in group["params"]]
        means = [p.detach().clone() for p in own]
        with torch.no_grad():
            for p in own:
                p += 0.25 * torch.randn_like(p)
        yield
        with torch.no_grad():
            for p, mean in zip(own, means, strict=True):
                p.copy_(mean)


def run_with_fixed_sigma(score: str, track: bool = False) -> Run:
    run = Run("mu")
    run.optimizer = FixedSigma(run.params, lr=0.01)
    run.allocator = RankAllocator(run.layers, run.budget, score, run.optimizer, track=track)
    return run


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


PAPERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    # θ, gradient, σ → s(θ), in float64 and with scipy; the scores without a memory
    "mu": lambda theta, grad, sigma: abs(theta),
    "lambda": lambda theta, grad, sigma: abs(theta),
    "snr": lambda theta, grad, sigma: abs(theta) / sigma,
    "inv_sigma": lambda theta, grad, sigma: 1 / sigma,
    "snr_abs": lambda theta, grad, sigma: (
        stats.foldnorm.mean(abs(theta) / sigma) / stats.foldnorm.std(abs(theta) / sigma)
    ),
    "raw_sensitivity": lambda theta, grad, sigma: abs(theta * grad),
}


def scores_by_loop(run: Run, score: str) -> np.ndarray:
    """Adapter by adapter and triplet by triplet."""
    S = []
    for layer in run.layers.values():
        s = {}
        for part in PARTS:
            p = getattr(layer, part)
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            s[part] = PAPERS[score](float64(p), float64(grad), float64(run.optimizer.sigma(p)))
        for i in range(layer.rank):
            S.append(s["lam"][i] + (score != "lambda") * (s["P"][:, i].mean() + s["Q"][i].mean()))
    return np.array(S)


def scores_now(run: Run, score: str) -> np.ndarray:
    return float64(run.allocator.scores([score])[score])


# --- scores of all adapters at once -------------------------------------------------------------------------


@pytest.mark.parametrize("score", PAPERS)
def test_triplet_scores_are_those_of_a_plain_loop(score: str):
    run = Run(score)
    for t in range(1, 6):
        run.update(t)
    run.update(6, allocate=False)  # the gradients are still there
    np.testing.assert_allclose(scores_now(run, score), scores_by_loop(run, score), rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_every_rows_scores_of_the_model_are_those_of_each_adapter_alone(score: str):
    run, row, expected = Run(score), SCORES[score], []
    for t in range(1, 6):
        run.update(t)
    run.update(6, allocate=False)
    alone = {name: RankAllocator({name: layer}, CubicBudget(3, 1, T, T_I, T_F, 1), score, run.optimizer)
             for name, layer in run.layers.items()}  # fmt: skip
    if row.needs == "smoothed":
        run.allocator.ema = type(run.allocator.ema)()
        for each in (run.allocator, *alone.values()):
            each.step(1)
    for each in alone.values():
        expected.append(float64(each.scores([score])[score]))
    np.testing.assert_allclose(scores_now(run, score), np.concatenate(expected), rtol=1e-5)


def test_scores_are_in_the_order_of_the_adapters_whatever_their_shapes():
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in [(4, 4), (4, 5), (5, 4), (4, 4), (4, 5)]))
    layers = inject(model, [str(i) for i in range(5)], rank=2, alpha=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator = RankAllocator(layers, CubicBudget(10, 5, 10, 1, 2, 1), "lambda", optimizer)
    for i, layer in enumerate(layers.values()):
        layer.lam.data = torch.tensor([2.0 * i, 2.0 * i + 1])
    assert allocator.scores(["lambda"])["lambda"].tolist() == list(range(10))


def test_several_scores_can_be_asked_for_by_name():
    run = Run("mu")
    run.update(1)
    got = run.allocator.scores(["snr", "mu"])
    assert list(got) == ["snr", "mu"]
    for name, S in got.items():
        assert S.shape == (RANK * MAPS,)
        assert torch.equal(S, run.allocator.scores([name])[name])


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_smoothed_sensitivity_is_that_of_a_plain_loop_over_all_steps(optimizer: str):
    run = Run("sensitivity", optimizer)
    averages = {}
    for t in range(1, 6):
        run.update(t, allocate=False)
        for name, layer in run.layers.items():
            for part in PARTS:
                p = getattr(layer, part)
                I = abs(float64(p) * float64(p.grad))
                I_bar, U_bar = averages.get((name, part), (0, 0))
                I_bar = 0.85 * I_bar + 0.15 * I
                averages[name, part] = I_bar, 0.85 * U_bar + 0.15 * abs(I - I_bar)
        run.allocator.step(t)
        run.optimizer.zero_grad()
    expected = []
    for name in run.layers:
        s = {part: np.prod(averages[name, part], axis=0) for part in PARTS}
        expected.append(s["lam"] + s["P"].mean(0) + s["Q"].mean(1))
    got = scores_now(run, "sensitivity")
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-4, atol=1e-12)


def test_the_betas_of_the_smoothed_sensitivity_are_settings():
    run = Run("sensitivity")
    run.allocator = RankAllocator(run.layers, run.budget, "sensitivity", run.optimizer, beta1=0.5, beta2=0.75)
    run.update(1, allocate=False)
    run.allocator.step(1)
    expected = []
    for layer in run.layers.values():  # Ī = I/2, Ū = (I − Ī)/4 = I/8
        s = {part: abs(float64(p := getattr(layer, part)) * float64(p.grad)) ** 2 / 16 for part in PARTS}
        expected.append(s["lam"] + s["P"].mean(0) + s["Q"].mean(1))
    np.testing.assert_allclose(scores_now(run, "sensitivity"), np.concatenate(expected), rtol=1e-5)


def test_the_last_allocations_sensitivity_includes_that_updates_gradient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vilora, "remove_triplets", lambda *_: None)
    run = Run("sensitivity")
    for t in range(1, T - T_F):
        run.update(t)
    before = {key: I_bar.clone() for key, I_bar in run.allocator.ema.I_bar.items()}
    run.update(T - T_F, allocate=False)
    first = run.layers["1"]  # the first of its shape, which is the key's first of several
    I = (first.Q * first.Q.grad).abs().detach()
    run.allocator.step(T - T_F)
    (key,) = (key for key in before if key == (8, RANK, 8, "Q"))
    torch.testing.assert_close(run.allocator.ema.I_bar[key][0], 0.85 * before[key][0] + 0.15 * I)


def test_a_smoothed_score_that_no_step_has_followed_is_a_key_error():
    with pytest.raises(KeyError):
        Run("sensitivity").allocator.scores(["sensitivity"])


# --- allocation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
@pytest.mark.parametrize("score", SCORES)
def test_every_allocation_keeps_exactly_the_budget(score: str, optimizer: str):
    if optimizer == "adamw" and score in SIGMA_SCORES:
        pytest.skip("needs σ")
    run, allocations = Run(score, optimizer), 0
    for t in range(1, T + 1):
        before = run.allocator.ranks()
        run.update(t)
        ranks = run.allocator.ranks()
        if run.budget.due(t):
            allocations += 1
            assert sum(ranks.values()) == run.budget(t)
            assert sum(int((layer.lam != 0).sum()) for layer in run.layers.values()) <= run.budget(t)
        else:
            assert ranks == before
    assert allocations == len(range(9, 30, 3)) + 1
    assert sum(ranks.values()) == 8


def test_the_best_triplets_are_kept_with_ties_broken_by_position():
    run = Run("lambda")
    with torch.no_grad():
        for layer, lam in zip(
            run.layers.values(), [[3, 1, 1], [1, 0, -9], [1, 1, 1], [1, 2, 1]] + [[0, 0, 0]] * 2, strict=True
        ):
            layer.lam.copy_(torch.tensor(lam))
    run.allocator.step(T - T_F)  # keeps 8: −9, 3, 2, and the first five of those at 1
    assert list(run.allocator.ranks().values()) == [3, 2, 2, 1, 0, 0]
    assert [layer.lam.tolist() for layer in run.layers.values()] == [
        [3, 1, 1], [1, -9], [1, 1], [2], [], []  # and the others are gone
    ]  # fmt: skip


def test_before_the_first_allocation_everything_is_kept():
    run = Run("mu")
    for t in range(1, T_I + 1):
        run.update(t)
    assert set(run.allocator.ranks().values()) == {RANK}


def test_a_dropped_triplet_keeps_its_gradient_and_comes_back_when_that_makes_it_important():
    run = Run("lambda")
    for t in range(1, 10):
        run.update(t)
    name, i = next(
        (name, int((~kept).nonzero()[0])) for name, kept in run.allocator.kept.items() if not kept.all()
    )
    lam = run.layers[name].lam
    assert lam[i] == 0
    run.update(10, allocate=False)
    assert lam.grad[i] != 0
    with torch.no_grad():
        lam[i] -= 10 * lam.grad[i].sign()
    run.allocator.step(12)
    assert run.allocator.kept[name][i]
    assert lam[i] != 0


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_after_the_last_allocation_a_dropped_triplet_is_gone(optimizer: str):
    run = Run("mu", optimizer, target=4)
    for t in range(1, T + 1):
        run.update(t)
        ranks = run.allocator.ranks() if t >= T - T_F else dict.fromkeys(run.layers, RANK)
        for name, layer in run.layers.items():
            r = ranks[name]
            assert layer.P.shape[1] == len(layer.lam) == layer.Q.shape[0] == r
            for p in (layer.P, layer.lam, layer.Q):
                sizes = [value.shape for value in run.optimizer.state[p].values() if value.ndim]
                assert sizes == [p.shape] * 2  # g and h, or both of Adam's moments
                assert isinstance(p, nn.Parameter)
    assert sum(ranks.values()) == 4
    assert 0 in ranks.values()
    if optimizer == "ivon":  # still one vector of all, though what has no rank gets no gradient
        flats = list(run.optimizer._flats.values())
        run.update(T)
        assert list(run.optimizer._flats.values()) == flats


@pytest.mark.parametrize("score", PAPERS)
def test_what_is_left_still_has_scores(score: str):
    run = Run(score)
    for t in range(1, T + 1):
        run.update(t)
    run.update(T + 1, allocate=False)
    expected = scores_by_loop(run, score)
    np.testing.assert_allclose(scores_now(run, score), expected, rtol=1e-5)
    assert len(expected) == 8


def test_a_model_with_fewer_triplets_does_not_go_with_the_state_of_another():
    run, fresh = Run("mu"), Run("mu")
    fresh.update(1)
    for t in range(1, T + 1):
        run.update(t)
    fresh.model.load_state_dict(run.model.state_dict())
    with pytest.raises(RuntimeError, match="optimizer's state"):
        fresh.update(2)
    fresh.optimizer.load_state_dict(run.optimizer.state_dict())
    fresh.update(2)


class SameDraws:
    """Noise for each entry of an adapter's parameter, whether others are still there, gone, or held at 0."""

    def __init__(self, run: Run, t: list[int]):
        self.run, self.seed, self.t = run, 0, t

    def __call__(self, flat: Tensor) -> Tensor:
        self.seed += 1
        generator, at = torch.Generator().manual_seed(self.seed), 0
        for name, layer in self.run.layers.items():
            for part, dim in (("P", 1), ("lam", 0), ("Q", 0)):
                p, size = getattr(layer, part), list(getattr(layer, part).shape)
                size[dim] = RANK
                draw = torch.randn(size, generator=generator)
                kept = self.run.allocator.kept[name].nonzero().squeeze(1)
                if p.shape[dim] < RANK:
                    draw = draw.index_select(dim, kept)
                elif self.t[0] > T - T_F:
                    draw = torch.zeros(size).index_copy(dim, kept, draw.index_select(dim, kept))
                flat[at : at + p.numel()] = draw.flatten()
                at += p.numel()
        assert at == flat.numel()
        return flat


@pytest.mark.parametrize(("optimizer", "score"), [("ivon", "mu"), ("ivon", "snr"), ("adamw", "sensitivity")])
def test_training_goes_on_as_if_dropped_triplets_had_been_held_at_zero(
    optimizer: str, score: str, monkeypatch: pytest.MonkeyPatch
):
    """30 updates after the last allocation; to the squared penalty a column of zeros is a constant."""
    cut, held = Run(score, optimizer, squared=True), Run(score, optimizer, squared=True)
    for run in (cut, held):  # in float64: AdamW makes of a rounding error what it makes of a gradient
        run.model.double()
        run.x, run.y = run.x.double(), run.y.double()
        now = [0]
        draws = SameDraws(run, now)
        with monkeypatch.context() as patch:
            if optimizer == "ivon":
                patch.setattr(Tensor, "normal_", lambda flat, own=draws: own(flat))
            if run is held:
                patch.setattr(vilora, "remove_triplets", lambda *_: None)
            for t in range(1, T - T_F + 31):
                now[0] = t
                run.update(t)
                if run is held and t >= T - T_F:
                    hold_dropped_at_zero(held)
    assert cut.allocator.ranks() == held.allocator.ranks()
    assert sum(layer.rank for layer in cut.layers.values()) == 8
    for name, layer in cut.layers.items():
        kept, whole = held.allocator.kept[name], held.layers[name]
        expected = whole.P[:, kept], whole.lam[kept], whole.Q[kept]
        for ours, theirs in zip((layer.P, layer.lam, layer.Q), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@torch.no_grad()
def hold_dropped_at_zero(run: Run) -> None:
    for name, layer in run.layers.items():
        kept = run.allocator.kept[name]
        layer.P *= kept
        layer.lam *= kept
        layer.Q *= kept[:, None]


@pytest.mark.parametrize("target", [0, 1])
def test_modules_at_rank_0_train_on(target: int):
    run = Run("snr", target=target)
    for t in range(1, T + 1):
        run.update(t)
    assert sorted(run.allocator.ranks().values()) == [0] * (MAPS - 1) + [target]
    assert torch.isfinite(run.loss())


def test_a_budget_that_prunes_nothing_changes_nothing():
    pruned, plain = Run("mu", target=RANK * MAPS), Run("mu", target=RANK * MAPS)
    for t in range(1, T + 1):
        torch.manual_seed(t)
        pruned.update(t)
        torch.manual_seed(t)
        plain.update(t, allocate=False)
        plain.optimizer.zero_grad()
    assert all(
        torch.equal(p, q) for p, q in zip(pruned.model.parameters(), plain.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("score", ["sensitivity", "snr"])
@pytest.mark.parametrize("saved_at", [20, 35])
def test_a_saved_and_loaded_run_goes_on_bit_for_bit(score: str, saved_at: int, tmp_path: Path):
    run, twin = Run(score), Run(score, seed=1)
    for t in range(1, saved_at + 1):
        run.update(t)
    parts = ("model", "optimizer", "allocator")
    torch.save({part: getattr(run, part).state_dict() for part in parts}, tmp_path / "state.pt")
    for part, state in torch.load(tmp_path / "state.pt", weights_only=True).items():
        getattr(twin, part).load_state_dict(state)
    twin.x, twin.y = run.x, run.y
    for t in range(saved_at + 1, T + 1):
        for each in (run, twin):
            torch.manual_seed(t)
            each.update(t)
    assert run.allocator.ranks() == twin.allocator.ranks()
    assert all(
        torch.equal(p, q) for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True)
    )


# --- following all scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "optimizer"), [("mu", "ivon"), ("sensitivity", "ivon"), ("mu", "adamw")])
def test_following_all_scores_changes_nothing(score: str, optimizer: str):
    plain, tracked = Run(score, optimizer), Run(score, optimizer, track=True)
    for run in (plain, tracked):
        torch.manual_seed(1)
        for t in range(1, T + 1):
            run.update(t)
    assert plain.allocator.ranks() == tracked.allocator.ranks()
    for p, q in zip(plain.model.parameters(), tracked.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert plain.allocator.tracked is None


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_every_score_that_can_be_computed_is_there_after_each_allocation(optimizer: str):
    run, records = Run("mu", optimizer, track=True), []
    for t in range(1, T + 1):
        run.update(t)
        if run.allocator.tracked is not (records[-1] if records else None):
            records.append(run.allocator.tracked)
    names = [name for name in SCORES if optimizer == "ivon" or name not in SIGMA_SCORES]
    assert [record["step"] for record in records] == [t for t in range(1, T + 1) if run.budget.due(t)]
    assert [record["budget"] for record in records] == [run.budget(record["step"]) for record in records]
    for record in records:
        assert list(record["scores"]) == names
        assert {S.shape for S in record["scores"].values()} == {(RANK * MAPS,)}


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_the_scores_followed_are_those_of_a_run_that_prunes_by_them(optimizer: str):
    followed = Run("mu", optimizer, track=True)
    due = next(t for t in range(1, T) if followed.budget.due(t))  # up to here all runs are the same one
    names = [name for name in SCORES if optimizer == "ivon" or name not in SIGMA_SCORES]
    dropped = {}
    for name in [None, *names]:
        run = followed if name is None else Run(name, optimizer)
        torch.manual_seed(1)
        for t in range(1, due + 1):
            run.update(t)
        dropped[name] = (~torch.cat(list(run.allocator.kept.values()))).nonzero().flatten().tolist()
    for name, S in followed.allocator.tracked["scores"].items():
        lowest = S.argsort()[: RANK * MAPS - followed.budget(due)]
        assert sorted(lowest.tolist()) == dropped[name]


def test_the_variation_of_sigma_is_over_all_entries_of_the_adapters():
    run = Run("mu", track=True)
    for t in range(1, T_I + DELTA_T + 1):
        run.update(t)
    params = [getattr(layer, part) for layer in run.layers.values() for part in PARTS]
    sigma = np.concatenate([float64(run.optimizer.sigma(p)).ravel() for p in params])
    got = float(run.allocator.tracked["sigma_cv"])  # allocation does not touch σ
    assert got == pytest.approx(sigma.std() / sigma.mean(), rel=1e-5)
    assert sigma.std() > 0


def test_a_constant_sigma_does_not_vary_and_without_a_posterior_there_is_none():
    fixed, plain = run_with_fixed_sigma("mu", track=True), Run("mu", "adamw", track=True)
    for run in (fixed, plain):
        for t in range(1, T_I + DELTA_T + 1):
            run.update(t)
    assert fixed.allocator.tracked["sigma_cv"] == 0
    assert plain.allocator.tracked["sigma_cv"] is None


# --- another optimizer with a posterior ---------------------------------------------------------------------


def test_with_a_constant_sigma_snr_keeps_what_mu_keeps():
    kept = []
    for score in ("snr", "mu"):
        run = run_with_fixed_sigma(score)
        torch.manual_seed(1)
        for t in range(1, T + 1):
            run.update(t)
        assert sum(run.allocator.ranks().values()) == 8
        kept.append([mask.tolist() for mask in run.allocator.kept.values()])
    assert kept[0] == kept[1]


def test_sigma_alone_is_enough_for_every_score_that_needs_it():
    run = run_with_fixed_sigma("snr")
    run.update(1)
    for score in SIGMA_SCORES:
        if score in PAPERS:
            np.testing.assert_allclose(scores_now(run, score), scores_by_loop(run, score), rtol=1e-5)


def test_where_sigmas_of_many_are_there_they_are_used():
    class Together(FixedSigma):
        def sigmas(self, params: list[Tensor]) -> list[Tensor]:
            return [torch.full_like(p, 0.5) for p in params]

    run = run_with_fixed_sigma("mu")
    run.update(1)
    run.allocator.optimizer = Together(run.params, lr=0.01)
    got = run.allocator.scores(["mu", "snr"])
    torch.testing.assert_close(got["snr"], 2 * got["mu"])


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SIGMA_SCORES)
def test_a_score_that_needs_sigma_is_refused_without_a_posterior(score: str):
    with pytest.raises(ValueError, match=f"{score} needs σ, so an optimizer that has a posterior"):
        Run(score, "adamw")


def test_an_unknown_score_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"magnitude: choose from .*sensitivity, snr_abs"):
        Run("magnitude")


def test_a_budget_above_the_number_of_triplets_is_refused():
    run = Run("mu")
    with pytest.raises(ValueError, match=r"19.*18"):
        RankAllocator(run.layers, CubicBudget(19, 8, T, T_I, T_F, DELTA_T), "mu", run.optimizer)


@pytest.mark.parametrize("among", ["alone", "beside SVD adapters"])
def test_lora_adapters_are_refused_by_name(among: str):
    model = nn.Sequential(nn.Linear(4, 4))
    layers = inject(model, ["0"], rank=2, alpha=4, kind="lora")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if among != "alone":
        layers = {"svd": random_adapter(), **layers}
    with pytest.raises(ValueError, match=r"\A0 has no triplets: RankAllocator needs adapters"):
        RankAllocator(layers, CubicBudget(2, 1, T, T_I, T_F, DELTA_T), "mu", optimizer)


def adafactor(run: Run) -> torch.optim.Optimizer:
    """Its second moments of a matrix are a row's and a column's means."""
    run.optimizer = torch.optim.Adafactor(run.params, lr=0.01)
    return run.optimizer


def test_state_that_cannot_be_cut_is_refused_by_name_where_it_is_there_from_the_start():
    run = Run("mu", "adamw")
    adafactor(run)
    run.update(1, allocate=False)
    with pytest.raises(ValueError, match=r"0 cannot be taken out: .* row_var is \(8, 1\), .*\(8, 3\)"):
        RankAllocator(run.layers, run.budget, "mu", run.optimizer)


def test_state_that_cannot_be_cut_is_refused_by_name_at_the_cut_and_nothing_is_cut():
    run = Run("mu", "adamw")
    run.allocator = RankAllocator(run.layers, run.budget, "mu", adafactor(run))
    for t in range(1, T - T_F):
        run.update(t)
    with pytest.raises(ValueError, match="the optimizer's row_var is"):
        run.update(T - T_F)
    assert {layer.rank for layer in run.layers.values()} == {RANK}


# --- fixed ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "svd", "none"])
def test_fixed_ranks_has_the_allocators_interface(kind: str, tmp_path: Path):
    model, layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), {}
    if kind != "none":
        layers = inject(model, ["0", "1"], rank=2, alpha=4, kind=kind)
    ranks = FixedRanks(layers)
    before = [p.detach().clone() for p in model.parameters()]
    for t in range(1, 4):
        assert ranks.step(t) is None
        assert ranks.budget(t) == 2 * len(layers)
    assert ranks.ranks() == dict.fromkeys(layers, 2)
    torch.save(ranks.state_dict(), tmp_path / "state.pt")
    ranks.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# --- against the public implementation ----------------------------------------------------------------------

PEFT = """
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

data = torch.load("data.pt", weights_only=True)
model = nn.Module()
for i, values in enumerate(data[0]):
    model.add_module(f"m{i}", nn.Linear(values["Q"].shape[1], values["P"].shape[0]))
names = [f"m{i}" for i in range(len(data[0]))]
config = AdaLoraConfig(
    target_modules=names, init_r=3, target_r=2,
    beta1=0.85, beta2=0.85, tinit=1, tfinal=2, deltaT=1, total_step=10,
)
peft_model = get_peft_model(model, config).base_model
lams = []
for t, step in enumerate(data):
    for name, values in zip(names, step):
        for theirs, ours in (("lora_B", "P"), ("lora_E", "lam"), ("lora_A", "Q")):
            p = getattr(getattr(model, name), theirs)["default"]
            p.data.copy_(values[ours].view_as(p))
            p.grad = values[ours + "_grad"].view_as(p).clone()
    peft_model.rankallocator.update_and_allocate(peft_model.model, t)
    lams.append([getattr(model, name).lora_E["default"].data.flatten().clone() for name in names])
torch.save(lams, "lams.pt")
"""


@pytest.mark.slow
def test_peft_keeps_the_same_triplets_given_the_same_parameters_and_gradients(tmp_path: Path):
    """Its AdaLoRA in a process of its own, as far as its last allocation, before which it stops looking."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    shapes = [(6, 5), (5, 6), (6, 6), (4, 6)]

    def random_adapter(d_out: int, d_in: int) -> dict[str, Tensor]:
        parts = {"P": (d_out, 3), "lam": (3,), "Q": (3, d_in)}
        return {key: torch.randn(shape) for part, shape in parts.items() for key in (part, part + "_grad")}

    data = [[random_adapter(*shape) for shape in shapes] for _ in range(8)]
    torch.save(data, tmp_path / "data.pt")
    (tmp_path / "public.py").write_text(PEFT)
    subprocess.run([sys.executable, "public.py"], cwd=tmp_path, check=True, timeout=120)
    public = torch.load(tmp_path / "lams.pt", weights_only=True)

    layers = {
        f"m{i}": SVDLinear(nn.Linear(d_in, d_out), 3, alpha=1) for i, (d_out, d_in) in enumerate(shapes)
    }
    optimizer = torch.optim.SGD(nn.ModuleDict(layers).parameters(), lr=0.1)  # never stepped
    allocator = RankAllocator(layers, CubicBudget(12, 8, 10, 1, 2, 1), "sensitivity", optimizer)
    for t, step in enumerate(data):
        for layer, values in zip(layers.values(), step, strict=True):
            for part in ("P", "lam", "Q"):
                getattr(layer, part).data.copy_(values[part])
                getattr(layer, part).grad = values[part + "_grad"].clone()
        allocator.step(t)
        assert sum(int((layer.lam != 0).sum()) for layer in layers.values()) == allocator.budget(t)
        for layer, lam in zip(layers.values(), public[t], strict=True):
            assert torch.equal(layer.lam != 0, lam != 0)
