"""What GLUE is: its own layout with its oddities, the counts of the real files, the papers' settings."""

import http.server
import math
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from conftest import FOLDERS, LABELS, write_glue

from harness import glue
from harness.glue import DEMO, TASKS, check_hub, load_task, published
from harness.settings import Settings, task_of
from harness.task import held_out_mask, hold_out

REAL = os.environ.get("GLUE_DIR")


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_from_its_own_layout(task: str, tmp_path: Path):
    splits = load_task(task, write_glue(tmp_path, task))
    dev = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    assert list(splits) == ["train", *dev]
    assert [len(split) for split in splits.values()] == [24, *(12 for _ in dev)]
    train = splits["train"]
    assert train.column_names == [*TASKS[task].text, "label", "idx"]
    expected = [0.0, 1.25, 3.8, 5.0] if task == "stsb" else list(range(len(LABELS[task])))
    assert train["label"][: len(expected)] == expected
    assert train["idx"][:3] == [0, 1, 2]
    assert all(" " in sentence for column in TASKS[task].text for sentence in train[column])


@pytest.mark.skipif(not REAL, reason="GLUE_DIR names no folder with GLUE's own files")
@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("cola", 8551, 1043), ("sst2", 67349, 872), ("stsb", 5749, 1500), ("rte", 2490, 277)],
)
def test_the_real_files_have_the_published_number_of_examples(task: str, train: int, validation: int):
    if not (Path(REAL) / FOLDERS[task]).is_dir():
        pytest.skip(f"GLUE_DIR has no {FOLDERS[task]}")
    splits = load_task(task, REAL)
    assert (len(splits["train"]), len(splits["validation"])) == (train, validation)
    assert train == TASKS[task].train_size


def test_a_quotation_mark_is_a_character_and_merges_no_rows(tmp_path: Path):
    write_glue(tmp_path, "rte")
    rows = [
        "index\tsentence1\tsentence2\tlabel",
        '0\t"He said\tno.\tentailment',
        '1\tYes."\t"no\tnot_entailment',
    ]
    (tmp_path / "RTE/dev.tsv").write_text("\n".join(rows))
    validation = load_task("rte", tmp_path)["validation"]
    assert validation["sentence1"][:] == ['"He said', 'Yes."']
    assert validation["label"][:] == [0, 1]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path):
    path = write_glue(tmp_path, "mrpc") / "MRPC/train.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_task("mrpc", tmp_path)["train"]) == 24


def test_colas_first_row_is_an_example(tmp_path: Path):
    write_glue(tmp_path, "cola")
    (tmp_path / "CoLA/dev.tsv").write_text("gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tRode sailors the.\n")
    validation = load_task("cola", tmp_path)["validation"]
    assert validation["sentence"][:] == ["The sailors rode.", "Rode sailors the."]
    assert validation["label"][:] == [1, 0]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_may_or_may_not_end(end: str, tmp_path: Path):
    path = write_glue(tmp_path, "cola") / "CoLA/dev.tsv"
    path.write_bytes(path.read_bytes().rstrip(b"\n") + end.encode())
    assert len(load_task("cola", tmp_path)["validation"]) == 12


def test_windows_line_ends_are_no_part_of_a_label(tmp_path: Path):
    path = write_glue(tmp_path, "qnli") / "QNLI/train.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_task("qnli", tmp_path)["train"]["label"][:2] == [0, 1]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0b", "\x0c", "\r"])
def test_only_a_line_feed_ends_a_line(odd: str, tmp_path: Path):
    write_glue(tmp_path, "sst2")
    (tmp_path / "SST-2/dev.tsv").write_bytes(f"sentence\tlabel\none{odd}two\t1\n".encode())
    assert load_task("sst2", tmp_path)["validation"]["sentence"][:] == [f"one{odd}two"]


def test_a_row_of_qqp_that_is_cut_short_is_left_out(tmp_path: Path):
    path = write_glue(tmp_path, "qqp") / "QQP/train.tsv"
    path.write_text(path.read_text() + "1\t2\t3\twhy does\nit do this?\twhy\t1\n")
    assert len(load_task("qqp", tmp_path)["train"]) == 24


@pytest.mark.parametrize(
    ("task", "content"),
    [("cola", "index\tsentence\n0\tThe cat.\n"), ("stsb", "index\tsentence1\tsentence2\n0\ta cat\ta dog\n")],
)
def test_a_test_split_is_read_without_labels(task: str, content: str, tmp_path: Path):
    write_glue(tmp_path, task)
    (tmp_path / FOLDERS[task] / "test.tsv").write_text(content)
    test = load_task(task, tmp_path)["test"]
    assert test["label"][:] == [-1]
    assert test[TASKS[task].text[0]][:] == [content.split("\n")[1].split("\t")[1]]


@pytest.mark.parametrize(
    ("task", "line", "row", "message"),
    [
        ("cola", 3, "gj04\t1\tThe cat.", "3 columns, not 4"),
        ("cola", 2, "gj04\t1\t\tThe cat.\tmore", "5 columns, not 4"),
        ("cola", 4, "", "1 columns, not 4"),
        ("cola", 2, "gj04\tyes\t\tThe cat.", "'yes' is not a label of cola (0, 1)"),
        ("rte", 2, "0\ta\tb\tentailed", "'entailed' is not a label of rte"),
        ("mnli", 5, "\t".join("x" * 11) + "\t-", "'-' is not a label of mnli"),
        ("stsb", 3, "\t".join("x" * 9) + "\tnan", "'nan' is not a score from 0 to 5"),
        ("stsb", 3, "\t".join("x" * 9) + "\t5.1", "'5.1' is not a score from 0 to 5"),
        ("stsb", 3, "\t".join("x" * 9) + "\tgood", "'good' is not a score from 0 to 5"),
        ("sst2", 1, "text\tlabel", "there is no column 'sentence'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(task: str, line: int, row: str, message: str, tmp_path: Path):
    path = write_glue(tmp_path, task) / FOLDERS[task] / "train.tsv"
    rows = path.read_text().split("\n")
    rows[line - 1] = row
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        load_task(task, tmp_path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"sentence\tlabel\n"])
def test_an_empty_split_is_an_error(content: bytes, tmp_path: Path):
    path = write_glue(tmp_path, "sst2") / "SST-2/dev.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"dev\.tsv"):
        load_task("sst2", tmp_path)


def test_a_file_that_is_not_utf_8_is_an_error(tmp_path: Path):
    path = write_glue(tmp_path, "sst2") / "SST-2/dev.tsv"
    path.write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: not UTF-8"):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize("missing", ["train", "dev_mismatched"])
def test_a_missing_file_is_an_error_that_names_it(missing: str, tmp_path: Path):
    path = write_glue(tmp_path, "mnli") / "MNLI" / f"{missing}.tsv"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        load_task("mnli", tmp_path)


# --- the Hub ------------------------------------------------------------------------------------------------


def test_without_a_folder_the_hubs_copy_is_loaded(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(glue, "check_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or {"train": "rows"})
    assert load_task("cola") == {"train": "rows"}
    assert asked == [("nyu-mll/glue", "cola")]


@pytest.mark.parametrize("silent", [True, False], ids=["a Hub that never answers", "a Hub that is not there"])
def test_a_missing_hub_is_found_out_within_seconds(silent: bool, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=address):
            check_hub()
        assert time.monotonic() - start < 8


@pytest.mark.parametrize("status", [200, 404])
def test_a_hub_that_answers_is_there(status: int, monkeypatch: pytest.MonkeyPatch):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        check_hub()
        server.shutdown()


# --- settings -----------------------------------------------------------------------------------------------

# The papers' table. Warm-up: AdamW's, IVON's. First phase: its learning rate and the update it ends at.
PAPERS = """
task  length epochs  lr(AdamW) warm-up   lr(IVON) first-phase alpha  gamma  t_i  t_f   dT  evaluate
cola   64    25      8e-4       100 100  0.4      2.0 500     32     0.1    800  3500  10  100
stsb  128    25      2.2e-3     100 100  0.4      2.0 500     32     0.3    800  2000  10  100
mrpc  320    30      1e-3       100 100  0.5      2.0 400     32     0.1    600  1800   1  300
rte   320    50      1.2e-3     200 100  0.5      2.0 400     32     0.3    600  1800   1  100
sst2  128    24      8e-4      1000 500  0.4      0     0     16     0.1   6000 22000 100 3000
qnli  512     5      5e-4       500 500  0.4      0     0     32     0.1   2000  8000 100 1000
qqp   320     5      8e-4      2000 500  0.4      0     0     16     0.1   8000 25000 100 3000
mnli  256     7      5e-4      1000 500  0.4      0     0     16     0.1   8000 50000 100 2000
"""
ROWS = {row.split()[0]: [float(x) for x in row.split()[1:]] for row in PAPERS.strip().splitlines()[1:]}
SHARED = ("max_length", "epochs", "alpha", "orth", "tinit", "tfinal", "delta_t", "eval_every")
IVON = {"hess_init": 1, "beta2": 0.99999, "weight_decay": 1e-8, "clip_radius": 1e-3, "mc_samples": 1}
ONE_PHASE = {"first_lr": 0, "first_steps": 0}


def of_ours(task: str, method: str, optimizer: str) -> dict[str, float]:
    """Without the run's length, which follows from the examples in train and the epochs."""
    settings = published(task, method, optimizer)
    assert settings["train_size"] == TASKS[task].train_size
    assert settings["total_steps"] == settings["epochs"] * math.ceil(TASKS[task].train_size / 32)
    return {name: x for name, x in settings.items() if name not in ("train_size", "total_steps")}


def of_papers(task: str, optimizer: str) -> dict[str, float]:
    length, epochs, adamw, adamw_warmup, warmup, lr, first_lr, first_steps, *rest = ROWS[task]
    shared = dict(zip(SHARED, (length, epochs, *rest), strict=True))
    if optimizer == "adamw":
        return shared | ONE_PHASE | {"lr": adamw, "warmup_steps": adamw_warmup, "weight_decay": 0}
    first = {"first_lr": first_lr, "first_steps": first_steps}
    return shared | IVON | first | {"lr": lr, "warmup_steps": warmup}


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
@pytest.mark.parametrize("task", ROWS)
def test_adalora_has_the_papers_settings(task: str, optimizer: str):
    assert of_ours(task, "adalora", optimizer) == of_papers(task, optimizer)


@pytest.mark.parametrize("task", ROWS)
def test_lora_with_adamw_has_the_published_learning_rate_and_the_tasks_epochs(task: str):
    assert of_ours(task, "lora", "adamw") == of_papers(task, "adamw") | {"lr": 2e-4, "alpha": 32}


@pytest.mark.parametrize("task", ROWS)
def test_lora_with_ivon_has_the_settings_that_the_search_found(task: str):
    settings = published(task, "lora", "ivon")
    assert (settings["hess_init"], settings["beta2"], settings["ess"]) == (1e-4, 0.999, 1e8)
    assert (settings["lr"], settings["largest_step"], settings["first_steps"]) == (None, 3e-4, 0)
    assert (settings["alpha"], settings["weight_decay"], settings["clip_radius"]) == (32, 1e-8, 1e-3)
    assert settings["epochs"] == of_papers(task, "ivon")["epochs"]


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
@pytest.mark.parametrize("task", ROWS)
def test_full_fine_tuning_has_its_own_learning_rate_and_epochs(task: str, optimizer: str):
    paper = of_papers(task, optimizer)
    own = {"lr": 1.5e-5 if task == "mnli" else 2e-5, "weight_decay": 0}
    if optimizer == "ivon":
        own = {"lr": 0.1, "weight_decay": 1e-5}
    epochs = {"sst2": 6, "qnli": 4}.get(task, paper["epochs"])
    assert of_ours(task, "full", optimizer) == paper | ONE_PHASE | own | {"epochs": epochs}


@pytest.mark.parametrize(
    ("task", "steps"),
    {
        "cola": 6700, "sst2": 50520, "mrpc": 3450, "stsb": 4500,
        "qqp": 56855, "mnli": 85904, "qnli": 16370, "rte": 3900,
    }.items(),
)  # fmt: skip
def test_the_papers_runs_have_this_many_updates(task: str, steps: int):
    assert TASKS[task].settings("adalora", "ivon")["total_steps"] == steps


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_pruning_fits_into_their_runs(task: str):
    settings = published(task, "adalora", "ivon")
    assert settings["tinit"] + settings["tfinal"] < TASKS[task].settings("adalora", "ivon")["total_steps"]
    assert settings["warmup_steps"] <= (settings["first_steps"] or settings["tinit"])


@pytest.mark.parametrize(
    ("task", "train", "metric"),
    [
        ("cola", 8551, "matthews_correlation"),
        ("sst2", 67349, "accuracy"),
        ("mrpc", 3668, "accuracy"),
        ("stsb", 5749, "pearson_spearman"),
        ("qqp", 363846, "accuracy"),
        ("mnli", 392702, "accuracy"),
        ("qnli", 104743, "accuracy"),
        ("rte", 2490, "accuracy"),
    ],
)
def test_every_task_has_its_size_and_the_metric_that_decides(task: str, train: int, metric: str):
    assert (TASKS[task].train_size, TASKS[task].metric) == (train, metric)
    labels = [0.0, 1.5, 5.0] if task == "stsb" else [0, 1, 0]
    assert next(iter(TASKS[task].metrics(labels, labels))) == metric


def test_mnli_is_judged_on_matched_sentences():
    assert TASKS["mnli"].validation == ("validation_matched", "validation_mismatched")


def test_the_demo_is_cola_at_other_settings():
    own = {"settings": None, "train_size": 0, "model": ""}
    assert replace(DEMO, **own) == replace(TASKS["cola"], **own)


@pytest.mark.parametrize("method", ["adalora", "lora", "full"])
def test_the_demo_has_the_size_of_its_file_and_lasts_its_epochs(method: str):
    lines = (Path(glue.__file__).parents[1] / "demo/CoLA/train.tsv").read_text(encoding="utf-8").splitlines()
    assert DEMO.train_size == len(lines)
    epochs = DEMO.settings(method, "ivon")["epochs"]
    assert DEMO.settings(method, "ivon")["total_steps"] == epochs * math.ceil(len(lines) / 32)


# --- a share of train held out ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_a_held_out_share_of_train_is_validation_and_the_rest_is_train(task: str, tmp_path: Path):
    write_glue(tmp_path, task, train=200)
    held = hold_out(TASKS[task], 0.1, 0)
    whole = load_task(task, tmp_path)
    data = held.load(tmp_path, ("train", "holdout"))
    assert {name: len(split) for name, split in data.items()} == {"train": 180, "holdout": 20}
    assert sorted([*data["train"]["idx"], *data["holdout"]["idx"]]) == list(range(200))
    assert all(row == whole["train"][row["idx"]] for split in data.values() for row in split)
    assert held.validation == ("holdout",)
    assert list(held.load(tmp_path, ["validation"])["validation"]) == list(whole["validation"])


def test_the_held_out_share_is_stratified_and_the_same_for_the_same_seed():
    labels = np.random.default_rng(0).choice([0, 1, 1, 1, 2], size=8551)
    held = held_out_mask(labels, 0.1, 0)
    assert held.sum() == 855
    for label in range(3):
        assert abs(held[labels == label].sum() - 0.1 * (labels == label).sum()) <= 1
    assert (held == held_out_mask(labels, 0.1, 0)).all()
    assert (held != held_out_mask(labels, 0.1, 1)).any()
    assert hold_out(TASKS["cola"], 0.1, 0).train_size == 8551 - 855


def test_the_held_out_share_depends_on_its_own_seed_and_not_on_the_runs(tmp_path: Path):
    def held(seed: int, holdout_seed: int) -> list[int]:
        settings = Settings(task="cola", holdout=0.25, seed=seed, holdout_seed=holdout_seed)
        return task_of(settings).load(tmp_path, ["holdout"])["holdout"]["idx"][:]

    write_glue(tmp_path, "cola", train=200)
    assert held(1, 0) == held(2, 0)
    assert held(1, 0) != held(1, 1)


def test_a_regressions_held_out_share_has_its_scores_quantiles():
    scores = np.random.default_rng(0).uniform(0, 5, size=5749)
    held = held_out_mask(scores, 0.1, 3)
    quantiles = np.linspace(0, 1, 11)
    assert np.quantile(scores[held], quantiles) == pytest.approx(np.quantile(scores, quantiles), abs=0.02)
