"""Inputs and records of a job."""

import csv
import io
import json
import ntpath
import os
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest

from dimaskdino.errors import UserError
from dimaskdino.prediction import inputs
from dimaskdino.prediction.inputs import find_sources
from dimaskdino.prediction.records import Records, Share, write_coco, write_csv
from dimaskdino.prediction.results import Classes

NOTHING = io.StringIO()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.JPG", "a.png", "a.jpg", "deep/c.png", "deep/d.mp4", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    return tmp_path / "in"


def names(*given: object, stdin: str = "", **options) -> list[str]:
    return [source.name for source in find_sources([str(each) for each in given], io.StringIO(stdin), **options)]


def test_a_folder_is_searched_to_its_depth_in_one_order(folder) -> None:
    sources = find_sources([str(folder)], NOTHING)
    assert [(source.name, source.kind) for source in sources] == [
        ("a.jpg", "image"),
        ("a.png", "image"),
        ("b", "image"),
        ("deep/c", "image"),
        ("deep/d", "video"),
    ]
    assert [source.number for source in sources] == list(range(5))
    (folder / "deep" / "circle").symlink_to(folder)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "e.png").touch()
    assert find_sources([str(folder)], NOTHING) == sources


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch) -> None:
    scandir = os.scandir

    def read(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", read)
    with pytest.raises(PermissionError, match="deep"):
        find_sources([str(folder)], NOTHING)


def test_globs_and_lists_name_files(folder) -> None:
    assert names(folder / "*.png") == ["a"]
    assert names(folder / "**" / "*.png") == ["a", "deep/c"]
    assert names("-", stdin=f"{folder / 'b.JPG'}\n\n{folder / 'deep' / 'c.png'}\n") == ["b", "deep/c"]
    for encoding in ("utf-8", "utf-8-sig"):
        (folder / "list").write_text(f"{folder / 'b.JPG'}\n{folder / 'b.JPG'}\n", encoding=encoding)
        assert names(f"@{folder / 'list'}") == ["b"]
    with pytest.raises(UserError, match="list on stdin cannot be read"):
        find_sources(["-"], io.TextIOWrapper(io.BytesIO(b"\xe9.png"), encoding="utf-8"))


def test_a_file_named_like_a_glob_is_that_file(folder) -> None:
    (folder / "[a].png").touch()
    assert names(folder / "[a].png") == ["[a]"]


def test_each_file_has_outputs_of_its_own(folder) -> None:
    (folder / "a.png.gif").touch()
    assert names(folder) == ["a.jpg", "a.png", "a.png.gif", "b", "deep/c", "deep/d"]
    assert names(folder / "b.JPG", folder / "deep" / ".." / "b.JPG") == ["b"]
    (folder / "camera_1.mp4").touch()
    assert names(folder / "camera_1.mp4", camera=1) == ["camera_1.mp4", "camera_1"]


def test_drives_are_folders_of_the_outputs(monkeypatch) -> None:
    monkeypatch.setattr(inputs, "os", SimpleNamespace(path=ntpath))
    monkeypatch.setattr(inputs, "Path", PureWindowsPath)
    paths = [r"C:\a\1.png", r"D:\a\1.png", r"\\host\share\1.png"]
    assert inputs._output_names(paths, ()) == ["C/a/1", "D/a/1", "host_share/1"]
    assert inputs._output_names(paths[:1] * 2, ()) == ["1.png"] * 2


def test_results_below_a_given_folder_are_no_inputs(folder) -> None:
    before = names(folder, output=folder / "out")
    (folder / "out" / "pictures").mkdir(parents=True)
    for path in (folder / "out" / "settings.json", folder / "out" / "pictures" / "b.jpg"):
        path.touch()
    assert names(folder, output=folder / "out") == before
    assert names(folder / "**" / "*.jpg", output=folder / "out") == ["a"]
    assert names(folder / "out" / "pictures", output=folder / "out") == ["b"]
    assert "out/pictures/b" in names(folder)


def test_missing_file_is_left_to_the_job(folder) -> None:
    assert names(folder / "absent.png") == ["absent"]


def test_a_camera_comes_last(folder) -> None:
    *_, camera = find_sources([str(folder / "a.png")], NOTHING, camera=2)
    assert (camera.path, camera.kind, camera.name, camera.number) == ("2", "camera", "camera_2", 1)


def test_nothing_to_predict_is_an_error(folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for given, named in (
        (tmp_path / "*.png", r"\*\.png"),
        (f"@{tmp_path / 'absent'}", f" {tmp_path / 'absent'} "),
        (tmp_path / "empty",) * 2,
    ):
        with pytest.raises(UserError, match=str(named)):
            names(given)
    with pytest.raises(UserError, match="name images"):
        names()


CLASSES = Classes(["cat", "dog"], [3, 7])


def record(number: int, score: float = 0.5) -> dict:
    result = {"image_id": number, "category_id": 7, "bbox": [1.0, 2.0, 3.0, 4.0], "score": score}
    result["segmentation"] = {"size": [1, 4], "counts": "13"}  # one pixel of background, then three
    return {"number": number, "id": number, "file": f"{number}.png", "height": 1, "width": 4, "results": [result]}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, (2, 8)),
        ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2"}, (3, 4)),
    ],
)
def test_the_share_is_read_from_the_environment(environment, expected) -> None:
    share = Share.from_environment(environment)
    assert (share.index, share.count) == expected


@pytest.mark.parametrize(("task", "step"), [(5, 1), (3, 2)])  # of --array 0,1,5 and 0,2,3
def test_a_job_array_with_gaps_is_refused(task, step) -> None:
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": str(step)}
    with pytest.raises(UserError, match="--array 0-31"):
        Share.from_environment(array | {"SLURM_ARRAY_TASK_ID": str(task)})


@pytest.mark.parametrize("name", ["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_named(name) -> None:
    with pytest.raises(UserError, match=f"^{name} is 'x'"):
        Share.from_environment({"SLURM_ARRAY_TASK_ID": "1", name: "x"})


def test_a_job_array_of_several_processes_each_shares_all() -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "WORLD_SIZE": "2"}
    shares = [
        Share.from_environment(array | {"SLURM_ARRAY_TASK_ID": str(task), "RANK": str(rank)})
        for task in range(3)
        for rank in range(2)
    ]
    assert [(share.index, share.count) for share in shares] == [(index, 6) for index in range(6)]


def test_records_of_processes_and_runs_are_merged_in_order(tmp_path: Path) -> None:
    first, second = (Records(tmp_path, {"score": 0.5}, Share(index, 2)) for index in range(2))
    first.add(record(0))
    first.add({"number": 2, "error": "bad", "file": "2.png"})
    second.add(record(1))
    second.add(record(3))
    first.close()
    (tmp_path / "parts" / "cut.jsonl").write_text(json.dumps(record(4))[:30])
    again = Records(tmp_path, {"score": 0.5}, Share())
    assert again.state() == {0: True, 1: True, 2: False, 3: True}
    again.add(record(2))
    assert [each["number"] for each in again.merged() if "error" not in each] == [0, 1, 2, 3]
    assert again.state()[2]


def test_merged_results_are_coco_and_csv(tmp_path: Path) -> None:
    records = Records(tmp_path, {}, Share())
    for number in range(2):
        records.add(record(number))
    records.add({"number": 2, "error": "bad", "file": "2.png"})
    (tmp_path / "videos").mkdir()
    frame = {"frame": 4, "results": [{"category_id": 3, "bbox": [0.0, 0, 1, 1], "score": 0.25, "track_id": 9}]}
    (tmp_path / "videos" / "v.jsonl").write_text(json.dumps(frame) + "\n")
    records.add({"number": 3, "file": "v.mp4", "frames": "videos/v.jsonl"})
    write_coco(records, CLASSES)
    write_csv(records, CLASSES)
    assert json.loads((tmp_path / "coco_results.json").read_text()) == [*record(0)["results"], *record(1)["results"]]
    images = json.loads((tmp_path / "coco_images.json").read_text())
    assert images["categories"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert images["images"][1] == {"id": 1, "file_name": "1.png", "height": 1, "width": 4}
    rows = list(csv.DictReader((tmp_path / "detections.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "v.mp4"]
    assert (rows[0]["class"], rows[0]["x1"], rows[0]["y1"], rows[0]["area"]) == ("dog", "4.00", "6.00", "3")
    assert (rows[2]["class"], rows[2]["frame"], rows[2]["track"]) == ("cat", "4", "9")


def test_a_folder_takes_the_results_of_one_job(tmp_path: Path) -> None:
    Records(tmp_path, {"score": 0.5}, Share()).add(record(0))
    Records(tmp_path, {"score": 0.5}, Share(1, 2))
    with pytest.raises(UserError, match=r"settings\.json.*--overwrite"):
        Records(tmp_path, {"score": 0.6}, Share())
    with pytest.raises(UserError, match="--overwrite"):
        Records(tmp_path, {"score": 0.6}, Share(0, 2), overwrite=True)
    (tmp_path / "detections.csv").touch()
    assert Records(tmp_path, {"score": 0.6}, Share(), overwrite=True).state() == {}
    assert not (tmp_path / "detections.csv").exists()
