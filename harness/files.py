"""Atomic writes, a folder's lock, checksums.

Tensors are read from safetensors files, or by torch with `weights_only=True`: no code can hide in them.
"""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.task import UsageError


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a temporary file, then rename it."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk's has no path
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, content: dict) -> None:
    """`write_atomically` of a JSON file; ValueError if a number in it is not finite."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """An object of a JSON file. Raises UsageError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def append(path: Path, records: list[dict]) -> None:
    """Add lines to a JSON-lines file."""
    try:
        with path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def truncate_records(path: Path, step: int) -> None:
    """Keep a JSON-lines file's records up to a step."""
    if path.exists():
        *lines, _half = path.read_text(errors="replace").split("\n")  # nothing, or what a kill has cut short
        try:
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is damaged: remove it, or start again with --overwrite") from None
        write_atomically(path, "".join(kept).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`write_atomically` of a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises UsageError."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def checksum(tensors: Iterable[Tensor]) -> str:
    """CRC-32 of all their entries, one tensor after the other."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def check_writable(path: Path, what: object) -> None:
    """Raise UsageError, of `what`, unless a file can be written at the path, or its folder created."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)) or (path.exists() and not path.is_file()):
        raise UsageError(f"{what} cannot be written")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for the block. Raises UsageError if another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder}: another process is writing there") from None
    except OSError:  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
