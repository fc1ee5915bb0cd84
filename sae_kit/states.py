"""State trees <-> JSON and safetensors.

A state is what a component needs to go on: dicts with string keys, lists, tuples, str, int, float, bool, None and
tensors, nested in any way. Its tensors go to a safetensors file under their dotted paths; the rest is JSON, in which

    {"$tensor": path}  stands for a tensor          {"$tuple": [...]}                 for a tuple
    {"$alias": path}   for the same tensor again    {"$float": "nan", "inf" or "-inf"}  for what JSON cannot write

and a key that itself begins with `$` has one more. What comes back is equal bit for bit, tensors on the CPU.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_kit.atomic import new_file
from sae_kit.config import parse_json
from sae_kit.errors import CorruptFileError

NAMES_IN_FILES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtype -> its name in safetensors"""
PAGE = 4096


# ---- trees -----------------------------------------------------------------------------------------------------------


def split_state(state: object) -> tuple[Any, dict[str, Tensor]]:
    """A state as JSON values, and its tensors by path; they are the state's own, not copies.

    Raises:
        ValueError: something in it that a state cannot hold; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}

    def plain(value: object, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            return split_off(value, path)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if value is None or isinstance(value, str | int):
            return value
        if isinstance(value, list | tuple):
            items = [plain(item, (*path, str(i))) for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, Mapping):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{_at(path)}: expected keys that are strings, found {wrong[0]!r}")
            return {f"${key}" if key.startswith("$") else key: plain(value[key], (*path, key)) for key in value}
        raise ValueError(
            f"{_at(path)}: a state holds dicts, lists, tuples, strings, numbers, bools, None and tensors; found a "
            f"{type(value).__module__}.{type(value).__qualname__}"
        )

    def split_off(tensor: Tensor, path: tuple[str, ...]) -> dict[str, str]:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NAMES_IN_FILES:
            kind = "meta" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise ValueError(f"{_at(path)}: expected a dense tensor of real numbers in memory, found one of {kind}")
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in seen:
            return {"$alias": seen[memory]}
        name = _at(path).encode(errors="backslashreplace").decode()
        while name in tensors or name == "__metadata__":  # "a.b" may be one key, or two
            name += "'"
        tensors[name], seen[memory] = tensor, name
        return {"$tensor": name}

    return plain(state, ()), tensors


def join_state(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_state`; an alias is the tensor itself.

    Raises:
        KeyError: a tensor that is not in `tensors`. ValueError: a mark of a later version.
    """
    if isinstance(plain, list):
        return [join_state(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    marks = [key for key in plain if key.startswith("$") and not key.startswith("$$")]
    match plain:
        case {"$tensor": name} | {"$alias": name}:
            return tensors[str(name)]
        case {"$tuple": items}:
            return tuple(join_state(item, tensors) for item in items)
        case {"$float": text}:
            return float(text)
        case _ if marks:
            raise ValueError(f"expected $tensor, $alias, $tuple or $float, found {marks[0]}")
        case _:
            return {key.removeprefix("$"): join_state(item, tensors) for key, item in plain.items()}


def _at(path: tuple[str, ...]) -> str:
    return ".".join(path) or "state"


# ---- files -----------------------------------------------------------------------------------------------------------


def write_state(folder: Path, name: str, state: object) -> dict[str, tuple[int, str]]:
    """Write `{name}.safetensors` and `{name}.json` into `folder`; bytes and SHA-256 of each.

    Each of the two is there whole or not at all. Where both have to be of one state, write into a new folder.

    Raises:
        ValueError: something in it that a state cannot hold. OSError: the folder cannot be written.
    """
    plain, tensors = split_state(state)
    text = (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()
    weights = write_tensors(folder / f"{name}.safetensors", {path: [tensor] for path, tensor in tensors.items()})
    with new_file(folder / f"{name}.json") as file:
        file.write(text)
    return {f"{name}.safetensors": weights, f"{name}.json": (len(text), hashlib.sha256(text).hexdigest())}


def read_state(folder: Path, name: str) -> Any:
    """The state that `write_state` wrote, its tensors in memory of their own.

    Raises:
        FileNotFoundError: one of the two files is not there.
        CorruptFileError: one is torn, or they are not of one state.
    """
    weights, path = folder / f"{name}.safetensors", folder / f"{name}.json"
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}: a state is {path.name} and {weights.name}")
    try:
        with safe_open(weights, framework="pt", device="cpu") as opened:
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptFileError(f"{weights} cannot be read as safetensors ({error}): it is torn") from error
    try:
        return join_state(parse_json(path.read_text(encoding="utf-8")), tensors)
    except KeyError as error:
        raise CorruptFileError(f"{weights} lacks the tensor {error} that {path.name} names") from error
    except ValueError as error:
        raise CorruptFileError(f"{path} does not hold a state: {error}") from error


def write_tensors(
    path: Path, columns: Mapping[str, Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write safetensors, each tensor the concatenation of parts from any device; bytes and SHA-256 of the file.

    Nothing is copied but the part that is being written.
    """
    # Wide numbers first, so that each tensor begins where numbers of its size may.
    names = sorted(columns, key=lambda name: (-columns[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        first, begin = columns[name][0], end
        shape = [*first.shape]
        if first.ndim:
            shape[0] = sum(len(part) for part in columns[name])
        end += sum(part.nbytes for part in columns[name])
        header[name] = {"dtype": NAMES_IN_FILES[first.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    digest = hashlib.sha256()
    contents = (_bytes_of(part) for name in names for part in columns[name])
    with new_file(path) as file:
        for block in itertools.chain([len(text).to_bytes(8, "little"), text], contents):
            file.write(block)
            digest.update(block)
    return 8 + len(text) + end, digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    if not tensor.numel():  # torch cannot view every empty tensor as bytes
        return b""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
