"""Several processes train one model: as one with the whole batch, the same in all of them, written by one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_glue

import processes
from glue import TASKS
from run_glue import UsageError, check_device, parse_args, plan

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "run_glue.py"
RUN = ["--task", "cola", "--max_steps", "30", "--eval_every", "10", "--tinit", "5", "--tfinal", "10"]
RUN += ["--delta_t", "2", "--keep_checkpoint"]
IVON = ["--optimizer", "ivon", "--score", "mu", "--lr", "5", "--batch_size", "4"]
MEASURED = ("seconds", "steps_per_second", "peak_memory_mb")

# run_glue.py, and what each process of it has seen. Process 1 may get a signal at a step.
WATCHED = """
import json, os, signal, sys
import torch
import torch.distributed as dist
import run_glue

rank, folder = int(os.environ["RANK"]), os.environ["WATCHED_FOLDER"]
seen = {"reductions": 0, "written": []}
all_reduce, allocators = dist.all_reduce, []

def counted(*args, **kwargs):
    seen["reductions"] += 1
    return all_reduce(*args, **kwargs)

def audit(event, args):
    if event == "open" and str(args[0]).startswith(folder) and set(args[1] or "") & set("wa+x"):
        seen["written"].append(str(args[0]))

class Allocator(run_glue.RankAllocator):
    def step(self, t):
        allocators.append(self)
        super().step(t)
        if t == 3:
            seen["random"] = torch.get_rng_state().tolist()
        if (t, rank) == (int(os.environ["SIGNAL_AT"]), 1):
            os.kill(os.getpid(), signal.SIGTERM)

append, task_loss = run_glue.append, run_glue.task_loss

def full(path, text):
    if path.exists():
        raise OSError(28, "No space left on device", str(path))
    append(path, text)

def bad(logits, labels):
    return task_loss(logits, labels) * (float("nan") if rank == 1 else 1)

def memory(*args):
    raise torch.OutOfMemoryError

sys.addaudithook(audit)
run_glue.RankAllocator, dist.all_reduce = Allocator, counted
trouble = os.environ["TROUBLE"]
if trouble == "disk":
    run_glue.append = full
if trouble == "nan":
    run_glue.task_loss = bad
if trouble == "memory" and rank == 1:
    run_glue.task_loss = memory
status = run_glue.main(sys.argv[1:])
if status or not allocators:
    sys.exit(status)
last = allocators[-1]
params = [p for layer in last.layers.values() for p in (layer.P, layer.lam, layer.Q)]
seen["parameters"] = [p.tolist() for p in params]
sigmas = getattr(last.optimizer, "sigmas", lambda params: [])
seen["posterior"] = [sigma.tolist() for sigma in sigmas(params)]
seen["kept"] = [kept.tolist() for kept in last.kept.values()]
with open(f"{os.environ['SEEN']}.{rank}", "w") as file:
    json.dump(seen, file)
sys.exit(status)
"""


def torchrun(script: Path, *flags: object, **environment: object) -> subprocess.CompletedProcess:
    """Two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    return finished([*command, script, *flags], **environment)


def finished(command: list[object], **environment: object) -> subprocess.CompletedProcess:
    environment |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": REPO}
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """What run_glue.py itself says, perhaps behind a bar; torchrun adds a page of its own."""
    return re.findall(r"run_glue\.py: .*", done.stderr)


def last_checkpoint(folder: Path) -> dict:
    path = max((folder / "checkpoint").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    return torch.load(path, weights_only=True)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder: Path) -> dict:
    content = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in content.items() if name not in MEASURED}


@pytest.fixture(scope="module")
def data(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A model without dropout, and 65 examples: of the last batch of an epoch a process has nothing."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(bert, folder / "bert")
    config = json.loads((folder / "bert/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "bert/config.json").write_text(json.dumps(config))
    return ["--model", folder / "bert", "--data_dir", write_glue(folder / "glue", "cola", train=65, dev=21)]


def watched(
    data: list[object], folder: Path, *flags: object, signal_at: int = 0, trouble: str = ""
) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """A run in `folder`, and what each of its two processes has seen, if they get to the end."""
    script, seen = folder.parent / "watched.py", folder.parent / "seen"
    script.write_text(WATCHED)
    flags = (*RUN, *data, *flags, "--output_dir", folder)
    done = torchrun(script, *flags, WATCHED_FOLDER=folder, SIGNAL_AT=signal_at, SEEN=seen, TROUBLE=trouble)
    paths = [Path(f"{seen}.{rank}") for rank in range(2)] if done.returncode == 0 else []
    return done, [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def whole(
    data: list[object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess, list[dict]]:
    """An uninterrupted run of two processes: its folder, how it ended, and what they have seen."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, *watched(data, folder, *IVON)


def test_two_processes_with_adamw_are_one_with_twice_the_batch(data: list[object], tmp_path: Path):
    flags = [*RUN, *data, "--optimizer", "adamw", "--score", "sensitivity", "--lr", "0.01", "--grad_accum", 2]
    two = torchrun(SCRIPT, *flags, "--batch_size", 4, "--output_dir", tmp_path / "two")
    one = finished([sys.executable, SCRIPT, *flags, "--batch_size", 8, "--output_dir", tmp_path / "one"])
    assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    start, end = (last_checkpoint(folder)["model"] for folder in (one, two))
    assert start.keys() == end.keys()
    for name, tensor in start.items():
        torch.testing.assert_close(end[name], tensor, atol=1e-5, rtol=0)
    assert results(one) == results(two)
    assert len(set(results(one)["ranks"].values())) > 1
    for a, b in zip(records(one), records(two), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_two_processes_with_ivon_hold_the_same_parameters_posterior_and_pattern(whole: tuple):
    _, done, (first, second) = whole
    assert done.returncode == 0, done.stderr
    for what in ("parameters", "posterior", "kept"):
        assert first[what] == second[what]


def test_every_process_draws_for_itself(whole: tuple):
    _, _, (first, second) = whole
    assert first["random"] != second["random"]


@pytest.mark.parametrize("process", [0, 1])
def test_an_update_is_one_all_reduce(whole: tuple, process: int):
    looks_at_the_losses = 3  # at the evaluations
    assert whole[2][process]["reductions"] == 30 + looks_at_the_losses


def test_an_update_with_adamw_is_one_all_reduce_too(data: list[object], tmp_path: Path):
    adamw = ["--optimizer", "adamw", "--score", "sensitivity", "--lr", "0.01", "--batch_size", "4"]
    done, both = watched(data, tmp_path / "run", *adamw)
    assert done.returncode == 0, done.stderr
    assert [seen["reductions"] for seen in both] == [30 + 3] * 2
    assert both[0]["parameters"] == both[1]["parameters"]


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("disk", ["run_glue.py: error: {folder}/metrics.jsonl: No space left on device"]),
        (
            "nan",
            ["run_glue.py: stopped: the loss is not finite at step 1 (lr 5); the checkpoint of step 0"],
        ),
        ("memory", ["run_glue.py: error: out of memory in process 1", "run_glue.py: process 0 ends"]),
    ],
)
def test_trouble_in_one_process_ends_all_and_is_told_in_a_line(
    trouble: str, told: list[str], data: list[object], tmp_path: Path
):
    done, _ = watched(data, tmp_path / "run", *IVON, trouble=trouble)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
    assert "[rank" not in done.stderr
    said = errors(done)
    assert 1 <= len(said) <= len(told)
    for line, start in zip(sorted(said), told, strict=False):
        assert line.startswith(start.format(folder=tmp_path / "run"))


def test_a_view_of_a_vector_travels_alone():
    """IVON's state are views of flat vectors: a checkpoint of it has to stay as large as it is."""
    flat = torch.zeros(100_000)
    state = {i: flat[i * 1000 : (i + 1) * 1000] for i in range(100)}
    sent = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "count", lambda: 2)
        patch.setattr(processes, "from_all", lambda mine: [mine, mine])
        patch.setattr(processes.dist, "broadcast_object_list", sent.extend)
        received = processes.from_first(lambda: state)
    assert len(sent[0]) < 2 * 4 * flat.numel()
    assert received.keys() == state.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_are_named_once(data: list[object], tmp_path: Path):
    flags = [*RUN, *data, *IVON, "--device", "cuda", "--output_dir", tmp_path / "run"]
    told = errors(torchrun(SCRIPT, *flags))
    assert told == ["run_glue.py: error: --device cuda: there is no GPU, or no NCCL, here"]


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_a_numbered_gpu_becomes_the_current_one(
    device: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch
):
    zeros, seen = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    check_device(parse_args(["--task", "cola", "--device", device]))
    assert seen == chosen


def test_only_the_first_process_writes_and_speaks(whole: tuple):
    folder, done, (first, second) = whole
    assert first["written"]
    assert second["written"] == []
    assert done.stdout.count("results in") == 1
    assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, 31))
    assert json.loads((folder / "config.json").read_text())["processes"] == 2


def test_a_run_of_two_processes_that_one_signal_stopped_goes_on_to_the_same_end(
    whole: tuple, data: list[object], tmp_path: Path
):
    folder = tmp_path / "run"
    stopped, _ = watched(data, folder, *IVON, signal_at=14)
    assert errors(stopped) == ["run_glue.py: SIGTERM after step 20; --resume goes on from there"]
    resumed, (first, second) = watched(data, folder, *IVON, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert first["parameters"] == second["parameters"] == whole[2][0]["parameters"]
    assert first["posterior"] == whole[2][0]["posterior"]
    assert results(folder) == results(whole[0])
    assert records(folder) == records(whole[0])


def test_another_number_of_processes_cannot_go_on(whole: tuple, data: list[object]):
    flags = [*RUN, *data, *IVON, "--output_dir", whole[0], "--resume"]
    done = finished([sys.executable, SCRIPT, *flags])
    assert done.returncode == 2
    assert "1 process(es) of torchrun" in done.stderr
    assert "had 2" in done.stderr


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--rank", "3"], "--rank"),
        (["--model", "nowhere/at/all"], "does not exist"),
    ],
    ids=["command line", "loading"],
)
def test_a_mistake_is_told_once_however_many_processes_find_it(
    flags: list[str], what: str, data: list[object], tmp_path: Path
):
    done = torchrun(SCRIPT, "--task", "cola", *data, *flags, "--output_dir", tmp_path / "run")
    told = errors(done)
    assert len(told) == 1
    assert what in told[0]
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_written_over_by_several_processes_either(whole: tuple, data: list[object]):
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    done = torchrun(SCRIPT, *RUN, *data, *IVON, "--output_dir", whole[0])
    assert len(errors(done)) == 1
    assert "holds a finished run" in errors(done)[0]
    assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--task", "cola", "--device", "cuda:1"], "--device cuda:1: with torchrun"),
        (["--task", "cola", "--device", "mps"], "--device mps: with torchrun"),
        (["--eval_only", "runs/x"], "--eval_only runs in one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    argv: list[str], what: str, monkeypatch: pytest.MonkeyPatch
):
    started = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (started | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=what):
        parse_args(argv)


def test_the_papers_length_is_shared_between_the_processes(monkeypatch: pytest.MonkeyPatch):
    """The budget's schedule is in updates, and an update takes N times the examples."""
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}
    for name, value in (started | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    four = parse_args(["--task", "cola", "--batch_size", "8"])
    plan(four, TASKS["cola"], 8551, modules=72)
    assert four.total_steps == 25 * 268  # ⌈8551/32⌉ updates an epoch
    assert (four.tinit, four.tfinal, four.delta_t) == (800, 3500, 10)
