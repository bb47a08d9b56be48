"""A data set of one's own as a Task: from a training file, and optional validation and test files.

Files are CSV, TSV, JSON lines or Parquet, with one or two columns of text and a label. In a CSV file text in
quotation marks may have commas and line ends in it; in a TSV file a quotation mark is a plain character.
Rows are counted as an editor counts lines; those of Parquet from 1.
"""

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness.glue import published
from harness.metrics import class_metrics, task_metrics
from harness.task import FIELD, Task, UsageError, fill_in

COLUMNS = (  # without --columns, the first of these that the training file has
    ("sentence1", "sentence2", "label"),
    ("sentence1", "label"),
    ("sentence", "label"),
    ("text", "label"),
)
TEXT = ("text1", "text2")  # what the text columns are called from here on
METRICS = {"classes": ("accuracy", "macro_f1"), "numbers": ("pearson_spearman", "pearson", "spearman")}
DIALECTS = {".csv": {"strict": True}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
LARGEST = 1e15  # number as a label: its square is within float32
KINDS = (*DIALECTS, ".json", ".jsonl", ".parquet")


def own_task(
    name: str, files: Mapping[str, Path | None], columns: list[str], labels: list[str], metric: str,
    size: int, prompt: str | None = None, choices: Collection[str] | None = None,
) -> Task:  # fmt: skip
    """A task from files by split; no labels: a regression. The settings are CoLA's.

    prompt: with the files' own names of the text columns in braces.
    """
    files = {split: path for split, path in files.items() if path}
    text = TEXT[: len(columns) - 1]
    renamed = {name: f"{{{own}}}" for name, own in zip(columns, text, strict=False)}
    return Task(
        name,
        folder=name,
        load=partial(load, files, columns, labels),
        text=text,
        labels=tuple(labels),
        metrics=class_metrics if labels else partial(task_metrics, "stsb"),
        metric=metric,
        settings=partial(published, "cola"),
        train_size=size,
        validation=("validation",) if "validation" in files else (),
        tests=("test",) if "test" in files else (),
        written=tuple(labels),
        prompt=fill_in(prompt or "", renamed),
        choices=tuple(choices or labels),
        cut=text,
    )


def check_prompt(
    prompt: str | None, choices: list[str] | None, columns: list[str], labels: list[str]
) -> None:
    """Raise UsageError for a prompt or choices that do not fit the data."""
    if choices and not prompt:
        raise UsageError("--choices is for a causal language model: give --prompt, too")
    if not prompt:
        return
    if not labels:
        raise UsageError("--prompt is for classes, and the labels are numbers")
    named, texts = FIELD.findall(prompt), columns[:-1]
    if not named or not {*named} <= {*texts}:
        braces = " and ".join(f"{{{name}}}" for name in texts)
        raise UsageError(f"--prompt {prompt!r}: the text columns belong in braces, {braces}, and no other")
    order = ", ".join(labels)[:200]
    if choices and not len(set(choices)) == len(choices) == len(labels):
        raise UsageError(f"--choices: give {len(labels)} words, for the labels {order}")
    folded = [[word.casefold() for word in words] for words in (choices or labels, labels)]
    if folded[0] != folded[1] and sorted(folded[0]) == sorted(folded[1]):
        raise UsageError(f"--choices {' '.join(choices)}: give them in the labels' order, {order}")


def check_file(path: Path) -> None:
    """Raise UsageError, or OSError, unless the path is a file of a kind that can be read."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path}: a data file's name ends in {', '.join(KINDS)}")
    path.open("rb").close()


def describe(path: Path, columns: list[str] | None, regression: bool) -> tuple[list[str], list[str], int]:
    """A training file's columns, its labels' names in order ([]: a regression), and how many examples it has.

    The labels are numbers if all are numeric and at least one is not written as an integer, or with
    `regression`; otherwise they are names of classes. Raises UsageError.
    """
    rows = list(read_rows(path))
    there = rows[0][1]
    columns = list(columns or next((names for names in COLUMNS if there.keys() >= set(names)), COLUMNS[-1]))
    check_columns(path, there, columns)
    labels = {row: label_text(path, row, fields.get(columns[-1])) for row, fields in rows}
    numbers = [text for text in labels.values() if is_number(text)]
    regression = regression or any(not text.lstrip("+-").isdigit() for text in numbers)
    if numbers or regression:
        for row, text in labels.items():
            if not is_number(text):
                raise UsageError(f"{path}:{row}: the label {shown(text)} is not a number, and others are")
    counts = Counter(labels.values())
    if len(counts) == 1:
        raise UsageError(f"{path}: every example has the label {shown(*counts)}; there must be two")
    if regression:
        return columns, [], len(rows)
    for row, text in labels.items():
        if counts[text] == 1:
            hint = "add others, take it out, or give --regression if labels are numbers"
            raise UsageError(f"{path}:{row}: the only example with the label {shown(text)}: {hint}")
    return columns, sorted(counts, key=int if numbers else str), len(rows)


def load(
    files: Mapping[str, Path], columns: list[str], labels: list[str],
    data_dir: str | Path | None = None, splits: Collection[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """As glue.load_task. With `data_dir`, the files of the same names in that folder."""
    from datasets import Dataset  # which takes seconds

    if data_dir and len({path.name for path in files.values()}) < len(files):
        same = "two of the run's files have the same name, and cannot both be there"
        raise UsageError(f"--data_dir {data_dir}: {same}")
    loaded = {}
    for split in splits or files:
        path = Path(data_dir) / files[split].name if data_dir else files[split]
        examples = read_examples(path, columns, labels, labelled=split != "test")
        loaded[split] = Dataset.from_list(list(examples))
    return loaded


def read_examples(path: Path, columns: list[str], labels: list[str], labelled: bool) -> Iterator[dict]:
    """The text columns, "label" (class index or number; a test file's missing one: −1 or NaN) and "idx"."""
    *texts, label = columns
    empty = []
    for idx, (row, fields) in enumerate(read_rows(path)):
        if idx == 0:
            check_columns(path, fields, columns if labelled else texts)
        example = {"idx": idx, "label": -1 if labels else math.nan}
        for key, name in zip(TEXT, texts, strict=False):
            if not isinstance(fields.get(name), str):
                raise UsageError(f"{path}:{row}: {name} is {shown(fields.get(name))}, which is not text")
            example[key] = fields[name]
            empty += [] if fields[name].strip() else [row]
        if labelled or has_label(fields.get(label), labels):
            text = label_text(path, row, fields.get(label))
            if labels and text not in labels:
                names = ", ".join(labels)[:200]
                raise UsageError(f"{path}:{row}: the training file has no label {shown(text)} ({names})")
            if not labels and not is_number(text):
                raise UsageError(f"{path}:{row}: the label {shown(text)} is not a number up to {LARGEST:g}")
            example["label"] = labels.index(text) if labels else float(text)
        yield example
    if empty:
        sys.stderr.write(f"{path}:{empty[0]}: an empty sentence is kept ({len(empty)} in all)\n")


def has_label(value: Any, labels: list[str]) -> bool:
    """Whether a test file's row has one: none is an empty field, or −1 for a class."""
    return value not in (None, "") and not (labels and str(value) == "-1" and "-1" not in labels)


def check_columns(path: Path, there: Collection[str], columns: list[str]) -> None:
    if missing := [name for name in columns if name not in there]:
        names = ", ".join(map(repr, there))[:200]
        hint = "name text and label by --columns"
        if len(there) == 1 and path.suffix.lower() in DIALECTS:
            hint = "is it separated by commas (.csv) or tabs (.tsv)?"
        raise UsageError(f"{path} has no column {missing[0]!r}, only {names}: {hint}")


def label_text(path: Path, row: int, value: Any) -> str:
    """A label as text, as JSON would write it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UsageError(f"{path}:{row}: there is no label")
    if not isinstance(value, (str, bool, int, float)):
        raise UsageError(f"{path}:{row}: the label is {shown(value)}, which is neither a word nor a number")
    return value.strip() if isinstance(value, str) else json.dumps(value)


def is_number(text: str) -> bool:
    try:
        return abs(float(text)) <= LARGEST and "_" not in text
    except ValueError:
        return False


def shown(value: Any) -> str:
    """For a message, which is one line."""
    return repr(value)[:80]


# ---- the files -----------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each example's row, and its fields by column. Raises UsageError ("file:row: what"), OSError."""
    kind, empty = path.suffix.lower(), True
    read = read_table if kind in DIALECTS else read_parquet if kind == ".parquet" else read_json_lines
    for row, fields in read(path):
        empty = False
        try:
            "".join(text for text in [*fields, *fields.values()] if isinstance(text, str)).encode()
        except UnicodeEncodeError:
            raise UsageError(f"{path}:{row}: not UTF-8 text") from None
        yield row, fields
    if empty:
        raise UsageError(f"{path} has no examples")


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, **DIALECTS[path.suffix.lower()])
        try:
            header = next(filter(None, reader), [])
            check_no_duplicates(header)
            for fields in filter(None, reader):  # no blank lines
                if len(fields) != len(header):
                    raise ValueError(f"{len(fields)} fields, not {len(header)} ({', '.join(header)[:200]})")
                yield reader.line_num, dict(zip(header, fields, strict=True))
        except (csv.Error, ValueError) as error:
            raise UsageError(f"{path}:{reader.line_num}: {error}") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                try:
                    fields = json.loads(line, object_pairs_hook=as_dict)
                    if not isinstance(fields, dict):
                        raise ValueError("a line is one object")
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{path}:{row}: not JSON lines: {error}") from None
                yield row, fields


def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_no_duplicates([name for name, _ in pairs])
    return dict(pairs)


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Classes that datasets has stored as numbers get their names."""
    import pyarrow.parquet
    from datasets import ClassLabel, Dataset

    try:
        kinds = pyarrow.parquet.read_schema(path)
        plain = [field.name for field in kinds if not pyarrow.types.is_nested(field.type)]
        check_no_duplicates(plain)
        data = Dataset(pyarrow.parquet.read_table(path, columns=plain))
    except (pyarrow.ArrowException, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    classes = {name: f.names for name, f in data.features.items() if isinstance(f, ClassLabel)}
    for row, fields in enumerate(data, start=1):
        numbers = {name: fields[name] for name in classes}
        named = {name: classes[name][n] for name, n in numbers.items() if n in range(len(classes[name]))}
        yield row, fields | named


def check_no_duplicates(names: list[str]) -> None:
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise ValueError(f"there are two columns {twice[0]!r}")
