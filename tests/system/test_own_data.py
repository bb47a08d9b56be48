"""Files of one's own: read, trained on, evaluated, predicted, exported, resumed; refusals by row."""

import csv
import json
import math
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import sentences, write_glue
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig

import run_glue
from harness.glue import load_task
from harness.own_data import describe, load, read_examples
from harness.settings import exit_status
from harness.task import UsageError
from tools import evaluate, export, reproduce

SHORT = ["--max_steps", "12", "--eval_every", "6", "--batch_size", "8", "--max_length", "16"]
TEXTS = sentences(24)
MOODS = ["sad", "glad", "mad"]


def write_csv(path: Path, header: list[str], rows: list[list]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def moods(tmp_path: Path) -> list[str]:
    """The flags of a run on three classes."""
    rows = [[text, MOODS[i % 3]] for i, text in enumerate(TEXTS)]
    for name, n in (("train", 24), ("dev", 9)):
        write_csv(tmp_path / f"{name}.csv", ["text", "label"], rows[:n])
    write_csv(tmp_path / "test.csv", ["text"], [[text] for text in TEXTS[:5]])
    files = [f"--{split}_file={tmp_path}/{name}.csv" for split, name in SPLITS.items()]
    return [*files, "--name", "moods"]


SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def run(argv: list[str]) -> int:
    return exit_status(lambda: run_glue.main(argv), "run_glue.py")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# --- reading ------------------------------------------------------------------------------------------------


def as_csv(path: Path, rows: list[dict]) -> Path:
    pd.DataFrame(rows).to_csv(path.with_suffix(".csv"), index=False)
    return path.with_suffix(".csv")


def as_tsv(path: Path, rows: list[dict]) -> Path:
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    path.with_suffix(".tsv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    return path.with_suffix(".tsv")


def as_json_lines(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    path.with_suffix(".jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    return path.with_suffix(".jsonl")


def as_parquet(path: Path, rows: list[dict]) -> Path:
    pd.DataFrame(rows).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


FORMS = [as_csv, as_tsv, as_json_lines, as_parquet]
ANY_LANGUAGE = [
    'she said "no", twice',
    "Ça n'est pas e\u0301gal à cela\u0308",  # combining characters
    "هذه جملة، من اليمين",  # right to left
    "これは文です。",
    "नमस्ते दुनिया 👩‍🚀",
    "one\u2028line, by Unicode's reckoning two",
    "NA",
    "2024-01-01",
]


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("labels", [["no", "yes"], [1, 0], [0.5, 2.0]])
def test_every_format_gives_the_same_text_and_labels(write: Callable, labels: list, tmp_path: Path):
    rows = [{"text": text, "label": labels[i % 2]} for i, text in enumerate(ANY_LANGUAGE)]
    path = write(tmp_path / "train", rows)
    columns, names, n = describe(path, None, False)
    assert (columns, n) == (["text", "label"], 8)
    assert names == {"no": ["no", "yes"], 1: ["0", "1"], 0.5: []}[labels[0]]
    data = load({"train": path}, columns, names)["train"]
    assert data["text1"][:] == ANY_LANGUAGE
    assert data["label"][:2] == ({"no": [0, 1], 1: [1, 0], 0.5: [0.5, 2.0]}[labels[0]])
    assert data["idx"][:] == list(range(8))


def test_a_csv_field_may_have_commas_quotation_marks_and_line_ends(tmp_path: Path):
    text = 'He said: "Line one,\nline two."'
    path = write_csv(tmp_path / "x.csv", ["text", "label"], [[text, "a"], ["b", "b"], ["c", "c", "d"]])
    with pytest.raises(UsageError, match=r"x.csv:5: 3 fields, not 2 \(text, label\)"):
        list(read_examples(path, ["text", "label"], ["a", "b"], True))
    path = write_csv(tmp_path / "x.csv", ["text", "label"], [[text, "a"], ["b", "b"]])
    assert [row["text1"] for row in read_examples(path, ["text", "label"], ["a", "b"], True)] == [text, "b"]


def test_classes_that_datasets_stored_as_numbers_have_their_names(tmp_path: Path):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["worse", "better"])})
    path = tmp_path / "x.parquet"
    Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, 0]}, features=kinds).to_parquet(path)
    _, names, _ = describe(path, None, False)
    assert names == ["better", "worse"]
    assert load({"train": path}, ["text", "label"], names)["train"]["label"][:] == [1, 0, 0, 1]


def test_classes_are_in_numerical_order_and_only_a_decimal_point_makes_numbers(tmp_path: Path):
    rows = [["a", "10"], ["b", "9"], ["c", "10"], ["d", "9"]]
    path = write_csv(tmp_path / "x.csv", ["text", "label"], rows)
    assert describe(path, None, False)[1] == ["9", "10"]
    assert describe(path, None, True)[1] == []
    write_csv(path, ["text", "label"], [*rows, ["e", "9.5"]])
    assert describe(path, None, False)[1] == []


@pytest.mark.parametrize(
    ("header", "named", "found"),
    [
        (["label", "sentence2", "sentence1"], None, ["sentence1", "sentence2", "label"]),
        (["sentence1", "label"], None, ["sentence1", "label"]),
        (["text", "label", "sentence"], None, ["sentence", "label"]),
        (["q", "a", "right"], ["q", "a", "right"], ["q", "a", "right"]),
    ],
)
def test_columns_are_found_or_named(header: list, named: list | None, found: list, tmp_path: Path):
    path = write_csv(tmp_path / "x.csv", header, [[c] * len(header) for c in "1010"])
    assert describe(path, named, False)[0] == found


def test_columns_may_have_names_that_the_program_uses(tmp_path: Path):
    path = write_csv(tmp_path / "x.csv", ["idx", "label", "text1"], [["a", "b", "1"], ["c", "d", "2"]])
    data = load({"train": path}, ["label", "idx", "text1"], ["1", "2"])["train"]
    assert data[0] == {"text1": "b", "text2": "a", "label": 0, "idx": 0}


@pytest.mark.parametrize(("labels", "no_label"), [(["no", "yes"], -1), ([], math.nan)])
def test_a_test_file_may_have_no_labels_or_placeholders(labels: list, no_label: float, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    label = "no" if labels else "0.5"
    rows = [
        {"text": "a"},
        {"text": "b", "label": ""},
        {"text": "c", "label": None},
        {"text": "d", "label": label},
    ]
    rows += [{"text": "e", "label": -1}] if labels else []
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load({"test": path}, ["text", "label"], labels)["test"]["label"][:]
    expected = [no_label] * 3 + ([0, no_label] if labels else [0.5])
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["date", "Decimal", "bytes", "list"])
def test_a_parquet_label_that_is_no_word_or_number_is_refused(kind: str, tmp_path: Path):
    odd = {"date": date(2024, 1, 1), "Decimal": Decimal("1.5"), "bytes": b"x", "list": [1]}[kind]
    path = tmp_path / "x.parquet"
    pd.DataFrame({"text": ["a", "b"], "label": [odd, odd], "more": [{"a": 1}, {"a": 2}]}).to_parquet(path)
    with pytest.raises(UsageError, match=r"x\.parquet"):
        describe(path, None, False)


# --- refusals -----------------------------------------------------------------------------------------------

HEADER, GOOD = ["text", "label"], [["a", "x"], ["b", "y"], ["c", "x"], ["d", "y"]]
BAD_ROWS = {
    "a label that train does not have": (
        "dev",
        HEADER,
        [["a", "x"], ["b", "z"]],
        ":3: ",
        "no label 'z' (x, y)",
    ),
    "no such column": (
        "train",
        ["text", "target"],
        GOOD,
        "train.csv ",
        "no column 'label', only 'text', 'target'",
    ),
    "nothing in it": ("train", HEADER, [], "train.csv ", "no examples"),
    "nothing at all": ("dev", [], [], "dev.csv ", "no examples"),
    "one example of a class": (
        "train",
        HEADER,
        [*GOOD, ["e", "z"]],
        ":6: ",
        "only example with the label 'z'",
    ),
    "a single class": (
        "train",
        HEADER,
        [["a", "x"], ["b", "x"]],
        "train.csv",
        "every example has the label 'x'",
    ),
    "too many fields": ("train", HEADER, [*GOOD, ["e", "x", "y"]], ":6: ", "3 fields, not 2"),
    "too few fields": ("dev", HEADER, [["a"]], ":2: ", "1 fields, not 2"),
    "a column twice": ("train", ["text", "label", "label"], [["a", "x", "x"]], ":1: ", "two columns 'label'"),
    "mixed labels": ("train", HEADER, [*GOOD, ["e", "1"]], ":2: ", "'x' is not a number, and others are"),
    "no label": ("train", HEADER, [*GOOD, ["e", " "]], ":6: ", "there is no label"),
    "a quotation without an end": (
        "train",
        HEADER,
        [*GOOD, ["QUOTE", "x"]],
        ":6: ",
        "unexpected end of data",
    ),
    "bytes that are not UTF-8": ("train", HEADER, [*GOOD, ["BYTE", "x"]], ":6: ", "not UTF-8"),
}


def test_columns_of_parquet_that_are_not_asked_for_may_be_of_any_type(tmp_path: Path):
    table = pa.table(
        {
            "text": ["a", "b"],
            "label": ["x", "y"],
            "more": pa.array([[("k", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    found = list(read_examples(tmp_path / "x.parquet", ["text", "label"], ["x", "y"], True))
    assert [example["label"] for example in found] == [0, 1]


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_file_is_refused_by_file_and_row(case: str, bert: Path, tmp_path: Path, capsys):
    which, header, rows, where, what = BAD_ROWS[case]
    for name in ("train", "dev"):
        write_csv(tmp_path / f"{name}.csv", *((header, rows) if name == which else (HEADER, GOOD)))
    bad = tmp_path / f"{which}.csv"
    bad.write_bytes(bad.read_bytes().replace(b"QUOTE", b'"e').replace(b"BYTE", b"\xe9t\xe9"))
    files = ["--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "dev.csv")]
    output = tmp_path / "run"
    assert run([*files, "--model", str(bert), *SHORT, "--output_dir", str(output)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert (where if ".csv" in where else f"{which}.csv{where}") in stderr
    assert what in stderr
    assert not output.exists()


BAD_JSON = {
    "not JSON": ('{"text": "a", "label": "b"}\nno', ":2: not JSON lines"),
    "an array": ('[{"text": "a", "label": 1}]', ":1: not JSON lines: a line is one object"),
    "deep nesting": ("[" * 100_000, ":1: not JSON lines"),
    "a number for text": ('{"text": "a", "label": "b"}\n{"text": 5, "label": "b"}', ":2: text is 5"),
    "no text": ('{"text": "a", "label": "b"}\n{"label": "b"}', ":2: text is None, which is not text"),
    "half a character": ('{"text": "\\ud800", "label": "b"}', ":1: not UTF-8"),
    "a name twice": (
        '{"text": "a", "label": 1, "label": 2}',
        ":1: not JSON lines: there are two columns 'label'",
    ),
    "another kind of label": ('{"text": "a", "label": [1]}', ":1: the label is [1], which is neither"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_lines_are_refused_by_file_and_row(case: str, tmp_path: Path):
    content, what = BAD_JSON[case]
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError) as refusal:
        list(read_examples(path, ["text", "label"], ["b"], True))
    assert f"x.jsonl{what}" in str(refusal.value)


FLAGS = {
    "nothing to validate on": (["--train_file", "T"], "--validation_file"),
    "a GLUE task": (["--train_file", "T", "--holdout", "0.2", "--task", "cola"], "--task"),
    "a GLUE task's name": (["--train_file", "T", "--holdout", "0.2", "--name", "cola"], "called 'cola'"),
    "a path for a name": (["--train_file", "T", "--holdout", "0.2", "--name", "../x"], "called '../x'"),
    "four columns": (["--train_file", "T", "--holdout", "0.2", "--columns", *"abcd"], "--columns a b c d"),
    "a metric of numbers": (
        ["--train_file", "T", "--holdout", "0.2", "--metric", "pearson"],
        "--metric pearson",
    ),
    "columns of GLUE": (["--task", "cola", "--columns", "a", "b"], "--columns"),
    "a test file alone": (["--demo", "--test_file", "T"], "--test_file"),
    "a missing file": (["--train_file", "nowhere.csv", "--holdout", "0.2"], "nowhere.csv"),
    "a file of another kind": (["--train_file", "x.xlsx", "--holdout", "0.2"], "x.xlsx"),
    "a test file that is not there": (
        ["--train_file", "T", "--holdout", "0.2", "--test_file", "x.csv"],
        "x.csv",
    ),
    "a column twice": (["--train_file", "T", "--holdout", "0.2", "--columns", "text", "text"], "--columns"),
    "a folder": (["--train_file", "F", "--holdout", "0.2"], ".csv"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_do_not_go_together_are_refused(case: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = write_csv(tmp_path / "train.csv", HEADER, GOOD)
    (tmp_path / "folder.csv").mkdir()
    argv, named = FLAGS[case]
    places = {"T": str(train), "F": str(tmp_path / "folder.csv")}
    assert run([places.get(word, word) for word in argv]) == 2
    stderr = capsys.readouterr().err
    assert named in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([1]))
names = st.sampled_from(["text", "label", "sentence1", "x"])
json_rows = st.dictionaries(names, values, max_size=3).map(lambda row: json.dumps(row).encode())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.one_of(st.binary(max_size=30), json_rows), max_size=6),
    ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
    header=st.sampled_from([b"", b"text,label\n", b"text\tlabel\n", b'{"text": "a", "label": "b"}\n']),
    regression=st.booleans(),
)
def test_any_file_is_read_or_refused_in_one_line(
    rows: list[bytes], ending: str, header: bytes, regression: bool, tmp_path: Path
):
    path = tmp_path / f"x{ending}"
    path.write_bytes(header + b"\n".join(rows))
    said = str(path)
    try:
        columns, labels, n = describe(path, None, regression)
        assert len(load({"train": path}, columns, labels)["train"]) == n
    except UsageError as refusal:
        said = str(refusal)
    assert said.startswith(str(path))


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_predicted_exported_resumed_and_tabled(
    moods: list[str], bert: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run([*moods, "--model", str(bert), *SHORT]) == 0
    folder = Path("runs/moods-adalora-ivon-mu-r2-s2021")
    config, results = read(folder / "config.json"), read(folder / "results.json")
    assert (config["labels"], config["ess"]) == (["glad", "mad", "sad"], 24)
    assert (results["task"], results["metric"]) == ("moods", "accuracy")
    assert {"accuracy", "macro_f1"} < set(results["best"])
    again = [*moods, "--model", str(bert), *SHORT, "--resume"]
    assert run(again) == 0
    here = ["--output_dir", str(folder)]
    for other, said in ((["--metric", "macro_f1"], "--metric is macro_f1"), (["--name", "x"], "--name is x")):
        assert run([*again, *here, *other]) == 2
        assert said in capsys.readouterr().err
    write_csv(tmp_path / "dev.csv", ["text", "label"], [["another", "sad"]])
    assert run(again) == 2
    assert "--validation_file has other data" in capsys.readouterr().err
    rows = [[text, MOODS[i % 3]] for i, text in enumerate(TEXTS[:9])]
    write_csv(tmp_path / "dev.csv", ["text", "label"], rows)

    evaluate.main([str(folder), "--eval_samples", "2"])
    rows = read(folder / "evaluation.json")["evaluations"]
    assert rows[0]["accuracy"] == results["best"]["accuracy"]
    evaluate.main([str(folder), "--predict", "out.tsv"])
    lines = [line.split("\t") for line in Path("out.tsv").read_text().splitlines()]
    assert lines[0] == ["index", "prediction", "glad", "mad", "sad"]
    assert len(lines) == 6
    assert {line[1] for line in lines[1:]} <= set(MOODS)

    other = write_csv(tmp_path / "later.csv", ["text"], [["the cat"]])
    evaluate.main([str(folder), "--predict", "later.tsv", "--test_file", str(other)])
    assert len(Path("later.tsv").read_text().splitlines()) == 2

    export.main(["merged", str(folder), "merged"])
    assert AutoConfig.from_pretrained("merged").id2label == {0: "glad", 1: "mad", 2: "sad"}
    capsys.readouterr()
    reproduce.main(["table", "runs"])
    reproduce.main(["calibration", "runs"])
    reproduce.main(["ranks", "runs"])
    reproduce.main(["curves", "runs", "-o", "curves.png"])
    assert "- moods: accuracy; 12 updates" in capsys.readouterr().out

    Path("moved").mkdir()
    for name in SPLITS.values():
        Path(f"{name}.csv").rename(f"moved/{name}.csv")
    evaluate.main([str(folder), "--data_dir", "moved"])


def test_a_share_of_train_can_be_held_out(moods: list[str], bert: Path, tmp_path: Path):
    output = tmp_path / "run"
    flags = [*moods[:1], "--name", "moods", "--holdout", "0.25", "--metric", "macro_f1"]
    assert run([*flags, "--model", str(bert), *SHORT, "--output_dir", str(output)]) == 0
    assert read(output / "config.json")["train_size"] == 18
    assert read(output / "results.json")["metric"] == "macro_f1"
    evaluate.main([str(output)])
    assert [row["split"] for row in read(output / "evaluation.json")["evaluations"]] == ["holdout"]
    with pytest.raises(UsageError, match="no test split: give --split"):
        evaluate.main([str(output), "--predict", str(tmp_path / "out.tsv")])


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_glue_as_csv_gives_the_results_of_the_task(task: str, bert: Path, tmp_path: Path):
    data = load_task(task, write_glue(tmp_path / "glue", task), ["train", "validation"])
    text = ["sentence"] if task == "sst2" else ["sentence1", "sentence2"]
    for split, of in data.items():
        table = zip(*(of[name] for name in [*text, "label"]), strict=True)
        write_csv(tmp_path / f"{split}.csv", [*text, "label"], [list(row) for row in table])
    given = {"lr": 0.4, "tinit": 2, "tfinal": 4, "delta_t": 2, "orth": 0.1, "alpha": 32, "eval_samples": 2}
    flags = ["--model", str(bert), *SHORT, *(f"--{name}={value}" for name, value in given.items())]
    files = [f"--{split}_file={tmp_path / split}.csv" for split in data]
    assert run([*files, "--name", "mine", *flags, "--output_dir", str(tmp_path / "a")]) == 0
    glue = ["--task", task, "--data_dir", str(tmp_path / "glue")]
    assert run([*glue, *flags, "--output_dir", str(tmp_path / "b")]) == 0
    ours, theirs = (read(tmp_path / name / "results.json") for name in "ab")
    assert ours["ranks"] == theirs["ranks"]
    assert {name: ours["last"][name] for name in theirs["last"] if name != "calibration"} == {
        name: value for name, value in theirs["last"].items() if name != "calibration"
    }
    a, b = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_regression_with_negative_numbers_is_evaluated(bert: Path, tmp_path: Path):
    rows = [[text, i - 2.5] for i, text in enumerate(TEXTS[:12])]
    path, output = write_csv(tmp_path / "x.csv", HEADER, rows), tmp_path / "run"
    flags = ["--train_file", str(path), "--validation_file", str(path), "--model", str(bert), *SHORT]
    assert run([*flags, "--output_dir", str(output)]) == 0
    evaluate.main([str(output)])
    with pytest.raises(UsageError, match="two of the run's files have the same name"):
        evaluate.main([str(output), "--data_dir", str(tmp_path)])


def test_classes_called_index_and_prediction_do_not_replace_these_columns(bert: Path, tmp_path: Path):
    rows = [[text, ["index", "prediction"][i % 2]] for i, text in enumerate(TEXTS[:12])]
    path, output = write_csv(tmp_path / "x.csv", HEADER, rows), tmp_path / "run"
    flags = ["--train_file", str(path), "--holdout", "0.25", "--model", str(bert), *SHORT]
    assert run([*flags, "--output_dir", str(output)]) == 0
    evaluate.main([str(output), "--predict", str(tmp_path / "out.tsv"), "--test_file", str(path)])
    header = (tmp_path / "out.tsv").read_text().splitlines()[0]
    assert header.split("\t") == ["index", "prediction", "p(index)", "p(prediction)"]


def test_runs_judged_by_other_metrics_are_rows_of_their_own(
    moods: list[str], bert: Path, tmp_path: Path, capsys
):
    for metric in ("accuracy", "macro_f1"):
        flags = [*moods, "--model", str(bert), *SHORT, "--metric", metric]
        assert run([*flags, "--output_dir", str(tmp_path / "runs" / metric)]) == 0
    capsys.readouterr()
    reproduce.main(["table", str(tmp_path / "runs")])
    table = capsys.readouterr().out
    assert "(metric accuracy)" in table
    assert "(metric macro_f1)" in table


def test_empty_sentences_are_kept_counted_and_said(tmp_path: Path, capsys):
    path = write_csv(tmp_path / "x.csv", HEADER, [["", "x"], ["b", "y"], [" ", "x"]])
    assert len(list(read_examples(path, HEADER, ["x", "y"], True))) == 3
    assert f"{path}:2: an empty sentence is kept (2 in all)\n" == capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["bert", "deberta"])
def test_text_in_any_language_trains(tokenizer: str, tmp_path: Path, request: pytest.FixtureRequest):
    model = request.getfixturevalue(tokenizer)  # WordPiece, SentencePiece
    rows = [[text, f"{np.sin(i):.2f}"] for i, text in enumerate(ANY_LANGUAGE * 3)]
    path = write_csv(tmp_path / "x.csv", HEADER, rows)
    output = tmp_path / "run"
    flags = ["--train_file", str(path), "--holdout", "0.25", "--method", "lora", *SHORT]
    assert run([*flags, "--model", str(model), "--output_dir", str(output)]) == 0
    assert read(output / "results.json")["metric"] == "pearson_spearman"
