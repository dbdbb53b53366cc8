"""Videos and cameras, frame by frame: read, predict, track, draw, write."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from dimaskdino.errors import UserError, require
from dimaskdino.prediction.inputs import Source
from dimaskdino.prediction.outputs import Outputs, results_of
from dimaskdino.prediction.results import Prediction

FALLBACK_RATE = 25.0  # frames per second, where a file or camera does not say
_WHOLE = 0.9  # least share of a video that is read, as many files say only about how many frames they have


class Frames:
    """The frames of a video or camera, (H, W, 3) uint8 RGB, of which one is in memory at a time.

    Attributes:
        rate: frames per second.
        count: frames, as the file says; None where nothing does.
        missing: after the last frame, a message if the file breaks off.

    Raises:
        UserError: it cannot be opened, or has no frames.
    """

    def __init__(self, source: Source, limit: int | None = None) -> None:
        self._name, self._limit = source.path, limit
        if source.kind == "video" and not os.path.isfile(source.path):
            raise UserError(f"{source.path} does not exist; check the path.")
        self._capture = cv2.VideoCapture(int(source.path) if source.kind == "camera" else source.path)
        # A file that cannot be opened gives no first frame.
        opened, first = self._capture.read()
        if not opened:
            what = "camera" if source.kind == "camera" else "video"
            raise UserError(f"The {what} {source.path} has no frames that can be read.")
        self._first: np.ndarray = first
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else FALLBACK_RATE
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = min(count, limit or count) if count > 0 else None
        self.missing = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        frame = self._first
        for number in itertools.count(1) if self._limit is None else range(1, self._limit + 1):
            seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            yield np.ascontiguousarray(frame[..., ::-1])
            read, frame = self._capture.read()
            if not read:
                # Where frames have no even rate, their number is a guess, and the time says more.
                if self.count and max(number, seconds * self.rate) < _WHOLE * self.count:
                    self.missing = (
                        f"{self._name} breaks off: {number} of {self.count} frames can be read, and what was found in "
                        "them is kept; replace the file."
                    )
                break
        self._capture.release()


class Tracker:
    """Gives the objects of a video numbers that stay theirs from frame to frame, by ByteTrack of the package trackers.

    Args:
        rate: frames per second.
        score: least score with which a track begins.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, rate: float, score: float) -> None:
        self._tracker = require("trackers", "--track", "track").ByteTrackTracker(
            frame_rate=rate,
            track_activation_threshold=score,
            high_conf_det_threshold=score,
            minimum_consecutive_frames=1,
        )

    def update(self, found: Prediction) -> list[int]:
        """The track of each detection of the next frame; -1 for one that has none."""
        import supervision

        instances = found.instances
        detections = supervision.Detections(
            xyxy=instances.pred_boxes.tensor.numpy(),
            confidence=instances.scores.numpy(),
            class_id=instances.pred_classes.numpy(),
            data={"row": np.arange(len(instances))},
        )
        tracked = self._tracker.update(detections)
        tracks = np.full(len(instances), -1)
        if len(tracked):
            tracks[tracked.data["row"].astype(int)] = tracked.tracker_id
        return tracks.tolist()


class VideoWriter:
    """Writes an MP4 file and, beside it, a line of JSON for each frame; both have their names once they are whole."""

    def __init__(self, outputs: Outputs, source: Source, rate: float, *, pictures: bool) -> None:
        # OpenCV writes it times a power of ten, up to thousandths, and MPEG-4 takes no more than 65535 there.
        self._rate = round(rate, 3 - (rate > 65) - (rate > 655))
        self._pictures, self._drawn = pictures, 0
        self.video = outputs.path("pictures", source.name, ".mp4") if pictures else None
        self.frames = outputs.path("videos", source.name, ".jsonl")
        self._part = self.frames.with_name(f".{self.frames.name}.{os.getpid()}")
        self._file = self._part.open("w", encoding="utf-8")
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def add(self, frame: int, found: Prediction, tracks: list[int] | None, by_instance: bool) -> None:
        """Add the next frame."""
        record = {"frame": frame} | results_of(found, frame)
        for result, track in zip(record["results"], tracks or (), strict=tracks is not None):
            result["track_id"] = track
        self._file.write(json.dumps(record) + "\n")
        if self._pictures:
            labels = [f"#{track}" if track >= 0 else "" for track in tracks or ()]
            self._draw(found.drawn(by_instance=by_instance, labels=labels))

    def _draw(self, picture: np.ndarray) -> None:
        height, width = (side - side % 2 for side in picture.shape[:2])  # codecs take even sides
        if self._writer is None:
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._video_part), codec, self._rate, (width, height))
            if not self._writer.isOpened():
                raise UserError(f"{self.video} cannot be written; check the path and its permissions.")
        self._writer.write(np.ascontiguousarray(picture[:height, :width, ::-1]))
        self._drawn += 1

    @property
    def _video_part(self) -> Path:
        assert self.video is not None
        return self.video.with_name(f".{os.getpid()}.{self.video.name}")

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """Give the files their names; after an error, or half-way, remove them."""
        try:
            self._file.close()
            if self._writer is not None:
                self._writer.release()
            if kind is None:
                self._finish()
        finally:
            self._part.unlink(missing_ok=True)
            if self._writer is not None:
                self._video_part.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._writer is not None and self.video is not None:
            # OpenCV does not say when it cannot write.
            if cv2.VideoCapture(str(self._video_part)).get(cv2.CAP_PROP_FRAME_COUNT) != self._drawn:
                raise UserError(f"{self.video} could not be written to its end; free some space, or write elsewhere.")
            os.replace(self._video_part, self.video)
        os.replace(self._part, self.frames)
