"""vilora.py: the budget is kept to the triplet, what is dropped is gone, the scores are a plain loop's."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

from adalora import SVDLinear, inject, orthogonality_penalty
from budget import CubicBudget
from ivon import IVON
from metrics import score_agreement
from scores import SCORES
from vilora import RankAllocator

T, T_I, T_F, DELTA_T = 60, 6, 15, 3
RANK = 3
SIGMA_SCORES = [name for name, score in SCORES.items() if score.needs == "sigma"]


class Run:
    """A small regression with six adapters of three shapes, trained by the loop that vilora.py describes."""

    def __init__(
        self, score: str, optimizer: str = "ivon", target: int = 8, seed: int = 0, track=False, **settings
    ):
        torch.manual_seed(seed)
        sizes = [6, 8, 8, 8, 6, 6, 4]
        self.model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
        self.layers = inject(self.model, [str(i) for i in range(6)], RANK, alpha=6)
        params = [p for p in self.model.parameters() if p.requires_grad]
        if optimizer == "ivon":
            settings = {
                "lr": 0.1,
                "ess": 100,
                "hess_init": 0.1,
                "beta2": 0.9,
                "weight_decay": 1e-3,
            } | settings
            self.optimizer = IVON(params, **settings)
        else:
            self.optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.01)
        self.budget = CubicBudget(RANK * 6, target, T, T_I, T_F, DELTA_T)
        self.allocator = RankAllocator(self.layers, self.budget, score, self.optimizer, track=track)
        self.x, self.y = torch.randn(32, 6), torch.randn(32, 4)

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean() + 0.1 * orthogonality_penalty(self.layers)

    def update(self, t: int, allocate: bool = True) -> None:
        if isinstance(self.optimizer, IVON):
            with self.optimizer.sampled_params(train=True):
                self.loss().backward()
        else:
            self.loss().backward()
        self.optimizer.step()
        if allocate:
            self.allocator.step(t)
            self.optimizer.zero_grad()


def elementwise(score: str, theta: np.ndarray, grad: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The scores without a memory, in float64 and with scipy."""
    return {
        "mu": lambda: abs(theta),
        "lambda": lambda: abs(theta),
        "snr": lambda: abs(theta) / sigma,
        "inv_sigma": lambda: 1 / sigma,
        "snr_abs": lambda: stats.foldnorm.mean(abs(theta) / sigma) / stats.foldnorm.std(abs(theta) / sigma),
        "raw_sensitivity": lambda: abs(theta * grad),
    }[score]()


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def scores_by_loop(run: Run, score: str) -> dict[str, np.ndarray]:
    """Adapter by adapter and triplet by triplet."""
    result = {}
    for name, layer in run.layers.items():
        s = {}
        for part in ("P", "lam", "Q"):
            p = getattr(layer, part)
            sigma = run.optimizer.sigma(p) if isinstance(run.optimizer, IVON) else torch.ones_like(p)
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            s[part] = elementwise(score, float64(p), float64(grad), float64(sigma))
        triplets = [s["P"][:, i].mean() + s["Q"][i].mean() for i in range(len(s["lam"]))]
        result[name] = s["lam"] + (score != "lambda") * np.array(triplets)
    return result


# --- scores of all adapters at once -------------------------------------------------------------------------


@pytest.mark.parametrize("score", [name for name in SCORES if name != "sensitivity"])
def test_triplet_scores_are_those_of_a_plain_loop(score: str):
    run = Run(score)
    for t in range(1, 6):
        run.update(t)
    run.update(6, allocate=False)  # the gradients are still there
    expected = scores_by_loop(run, score)
    for name, S in run.allocator.triplet_scores().items():
        np.testing.assert_allclose(float64(S), expected[name], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_smoothed_sensitivity_is_that_of_a_plain_loop_over_all_steps(optimizer: str):
    run = Run("sensitivity", optimizer)
    averages = {}
    for t in range(1, 6):
        run.update(t, allocate=False)
        for name, layer in run.layers.items():
            for part in ("P", "lam", "Q"):
                p = getattr(layer, part)
                I = abs(float64(p) * float64(p.grad))
                I_bar, U_bar = averages.get((name, part), (0, 0))
                I_bar = 0.85 * I_bar + 0.15 * I
                averages[name, part] = I_bar, 0.85 * U_bar + 0.15 * abs(I - I_bar)
        run.allocator.step(t)
        run.optimizer.zero_grad()
    for name, S in run.allocator.triplet_scores().items():
        s = {part: np.prod(averages[name, part], axis=0) for part in ("P", "lam", "Q")}
        np.testing.assert_allclose(
            float64(S), s["lam"] + s["P"].mean(0) + s["Q"].mean(1), rtol=1e-4, atol=1e-12
        )


def test_the_betas_of_the_smoothed_sensitivity_are_settings():
    run = Run("sensitivity")
    run.allocator = RankAllocator(run.layers, run.budget, "sensitivity", run.optimizer, beta1=0.0, beta2=0.5)
    run.update(1, allocate=False)
    I = {name: abs(float64(layer.lam) * float64(layer.lam.grad)) for name, layer in run.layers.items()}
    run.allocator.step(1)
    # β1 = 0: Ī = I, so I − Ī and with it Ū and the score are 0.
    assert all(not S.any() for S in run.allocator.triplet_scores().values())
    assert any(i.any() for i in I.values())


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
    assert allocations == len(range(9, 45, 3)) + 1
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


@pytest.mark.parametrize("score", ["mu", "snr", "raw_sensitivity", "lambda"])
def test_what_is_left_still_has_scores(score: str):
    run = Run(score)
    for t in range(1, T + 1):
        run.update(t)
    run.update(T + 1, allocate=False)
    expected = scores_by_loop(run, score)
    for name, S in run.allocator.triplet_scores().items():
        np.testing.assert_allclose(float64(S), expected[name], rtol=1e-5)
    assert sum(map(len, expected.values())) == 8


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_where_it_cannot_be_taken_out_a_dropped_triplet_is_exactly_nothing(optimizer: str):
    """Momentum, decay and noise are there, and reach neither its entries nor anything through them."""
    run = Run("mu", optimizer)
    run.allocator = RankAllocator(run.layers, run.budget, "mu")  # knows of no optimizer
    for t in range(1, T + 1):
        run.update(t, allocate=False)
        if t > T - T_F:
            for layer in run.layers.values():
                dropped = ~layer.alive
                assert not layer.P.grad[:, dropped].any()
                assert not layer.lam.grad[dropped].any()
                assert not layer.Q.grad[dropped].any()
        run.allocator.step(t)
        run.optimizer.zero_grad()
        if t >= T - T_F:
            for name, layer in run.layers.items():
                dropped = ~layer.alive
                assert int(layer.alive.sum()) == run.allocator.ranks()[name]
                assert not layer.P[:, dropped].any()
                assert not layer.lam[dropped].any()
                assert not layer.Q[dropped].any()
    assert sum(run.allocator.ranks().values()) == 8
    if optimizer == "ivon":
        with run.optimizer.sampled_params(), torch.no_grad():
            dropped = [(layer, ~layer.alive) for layer in run.layers.values()]
            assert any(layer.lam[d].any() for layer, d in dropped)  # the noise is there
            noisy = run.model(run.x), run.loss()
            for layer, d in dropped:
                layer.P[:, d] = layer.Q[d] = 1e3
            assert torch.equal(run.model(run.x), noisy[0])
            assert torch.equal(run.loss(), noisy[1])


def test_where_the_optimizers_state_is_not_of_the_parameters_shapes_dropped_triplets_are_masked():
    run = Run("mu", "adamw")
    params = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = torch.optim.Adafactor(params, lr=0.01)
    run.allocator = RankAllocator(run.layers, run.budget, "mu", run.optimizer)
    for t in range(1, T + 1):
        run.update(t)
    assert sum(int(layer.alive.sum()) for layer in run.layers.values()) == 8
    assert all(layer.P.shape[1] == RANK for layer in run.layers.values())


def test_a_shrunk_model_does_not_go_with_the_state_of_another():
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
    """Noise for each entry of an adapter's parameter, whether others are still there or not."""

    def __init__(self, run: Run):
        self.run, self.seed = run, 0

    def __call__(self, flat: Tensor) -> Tensor:
        self.seed += 1
        generator, at = torch.Generator().manual_seed(self.seed), 0
        for name, layer in self.run.layers.items():
            for part, dim in (("P", 1), ("lam", 0), ("Q", 0)):
                p, size = getattr(layer, part), list(getattr(layer, part).shape)
                size[dim] = RANK
                draw = torch.randn(size, generator=generator)
                if p.shape[dim] < RANK:
                    draw = draw.index_select(dim, self.run.allocator.kept[name].nonzero().squeeze(1))
                flat[at : at + p.numel()] = draw.flatten()
                at += p.numel()
        assert at == flat.numel()
        return flat


@pytest.mark.parametrize(("optimizer", "score"), [("ivon", "mu"), ("ivon", "snr"), ("adamw", "sensitivity")])
def test_training_goes_on_as_if_nothing_had_been_taken_out(
    optimizer: str, score: str, monkeypatch: pytest.MonkeyPatch
):
    """50 updates after the last allocation, beside a run in which the dropped triplets are masked."""
    shrunk, masked = Run(score, optimizer), Run(score, optimizer)
    for run in (shrunk, masked):  # in float64: AdamW makes of a rounding error what it makes of a gradient
        run.model.double()
        run.x, run.y = run.x.double(), run.y.double()

    def fix_by_masks(self: RankAllocator) -> None:
        for name, layer in self.layers.items():
            layer.mask(self.kept[name])

    masked.allocator._fix = fix_by_masks.__get__(masked.allocator)
    draws = {run: SameDraws(run) for run in (shrunk, masked)}
    for run in (shrunk, masked):
        if optimizer == "ivon":
            monkeypatch.setattr(Tensor, "normal_", lambda flat, own=draws[run]: own(flat))
        for t in range(1, T - T_F + 51):
            run.update(t)
    assert shrunk.allocator.ranks() == masked.allocator.ranks()
    assert sum(layer.lam.numel() for layer in shrunk.layers.values()) == 8
    for name, layer in shrunk.layers.items():
        kept = masked.allocator.kept[name]
        whole = masked.layers[name]
        for ours, theirs in (
            (layer.P, whole.P[:, kept]),
            (layer.lam, whole.lam[kept]),
            (layer.Q, whole.Q[kept]),
        ):
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [0, 1])
def test_modules_at_rank_0_train_on(target: int):
    run = Run("snr", target=target)
    for t in range(1, T + 1):
        run.update(t)
    assert sorted(run.allocator.ranks().values()) == [0] * 5 + [target]
    assert torch.isfinite(run.loss())


def test_a_budget_that_prunes_nothing_changes_nothing():
    pruned, plain = Run("mu", target=RANK * 6), Run("mu", target=RANK * 6)
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
@pytest.mark.parametrize("saved_at", [20, 50])
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
    assert plain.allocator.tracked == []


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_every_score_that_can_be_had_is_followed_at_every_allocation(optimizer: str):
    run = Run("mu", optimizer, track=True)
    for t in range(1, T + 1):
        run.update(t)
    records = run.allocator.tracked
    assert [record["step"] for record in records] == [t for t in range(1, T + 1) if run.budget.due(t)]
    assert [record["budget"] for record in records] == [run.budget(r["step"]) for r in records]
    names = [name for name in SCORES if optimizer == "ivon" or name not in SIGMA_SCORES]
    assert all(list(record["scores"]) == names for record in records)


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_the_scores_followed_are_those_of_a_run_that_prunes_by_them(optimizer: str):
    followed = Run("mu", optimizer, track=True)
    due = next(t for t in range(1, T) if followed.budget.due(t))  # up to here all runs are the same one
    names = followed.allocator.computable
    runs = [followed, *(Run(name, optimizer) for name in names)]
    for run in runs:
        torch.manual_seed(1)
        for t in range(1, due):
            run.update(t)
        lams = [layer.lam.detach().clone() for layer in run.layers.values()]
        run.update(due)
        run.pruned = torch.cat(
            [(layer.lam == 0) & (lam != 0) for layer, lam in zip(run.layers.values(), lams, strict=True)]
        )
    scores = followed.allocator.tracked[0]["scores"]
    for name, run in zip(names, runs[1:], strict=True):
        lowest = scores[name].argsort()[: RANK * 6 - run.budget(due)]
        assert sorted(lowest.tolist()) == run.pruned.nonzero().flatten().tolist()


def test_the_variation_of_sigma_is_over_all_entries_of_the_adapters():
    run = Run("mu", track=True)
    for t in range(1, T_I + DELTA_T + 1):
        run.update(t)
    sigma = [
        float64(run.optimizer.sigma(p)).ravel()
        for layer in run.layers.values()
        for p in (layer.P, layer.lam, layer.Q)
    ]
    sigma = np.concatenate(sigma)  # allocation does not touch it
    assert float(run.allocator.tracked[-1]["sigma_cv"]) == pytest.approx(sigma.std() / sigma.mean(), rel=1e-5)
    assert sigma.std() > 0


def test_where_sigma_is_constant_snr_is_mu_and_without_a_posterior_there_is_no_sigma():
    class Constant(torch.optim.SGD):
        def sigma(self, param: Tensor) -> Tensor:
            return torch.full_like(param, 0.25)

    run = Run("mu")
    run.optimizer = Constant([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
    run.allocator = RankAllocator(run.layers, run.budget, "mu", run.optimizer, track=True)
    for t in range(1, T_I + DELTA_T + 1):
        run.update(t)
    record = run.allocator.tracked[-1]
    agreement = score_agreement({name: S.numpy() for name, S in record["scores"].items()}, record["budget"])
    assert agreement["spearman"]["snr/mu"] == 1
    assert agreement["jaccard"]["snr/mu"] == 1
    assert agreement["spearman"]["mu/inv_sigma"] is None
    assert record["sigma_cv"] == 0
    plain = Run("mu", "adamw", track=True)
    for t in range(1, T_I + DELTA_T + 1):
        plain.update(t)
    assert plain.allocator.tracked[-1]["sigma_cv"] is None


# --- what a score needs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SIGMA_SCORES)
@pytest.mark.parametrize("optimizer", ["adamw", None])
def test_a_score_that_needs_sigma_is_refused_without_a_posterior(score: str, optimizer: str | None):
    run = Run("mu", "adamw")
    with pytest.raises(ValueError, match=rf"{score} needs σ"):
        RankAllocator(run.layers, run.budget, score, run.optimizer if optimizer else None)


def test_anything_with_sigma_will_do_as_an_optimizer():
    class HandMade:
        def sigma(self, p: Tensor) -> Tensor:
            return torch.full_like(p, 0.5)

    run = Run("mu")
    with torch.no_grad():
        for layer in run.layers.values():
            layer.lam.normal_()
    snr, mu = (RankAllocator(run.layers, run.budget, s, HandMade()).triplet_scores() for s in ("snr", "mu"))
    assert all(torch.equal(snr[name], 2 * mu[name]) for name in mu)


def test_an_unknown_score_is_refused_with_the_known_ones():
    run = Run("mu")
    with pytest.raises(ValueError, match=r"magnitude.*sensitivity, snr_abs"):
        RankAllocator(run.layers, run.budget, "magnitude")


def test_a_budget_above_the_number_of_triplets_is_refused():
    run = Run("mu")
    with pytest.raises(ValueError, match=r"19.*18"):
        RankAllocator(run.layers, CubicBudget(19, 8, T, T_I, T_F, DELTA_T), "mu")


# --- outside GLUE -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [LlamaConfig, OPTConfig, Qwen2Config])
def test_the_readmes_example_trains_any_causal_language_model_and_predicts_from_its_posterior(architecture):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme[readme.index("## Outside GLUE") :]
    example = section[section.index("```python") + len("```python") :]
    example = example[: example.index("```")]
    assert len(example.strip().splitlines()) < 40
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(architecture(**sizes, max_position_embeddings=32))
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    sequences = (torch.randint(12, (320, 1)) + 5 * torch.arange(8)) % 12  # a language with one rule
    batches = [sequences[torch.randperm(320)[:16]] for _ in range(300)]
    given = {"model": model, "batches": batches, "prompt": sequences[:, :7]}
    with torch.no_grad():
        before = model(input_ids=sequences, labels=sequences).loss
        unlearnt = model(input_ids=sequences[:, :7]).logits[:, -1].softmax(-1)
    exec(example, given)
    with torch.no_grad():
        after = model(input_ids=sequences, labels=sequences).loss
    assert after < before - 0.15
    names = [name for name, module in model.named_modules() if isinstance(module, SVDLinear)]
    assert sorted(name.rpartition(".")[2] for name in names) == ["q_proj"] * 2 + ["v_proj"] * 2
    assert sum(given["allocator"].ranks().values()) == 2 * len(names) == 8
    probabilities = given["probabilities"]
    assert probabilities.shape == (320, 12)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(320))
    nll, nll_before = (-p[torch.arange(320), sequences[:, 7]].log().mean() for p in (probabilities, unlearnt))
    assert nll < nll_before
    now = dict(model.named_parameters())
    for name, p in frozen.items():
        q = now.get(name, now.get(name.replace(".weight", ".base.weight").replace(".bias", ".base.bias")))
        assert torch.equal(p, q)


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
    allocator = RankAllocator(layers, CubicBudget(12, 8, 10, 1, 2, 1), "sensitivity")
    for t, step in enumerate(data):
        for layer, values in zip(layers.values(), step, strict=True):
            for part in ("P", "lam", "Q"):
                getattr(layer, part).data.copy_(values[part])
                getattr(layer, part).grad = values[part + "_grad"].clone()
        allocator.step(t)
        assert sum(int((layer.lam != 0).sum()) for layer in layers.values()) == allocator.budget(t)
        for layer, lam in zip(layers.values(), public[t], strict=True):
            assert torch.equal(layer.lam != 0, lam != 0)
