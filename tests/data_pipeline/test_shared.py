"""Entries that lie in memory as bytes, and files that one process reads for all."""

import errno
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from detectron2.data.datasets import register_coco_instances

from dimaskdino.data import shared
from dimaskdino.data.coco_file import Annotations, annotations_by_image, has_objects, read_coco, read_json
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.data.shared import PackedEntries
from dimaskdino.errors import DatasetError

ENTRIES: list[Any] = [{"file_name": "é.png", "annotations": [{"bbox": [1.5, 2, 3, 4]}]}, {}, {"image_id": "a"}]


def test_packed_entries_are_a_sequence() -> None:
    packed = PackedEntries(ENTRIES)
    assert len(packed) == 3
    assert list(packed) == [*packed[:]] == ENTRIES
    assert packed[-1] == {"image_id": "a"}
    assert packed[::2] == ENTRIES[::2]
    assert packed[0] is not packed[0]  # what a mapper changes is its own
    with pytest.raises(IndexError):
        packed[3]
    assert list(PackedEntries([])) == []


def test_packed_entries_reach_workers_that_are_not_forked() -> None:
    assert list(pickle.loads(pickle.dumps(PackedEntries(ENTRIES)))) == ENTRIES


@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux")
def test_packed_entries_leave_no_file_even_when_killed() -> None:
    packed = PackedEntries(ENTRIES)
    assert os.readlink(packed._path).startswith("/memfd:")


def test_entries_are_packed_where_files_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    packed = PackedEntries(ENTRIES)
    assert list(packed) == ENTRIES
    assert packed[1:] == ENTRIES[1:]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux")
@pytest.mark.parametrize("hidden", [False, True])
def test_another_process_maps_them_or_makes_its_own(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = PackedEntries(ENTRIES)
    path = "/proc/hidden" if hidden else first._path
    monkeypatch.setattr(shared, "_shares", lambda: True)
    monkeypatch.setattr(shared, "is_first_of_machine", lambda: False)
    monkeypatch.setattr(shared, "once_a_machine", lambda make: (path, first._ends))
    made: list[int] = []
    second = PackedEntries.once_a_machine(lambda: made.append(1) or ENTRIES)  # type: ignore[func-returns-value]
    assert list(second) == ENTRIES
    assert len(made) == hidden


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2.5, -0.0, 1e2], "é": "\\u00e9", "a": 3}', "[123456789012345678901234567890]", "[NaN, 1e999]", "null"],
    ids=["plain", "large number", "not finite", "null"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_read_as_by_python(tmp_path: Path, text: str, encoding: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(text, encoding=encoding)
    assert repr(read_json(file)) == repr(json.loads(text))


def test_annotations_stay_text_until_they_are_looked_at(tmp_path: Path) -> None:
    usual = [{"id": 5, "image_id": 2, "category_id": 1, "note": "é"}, {"id": 7, "image_id": 1, "category_id": 3.0}]
    odd = '{"id": "a", "image_id": 2, "category_id": 1, "iscrowd": 1, "area": 1e999}'
    # A file of LVIS names an image by its address.
    names = {
        2: {"coco_url": "http://x/val2017/2.jpg"},
        1: {"file_name": "1.jpg", "coco_url": "http://x/train2017/1.jpg"},
    }
    lists = {"images": [{"id": number, "height": 1, "width": 1, **names[number]} for number in names]}
    text = json.dumps({**lists, "categories": [], "annotations": usual}, ensure_ascii=False)[:-2] + f", {odd}]}}"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file = tmp_path / f"{encoding}.json"
        file.write_text(text, encoding=encoding)
        (one, first), (two, second) = annotations_by_image(read_coco(str(file)))
        assert (one["file_name"], two["file_name"]) == ("1.jpg", "val2017/2.jpg")
        assert isinstance(first, Annotations)
        assert [*first] == usual[1:]
        assert [*second] == second[:] == [second[0], second[-1]] == [usual[0], json.loads(odd)]
        assert [second.array(key).tolist() for key in ("id", "iscrowd")] == [[5, "a"], [0, 1]]
        assert has_objects(second)
        assert not has_objects(second.take(second._which[1:]))


def test_entries_for_processes_are_those_of_the_catalog(registrations: None, tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "one.png", "height": 2, "width": 2}
    mask = {"size": [2, 2], "counts": [1, 2, 1]}
    one = {"id": 1, "image_id": 1, "category_id": 9, "segmentation": mask, "bbox": [0, 0, 2, 2], "extra": 4}
    coco = {"images": [image], "categories": [{"id": 4, "name": "a"}, {"id": 9, "name": "b"}], "annotations": [one]}
    file = tmp_path / "file.json"
    file.write_text(json.dumps(coco))
    register_coco_instances("mine", {}, str(file), str(tmp_path))
    packed = load_dataset("mine", ["extra"], packed=True)
    assert isinstance(packed[0]["annotations"], Annotations)
    assert [*PackedEntries(packed)] == load_dataset("mine", ["extra"])
    assert [*packed[0]["annotations"]] == PackedEntries(packed)[0]["annotations"]
    assert packed[0]["annotations"][0]["category_id"] == 1
    coco["annotations"].append({**one, "id": 2, "category_id": 5})
    file.write_text(json.dumps(coco))
    with pytest.raises(DatasetError, match=r"Annotation 2 of one\.png .* 5,"):
        load_dataset("mine", packed=True)


@pytest.mark.parametrize("content", [b"", b"[1,", b'["\xff"]', b"[" * 100_000])
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"broken\.json"):
        read_json(file)
