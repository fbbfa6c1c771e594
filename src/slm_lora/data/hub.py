"""Load a hub data set at a known commit, and explain failed downloads."""

from __future__ import annotations

import re
from pathlib import Path

from slm_lora.config.schema import DataSection
from slm_lora.data import formats
from slm_lora.data.arrow import arrow_table
from slm_lora.data.table import Table
from slm_lora.errors import DataError, SlmLoraError, StorageError

HUB_TIMEOUT = 5.0
"""Timeout of the first request to the hub, in seconds."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRANSPORTS = {"requests", "httpx", "httpx2"}
_LOCAL_INSTEAD = "give a local file with data.name=path.jsonl"


def read_hub(section: DataSection) -> tuple[Table, str]:
    """Load the rows of a hub data set, numbered from 0 as on the hub.

    Returns:
        The rows, and the SHA of their commit (``unknown`` if the cache does not record it).

    Raises:
        StorageError: the download failed, or the cache holds another commit.
        DataError: the split does not exist, or its rows cannot be read.
    """
    import datasets
    import huggingface_hub

    name, offline, commit = section.name, datasets.config.HF_HUB_OFFLINE, None
    try:
        if not offline:
            # One request first: without a network `load_dataset` would retry for half a minute.
            api = huggingface_hub.HfApi()
            commit = api.dataset_info(name, revision=section.revision, timeout=HUB_TIMEOUT).sha
        loaded = datasets.load_dataset(
            name, revision=commit or section.revision, split=section.split, keep_in_memory=False
        )
        # Without any known column all are kept, for the message that names them.
        columns = formats.columns_to_decode(loaded.column_names, section) or loaded.column_names
        table = loaded.select_columns(columns)
        batches = table.with_format("arrow")[:].to_batches()
    except Exception as error:
        raise _hub_failure(section, error) from error
    # When loading fails, `load_dataset` falls back to any commit in its cache; the folder there
    # is named after the commit.
    folders = [Path(file["filename"]).parent.name for file in loaded.cache_files]
    cached = next((folder for folder in folders if _COMMIT.fullmatch(folder)), None)
    expected = commit or section.revision
    if expected and cached and cached != expected:
        raise StorageError(
            f"hub data set {name} is in the cache as commit {cached}, which may not be "
            f"{expected}, and that could not be loaded; go online, or set data.revision={cached}"
        )
    schema = loaded.features.arrow_schema
    return arrow_table(schema, batches, section, name, first=0), commit or cached or "unknown"


def _hub_failure(section: DataSection, error: Exception) -> SlmLoraError:
    """Convert the error of a failed download; an error that is not the hub's is raised again."""
    import datasets
    from huggingface_hub import errors as hub

    name = f"hub data set {section.name}"
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, hub.GatedRepoError):
        return StorageError(
            f"{name} is gated: accept its terms at https://huggingface.co/datasets/{section.name}"
            f" and log in with `hf auth login`, or {_LOCAL_INSTEAD}"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return StorageError(f"{name} has no revision {section.revision!r}; check data.revision")
    if isinstance(error, hub.RepositoryNotFoundError):
        return StorageError(
            f"{name} was not found (nor a file of that name), or is private: check data.name, log "
            f"in with `hf auth login`, or {_LOCAL_INSTEAD}"
        )
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        return StorageError(f"{name}: the hub answered {status}; try later, or {_LOCAL_INSTEAD}")
    if datasets.config.HF_HUB_OFFLINE and isinstance(error, OSError):
        return StorageError(
            f"{name} is not in the cache, and HF_HUB_OFFLINE forbids the network: {_LOCAL_INSTEAD}"
        )
    # The hub's transport has changed its name over the versions.
    if isinstance(error, ConnectionError | TimeoutError) or modules & _TRANSPORTS:
        return StorageError(
            f"no network for {name}: {_LOCAL_INSTEAD}, or set HF_HUB_OFFLINE=1 to use a cached copy"
        )
    if isinstance(error, OSError):
        return StorageError(f"{name} cannot be stored: {error.strerror or first_line}")
    if isinstance(error, ValueError | RuntimeError | datasets.exceptions.DatasetsError):
        return DataError(f"{name} cannot be read: {first_line}")
    raise error
