"""Weights of hf:// addresses, from a cache as huggingface_hub makes it; there is no network."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.file_io import PathManager

from dimaskdino.checkpoint import Checkpointer, hub, local_path
from dimaskdino.errors import CheckpointError
from dimaskdino.modeling.meta_arch import build_model
from tests.tiny_model import tiny_cfg

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache: Path, name: str, content: bytes = b"", *, repository: str = "owner/model", ref: str = "main") -> Path:
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(COMMIT)
    path = folder / "snapshots" / COMMIT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://a/b", ("a/b", None, "")),
        ("hf://a/b@v1.0", ("a/b", "v1.0", "")),
        ("hf://a/b/c/d.pth", ("a/b", None, "c/d.pth")),
        ("hf://a/b@refs%2Fpr%2F1/d.pth", ("a/b", "refs/pr/1", "d.pth")),
        (str(Path("hf://a.x/b-1/d@2.pth")), ("a.x/b-1", None, "d@2.pth")),
    ],
)
def test_addresses_are_taken_apart(text: str, expected: tuple) -> None:
    assert hub.HubAddress.parse(text) == expected


@pytest.mark.parametrize("text", ["hf://a", "hf://", "hf://a/b@", "hf://a/b@c@d"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"hf://owner/name\[@revision\]\[/file\]"):
        hub.fetch(text)


@pytest.mark.parametrize("text", ["hf:a/b", "HF://a/b", "hf//a/b", "hf:///a/b", "huggingface://a/b"])
def test_misspelled_address_is_no_local_file(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{text} is .*hf://owner/name"):
        hub.local_path(text)
    for name in ("hf/model.pth", "hf_model.pth"):
        assert hub.local_path(name) == Path(name)


def test_named_file_comes_from_the_cache(cache: Path) -> None:
    path = put(cache, "sub/model.pth", b"weights", ref="v1")
    for revision in ("v1", COMMIT):
        assert PathManager.get_local_path(f"hf://owner/model@{revision}/sub/model.pth") == str(path)
    with PathManager.open("hf://owner/model@v1/sub/model.pth", "rb") as file:
        assert file.read() == b"weights"


def test_only_weight_file_needs_no_name(cache: Path) -> None:
    put(cache, "README.md")
    put(cache, "other.pth", repository="owner/other")
    path = put(cache, "weights/model.safetensors")
    assert local_path("hf://owner/model") == path
    assert local_path(Path("hf://owner/model")) == path
    put(cache, "model.pth")
    with pytest.raises(CheckpointError, match=r"hf://owner/model.*add one.*model\.pth, weights/model\.safetensors"):
        local_path("hf://owner/model")


def test_repository_without_weights_is_named(cache: Path) -> None:
    put(cache, "README.md")
    with pytest.raises(CheckpointError, match=r"hf://owner/model: .*no weight file"):
        local_path("hf://owner/model")


@pytest.mark.parametrize("address", ["hf://owner/model/model.pth", "hf://owner/model@v9", "hf://owner/model"])
def test_offline_without_the_file_says_what_to_do(cache: Path, address: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{address}: .*HF_HUB_OFFLINE.*hf download owner/model") as caught:
        local_path(address)
    assert "\n" not in str(caught.value)
    assert str(cache) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RepositoryNotFoundError", "no repository owner/model"),
        ("RevisionNotFoundError", "no revision v1"),
        ("RemoteEntryNotFoundError", r"no file model\.pth"),
    ],
)
def test_answers_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    kind = getattr(huggingface_hub.errors, name, huggingface_hub.errors.EntryNotFoundError)

    def refuse(*args: object, **kwargs: object) -> None:
        raise kind.__new__(kind)  # The constructor wants the server's answer.

    def answer(*args: object, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(siblings=None)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer if "Entry" in name else refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=rf"hf://owner/model@v1/model\.pth: .*{said}"):
        local_path("hf://owner/model@v1/model.pth")


def test_one_quiet_question_tells_whether_there_is_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = []

    def no_network(*args: object, **kwargs: object) -> None:
        logs.append(logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.ERROR))
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    path = put(cache, "model.pth")
    assert local_path("hf://owner/model/model.pth") == path
    with pytest.raises(CheckpointError, match=r"hf://owner/model/b\.pth: .*no route.*hf download owner/model b\.pth"):
        local_path("hf://owner/model/b.pth")
    assert logs == [False, False]


@pytest.mark.parametrize("missing", ["huggingface_hub", "huggingface_hub.errors"])
def test_missing_or_old_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CheckpointError, match=r"hf://owner/model needs .*huggingface_hub: .*dimaskdino\[hub\]"):
        local_path("hf://owner/model")


def test_checkpointer_loads_weights_of_the_hub(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = build_model(tiny_cfg()), build_model(tiny_cfg())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    put(cache, "model.pth", (tmp_path / "model.pth").read_bytes())
    Checkpointer(other).load("hf://owner/model/model.pth")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"^hf://owner/absent: .*HF_HUB_OFFLINE"):
        Checkpointer(other).load("hf://owner/absent")
