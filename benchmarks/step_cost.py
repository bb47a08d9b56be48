"""What a training step costs beyond the frozen backbone's own forward and backward pass.

    python benchmarks/step_cost.py                       # operations, and time on one CPU thread
    python benchmarks/step_cost.py --counts              # operations alone: exact, seconds
    python benchmarks/step_cost.py --peers               # peft and ivon-opt too, each in a process of its own
    python benchmarks/step_cost.py --device cuda --batch 32 --length 256 --bf16
    python benchmarks/step_cost.py --llama --batch 4 --length 32 --peers    # LoRA at Llama-2-7B's layer shape

A model of DeBERTaV3-base's shape (12 layers, 768 wide, six maps a layer) with random weights and adapters of
rank 3. Operations are tensor operations dispatched below autograd, without views and empty allocations. Each
time is taken in turns with the frozen backbone's, the best of the repeats, and given as a ratio to its best.
How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RANK, ALPHA, GAMMA = 3, 32, 0.1
OPTIMIZER_STEPS, PAIRS = 300, 5  # timed steps of IVON in a process; pairs of processes, with --peers
TARGETS = (
    "query_proj",
    "key_proj",
    "value_proj",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LLAMA_TARGETS, LLAMA_RANK, LLAMA_ALPHA = ("q_proj", "v_proj"), 8, 16
LLAMA_ROWS = {
    "ours": ("LoRA + AdamW, whole step", "LoRA + IVON, whole step"),
    "peft": ("peft LoRA + AdamW, whole step", "peft LoRA + ivon-opt, whole step"),
}
NOT_COUNTED = set(
    "view t transpose permute expand slice select unsqueeze squeeze detach as_strided alias _unsafe_view "
    "unbind split split_with_sizes lift_fresh reshape is_same_size empty empty_like new_empty_strided "
    "_to_copy _reshape_alias".split()
)


class Operations(TorchDispatchMode):
    """Counts, for the length of a block, what is dispatched below autograd."""

    def __init__(self):
        super().__init__()
        self.by_name: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.by_name[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(n for name, n in self.by_name.items() if name not in NOT_COUNTED)


def operations(step: Callable[[], object]) -> int:
    """Of one step, after another that makes what is made once."""
    step()
    with Operations() as counted:
        step()
    return counted.total


def backbone(layers: int, device: str, vocabulary: int = 200, classes: int = 2) -> nn.Module:
    """DeBERTaV3-base's shape but for vocabulary and classes, frozen but for the head; in training mode."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=vocabulary, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=512, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0, num_labels=classes,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.DebertaV2ForSequenceClassification(config)
    model.requires_grad_(False)
    unfreeze_head(model)
    return model.train()


def llama(layers: int, width: int, device: str) -> nn.Module:
    """Llama-2-7B's shape, at another `width` in proportion, but for layers and vocabulary; frozen."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=width, intermediate_size=width * 11008 // 4096, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).requires_grad_(False).train()


def unfreeze_head(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if name.startswith(("pooler", "classifier")):
            p.requires_grad_(True)


class Batch:
    """Token ids and labels, and the passes over them that all share; `causal`: those of a language model."""

    def __init__(self, batch: int, length: int, device: str, bf16: bool, causal: bool = False):
        ids = torch.randint(3, 200, (batch, length), device=device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.labels, self.causal = torch.arange(batch, device=device) % 2, causal
        if causal:
            self.inputs["logits_to_keep"] = 1
        self.autocast = torch.autocast(device.split(":")[0], torch.bfloat16) if bf16 else nullcontext()

    def backward(self, model: nn.Module) -> None:
        with self.autocast:
            logits = model(**self.inputs).logits
            logits = logits[:, -1, :2] if self.causal else logits  # two tokens that may come next
            loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()

    def frozen(self, model: nn.Module) -> Callable[[], None]:
        """The backbone's forward and backward pass: the gradient goes down to the embeddings."""
        embeddings = model.model.embed_tokens if self.causal else model.deberta.embeddings
        embeddings.register_forward_hook(lambda _module, _inputs, y: y.requires_grad_())

        def step() -> None:
            self.backward(model)
            model.zero_grad()

        return step


def adapted(args: argparse.Namespace, kind: str = "svd") -> tuple[nn.Module, dict[str, nn.Module]]:
    """The backbone with narrowed positions and fused adapters, and its layers."""
    from adalora import inject
    from fused import fuse
    from harness.encoder import narrow_relative_positions

    model = backbone(args.layers, args.device)
    narrow_relative_positions(model)
    layers = inject(model, TARGETS, RANK, ALPHA, kind=kind)
    fuse(model, layers)
    unfreeze_head(model)
    return model, layers


def training(
    args: argparse.Namespace, batch: Batch, optimizer_name: str, score: str, at: str
) -> Callable[[], None]:
    """A whole step: "between" two allocations, at an "allocation", or "after" the last one."""
    from budget import CubicBudget
    from fused import add_penalty_gradients
    from ivon import IVON
    from vilora import RankAllocator

    model, layers = adapted(args)
    trained, n = [p for p in model.parameters() if p.requires_grad], 6 * args.layers
    ivon = optimizer_name == "IVON"
    optimizer = IVON(trained, 0.1, 8551.0) if ivon else torch.optim.AdamW(trained, fused=True)
    budget = CubicBudget(RANK * n, 2 * n, 10**9, 2, 5 * 10**8, 1 if at == "allocation" else 10**6)
    allocator = RankAllocator(layers, budget, score, optimizer)
    t = 10
    if at == "after":
        batch.backward(model)
        allocator.step(budget.last_allocation)
        t = budget.last_allocation + 1
    forward = torch.compile(model) if args.compile else model

    def step() -> None:
        nonlocal t
        with optimizer.sampled_params(train=True) if ivon else nullcontext():
            batch.backward(forward)
            add_penalty_gradients(layers, GAMMA)
        optimizer.step()
        allocator.step(t)
        optimizer.zero_grad()
        t += 1

    return step


def ours(args: argparse.Namespace) -> dict[str, Callable[[], Callable[[], None]]]:
    """Name of a row → what makes one step of this code."""
    sys.path.insert(0, str(ROOT))
    from fused import add_penalty_gradients
    from harness.encoder import narrow_relative_positions

    batch = Batch(args.batch, args.length, args.device, args.bf16)

    def narrowed() -> Callable[[], None]:
        model = backbone(args.layers, args.device)
        narrow_relative_positions(model)
        return batch.frozen(model)

    def adapters(kind: str) -> Callable[[], None]:
        model, layers = adapted(args, kind)

        def step() -> None:
            batch.backward(model)
            add_penalty_gradients(layers, GAMMA)
            model.zero_grad()

        return step

    rows = {
        "frozen backbone, relative positions narrowed": narrowed,
        "LoRA, forward + backward": partial(adapters, "lora"),
        "AdaLoRA, forward + backward + penalty": partial(adapters, "svd"),
    }
    for name, optimizer, score, at in (
        ("IVON + mu, whole step", "IVON", "mu", "between"),
        ("IVON + mu, whole step that allocates", "IVON", "mu", "allocation"),
        ("IVON + snr, whole step that allocates", "IVON", "snr", "allocation"),
        ("IVON + mu, whole step after the last allocation", "IVON", "mu", "after"),
        ("AdamW + sensitivity, whole step", "AdamW", "sensitivity", "between"),
        ("AdamW + sensitivity, whole step that allocates", "AdamW", "sensitivity", "allocation"),
    ):
        rows[name] = partial(training, args, batch, optimizer, score, at)
    return rows


def peft_rows(args: argparse.Namespace) -> dict[str, Callable[[], Callable[[], None]]]:
    """The same of peft."""
    import peft

    batch = Batch(args.batch, args.length, args.device, args.bf16)

    def adapters(kind: str, allocate: bool = False) -> Callable[[], None]:
        common = {
            "task_type": "SEQ_CLS",
            "target_modules": list(TARGETS),
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
        }
        if kind == "lora":
            config = peft.LoraConfig(r=RANK, **common)
        else:
            schedule = {"total_step": 10**9, "tinit": 2, "tfinal": 5 * 10**8, "deltaT": 10**6}
            config = peft.AdaLoraConfig(init_r=RANK, target_r=2, orth_reg_weight=GAMMA, **schedule, **common)
        model = peft.get_peft_model(backbone(args.layers, args.device), config).train()
        t = 10

        def step() -> None:
            nonlocal t
            with batch.autocast:
                loss = model(**batch.inputs, labels=batch.labels).loss  # AdaLoRA's penalty included
            loss.backward()
            if allocate:
                model.base_model.update_and_allocate(t)
            model.zero_grad()
            t += 1

        return step

    return {
        "peft LoRA, forward + backward": lambda: adapters("lora"),
        "peft AdaLoRA, forward + backward + penalty": lambda: adapters("adalora"),
        "… + update_and_allocate": lambda: adapters("adalora", allocate=True),
    }


def llama_rows(args: argparse.Namespace, which: str) -> dict[str, Callable[[], Callable[[], float]]]:
    """Whole steps of LoRA on a language model: of "ours", or of "peft" with the public IVON."""
    if which == "ours":
        sys.path.insert(0, str(ROOT))
    from ivon import IVON  # this one, or in a process that does not see this folder the public one

    batch = Batch(args.batch, args.length, args.device, args.bf16, causal=True)

    def training(ivon: bool) -> Callable[[], float]:
        model = add_lora(llama(args.layers, args.width, args.device), which)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = IVON(trained, 0.1, 8551.0) if ivon else torch.optim.AdamW(trained, fused=True)
        forward = torch.compile(model) if args.compile else model

        def step() -> float:
            """Returns the seconds of the forward and backward pass."""
            with optimizer.sampled_params(train=True) if ivon else nullcontext():
                of_pass = seconds(partial(batch.backward, forward), args.device)
            optimizer.step()
            optimizer.zero_grad()
            return of_pass

        return step

    return {name: partial(training, "AdamW" not in name) for name in LLAMA_ROWS[which]}


def add_lora(model: nn.Module, which: str) -> nn.Module:
    """The model with fused adapters or with peft's."""
    if which == "ours":
        from adalora import inject
        from fused import fuse

        fuse(model, inject(model, LLAMA_TARGETS, LLAMA_RANK, LLAMA_ALPHA, kind="lora"))
        return model
    import peft

    shape = {"target_modules": list(LLAMA_TARGETS), "r": LLAMA_RANK, "lora_alpha": LLAMA_ALPHA}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **shape))


def optimizer_step(args: argparse.Namespace, which: str) -> Callable[[], None]:
    """IVON's sample, restore and step on the adapters' parameters, which have their gradients already."""
    if which == "ours":
        sys.path.insert(0, str(ROOT))
    from ivon import IVON  # this one, or in a process that does not see this folder the public one

    torch.manual_seed(0)
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    params = [
        nn.Parameter(torch.randn(shape, device=args.device) * 0.02)
        for d_out, d_in in shapes * args.layers
        for shape in ((d_out, RANK), (RANK,), (RANK, d_in))
    ]
    settings = {"hess_init": 1.0, "beta1": 0.9, "beta2": 0.99999, "weight_decay": 1e-8, "clip_radius": 1e-3}
    optimizer = IVON(params, lr=0.4, ess=8551.0, **settings)
    grads = [torch.randn_like(p) * 1e-3 for p in params]

    def step() -> None:
        with optimizer.sampled_params(train=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        optimizer.step()

    return step


# ---- measuring -----------------------------------------------------------------------------------------


def seconds(step: Callable[[], object], device: str) -> float:
    """Of one step: on a GPU between two of its events, else of this process's own time on the CPU."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.process_time()
    step()
    return time.process_time() - began


def compared(step: Callable, reference: Callable, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, and its ratio to a reference that it takes turns with: the best of each.

    For a step that returns the seconds of its forward and backward pass, also those of the rest.
    """
    for _ in range(args.warmup):
        reference()
        step()
    device, passes = args.device, []
    timed = partial(seconds, lambda: passes.append(step()), device)
    pairs = [(seconds(reference, device), timed()) for _ in range(args.repeats)]
    base, own = map(min, zip(*pairs, strict=True))
    row = {"seconds": own, "ratio": own / base}
    if passes[0] is not None:
        row["optimizer"] = min(whole - part for (_, whole), part in zip(pairs, passes, strict=True))
    return row


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def peak_memory(step: Callable, device: str, before: int) -> dict[str, float]:
    """What a step and its model take at most on a GPU, in MB, without what was allocated before they were."""
    if not device.startswith("cuda"):
        return {}
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return {"peak_memory_mb": (torch.cuda.max_memory_allocated(device) - before) / 2**20}


def measure(args: argparse.Namespace, which: str) -> dict[str, dict[str, float]]:
    """Rows of one implementation: "ours", "peft", "ivon-ours" or "ivon-public"."""
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # as run_glue.py has it there
    if which.startswith("ivon"):
        step = optimizer_step(args, which.removeprefix("ivon-"))
        name = "IVON" if which == "ivon-ours" else "ivon-opt"
        row = {"operations": operations(step)}
        if not args.counts:
            row["seconds"] = min(seconds(step, args.device) for _ in range(OPTIMIZER_STEPS))
        return {f"{name}: sample + restore + step": row}
    before = allocated(args.device)
    reference = Batch(args.batch, args.length, args.device, args.bf16, args.llama).frozen(
        llama(args.layers, args.width, args.device) if args.llama else backbone(args.layers, args.device)
    )
    rows = {"frozen backbone, forward + backward": {"operations": operations(reference)}}
    if not args.counts:
        frozen = compared(reference, reference, args) | {"ratio": 1.0}
        frozen |= peak_memory(reference, args.device, before)
        rows["frozen backbone, forward + backward"] |= frozen
    makers = llama_rows(args, which) if args.llama else (ours if which == "ours" else peft_rows)(args)
    for name, make in makers.items():
        if args.rows and not re.search(args.rows, name):
            continue
        before = allocated(args.device)
        step = make()
        compiled, row = args.compile and "whole step" in name, {}
        if not compiled:  # a compiled graph is not dispatched operation by operation
            row["operations"] = operations(step)
        if not args.counts:
            row |= compared(step, reference, args) | peak_memory(step, args.device, before)
        rows[f"{name}, compiled" if compiled else name] = row
        del step
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    head = {
        "operations": "operations",
        "seconds": "ms",
        "ratio": "ratio to frozen",
        "optimizer": "optimizer's part, ms",
        "peak_memory_mb": "peak MB",
    }
    columns = [key for key in head if any(key in row for row in rows.values())]
    lines = ["|  | " + " | ".join(head[key] for key in columns) + " |", "| --- |" + " --- |" * len(columns)]
    write = {
        "operations": "{:,.0f}".format,
        "seconds": lambda s: f"{1000 * s:,.2f}",
        "ratio": "{:.3f}".format,
        "optimizer": lambda s: f"{1000 * s:,.2f}",
        "peak_memory_mb": "{:,.0f}".format,
    }
    for name, row in rows.items():
        cells = (write[key](row[key]) if key in row else "" for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overheads(rows: dict[str, dict[str, float]]) -> Iterator[str]:
    """How much more of a step IVON takes than AdamW."""
    for adamw, ivon in LLAMA_ROWS.values():
        if adamw in rows and ivon in rows:
            share = (rows[ivon]["optimizer"] - rows[adamw]["optimizer"]) / rows[adamw]["seconds"]
            yield f"{ivon}: its optimizer takes {share:.3%} of AdamW's step longer"


def in_a_process(which: str) -> dict[str, dict[str, float]]:
    # Of its own: peft sees this code no more than this code sees peft, and two modules are called ivon.
    command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{which}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, help="12; 2 with --llama")
    parser.add_argument("--llama", action="store_true", help="LoRA at Llama-2-7B's layer shape instead")
    parser.add_argument("--width", type=int, default=4096, help="of --llama; the operations are the same")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--bf16", action="store_true", help="autocast on the backbone")
    parser.add_argument("--compile", action="store_true", help="whole steps with torch.compile")
    parser.add_argument("--counts", action="store_true", help="operations alone")
    parser.add_argument("--rows", metavar="REGEX", help="only these of the steps")
    parser.add_argument("--peers", action="store_true", help="peft and ivon-opt as well")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # of a process of its own: its rows as JSON
    args = parser.parse_args()
    args.layers = args.layers or (2 if args.llama else 12)
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return
    rows, ratios = in_a_process("ours"), []
    if not args.llama:
        rows |= in_a_process("ivon-ours")
    if args.peers:
        peft = in_a_process("peft")
        rows |= {f"{name} (peft's process)" if name in rows else name: row for name, row in peft.items()}
    if args.peers and not args.llama:
        for _ in range(1 if args.counts else PAIRS):
            one, other = in_a_process("ivon-ours"), in_a_process("ivon-public")
            rows |= one | other
            times = [row.get("seconds", 1) for pair in (one, other) for row in pair.values()]
            ratios.append(times[0] / times[1])
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.machine()
    precision = "bf16" if args.bf16 else "float32"
    size, threads = f"batch {args.batch} × {args.length}", f"{args.threads} thread(s)"
    print(f"{where}, {threads}, {size}, {precision}, torch {torch.__version__}\n")
    print(table(rows))
    if ratios and not args.counts:
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        spread = f"{least:.2f} to {most:.2f} in {PAIRS} pairs of processes"
        print(f"\nIVON's time over ivon-opt's: {middle:.2f} ({spread})")
    if args.llama and not args.counts:
        print("", *overheads(rows), sep="\n")


if __name__ == "__main__":
    main()
