"""Every setting once: flags and help, roles, config.json, what follows from what, the learning rate."""

import contextlib
import json
import math
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_glue
from hypothesis import given
from hypothesis import strategies as st

import run_glue
from harness import glue
from harness.run_folder import check_same
from harness.settings import IDENTITY, NOTHING, NUMERICS, SHAPE, TASKS, Settings, exit_status, learning_rate
from harness.task import EndsRun, UsageError
from ivon import IVON
from scores import SCORES

REPO = Path(run_glue.__file__).parent
FLAGS = {f.name: f for f in fields(Settings) if f.metadata["group"]}
DERIVED = [f.name for f in fields(Settings) if not f.metadata["group"]]
MAPS = ["query", "value"]


def parsed(*argv: str) -> Settings:
    return Settings.from_command_line(list(argv), "about")


def of_run(*argv: str, task: str = "cola", train_size: int | None = None) -> Settings:
    """The settings of a run on the task's own number of examples."""
    return parsed("--task", task, *argv).resolve(train_size or glue.TASKS[task].train_size, MAPS)


# --- flags and fields ---------------------------------------------------------------------------------------


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_setting_with_a_group_is_a_flag_in_the_help_under_its_group(help_text: str):
    found: dict[str, list[str]] = {}
    for line in help_text.splitlines():
        if heading := re.fullmatch(r"(\S.*):", line):
            found[heading[1]] = []
        elif flag := re.match(r"  --(\w+)", line):
            found[list(found)[-1]].append(flag[1])
    expected: dict[str, list[str]] = {}
    for name, f in FLAGS.items():
        expected.setdefault(f.metadata["group"], []).append(name)
    assert {group: names for group, names in found.items() if names} == expected
    assert {"the run", "IVON", "adapters", "AdaLoRA", "evaluation", "device and files"} <= set(expected)


def test_the_help_names_every_score_task_and_default(help_text: str):
    words = " ".join(help_text.split())
    assert all(name in words and " ".join(score.about.split()) in words for name, score in SCORES.items())
    assert all(task in words for task in TASKS)
    assert all(f"({f.default})" in words for f in FLAGS.values() if f.default)


@pytest.mark.parametrize("name", DERIVED)
def test_what_follows_from_other_settings_has_no_flag(name: str):
    with pytest.raises(UsageError, match=f"--{name}"):
        parsed("--demo", f"--{name}", "1")


def test_a_setting_that_is_not_given_is_none_or_has_its_default():
    s = parsed("--task", "cola")
    assert (s.seed, s.batch_size, s.grad_accum, s.eval_batch_size, s.eval_samples) == (2021, 32, 1, 128, 0)
    assert (s.method, s.optimizer, s.score) == ("adalora", "ivon", "mu")
    assert (s.target_rank, s.init_rank, s.dropout) == (2, 3, 0)
    assert s.model == "microsoft/deberta-v3-base"
    assert (s.lr, s.ess, s.tinit, s.total_steps) == (None, None, None, None)


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        parsed("--demo").seed = 1


def test_resolving_leaves_the_unresolved_settings_as_they_were():
    s = parsed("--demo")
    before = asdict(s)
    assert s.resolve(2400, MAPS) != s
    assert asdict(s) == before


# --- roles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", fields(Settings), ids=lambda f: f.name)
def test_every_setting_has_a_role(field):
    assert field.metadata["role"] in (IDENTITY, SHAPE, NUMERICS, NOTHING)


@pytest.mark.parametrize("field", fields(Settings), ids=lambda f: f.name)
def test_a_run_is_resumed_only_with_the_settings_that_have_influence_unchanged(field):
    config = json.loads(json.dumps(vars(of_run("--device", "cpu")), default=str))
    check_same(config, dict(config), Path("folder"))
    before = config | {field.name: "something else"}
    refused = field.metadata["role"] != NOTHING
    named = {"processes": "torchrun's processes", "total_steps": "--max_steps"}.get(field.name, field.name)
    expected = pytest.raises(UsageError, match=f"{named} is ") if refused else contextlib.nullcontext()
    with expected:
        check_same(config, before, Path("folder"))


def test_a_run_may_be_resumed_on_another_gpu_but_not_on_another_kind_of_device():
    config = vars(of_run()) | {"device": "cuda:1"}
    check_same(config, config | {"device": "cuda"}, Path("folder"))
    with pytest.raises(UsageError, match="--device is cuda, but was cpu"):
        check_same(config, config | {"device": "cpu"}, Path("folder"))


@pytest.mark.parametrize(("name", "said"), [("encoder", "--model"), ("data", "--data_dir")])
def test_a_run_is_resumed_only_with_the_same_weights_and_data(name: str, said: str):
    config = {**vars(of_run()), "encoder": "01234567", "data": "89abcdef"}
    with pytest.raises(UsageError, match=said):
        check_same(config, config | {name: "fedcba98"}, Path("folder"))


# --- config.json --------------------------------------------------------------------------------------------

COMMANDS = {
    "a default run": ["--task", "rte"],
    "the demo": ["--demo"],
    "lora": ["--task", "cola", "--method", "lora", "--optimizer", "adamw", "--data_dir", "some/glue"],
    "full": ["--task", "stsb", "--method", "full"],
    "much by hand": "--task mnli --targets query value --score snr --target_rank 0.5 --init_rank 2 --lr 0.1 "
    "--track_scores --squared_orth --eval_samples 4 --temperature 0.5 --output_dir x --plain --bf16".split(),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("resolved", [False, True], ids=["unresolved", "resolved"])
def test_settings_survive_config_json(resolved: bool, command: str):
    s = parsed(*COMMANDS[command])
    s = s.resolve(1000, MAPS) if resolved else s
    config = json.loads(json.dumps(vars(s), default=str))
    assert Settings.from_config(config | {"versions": {}, "encoder": "01234567"}) == s


def test_a_run_writes_the_settings_it_ran_with(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    used = []
    monkeypatch.setattr(run_glue, "report", lambda _results, settings: used.append(settings))
    data, folder = write_glue(tmp_path / "glue", "cola"), tmp_path / "run"
    where = ["--model", str(bert), "--data_dir", str(data), "--output_dir", str(folder)]
    run_glue.main(["--task", "cola", *where, "--max_steps", "4", "--max_length", "16"])
    (settings,) = used
    assert Settings.from_config(json.loads((folder / "config.json").read_text())) == settings
    assert (settings.total_steps, settings.ess, settings.output_dir) == (4, 24, folder)


# --- what is given, and what follows ------------------------------------------------------------------------

GIVEN = {
    "seed": st.integers(0, 2**63 - 1),
    "batch_size": st.integers(1, 64),
    "grad_accum": st.integers(1, 4),
    "max_length": st.integers(4, 512),
    "lr": st.floats(1e-6, 10),
    "weight_decay": st.floats(0, 1),
    "mc_samples": st.integers(1, 4),
    "ess": st.floats(1, 1e12),
    "hess_init": st.floats(1e-6, 10),
    "beta2": st.floats(0, 1),
    "clip_radius": st.floats(1e-6, 10),
    "alpha": st.floats(0.5, 64),
    "dropout": st.floats(0, 0.9),
    "init_rank": st.integers(2, 8),
    "orth": st.floats(0, 1),
    "tinit": st.integers(0, 20),
    "tfinal": st.integers(0, 20),
    "delta_t": st.integers(1, 200),
    "eval_every": st.integers(1, 500),
    "checkpoint_every": st.integers(1, 500),
    "max_steps": st.integers(50, 20_000),
    "targets": st.lists(st.sampled_from(["key", "output.dense"]), min_size=1, unique=True),
}


@given(chosen=st.fixed_dictionaries({}, optional=GIVEN), task=st.sampled_from(sorted(glue.TASKS)))
def test_resolving_keeps_whatever_was_given(chosen: dict, task: str):
    argv = []
    for name, value in chosen.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [repr(value)])]
    s = parsed("--task", task, *argv)
    resolved = s.resolve(TASKS[task].train_size, MAPS)
    for name, value in chosen.items():
        assert getattr(resolved, name) == getattr(s, name) == value
    assert [
        name for name, value in vars(s).items() if value is not None and getattr(resolved, name) != value
    ] == []


@pytest.mark.parametrize("task", glue.TASKS)
def test_the_papers_own_run_has_the_papers_own_settings(task: str):
    s, paper = of_run(task=task), glue.published(task, "adalora", "ivon")
    assert {name: getattr(s, name) for name in paper} == paper
    assert s.total_steps == glue.TASKS[task].settings("adalora", "ivon")["total_steps"]
    assert s.ess == glue.TASKS[task].train_size
    assert (s.init_rank, s.target_rank, s.score, s.batch_size) == (3, 2, "mu", 32)


@pytest.mark.parametrize("task", glue.TASKS)
def test_adaloras_own_run_has_adamws_settings_and_one_phase(task: str):
    s = of_run("--optimizer", "adamw", "--score", "sensitivity", task=task)
    paper = glue.published(task, "adalora", "adamw")
    assert {name: getattr(s, name) for name in paper} == paper
    assert (s.weight_decay, s.first_steps, s.mc_samples) == (0, 0, 1)
    assert (s.ess, s.hess_init, s.beta2, s.clip_radius) == (None,) * 4


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("task", glue.TASKS)
def test_the_baselines_have_their_own_settings_and_no_pruning(task: str, method: str, optimizer: str):
    s, size = of_run("--method", method, "--optimizer", optimizer, task=task), glue.TASKS[task].train_size
    paper = glue.published(task, method, optimizer)
    assert s.total_steps == paper["epochs"] * math.ceil(size / 32)
    assert s.warmup_steps == paper["warmup_steps"]
    assert s.alpha == (32 if method == "lora" else None)
    assert (s.tinit, s.tfinal, s.delta_t, s.orth, s.score, s.first_steps) == (None, None, None, None, None, 0)
    if (method, optimizer) == ("lora", "ivon"):
        assert s.lr == 3000
        assert s.lr * s.hess_init * s.clip_radius == pytest.approx(3e-4)
    else:
        assert (s.lr, s.weight_decay) == (paper["lr"], paper["weight_decay"])


@pytest.mark.parametrize(
    ("flags", "lr"),
    [
        (["--hess_init", "3e-4"], 1000),  # 3e-4 / (3e-4 · 1e-3)
        (["--hess_init", "7e-3"], 42.9),  # to three digits
        (["--weight_decay", "1e-3"], 273),  # 3e-4 / ((1e-4 + 1e-3) · 1e-3)
        (["--hess_init", "1e-3", "--clip_radius", "3e-3"], 100),
        (["--clip_radius", "1e-2"], 300),
        (["--hess_init", "3e-4", "--lr", "5"], 5),
    ],
)
def test_lora_with_ivon_has_a_learning_rate_that_keeps_its_largest_step(flags: list[str], lr: float):
    assert of_run("--method", "lora", "--optimizer", "ivon", *flags).lr == lr


def test_lora_with_ivon_runs_with_an_h0_of_ones_own(bert: Path, tmp_path: Path):
    data, folder = write_glue(tmp_path / "glue", "cola"), tmp_path / "run"
    where = ["--model", str(bert), "--data_dir", str(data), "--output_dir", str(folder)]
    argv = ["--task", "cola", "--method", "lora", "--optimizer", "ivon", "--hess_init", "3e-4"]
    run_glue.main([*argv, *where, "--max_steps", "4", "--max_length", "16"])
    assert json.loads((folder / "config.json").read_text())["lr"] == 1000


def test_a_shortened_run_scales_its_phases_and_its_budget_with_it():
    s = of_run("--epochs", "10")
    assert (s.total_steps, s.tinit, s.tfinal, s.delta_t) == (2680, 320, 1400, 4)
    assert (s.warmup_steps, s.first_steps) == (40, 200)
    assert (s.lr, s.first_lr) == (0.4, 2.0)


@pytest.mark.parametrize("flags", [["--batch_size", "64"], ["--grad_accum", "2"]])
def test_larger_batches_make_a_run_shorter(flags: list[str]):
    s = of_run(*flags)
    assert s.total_steps == 25 * 134 == 6700 // 2
    assert (s.tinit, s.tfinal, s.delta_t, s.first_steps) == (400, 1750, 5, 250)


def test_fewer_examples_than_published_make_a_run_shorter():
    s = of_run(train_size=320)
    assert (s.total_steps, s.tinit, s.tfinal, s.delta_t) == (250, 29, 130, 1)  # 800, 3500 · 250 / 6700
    assert s.ess == 320


def test_processes_share_the_batches_of_an_epoch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    s = of_run("--device", "cpu")
    assert (s.processes, s.total_steps) == (4, 25 * 67)


def test_what_is_given_by_hand_is_not_scaled():
    s = of_run("--max_steps", "670", "--tinit", "9", "--tfinal", "99", "--delta_t", "7", "--lr", "0.3")
    assert (s.tinit, s.tfinal, s.delta_t, s.lr, s.first_steps) == (9, 99, 7, 0.3, 0)


def test_more_updates_than_can_be_counted_are_refused():
    with pytest.raises(UsageError, match="--epochs 25 makes 2500000000 updates"):
        parsed("--task", "cola", "--batch_size", "1").resolve(10**8)


def test_with_max_steps_the_epochs_are_as_many_as_that_is():
    s = of_run("--max_steps", "670", "--epochs", "99")
    assert (s.total_steps, s.epochs) == (670, 2.5)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_any_length_can_be_planned(task: str):
    s, size = parsed("--task", task), TASKS[task].train_size
    for steps in range(1, 400):
        of_length = replace(s, max_steps=steps).resolve(size)
        assert of_length.tinit + of_length.tfinal < of_length.total_steps == steps
        assert of_length.delta_t >= 1


@pytest.mark.parametrize(
    ("target", "initial"), [("2", 3), ("4", 6), ("1", 2), ("3", 5), ("0.1", 1), ("0", 0), ("0.25", 1)]
)
def test_the_start_is_one_and_a_half_times_the_target(target: str, initial: int):
    assert parsed("--task", "cola", "--target_rank", target).init_rank == initial


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--task", "cola"], "cola-adalora-ivon-mu-r2-s2021"),
        (["--task", "rte", "--target_rank", "0.25", "--seed", "3"], "rte-adalora-ivon-mu-r0.25-s3"),
        (["--task", "cola", "--method", "lora", "--optimizer", "adamw"], "cola-lora-adamw-r2-s2021"),
        (["--task", "cola", "--method", "full"], "cola-full-ivon-s2021"),
        (["--demo"], "demo-adalora-ivon-mu-r2-s2021"),
        (["--demo", "--task", "cola", "--seed", "7"], "demo-adalora-ivon-mu-r2-s7"),
    ],
)  # fmt: skip
def test_the_output_folder_is_named_after_the_run(flags: list[str], folder: str):
    assert parsed(*flags).output_dir == Path("runs") / folder


def test_a_demo_is_not_in_the_way_of_the_run_on_the_real_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run_glue.main(["--demo", "--max_steps", "2"])
    real = ["--task", "cola", "--optimizer", "ivon", "--score", "mu", "--max_steps", "2"]
    run_glue.main([*real, "--model", str(REPO / "demo/model"), "--data_dir", str(REPO / "demo")])
    config = {
        path.name: json.loads((path / "config.json").read_text()) for path in (tmp_path / "runs").iterdir()
    }
    assert {name: c["demo"] for name, c in config.items()} == {
        "cola-adalora-ivon-mu-r2-s2021": False,
        "demo-adalora-ivon-mu-r2-s2021": True,
    }


# --- where they go ------------------------------------------------------------------------------------------


def optimizer_of(*argv: str) -> torch.optim.Optimizer:
    model = torch.nn.Linear(2, 2)
    return run_glue.make_optimizer(model, of_run(*argv))


def test_ivon_gets_its_settings():
    values = {"lr": 0.3, "ess": 500.0, "hess_init": 0.02, "beta2": 0.99, "weight_decay": 1e-3}
    values |= {"mc_samples": 3, "clip_radius": 0.05}
    optimizer = optimizer_of(*(word for name, value in values.items() for word in (f"--{name}", str(value))))
    assert isinstance(optimizer, IVON)
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in values if name in group} == {
        name: value for name, value in values.items() if name in group
    }
    p = group["params"][0]
    assert torch.allclose(optimizer.sigma(p), torch.full_like(p, (500 * (0.02 + 1e-3)) ** -0.5), rtol=1e-6)


def test_adamw_gets_its_settings():
    optimizer = optimizer_of(
        "--optimizer", "adamw", "--score", "lambda", "--lr", "0.02", "--weight_decay", "0.1"
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.1)


# --- the learning rate --------------------------------------------------------------------------------------


def schedule(total: int, warmup: int, lr: float, first_lr: float = 0.0, first_steps: int = 0) -> Settings:
    phases = {"first_lr": first_lr, "first_steps": first_steps}
    return Settings(task="cola", total_steps=total, warmup_steps=warmup, lr=lr, **phases)


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (6700, 100), (7, 0), (5, 4)])
def test_one_phase_is_the_linear_schedule_of_transformers(total: int, warmup: int):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    s = schedule(total, warmup, 0.4)
    for t in range(1, total + 1):
        assert learning_rate(t, s) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_two_phases_are_warm_up_hold_drop_and_decay():
    """CoLA's with IVON, worked by hand: up to 2.0 in 100 updates, held until 500, 0.4 down to 0 at 6700."""
    s = schedule(6700, 100, 0.4, 2.0, 500)
    done = {0: 0, 50: 1.0, 100: 2.0, 499: 2.0, 500: 0.4, 3600: 0.2, 6699: 0.4 / 6200}
    for updates, expected in done.items():
        assert learning_rate(updates + 1, s) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["adalora", "lora", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
@pytest.mark.parametrize("task", TASKS)
def test_the_learning_rate_is_never_negative_and_ends_near_0(task: str, optimizer: str, method: str):
    score = ["--score", "lambda"] if method == "adalora" else []
    s = parsed("--task", task, "--method", method, "--optimizer", optimizer, *score)
    s = s.resolve(TASKS[task].train_size)
    rates = [learning_rate(t, s) for t in range(1, s.total_steps + 1)]
    assert min(rates[1:]) > 0
    assert rates[-1] < s.lr / 100
    assert max(rates) == pytest.approx(max(s.lr, s.first_lr), rel=1e-12)


# --- exit status --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("--lr is missing:\n  give one"), 2, "x.py: error: --lr is missing: give one\n"),
        (EndsRun("not finite", 3), 3, "x.py: not finite\n"),
        (OSError(28, "No space left on device", "a/b"), 2, "x.py: error: a/b: No space left on device\n"),
        (ConnectionError("no answer"), 2, "x.py: error: no answer\n"),
        (KeyboardInterrupt(), 130, "x.py: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_ends_a_program_is_a_status_and_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture
):
    def main() -> None:
        raise error

    assert exit_status(main, "x.py") == status
    assert capsys.readouterr().err == said


def test_out_of_memory_names_the_flags_that_help(capsys: pytest.CaptureFixture):
    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")

    assert exit_status(main, "x.py") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(flag in said for flag in ("--batch_size", "--grad_accum", "--eval_batch_size"))


def test_a_mistake_in_the_program_is_not_hidden():
    def main() -> None:
        raise TypeError("a mistake")

    with pytest.raises(TypeError):
        exit_status(main, "x.py")
    assert exit_status(lambda: None, "x.py") == 0
