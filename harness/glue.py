"""GLUE: its eight tasks, its files, and the papers' settings for each task.

    load_task("cola")                     # from the Hugging Face Hub
    load_task("cola", data_dir="glue")    # from a folder in GLUE's own layout: glue/CoLA/train.tsv, …

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", ICLR
2019. The settings are those of Chen and Garner, arXiv 2409.10673, and with AdamW of AdaLoRA, ICLR 2023.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.metrics import task_metrics
from harness.task import Task, UsageError

HUB_DATASET = "nyu-mll/glue"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
HUB_SECONDS = 3  # how long the Hub may take to answer at all

# ---- the papers' settings ------------------------------------------------------------------------------

# fmt: off
COLUMNS = ("train_size", "max_length", "epochs", "adamw.lr", "adamw.warmup_steps", "ivon.lr",
           "ivon.warmup_steps", "ivon.first_lr", "ivon.first_steps", "alpha", "orth", "tinit", "tfinal",
           "delta_t", "eval_every")
TABLE = {
    # train, length, epochs | AdamW lr, warm-up | IVON's, first phase | alpha, γ | t_i, t_f, ΔT | evaluate
    "cola": (  8551,  64, 25, 8e-4,    100, 0.4, 100, 2.0, 500, 32, 0.1,  800,  3500,  10,  100),
    "stsb": (  5749, 128, 25, 2.2e-3,  100, 0.4, 100, 2.0, 500, 32, 0.3,  800,  2000,  10,  100),
    "mrpc": (  3668, 320, 30, 1e-3,    100, 0.5, 100, 2.0, 400, 32, 0.1,  600,  1800,   1,  300),
    "rte":  (  2490, 320, 50, 1.2e-3,  200, 0.5, 100, 2.0, 400, 32, 0.3,  600,  1800,   1,  100),
    "sst2": ( 67349, 128, 24, 8e-4,   1000, 0.4, 500, 0.0,   0, 16, 0.1, 6000, 22000, 100, 3000),
    "qnli": (104743, 512,  5, 5e-4,    500, 0.4, 500, 0.0,   0, 32, 0.1, 2000,  8000, 100, 1000),
    "qqp":  (363846, 320,  5, 8e-4,   2000, 0.4, 500, 0.0,   0, 16, 0.1, 8000, 25000, 100, 3000),
    "mnli": (392702, 256,  7, 5e-4,   1000, 0.4, 500, 0.0,   0, 16, 0.1, 8000, 50000, 100, 2000),
    # The demo's encoder is far smaller than DeBERTaV3: its settings are our own.
    "demo": (  2400,  64, 12, 2e-3,     50, 2.0,  50, 0.0,   0, 32, 0.1,  100,   350,  10,  100),
}
# fmt: on
# What all tasks have in common, and what goes with a method. IVON's learning rate warms up to first_lr, stays
# there until first_steps, and then decays from lr.
ADAMW = {"weight_decay": 0.0}
IVON = {"mc_samples": 1, "hess_init": 1.0, "beta2": 0.99999, "clip_radius": 1e-3, "weight_decay": 1e-8}
ONE_PHASE = {"first_lr": 0.0, "first_steps": 0}
# LoRA with IVON has no published setting for GLUE. Ours: the best of six trials with MiniLM on each of three
# tasks (results/study.md).
LORA_IVON = {"hess_init": 1e-4, "beta2": 0.999, "ess": 1e8, "lr": None, "largest_step": 3e-4}
FULL_EPOCHS = {"sst2": 6, "qnli": 4}  # the other tasks': as AdaLoRA


def published(task: str, method: str, optimizer: str) -> dict[str, Any]:
    """The settings of a row of the papers' table, by the names of Settings' fields.

    An optimizer that has no column gets AdamW's.
    """
    row, ivon = dict(zip(COLUMNS, TABLE[task], strict=True)), optimizer == "ivon"
    column = optimizer if f"{optimizer}.lr" in row else "adamw"
    settings = {name: value for name, value in row.items() if "." not in name}
    settings |= IVON if ivon else ADAMW | ONE_PHASE
    settings |= {name.split(".")[1]: value for name, value in row.items() if name.startswith(f"{column}.")}
    if method == "lora":
        lr = row["adamw.lr"] if task == "demo" else 2e-4
        settings |= {"alpha": 32, **ONE_PHASE, "lr": lr}
        settings |= LORA_IVON if ivon else {}
    if method == "full":
        settings |= ONE_PHASE | ({"weight_decay": 1e-5} if ivon else {})
        if task != "demo":
            settings["lr"] = 0.1 if ivon else 1.5e-5 if task == "mnli" else 2e-5
            settings["epochs"] = FULL_EPOCHS.get(task, settings["epochs"])
    return settings | {"total_steps": settings["epochs"] * math.ceil(row["train_size"] / 32)}


# ---- the tasks -----------------------------------------------------------------------------------------

PAIR = ("sentence1", "sentence2")
DIGITS = ("0", "1")
ENTAILED = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
# In GLUE's own files: the columns of the sentences and of the label. CoLA's have no header.
FILE_COLUMNS = {
    "cola": ("sentence", "label"),
    "sst2": ("sentence", "label"),
    "mrpc": ("#1 String", "#2 String", "Quality"),
    "stsb": (*PAIR, "score"),
    "qqp": ("question1", "question2", "is_duplicate"),
    "mnli": (*PAIR, "gold_label"),
    "qnli": ("question", "sentence", "label"),
    "rte": (*PAIR, "label"),
}


def load_task(
    task: str, data_dir: str | Path | None = None, splits: Collection[str] | None = None
) -> dict[str, Any]:
    """A task's splits: "train", "validation" (mnli: "…_matched", "…_mismatched"), and "test" if there is one.

    Columns: the task's `text`, "label" (class index, for stsb a float; −1 in a test split) and "idx".

    Args:
        data_dir: a folder in GLUE's own layout; without it, the Hub's copy.
        splits: which ones; only their files have to be there.

    A test file with labels is read with them; in one without, "idx" is the file's own number of a row.

    Raises OSError where a file is missing or the Hub does not answer, UsageError ("file:line: what") where a
    file is not as it should be.
    """
    if data_dir is None:
        loaded = load_from_hub(HUB_DATASET, task)
        return loaded if splits is None else {split: loaded[split] for split in splits}
    from datasets import Dataset

    folder, loaded = Path(data_dir) / TASKS[task].folder, {}
    for split in TASKS[task].splits if splits is None else splits:
        path = folder / f"{split.replace('validation', 'dev')}.tsv"
        if splits is None and split.startswith("test") and not path.exists():
            continue
        if not path.is_file():
            own = f"{folder.name}/{path.name}"
            raise FileNotFoundError(f"{path} is missing: the data folder needs GLUE's own layout, {own}")
        examples = list(read_examples(task, path, labelled=not split.startswith("test")))
        if not examples:
            raise UsageError(f"{path} has no examples")
        loaded[split] = Dataset.from_list(examples)
    return loaded


def load_from_hub(dataset: str, name: str | None = None) -> dict[str, Any]:
    """A data set's splits. Raises ConnectionError."""
    check_hub()  # before an import that takes seconds itself
    from datasets import load_dataset

    try:
        return dict(load_dataset(dataset, name))
    except Exception as error:  # of half a dozen libraries
        raise ConnectionError(f"{dataset} could not be loaded from the Hub: {error}") from error


def glue_task(name, folder, text, labels=(), written=DIGITS, metric="accuracy", **more) -> Task:
    functions = {"load": partial(load_task, name), "metrics": partial(task_metrics, name)}
    functions |= {"settings": partial(published, name)}
    columns = {"text": text, "cut": text, "labels": labels, "written": written}
    prompt, choices = PROMPTS.get(name, ("", ()))
    columns |= {"prompt": prompt, "choices": choices}
    size = TABLE[name][0]
    return Task(name, folder, metric=metric, train_size=size, **columns, **functions, **more)


# What a causal language model is asked, in the manner of BoolQ, and its answers in the order of the labels.
ASK = "Answer the question with only True or False: "
NO_YES, YES_NO = ("False", "True"), ("True", "False")
PROMPTS = {
    "cola": (ASK + "is the sentence grammatical Sentence: {sentence}", NO_YES),
    "sst2": (ASK + "is the review positive Review: {sentence}", NO_YES),
    "mrpc": (ASK + "do both mean the same First: {sentence1} Second: {sentence2}", NO_YES),
    "qqp": (ASK + "do both ask the same First: {question1} Second: {question2}", NO_YES),
    "mnli": (
        "Answer the question with only True, Maybe or False: does it follow that {hypothesis} "
        "Context: {premise}",
        ("True", "Maybe", "False"),
    ),
    "qnli": (ASK + "does the context answer {question} Context: {sentence}", YES_NO),
    "rte": (ASK + "does it follow that {sentence2} Context: {sentence1}", YES_NO),
}

# fmt: off
MATTHEWS = "matthews_correlation"
MNLI_SPLITS = {"validation": ("validation_matched", "validation_mismatched")}
MNLI_SPLITS |= {"tests": ("test_matched", "test_mismatched")}
TASKS = {task.name: task for task in (
    glue_task("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), metric=MATTHEWS),
    glue_task("sst2", "SST-2", ("sentence",), ("negative", "positive")),
    glue_task("mrpc", "MRPC", PAIR, ("not_equivalent", "equivalent")),
    glue_task("stsb", "STS-B", PAIR, written=(), metric="pearson_spearman"),
    glue_task("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate")),
    glue_task("mnli", "MNLI", ("premise", "hypothesis"), NLI, NLI, **MNLI_SPLITS),
    glue_task("qnli", "QNLI", ("question", "sentence"), ENTAILED, ENTAILED),
    glue_task("rte", "RTE", PAIR, ENTAILED, ENTAILED),
)}
# fmt: on
# The bundled data of demo/ are in CoLA's format.
DEMO = replace(
    TASKS["cola"],
    model=str(DEMO_FOLDER / "model"),
    train_size=TABLE["demo"][0],
    settings=partial(published, "demo"),
)


# ---- the files -----------------------------------------------------------------------------------------

COLA_COLUMNS = ["source", "label", "star", "sentence"]  # its train.tsv and dev.tsv have no header


def check_hub() -> None:
    """Raise ConnectionError if the Hub does not answer within seconds; its own client retries for minutes.

    Skipped if HF_HUB_OFFLINE is set: then only the local cache is used.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of the Hub's HTTP library, whichever that is
        hint = "use --demo, or local folders with --model and --data_dir, or HF_HUB_OFFLINE=1 for the cache"
        hub = f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached"
        raise ConnectionError(f"{hub}: {error}; {hint}") from None


def read_examples(task: str, path: Path, labelled: bool = True) -> Iterator[dict]:
    """The examples of one of GLUE's TSV files, in order. Raises UsageError as `load_task` does.

    The files are not quoted: a quotation mark is a character like any other. A byte-order mark, Windows line
    ends and a missing last line end occur in copies of GLUE.
    """
    *text_columns, label_column = columns = FILE_COLUMNS[task]
    rows = _rows(path)
    header = COLA_COLUMNS if task == "cola" and labelled else next(rows, (1, []))[1]
    labelled = labelled or label_column in header
    # Without labels the file's own numbers count, in a submission.
    numbers = None if labelled else next((name for name in ("index", "id") if name in header), None)
    for column in columns if labelled else text_columns:
        if column not in header:
            raise UsageError(f"{path}:1: there is no column {column!r} ({', '.join(header)[:200]})")
    for idx, (line, row) in enumerate(rows):
        if task == "qqp" and len(row) < len(header) and not numbers:
            continue  # GLUE's own file has a few rows with a line end in a question: no reader counts them
        if len(row) != len(header):
            needs = f"{len(header)} ({', '.join(header)})"
            raise UsageError(f"{path}:{line}: {len(row)} columns, not {needs}")
        fields = dict(zip(header, row, strict=True))
        example = {name: fields[c] for name, c in zip(TASKS[task].text, text_columns, strict=True)}
        try:
            example["label"] = _label(task, fields[label_column]) if labelled else -1
            number = int(fields[numbers]) if numbers else idx
        except ValueError as error:
            raise UsageError(f"{path}:{line}: {error}") from None
        yield example | {"idx": number}


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number from 1, and fields. Only \\n ends a line; Unicode's other ends are a sentence's own."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for line, row in enumerate(file, start=1):
                yield line, row.rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _label(task: str, written: str) -> int | float:
    """A label as the files write it → class index, or for stsb the number. ValueError if it is not one."""
    if allowed := TASKS[task].written:
        if written not in allowed:
            raise ValueError(f"{written!r} is not a label of {task} ({', '.join(allowed)})")
        return allowed.index(written)
    with contextlib.suppress(ValueError):
        if 0 <= float(written) <= 5:
            return float(written)
    raise ValueError(f"{written!r} is not a score from 0 to 5")
