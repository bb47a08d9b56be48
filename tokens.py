"""Sentences as token ids: made once, and kept between runs.

    features, labels = tokenize(dataset["train"], task, tokenizer, max_length=64)

What a tokenizer makes of some sentences is kept in the Hugging Face cache (`HF_HOME`, `HF_ASSETS_CACHE`),
under a digest of the tokenizer, the sentences and their greatest length. It may be deleted at any time.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
import transformers
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from checkpoint import checksum, read_tensors, write_tensors
from glue import Task

FORMAT = 1  # of what is kept


def tokenize(
    dataset: Mapping[str, list], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict], Tensor]:
    """Each example's token ids, unpadded, and all labels (n,), int64 or for regression float32."""
    sentences = [list(dataset[column]) for column in task.text]
    path = kept_at(sentences, tokenizer, max_length)
    features = read(path) if path else None
    if features is None:
        encoded = tokenizer(*sentences, truncation=True, max_length=max_length)
        examples = zip(*encoded.values(), strict=True)
        features = [dict(zip(encoded, example, strict=True)) for example in examples]
        if path:
            keep(path, dict(encoded))
    return features, torch.tensor(dataset["label"], dtype=torch.int64 if task.labels else torch.float32)


def kept_at(sentences: list[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Path | None:
    """Where their tokens are kept; None if this tokenizer cannot be told from others, or nothing be kept."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()  # what its last call has left; each call says anew what it wants
    backend.no_padding()
    versions = transformers.__version__, tokenizers.__version__
    how = type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side, max_length
    how += (getattr(tokenizer, "split_special_tokens", None), FORMAT)
    digest = hashlib.sha256(json.dumps([backend.to_str(), versions, how, sentences]).encode())
    with contextlib.suppress(OSError, ValueError):
        return cached_assets_path("bayesian-adalora", "tokens") / f"{digest.hexdigest()[:32]}.safetensors"


def read(path: Path) -> list[dict] | None:
    """What `keep` wrote; None where there is nothing, or it is damaged."""
    try:
        tensors, metadata = read_tensors(path)
        if metadata["checksum"] != checksum(tensors[name] for name in sorted(tensors)):
            return None
        ends = [0, *tensors.pop("length").cumsum(0).tolist()]
    except (ValueError, KeyError):
        return None
    columns = {name: tensor.tolist() for name, tensor in tensors.items()}
    return [
        {name: column[start:end] for name, column in columns.items()}
        for start, end in itertools.pairwise(ends)
    ]


def keep(path: Path, encoded: Mapping[str, list[list[int]]]) -> None:
    """All of a column one after the other, and each example's length. Where that fails, nothing is kept."""
    tensors = {name: torch.tensor([*itertools.chain(*column)]) for name, column in encoded.items()}
    small = {name for name, x in tensors.items() if not (x >= 256).any()}
    tensors = {name: x.to(torch.uint8 if name in small else torch.int32) for name, x in tensors.items()}
    tensors["length"] = torch.tensor([len(ids) for ids in encoded["input_ids"]])
    total = checksum(tensors[name] for name in sorted(tensors))
    own = path.with_name(f"{path.stem}.{os.getpid()}")  # of several processes that do the same
    try:
        write_tensors(own, tensors, {"checksum": total})
        os.replace(own, path)
    except OSError:
        with contextlib.suppress(OSError):
            own.unlink()
