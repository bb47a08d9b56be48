"""IVON: the optimizer that has a posterior. A drop-in for the public `ivon-opt`.

    opt = IVON(model.parameters(), lr=0.4, ess=len(train_set))
    for x, y in batches:
        with opt.sampled_params(train=True):    # θ = m + σ·ε for the length of the block
            opt.zero_grad()
            loss(model(x), y).backward()        # several micro-batches in one block share one draw
        opt.step()                              # several blocks before a step: the mean of these samples

The posterior is q(θ) = N(m, diag(σ²)) with σ² = 1/(ess·(h + δ)). Outside a sampled block the parameters are
the mean m. Per parameter, `state[p]` holds the momentum `g` and the Hessian estimate `h`: views of two flat
vectors for all parameters of one group, dtype and device, so that an update is some thirty operations
whatever the model. None of them waits for the device.

[S] Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from math import inf, sqrt
from operator import is_

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten


def posterior_sigma(h: Tensor, ess: float, delta: float, out: Tensor | None = None) -> Tensor:
    """σ = 1/√(ess·(h + δ)). Source: [S] algorithm 1."""
    return torch.add(h, delta, out=out).mul_(ess).rsqrt_()


def update_hessian_(h: Tensor, excess: Tensor, precision: Tensor, beta2: float) -> None:
    """h ← β2 h + (1 − β2) ĥ + ½(1 − β2)²(h − ĥ)²/(h + δ): positive whatever ĥ is. Source: [S] algorithm 1.

    `excess` is h − ĥ, `precision` h + δ; all are of one shape. The memory of the excess is used up.
    """
    change = excess.mul_(1 - beta2)
    h.sub_(change).addcdiv_(change.square_(), precision, value=0.5)


def update_mean_(
    m: Tensor, g: Tensor, precision: Tensor, delta: float, bias: float, alpha: float, xi: float, room: Tensor
) -> None:
    """m ← m − α·clip((ḡ + δ m)/(h + δ), ±ξ) with ḡ = g/bias. Source: [S] algorithm 1, its code's clip.

    `precision` is h + δ, and in `room` there may be anything; all are of one shape. The bias is taken out of
    the fraction: one pass over the parameters less.
    """
    change = torch.add(g, m, alpha=delta * bias, out=room).div_(precision)
    m.add_(change.clamp_(-xi * bias, xi * bias), alpha=-alpha / bias)


class Flat:
    """Some parameters as one vector: their g and h, which the optimizer's state has views of, and room for
    the mean m, a draw θ and some deviations θ − m, (n,) each. Views and room are kept: making them takes
    longer than arithmetic.
    """

    def __init__(self, params: list[Tensor], states: list[dict[str, Tensor]]):
        self.params, self.shapes = params, [p.shape for p in params]
        self.g, self.h = (flatten([state[name] for state in states]).clone() for name in ("g", "h"))
        self.m, self.theta = torch.empty_like(self.g), torch.empty_like(self.g)
        self.spare: list[Tensor] = []  # deviations of draws that were stepped on
        self.g_views, self.h_views = unflatten(self.g, params), unflatten(self.h, params)
        self.m_views, self.theta_views = unflatten(self.m, params), unflatten(self.theta, params)
        for state, g, h in zip(states, self.g_views, self.h_views, strict=True):
            state.update(g=g, h=h)

    def holds(self, params: list[Tensor], states: list[dict[str, Tensor]]) -> bool:
        """Whether these are the parameters, and their states still the views (not loaded or replaced)."""
        held = [*self.params, *self.g_views, *self.h_views]
        asked = [*params, *(state.get("g") for state in states), *(state.get("h") for state in states)]
        same = len(held) == len(asked) and all(map(is_, held, asked))
        return same and self.shapes == [p.shape for p in params]


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton.

    Args:
        params: parameters, or groups of them, which can differ in every setting but mc_samples and sync.
        lr: step size; α = lr·(h0 + δ) with `rescale_lr`, else α = lr.
        ess: effective sample size λ; in the papers the training set's. Larger: a narrower posterior.
        hess_init: h0 > 0. Larger: a narrower posterior at the start.
        beta1: decay of the gradient's average g.
        beta2: decay of the Hessian's average h. Its memory is 1/(1 − beta2) steps: for σ to become
            informative within a run that should be well below the run's length.
        weight_decay: δ ≥ 0, the prior's precision divided by ess.
        mc_samples: how often `step` calls a closure; without one it averages the blocks it finds.
        hess_approx: "price", ĥ = ĝ·(θ − m)/σ², or "gradsq", ĥ = ess·ĝ².
        clip_radius: ξ, the largest change of a parameter in one step, in units of α.
        sync: average ĝ and ĥ over the processes of torch.distributed, each of which draws for itself.
        debias: ḡ = g/(1 − β1^t), else ḡ = g.
        rescale_lr: see lr.

    Raises ValueError for a setting out of range. Source: [S] algorithm 1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = inf,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = True,
    ):
        if mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, not {mc_samples}")
        self.mc_samples, self.sync = mc_samples, sync
        self._sampled = False  # whether inside a block
        # Of each block since the last step: parameters, their gradients, and θ − m as one vector.
        self._draws: list[list[tuple[list[Tensor], list[Tensor | None], Tensor]]] = []
        self._flats: dict[tuple, Flat] = {}
        defaults = {"lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2}
        defaults |= {"weight_decay": weight_decay, "hess_approx": hess_approx, "clip_radius": clip_radius}
        super().__init__(params, defaults | {"debias": debias, "rescale_lr": rescale_lr, "step": 0})

    def add_param_group(self, param_group: dict) -> None:
        setting = self.defaults | param_group
        for name, allowed in {
            "lr": setting["lr"] >= 0,
            "ess": setting["ess"] > 0,
            "hess_init": setting["hess_init"] > 0,
            "beta1": 0 <= setting["beta1"] < 1,
            "beta2": 0 <= setting["beta2"] < 1,
            "weight_decay": setting["weight_decay"] >= 0,
            "clip_radius": setting["clip_radius"] > 0,
            "hess_approx": setting["hess_approx"] in ("price", "gradsq"),
        }.items():
            if not allowed:
                raise ValueError(f"IVON cannot work with {name} = {setting[name]}")
        super().add_param_group(param_group)

    @contextmanager
    def sampled_params(self, train: bool = False, temperature: float = 1.0) -> Iterator[None]:
        """For the length of the block θ is a draw from N(m, diag(τσ²)); afterwards it is exactly m again.

        With `train`, the gradients that the block leaves in `p.grad` become one Monte-Carlo sample of the
        next `step`. `p.grad` is empty when such a block starts and when it ends: what was there before is
        ignored, and so is a block that raises. Without `train` (prediction), gradients and state are left
        alone.

        Args:
            temperature: τ ≥ 0; 0 is the mean, 1 the posterior (the only one to train with).

        Raises ValueError for another τ, RuntimeError inside another block.
        """
        if not temperature >= 0 or (train and temperature != 1):
            raise ValueError(
                f"temperature must be {'1 in training' if train else '0 or more'}, not {temperature}"
            )
        if self._sampled:
            raise RuntimeError("sampled_params cannot be entered inside another sampled_params block")
        flats, draw = [], []
        groups = self.param_groups if train else []
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        before = [p.grad for p in trained]
        self._sampled = True
        try:
            for group, flat in self._flat_buckets():
                deviation = self._draw(flat, group, temperature)
                flats.append(flat)  # from here on its mean is put back, whatever happens
                with torch.no_grad():
                    torch._foreach_copy_(flat.params, flat.theta_views)
                draw.append((flat.params, deviation))
            for p in trained:
                p.grad = None
            yield
            if train:
                self._draws.append([(params, [p.grad for p in params], part) for params, part in draw])
                before = [None] * len(trained)
        finally:
            self._sampled = False
            for p, grad in zip(trained, before, strict=True):
                p.grad = grad
            with torch.no_grad():
                for flat in flats:
                    torch._foreach_copy_(flat.params, flat.m_views)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update g, h and m from the blocks since the last step; `p.grad` is then their average gradient ĝ.

        A closure is called `mc_samples` times; it opens `sampled_params(train=True)` itself, as with the
        public implementation, and the mean of what it returns is returned. A parameter that no block gave a
        gradient, or that requires none any more, is left as it is. Raises RuntimeError if there was no block.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = sum(closure() for _ in range(self.mc_samples)) / self.mc_samples
        if not self._draws or self._sampled:
            raise RuntimeError(
                "IVON's step comes after `with optimizer.sampled_params(train=True)`, which has the gradients"
            )
        for group in self.param_groups:
            group["step"] += 1
        for group, flat in self._flat_buckets():
            self._update(flat, group)
        self._draws.clear()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._draws.clear()
        self._flats.clear()

    def __getstate__(self) -> dict:
        """For copying; between steps, when there are no draws to take along."""
        return super().__getstate__() | {"mc_samples": self.mc_samples, "sync": self.sync}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"_sampled": False, "_draws": [], "_flats": {}} | state)

    def sigma(self, param: Tensor) -> Tensor:
        """The posterior standard deviation σ of one parameter, in its shape. ValueError if it is not ours."""
        return self.sigmas([param])[0]

    @torch.no_grad()
    def sigmas(self, params: Collection[Tensor]) -> list[Tensor]:
        """`sigma` of many parameters, computed together."""
        found = {}
        for group, bucket in self._buckets(among=set(params)):
            h = flatten([self._state(p, group)["h"] for p in bucket])
            sigma = posterior_sigma(h, group["ess"], group["weight_decay"])
            found.update(zip(bucket, unflatten(sigma, bucket), strict=True))
        if any(p not in found for p in params):
            raise ValueError("sigma was asked for a tensor that is not a parameter of this optimizer")
        return [found[p] for p in params]

    def _buckets(self, among: Collection[Tensor] | None = None) -> Iterator[tuple[dict, list[Tensor]]]:
        """Each group's parameters, those in `among` or else the trainable ones, split by device and dtype."""
        for group in self.param_groups:
            buckets = defaultdict(list)
            for p in group["params"]:
                if p.requires_grad if among is None else p in among:
                    buckets[p.device, p.dtype].append(p)
            for params in buckets.values():
                yield group, params

    def _state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["g"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            state["h"] = torch.full_like(p, group["hess_init"], memory_format=torch.contiguous_format)
        if state["h"].shape != p.shape:
            raise RuntimeError("a parameter's shape is no longer its state's: load the optimizer's state too")
        return state

    def _flat_buckets(self) -> Iterator[tuple[dict, Flat]]:
        for group, bucket in self._buckets():
            params = [p for p in bucket if p.numel()]  # nothing is left of some
            if not params:
                continue
            key = (id(group), params[0].device, params[0].dtype)
            if key not in self._flats or not self._flats[key].holds(params, [self.state[p] for p in params]):
                self._flats[key] = Flat(params, [self._state(p, group) for p in params])
            yield group, self._flats[key]

    @torch.no_grad()
    def _draw(self, flat: Flat, group: dict, temperature: float) -> Tensor:
        """Note the mean m and a draw θ; returns the deviation θ − m = √τ·σ·ε."""
        torch._foreach_copy_(flat.m_views, flat.params)
        room = flat.spare.pop() if flat.spare else None
        deviation = posterior_sigma(flat.h, group["ess"], group["weight_decay"], out=room)
        deviation.mul_(flat.theta.normal_())
        if temperature != 1:
            deviation.mul_(sqrt(temperature))
        torch.add(flat.m, deviation, out=flat.theta)
        return deviation

    @staticmethod
    def _of(draw: list, flat: Flat) -> tuple[list[Tensor | None], Tensor]:
        """One draw's gradients, None where none was given, and its θ − m, flat."""
        for params, grads, deviation in draw:
            if params is flat.params:
                return grads, deviation
        found = {  # others were trained then
            p: (grad, part)
            for params, grads, deviation in draw
            for p, grad, part in zip(params, grads, unflatten(deviation, params), strict=True)
        }
        grads, parts = zip(*(found.get(p) or (None, torch.zeros_like(p)) for p in flat.params), strict=True)
        return list(grads), flatten(parts)

    def _estimates(
        self, flat: Flat, draws: list[tuple[list[Tensor | None], Tensor]], price: bool
    ) -> tuple[Tensor, Tensor]:
        """ĝ, and ĝ·(θ − m) or ĝ², of some parameters, flat: means over draws and, with `sync`, processes.

        A gradient that was not given counts as 0.
        """
        for i, (grads, deviation) in enumerate(draws):
            given = [torch.zeros_like(p) if g is None else g for p, g in zip(flat.params, grads, strict=True)]
            if i == 0:
                torch._foreach_copy_(flat.theta_views, given)
                g_hat = flat.theta
                product = deviation.mul_(g_hat) if price else g_hat.square()
            else:
                g = flatten(given)
                g_hat.add_(g)
                product.addcmul_(g, deviation if price else g)
        if len(draws) > 1:
            g_hat.div_(len(draws))
            product.div_(len(draws))
        if self.sync and dist.is_initialized():
            both = torch.stack([g_hat, product])
            dist.all_reduce(both)
            g_hat, product = both.div_(dist.get_world_size())
        return g_hat, product

    def _update(self, flat: Flat, group: dict) -> None:
        """One step for some parameters: g, h and m. Source: [S] algorithm 1."""
        delta, beta1, price = group["weight_decay"], group["beta1"], group["hess_approx"] == "price"
        draws = [self._of(draw, flat) for draw in self._draws]
        # Processes that reduce together have to agree on the parameters, whichever got a gradient here.
        given = [] if self.sync else zip(*(grads for grads, _ in draws), strict=True)
        absent = [i for i, g in enumerate(given) if g[0] is None and all(x is None for x in g)]
        untouched = [x for i in absent for x in (flat.params[i], flat.g_views[i], flat.h_views[i])]
        kept = [x.clone() for x in untouched]

        precision = torch.add(flat.h, delta, out=flat.m)
        g_hat, product = self._estimates(flat, draws, price)
        alone = len(draws) == 1 and not self.sync
        grads = draws[0][0] if alone else list(unflatten(g_hat.clone(), flat.params))
        for i in absent:
            grads[i] = None
        flat.g.lerp_(g_hat, 1 - beta1)  # g ← β1 g + (1 − β1) ĝ
        # ĥ = ĝ·(θ − m)/σ², Price's (or Stein's) identity for one draw, with 1/σ² = ess·(h + δ); or ess·ĝ².
        if price:
            excess = torch.addcmul(flat.h, product, precision, value=-group["ess"], out=product)
        else:
            excess = torch.sub(flat.h, product, alpha=group["ess"], out=product)
        update_hessian_(flat.h, excess, precision, group["beta2"])
        precision = torch.add(flat.h, delta, out=excess)
        torch._foreach_copy_(flat.m_views, flat.params)
        bias = 1 - beta1 ** group["step"] if group["debias"] else 1
        alpha = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1)
        xi = group["clip_radius"]
        update_mean_(flat.m, flat.g, precision, delta, bias, alpha, xi, room=flat.theta)
        torch._foreach_copy_(flat.params, flat.m_views)

        if kept:
            torch._foreach_copy_(untouched, kept)
        for p, grad in zip(flat.params, grads, strict=True):
            p.grad = grad
        flat.spare = [deviation for _, deviation in draws]
