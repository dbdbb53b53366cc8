"""Weights on the Hugging Face Hub: ``hf://owner/name[@revision][/file]``, wherever a weight file is named."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from dimaskdino.errors import CheckpointError

# A Path makes one slash of two.
PREFIX = "hf:/"
_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+))?")
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".pkl", ".bin")


class HubAddress(NamedTuple):
    """A repository, a branch, tag or commit (None: the main branch), and a file of it ("": its only weight file)."""

    repository: str
    revision: str | None
    file: str

    @classmethod
    def parse(cls, text: str) -> "HubAddress":
        """Read an address; ``%2F`` in a revision is a slash.

        Raises:
            CheckpointError: the text is not of this form.
        """
        if not (found := _ADDRESS.fullmatch(text)):
            raise CheckpointError(f"{text} is no address on the hub; write hf://owner/name[@revision][/file].")
        repository, revision, file = found.groups()
        return cls(repository, revision and revision.replace("%2F", "/"), file or "")


class HubHandler(PathHandler):
    """Gives iopath the files of the hub."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return str(fetch(path, force=force))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode, buffering, **kwargs)


PathManager.register_handler(HubHandler(), allow_override=True)


def local_path(path: str | Path) -> Path:
    """The file itself, or the local copy of one on the hub."""
    return fetch(str(path)) if str(path).startswith(PREFIX) else Path(path)


def fetch(address: str, *, force: bool = False) -> Path:
    """The local copy of a file on the hub, from the cache of huggingface_hub or fetched into it.

    Raises:
        CheckpointError: huggingface_hub is missing, there is no such repository, revision or file, or the hub cannot
            be reached and the file is not in the cache.
    """
    repository, revision, file = HubAddress.parse(address)
    hub = _package(address)
    try:
        file = file or _weight_file(hub, repository, revision)
        return Path(hub.hf_hub_download(repository, file, revision=revision, force_download=force))
    except CheckpointError as error:
        raise CheckpointError(f"{address}: {error}") from error
    except Exception as error:  # each version of the package has network errors of its own
        raise CheckpointError(f"{address}: {_reason(hub, error, repository, revision, file)}") from error


def _package(address: str) -> ModuleType:
    try:
        for submodule in ("constants", "errors"):
            importlib.import_module(f"huggingface_hub.{submodule}")
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise CheckpointError(f"{address} needs the package huggingface_hub: pip install 'dimaskdino[hub]'.") from error


def _weight_file(hub: ModuleType, repository: str, revision: str | None) -> str:
    """The only weight file of a repository."""
    files = sorted(name for name in _files(hub, repository, revision) if name.endswith(_WEIGHT_FILES))
    if len(files) == 1:
        return files[0]
    if not files:
        raise CheckpointError(f"the repository holds no weight file ({', '.join(_WEIGHT_FILES)}).")
    raise CheckpointError(f"the repository holds several weight files; add one to the address: {', '.join(files)}.")


def _files(hub: ModuleType, repository: str, revision: str | None) -> list[str]:
    """The files of a repository; where the hub cannot be reached, those in the cache."""
    try:
        return hub.HfApi().list_repo_files(repository, revision=revision)
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise
    except Exception:
        if cached := _cached_files(hub, repository, revision or "main"):
            return cached
        raise


def _cached_files(hub: ModuleType, repository: str, revision: str) -> list[str]:
    if not Path(hub.constants.HF_HUB_CACHE).is_dir():
        return []
    return [
        file.file_path.relative_to(snapshot.snapshot_path).as_posix()
        for repo in hub.scan_cache_dir(hub.constants.HF_HUB_CACHE).repos
        if (repo.repo_type, repo.repo_id) == ("model", repository)
        for snapshot in repo.revisions
        if revision in (snapshot.commit_hash, *snapshot.refs)
        for file in snapshot.files
    ]


def _reason(hub: ModuleType, error: Exception, repository: str, revision: str | None, file: str) -> str:
    """What went wrong, and what to do."""
    errors = hub.errors
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"there is no repository {repository}, or it is private; check its name, or log in (hf auth login)."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision}; check its name, or leave it out."
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"the repository has no file {file}; check its name, or leave it out."
    why = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else " ".join(str(error).split())[:200]
    download = f"hf download {repository} {file}".rstrip()
    return (
        f"it is not in the cache {hub.constants.HF_HUB_CACHE}, and the hub cannot be reached ({why}); run `{download}` "
        "where there is a network, or name a local file."
    )
