"""How much faster evaluation is in batches of like length than in batches of 8 in the file's order.

    python benchmarks/evaluation.py                                             # the demo's model and data
    python benchmarks/evaluation.py --model path/to/checkpoint --data_dir path/to/glue --task cola

Prints seconds of both (the median of --repeats, in turns, on an idle machine), their ratio, and the
largest difference between their predictions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from glue import TASKS, load_task  # noqa: E402
from posterior import Split, batched, predict  # noqa: E402
from run_glue import load_model  # noqa: E402
from tokens import tokenize  # noqa: E402


def in_file_order(features: list[dict], labels: torch.Tensor, collate, size: int) -> Split:
    """The plain way: batches as the examples come."""
    batches = [collate(features[i : i + size]) for i in range(0, len(features), size)]
    return Split(batches, torch.arange(len(features)), labels)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--task", choices=TASKS, default="cola")
    parser.add_argument("--model", default=str(ROOT / "demo/model"))
    parser.add_argument("--data_dir", type=Path, default=ROOT / "demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = TASKS[args.task]
    split = task.validation[0]
    data = load_task(args.task, args.data_dir, [split])[split]
    tokenizer, model = load_model(args.model, len(task.labels) or 1)
    features, labels = tokenize(data, task, tokenizer, task.settings.max_length)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    splits = {
        "batches of 8 in file order": in_file_order(features, labels, collate, 8),
        "batches of 128 of like length": batched(features, labels, collate, 128),
    }
    seconds, predictions = {name: [] for name in splits}, {}
    for _ in range(args.repeats):
        for name, each in splits.items():
            began = time.perf_counter()
            predictions[name] = predict(model, each)
            seconds[name].append(time.perf_counter() - began)
    slow, fast = (statistics.median(times) for times in seconds.values())
    one, other = predictions.values()
    for name, times in seconds.items():
        print(f"{name}: {statistics.median(times):.2f} s")
    print(f"ratio {slow / fast:.2f}, predictions differ by {(one - other).abs().max():.1e} at most")


if __name__ == "__main__":
    main()
