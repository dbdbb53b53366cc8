import io
import json
import re
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from dimaskdino.errors import UserError
from dimaskdino.prediction.canvases import open_canvas
from dimaskdino.prediction.images import to_rgb
from dimaskdino.prediction.inputs import Source, find_sources
from dimaskdino.prediction.job import Job, quick_turns
from dimaskdino.prediction.outputs import Outputs, check_writable, mask_map
from dimaskdino.prediction.records import Records, Share, write_csv
from dimaskdino.prediction.results import Classes, Prediction
from dimaskdino.prediction.video import FALLBACK_RATE, Frames, Tracker
from dimaskdino.structures import RleMasks

CLASSES = Classes(["blob"], [1])


def find_bright(images: Sequence[np.ndarray], sources: Sequence[str]) -> list[Prediction]:
    """A model that finds what is bright, as one object."""
    return [
        Prediction({"instances": bright(image)}, image=image, classes=CLASSES, source=source)
        for image, source in zip(images, sources, strict=True)
    ]


def bright(image: np.ndarray) -> Instances:
    mask = torch.from_numpy(image.min(2) > 128)[None]
    masks = RleMasks.of(mask)
    found = Instances(mask.shape[1:], scores=torch.full((1,), 0.9), pred_classes=torch.zeros(1, dtype=torch.int64))
    found.pred_boxes, found.pred_masks = masks.get_bounding_boxes(), masks
    return found if mask.any() else found[torch.zeros(1, dtype=torch.bool)]


def picture(left: int, side: int = 64) -> np.ndarray:
    """A bright square of 10 px on black."""
    image = np.zeros((side, side, 3), dtype=np.uint8)
    image[20:30, left : left + 10] = 255
    return image


def test_turns_are_quick_while_a_job_runs() -> None:
    before = sys.getswitchinterval()
    with quick_turns():
        assert sys.getswitchinterval() <= before / 10
    assert sys.getswitchinterval() == before


def test_the_size_of_a_huge_picture_is_not_that_of_its_copy(tmp_path: Path) -> None:
    canvas = open_canvas(np.zeros((10, 4800, 3), dtype=np.uint8))
    found = Prediction({}, image=canvas.copy(), canvas=canvas, classes=CLASSES)
    record = Outputs(tmp_path, ()).write(Source("a.png", "image", "a", 0), found, 1)
    assert (record["height"], record["width"]) == (10, 4800)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(5):
        Image.fromarray(picture(10 * number)).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def video(path: Path, frames: int = 9, rate: float = 12.5, codec: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (64, 64))
    for frame in range(frames):
        writer.write(picture(3 * frame))
    writer.release()
    return path


def job(output: Path, predict=find_bright, share: Share = Share(), kinds=("pictures",), **options) -> Job:  # noqa: B008
    return Job(
        read=to_rgb, predict=predict, outputs=Outputs(output, kinds), records=Records(output, {}, share), **options
    )


def sources(*given: Path) -> list[Source]:
    return find_sources([str(each) for each in given], io.StringIO())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_bad_file_is_noted_and_the_rest_is_done(folder, tmp_path, batch_size) -> None:
    (folder / "1.png").write_bytes(b"not an image")
    (folder / "3.png").unlink()
    names = [folder / f"{number}.png" for number in range(5)]
    work = job(tmp_path / "out", batch_size=batch_size)
    work.run(sources(*names))
    assert len(work.failed) == 2
    assert "1.png" in work.failed[0]
    assert "3.png" in work.failed[1]
    done = [record for record in work.records.merged() if "error" not in record]
    assert [record["results"][0]["bbox"] for record in done] == [[10 * number, 20, 10, 10] for number in (0, 2, 4)]
    assert sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir()) == ["0.jpg", "2.jpg", "4.jpg"]


def test_a_job_that_was_stopped_goes_on(folder, tmp_path) -> None:
    seen: list[str] = []

    def stop_at_the_fourth(images, names):
        seen.extend(names)
        if len(seen) == 4:
            raise MemoryError
        return find_bright(images, names)

    first = job(tmp_path / "out", stop_at_the_fourth)
    with pytest.raises(MemoryError):
        first.run(sources(folder))
    second = job(tmp_path / "out")
    left = [source for source in sources(folder) if not second.records.state().get(source.number)]
    assert left
    second.run(left)
    assert second.records.state() == dict.fromkeys(range(5), True)


def test_image_ids_come_from_annotations(folder, tmp_path) -> None:
    # The others take no id of the file.
    work = job(tmp_path / "out", image_ids={"2.png": 77, "in/3.png": 1, "other/3.png": 2, "3.png": 5})
    work.run(sources(folder))
    assert [record["results"][0]["image_id"] for record in work.records.merged()] == [78, 79, 77, 1, 82]


def test_an_output_that_cannot_be_written_ends_the_job(folder, tmp_path) -> None:
    work = job(tmp_path / "out")
    (tmp_path / "out" / "pictures").touch()
    with pytest.raises(UserError, match="pictures"):
        work.run(sources(folder))


# Rates that MPEG-4 has no exact time for are rounded.
@pytest.mark.parametrize(("rate", "kept"), [(12.5, 12.5), (83.333, 83.33)])
def test_a_video_keeps_its_rate_and_length(tmp_path, rate: float, kept: float) -> None:
    work = job(tmp_path / "out", batch_size=4)
    work.run(sources(video(tmp_path / "v.avi", rate=rate, codec="MJPG")))
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "pictures" / "v.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FPS), drawn.get(cv2.CAP_PROP_FRAME_COUNT)) == (kept, 9)
    lines = [json.loads(line) for line in (tmp_path / "out" / "videos" / "v.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(9))
    x = [line["results"][0]["bbox"][0] for line in lines]
    assert x == pytest.approx([3 * frame for frame in range(9)], abs=1)
    (record,) = work.records.merged()
    assert (record["count"], record["rate"]) == (9, pytest.approx(rate))


def test_a_video_of_a_panoptic_model_has_segments(tmp_path) -> None:
    def segment(images: Sequence[np.ndarray], names: Sequence[str]) -> list[Prediction]:
        result = torch.ones(64, 64, dtype=torch.int32), [{"id": 1, "category_id": 0, "isthing": False}]
        return [Prediction({"panoptic_seg": result}, image=image, classes=CLASSES) for image in images]

    job(tmp_path / "out", segment).run(sources(video(tmp_path / "v.mp4", frames=2)))
    lines = [json.loads(line) for line in (tmp_path / "out" / "videos" / "v.jsonl").read_text().splitlines()]
    assert [(line["results"], line["segments"][0]["class"]) for line in lines] == [([], "blob")] * 2


def test_a_limit_ends_a_video_early(tmp_path) -> None:
    (source,) = sources(video(tmp_path / "v.mp4"))
    frames = Frames(source, 3)
    assert (len(list(frames)), frames.count, Frames(source).count) == (3, 3, 9)


@pytest.mark.parametrize("length", [-1.0, 0.0])
def test_camera_without_rate_and_length_gets_the_usual_rate(monkeypatch, length: float) -> None:
    class Camera:
        def __init__(self, index: int) -> None:
            pass

        def read(self) -> tuple[bool, np.ndarray]:
            return True, np.zeros((2, 3, 3), np.uint8)

        def get(self, what: int) -> float:
            return 0.0 if what == cv2.CAP_PROP_FPS else length

        def release(self) -> None:
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    frames = Frames(Source("0", "camera", "camera_0", 0), 2)
    assert (frames.rate, frames.count, len(list(frames))) == (FALLBACK_RATE, None, 2)


def test_half_a_video_leaves_no_file(tmp_path) -> None:
    def stop(images, names):
        raise MemoryError

    with pytest.raises(MemoryError):
        job(tmp_path / "out", stop).run(sources(video(tmp_path / "v.mp4")))
    assert [path for path in (tmp_path / "out").rglob("*v*") if path.is_file()] == []


def test_a_video_that_is_not_written_to_its_end_is_an_error(tmp_path, monkeypatch) -> None:
    source = sources(video(tmp_path / "v.mp4"))
    monkeypatch.setattr(cv2.VideoWriter, "write", lambda *_: None)  # as on a full disk, where OpenCV says nothing
    with pytest.raises(UserError, match=r"v\.mp4 .*free some space"):
        job(tmp_path / "out").run(source)
    assert [path for path in (tmp_path / "out").rglob("*v*") if path.is_file()] == []


@pytest.mark.parametrize("content", [None, b"", b"not a video"])
def test_a_video_without_frames_is_noted(tmp_path, content) -> None:
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    work = job(tmp_path / "out")
    work.run(sources(tmp_path / "v.mp4", tmp_path / f"{'x' * 300}.mp4"))
    assert "v.mp4" in work.failed[0]
    assert "xxx.mp4" in work.failed[1]


def test_a_video_that_breaks_off_is_noted_with_what_it_gave(tmp_path) -> None:
    content = video(tmp_path / "v.avi", frames=20, codec="MJPG").read_bytes()
    (tmp_path / "v.avi").write_bytes(content[: len(content) // 2])
    work = job(tmp_path / "out")
    work.run(sources(tmp_path / "v.avi"))
    assert re.search(r"v\.avi .* of 20 frames", work.failed[0])
    (record,) = work.records.merged()
    lines = (tmp_path / "out" / record["frames"]).read_text().splitlines()
    assert 0 < record["count"] == len(lines) < 18
    whole = Frames(sources(video(tmp_path / "v.mp4"))[0])
    assert (len(list(whole)), whole.missing) == (9, "")
    write_csv(work.records, CLASSES)
    assert len((tmp_path / "out" / "detections.csv").read_text().splitlines()) == 1 + len(lines)


def test_tracks_follow_objects(tmp_path) -> None:
    pytest.importorskip("trackers")
    work = job(tmp_path / "out", track_score=0.5)
    work.run(sources(video(tmp_path / "v.mp4")))
    lines = [json.loads(line) for line in (tmp_path / "out" / "videos" / "v.jsonl").read_text().splitlines()]
    tracks = {line["results"][0]["track_id"] for line in lines[2:]}
    assert len(tracks) == 1
    assert tracks != {-1}


def test_tracking_without_its_package_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trackers", None)
    with pytest.raises(UserError, match="dimaskdino.track"):
        Tracker(25, 0.5)


def test_a_mask_map_shows_better_objects_on_top() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, 1:3] = True, True
    found = Instances((4, 4), scores=torch.tensor([0.9, 0.8]), pred_classes=torch.zeros(2, dtype=torch.int64))
    found.pred_boxes, found.pred_masks = Boxes(torch.zeros(2, 4)), masks
    prediction = Prediction({"instances": found}, image=np.zeros((4, 4, 3), np.uint8), classes=CLASSES)
    assert np.asarray(mask_map(prediction)).tolist() == [[1] * 4, [1] * 4, [2] * 4, [0] * 4]
    prediction.size = (2000, 2000)  # two bytes a pixel, once
    prediction["instances"] = found[:0]
    tracemalloc.start()
    mask_map(prediction)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 2 * 2000 * 2000
    logits = torch.eye(2)[:, None]
    semantic = Prediction({"sem_seg": logits}, image=np.zeros((1, 2, 3), np.uint8), classes=CLASSES)
    assert np.asarray(mask_map(semantic)).tolist() == [[1, 2]]


def test_an_output_folder_is_made_with_its_parents_and_left_empty(tmp_path) -> None:
    for _ in range(2):
        check_writable(tmp_path / "a" / "b")
    assert not [*(tmp_path / "a" / "b").iterdir()]
