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
from safetensors.torch import load_file

import run_glue
from harness import processes
from harness.run_folder import HERE, checkpoints, load_checkpoint
from harness.settings import Settings, check_device, exit_status
from harness.task import UsageError

SCRIPT = HERE / "run_glue.py"
RUN = ["--task", "cola", "--max_steps", "30", "--eval_every", "10", "--tinit", "5", "--tfinal", "10"]
RUN += ["--delta_t", "2", "--checkpoint_every", "4", "--device", "cpu"]
IVON = ["--optimizer", "ivon", "--score", "mu", "--lr", "5", "--batch_size", "4", "--eval_samples", "2"]
ADAMW = ["--optimizer", "adamw", "--score", "sensitivity", "--lr", "0.01"]
LOOKS = 9  # at the losses: 7 checkpoints and 3 evaluations, once at the same time
MEASURED = ("seconds", "steps_per_second", "peak_memory_mb")

# run_glue.py, and what each process of it has seen; process 1 may get a signal at a step, or into trouble.
WATCHED = """
import json, os, signal, sys, time
import torch
import torch.distributed as dist
import run_glue
from harness import files
from harness.settings import exit_status

rank, folder = int(os.environ["RANK"]), os.environ["WATCHED_FOLDER"]
trouble, trouble_at = os.environ["TROUBLE"], int(os.environ["TROUBLE_AT"])
seen = {"reductions": 0, "written": []}
all_reduce, allocators, append, task_loss = dist.all_reduce, [], files.append, run_glue.task_loss

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
        if t == trouble_at and rank == 1 and trouble.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, trouble))
        if t == trouble_at and rank == 1 and trouble == "torchrun":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)  # it ends sooner
        if t == trouble_at and trouble == "disk":
            files.append = full

def full(path, lines):
    raise OSError(28, "No space left on device", str(path))

def bad(logits, labels):
    return task_loss(logits, labels) * (float("nan") if rank == 1 else 1)

def memory(*args):
    raise torch.OutOfMemoryError

sys.addaudithook(audit)
run_glue.RankAllocator, dist.all_reduce = Allocator, counted
if trouble == "nan":
    run_glue.task_loss = bad
if trouble == "memory" and rank == 1:
    run_glue.task_loss = memory
status = exit_status(run_glue.main, "run_glue.py")
if status or not allocators:
    sys.exit(status)
last = allocators[-1]
params = [p for layer in last.layers.values() for p in (layer.P, layer.lam, layer.Q)]
seen["parameters"] = [p.tolist() for group in last.optimizer.param_groups for p in group["params"]]
sigma = getattr(last.optimizer, "sigma", None)
seen["posterior"] = [sigma(p).tolist() for p in params] if sigma else []
seen["kept"] = [kept.tolist() for kept in last.kept.values()]
with open(f"{os.environ['SEEN']}.{rank}", "w") as file:
    json.dump(seen, file)
"""


def torchrun(script: Path, *flags: object, **environment: object) -> subprocess.CompletedProcess:
    """Two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    return ended([*command, script, *flags], **environment)


def ended(command: list[object], **environment: object) -> subprocess.CompletedProcess:
    environment |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": HERE}
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """What run_glue.py itself says, perhaps behind a bar; torchrun adds a page of its own."""
    return re.findall(r"run_glue\.py: .*", done.stderr)


def assert_no_traceback(done: subprocess.CompletedProcess) -> None:
    """But for torchrun's own, of its processes' exit status."""
    assert "[rank" not in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


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
    data: list[object], folder: Path, *flags: object, trouble: str = "", at: int = 0
) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """A run in `folder`, and what each of its two processes has seen, if they get to the end."""
    script, seen = folder.parent / "watched.py", folder.parent / "seen"
    script.write_text(WATCHED)
    flags = (*RUN, *data, *flags, "--output_dir", folder)
    done = torchrun(script, *flags, WATCHED_FOLDER=folder, SEEN=seen, TROUBLE=trouble, TROUBLE_AT=at)
    paths = [Path(f"{seen}.{rank}") for rank in range(2)] if done.returncode == 0 else []
    return done, [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def whole(
    data: list[object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess, list[dict]]:
    """An uninterrupted run of two processes: its folder, how it ended, and what they have seen."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done, seen = watched(data, folder, *IVON)
    assert done.returncode == 0, done.stderr
    return folder, done, seen


@pytest.fixture
def process_1_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun sets for the second of two processes."""
    started = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (started | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)


# --- one model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_with_adamw_are_one_with_twice_the_batch(data: list[object], tmp_path: Path):
    flags = [*RUN, *data, *ADAMW, "--grad_accum", 2]
    two = torchrun(SCRIPT, *flags, "--batch_size", 4, "--output_dir", tmp_path / "two")
    one = ended([sys.executable, SCRIPT, *flags, "--batch_size", 8, "--output_dir", tmp_path / "one"])
    assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    expected, tensors = (load_file(folder / "adapter/adapter.safetensors") for folder in (one, two))
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=0)
    assert results(one) == results(two)
    assert len(set(results(one)["ranks"].values())) > 1
    for a, b in zip(records(one), records(two), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["parameters", "posterior", "kept"])
def test_two_processes_with_ivon_hold_the_same_to_the_last_bit(what: str, whole: tuple):
    _, _, (first, second) = whole
    assert first[what]
    assert first[what] == second[what]


@pytest.mark.slow
def test_every_process_draws_for_itself(whole: tuple):
    _, _, (first, second) = whole
    assert first["random"] != second["random"]


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_an_update_with_ivon_is_one_all_reduce(whole: tuple, process: int):
    assert whole[2][process]["reductions"] == 30 + LOOKS


@pytest.mark.slow
def test_an_update_with_adamw_is_one_all_reduce_too(data: list[object], tmp_path: Path):
    done, both = watched(data, tmp_path / "run", *ADAMW, "--batch_size", 4)
    assert done.returncode == 0, done.stderr
    assert [seen["reductions"] for seen in both] == [30 + LOOKS] * 2
    assert both[0]["parameters"] == both[1]["parameters"]


@pytest.mark.slow
def test_only_the_first_process_writes_and_speaks(whole: tuple):
    folder, done, (first, second) = whole
    assert first["written"]
    assert second["written"] == []
    assert done.stdout.count("results in") == 1
    assert done.stderr.count("0/30 [00:00<?, ?step/s]") == 1  # its first line
    assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, 31))
    assert json.loads((folder / "config.json").read_text())["processes"] == 2


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 7])
def test_shares_that_are_gathered_are_the_whole_in_its_order(
    n: int, items: int, monkeypatch: pytest.MonkeyPatch
):
    everything = [torch.tensor([float(i)]) for i in range(items)]
    shares = []
    for rank in range(n):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(n))
        shares.append(processes.own_share(everything))
    monkeypatch.setattr(processes, "from_all", lambda mine: shares)
    assert [x.item() for x in processes.gathered(shares[-1])] == list(range(items))


def test_a_missing_gradient_counts_as_0_in_the_average(process_1_of_2, monkeypatch: pytest.MonkeyPatch):
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2))]
    params[0].grad = torch.full((2, 3), 2.0)
    others = torch.tensor([4.0] * 6 + [3.0] * 2)  # the other process has a gradient of both
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(others))
    processes.average_gradients(params)
    torch.testing.assert_close(params[0].grad, torch.full((2, 3), 3.0))
    torch.testing.assert_close(params[1].grad, torch.full((2,), 1.5))


def test_the_papers_length_is_shared_between_the_processes(process_1_of_2, monkeypatch: pytest.MonkeyPatch):
    """The budget's schedule is in updates, and an update takes N times the examples."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    argv = ["--task", "cola", "--batch_size", "8", "--device", "cpu"]
    four = Settings.from_command_line(argv, "").resolve(8551)
    assert four.processes == 4
    assert four.total_steps == 25 * 268  # ⌈8551/32⌉ updates an epoch
    assert (four.tinit, four.tfinal, four.delta_t) == (800, 3500, 10)


# IVON with DistributedDataParallel on a quadratic of curvature 1, at a step of 0; prints the mean of h.
WITH_DDP = """
import contextlib, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ivon import IVON

class Quadratic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(5_000))

    def forward(self):
        return 0.5 * self.theta.square().sum()

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = DistributedDataParallel(Quadratic())
optimizer = IVON(model.parameters(), lr=0.0, ess=1e3, hess_init=1.0, beta2=0.98, weight_decay=0, sync=True)
for _ in range(300):
    with model.no_sync() if sys.argv[1] == "no_sync" else contextlib.nullcontext():
        with optimizer.sampled_params(train=True):
            model().backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(optimizer.state[model.module.theta]["h"].mean().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "h"), [("no_sync", 1.0), ("averaged", 0.5)])
def test_gradients_that_ddp_averages_first_are_a_share_of_the_curvature(how: str, h: float, tmp_path: Path):
    (tmp_path / "with_ddp.py").write_text(WITH_DDP)
    done = torchrun(tmp_path / "with_ddp.py", how)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(h, rel=0.1)


# --- an end before the end ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "told", "kept"),
    [
        ("disk", "run_glue.py: error: {folder}/metrics.jsonl: No space left on device", 12),
        (
            "nan",
            "run_glue.py: the loss is not finite at step 1 (lr 5)",
            None,
        ),
        ("memory", "run_glue.py: error: out of memory: give a smaller --batch_size", None),
    ],
    ids=["disk", "nan", "memory"],
)
def test_trouble_in_one_process_ends_all_and_is_one_line_from_each_that_has_it(
    trouble: str, told: str, kept: int | None, data: list[object], tmp_path: Path
):
    folder = tmp_path / "run"
    done, _ = watched(data, folder, *IVON, trouble=trouble, at=14)
    assert done.returncode != 0
    told = told.format(folder=folder)
    said = errors(done)
    assert_no_traceback(done)
    assert said
    assert len(said) <= (2 if trouble == "nan" else 1)
    assert all(line.startswith(told) for line in said), said
    assert next(iter(checkpoints(folder / "checkpoint").values()), None) == kept


@pytest.mark.slow
def test_a_run_that_signals_end_resumes_from_its_last_checkpoint_to_the_same_end(
    whole: tuple, data: list[object], tmp_path: Path
):
    """To one of the two processes, or, "torchrun", SIGTERM to torchrun, as a scheduler sends it."""
    folder = tmp_path / "run"
    for trouble, at in (("SIGTERM", 10), ("SIGINT", 14), ("SIGKILL", 18), ("torchrun", 22)):
        stopped, _ = watched(data, folder, *IVON, "--resume", trouble=trouble, at=at)
        assert stopped.returncode != 0
        assert not (folder / "results.json").exists()
        assert max(checkpoints(folder / "checkpoint").values()) == at - 2
        first, second = load_checkpoint(folder / "checkpoint")["random"]
        assert not torch.equal(first[0], second[0])  # each process's own generator
    resumed, (first, second) = watched(data, folder, *IVON, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for what in ("parameters", "posterior", "kept"):
        assert first[what] == second[what] == whole[2][0][what]
    assert results(folder) == results(whole[0])
    assert records(folder) == records(whole[0])


@pytest.mark.slow
def test_another_number_of_processes_cannot_resume(whole: tuple, data: list[object]):
    done = ended([sys.executable, SCRIPT, *RUN, *data, *IVON, "--output_dir", whole[0], "--resume"])
    assert done.returncode == 2
    (told,) = errors(done)
    assert "the number of torchrun's processes is 1, but was 2" in told
    assert str(whole[0]) in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--rank", "3"], "--rank"),
        (["--model", "nowhere/at/all"], "does not exist"),
        (["--targets", "nothing.like.it"], "--targets"),
    ],
    ids=["command line", "loading", "model"],
)
def test_a_mistake_is_a_line_from_each_process_that_finds_it(
    flags: list[str], what: str, data: list[object], tmp_path: Path
):
    done = torchrun(
        SCRIPT, "--task", "cola", *data, *flags, "--device", "cpu", "--output_dir", tmp_path / "run"
    )
    told = errors(done)
    assert 1 <= len(told) <= 2
    assert len(set(told)) == 1
    assert what in told[0]
    assert_no_traceback(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten_by_several_processes_either(whole: tuple, data: list[object]):
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    done = torchrun(SCRIPT, *RUN, *data, *IVON, "--output_dir", whole[0])
    assert done.returncode != 0
    assert errors(done)
    assert all("holds a finished run" in line for line in errors(done))
    assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(whole: tuple, data: list[object]):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    done = torchrun(SCRIPT, *RUN, *data, *IVON, "--resume", "--output_dir", whole[0])
    assert done.returncode == 0, done.stderr
    assert errors(done) == []
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before


# --- devices ------------------------------------------------------------------------------------------------


def test_gpus_that_are_not_there_are_named(process_1_of_2, tmp_path: Path, capsys):
    argv = ["--task", "cola", "--device", "cuda", "--output_dir", str(tmp_path / "run")]
    assert exit_status(lambda: run_glue.main(argv), "run_glue.py") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_glue.py: error: --device cuda:1 cannot be used")


def test_a_process_has_the_gpu_of_its_number_on_its_machine(process_1_of_2):
    argv = ["--task", "cola", "--device", "cuda"]
    assert Settings.from_command_line(argv, "").device == "cuda:1"


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_a_numbered_gpu_becomes_the_current_one(
    device: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch
):
    zeros, seen = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    check_device(device)
    assert seen == chosen


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_that_several_processes_cannot_have_is_refused(device: str, process_1_of_2):
    with pytest.raises(UsageError, match=f"--device {device}: with torchrun"):
        Settings.from_command_line(["--task", "cola", "--device", device], "")
