"""A run that stops, by whatever cause, goes on as if it had not; and what cannot go on says so."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_glue
from safetensors.torch import load_file, save_file

import checkpoint
import run_glue
from adalora import inject
from budget import CubicBudget
from checkpoint import (
    checkpoints,
    claimed,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
    write_whole,
)
from run_glue import HERE, main
from vilora import RankAllocator

KILLS = int(os.environ.get("KILLS", "3"))  # 20 in the test of record
STEPS = 24
OF_THE_PROCESS = ("seconds", "steps_per_second", "peak_memory_mb")
# t_i = 2 and T − t_f = 12, of 24 updates; a checkpoint every 4, an evaluation every 8.
RUNS = {
    "ivon mu": [],
    "ivon sensitivity": ["--score", "sensitivity", "--track_scores", "--group_by_length"],
    "ivon snr": ["--score", "snr", "--mc_samples", "2", "--grad_accum", "2", "--eval_samples", "2"],
    "adamw sensitivity": ["--optimizer", "adamw", "--score", "sensitivity", "--track_scores"],
    "lora": ["--method", "lora", "--optimizer", "adamw"],
    "full": ["--method", "full"],
    "head alone": ["--target_rank", "0"],
}  # fmt: skip


@pytest.fixture
def command(bert: Path, tmp_path: Path) -> Callable[..., list[str]]:
    data = write_glue(tmp_path / "glue", "cola")
    shape = ["--max_steps", str(STEPS), "--eval_every", "8", "--checkpoint_every", "4", "--batch_size", "8"]

    def make(name: str, *more: str) -> list[str]:
        where = ["--model", str(bert), "--data_dir", str(data), "--output_dir", str(tmp_path / name)]
        return ["--task", "cola", *where, *shape, "--max_length", "16", "--device", "cpu", *more]

    return make


def left_by(folder: Path) -> dict[str, object]:
    """All that a finished run leaves, but for times."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    contents: dict[str, object] = {str(path): (folder / path).read_bytes() for path in files}
    results = json.loads(contents["results.json"])
    contents["results.json"] = {key: value for key, value in results.items() if key not in OF_THE_PROCESS}
    del contents["config.json"]  # says whether it was resumed
    return contents


def signal_at(step: int, signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal during one update; later ones, of a resumed run, are left alone."""
    rate, sent = run_glue.learning_rate, []

    def learning_rate(t: int, *args: float) -> float:
        if t == step - 1 and not sent:
            sent.append(t)
            os.kill(os.getpid(), signum)
        return rate(t, *args)

    monkeypatch.setattr(run_glue, "learning_rate", learning_rate)


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr, but for the progress bar's."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run_glue.py")]
    assert len(lines) == 1, lines
    return lines[0]


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", RUNS)
def test_a_run_stopped_at_any_stage_goes_on_bit_for_bit(
    settings: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = RUNS[settings]
    assert main(command("whole", *more)) == 0
    for step in (1, 7, 12, 17):  # before pruning, in it, at its end (t = T − t_f), after it
        with monkeypatch.context() as patch:
            signal_at(step, signal.SIGTERM, patch)
            assert main(command("parts", *more, *(["--resume"] if step > 1 else []))) == 143
        assert not (tmp_path / "parts/results.json").exists()
    assert main(command("parts", *more, "--resume")) == 0
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")
    records = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))


def test_a_run_stopped_after_every_single_update_is_the_same_run(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert main(command("whole")) == 0
    for step in range(1, STEPS):
        with monkeypatch.context() as patch:
            signal_at(step, signal.SIGINT, patch)
            assert main(command("parts", "--resume")) == 130
    assert main(command("parts", "--resume")) == 0
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_update_finish_saves_and_exits_with_its_own_status(
    signum: int, status: int, command: Callable, tmp_path: Path, monkeypatch, capsys
):
    before = signal.getsignal(signum)
    signal_at(5, signum, monkeypatch)
    assert main(command("run")) == status
    assert max(checkpoints(tmp_path / "run/checkpoint").values()) == 5
    name = signal.Signals(signum).name
    assert error_of(capsys) == f"run_glue.py: {name} after step 5; --resume goes on from there"
    assert signal.getsignal(signum) is before


def test_a_signal_that_comes_during_an_evaluation_is_heard_at_its_end(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate = run_glue.evaluate

    def interrupted(*args: object) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(run_glue, "evaluate", interrupted)
    assert main(command("run")) == 143
    assert max(checkpoints(tmp_path / "run/checkpoint").values()) == 8


def test_sigterm_may_come_twice(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As from schedulers that signal a process and its group."""

    def twice(t: int, *_: float) -> float:
        if t == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.1

    monkeypatch.setattr(run_glue, "learning_rate", twice)
    assert main(command("run")) == 143
    assert max(checkpoints(tmp_path / "run/checkpoint").values()) == 5


def test_a_second_ctrl_c_ends_the_run_at_once(command: Callable, tmp_path: Path, monkeypatch, capsys):
    def twice(t: int, *_: float) -> float:
        if t == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return 0.1

    monkeypatch.setattr(run_glue, "learning_rate", twice)
    assert main(command("run")) == 130
    assert max(checkpoints(tmp_path / "run/checkpoint").values()) == 4
    assert error_of(capsys) == "run_glue.py: SIGINT"


def test_a_signal_in_the_last_update_changes_nothing(command: Callable, tmp_path: Path, monkeypatch):
    signal_at(STEPS, signal.SIGTERM, monkeypatch)
    assert main(command("run")) == 0
    assert (tmp_path / "run/results.json").exists()


def test_a_checkpoint_is_of_each_evaluation_unless_told_otherwise(command: Callable, tmp_path: Path):
    argv = [word for word in command("run", "--keep_checkpoint") if word not in ("--checkpoint_every", "4")]
    assert main(argv) == 0
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [24, 16]
    assert main(command("run", "--keep_checkpoint", "--overwrite")) == 0
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [24, 20]
    assert main(command("run", "--overwrite")) == 0
    assert not (tmp_path / "run/checkpoint").exists()


def test_resume_begins_a_run_that_is_not_there_and_leaves_a_finished_one_alone(
    command: Callable, tmp_path: Path, capsys
):
    assert main(command("run", "--resume", "--keep_checkpoint")) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert main(command("run", "--resume")) == 0
    assert "finished" in capsys.readouterr().out
    assert main(command("run", "--resume", "--lr", "7")) == 2
    assert "--lr is 7.0" in error_of(capsys)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("content", ["", "{}", "[", '{"best": '])
def test_a_run_whose_results_are_damaged_is_gone_on_with(content: str, command: Callable, tmp_path: Path):
    assert main(command("run", "--keep_checkpoint")) == 0
    before = left_by(tmp_path / "run")
    (tmp_path / "run/results.json").write_text(content)
    assert main(command("run", "--keep_checkpoint", "--resume")) == 0
    assert left_by(tmp_path / "run") == before


def test_going_on_elsewhere_is_recorded_and_said(command: Callable, tmp_path: Path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(5, signal.SIGTERM, patch)
        assert main(command("run")) == 143
    first = json.loads((tmp_path / "run/config.json").read_text())
    elsewhere = run_glue.provenance(torch.device("cpu")) | {"threads": 7}
    monkeypatch.setattr(run_glue, "provenance", lambda device: elsewhere)
    capsys.readouterr()
    assert main(command("run", "--resume")) == 0
    assert "other threads than so far" in error_of(capsys)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["threads"] == first["threads"]
    assert config["resumed"] == [{"step": 5, **elsewhere}]


def test_a_state_on_another_device_goes_where_the_adapters_are():
    """A checkpoint is read onto the CPU; "meta" stands in for a GPU."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4))
        layers = inject(model, ["0", "1"], 2, 4)
    allocator = RankAllocator(layers, CubicBudget(4, 2, 10, 1, 2, 1), "sensitivity")
    groups = {(*layer.P.shape, layer.Q.shape[1]) for layer in layers.values()}
    shapes = {(*group, part): torch.rand(1, 2) for group in groups for part in ("P", "lam", "Q")}
    kept = {name: torch.ones(2, dtype=torch.bool) for name in layers}
    allocator.load_state_dict({"ema": {"I_bar": shapes, "U_bar": dict(shapes)}, "kept": kept})
    averages = [*allocator.ema.I_bar.values(), *allocator.ema.U_bar.values()]
    assert {average.device.type for average in averages} == {"meta"}


def test_every_generator_goes_on_where_it_was():
    first = random_states(torch.device("cpu"))
    drawn = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    set_random_states(first, torch.device("cpu"))
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002


def test_a_checkpoint_kept_goes_on_to_the_same_results(command: Callable, tmp_path: Path):
    assert main(command("run", "--keep_checkpoint")) == 0
    before = left_by(tmp_path / "run")
    for name in ("results.json", "metrics.jsonl", "adapter/adapter.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert main(command("run", "--keep_checkpoint", "--resume")) == 0
    assert left_by(tmp_path / "run") == before


# --- killed -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_killed_around_any_of_its_writes_goes_on_to_the_same_end(
    when: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert main(command("whole")) == 0
    replace, writes = os.replace, []

    def count(source: Path, target: Path) -> None:
        writes.append(str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count)
        assert main(command("counted")) == 0
    assert len(writes) >= 8
    for n in range(len(writes)):
        left = [n]

        def kill(source: Path, target: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1 and when == "before":
                raise Killed
            replace(source, target)
            if left[0] == -1:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill)
            with pytest.raises(Killed):
                main(command(f"killed-{n}"))
        assert main(command(f"killed-{n}", "--resume")) == 0
        assert left_by(tmp_path / f"killed-{n}") == left_by(tmp_path / "whole"), writes[n]


def test_a_run_killed_at_random_moments_ends_as_the_one_that_was_not(tmp_path: Path):
    """`KILLS=20 python -m pytest -s -k killed_at_random tests/test_checkpoint.py` is the test of record."""
    argv = [sys.executable, str(HERE / "run_glue.py"), "--demo", "--max_steps", "120", "--eval_every", "30"]
    argv += [
        "--checkpoint_every",
        "10",
        "--device",
        "cpu",
        "--track_scores",
        "--score",
        "snr",
        "--output_dir",
    ]

    def start(folder: str, *more: str) -> subprocess.Popen:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": env}
        return subprocess.Popen([*argv, str(tmp_path / folder), *more], **quiet)

    began = time.monotonic()
    whole = start("whole")
    while not (tmp_path / "whole/config.json").exists():
        time.sleep(0.05)
        assert not whole.poll(), whole.stderr.read()
    loaded = time.monotonic() - began
    assert whole.wait(600) == 0, whole.stderr.read()
    duration, seed, killed = time.monotonic() - began, random.SystemRandom().randrange(10**6), 0
    rng = random.Random(seed)
    print(f"\nseed {seed}, training from {loaded:.1f} s to {duration:.1f} s after a start")
    process = start("killed", "--resume")
    while killed < KILLS:
        delay = rng.uniform(0 if killed % 4 == 3 else loaded, duration)  # each fourth at any moment at all
        try:
            status = process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            status = process.wait()
        if status == 0:  # done before its time: once more from the start
            assert left_by(tmp_path / "killed") == left_by(tmp_path / "whole")
            process = start("killed", "--overwrite")
            continue
        assert status == -signal.SIGKILL, process.stderr.read()
        killed += 1
        there = checkpoints(tmp_path / "killed/checkpoint")
        print(f"kill {killed} after {delay:5.1f} s, checkpoints of steps {list(there.values())}")
        process = start("killed", "--resume")
    assert process.wait(600) == 0, process.stderr.read()
    assert left_by(tmp_path / "killed") == left_by(tmp_path / "whole")
    print(
        f"{killed} of {KILLS} kills survived: results.json, metrics.jsonl, adapter and posterior are the same"
    )


# --- damage -------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run stopped after 18 updates, with the checkpoints of the 18th and the 16th."""
    with monkeypatch.context() as patch:
        signal_at(18, signal.SIGTERM, patch)
        assert main(command("run")) == 143
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [18, 16]
    return tmp_path / "run"


def damages(content: bytes) -> Iterator[bytes]:
    n = len(content)
    yield from (content[:length] for length in (0, 1, 100, n // 3, n // 2, n - 1))
    rng = random.Random(0)
    for position in [0, 1, n - 1, *(rng.randrange(n) for _ in range(30))]:
        yield (
            content[:position]
            + bytes([content[position] ^ (1 << rng.randrange(8))])
            + content[position + 1 :]
        )
    yield content + b"\0"


def test_any_damage_to_a_checkpoint_is_found_and_the_one_before_it_is_used(stopped: Path):
    latest, previous = checkpoints(stopped / "checkpoint")
    whole = latest.read_bytes()
    for content in damages(whole):
        latest.write_bytes(content)
        state, damaged = load_checkpoint(stopped / "checkpoint")
        assert damaged == [latest]
        assert state["progress"]["step"] == 16
    latest.write_bytes(whole)
    for content in damages(previous.read_bytes()):
        previous.write_bytes(content)
        state, damaged = load_checkpoint(stopped / "checkpoint")
        assert (damaged, state["progress"]["step"]) == ([], 18)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_end(
    stopped: Path, command: Callable, tmp_path: Path, capsys
):
    (latest, _) = checkpoints(stopped / "checkpoint")
    latest.write_bytes(latest.read_bytes()[:-7])
    assert main(command("run", "--resume")) == 0
    assert latest.name in error_of(capsys)
    assert main(command("whole")) == 0
    assert left_by(stopped) == left_by(tmp_path / "whole")


def test_a_run_with_nothing_but_damaged_checkpoints_is_refused_by_their_names(
    stopped: Path, command: Callable, capsys
):
    files = checkpoints(stopped / "checkpoint")
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert main(command("run", "--resume")) == 2
    message = error_of(capsys)
    assert all(path.name in message for path in files)
    assert "--overwrite" in message
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "adapter/adapter.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut short", "altered"])
def test_damage_to_what_else_the_run_has_written_is_made_good(
    name: str, damage: str, stopped: Path, command: Callable, tmp_path: Path
):
    content = (stopped / name).read_bytes()
    (stopped / name).unlink()
    if damage != "gone":
        (stopped / name).write_bytes(
            content[: len(content) // 2] if damage == "cut short" else b"x" * len(content)
        )
    assert main(command("run", "--resume")) == 0
    assert main(command("whole")) == 0
    assert left_by(stopped) == left_by(tmp_path / "whole")
    assert json.loads((stopped / "config.json").read_text())["total_steps"] == STEPS


def forge(folder: Path, content: object) -> None:
    """Every checkpoint in the folder with other content, and the checksum that belongs to it."""
    for path, step in checkpoints(folder).items():
        torch.save(content, path)
        path.rename(path.with_name(f"step-{step}-{zlib.crc32(path.read_bytes()):08x}.pt"))


def test_no_code_hides_in_a_checkpoint(stopped: Path, command: Callable, tmp_path: Path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    state, _ = load_checkpoint(stopped / "checkpoint")
    forge(stopped / "checkpoint", state | {"trap": Trap()})
    assert main(command("run", "--resume")) == 2
    assert "damaged" in error_of(capsys)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], None, torch.zeros(3)], ids=str)
def test_a_checkpoint_of_something_else_is_damaged(content: object, stopped: Path, command: Callable, capsys):
    forge(stopped / "checkpoint", content)
    assert main(command("run", "--resume")) == 2
    assert "damaged" in error_of(capsys)


def test_a_checkpoint_that_cannot_be_read_is_damaged(stopped: Path, command: Callable, tmp_path: Path):
    (latest, _) = checkpoints(stopped / "checkpoint")
    latest.unlink()
    latest.mkdir()
    state, damaged = load_checkpoint(stopped / "checkpoint")
    assert (state["progress"]["step"], damaged) == (16, [latest])


def test_no_code_of_a_model_folder_is_run(command: Callable, bert: Path, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for file in bert.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Config: pass\n")
    argv = [str(model) if word == str(bert) else word for word in command("run")]
    argv = [sys.executable, str(HERE / "run_glue.py"), *argv]
    done = subprocess.run(argv, input="y\n" * 9, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "sprung").exists()


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (["--lr", "0.3"], "--lr"),
        (["--max_steps", "25"], "--max_steps"),
        (["--batch_size", "4"], "--batch_size"),
        (["--seed", "7"], "--seed"),
        (["--score", "snr"], "--score"),
        (["--optimizer", "adamw", "--score", "mu"], "--optimizer"),
        (["--method", "lora"], "--method"),
        (["--target_rank", "1"], "--target_rank"),
        (["--init_rank", "4"], "--init_rank"),
        (["--hess_init", "0.5"], "--hess_init"),
        (["--orth", "0"], "--orth"),
        (["--tinit", "3"], "--tinit"),
        (["--delta_t", "2"], "--delta_t"),
        (["--eval_every", "6"], "--eval_every"),
        (["--eval_samples", "2"], "--eval_samples"),
        (["--track_scores"], "--track_scores"),
        (["--targets", "attention.self.query"], "--targets"),
        (["--max_length", "8"], "--max_length"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_going_on_with_other_settings_is_refused_by_the_first_that_differs(
    other: list[str], named: str, stopped: Path, command: Callable, capsys
):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert main(command("run", "--resume", *other)) == 2
    assert error_of(capsys).startswith(f"run_glue.py: error: {named} is ")
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_going_on_with_other_data_or_another_model_is_refused(
    stopped: Path, command: Callable, bert: Path, tmp_path: Path, capsys
):
    train = tmp_path / "glue/CoLA/train.tsv"
    text = train.read_text()
    train.write_text(text.replace("the", "a", 1))
    assert main(command("run", "--resume")) == 2
    assert "--data_dir" in error_of(capsys)
    train.write_text(text)
    other = tmp_path / "other"
    other.mkdir()
    for file in bert.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.bias"][3] += 1e-3
    save_file(weights, other / "model.safetensors")
    argv = [str(other) if word == str(bert) else word for word in command("run", "--resume")]
    assert main(argv) == 2
    assert f"--model {other}" in error_of(capsys)
    dev = tmp_path / "glue/CoLA/dev.tsv"
    dev.write_text(dev.read_text().replace("the", "a", 1))
    assert main(command("run", "--resume")) == 2
    assert "--data_dir" in error_of(capsys)


def test_model_data_and_run_may_have_moved(stopped: Path, command: Callable, tmp_path: Path):
    (tmp_path / "glue").rename(tmp_path / "moved")
    stopped.rename(tmp_path / "elsewhere")
    argv = [word.replace(str(tmp_path / "glue"), str(tmp_path / "moved")) for word in command("elsewhere")]
    assert main([*argv, "--resume"]) == 0


def test_a_vanished_data_folder_is_named(stopped: Path, command: Callable, tmp_path: Path, capsys):
    (tmp_path / "glue").rename(tmp_path / "moved")
    assert main(command("run", "--resume")) == 2
    assert str(tmp_path / "glue/CoLA/train.tsv") in error_of(capsys)


def test_a_deleted_checkpoint_is_said_and_nothing_is_begun_anew(stopped: Path, command: Callable, capsys):
    for path in checkpoints(stopped / "checkpoint"):
        path.unlink()
    before = (stopped / "metrics.jsonl").read_bytes()
    assert main(command("run", "--resume")) == 2
    assert "lost its checkpoint" in error_of(capsys)
    assert main(command("run", "--seed", "9")) == 2
    assert "--overwrite" in error_of(capsys)
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_run_is_not_overwritten_before_the_new_one_has_its_first_checkpoint(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert main(command("run")) == 0
    before = left_by(tmp_path / "run")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(command("run", "--overwrite", "--seed", "5")) == 2
    assert left_by(tmp_path / "run") == before


@pytest.mark.parametrize("folder", ["run", "run/checkpoint", "run/adapter"])
def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_loaded(
    folder: str, stopped: Path, command: Callable, tmp_path: Path, monkeypatch, capsys
):
    access = os.access
    denied = tmp_path / folder
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != denied and access(path, mode))
    monkeypatch.setattr(run_glue, "load_task", None)
    assert main(command("run", "--resume")) == 2
    assert "--output_dir" in error_of(capsys)


def test_an_unfinished_run_is_not_replaced_unless_told_to(stopped: Path, command: Callable, capsys):
    assert main(command("run")) == 2
    message = error_of(capsys)
    assert "--resume" in message
    assert "--overwrite" in message
    assert list(checkpoints(stopped / "checkpoint").values()) == [18, 16]
    assert main(command("run", "--resume", "--overwrite")) == 2
    assert main(command("run", "--overwrite", "--seed", "5")) == 0


def test_two_runs_in_one_folder_are_refused(stopped: Path, command: Callable, capsys):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with claimed(stopped):
        assert main(command("run", "--resume")) == 2
        assert "another process" in error_of(capsys)
        assert main(command("run", "--overwrite")) == 2
        assert "another process" in error_of(capsys)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert main(command("run", "--resume")) == 0


def test_an_output_folder_below_a_file_is_refused_before_anything_is_loaded(
    command: Callable, tmp_path: Path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(run_glue, "load_task", None)
    assert main(command("file/run")) == 2
    assert "--output_dir" in error_of(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_what_was_there_whole(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert main(command("whole")) == 0
    sync = os.fsync
    for n in range(6):
        left, folder = [n], f"run-{n}"

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert main(command(folder)) == 2
        message = error_of(capsys)
        assert "No space left on device" in message
        assert str(tmp_path / folder) in message
        assert not list((tmp_path / folder).rglob("*.new"))
        assert main(command(folder, "--resume")) == 0
        assert left_by(tmp_path / folder) == left_by(tmp_path / "whole")


def test_a_file_that_cannot_grow_is_one_line(tmp_path: Path):
    """The kernel's own refusal: no file of the run may be larger than 20 kB."""
    argv = [sys.executable, str(HERE / "run_glue.py"), "--demo", "--max_steps", "9", "--output_dir", "run"]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("run_glue.py: error: run/checkpoint/step-0-")


# --- not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_a_loss_that_is_not_finite_is_said_with_step_and_learning_rate(
    optimizer: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    loss, calls = run_glue.task_loss, []

    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return loss(logits, labels) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(run_glue, "task_loss", broken)
    more = ["--lr", "0.001", "--optimizer", optimizer, "--score", "mu"]
    assert main(command("run", *more)) == 3
    lr = run_glue.learning_rate(5, STEPS, 0.001, 0)
    expected = f"the loss is not finite at step 6 (lr {lr:g}); the checkpoint of step 4 is kept; "
    assert error_of(capsys).startswith(f"run_glue.py: stopped: {expected}")
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [4, 0]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]  # what led there is on record


def test_a_gradient_that_is_not_finite_is_said_by_name(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    penalty, calls = run_glue.add_penalty_gradients, []

    def broken(layers: dict, gamma: float, squared: bool) -> None:
        penalty(layers, gamma, squared)
        calls.append(0)
        if len(calls) == 10:
            layers["bert.encoder.layer.1.intermediate.dense"].Q.grad[0, 3] = float("nan")

    monkeypatch.setattr(run_glue, "add_penalty_gradients", broken)
    assert main(command("run")) == 3
    message = error_of(capsys)
    assert "the gradient of bert.encoder.layer.1.intermediate.dense.Q is not finite at step 10" in message
    assert "the checkpoint of step 8 is kept" in message


def test_a_posterior_that_is_not_finite_is_said_by_name(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    step = run_glue.IVON.step

    def broken(self: run_glue.IVON) -> None:
        step(self)
        if self.param_groups[0]["step"] == 11:
            self.state[self.param_groups[0]["params"][4]]["h"].view(-1)[0] = float("inf")

    monkeypatch.setattr(run_glue.IVON, "step", broken)
    assert main(command("run")) == 3
    message = error_of(capsys)
    assert "the posterior of bert.encoder.layer.0.attention.self.key.lam is not finite at step 11" in message


def test_a_parameter_that_is_not_finite_is_said_by_name(
    command: Callable, monkeypatch: pytest.MonkeyPatch, capsys
):
    step = run_glue.IVON.step

    def broken(self: run_glue.IVON) -> None:
        step(self)
        if self.param_groups[0]["step"] == 11:
            with torch.no_grad():
                self.param_groups[0]["params"][4][0] = float("nan")

    monkeypatch.setattr(run_glue.IVON, "step", broken)
    assert main(command("run")) == 3
    message = error_of(capsys)
    assert "the parameter bert.encoder.layer.0.attention.self.key.lam is not finite at step 11" in message


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_a_learning_rate_beyond_all_reason_stops_the_run(optimizer: str, command: Callable, capsys):
    assert main(command("run", "--lr", "1e30", "--optimizer", optimizer, "--score", "mu")) == 3
    assert "is not finite at step" in error_of(capsys)


def test_a_second_moment_that_is_not_finite_is_said_by_name(
    command: Callable, monkeypatch: pytest.MonkeyPatch, capsys
):
    """With AdamW: its square overflows where the gradient does not, and the parameter would stand still."""
    loss = run_glue.task_loss
    monkeypatch.setattr(run_glue, "task_loss", lambda logits, labels: loss(logits, labels) * 1e25)
    assert main(command("run", "--optimizer", "adamw", "--score", "mu")) == 3
    assert "stopped: the second moment of " in error_of(capsys)


def test_what_is_not_finite_is_said_also_when_the_checkpoint_is_gone(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shutil.rmtree(tmp_path / "run/checkpoint", ignore_errors=True)
        return logits.sum() * float("nan")

    monkeypatch.setattr(run_glue, "task_loss", broken)
    assert main(command("run")) == 3
    assert "the loss is not finite at step 1" in error_of(capsys)


def test_the_device_is_asked_only_when_losses_are_written(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What an update leaves for the check is read once an evaluation, a checkpoint, or 50 updates."""
    write, steps, asked, writing = run_glue.write_losses, [], [], []

    def counted(path: Path, pending: list[run_glue.Update]) -> list[float]:
        steps.append([update.record["step"] for update in pending])
        writing.append(True)
        losses = write(path, pending)
        writing.clear()
        return losses

    def watch(method: str) -> None:
        original = getattr(torch.Tensor, method)

        def watched(tensor: torch.Tensor, *args: object) -> object:
            training = sys._getframe(1).f_code.co_filename == run_glue.__file__
            if tensor.is_floating_point() and training and not writing:
                asked.append(method)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, method, watched)

    for method in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        watch(method)
    monkeypatch.setattr(run_glue, "write_losses", counted)
    monkeypatch.setattr(run_glue, "evaluate", lambda *_: {"validation": {"matthews_correlation": 0.0}})
    monkeypatch.setattr(run_glue, "check_device", lambda _: None)
    monkeypatch.setattr(run_glue, "checksum", lambda _: "")
    assert main(command("run", "--checkpoint_every", "10", "--eval_every", "24")) == 0
    assert steps == [list(range(1, 11)), list(range(11, 21)), list(range(21, 25))]
    assert asked == []


# --- files --------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_whole(path, b"first")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full") as raised:
        write_whole(path, b"second")
    assert raised.value.filename == str(path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"first")]


def test_of_checkpoints_the_last_two_are_kept(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    whole = dict.fromkeys(checkpoint.CONTENTS, 0)
    for step in (0, 8, 9, 100):
        save_checkpoint(folder, step, whole)
    assert list(checkpoints(folder).values()) == [100, 9]
    save_checkpoint(folder, 50, whole)  # gone on from step 9: what came later was damaged
    assert list(checkpoints(folder).values()) == [50, 9]
    save_checkpoint(folder, 50, whole | {"more": 1})
    assert list(checkpoints(folder).values()) == [50, 9]
    assert load_checkpoint(folder) == (whole | {"more": 1}, [])
    (folder / "step-60-00000000.pt.new").write_bytes(b"half")  # of a process that was killed
    save_checkpoint(folder, 70, {})
    assert sorted(path.name[:7] for path in folder.iterdir()) == ["step-50", "step-70"]


def test_a_folder_without_locks_is_written_to_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(checkpoint.fcntl, "flock", unsupported)
    with claimed(tmp_path):
        pass
