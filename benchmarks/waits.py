"""Which operations of a training step wait for the GPU, and where they are called.

    python benchmarks/waits.py --demo --max_steps 120 --output_dir runs/waits        # run_glue.py's flags

Reading losses, evaluating and writing checkpoints have to wait and are not counted; nothing else in a step
should. (PyTorch does not notice every wait.)
"""

import collections
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_glue
from harness.run_folder import Run

updates, after_update, show = Run.updates, Run.after_update, warnings.showwarning
waits: collections.Counter[str] = collections.Counter()


def watched_updates(run: Run) -> Iterator[int]:
    for t in updates(run):
        torch.cuda.set_sync_debug_mode("warn")
        yield t
        torch.cuda.set_sync_debug_mode("default")


def unwatched_after_update(run: Run, *args: object) -> None:
    torch.cuda.set_sync_debug_mode("default")
    after_update(run, *args)
    torch.cuda.set_sync_debug_mode("warn")


def count(message: Warning, *place: object, **options: object) -> None:
    if "called a synchronizing" not in str(message):
        show(message, *place, **options)
    else:
        callers = [f for f in traceback.extract_stack()[-2::-1] if Path(f.filename).name != "warnings.py"]
        waits[" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in callers[:4])] += 1


if __name__ == "__main__":
    Run.updates, Run.after_update = watched_updates, unwatched_after_update
    warnings.simplefilter("always")
    warnings.showwarning = count
    run_glue.main([*sys.argv[1:], "--device", "cuda"])
    for where, n in waits.most_common():
        print(f"{n:6d}  {where}")
