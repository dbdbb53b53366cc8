#!/usr/bin/env python
"""Predict images with a model that tools/export.py wrote, with NumPy, Pillow and onnxruntime alone.

The model's file says how images are prepared, what the outputs mean, and what the classes are called. This file stands
alone as well: copy it, run it, or import Model from it.
"""

import argparse
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# NumPy's threads spin after each product, in the way of the model's: here for 2^16 cycles.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

KEY = "dimaskdino"  # of the description in a model's metadata
VERSION = 1
USER_ERROR_STATUS, BAD_INPUT_STATUS = 2, 3
MASK_BYTES = 2**28  # about what the masks of all queries may need at once, for panoptic and semantic maps
MAPS = {"panoptic", "semantic"}  # results that have a file of their own
HALO = (16, 16, 16)
TONES = ((0.85, 1.0), (0.6, 1.0), (0.9, 0.8))  # saturation and value of the colors, in turn
Array = np.ndarray
Result = dict[str, Any]


class Model:
    """Finds objects in images with an exported model.

    Args:
        path: the .onnx file; or give ``description`` and ``run``.
        threads: of onnxruntime; 0 lets it choose.
        description: what the file's metadata says.
        run: the graph, from inputs by name to outputs by name.
    """

    def __init__(
        self,
        path: str | Path = "",
        *,
        threads: int = 0,
        description: dict[str, Any] | None = None,
        run: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
    ) -> None:
        if description is None or run is None:
            description, run = open_onnx(path, threads)
        if description.get("version") != VERSION:
            raise ValueError(f"{path} was exported for another version of this program; export it again.")
        self.description, self.run = description, run

    def __call__(self, images: Sequence[Any]) -> list[Result]:
        """Predict a batch.

        Args:
            images: paths, PIL images, or (H, W, 3) uint8 RGB arrays.

        Returns:
            For each image a dict with "size" (height, width) and, as the model gives them: "scores" (N,), "labels"
            (N,), "boxes" (N, 4) xyxy px and "masks" (N, H, W) bool, best first; "panoptic" (H, W) int32 with 0 for no
            segment and "segments", each with id, category_id, isthing, and score; "semantic" (K, H, W) float32.
        """
        pictures = [self.read(image) for image in images]
        inputs, image_sizes = self.prepare(pictures)
        outputs = self.run(inputs)
        canvas = inputs["images"].shape[-2:]
        return [
            self.results({name: value[index] for name, value in outputs.items()}, canvas, inner, picture.shape[:2])
            for index, (inner, picture) in enumerate(zip(image_sizes, pictures, strict=True))
        ]

    def read(self, image: Any) -> Array:
        """An image as (H, W, 3) uint8 RGB."""
        if isinstance(image, Array):
            return image
        if isinstance(image, str | Path):
            if Path(image).exists() and not Path(image).is_file():
                raise ValueError(f"not a file; name images, such as those of a folder: {image}/*.jpg")
            with Path(image).open("rb") as file:  # Pillow 13 garbles some TIFF files that it opens by name
                return self.read(Image.open(file))
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"the image has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
        return np.asarray((ImageOps.exif_transpose(image) if self.description["exif"] else image).convert("RGB"))

    def prepare(self, pictures: Sequence[Array]) -> tuple[dict[str, Array], list[tuple[int, int]]]:
        """The graph's inputs, and the (height, width) of each image on the canvas."""
        sizes = [self._resized(*picture.shape[:2]) for picture in pictures]
        fixed, count = self.description["canvas"], self.description["batch"] or len(pictures)
        if len(pictures) > count:
            raise ValueError(f"the model takes {count} images at a time, not {len(pictures)}")
        step = self.description["divisibility"]
        height, width = fixed or (-(-max(sides) // step) * step for sides in zip(*sizes, strict=True))
        self._check_tokens(height, width)
        images = np.empty((count, 3, height, width), np.float32)
        images[:] = np.array(self.description["pad_value"], np.float32)[:, None, None]
        for canvas, picture, (h, w) in zip(images, pictures, sizes, strict=False):
            order = picture if self.description["format"] == "RGB" else picture[..., ::-1]
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(order)).resize((w, h), Image.Resampling.BILINEAR))
            canvas[:, :h, :w] = pixels.transpose(2, 0, 1)
        inputs = {"images": images}
        if self.description["ignores_padding"]:
            inputs["image_sizes"] = np.array(sizes + [(height, width)] * (count - len(sizes)), np.int64)
        return inputs, sizes

    def _check_tokens(self, height: int, width: int) -> None:
        """The graph always selects as many tokens; onnxruntime would stop with an error of its operator TopK."""
        # Files of earlier versions do not say how many.
        tokens = sum(-(-height // stride) * -(-width // stride) for stride in self.description.get("strides", ()))
        least = self.description.get("least_tokens", 0)
        if 0 < tokens < least:
            raise ValueError(
                f"the image is too small, or too long and narrow: resized and padded to {width} x {height} px, it has "
                f"{tokens} tokens, and the model selects {least}; cut it into pieces, or use tools/predict.py"
            )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image on the canvas: detectron2's rule, and no larger than a fixed canvas."""
        least, most, fixed = (self.description[name] for name in ("min_size", "max_size", "canvas"))
        new_height, new_width = float(height), float(width)
        if least:
            scale = least / min(height, width)
            new_height, new_width = (least, scale * width) if height < width else (scale * height, least)
            if max(new_height, new_width) > most:
                scale = most / max(new_height, new_width)
                new_height, new_width = new_height * scale, new_width * scale
        if fixed and (new_height > fixed[0] or new_width > fixed[1]):
            scale = min(fixed[0] / height, fixed[1] / width)
            new_height, new_width = min(height * scale, fixed[0]), min(width * scale, fixed[1])
        return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)

    def results(
        self, outputs: dict[str, Array], canvas: tuple[int, int], inner: tuple[int, int], size: tuple[int, int]
    ) -> Result:
        """Results of one image.

        Args:
            outputs: of the graph, without the batch.
            canvas: (height, width) that the graph was given.
            inner: of the image on it.
            size: of the result.
        """
        result: Result = {"size": tuple(size)}
        frame = Frame(canvas, inner, size)
        kinds = self.description["results"]
        if "instances" in kinds:
            result |= self._instances(outputs, frame)
        if "panoptic" in kinds:
            result["panoptic"], result["segments"] = self._panoptic(outputs, frame)
        if "semantic" in kinds:
            result["semantic"] = self._semantic(outputs, frame)
        return result

    def _instances(self, outputs: dict[str, Array], frame: "Frame") -> Result:
        told = self.description
        scores = outputs["scores"]
        if "labels" in outputs:
            labels, query = outputs["labels"], np.arange(len(scores))
        else:
            best = np.argsort(-scores, axis=None, kind="stable")[: told["max_detections"]]
            query, labels = np.unravel_index(best, scores.shape)
            scores = scores[query, labels]
        kept = scores >= told["min_score"]
        if "panoptic" in told["results"]:
            kept &= np.array(told["is_thing"])[labels]
        scores, labels, query = scores[kept], labels[kept], query[kept]
        frame_height, frame_width = frame.inner if told["ignores_padding"] else frame.canvas
        scale = np.array([frame_width / frame.inner[1] * frame.size[1], frame_height / frame.inner[0] * frame.size[0]])
        boxes = outputs["boxes"][query] * np.tile(scale, 2).astype(np.float32)
        masks = np.zeros((len(query), *frame.size), bool)
        if "masks" in outputs:
            qualities = np.zeros(len(query), np.float32)
            # Files of earlier versions do not say; their models interpolate in two steps.
            step = "direct" if told.get("mask_interpolation") == "direct" else "both"
            for index, logits in enumerate(outputs["masks"][query]):
                resized = frame.interpolate(logits, step)
                masks[index] = resized > 0
                qualities[index] = (sigmoid(resized) * masks[index]).sum() / (masks[index].sum() + 1e-6)
            scores = scores * qualities if told["score_by_mask"] else scores
        order = np.argsort(-scores, kind="stable")
        found = {"scores": scores[order], "labels": labels[order], "boxes": boxes[order]}
        return found | ({"masks": masks[order]} if "masks" in outputs else {})

    def _panoptic(self, outputs: dict[str, Array], frame: "Frame") -> tuple[Array, list[Result]]:
        """Each pixel goes to the query with the largest score times mask probability."""
        told, scores = self.description, outputs["scores"]
        (queries,) = np.nonzero(scores.max(1) > told["object_threshold"])
        if len(queries) == 0:
            return np.zeros(frame.size, np.int32), []
        reported = scores[queries].max(1)
        if told["temperature"] is not None:
            scores = softmax(scores / told["temperature"])
        labels, scores = scores[queries].argmax(1), scores[queries].max(1)
        winner, inside = np.zeros(frame.size, np.int64), np.zeros(frame.size, bool)
        best, own = np.full(frame.size, -1, np.float32), np.zeros(len(queries), np.int64)
        for place, query in enumerate(queries):
            mask = sigmoid(frame.interpolate(outputs["masks"][query], "both"))
            own[place] = (mask >= 0.5).sum()
            better = scores[place] * mask > best
            best[better] = (scores[place] * mask)[better]
            winner[better], inside[better] = place, (mask >= 0.5)[better]
        won = np.bincount(winner.ravel(), minlength=len(queries))
        left = np.bincount(winner[inside], minlength=len(queries))
        wanted = (left > 0) & (won / np.maximum(own, 1) >= told["overlap_threshold"])
        ids, segments = self._number(labels.tolist(), reported.tolist(), wanted.tolist())
        return np.array(ids, np.int32)[winner] * inside, segments

    def _number(self, labels: list[int], scores: list[float], wanted: list[bool]) -> tuple[list[int], list[Result]]:
        """The segment id of each query, 0 for none, and the segments; those of a stuff class become one."""
        segments: list[Result] = []
        stuff: dict[int, int] = {}
        ids = []
        for label, score, becomes_segment in zip(labels, scores, wanted, strict=True):
            number = stuff.get(label, 0) if becomes_segment else 0
            if becomes_segment and not number:
                number, is_thing = len(segments) + 1, self.description["is_thing"][label]
                segments.append({"id": number, "category_id": label, "isthing": is_thing, "score": score})
                if not is_thing:
                    stuff[label] = number
            elif becomes_segment:
                segments[number - 1]["score"] = max(segments[number - 1]["score"], score)
            ids.append(number)
        return ids, segments

    def _semantic(self, outputs: dict[str, Array], frame: "Frame") -> Array:
        """Mask probabilities, weighed by class and summed over the queries."""
        told, weights = self.description, outputs["scores"]
        if told["temperature"] is not None and not told["no_object_class"]:
            weights = softmax(weights / told["temperature"])
        step = "both" if told["crop_first"] else "enlarge"
        largest = max(math.prod(frame.size), math.prod(frame.canvas))
        count = max(1, MASK_BYTES // 8 // largest)
        total: Any = 0
        for start in range(0, len(weights), count):
            chunk = slice(start, start + count)
            masks = sigmoid(np.stack([frame.interpolate(logits, step) for logits in outputs["masks"][chunk]]))
            total = total + np.tensordot(weights[chunk], masks, axes=(0, 0))
        return total if told["crop_first"] else np.stack([frame.interpolate(each, "fit") for each in total])


class Frame:
    """The sizes that a mask passes through, (height, width) px: of the canvas, the image on it, and the result."""

    def __init__(self, canvas: Sequence[int], inner: Sequence[int], size: Sequence[int]) -> None:
        self.canvas, self.inner, self.size = tuple(canvas), tuple(inner), tuple(size)
        self._matrices: dict[Any, list[Array]] = {}

    def interpolate(self, values: Array, step: str) -> Array:
        """A map (h, w) of the canvas at another size; linear along each axis, so that two matrices do it.

        The steps: "enlarge" to the canvas; "fit" what is on the image to the result, from the canvas; "both", or
        "direct" from the map to the result.
        """
        if step == "fit":
            values = values[: self.inner[0], : self.inner[1]]
        key = (step, values.shape)
        if key not in self._matrices:
            self._matrices[key] = [self._matrix(step, axis, cells) for axis, cells in enumerate(values.shape)]
        rows, columns = self._matrices[key]
        return rows @ values @ columns.T

    def _matrix(self, step: str, axis: int, cells: int) -> Array:
        if step == "enlarge":
            return interpolation(cells, self.canvas[axis])
        if step == "direct":
            return interpolation(cells, self.size[axis], cells * self.inner[axis] / self.canvas[axis])
        fit = interpolation(self.inner[axis], self.size[axis])
        return fit if step == "fit" else fit @ interpolation(cells, self.canvas[axis])[: self.inner[axis]]


def interpolation(cells: int, pixels: int, covered: float = 0) -> Array:
    """(pixels, cells) float32 weights of linear interpolation between the centers of cells.

    The pixels lie on the first ``covered`` cells; 0 for all of them.
    """
    place = np.maximum((np.arange(pixels) + 0.5) * ((covered or cells) / pixels) - 0.5, 0)
    lower = place.astype(np.int64)
    matrix = np.zeros((pixels, cells), np.float32)
    matrix[np.arange(pixels), lower] = 1 - (place - lower)
    matrix[np.arange(pixels), np.minimum(lower + 1, cells - 1)] += place - lower
    return matrix


def sigmoid(values: Array) -> Array:
    """The logistic function, which does not overflow."""
    return (0.5 * (1 + np.tanh(0.5 * values))).astype(np.float32)


def softmax(values: Array) -> Array:
    """Over the last axis."""
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def open_onnx(path: str | Path, threads: int = 0) -> tuple[dict[str, Any], Callable[[dict[str, Array]], dict]]:
    """The description and the graph of an .onnx file.

    Raises:
        ValueError: the file has no description.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    content = session.get_modelmeta().custom_metadata_map.get(KEY)
    if content is None:
        raise ValueError(f"{path} has no description: it was not written by tools/export.py")
    names = [output.name for output in session.get_outputs()]
    return json.loads(content), lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def to_json(result: Result, description: dict[str, Any], file: str) -> Result:
    """A result as JSON holds it; masks are COCO's uncompressed run lengths."""
    content: Result = {"file": file, "height": result["size"][0], "width": result["size"][1]}
    if "scores" in result:
        content["objects"] = [
            {
                "class": description["classes"][label],
                "category_id": description["category_ids"][label],
                "score": float(score),
                "box": box.tolist(),
            }
            | ({"mask": run_lengths(result["masks"][index])} if "masks" in result else {})
            for index, (label, score, box) in enumerate(
                zip(result["labels"].tolist(), result["scores"], result["boxes"], strict=True)
            )
        ]
    if "segments" in result:
        names = description["segment_classes"]
        content["segments"] = [{"class": names[each["category_id"]], **each} for each in result["segments"]]
    return content


def run_lengths(mask: Array) -> Result:
    """Lengths of runs of 0 and 1 in turn, column by column."""
    flat = mask.ravel(order="F")
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]))
    counts = np.diff(starts).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat.size and flat[0] else counts}


def draw(picture: Array, result: Result, description: dict[str, Any]) -> Image.Image:
    """The picture with what was found."""
    palette = np.array([class_color(index) for index in range(len(description["segment_classes"]))])
    labels = result["semantic"].argmax(0) if "semantic" in result else None
    if "panoptic" in result:
        labels = np.array([-1, *(segment["category_id"] for segment in result["segments"])])[result["panoptic"]]
    if labels is not None:
        shown = labels >= 0
        blended = picture.copy()
        blended[shown] = (0.5 * picture[shown] + 0.5 * palette[labels[shown]]).astype(np.uint8)
        return Image.fromarray(blended)
    blended = picture.astype(np.float32)
    for index, label in enumerate(result["labels"]):
        if "masks" in result:
            mask = result["masks"][index]
            blended[mask] = 0.5 * blended[mask] + 0.5 * palette[label]
    image = Image.fromarray(blended.astype(np.uint8))
    line, font = max(2, min(image.size) // 350), ImageFont.load_default(max(10, min(image.size) // 42))
    corners = result["boxes"].reshape(-1, 2, 2)
    pen, boxes = ImageDraw.Draw(image), np.hstack((corners.min(1), corners.max(1))).tolist()
    for label, (x0, y0, x1, y1) in zip(result["labels"], boxes, strict=True):
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=HALO, width=line + 2)
        pen.rectangle((x0, y0, x1, y1), outline=class_color(label), width=line)
    taken: list[tuple[float, ...]] = []
    for label, score, box in zip(result["labels"], result["scores"], boxes, strict=True):
        text = f"{description['classes'][label]} {score:.2f}"
        spot = free_spot(box, pen.textbbox((0, 0), text, font, stroke_width=1)[2:], image.size, taken)
        if spot is not None:
            taken.append(spot)
            pen.text(spot[:2], text, "white", font, stroke_width=1, stroke_fill="black")
    return image


def free_spot(
    box: Sequence[float], text: Sequence[float], image: Sequence[int], taken: Sequence[tuple[float, ...]]
) -> tuple[float, ...] | None:
    """Where a text of some (width, height) px covers no other one, (x0, y0, x1, y1): over a box, in it, or under it."""
    (x0, y0, x1, y1), (width, height) = box, text
    for left, top in ((x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1)):
        x, y = max(0.0, min(left, image[0] - width)), max(0.0, min(top, image[1] - height))
        if not any(x < right and start < x + width and y < end and up < y + height for start, up, right, end in taken):
            return x, y, x + width, y + height
    return None


def class_color(index: int) -> tuple[int, ...]:
    """A bright RGB color, the same as in the other tools: each hue is far from those before it."""
    hue, (saturation, value) = index * (5**0.5 - 1) / 2 % 1 * 6, TONES[index % len(TONES)]
    pure = (min(max(abs((hue + shift) % 6 - 3) - 1, 0), 1) for shift in (0, 4, 2))
    return tuple(round(255 * value * (1 - saturation + saturation * part)) for part in pure)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help=".onnx file of tools/export.py")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--output", type=Path, default=Path("output/onnx"), help="folder (default: output/onnx)")
    parser.add_argument("--score", type=float, default=0.35, help="least score of a detection (default: 0.35)")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: it chooses)")
    args = parser.parse_args()
    if not 0 <= args.score <= 1:
        parser.error(f"argument --score: {args.score} is not a number from 0 to 1")
    return args


def main() -> int:
    """Predict the images one by one; returns the exit status."""
    args = parse_args()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # photos of 90 megapixels are no attack
    try:
        model = Model(args.model, threads=args.threads)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.json").write_text("[]")  # a folder that cannot be written ends here
    except Exception as error:  # noqa: BLE001  (onnxruntime raises errors of many types for a file)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR_STATUS
    contents, bad = [], 0
    endings = ["", *(f"_{kind}" for kind in MAPS & set(model.description["results"]))]
    taken = Counter(path.stem + ending for path in args.inputs for ending in endings)
    for number, path in enumerate(args.inputs):
        name = path.stem
        # images of one name, such as a.jpg and b/a.png, or of the name of another's map, such as a_panoptic.png
        while any(taken[name + ending] + (name != path.stem) > 1 for ending in endings):
            name = f"{name}_{number}"
        try:
            picture = model.read(path)
            (result,) = model([picture])
            result = above(result, args.score)
            draw(picture, result, model.description).save(args.output / f"{name}.png")
            save_maps(result, args.output / name)
        except Exception as error:  # noqa: BLE001  (Pillow raises errors of many types, and the rest is to be done)
            print(f"{path}: {' '.join(str(error).split())}", file=sys.stderr)
            bad += 1
            continue
        contents.append(to_json(result, model.description, str(path)))
        print(f"{path}: {number_found(result)} found")
    (args.output / "results.json").write_text(json.dumps(contents))
    return BAD_INPUT_STATUS if bad else 0


def number_found(result: Result) -> int:
    """How many segments a result has; without segments, objects; of a semantic map alone, classes."""
    found = result.get("segments", result.get("scores"))
    return len(np.unique(result["semantic"].argmax(0)) if found is None else found)


def above(result: Result, score: float) -> Result:
    """The result without detections below a score."""
    if "scores" not in result:
        return result
    kept = result["scores"] >= score
    return result | {name: result[name][kept] for name in ("scores", "labels", "boxes", "masks") if name in result}


def save_maps(result: Result, path: Path) -> None:
    """Panoptic and semantic maps as PNG of 16 bits: ids of segments, and classes."""
    for name in MAPS & result.keys():
        values = result[name].argmax(0) if name == "semantic" else result[name]
        Image.fromarray(values.astype(np.uint16)).save(f"{path}_{name}.png")


if __name__ == "__main__":
    sys.exit(main())
