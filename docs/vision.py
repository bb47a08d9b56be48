# %% [markdown]
# # Beyond text: a vision transformer
#
# A small ViT learns to tell four filled shapes apart. Then the same shapes come as dark outlines, which it
# has never seen. Adapters learn them with all its weights frozen, even the head's; |μ| decides how many
# triplets each map keeps. For comparison, only the head of a copy is trained on outlines.
# Run its cells, or `python docs/vision.py`, in the repository root. It takes half a minute on one core.

# %%
import copy
import sys

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

sys.path.insert(0, f"{sys.path[0]}/..")  # the repository root, if this is a script
sys.path.insert(1, ".")  # and if it is run in cells
from adalora import add_penalty_gradients, inject
from budget import CubicBudget
from harness.metrics import rank_table
from ivon import IVON
from vilora import RankAllocator

torch.manual_seed(0)
torch.set_num_threads(1)  # the fastest for so small a model


# %%
def make_images(n: int, outlines: bool) -> dict[str, Tensor]:
    """16×16 noisy pixels. A shape is the ball of a p-norm: a star, a diamond, a disc, almost a square."""
    labels = torch.randint(4, (n,))
    p = torch.tensor([0.5, 1, 2, 8])[labels].view(n, 1, 1)
    centre, radius = 5.5 + 4 * torch.rand(2, n, 1), 4 + 2 * torch.rand(n, 1)
    y, x = ((torch.arange(16) - centre) / radius).abs()
    norm = (y[:, :, None] ** p + x[:, None, :] ** p) ** (1 / p)
    bright = (norm - 1).abs() > 0.25 if outlines else norm < 1
    return {"pixel_values": (bright + 0.2 * torch.randn(n, 16, 16)).unsqueeze(1), "labels": labels}


def train(model: nn.Module, outlines: bool, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        model(**make_images(64, outlines)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, outlines: bool) -> float:
    images = make_images(2000, outlines)
    return (model(**images).logits.argmax(-1) == images["labels"]).float().mean().item()


# %%
sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
config = ViTConfig(**sizes, image_size=16, patch_size=4, num_channels=1, num_labels=4)  # no dropout
model = ViTForImageClassification(config)
train(model, outlines=False, steps=800, lr=3e-3)
print(f"pre-trained: {accuracy(model, False):.3f} on filled shapes, {accuracy(model, True):.3f} on outlines")
other = copy.deepcopy(model).requires_grad_(False)
other.classifier.requires_grad_(True)
train(other, outlines=True, steps=600, lr=0.1)
print(f"head alone: {accuracy(other, True):.3f} on outlines")

# %% [markdown]
# ## Algorithm 1: from four triplets a map to two on average

# %%
layers = inject(model, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], rank=4, alpha=16)
trained = [p for p in model.parameters() if p.requires_grad]
T, n, lr = 600, len(layers), 2.0
optimizer = IVON(trained, lr, ess=1e5, hess_init=0.1, beta2=0.99, clip_radius=0.05)
budget = CubicBudget(4 * n, 2 * n, total_steps=T, warmup_steps=T // 8, final_steps=T // 3, interval=5)
allocator = RankAllocator(layers, budget, "mu", optimizer)
for t in range(1, T + 1):
    for group in optimizer.param_groups:
        group["lr"] = lr * (T - t + 1) / T
    with optimizer.sampled_params(train=True):
        model(**make_images(64, outlines=True)).loss.backward()
        add_penalty_gradients(layers, 0.1)
    optimizer.step()
    allocator.step(t)
    optimizer.zero_grad()
print(f"adapters: {accuracy(model, True):.3f} on outlines")
print(rank_table(allocator.ranks()))
