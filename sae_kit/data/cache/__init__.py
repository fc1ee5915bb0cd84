"""Activations on disk: written once, trained on many times.

    write_cache(harvest, folder, tokens=...)        shards of rows, a manifest; goes on where it was cut short
    CacheReader(folder, batch_tokens=...)           batches in a global shuffle, or blocks for the mixing buffer
    open_cache(folder)                              what a cache holds, and its contexts in the order of the text
    push_cache, pull_cache                          as a data set of the hub

SAELens' caches (Arrow) are read too.
"""

from sae_kit.data.cache.config import CacheConfig, PushConfig
from sae_kit.data.cache.files import Manifest, read_manifest
from sae_kit.data.cache.reader import Cache, CacheReader, open_cache
from sae_kit.data.cache.sharing import pull_cache, push_cache
from sae_kit.data.cache.writer import write_cache

__all__ = [
    "Cache",
    "CacheConfig",
    "CacheReader",
    "Manifest",
    "PushConfig",
    "open_cache",
    "pull_cache",
    "push_cache",
    "read_manifest",
    "write_cache",
]
