"""What IVON is doing, from its state: recorded with each evaluation."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def diagnostics(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> dict[str, float]:
    """What the last step was like, and where h and σ are, over all entries of `params` that are trained; {}
    for an optimizer without h.

    To be called before the gradients are cleared: `p.grad` is ĝ. Waits for the device.

    "clipped": share of entries whose step was clipped. "mean_step": mean step over the largest possible.
    "h_05", "h_50", "h_95": quantiles of h/h0. "sigma", "sigma_cv": σ's median, and its deviation over its
    mean. "law": share of h that gradient noise explains, (1 − β2^t)·½(1 − β2)·ess·E[ĝ²] with Price's
    estimator (with S draws in an update, 1/S of that), (1 − β2^t)·ess·E[ĝ²] with `gradsq`
    (docs/method.md); E is over a parameter's entries.
    """
    found, law = defaultdict(list), 0
    wanted = set(params)
    for s in optimizer.param_groups:
        for p in s["params"]:
            state = optimizer.state.get(p, {})
            if p not in wanted or "h" not in state or not p.numel():
                continue
            h, delta, t, beta2 = state["h"], s["weight_decay"], s["step"], s["beta2"]
            g_bar = state["g"] / (1 - s["beta1"] ** t if s["debias"] else 1)
            step = ((g_bar + delta * p) / (h + delta)).abs() / s["clip_radius"]
            price = s["hess_approx"] == "price"
            noise = (1 - beta2**t) * s["ess"] * ((1 - beta2) / 2 / s["mc_samples"] if price else 1)
            law += h.numel() * noise * p.grad.square().mean() / h.mean()
            sigma = (s["ess"] * (h + delta)).rsqrt()
            of_entries = {"step": step.clamp(max=1), "h": h / s["hess_init"], "sigma": sigma}
            for name, values in of_entries.items():
                found[name].append(values.flatten())
    if not found:
        return {}
    step, h, sigma = (torch.cat(found[name]) for name in ("step", "h", "sigma"))
    few = slice(None, None, max(1, len(h) // 1_000_000))  # quantiles of many entries take long
    values = {"clipped": (step == 1).float().mean(), "mean_step": step.mean(), "law": law / len(h)}
    values |= {f"h_{q:02.0f}": h[few].quantile(q / 100) for q in (5, 50, 95)}
    values |= {"sigma": sigma[few].median(), "sigma_cv": sigma.std(correction=0) / sigma.mean()}
    return {name: float(value) for name, value in values.items()}
