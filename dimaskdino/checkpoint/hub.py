"""Weights by address: ``hf://owner/name[@revision][/file]`` on the Hugging Face Hub, and what detectron2 fetches."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from dimaskdino.errors import CheckpointError, require

PREFIX = "hf:/"
# A Path makes one slash of two. Windows' drives have one letter.
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):/{1,2}(?!/)")
_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+))?")
_MISSPELLED = re.compile(r"(hf|huggingface)(:|//)", re.IGNORECASE)
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".pkl", ".bin")


class HubAddress(NamedTuple):
    """A repository, a branch, tag or commit (None: the main branch), and a file of it ("": its only weight file)."""

    repository: str
    revision: str | None
    file: str

    @classmethod
    def parse(cls, text: str) -> "HubAddress":
        """Read an address, in which ``%2F`` in a revision is a slash; CheckpointError for text of another form."""
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


def is_address(path: str | Path) -> bool:
    """Whether a path begins as an address does."""
    return bool(_SCHEME.match(str(path)))


def local_path(path: str | Path, remedy: str = "name a local file") -> Path:
    """The path itself, also of a folder, or the local copy of what an address names.

    Those are what detectron2's PathManager knows: hf://, http(s)://, detectron2://, and what the user has registered.

    Raises:
        CheckpointError: the address cannot be fetched; ends with the remedy.
    """
    address = _SCHEME.sub(r"\1://", str(path), count=1) if is_address(path) else ""
    if _MISSPELLED.match(str(path)) and not address.startswith(PREFIX) and not Path(path).exists():
        HubAddress.parse(str(path))
    if not address:
        return Path(path)
    try:
        return Path(PathManager.get_local_path(address))
    except CheckpointError:
        raise
    except Exception as error:  # each handler has errors of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The weights {address} cannot be fetched ({reason}); {remedy}.") from error


def fetch(address: str, *, force: bool = False) -> Path:
    """The local copy of a file on the hub, from the cache of huggingface_hub or fetched into it.

    Raises:
        CheckpointError: huggingface_hub is missing, there is no such repository, revision or file, or the hub cannot be
            reached and the file is not in the cache.
    """
    repository, revision, file = HubAddress.parse(address)
    for submodule in (".constants", ".errors", ""):  # which versions before the extra's lack
        hub = require(f"huggingface_hub{submodule}", address, "hub", CheckpointError)
    try:
        with _quiet():
            files, online = _files(hub, repository, revision, file)
            file = file or _weight_file(files)
            options = {"force_download": force} if online else {"local_files_only": True}
            return Path(hub.hf_hub_download(repository, file, revision=revision, **options))
    except CheckpointError as error:
        raise CheckpointError(f"{address}: {error}") from error
    except Exception as error:  # each version of the package has network errors of its own
        raise CheckpointError(f"{address}: {_reason(hub, error, repository, revision, file)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package from logging each of its attempts; the error says what failed."""
    package = logging.getLogger("huggingface_hub")
    level = package.level
    package.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        package.setLevel(level)


def _weight_file(files: list[str]) -> str:
    files = sorted(name for name in files if name.endswith(_WEIGHT_FILES))
    if len(files) == 1:
        return files[0]
    if not files:
        raise CheckpointError(f"the repository holds no weight file ({', '.join(_WEIGHT_FILES)}).")
    raise CheckpointError(f"the repository holds several weight files; add one to the address: {', '.join(files)}.")


def _files(hub: ModuleType, repository: str, revision: str | None, file: str) -> tuple[list[str], bool]:
    """The files of a repository, and True; where the hub cannot be reached, those in the cache, and False.

    One question without the package's retries tells whether there is a network.
    """
    try:
        found = hub.HfApi().model_info(repository, revision=revision)
        return [each.rfilename for each in found.siblings or ()], True
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise
    except Exception:
        cached = _cached_files(hub, repository, revision or "main")
        if file in cached if file else cached:
            return cached, False
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
