"""A run that stops, for whatever reason, resumes as if it had not; and what cannot be resumed says so."""

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
from pickle import UnpicklingError
from types import SimpleNamespace

import pytest
import torch
from conftest import write_glue
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

import run_glue
from adalora import inject
from budget import CubicBudget
from harness import files, prediction, run_folder
from harness.files import locked, write_atomically
from harness.run_folder import (
    HERE,
    checkpoints,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)
from harness.settings import Settings, exit_status, learning_rate
from scores import SCORES
from vilora import RankAllocator

KILLS = int(os.environ.get("KILLS", "3"))
STEPS = 24
OF_THE_PROCESS = ("seconds", "steps_per_second", "peak_memory_mb")
# t_i = 2 and T − t_f = 12, of 24 updates; a checkpoint every 4, an evaluation every 8.
RUNS = {
    **{f"ivon {score}": ["--score", score] for score in SCORES},
    "every score, by length": ["--score", "sensitivity", "--track_scores", "--group_by_length"],
    "draws": ["--score", "snr", "--mc_samples", "2", "--grad_accum", "2", "--eval_samples", "2"],
    "adamw": ["--optimizer", "adamw", "--score", "sensitivity", "--track_scores"],
    "plain": ["--plain", "--dropout", "0.1"],
    "lora": ["--method", "lora", "--optimizer", "adamw"],
    "full": ["--method", "full"],
    "head alone": ["--target_rank", "0"],
}
QUICK = ("ivon mu", "adamw")


def main(argv: list[str]) -> int:
    """run_glue.py's exit status."""
    return exit_status(lambda: run_glue.main(argv), "run_glue.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), "cola")


def arguments(bert: Path, data: Path, folder: Path, *more: str) -> list[str]:
    where = ["--model", str(bert), "--data_dir", str(data), "--output_dir", str(folder)]
    shape = ["--max_steps", str(STEPS), "--eval_every", "8", "--checkpoint_every", "4", "--batch_size", "8"]
    return ["--task", "cola", *where, *shape, "--max_length", "16", "--device", "cpu", *more]


@pytest.fixture
def command(bert: Path, data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """(name of a folder in tmp_path, flags…) → a command line."""
    return lambda name, *more: arguments(bert, data, tmp_path / name, *more)


@pytest.fixture(scope="module")
def whole(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(bert, data, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def stopped_once(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_at(18, signal.SIGTERM, patch)
        assert main(arguments(bert, data, folder)) == 143
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run stopped after 18 updates, with the checkpoints of the 18th and the 16th: tmp_path/run."""
    folder = shutil.copytree(stopped_once, tmp_path / "run")
    assert list(checkpoints(folder / "checkpoint").values()) == [18, 16]
    return folder


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A finished run: tmp_path/run."""
    return shutil.copytree(whole, tmp_path / "run")


def left_by(folder: Path) -> dict[str, object]:
    """All that a finished run leaves, but for times."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    contents: dict[str, object] = {str(path): (folder / path).read_bytes() for path in paths}
    results = json.loads(contents["results.json"])
    contents["results.json"] = {key: value for key, value in results.items() if key not in OF_THE_PROCESS}
    del contents["config.json"]  # says whether it was resumed
    return contents


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def signal_at(step: int, signum: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Send this process a signal during one update."""

    def signalled(t: int, settings: Settings) -> float:
        if t == step:
            for _ in range(times):
                os.kill(os.getpid(), signum)
        return learning_rate(t, settings)

    monkeypatch.setattr(run_glue, "learning_rate", signalled)


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr, but for the progress bar's."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run_glue.py")]
    assert len(lines) == 1, lines
    return lines[0]


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_run_stopped_at_any_stage_resumes_bit_for_bit(
    name: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = RUNS[name]
    assert main(command("uninterrupted", *more)) == 0
    for step in (1, 7, 12, 17):  # before pruning, in it, at its end (t = T − t_f), after it
        with monkeypatch.context() as patch:
            signal_at(step, signal.SIGTERM, patch)
            assert main(command("parts", *more, "--resume")) == 143
        assert not (tmp_path / "parts/results.json").exists()
    assert main(command("parts", *more, "--resume")) == 0
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "uninterrupted")
    steps = [record["step"] for record in records(tmp_path / "parts") if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_stopped_after_every_single_update_is_the_same_run(
    command: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for step in range(1, STEPS):
        with monkeypatch.context() as patch:
            signal_at(step, signal.SIGINT, patch)
            assert main(command("parts", "--resume")) == 130
    assert main(command("parts", "--resume")) == 0
    assert left_by(tmp_path / "parts") == left_by(whole)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_update_finish_saves_and_exits_with_its_own_status(
    signum: int, status: int, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    before = signal.getsignal(signum)
    signal_at(5, signum, monkeypatch)
    assert main(command("run")) == status
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [5, 4]
    name = signal.Signals(signum).name
    assert error_of(capsys) == f"run_glue.py: {name} after step 5; --resume continues from there"
    assert signal.getsignal(signum) is before


def test_a_signal_during_an_evaluation_takes_effect_at_its_end(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate = prediction.evaluate

    def interrupted(*args: object) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(prediction, "evaluate", interrupted)
    assert main(command("run")) == 143
    assert max(checkpoints(tmp_path / "run/checkpoint").values()) == 8
    assert [record["step"] for record in records(tmp_path / "run") if "split" in record] == [8]


def test_sigterm_may_come_twice(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As from schedulers that signal a process and its group."""
    signal_at(5, signal.SIGTERM, monkeypatch, times=2)
    assert main(command("run")) == 143
    assert max(checkpoints(tmp_path / "run/checkpoint").values()) == 5


def test_a_second_ctrl_c_ends_the_run_at_once(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    signal_at(5, signal.SIGINT, monkeypatch, times=2)
    assert main(command("run")) == 130
    assert max(checkpoints(tmp_path / "run/checkpoint").values()) == 4
    assert error_of(capsys) == "run_glue.py: interrupted"


def test_a_signal_in_the_last_update_changes_nothing(
    command: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    signal_at(STEPS, signal.SIGTERM, monkeypatch)
    assert main(command("run")) == 0
    assert left_by(tmp_path / "run") == left_by(whole)


@pytest.mark.parametrize(("more", "steps"), [([], [20, 16]), (["--checkpoint_every", "7"], [21, 14])])
def test_checkpoints_are_as_frequent_as_told(
    more: list[str], steps: list[int], command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_folder.shutil, "rmtree", lambda *_, **__: None)  # what finish() removes
    assert main(command("run", *more)) == 0
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == steps


def test_without_being_told_a_checkpoint_follows_each_evaluation(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_folder.shutil, "rmtree", lambda *_, **__: None)
    argv = [word for word in command("run") if word not in ("--checkpoint_every", "4")]
    assert main(argv) == 0
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [16, 8]


def test_the_best_adapter_is_written_with_a_checkpoint(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or a killed run that takes another course, as on a GPU it may, could leave one that is not its best."""
    scores = [{"validation": {"matthews_correlation": score}} for score in (0.1, 0.3, 0.2)]
    monkeypatch.setattr(prediction, "evaluate", lambda *_: scores.pop(0))
    monkeypatch.setattr(run_folder.shutil, "rmtree", lambda *_, **__: None)
    assert main(command("run", "--checkpoint_every", "100")) == 0
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [16, 8]


def test_a_resumed_run_records_where_model_and_data_are_now(
    stopped: Path, bert: Path, data: Path, tmp_path: Path
):
    for path in (bert, data):
        shutil.copytree(path, tmp_path / "moved" / path.name)
    moved = [tmp_path / "moved" / path.name for path in (bert, data)]
    assert main(arguments(*moved, stopped, "--resume")) == 0
    config = json.loads((stopped / "config.json").read_text())
    assert [config["model"], config["data_dir"]] == list(map(str, moved))


def test_a_finished_run_has_no_checkpoints(whole: Path):
    assert not (whole / "checkpoint").exists()


def test_resume_starts_a_run_that_is_not_there(command: Callable, whole: Path, tmp_path: Path):
    assert main(command("run", "--resume")) == 0
    assert left_by(tmp_path / "run") == left_by(whole)


def test_resume_starts_a_run_that_has_no_checkpoint_yet(command: Callable, stopped: Path, whole: Path):
    shutil.rmtree(stopped / "checkpoint")
    assert main(command("run", "--resume")) == 0
    assert left_by(stopped) == left_by(whole)


def test_resume_starts_a_run_that_was_killed_while_it_replaced_an_unfinished_one(
    command: Callable, stopped: Path, whole: Path
):
    (stopped / "config.json").rename(stopped / "next.json")  # the other run's checkpoints are still there
    assert main(command("run", "--resume")) == 0
    assert left_by(stopped) == left_by(whole)


def test_a_run_without_a_checkpoint_is_refused_with_other_settings(command: Callable, stopped: Path, capsys):
    shutil.rmtree(stopped / "checkpoint")
    before = everything_in(stopped)
    assert main(command("run", "--resume", "--seed", "9")) == 2
    assert error_of(capsys).startswith("run_glue.py: error: --seed is 9")
    assert everything_in(stopped) == before


def test_resume_leaves_a_finished_run_as_it_is(command: Callable, finished: Path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(command("run", "--resume")) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_finished_run_is_refused_with_other_settings(command: Callable, finished: Path, capsys):
    before = everything_in(finished)
    assert main(command("run", "--resume", "--lr", "7")) == 2
    assert "--lr is 7.0" in error_of(capsys)
    assert everything_in(finished) == before


def test_resuming_on_another_machine_is_recorded(
    command: Callable, stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    first = json.loads((stopped / "config.json").read_text())
    elsewhere = run_folder.provenance(torch.device("cpu")) | {"threads": 7}
    monkeypatch.setattr(run_folder, "provenance", lambda device: elsewhere)
    assert main(command("run", "--resume")) == 0
    config = json.loads((stopped / "config.json").read_text())
    assert config["threads"] == first["threads"]
    assert config["resumed"] == [{"step": 18, **elsewhere}]


def test_a_state_on_another_device_goes_where_the_adapters_are():
    """A checkpoint is read onto the CPU; "meta" stands in for a GPU."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4))
        layers = inject(model, ["0", "1"], 2, 4)
    optimizer = torch.optim.AdamW(p for layer in layers.values() for p in (layer.P, layer.lam, layer.Q))
    allocator = RankAllocator(layers, CubicBudget(4, 2, 10, 1, 2, 1), "sensitivity", optimizer)
    groups = {(*layer.P.shape, layer.Q.shape[1]) for layer in layers.values()}
    shapes = {(*group, part): torch.rand(1, 2) for group in groups for part in ("P", "lam", "Q")}
    kept = {name: torch.ones(2, dtype=torch.bool) for name in layers}
    allocator.load_state_dict({"ema": {"I_bar": shapes, "U_bar": dict(shapes)}, "kept": kept})
    state = dict(allocator.state_dict()["ema"])
    averages = [x for average in state.values() for x in average.values()]
    assert len(averages) == 2 * len(shapes)
    assert {x.device.type for x in (*averages, *allocator.kept.values())} == {"meta"}


def test_the_random_generator_continues_where_it_was():
    first = random_states(torch.device("cpu"))
    drawn = torch.rand(1)
    set_random_states(first, torch.device("cpu"))
    assert drawn == torch.rand(1)


def test_a_devices_generator_continues_where_it_was(monkeypatch: pytest.MonkeyPatch):
    """With a stand-in for the device's module: a generator beside the CPU's own."""
    generator = torch.Generator()
    module = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    first = random_states(torch.device("cuda"))
    drawn = torch.rand(1, generator=generator), torch.rand(1)
    set_random_states(first, torch.device("cuda"))
    assert drawn == (torch.rand(1, generator=generator), torch.rand(1))


# --- killed -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def kill_at_write(n: int, when: str, patch: pytest.MonkeyPatch) -> list[Path]:
    """End the run at its n-th file operation, counted from 0; returns the files of the operations so far.

    Operations are renames into place, lines added to a file, and removals; `when`: "before" one, "amid" it
    (half of the lines are written, a removed folder has lost one file) or "after" it.
    """
    seen: list[Path] = []
    replace, append, rmtree = os.replace, files.append, shutil.rmtree

    def hooked(path: Path, operation: Callable[[], object], half: Callable[[], object]) -> None:
        seen.append(Path(path))
        if len(seen) - 1 != n:
            operation()
            return
        if when != "before":
            (half if when == "amid" else operation)()
        raise Killed

    def half_line(path: Path, lines: list[dict]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with path.open("a") as file:
            file.write(text[: len(text) // 2])

    def one_file_less(folder: Path) -> None:
        for path in sorted(folder.glob("*"))[:1]:
            path.unlink()

    patch.setattr(os, "replace", lambda a, b: hooked(b, lambda: replace(a, b), lambda: None))
    patch.setattr(
        files,
        "append",
        lambda path, new: hooked(path, lambda: append(path, new), lambda: half_line(path, new)),
    )
    patch.setattr(
        run_folder.shutil,
        "rmtree",
        lambda path, **how: hooked(path, lambda: rmtree(path, **how), lambda: one_file_less(path)),
    )
    return seen


def writes_of_a_run(argv: list[str]) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch:
        seen = kill_at_write(-1, "", patch)
        assert main(argv) == 0
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "amid"])  # after one is before the next
def test_a_run_killed_around_any_of_its_writes_resumes_to_the_same_end(
    when: str, command: Callable, whole: Path, tmp_path: Path
):
    writes = writes_of_a_run(command("counted"))
    assert len(writes) >= 12
    for n, path in enumerate(writes):
        folder = tmp_path / f"killed-{n}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at_write(n, when, patch)
            with pytest.raises(Killed):
                main(command(folder.name))
        assert main(command(folder.name, "--resume")) == 0
        assert left_by(folder) == left_by(whole), path


@pytest.mark.slow
def test_a_run_killed_while_it_replaces_another_one_resumes_to_the_same_end(
    command: Callable, whole: Path, tmp_path: Path
):
    for n in range(3):  # the removal of checkpoints, the new config.json, the first losses
        folder = tmp_path / f"killed-{n}"
        assert main(command(folder.name, "--seed", "5", "--max_steps", "30")) == 0
        with pytest.MonkeyPatch.context() as patch:
            kill_at_write(n, "after", patch)
            with pytest.raises(Killed):
                main(command(folder.name, "--overwrite"))
        again = "--resume" if n else "--overwrite"  # at first the other run is still there, and not this one
        assert main(command(folder.name, again)) == 0
        assert left_by(folder) == left_by(whole)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_one_that_was_not(tmp_path: Path):
    """`KILLS=20 python -m pytest -s -m slow -k killed_at_random tests/system/test_resume.py`: at length."""
    argv = [sys.executable, str(HERE / "run_glue.py"), "--demo", "--max_steps", "60", "--eval_every", "20"]
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
    print(f"{killed} of {KILLS} kills survived: results, records, adapter and posterior are the same")


# --- damage -------------------------------------------------------------------------------------------------


def damages(content: bytes) -> Iterator[bytes]:
    n = len(content)
    yield from (content[:length] for length in (0, 1, 100, n // 3, n // 2, n - 1))
    rng = random.Random(0)
    for i in [0, 1, n - 1, *(rng.randrange(n) for _ in range(30))]:
        yield content[:i] + bytes([content[i] ^ (1 << rng.randrange(8))]) + content[i + 1 :]
    yield content + b"\0"


def test_any_damage_to_a_checkpoint_is_found_named_and_the_one_before_it_is_used(stopped: Path, capsys):
    (latest, _) = checkpoints(stopped / "checkpoint")
    for content in damages(latest.read_bytes()):
        latest.write_bytes(content)
        assert load_checkpoint(stopped / "checkpoint")["progress"]["step"] == 16
        assert f"{latest}: damaged" in error_of(capsys)


def test_damage_to_an_earlier_checkpoint_does_not_matter(stopped: Path, capsys):
    (_, previous) = checkpoints(stopped / "checkpoint")
    for content in damages(previous.read_bytes()):
        previous.write_bytes(content)
        assert load_checkpoint(stopped / "checkpoint")["progress"]["step"] == 18
    assert capsys.readouterr().err == ""


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_one_before_to_the_same_end(
    stopped: Path, command: Callable, whole: Path, capsys
):
    (latest, _) = checkpoints(stopped / "checkpoint")
    latest.write_bytes(latest.read_bytes()[:-7])
    assert main(command("run", "--resume")) == 0
    assert latest.name in error_of(capsys)
    assert left_by(stopped) == left_by(whole)


def test_a_run_with_nothing_but_damaged_checkpoints_is_refused_by_their_names(
    stopped: Path, command: Callable, capsys
):
    paths = checkpoints(stopped / "checkpoint")
    for path in paths:
        path.write_bytes(path.read_bytes()[:1000])
    before = everything_in(stopped)
    assert main(command("run", "--resume")) == 2
    message = error_of(capsys)
    assert all(path.name in message for path in paths)
    assert "--overwrite" in message
    assert everything_in(stopped) == before


@pytest.mark.parametrize("more", ["", '{"step": 99, "loss": 0.1}\n', '{"step": 19, "lo'], ids=repr)
def test_records_after_the_checkpoint_are_cut_off(more: str, stopped: Path, command: Callable, whole: Path):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(more)
    assert main(command("run", "--resume")) == 0
    assert left_by(stopped) == left_by(whole)


@pytest.mark.parametrize("kept", [0, 0.5])
def test_records_that_are_gone_do_not_stop_a_run(kept: float, stopped: Path, command: Callable, whole: Path):
    path = stopped / "metrics.jsonl"
    content = path.read_text()
    path.write_text(content[: int(kept * len(content))])  # half of it ends amid a record
    left = content[: int(kept * len(content))].count("\n")
    assert main(command("run", "--resume")) == 0
    before, after = records(whole)[:left], [record for record in records(whole) if record["step"] > 18]
    assert records(stopped) == before + after


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", "gone"),
        ("config.json", "cut short"),
        ("config.json", "altered"),
        ("metrics.jsonl", "altered"),
    ],
)
def test_damage_to_what_else_resuming_needs_is_named_and_nothing_is_lost(
    name: str, damage: str, stopped: Path, command: Callable, capsys
):
    content = (stopped / name).read_bytes()
    (stopped / name).unlink()
    if damage == "cut short":
        (stopped / name).write_bytes(content[: len(content) // 2])
    if damage == "altered":
        (stopped / name).write_bytes(b"x" * (len(content) - 1) + b"\n")
    before = everything_in(stopped)
    assert main(command("run", "--resume")) == 2
    assert str(stopped / name) in error_of(capsys)
    assert everything_in(stopped) == before


def forge(folder: Path, content: object) -> None:
    """Every checkpoint in the folder with other content, and the checksum that belongs to it."""
    for path, step in checkpoints(folder).items():
        torch.save(content, path)
        path.rename(path.with_name(f"step-{step}-{zlib.crc32(path.read_bytes()):08x}.pt"))


def test_no_code_in_a_checkpoint_is_run(stopped: Path, command: Callable, tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    forge(stopped / "checkpoint", load_checkpoint(stopped / "checkpoint") | {"trap": Trap()})
    with pytest.raises(UnpicklingError):
        main(command("run", "--resume"))
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_has_each_tensor_once_and_nothing_beside_them(stopped: Path):
    """A view of a vector would be stored with all of the vector."""
    state = load_checkpoint(stopped / "checkpoint")
    del state["random"]
    tensors = [x for x in tree_leaves(state) if torch.is_tensor(x)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}
    assert sum(storages.values()) == sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.slow
def test_no_code_of_a_model_folder_is_run(command: Callable, bert: Path, tmp_path: Path):
    model = shutil.copytree(bert, tmp_path / "model")
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
        (["--optimizer", "adamw", "--score", "mu"], "--optimizer"),
        (["--method", "lora"], "--method"),
        (["--targets", "attention.self.query"], "--targets"),
        (["--tinit", "3"], "--tinit"),
        (["--eval_every", "6"], "--eval_every"),
        (["--track_scores"], "--track_scores"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_resuming_with_other_settings_is_refused_by_the_first_that_differs(
    other: list[str], named: str, stopped: Path, command: Callable, capsys
):
    before = everything_in(stopped)
    assert main(command("run", "--resume", *other)) == 2
    assert error_of(capsys).startswith(f"run_glue.py: error: {named} is ")
    assert everything_in(stopped) == before


def test_resuming_with_more_data_is_refused_by_the_data_and_not_by_what_follows_from_them(
    stopped: Path, command: Callable, data: Path, tmp_path: Path, capsys
):
    moved = shutil.copytree(data, tmp_path / "glue")
    file = moved / "CoLA/train.tsv"
    file.write_text(file.read_text() * 2)
    assert main(command("run", "--resume", "--data_dir", str(moved))) == 2
    assert "--data_dir has other data" in error_of(capsys)


@pytest.mark.parametrize("name", ["train", "dev"])
def test_resuming_with_other_data_is_refused(
    name: str, stopped: Path, command: Callable, data: Path, tmp_path: Path, capsys
):
    moved = shutil.copytree(data, tmp_path / "glue")
    file = moved / f"CoLA/{name}.tsv"
    file.write_text(file.read_text().replace("the", "a", 1))
    before = everything_in(stopped)
    assert main(command("run", "--resume", "--data_dir", str(moved))) == 2
    assert "--data_dir" in error_of(capsys)
    assert everything_in(stopped) == before


def test_resuming_with_other_labels_is_refused(
    stopped: Path, command: Callable, data: Path, tmp_path: Path, capsys
):
    moved = shutil.copytree(data, tmp_path / "glue")
    file = moved / "CoLA/train.tsv"
    file.write_text(file.read_text().replace("\t0\t", "\t1\t", 1))
    assert main(command("run", "--resume", "--data_dir", str(moved))) == 2
    assert "--data_dir" in error_of(capsys)


def test_resuming_with_another_model_is_refused(
    stopped: Path, command: Callable, bert: Path, tmp_path: Path, capsys
):
    other = shutil.copytree(bert, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.bias"][3] += 1e-3
    save_file(weights, other / "model.safetensors")
    before = everything_in(stopped)
    assert main(command("run", "--resume", "--model", str(other))) == 2
    assert f"--model {other}" in error_of(capsys)
    assert everything_in(stopped) == before


def test_model_data_and_run_may_have_moved(
    stopped: Path, command: Callable, bert: Path, data: Path, whole: Path, tmp_path: Path
):
    moved = [str(shutil.copytree(folder, tmp_path / folder.name)) for folder in (bert, data)]
    stopped.rename(tmp_path / "elsewhere")
    assert main(command("elsewhere", "--model", moved[0], "--data_dir", moved[1], "--resume")) == 0
    assert left_by(tmp_path / "elsewhere") == left_by(whole)


def test_a_vanished_data_folder_is_named(stopped: Path, command: Callable, tmp_path: Path, capsys):
    assert main(command("run", "--resume", "--data_dir", str(tmp_path / "gone"))) == 2
    assert str(tmp_path / "gone/CoLA/train.tsv") in error_of(capsys)


@pytest.mark.parametrize("kind", ["stopped", "finished"])
def test_a_run_is_not_replaced_unless_told_to(
    kind: str, command: Callable, request: pytest.FixtureRequest, capsys
):
    folder = request.getfixturevalue(kind)
    before = everything_in(folder)
    assert main(command("run", "--seed", "9")) == 2
    message = error_of(capsys)
    assert "--overwrite" in message
    assert ("--resume" in message) == (kind == "stopped")
    assert everything_in(folder) == before


def test_overwrite_leaves_nothing_of_the_run_before(stopped: Path, command: Callable, whole: Path):
    (stopped / "score_agreement.jsonl").write_text("{}\n")
    for name in ("evaluation.json", "predictions.safetensors"):
        (stopped / name).write_text("of the run before")
    assert main(command("run", "--overwrite")) == 0
    assert left_by(stopped) == left_by(whole)


def test_resume_and_overwrite_exclude_each_other(stopped: Path, command: Callable, capsys):
    before = everything_in(stopped)
    assert main(command("run", "--resume", "--overwrite")) == 2
    assert "leave one out" in error_of(capsys)
    assert everything_in(stopped) == before


def test_a_run_is_not_overwritten_by_one_that_cannot_load(finished: Path, command: Callable, tmp_path: Path):
    before = everything_in(finished)
    assert main(command("run", "--overwrite", "--data_dir", str(tmp_path / "gone"))) == 2
    assert main(command("run", "--overwrite", "--model", str(tmp_path / "gone"))) == 2
    assert main(command("run", "--overwrite", "--targets", "nothing.like.it")) == 2
    assert everything_in(finished) == before


def test_a_run_is_not_overwritten_where_the_new_one_cannot_be_written(
    finished: Path, command: Callable, monkeypatch: pytest.MonkeyPatch, capsys
):
    before = everything_in(finished)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(command("run", "--overwrite", "--seed", "5")) == 2
    assert "No space left on device" in error_of(capsys)
    assert everything_in(finished) == before


@pytest.mark.parametrize("folder", ["run", "run/checkpoint", "run/adapter"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(
    folder: str, stopped: Path, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    access = os.access
    denied = tmp_path / folder
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != denied and access(path, mode))
    monkeypatch.setattr(run_glue, "train", None)
    assert main(command("run", "--resume")) == 2
    assert "--output_dir" in error_of(capsys)


def test_an_output_folder_below_a_file_is_refused_before_anything_is_loaded(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(run_glue, "train", None)
    assert main(command("file/run")) == 2
    assert "--output_dir" in error_of(capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_of_two_processes_in_one_folder_one_is_refused(
    flag: str, stopped: Path, command: Callable, whole: Path, capsys
):
    before = everything_in(stopped)
    with locked(stopped):
        assert main(command("run", flag)) == 2
        assert "another process" in error_of(capsys)
    assert everything_in(stopped) == before
    assert main(command("run", flag)) == 0
    assert left_by(stopped) == left_by(whole)


def test_a_run_holds_the_lock_from_its_beginning_to_its_end(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def second(t: int, settings: Settings) -> float:
        if t in (1, STEPS):
            assert main(command("run", "--resume")) == 2
            assert "another process is writing there" in capsys.readouterr().err
        return learning_rate(t, settings)

    with monkeypatch.context() as patch:
        patch.setattr(run_glue, "learning_rate", second)
        assert main(command("run")) == 0
    with locked(tmp_path / "run"):
        pass


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_what_was_there_whole(
    command: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    sync = os.fsync
    for n in range(6):
        left, folder = [n], tmp_path / f"run-{n}"

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert main(command(folder.name)) == 2
        message = error_of(capsys)
        assert "No space left on device" in message
        assert str(folder) in message
        assert not list(folder.rglob("*.new"))
        assert main(command(folder.name, "--resume")) == 0
        assert left_by(folder) == left_by(whole)


def test_a_disk_that_is_full_amid_a_record_is_one_line(
    command: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    class Full(type(Path())):
        def open(self, *args: object, **kwargs: object):  # half a line gets there
            with super().open(*args, **kwargs) as file:
                file.write('{"step": 17, "lo')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    append = files.append

    def full(path: Path, lines: list[dict]) -> None:
        append(path if lines[0]["step"] < 17 else Full(path), lines)

    with monkeypatch.context() as patch:
        patch.setattr(files, "append", full)
        assert main(command("run")) == 2
    path = tmp_path / "run/metrics.jsonl"
    assert error_of(capsys) == f"run_glue.py: error: {path}: No space left on device"
    assert main(command("run", "--resume")) == 0
    assert left_by(tmp_path / "run") == left_by(whole)


@pytest.mark.slow
def test_a_file_that_cannot_grow_is_one_line(tmp_path: Path):
    """The kernel's own refusal: no file of the run may be larger than 20 kB."""
    argv = [sys.executable, str(HERE / "run_glue.py"), "--demo", "--max_steps", "9", "--output_dir", "run"]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("run_glue.py: error: run/")


# --- not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_a_loss_that_is_not_finite_is_reported_with_step_and_learning_rate(
    optimizer: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    loss, calls = run_glue.task_loss, []

    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return loss(logits, labels) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(run_glue, "task_loss", broken)
    more = ["--lr", "0.001", "--optimizer", optimizer, "--score", "mu"]
    assert main(command("run", *more)) == 3
    lr = 0.001 * (STEPS - 5) / STEPS  # linearly down to 0; no warm-up in 24 updates
    expected = f"the loss is not finite at step 6 (lr {lr:g}); the checkpoint of step 4 is kept; "
    assert error_of(capsys).startswith(f"run_glue.py: {expected}")
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [4]
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3, 4, 5]  # what led there


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_is_reported_too(
    command: Callable, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(run_glue, "task_loss", lambda logits, labels: logits.sum() * float("nan"))
    assert main(command("run")) == 3
    assert "the loss is not finite at step 1 " in error_of(capsys)


@pytest.mark.parametrize(
    "flags", [["--optimizer", "ivon"], ["--optimizer", "adamw"], ["--plain"]], ids=" ".join
)
def test_a_gradient_that_is_not_finite_stops_the_run_at_the_next_checkpoint(
    flags: list[str], command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    where = run_glue.adalora if "--plain" in flags else run_glue.fused
    penalty, calls = where.add_penalty_gradients, []

    def broken(layers: dict, gamma: float, squared: bool) -> None:
        penalty(layers, gamma, squared)
        calls.append(0)
        if len(calls) == 12:
            layers["bert.encoder.layer.1.intermediate.dense"].Q.grad[0, 3] = float("nan")

    monkeypatch.setattr(where, "add_penalty_gradients", broken)
    assert main(command("run", *flags, "--score", "lambda")) == 3
    assert " is not finite at step 12; the checkpoint of step 8 is kept" in error_of(capsys)
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [8, 4]


def break_state(key: str, optimizer: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """In update 8, the one before an evaluation and a checkpoint, an entry is infinite."""
    step, calls = optimizer.step, []

    def broken(self: torch.optim.Optimizer, *args: object) -> None:
        step(self, *args)
        calls.append(0)
        if len(calls) == 8:
            p = self.param_groups[0]["params"][4]
            (p.data if key == "parameter" else self.state[p][key]).view(-1)[0] = float("inf")

    monkeypatch.setattr(optimizer, "step", broken)


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [
        *(("ivon", key) for key in ("parameter", "g", "h")),
        *(("adamw", key) for key in ("parameter", "exp_avg", "exp_avg_sq")),
    ],
)
def test_nothing_that_is_not_finite_gets_into_a_checkpoint_or_the_best_adapter(
    optimizer: str, key: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    kind = {"ivon": run_glue.IVON, "adamw": torch.optim.AdamW}[optimizer]
    break_state(key, kind, monkeypatch)
    assert main(command("run", "--optimizer", optimizer, "--score", "mu")) == 3
    what = (
        "the parameter bert.encoder.layer.0.attention.self.key.lam"
        if key == "parameter"
        else "a tensor of the optimizer"
    )
    assert f"{what} is not finite at step 8; the checkpoint of step 4 is kept" in error_of(capsys)
    assert list(checkpoints(tmp_path / "run/checkpoint").values()) == [4]
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_a_learning_rate_beyond_all_reason_stops_the_run(optimizer: str, command: Callable, capsys):
    assert main(command("run", "--lr", "1e15", "--optimizer", optimizer, "--score", "mu")) == 3
    assert "is not finite at step" in error_of(capsys)


def test_a_second_moment_that_overflows_is_reported(
    command: Callable, monkeypatch: pytest.MonkeyPatch, capsys
):
    """With AdamW: its square overflows where the gradient does not, and the parameter would stand still."""
    loss = run_glue.task_loss
    monkeypatch.setattr(run_glue, "task_loss", lambda logits, labels: loss(logits, labels) * 1e25)
    assert main(command("run", "--optimizer", "adamw", "--score", "mu")) == 3
    assert "a tensor of the optimizer is not finite at step 4" in error_of(capsys)


@pytest.mark.parametrize("flags", [[], ["--optimizer", "adamw", "--score", "sensitivity"]], ids=" ".join)
def test_training_waits_for_the_device_only_to_record_evaluate_or_save(
    flags: list[str], command: Callable, monkeypatch: pytest.MonkeyPatch
):
    """Between evaluations, checkpoints and every 50th update no number is read from a tensor."""
    now, read = [0], []

    def noted(t: int, settings: Settings) -> float:
        now[0] = t
        return learning_rate(t, settings)

    def watch(method: str) -> None:
        original = getattr(torch.Tensor, method)

        def watched(tensor: torch.Tensor, *args: object) -> object:
            if tensor.is_floating_point() and now[0]:
                read.append((now[0], method))
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, method, watched)

    for method in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        watch(method)
    monkeypatch.setattr(run_glue, "learning_rate", noted)
    argv = command("run", "--max_steps", "60", "--checkpoint_every", "35", "--eval_every", "60", *flags)
    assert main(argv) == 0
    assert {step for step, _ in read} == {35, 60}


def test_losses_are_recorded_at_least_every_50_updates(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    append, steps = files.append, []
    monkeypatch.setattr(
        files,
        "append",
        lambda path, new: (steps.append([line["step"] for line in new]), append(path, new)),
    )
    argv = command("run", "--max_steps", "110", "--checkpoint_every", "110", "--eval_every", "110")
    assert main(argv) == 0
    assert [record["step"] for record in records(tmp_path / "run")] == [*range(1, 111), 110]
    assert max(len(written) for written in steps) == 50


# --- files --------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomically(path, b"first")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full") as raised:
        write_atomically(path, b"second")
    assert raised.value.filename == str(path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"first")]


def test_the_last_two_checkpoints_are_kept(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    whole = dict.fromkeys(("progress", "model", "objects", "random"), 0)
    for step in (0, 8, 9, 100):
        save_checkpoint(folder, step, whole)
    assert list(checkpoints(folder).values()) == [100, 9]
    save_checkpoint(folder, 50, whole)  # resumed from step 9: what came later was damaged
    assert list(checkpoints(folder).values()) == [50, 9]
    save_checkpoint(folder, 50, whole | {"more": 1})
    assert list(checkpoints(folder).values()) == [50, 9]
    assert load_checkpoint(folder) == whole | {"more": 1}
    (folder / "step-60-00000000.pt.new").write_bytes(b"half")  # of a process that was killed
    save_checkpoint(folder, 70, {})
    assert sorted(path.name[:7] for path in folder.iterdir()) == ["step-50", "step-70"]


def test_a_folder_without_locks_is_written_to_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with locked(tmp_path):
        pass
