"""Caches of activations that SAELens wrote: a folder of Arrow files with a column for each hook.

A row of the data set is a context: an array [n, d_in] for each hook, and `token_ids` [n] where they were stored. Arrow
keeps each column's numbers in one piece per record batch, so a batch is a shard here, read from the mapped file like
those of our own. Which model, text and filters the rows come from stands nowhere in the folder.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from sae_kit.data.cache.files import MANIFEST, Shard
from sae_kit.data.cache.memory import tensor_at
from sae_kit.data.cache.opened import Cache
from sae_kit.errors import CorruptFileError, DataError

STATE, INFO, IDS = "state.json", "dataset_info.json", "token_ids"
DTYPES = {"halffloat": torch.float16, "float": torch.float32, "double": torch.float64, "int32": torch.int32}


def is_saelens_cache(folder: Path) -> bool:
    """Whether this may be one: a saved data set without a manifest of ours."""
    return all((folder / name).is_file() for name in (STATE, INFO)) and not (folder / MANIFEST).exists()


def open_saelens_cache(folder: Path) -> Cache:
    """The cache in a folder of SAELens, with a provenance that names the sites and their contexts alone.

    Raises:
        DataError: the data set holds no activations, or those of its hooks have contexts of different lengths.
        CorruptFileError: a file is missing, torn, or not what `dataset_info.json` says.
    """
    features = _json(folder / INFO).get("features", {})
    shapes = {name: tuple(found["shape"]) for name, found in features.items() if found.get("_type") == "Array2D"}
    if not shapes:
        raise DataError(f"{folder} is a data set without activations: expected Array2D columns, found {list(features)}")
    if len(contexts := {shape[0] for shape in shapes.values()}) > 1:
        raise DataError(f"{folder}: expected contexts of one length, found {sorted(contexts)}")
    (context,) = contexts
    shapes |= {IDS: (context,)} if IDS in features else {}
    shards: list[Shard] = []
    for file in _json(folder / STATE).get("_data_files", ()):
        shards += _shards(folder / Path(file["filename"]).name, shapes, context)
    if not shards:
        raise DataError(f"{folder} is a data set without rows")
    sites = [site for site in shapes if site != IDS]
    return Cache(
        place=f"the SAELens cache in {folder}",
        shards=shards,
        widths={site: shapes[site][1] for site in sites},
        dtypes={site: shards[0].values[site].dtype for site in sites},
        context_size=context,
        provenance={"sites": sites, "context_size": context},
        partial=True,
    )


def _shards(path: Path, shapes: dict[str, tuple[int, ...]], context: int) -> list[Shard]:
    """The record batches of a file."""
    import pyarrow as pa

    try:
        batches = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().to_batches()
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptFileError(f"{path} cannot be read as Arrow ({error}): copy or make the cache again") from error
    shards: list[Shard] = []
    for batch in batches:
        number = len(batch)
        columns = {name: _column(batch.column(name), shape, path) for name, shape in shapes.items()}
        shards.append(
            Shard(
                name=f"{path.name}[{len(shards)}]",
                rows=number * context,
                values={
                    name: column.unflatten(0, (-1, shapes[name][1])) for name, column in columns.items() if name != IDS
                },
                scales={},
                tokens=columns[IDS].unflatten(0, (-1, context)) if IDS in columns else None,
            )
        )
    return [shard for shard in shards if shard.rows]


def _column(column: Any, shape: tuple[int, ...], path: Path) -> Shaped[Tensor, " numbers"]:
    """The numbers of a column of nested lists, which have to be lists of `shape` throughout."""
    for size in shape:
        column = getattr(column, "storage", column)  # of the extension type for arrays, if `datasets` is imported
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if column.null_count or (lengths != size).any():
            raise CorruptFileError(f"{path}: expected arrays of {list(shape)} throughout, as {INFO} says")
        column = column.flatten()
    if column.null_count or (dtype := DTYPES.get(str(column.type))) is None:
        raise CorruptFileError(f"{path}: expected numbers of {', '.join(DTYPES)}, found {column.type}")
    memory = column.buffers()[1]
    return tensor_at(memory.address + column.offset * dtype.itemsize, len(column) * dtype.itemsize, dtype, memory)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from error
