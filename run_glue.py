"""Fine-tune a model with low-rank adapters whose ranks are decided in training, by scores from a posterior.

    python run_glue.py --demo                                           # bundled model and data, a minute
    python run_glue.py --task cola --optimizer ivon --score mu          # the paper's setting, from the Hub
    python run_glue.py --task cola --optimizer adamw --score sensitivity      # AdaLoRA's optimizer and score
    python run_glue.py --task rte --model path/to/checkpoint --data_dir path/to/glue       # local folders
    python run_glue.py --train_file train.csv --validation_file dev.csv       # data of your own
    python run_glue.py --task boolq --method lora --optimizer ivon           # a causal language model
    python run_glue.py --task cola --optimizer ivon --score mu --resume       # continue this run
    torchrun --nproc_per_node 2 run_glue.py --task cola --optimizer ivon --score mu     # on two GPUs

Flags that are not given take the papers' values for the task (harness/glue.py, harness/choice.py). What a run
leaves behind, and what to do with it: docs/running.md.

Exit status: 0 done; 2 a usage or input error; 3 something was not finite; 130 interrupted, 143 terminated (a
checkpoint is kept).
"""

import os
import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

import adalora
import fused
from budget import CubicBudget
from harness import encoder, prediction, processes, run_folder
from harness.batches import Batches, Split, evaluation_split, tokenize
from harness.diagnostics import diagnostics
from harness.metrics import rank_table
from harness.settings import Settings, check_device, exit_status, learning_rate, task_of
from ivon import IVON
from vilora import FixedRanks, RankAllocator


def train(settings: Settings) -> None:
    # Load
    task = task_of(settings)
    data = task.load(settings.data_dir, ("train", *task.validation))
    torch.manual_seed(settings.seed)
    tokenizer, model = encoder.load_model(settings, task)
    settings = settings.resolve(len(data["train"]), encoder.default_targets(model), encoder.is_causal(model))

    # Inject W + s·PΛQ
    layers = encoder.adapt(model, tokenizer, settings)  # {} with --method full
    model.train()
    optimizer = make_optimizer(model, settings)
    allocator = make_allocator(layers, optimizer, settings)
    sampled = getattr(optimizer, "sampled_params", no_posterior)
    add_penalty_gradients = adalora.add_penalty_gradients
    if not settings.plain:
        fused.fuse(model, layers)
        add_penalty_gradients = fused.add_penalty_gradients
    forward = torch.compile(model) if settings.compile else model

    # Begin, or resume
    batches, splits = batches_of(data, tokenizer, settings)
    longest = [split.batches[-1] for split in splits.values()]
    encoder.check_forward_backward(model, settings.model, batches.longest(), longest)
    adapted = [p for layer in layers.values() for p in layer.parameters()] or list(model.parameters())

    def evaluate() -> tuple[dict[str, dict], dict[str, Tensor], dict[str, float]]:
        sigma = prediction.sigma_by_name(model, optimizer)
        return prediction.evaluate(model, splits, settings, sigma), sigma, diagnostics(optimizer, adapted)

    objects = {"optimizer": optimizer, "allocator": allocator}
    checksums = {"encoder": run_folder.fingerprint(model), "data": batches.checksum(splits.values())}
    adapter_parameters = encoder.count_parameters(model)
    with run_folder.Run(settings, model, objects, evaluate, checksums) as run:
        if run.finished:
            if run.first:
                print(f"the run in {settings.output_dir} is finished")
            return

        # [C] Algorithm 1 (Chen and Garner; line by line in docs/method.md)
        for t in run.updates():
            lr = learning_rate(t, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=model.device)
            for _ in range(settings.mc_samples):
                with sampled(train=True):  # θ ~ N(μ, σ²)
                    for inputs, labels, share in batches.of_update(t):
                        micro_loss = share * task_loss(forward(**inputs).logits, labels)
                        micro_loss.backward()
                        loss += micro_loss.detach() / settings.mc_samples
                    add_penalty_gradients(layers, settings.orth, settings.squared_orth)  # γ R(P, Q)
            optimizer.step()  # μ, σ
            allocator.step(t)  # the b(t) best triplets stay
            run.after_update(t, loss, lr, allocator.budget(t), allocator.tracked)
            optimizer.zero_grad()

        budget = allocator.budget(0), allocator.budget(settings.total_steps)
        parameters = adapter_parameters, encoder.count_parameters(model)
        report(run.finish(allocator.ranks(), budget, parameters), settings)


def batches_of(
    data: dict, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> tuple[Batches, dict[str, Split]]:
    """Sentences or prompts as token ids: to train on, and to evaluate on by split."""
    task, collate = task_of(settings), DataCollatorWithPadding(tokenizer)
    how = tokenizer, settings.max_length, settings.causal
    tokens = {name: tokenize(data[name], task, *how) for name in data}
    splits = {
        name: evaluation_split(*tokens[name], collate, settings.eval_batch_size) for name in task.validation
    }
    return Batches(*tokens["train"], collate, settings), splits


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, or for regression the mean squared error of the one output."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(-1), labels)
    return F.cross_entropy(logits.float(), labels)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "ivon":
        names = ("lr", "ess", "hess_init", "beta2", "weight_decay", "mc_samples", "clip_radius", "rescale_lr")
        ivon = {name: getattr(settings, name) for name in names}
        return IVON(params, **ivon, sync=settings.processes > 1)
    optimizer = torch.optim.AdamW(params, settings.lr, weight_decay=settings.weight_decay, fused=True)
    if settings.processes > 1:
        optimizer.register_step_pre_hook(lambda *_: processes.average_gradients(params))
    return optimizer


def make_allocator(
    layers: dict[str, nn.Module], optimizer: torch.optim.Optimizer, settings: Settings
) -> RankAllocator | FixedRanks:
    s, n = settings, len(layers)
    if s.method != "adalora":
        return FixedRanks(layers)
    triplets = s.init_rank * n, round(s.target_rank * n)
    budget = CubicBudget(*triplets, s.total_steps, s.tinit, s.tfinal, s.delta_t)
    return RankAllocator(layers, budget, s.score, optimizer, track=s.track_scores)


def no_posterior(train: bool) -> nullcontext:
    """`sampled_params` of an optimizer without a posterior: θ = μ."""
    return nullcontext()


def report(results: dict, settings: Settings) -> None:
    if processes.rank():
        return
    best, metric, budget = results["best"], results["metric"], results["budget"]
    print(f"best {metric} {best[metric]:.4f} at step {best['step']}, last {results['last'][metric]:.4f}")
    if settings.method == "adalora":
        print(f"kept {budget['kept']} of {budget['b0']} triplets; rank of each adapter:")
        print(rank_table(results["ranks"]))
    print(f"results in {settings.output_dir}")


def main(argv: list[str] | None = None) -> None:
    settings = Settings.from_command_line(argv, __doc__)
    run_folder.check_output_dir(settings)
    check_device(settings.device)
    with processes.joined(settings.device):
        train(settings)


if __name__ == "__main__":
    sys.exit(exit_status(main, os.path.basename(__file__)))
