"""Caches on the hub: an ordinary data set repository that holds the files of a cache and a card.

Shards go first and the manifest last, so that a repository is a cache only when all of it is there. Pushing again
sends what is new.
"""

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sae_kit import config as trees
from sae_kit.data.cache.files import MANIFEST, SHARD, Manifest, damage, read_manifest
from sae_kit.errors import CorruptFileError, DataError

T = TypeVar("T")

CARD = "README.md"
BEGIN, END = "<!-- sae_kit:begin -->", "<!-- sae_kit:end -->"
FILES_PER_COMMIT = 50  # about 50 GB: what is pushed before a connection breaks stays pushed
WAITS = (0.5, 1.0, 2.0)  # seconds before another try, where a server failed


def push_cache(
    folder: Path | str,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push a complete cache to the data set repository `repo`, which is made if there is none; the commit's address.

    Text of the card that stands outside its marked block is kept.

    Raises:
        DataError: the cache is unfinished, or the hub refuses.
        CorruptFileError: a shard is missing or torn.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise DataError(f"the cache in {folder} is unfinished: {manifest.rows:,} of {manifest.tokens:,} activations")
    if wrong := [found for entry in manifest.shards if (found := damage(entry, folder))]:
        raise CorruptFileError(f"not pushed: {'; '.join(wrong)}")
    api = HfApi(endpoint=endpoint, token=token)

    def push() -> str:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True)
        present = api.list_repo_files(repo, repo_type="dataset", revision=revision)
        files = {shard.file for shard in manifest.shards}
        stale = sorted(name for name in present if SHARD.fullmatch(name) and name not in files)
        card = _card(manifest, repo, _text(api, repo, revision) if CARD in present else None)
        shards = [CommitOperationAdd(name, folder / name) for name in sorted(files)]
        operations = [
            *shards,
            CommitOperationAdd(MANIFEST, folder / MANIFEST),
            CommitOperationAdd(CARD, card.encode()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        ends = [*range(FILES_PER_COMMIT, len(shards), FILES_PER_COMMIT), len(operations)]
        address = ""
        for start, end in itertools.pairwise((0, *ends)):
            part = f", files {start + 1} to {end}" if len(ends) > 1 else ""
            address = api.create_commit(
                repo,
                operations=operations[start:end],
                commit_message=f"{manifest.rows:,} activations{part}",
                repo_type="dataset",
                revision=revision,
            ).commit_url
        return str(address)

    return _ask(push, f"push to the data set {repo}")


def pull_cache(
    repo: str,
    *,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download a cache of the hub, or find it where it was downloaded before; its folder.

    A commit, or a revision that is on this machine, is not asked for again while offline.

    Raises:
        DataError: there is no such repository or revision, it holds no cache, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "token": token, "endpoint": endpoint}
    patterns = [MANIFEST, CARD, "*.safetensors", "*.arrow", "state.json", "dataset_info.json"]
    found = _ask(
        lambda: snapshot_download(repo, cache_dir=cache_dir, allow_patterns=patterns, **options),
        f"get the data set {repo}",
    )
    return Path(found)


def locate(place: Path | str, *, revision: str | None = None) -> Path:
    """The folder of a cache: `place` itself, or the data set of that name on the hub."""
    folder = Path(place)
    if folder.exists() or isinstance(place, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        return folder
    try:
        return pull_cache(place, revision=revision)
    except DataError as error:
        raise DataError(f"there is no folder {place}, and {error}") from error


def _ask(call: Callable[[], T], what: str) -> T:
    """The answer of the hub, after up to three more tries where a server failed."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for wait in (*WAITS, None):
        try:
            return call()
        except HFValidationError:
            raise
        except (HfHubHTTPError, OSError, ValueError) as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if (status is not None and status < 500) or wait is None or isinstance(error, FileNotFoundError):
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DataError(
                    f"cannot {what}: {reason} A private repository needs a token (`hf auth login`, or HF_TOKEN), and "
                    "a gated one that its terms were accepted; without a network only what was downloaded is there"
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def _text(api: Any, repo: str, revision: str | None) -> str:
    path = api.hf_hub_download(repo, CARD, repo_type="dataset", revision=revision)
    return Path(path).read_text(encoding="utf-8")


def _card(manifest: Manifest, repo: str, present: str | None) -> str:
    """The card: ours where there was none, else the present one with its marked block replaced, or added at its end."""
    block = f"{BEGIN}\n{_facts(manifest, repo)}{END}\n"
    if present is None:
        head = trees.dump_yaml({"library_name": "sae_kit", "tags": ["activations", "mechanistic-interpretability"]})
        return f"---\n{head}---\n# {repo.partition('/')[2]}\n\n{block}"
    if BEGIN in present and END in present:
        return present[: present.index(BEGIN)] + block + present[present.index(END) + len(END) :].lstrip("\n")
    return f"{present.rstrip()}\n\n{block}"


def _facts(manifest: Manifest, repo: str) -> str:
    sites = "\n".join(f"| `{site}` | {entry.width:,} | {entry.dtype} |" for site, entry in manifest.sites.items())
    contexts = sum(shard.contexts for shard in manifest.shards)
    size = f"{sum(shard.bytes for shard in manifest.shards) / 1e9:,.2f} GB in {len(manifest.shards):,} files"
    return f"""Activations of a language model, one row per token, written by sae_kit {manifest.version}.

| | |
|---|---|
| activations | {manifest.rows:,} at each site |
| contexts | {contexts:,} of {manifest.context_size:,} tokens; all ids are stored |
| stored as | {manifest.dtype}, {size} |

| site | width | computed in |
|---|---|---|
{sites}

```python
from sae_kit.data.cache import CacheReader

batches = CacheReader("{repo}", batch_tokens=4096)  # site -> [4096, width], globally shuffled
```

Where they come from:

```yaml
{trees.dump_yaml(manifest.provenance)}```
"""
