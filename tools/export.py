"""A finished run for other tools: an adapter that PEFT loads, or a plain transformers checkpoint.

    python -m tools.export peft runs/RUN adapter      # PeftModel.from_pretrained(base_model, "adapter")
    python -m tools.export merged runs/RUN model      # AutoModel….from_pretrained("model")

Both have the run's best adapter and an encoder's head. The merged checkpoint also has the tokenizer, and
needs none of this code; a fully fine-tuned run can only be exported as that. `--model` says where the base
model is now.
"""

import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from adalora import HEADS, SVDLinear, in_head
from harness import files
from harness.settings import Parser, Settings, exit_status, task_of
from harness.task import UsageError
from tools.finished import evaluation_settings, load_model, read_run

PEFT_EPSILON = 1e-5  # PEFT divides by rank + this


def write_merged(folder: Path, model: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
    """Merge W + s·PΛQ (or s·BA) into the maps' weights, and save. Changes the model."""
    model.float()  # in bfloat16 the sum would lose the adapter's last digits
    for name, layer in layers.items():
        layer.base.weight.data += layer.delta().detach()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    model.save_pretrained(folder)


def write_peft(folder: Path, model: nn.Module, layers: dict[str, nn.Module], settings: Settings) -> None:
    """adapter_config.json and adapter_model.safetensors, in the form that PEFT saves and loads."""
    r, tensors, pattern = settings.init_rank, {}, {}
    for name, layer in layers.items():
        prefix = f"base_model.model.{name}"
        if isinstance(layer, SVDLinear):
            pattern[f"{name}.lora_E"] = [True] * layer.rank + [False] * (r - layer.rank)
            tensors[f"{prefix}.lora_A"], tensors[f"{prefix}.lora_B"] = layer.Q, layer.P
            tensors[f"{prefix}.lora_E"] = layer.lam.unsqueeze(1) * ((r + PEFT_EPSILON) / max(r, 1))
        else:
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = layer.A, layer.B
    head = {name: p for name, p in model.named_parameters() if in_head(name) and p.requires_grad}
    tensors |= {f"base_model.model.{name}": p for name, p in head.items()}
    modules = {next(part for part in name.split(".") if part in HEADS) for name in head}
    config = {
        "task_type": "CAUSAL_LM" if settings.causal else "SEQ_CLS",
        "base_model_name_or_path": settings.model,
        "target_modules": sorted(layers),
        "modules_to_save": sorted(modules) or None,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout or 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if settings.method == "adalora":
        # PEFT needs a schedule even to load a trained adapter.
        schedule = {"total_step": 1, "tinit": 0, "tfinal": 0}
        config |= {"peft_type": "ADALORA", "init_r": r, "rank_pattern": pattern, **schedule}
    else:
        config |= {"peft_type": "LORA", "r": r}
    files.write_json(folder / "adapter_config.json", config)
    files.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("form", choices=["peft", "merged"])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("folder", type=Path, help="what to write: a new or empty folder")
    parser.add_argument("--model", help="the base model, if it is not where the run had it")
    args = parser.parse_args(argv)
    run = read_run(args.run)
    settings = evaluation_settings(run, device="cpu", model=args.model)
    if args.form == "peft" and settings.method == "full":
        hint = f"python -m tools.export merged {args.run} …"
        raise UsageError(f"{args.run} is fully fine-tuned and has no adapter: {hint}")
    if args.form == "merged" and settings.base_dtype == "int8":
        raise UsageError(f"{args.run} has a base in 8 bit, which cannot be merged: export peft instead")
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UsageError(f"{args.folder} is not an empty folder: give a new one")
    tokenizer, model, layers, _ = load_model(run, settings)
    labels = task_of(settings).labels
    if labels and not settings.causal:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
    elif not labels:
        model.config.problem_type = "regression"
    parent = args.folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{args.folder.name}.", dir=parent) as temporary:
            whole = Path(temporary) / args.folder.name
            whole.mkdir()
            if args.form == "merged":
                write_merged(whole, model, layers)
                tokenizer.save_pretrained(whole)
            else:
                write_peft(whole, model, layers, settings)
            whole.replace(args.folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{args.folder} cannot be written: {error}") from None
    print(args.folder)


if __name__ == "__main__":
    sys.exit(exit_status(main, "tools.export"))
