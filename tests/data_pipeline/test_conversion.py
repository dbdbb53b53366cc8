"""tools/convert_dataset.py: every format to COCO and back, splits, odd files."""

import base64
import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import convert_dataset
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from dimaskdino.data.coco_file import read_json
from dimaskdino.data.conversion.labels import Images, LabeledImage, LabeledObject, stratified
from dimaskdino.data.conversion.writing import outline, read_objects, write_labelme, write_yolo
from dimaskdino.errors import DatasetError, UserError, run_cli

WIDTH, HEIGHT = 40, 20
NAMES = ["a b.png", "größe 大.png", "sub/c.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures, with names with spaces and of other scripts, below ``images``."""
    for name in NAMES:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def convert(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """``convert("yolo", "--split", ...)`` runs the tool; returns the COCO file, or the line of the error."""

    def run(kind: str, *options: object, source: Path | None = None) -> dict | str:
        arguments = ["--from", kind, "--source", source or root, "--images", root / "images", "--output", root / "out"]
        monkeypatch.setattr(sys, "argv", ["convert_dataset.py", *map(str, [*arguments, *options])])
        with contextlib.suppress(SystemExit):
            run_cli(convert_dataset.main)
        printed = capsys.readouterr()
        run.notes = [line for line in printed.out.splitlines() if line[:1].isdigit()]
        if error := printed.err.strip():
            return error
        path = root / "out" / "annotations.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    return run


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def objects_of(coco: dict, name: str) -> list[dict]:
    (image,) = [each for each in coco["images"] if each["file_name"] == name]
    assert (image["height"], image["width"]) == (HEIGHT, WIDTH)
    names = {each["id"]: each["name"] for each in coco["categories"]}
    found = [each for each in coco["annotations"] if each["image_id"] == image["id"]]
    return [each | {"class": names[each["category_id"]]} for each in found]


def mask(annotation: dict) -> np.ndarray:
    segmentation = annotation["segmentation"]
    rles = mask_util.frPyObjects(segmentation, HEIGHT, WIDTH) if isinstance(segmentation, list) else [segmentation]
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def ring() -> np.ndarray:
    """Two parts, one of which has a hole."""
    found = np.zeros((HEIGHT, WIDTH), dtype=bool)
    found[2:12, 3:15] = found[4:9, 25:30] = True
    found[5:8, 6:10] = False
    return found


def test_yolo_boxes_polygons_and_background(root: Path, convert) -> None:
    write(
        root,
        {
            "data.yaml": "names: {0: cat, 1: '狗'}\n",
            "labels/a b.txt": "1 0.5 0.5 0.5 1.001 0.9\n0 0.1 0.1 0.6 0.1 0.6 0.5\n",
            "labels/größe 大.txt": "\n",
        },
    )
    coco = convert("yolo")
    assert [each["name"] for each in coco["categories"]] == ["cat", "狗"]
    box, polygon = objects_of(coco, "a b.png")
    assert (box["class"], box["bbox"], box["area"]) == ("狗", [10, 0, 20, 20], 400)
    assert "segmentation" not in box
    assert (polygon["class"], polygon["segmentation"]) == ("cat", [[4, 2, 24, 2, 24, 10]])
    assert polygon["bbox"] == [4, 2, 20, 8]
    assert objects_of(coco, "größe 大.png") == objects_of(coco, "sub/c.png") == []
    assert convert.notes == [
        "1 scores after a box, left out",
        "1 images without a label file",
        "2 coordinates a hair outside the image, cut",
        "2 images without objects (background)",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("7 0.5 0.5 0.1 0.1", "class 7 is unknown; there are 2"),
        ("0 0.5 0.5 0.1", "3 numbers after the class"),
        ("0 0.5 0.5 0.1 x", "not a row of numbers"),
        ("0 0.78 0.5 0.5 0.1", "lies outside the image of 40x20"),
        ("0 0.5 0.5 0 0.1", "covers nothing"),
        ("0 nan 0.5 0.2 0.1", "not a finite number"),
        ("0 0.5 0.5 -0.2 0.1", "negative"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3", "on a line"),
    ],
)
def test_bad_yolo_line_is_named(line: str, said: str, root: Path, convert) -> None:
    write(root, {"classes.txt": "cat\ndog\n", "labels/a b.txt": f"0 0.5 0.5 0.1 0.1\n\n{line}\n"})
    error = convert("yolo")
    assert error.startswith("error: ")
    assert f"{root / 'labels' / 'a b.txt'}, line 3: " in error
    assert said in error
    assert "--skip-bad" in error
    assert len(objects_of(convert("yolo", "--skip-bad"), "a b.png")) == 1


def test_image_without_a_usable_object_is_no_background(root: Path, convert) -> None:
    write(root, {"classes.txt": "cat\ndog\n", "labels/a b.txt": "7 0.5 0.5 0.1 0.1\n", "labels/ghost.txt": "\n"})
    coco = convert("yolo", "--skip-bad")
    assert "a b.png" not in {image["file_name"] for image in coco["images"]}
    assert "1 images left out, as none of their objects can be used" in convert.notes
    assert "1 label files without an image" in convert.notes


@pytest.mark.parametrize("kind", ["yolo", "csv", "masks"])
def test_broken_image_is_left_out_with_what_labels_it(kind: str, root: Path, convert) -> None:
    write(
        root,
        {
            "classes.txt": "cat\n",
            "labels/größe 大.txt": "0 0.5 0.5 0.1 0.1\n",
            "labels/sub/c.txt": "0 0.5 0.5 0.1 x\n",
            "l.csv": "image,xmin,ymin,xmax,ymax,class\ngröße 大.png,1,1,9,9,cat\nsub/c.png,1,1,x,9,cat\n",
            "images/a b.png": "junk",
        },
    )
    (root / "maps" / "sub").mkdir(parents=True)
    Image.fromarray(ring().astype(np.uint8)).save(root / "maps" / "größe 大.png")
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "maps" / "sub" / "c.png")
    options = {"masks": ["--classes", "cat"]}.get(kind, [])
    source = {"masks": root / "maps", "csv": root / "l.csv"}.get(kind)
    error = convert(kind, *options, source=source)
    assert f"{root / 'images' / 'a b.png'}: it cannot be read as an image" in error
    assert "--skip-bad" in error
    coco = convert(kind, *options, "--skip-bad", source=source)
    assert [image["file_name"] for image in coco["images"]] == ["größe 大.png"]
    assert "1 images left out, as none of their objects can be used" in convert.notes


def voc(*objects: str, name: str = "a b.png") -> str:
    return f"<annotation>\n<filename>{name}</filename>\n{''.join(objects)}</annotation>"


def voc_object(label: str, box: tuple[float, ...], more: str = "") -> str:
    corners = "".join(
        f"<{name}>{value}</{name}>" for name, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{label}</name>{more}<bndbox>{corners}</bndbox></object>\n"


def test_voc_boxes_and_instance_masks(root: Path, convert) -> None:
    first = voc_object("cat", (3, 4, 10, 8), "<difficult>1</difficult>")
    write(
        root, {"Annotations/a b.xml": voc(first), "Annotations/c.xml": voc(voc_object("dog", (1, 1, 30, 12)), name="c")}
    )
    (root / "SegmentationObject").mkdir()
    Image.fromarray(ring().astype(np.uint8)).save(root / "SegmentationObject" / "c.png")
    coco = convert("voc")
    (box,) = objects_of(coco, "a b.png")
    assert (box["bbox"], box["difficult"], box["class"]) == ([3, 4, 7, 4], 1, "cat")
    assert objects_of(convert("voc", "--one-based"), "a b.png")[0]["bbox"] == [2, 3, 8, 5]
    (masked,) = objects_of(coco, "sub/c.png")
    assert np.array_equal(mask(masked), ring())
    assert len(coco["images"]) == 2


def test_bad_voc_file_is_named(root: Path, convert) -> None:
    file = root / "Annotations" / "a b.xml"
    for text, said in (
        (voc(voc_object("cat", (3, 4, 10, "x"))), f"{file}, line 3: 'x' is not a number"),
        ("<annotation>\n<object>\n</annotation>", f"{file}, line 3: not valid XML"),
        (voc(name="absent.png"), "image absent.png is not below"),
        (voc("<object><name>cat</name></object>"), f"{file}, line 3: <object> has no <bndbox>"),
    ):
        write(root, {"Annotations/a b.xml": text})
        assert said in convert("voc")
    write(root, {"Annotations/a b.xml": voc(voc_object("cat", (3, 4, 10, 8)))})
    assert f"{file}, line 3: class 'cat' is unknown; there are dog" in convert("voc", "--classes", "dog")


def test_labelme_parts_masks_and_shapes(root: Path, convert) -> None:
    encoded, upper = (base64.encodebytes(png(each)).decode() for each in (ring()[2:, :30], ring()[:12, 3:]))
    shapes = [
        {"label": "cat", "points": [[1, 1], [5, 1], [5, 5]], "group_id": 3, "shape_type": "polygon"},
        {"label": "dog", "points": [[30, 10], [20, 5]], "shape_type": "rectangle"},
        {"label": "cat", "points": [[10, 1], [15, 1], [15, 5]], "group_id": 3},
        {"label": "cat", "points": [[16, 2], [18, 4]], "group_id": 3, "shape_type": "rectangle"},
        {"label": "cat", "points": [[0, 2], [29, 19]], "shape_type": "mask", "mask": encoded},
        {"label": "cat", "points": [[3, 0], [39, 11]], "shape_type": "mask", "mask": upper},
        {"label": "dog", "points": [[10, 10], [10, 14]], "shape_type": "circle"},
    ]
    write(root, {"labels/a b.json": json.dumps({"imagePath": "..\\images\\a b.png", "shapes": shapes}, indent=1)})
    coco = convert("labelme", source=root / "labels")
    parts, rectangle, *masked, circle = objects_of(coco, "a b.png")
    assert parts["segmentation"] == [[1, 1, 5, 1, 5, 5], [10, 1, 15, 1, 15, 5], [16, 2, 18, 2, 18, 4, 16, 4]]
    assert rectangle["bbox"] == [20, 5, 10, 5]
    assert np.array_equal([*map(mask, masked)], [ring()] * 2)
    assert circle["area"] == pytest.approx(np.pi * 16, rel=0.1)


def test_bad_labelme_shape_names_its_line(root: Path, convert) -> None:
    shapes = [
        {"label": "cat", "points": [[1, 1], [5, 1], [5, 5]]},
        {"label": "cat", "points": [[1, 1]], "shape_type": "point"},
    ]
    text = json.dumps({"imagePath": "a b.png", "shapes": shapes}, indent=1)
    line = text.splitlines().index('   "label": "cat",', 10) + 1
    for content, said in (
        (text, f", line {line}: shape_type 'point' has no area"),
        ("{\n", ", line 2: not valid JSON"),
        ("[]", "no list of shapes"),
    ):
        write(root, {"labels/a b.json": content})
        assert said in convert("labelme", source=root / "labels")
    write(root, {"labels/a b.json": json.dumps({"shapes": shapes[1:]})})
    assert convert("labelme", "--skip-bad", source=root / "labels")["images"] == []


CVAT = """<annotations>
<meta><task><labels><label><name>cat</name></label><label><name>dog</name></label></labels></task></meta>
<image name="a b.png" width="40" height="20">
<box label="dog" xtl="1.5" ytl="2" xbr="9" ybr="8" occluded="1"/>
<polygon label="cat" points="1,1;5,1;5,5" group_id="2"/>
<polygon label="cat" points="10,1;15,1;15,5" group_id="2"/>
<mask label="dog" left="3" top="2" width="27" height="10" rle="{runs}"/>
<polyline label="cat" points="1,1;5,1"/>
<ellipse label="cat" cx="20" cy="10" rx="8" ry="4" rotation="90"/>
<box label="cat" xtl="10" ytl="8" xbr="20" ybr="12" rotation="90"/>
</image>
<image name="c.png" width="40" height="20"></image>
</annotations>
"""


def png(pixels: np.ndarray) -> bytes:
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, format="PNG")
    return picture.getvalue()


def cvat(objects: str) -> str:
    return f"<annotations><image name='a b.png'>{objects}</image></annotations>"


def shape(**other: object) -> str:
    polygon = {"label": "cat", "points": [[1, 1], [5, 1], [5, 5]]}
    return json.dumps({"imagePath": "a b.png", "shapes": [polygon | other]})


def masked(corner: list[int]) -> str:
    mask = base64.b64encode(png(np.ones((9, 27), dtype=bool))).decode()
    return shape(shape_type="mask", points=[corner, [39, 11]], mask=mask)


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        ("yolo", {}, "classes.txt"),
        ("yolo", {"classes.txt": "cat"}, "has a label file"),
        ("yolo", {"classes.txt": "größe".encode("latin-1")}, "classes.txt is not valid UTF-8"),
        ("yolo", {"classes.txt": "cat\n\ndog", "labels/a b.txt": ""}, "classes.txt, line 2"),
        ("yolo", {"classes.txt": "cat\ncat", "labels/a b.txt": ""}, "'cat'"),
        (
            "yolo",
            {"classes.txt": "cat", "labels/a b.txt": "", "images/a b.jpg": png(ring())},
            "a b.txt.*a b.jpg.*a b.png",
        ),
        ("masks", {"m/a b.png": b"junk"}, "m/a b.png"),
        ("masks", {"m/a b.png": png(ring())[:60]}, "m/a b.png"),
        ("masks", {"m/c.png": png(ring()), "images/c.png": png(ring())}, r"m/c\.png.*images/c\.png.*sub/c\.png"),
        ("voc", {"Annotations/a.xml": "<svg/>"}, r"a\.xml: .*<svg>"),
        ("voc", {"Annotations/a.xml": voc() + voc()}, r"a\.xml, line 3"),
        ("voc", {"Annotations/a.xml": voc(), "Annotations/b.xml": voc()}, r"b\.xml: .*a b\.png.*a\.xml"),
        ("voc", {"Annotations/a.xml": "<?xml version='1.0' encoding='foo'?><a/>"}, "line 1.*foo.*UTF-8"),
        ("voc", {"Annotations/a.xml": "<!DOCTYPE a [<!ENTITY b 'b'>]><a>&b;</a>"}, "line 1.*entities"),
        ("voc", {"Annotations/a.xml": voc(voc_object(" ", (1, 1, 5, 5)))}, "line 3.*name"),
        ("voc", {"Annotations/a.xml": voc(), "SegmentationObject/a.png": b"junk"}, r"SegmentationObject/a\.png"),
        ("cvat", {"annotations.xml": "<?xml version='1.0' encoding='gbk'?><a/>"}, "line 1.*multi-byte"),
        ("cvat", {"annotations.xml": "<annotations><track/></annotations>"}, "<image>.*CVAT for images"),
        ("cvat", {"annotations.xml": "<a>" * 60}, "nested"),
        ("cvat", {"annotations.xml": cvat("<polygon label='cat' points='1,1;2;3,3;4'/>")}, "pairs"),
        ("cvat", {"annotations.xml": cvat("<box label='cat' xtl='1' ytl='1' xbr='inf' ybr='5'/>")}, "'inf'"),
        (
            "cvat",
            {
                "annotations.xml": cvat(
                    "<mask label='cat' left='0' top='0' width='99999' height='99999' rle='0,9999800001'/>"
                )
            },
            "lies outside",
        ),
        ("labelme", {"l/a.json": shape(group_id=[1])}, r"group_id \[1\]"),
        ("labelme", {"l/a.json": "[" * 100_000}, r"a\.json"),
        ("labelme", {"l/a.json": masked([14, 2])}, "lies outside the image of 40x20 px"),
        ("labelme", {"l/a.json": shape(points=[[90, 90], [99, 90]], shape_type="circle")}, "on a line"),
        ("labelme", {"l/a.json": shape(), "l/b.json": shape()}, r"b\.json: .*a b\.png.*a\.json"),
        ("csv", {"l.csv": "image,class,x,width\na b.png,cat,1,5\n"}, "line 2: '' is not a number"),
        ("csv", {"l.csv": "image,class,xmin,ymin,xmax,ymax\na b.png,,1,1,5,5\n"}, "line 2: .*name"),
        ("csv", {"l.csv": "image,class,xmin,ymin,xmax,ymax\n"}, "no row"),
    ],
)
def test_labels_that_cannot_be_used_are_named(
    kind: str, files: dict[str, str | bytes], said: str, root: Path, convert
) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    source = {"masks": root / "m", "labelme": root / "l"}.get(kind)
    error = convert(kind, *(["--classes", "cat"] if kind == "masks" else []), source=source)
    assert error.startswith("error: ")
    assert re.search(said, error), error
    assert len(error.splitlines()) == 1


def runs() -> str:
    values = ring()[2:12, 3:30].ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], values)))).tolist()
    return ",".join(map(str, np.diff([0, *edges, len(values)]).tolist()))


def test_cvat_boxes_groups_and_masks(root: Path, convert) -> None:
    write(root, {"annotations.xml": CVAT.format(runs=runs())})
    coco = convert("cvat")
    assert [each["name"] for each in coco["categories"]] == ["cat", "dog"]
    box, parts, masked, ellipse, turned = objects_of(coco, "a b.png")
    assert ellipse["bbox"] == pytest.approx([16, 2, 8, 16])
    assert ellipse["area"] == pytest.approx(np.pi * 32, rel=0.1)
    assert turned["bbox"] == pytest.approx([13, 5, 4, 10])
    assert (box["bbox"], box["occluded"]) == ([1.5, 2, 7.5, 6], 1)
    assert len(parts["segmentation"]) == 2
    assert np.array_equal(mask(masked), ring())
    assert objects_of(coco, "sub/c.png") == []
    write(root, {"annotations.xml": CVAT.format(runs="1,2")})
    assert "annotations.xml, line 7: the runs of the mask" in convert("cvat")
    write(root, {"annotations.xml": CVAT.format(runs=runs()).replace('"dog" xtl', '"cow" xtl')})
    assert "annotations.xml, line 4: class 'cow' is unknown; there are cat, dog" in convert("cvat")


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({"a": 1}, "not a list of results"),
        ([None], "None is not a dictionary"),
        ([{"image_id": [1], "category_id": 1}], "image_id, [1], is not among the images"),
        ([{"image_id": 1, "category_id": 9}], "category: unknown (category_id 9)"),
        ([{"image_id": 1, "category_id": 1, "score": "0.9"}], "score, '0.9', is not a number"),
        ([{"image_id": 1, "category_id": 1, "score": float("nan")}], "score, nan, is not a number"),
        ([{"image_id": 1, "category_id": 1}], "box: missing"),
        ([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1e12, 5]}], "box: far outside the image"),
        ([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": {"size": [1, 9]}}], "an RLE without"),
    ],
)
def test_results_that_cannot_be_written_are_named(results: object, said: str, tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "a.png", "width": 20, "height": 10}
    coco = {"images": [image], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    for name, content in (("coco.json", coco), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DatasetError) as raised:
        list(read_objects(tmp_path / "coco.json", tmp_path / "results.json", 0.0))
    assert str(raised.value).startswith(str(tmp_path / "results.json"))
    assert said in str(raised.value)


def test_pipe_in_place_of_results_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(DatasetError, match=r"results\.json is not a regular file"):
        read_json(tmp_path / "results.json")


def test_masks_of_classes_and_of_objects(root: Path, convert) -> None:
    (root / "maps").mkdir()
    values = ring().astype(np.uint8) * 2
    values[15:18, 15:18], values[19, 39] = 1, 255
    for name in ("a b", "ghost"):
        Image.fromarray(values).save(root / "maps" / f"{name}.png")
    coco = convert("masks", "--classes", "cat", "dog", source=root / "maps")
    found = objects_of(coco, "a b.png")
    assert [each["class"] for each in found] == ["cat", "dog", "dog"]
    assert np.array_equal(mask(found[1]) | mask(found[2]), ring())
    assert "2 images without a label map" in convert.notes
    assert "1 label maps without an image" in convert.notes
    whole = objects_of(convert("masks", "--classes", "cat", "--instances", source=root / "maps"), "a b.png")
    assert [int(mask(each).sum()) for each in whole] == [9, int(ring().sum()), 1]
    assert "value 2 is of class 2, which is unknown" in convert("masks", "--classes", "cat", source=root / "maps")
    assert "--classes" in convert("masks", source=root / "maps")
    Image.fromarray(ring().astype(np.uint16) * 2000).save(root / "maps" / "a b.png")
    numbered = convert("masks", "--classes", "cat", "dog", "--instances", source=root / "maps")
    assert [each["class"] for each in objects_of(numbered, "a b.png")] == ["dog"]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("filename,width,height,class,xmin,ymin,xmax,ymax\na b.png,40,20,cat,4,2,14,12\nsub/c.png,40,20,,,,,\n", ()),
        ("image,label,x,y,w,h\n\na b.png,cat,0.1,0.1,0.25,0.5\n", ("--normalized",)),
        ("images/a b.png,4,2,14,12,cat\nc.png,,,,,\n", ()),
        ("path,name,polygon\na b.png,cat,4 2 14 2 14 12 4 12\n", ()),
    ],
)
def test_csv_in_several_forms(text: str, options: tuple[str, ...], root: Path, convert) -> None:
    write(root, {"labels.csv": text})
    coco = convert("csv", *options, source=root / "labels.csv")
    (found,) = objects_of(coco, "a b.png")
    assert (found["bbox"], found["class"]) == ([4, 2, 10, 10], "cat")
    assert len(coco["images"]) == 3
    write(root, {"labels.csv": text.replace("cat,4", "cat,four").replace("0.25", "four").replace("4 2 ", "four 2 ")})
    if "four" in (root / "labels.csv").read_text():
        assert "labels.csv, line " in convert("csv", *options, source=root / "labels.csv")


def labeled(*classes: str) -> LabeledImage:
    return LabeledImage("a.png", (4, 4), [LabeledObject(each, "") for each in classes])


def test_split_keeps_classes_in_proportion() -> None:
    images = [labeled("cat") for _ in range(50)] + [labeled("dog", "cat") for _ in range(10)] + [labeled()] * 20
    parts = stratified(images, [0.6, 0.2, 0.2], seed=0)
    assert [len(part) for part in parts] == [48, 16, 16]
    counts = [Counter(each.label for image in part for each in image.objects) for part in parts]
    assert [count["dog"] for count in counts] == [6, 2, 2]
    assert [count["cat"] for count in counts] == [36, 12, 12]
    assert [sum(not image.objects for image in part) for part in parts] == [12, 4, 4]


def test_same_seed_gives_the_same_bytes(root: Path, convert) -> None:
    for number in range(8):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / f"{number}.png")
        write(root, {f"labels/{number}.txt": f"{number % 2} 0.5 0.5 0.3 0.3\n"})
    found = []
    for seed in (1, 1, 2):
        convert("yolo", "--classes", "cat", "dog", "--split", 0.5, 0.5, "--seed", seed)
        found.append([(root / "out" / f"{part}.json").read_bytes() for part in ("train", "val")])
    assert found[0] == found[1]
    assert found[0] != found[2]
    images = [{each["file_name"] for each in json.loads(part)["images"]} for part in found[0]]
    assert not images[0] & images[1]
    assert len(images[0] | images[1]) == 11
    for shares in ((0.5, 0.4), ("nan", 1)):
        assert "sum up to 1" in convert("yolo", "--split", *shares)


def test_predictions_become_labels_and_back(root: Path, convert) -> None:
    write(root, {"annotations.xml": CVAT.format(runs=runs())})
    convert("cvat")
    truth = root / "out" / "annotations.json"
    rle = mask_util.encode(np.asfortranarray(ring().astype(np.uint8)))
    rle["counts"] = rle["counts"].decode()
    result = {"image_id": 1, "category_id": 2, "bbox": [3, 2, 27, 10], "segmentation": rle}
    write(root, {"results.json": json.dumps([result | {"score": 0.9}, result | {"score": 0.2}])})
    options = ["--predictions", root / "results.json", "--score", 0.5, "--output", root / "back"]
    for kind in ("labelme", "yolo", "csv"):
        convert("coco", "--to", kind, *options, source=truth)
    (found,) = objects_of(convert("labelme", source=root / "back"), "a b.png")
    assert np.array_equal(mask(found), ring())
    (found,) = objects_of(convert("yolo", source=root / "back"), "a b.png")
    assert found["class"] == "dog"
    # One polygon for two parts and a hole: the pixels along its seams may differ.
    assert (mask(found) ^ ring()).sum() <= 0.12 * ring().sum()
    (found,) = objects_of(convert("csv", source=root / "back" / "objects.csv"), "a b.png")
    assert found["bbox"] == [3, 2, 27, 10]
    assert "coco" in convert("coco", source=truth)


@pytest.mark.parametrize("name", ["/data/a/1.png", "../../a/1.png", "..\\a\\1.png", "a/1.png"])
def test_labels_stay_below_the_output(name: str, tmp_path: Path) -> None:
    entry = {"id": 1, "file_name": name, "height": HEIGHT, "width": WIDTH}
    write_labelme([(entry, [{"label": "cat", "bbox": [1, 1, 5, 5]}])], tmp_path / "out")
    write_yolo([(entry, [])], tmp_path / "out", ["cat"])
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("1.*")]
    assert sorted(path.suffix for path in found) == [".json", ".txt"]
    assert all(path.parts[0] == "out" for path in found)
    with pytest.raises(DatasetError, match=r"a/1\.json .*two images.*1\.png"):
        write_labelme([(entry, [])] * 2, tmp_path / "out")


def test_outline_encloses_the_mask() -> None:
    simple = np.zeros((HEIGHT, WIDTH), dtype=bool)
    simple[3:9, 4:20] = True
    points = outline(simple)
    assert points.min(0).tolist() == pytest.approx([4, 3], abs=0.15)
    assert points.max(0).tolist() == pytest.approx([20, 9], abs=0.15)


def test_missing_source_is_named(root: Path, convert) -> None:
    assert "absent" in convert("yolo", source=root / "absent")
    with pytest.raises(UserError, match="no images"):
        Images(root / "no images")
