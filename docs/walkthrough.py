# %% [markdown]
# # From σ to scores to pruning, on one toy map
#
# The target is a rank-2 matrix. An adapter of rank 6 learns it with IVON, whose posterior has a σ for
# each entry; the scores turn μ and σ into one number per triplet, and the budget removes four of the six.
# Run its cells, or `python docs/walkthrough.py [FOLDER]`, in the repository root. As a script it writes two
# pictures to the folder (default: docs).

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, f"{sys.path[0]}/..")  # the repository root, if this is a script
sys.path.insert(1, ".")  # and if it is run in cells
from adalora import add_penalty_gradients, inject
from budget import CubicBudget
from ivon import IVON
from scores import SCORES
from vilora import RankAllocator

script, *folder = sys.argv
pictures = Path(*folder) if folder and script.endswith("walkthrough.py") else Path("docs")
torch.manual_seed(0)

# %% [markdown]
# ## A map, a target, an adapter
# `inject` freezes the map W and puts W + s·PΛQ in its place. λ starts at 0: nothing has changed yet.

# %%
d, rank, keep, T = 24, 6, 2, 1500
target = torch.randn(d, 2) @ torch.randn(2, d) / d
model = nn.Sequential(nn.Linear(d, d, bias=False))
nn.init.zeros_(model[0].weight)
layers = inject(model, ["0"], rank=rank, alpha=rank)
layer = layers["0"]
print("what a fresh adapter adds:", layer.delta().abs().max().item())

# %% [markdown]
# ## The posterior
# Before training σ = 1/√(ess·(h0 + δ)) for every entry. `sampled_params` replaces the parameters with a draw,
# then restores the mean, bit for bit.

# %%
params = [p for p in model.parameters() if p.requires_grad]
optimizer = IVON(params, lr=0.2, ess=1e5, hess_init=0.1, beta2=0.99, weight_decay=1e-6, clip_radius=0.1)
mean = layer.Q.detach().clone()
print("σ at the start:", optimizer.sigma(layer.Q).unique().item(), "=", (1e5 * (0.1 + 1e-6)) ** -0.5)
with optimizer.sampled_params():
    print("standard deviation of a draw:", (layer.Q - mean).std().item())
print("the mean is back:", torch.equal(layer.Q, mean))

# %% [markdown]
# ## Algorithm 1
# The budget falls from 6 triplets to 2. At each allocation the triplets with the lowest scores have λ set to
# 0; until the last allocation they can come back.

# %%
budget = CubicBudget(rank, keep, total_steps=T, warmup_steps=300, final_steps=500, interval=50)
allocator = RankAllocator(layers, budget, "snr", optimizer)
history, ranks = [], []
for t in range(1, T + 1):
    x = torch.randn(64, d)
    with optimizer.sampled_params(train=True):
        loss = (model(x) - x @ target.T).square().mean()
        loss.backward()
        add_penalty_gradients(layers, 0.01)
    optimizer.step()
    if t == budget.last_allocation:
        scores = allocator.scores([name for name in SCORES if SCORES[name].needs in ("nothing", "sigma")])
        sigma = {name: optimizer.sigma(getattr(layer, name)).flatten() for name in ("P", "lam", "Q")}
    if layer.rank == rank:
        history.append(layer.lam.detach().abs().clone())
    allocator.step(t)
    optimizer.zero_grad()
    ranks.append(allocator.ranks()["0"])
error = (layer.delta() - target).norm() / target.norm()
print(f"kept {layer.rank} of {rank} triplets; relative error of the map {error.item():.3f}")

# %% [markdown]
# ## What the scores say
# Just before the last allocation: two triplets carry the map, the other four do not.

# %%
for name, S in scores.items():
    print(f"{name:>10}", " ".join(f"{x:9.3f}" for x in S))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].plot(torch.stack(history))
axes[0].set(xlabel="update", ylabel="abs(λ), each triplet", title="six singular values")
axes[1].step(range(1, T + 1), ranks)
axes[1].step(range(1, T + 1), [budget(t) for t in range(1, T + 1)], linestyle=":")
axes[1].set(xlabel="update", ylabel="triplets", title="kept, and the budget b(t)")
figure.savefig(pictures / "walkthrough-budget.png", dpi=110)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for name, values in sigma.items():
    axes[0].hist(values.log10(), bins=30, alpha=0.6, label={"lam": "λ"}.get(name, name))
axes[0].set(xlabel="log10 σ", ylabel="entries", title="σ of the entries of P, λ and Q")
axes[0].legend()
for name, S in scores.items():
    axes[1].plot(S / S.max(), marker="o", label=name)
axes[1].set(xlabel="triplet", ylabel="score / the highest", title="scores of the six triplets")
axes[1].legend(fontsize=7)
figure.savefig(pictures / "walkthrough-scores.png", dpi=110)
