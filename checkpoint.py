"""What a run has on disk: files that are whole or not there, its adapter, and checkpoints to go on from.

    with claimed(folder):                                        # no other process writes there
        save_checkpoint(folder / "checkpoint", step, snapshot(model, optimizer, allocator))
        save_adapter(folder / "adapter", model, layers, sigma)
    state, damaged = load_checkpoint(folder / "checkpoint")
    restore(state, model, optimizer, allocator)

A checkpoint is one file, `step-200-1c291ca3.pt`: its step and the CRC-32 of its bytes. It is written beside
and renamed into place, and the one before it is kept, so that a process may be killed at any instant, and one
file be cut short or altered, without the run being lost. Tensors are read from safetensors files, or by torch
with `weights_only=True`: no code can hide in them.
"""

import contextlib
import fcntl
import io
import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ivon import IVON
from processes import from_all, rank
from vilora import RankAllocator

NAME = re.compile(r"step-(\d+)-([0-9a-f]{8})\.pt")
CONTENTS = {"config", "progress", "files", "model", "optimizer", "allocator", "random"}


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """All of it or nothing: written beside, renamed into place. OSError, with the path, where that fails."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            beside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, content: dict) -> None:
    """`write_whole` of a JSON file; ValueError if a number in it is not finite."""
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def append(path: Path, text: str) -> None:
    """Add to a file. OSError, with the path, where that fails."""
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`write_whole` of a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ValueError if that cannot be."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """For the length of the block no other process can claim the folder; OSError if one has.

    The claim ends with the process, however that ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another process is writing there", str(folder)) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> dict[Path, int]:
    """The checkpoints in a folder, by file, and their steps; the latest first."""
    names = {path: NAME.fullmatch(path.name) for path in folder.glob("step-*.pt")}
    steps = {path: int(name[1]) for path, name in names.items() if name}
    return dict(sorted(steps.items(), key=lambda item: -item[1]))


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write a checkpoint and remove the others, but for the one of the latest step before."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step-{step}-{zlib.crc32(buffer.getbuffer()):08x}.pt"
    write_whole(path, buffer.getbuffer())
    earlier = [other for other, s in checkpoints(folder).items() if s < step]
    for other in {*folder.glob("step-*")} - {path, *earlier[:1]}:
        other.unlink()


def load_checkpoint(folder: Path) -> tuple[dict | None, list[Path]]:
    """The latest checkpoint that is whole, its tensors on the CPU; and the later ones, which are damaged.

    None where there is no whole one.
    """
    damaged = []
    for path in checkpoints(folder):
        try:
            content = path.read_bytes()
            if zlib.crc32(content) == int(NAME.fullmatch(path.name)[2], 16):
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                if isinstance(state, dict) and state.keys() >= CONTENTS:
                    return state, damaged
        except MemoryError:
            raise
        except Exception:  # no file, no state, or one that needs code to be read: damaged as well
            pass
        damaged.append(path)
    return None, damaged


def random_states(device: torch.device) -> dict[str, object]:
    """Of all generators that a run on this device may draw from."""
    # numpy's global one: a model of one's own may use it.
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    states["cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: Mapping[str, object], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, allocator: RankAllocator | None
) -> dict[str, dict | None]:
    """All that training changes: what is trained, which triplets are alive, every state there is.

    It shares its tensors with them. Every process has to ask for it: each has random numbers of its own.
    """
    return {
        "model": _moving(model),
        "optimizer": optimizer.state_dict(),
        "allocator": allocator and allocator.state_dict(),
        "random": from_all(random_states(model.device)),
    }


def restore(
    state: Mapping[str, dict | None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    allocator: RankAllocator | None,
) -> None:
    """Take up what `snapshot` gave, of parts that were made with the same settings.

    Raises ValueError if the model's parts are others.
    """
    different = state["model"].keys() ^ _moving(model).keys()
    try:
        model.load_state_dict(state["model"], strict=False)
    except RuntimeError as error:
        different = {str(error)}
    if different:
        raise ValueError(f"the checkpoint is of another model: {min(different)}")
    optimizer.load_state_dict(state["optimizer"])
    if allocator:
        allocator.load_state_dict(state["allocator"])
    everyones = state["random"] if isinstance(state["random"], list) else [state["random"]]
    set_random_states(everyones[rank()], model.device)


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """Of the model's state, what is trained, and which triplets are alive."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name in trained or name.endswith(".alive")}


def pack_files(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The bytes of those files that are there, as uint8 tensors, for a checkpoint."""
    there = {name: folder / name for name in names if (folder / name).exists()}
    contents = {name: np.frombuffer(path.read_bytes(), np.uint8) for name, path in there.items()}
    return {name: torch.from_numpy(content.copy()) for name, content in contents.items()}


def unpack_files(folder: Path, names: Iterable[str], packed: Mapping[str, Tensor]) -> None:
    """Make those files what they were; one that was not there goes."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        if name in packed:
            write_whole(folder / name, packed[name].numpy().tobytes())
        else:
            (folder / name).unlink(missing_ok=True)


def sigmas_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """σ of everything trained, by name; {} if the optimizer is not IVON."""
    if not isinstance(optimizer, IVON):
        return {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, optimizer.sigmas(list(trained.values())), strict=True))


def save_adapter(
    folder: Path, model: nn.Module, layers: Mapping[str, nn.Module], sigma: Mapping[str, Tensor]
) -> None:
    """adapter.safetensors: adapter and head; posterior.safetensors: their σ, if there is one."""
    folder.mkdir(exist_ok=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for file, tensors in {"adapter": trained, "posterior": sigma}.items():
        if tensors:
            metadata = {"scaling": str(common_scaling(layers))}
            write_tensors(folder / f"{file}.safetensors", tensors, metadata)


def common_scaling(layers: Mapping[str, nn.Module]) -> float:
    """s, the same for all adapters; 1 where there are none."""
    return next((layer.scaling for layer in layers.values()), 1.0)


def checksum(tensors: Iterable[Tensor]) -> str:
    """CRC-32 of all their entries, one tensor after the other."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), value)
    return f"{value:08x}"


def fingerprint(model: nn.Module) -> str:
    """A checksum of the frozen weights; an adapter fits no others."""
    return checksum(p for p in model.parameters() if not p.requires_grad)


def load_adapter(folder: Path, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Put a saved adapter and head into a model that was made as the run's was; return its σ, or {}.

    Raises ValueError where the files are damaged or of another model.
    """
    tensors, metadata = read_tensors(folder / "adapter.safetensors")
    path = folder / "posterior.safetensors"
    sigma, _ = read_tensors(path) if path.exists() else ({}, {})
    if metadata.get("scaling") != str(common_scaling(layers)):
        raise ValueError(f"{folder} does not fit config.json: s is {metadata.get('scaling')} there")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    different = sorted(trained.keys() ^ tensors.keys()) + sorted(
        sigma.keys() ^ tensors.keys() if sigma else ()
    )
    if different:
        raise ValueError(f"{folder} does not fit the model: {different[0]} is only in one of them")
    ranks = {name: tensors[f"{name}.lam"].numel() for name in layers if f"{name}.lam" in tensors}
    for name, p in trained.items():
        module, _, part = name.rpartition(".")
        shape = list(p.shape)
        if module in ranks:
            shape[-1 if part == "P" else 0] = ranks[module]
        for tensor in (tensors[name], sigma.get(name, tensors[name])):
            if list(tensor.shape) != shape or tensor.dtype != p.dtype:
                raise ValueError(
                    f"{folder} does not fit the model: {name} is {tuple(tensor.shape)}, not {tuple(shape)}"
                )
    model.load_state_dict(tensors, strict=False)
    return {name: tensor.to(trained[name].device) for name, tensor in sigma.items()}
