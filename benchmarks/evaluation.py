"""How much faster evaluation is than transformers' own model in batches of 8 in the file's order.

    python benchmarks/evaluation.py                                             # the demo's model and data
    python benchmarks/evaluation.py --model path/to/checkpoint --data_dir path/to/glue --task cola
    python benchmarks/evaluation.py --model path/to/checkpoint --data_dir path/to/glue --deberta_v3_base

Prints the seconds of three ways (the median of --repeats, in turns, on an idle machine): that one; the same
batches with DeBERTa's relative positions narrowed (other models have none); and, as a run evaluates, batches
of similar length besides. Then the first one's ratio to the last, and how far their predictions differ.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step_cost import backbone  # noqa: E402

from harness.batches import Split, evaluation_split, tokenize  # noqa: E402
from harness.encoder import load_model, narrow_relative_positions  # noqa: E402
from harness.glue import TASKS, published  # noqa: E402
from harness.prediction import predict  # noqa: E402
from harness.settings import Settings  # noqa: E402


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
    shape = "DeBERTaV3-base's shape with random weights, behind --model's tokenizer"
    parser.add_argument("--deberta_v3_base", action="store_true", help=shape)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    split = task.validation[0]
    data = task.load(args.data_dir, [split])[split]
    tokenizer, model = load_model(Settings(model=args.model), task)
    if args.deberta_v3_base:
        model = backbone(12, "cpu", len(tokenizer), task.outputs)
    narrowed = copy.deepcopy(model)
    narrow_relative_positions(narrowed)
    max_length = published(args.task, "adalora", "ivon")["max_length"]
    features, labels = tokenize(data, task, tokenizer, max_length)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    plain = in_file_order(features, labels, collate, 8)
    ways = {
        "batches of 8 in file order": (model, plain),
        "relative positions narrowed": (narrowed, plain),
        "and batches of 128 of similar length": (narrowed, evaluation_split(features, labels, collate, 128)),
    }
    seconds, predictions = {name: [] for name in ways}, {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            predictions[name] = predict(*way)
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        print(f"{name}: {statistics.median(times):.2f} s")
    first, *_, last = (statistics.median(times) for times in seconds.values())
    one, *_, other = predictions.values()
    print(f"ratio {first / last:.2f}, predictions differ by {(one - other).abs().max():.1e} at most")


if __name__ == "__main__":
    main()
