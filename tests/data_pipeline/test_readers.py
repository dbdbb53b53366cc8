"""Images that PIL cannot read: other numbers, other channels, other files."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_backbone

from dimaskdino.checkpoint import Checkpointer
from dimaskdino.checkpoint.fitting import fit_channels
from dimaskdino.config import Config, get_cfg
from dimaskdino.data import build_test_loader, build_train_loader
from dimaskdino.data.datasets.registration import register_coco_format
from dimaskdino.data.readers import READER_REGISTRY, image_reader
from dimaskdino.data.validation.start import check_datasets
from dimaskdino.errors import ConfigError, DatasetError, UserError
from dimaskdino.predictor import Predictor
from dimaskdino.visualization import to_picture
from tests.tiny_model import predict, tiny_cfg

SIX = np.arange(20 * 30 * 6, dtype=np.float32).reshape(20, 30, 6)


def reader_cfg(name: str, channels: int) -> Config:
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.READER", name, "MODEL.PIXEL_MEAN", [1.0] * channels])
    cfg.MODEL.PIXEL_STD = [2.0] * channels
    return cfg


def test_numpy_of_six_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", SIX)
    for name in ("NumpyReader", "auto"):
        reader = image_reader(reader_cfg(name, 6))
        assert np.array_equal(reader.read(str(tmp_path / "a.npy")), SIX)
        assert reader.header(str(tmp_path / "a.npy")).stored == (20, 30)


def test_packages_of_other_formats_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    np.save(tmp_path / "a.npy", SIX)
    reader = image_reader(reader_cfg("auto", 6))
    assert reader.read(str(tmp_path / "a.npy")).shape == SIX.shape
    with pytest.raises(ConfigError, match=r"tifffile.*dimaskdino\[tiff\]"):
        reader.read(str(tmp_path / "a.tif"))


def test_png_of_sixteen_bits(tmp_path: Path) -> None:
    pixels = (np.arange(20 * 30 * 3).reshape(20, 30, 3) * 36).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    cv2.imwrite(str(tmp_path / "b.png"), pixels[..., 0])
    read = image_reader(reader_cfg("OpenCvReader", 3)).read(str(tmp_path / "a.png"))
    assert (read.dtype, read.tolist()) == (np.float32, pixels.tolist())
    gray = image_reader(reader_cfg("OpenCvReader", 1)).read(str(tmp_path / "b.png"))
    assert gray[..., 0].tolist() == pixels[..., 0].tolist()


def test_tiff_with_channels_first_or_last(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = SIX.astype(np.uint16)
    tifffile.imwrite(tmp_path / "last.tif", pixels, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "first.tif", np.moveaxis(pixels, -1, 0), photometric="minisblack")
    for name in ("last.tif", "first.tif"):
        assert np.array_equal(image_reader(reader_cfg("auto", 6)).read(str(tmp_path / name)), pixels)


def test_arrays_of_one_hdf5_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["frames/1"], file["frames/2"] = SIX, SIX + 1
    reader = image_reader(reader_cfg("auto", 6))
    path = f"{tmp_path}/scan.h5"
    assert np.array_equal(reader.read(f"{path}#frames/2"), SIX + 1)
    assert reader.header(f"{path}#frames/1").stored == (20, 30)
    assert reader.file(f"{path}#frames/1") == path
    with pytest.raises(DatasetError, match=r"scan\.h5#frames/3.*after #: frames"):
        reader.read(f"{path}#frames/3")


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (SIX[..., :5], "5 channels, but MODEL.PIXEL_MEAN has 6"),
        (np.full_like(SIX, np.nan), "not finite"),
        (SIX.astype(str), "shape"),
        (SIX[0, 0], "shape"),
    ],
)
def test_array_that_is_no_image_is_refused(pixels: np.ndarray, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(DatasetError, match=said) as error:
        image_reader(reader_cfg("NumpyReader", 6)).read(str(tmp_path / "a.npy"))
    assert "a.npy" in str(error.value)
    assert "NumpyReader" in str(error.value)


def test_unreadable_and_unknown_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("nothing")
    with pytest.raises(DatasetError, match=r"NumpyReader.*a\.npy"):
        image_reader(reader_cfg("NumpyReader", 6)).read(str(tmp_path / "a.npy"))
    with pytest.raises(DatasetError, match=r"b\.npy does not exist"):
        image_reader(reader_cfg("NumpyReader", 6)).read(str(tmp_path / "b.npy"))
    with pytest.raises(ConfigError, match=r"INPUT\.READER.*Nope.*NumpyReader"):
        image_reader(reader_cfg("Nope", 6))
    cfg = reader_cfg("NumpyReader", 6)
    cfg.MODEL.PIXEL_STD = [1.0]
    with pytest.raises(ConfigError, match="PIXEL_STD 1"):
        image_reader(cfg)


def test_other_files_need_as_many_channels_as_the_mean(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DatasetError, match=r"a\.png.*INPUT\.FORMAT BGR gives 3 channels.*PIXEL_MEAN has 6"):
        image_reader(reader_cfg("auto", 6)).read(str(tmp_path / "a.png"))
    with pytest.raises(ConfigError, match=r"INPUT\.FORMAT BGR gives 3 channels.*PIXEL_MEAN has 6"):
        image_reader(reader_cfg("", 6))


@pytest.fixture
def six_channels(tmp_path: Path) -> Iterator[Config]:
    """A dataset of two arrays of six channels, and the tiny model for it."""
    for number in (1, 2):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).random((48, 64, 6), dtype=np.float32))
    image = {"height": 48, "width": 64}
    annotation = {"category_id": 0, "bbox": [8, 8, 20, 30], "area": 600, "iscrowd": 0}
    annotation["segmentation"] = [[8, 8, 28, 8, 28, 38, 8, 38]]
    content = {
        "images": [{"id": number, "file_name": f"{number}.npy", **image} for number in (1, 2)],
        "annotations": [{"id": number, "image_id": number, **annotation} for number in (1, 2)],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(5)],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    register_coco_format("arrays", tmp_path / "labels.json", tmp_path, [f"class {number}" for number in range(5)])
    options = {"INPUT.READER": "NumpyReader", "MODEL.PIXEL_MEAN": [0.5] * 6, "MODEL.PIXEL_STD": [0.3] * 6}
    options |= {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.RESNETS.DEPTH": 18}
    options |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    options |= {"DATASETS.TRAIN": ("arrays",), "DATASETS.TEST": ("arrays",), "INPUT.IMAGE_SIZE": 64}
    yield tiny_cfg(options | {"SOLVER.IMS_PER_BATCH": 2, "DATALOADER.NUM_WORKERS": 0, "INPUT.MIN_SIZE_TEST": 48})
    DatasetCatalog.remove("arrays")
    MetadataCatalog.remove("arrays")


def test_six_channels_are_checked_trained_and_tested(six_channels: Config, tmp_path: Path) -> None:
    from dimaskdino.modeling.meta_arch import build_model

    check_datasets(six_channels)
    torch.manual_seed(0)
    model = build_model(six_channels)
    batch = next(iter(build_train_loader(six_channels)))
    assert [(image["image"].shape, image["image"].dtype) for image in batch] == [((6, 64, 64), torch.float32)] * 2
    # Outside a small picture the canvas has the mean, so that the model sees zeros.
    assert all(value in (0.5, *image["image"].unique()) for image in batch for value in image["image"][:, -1, -1])
    assert sum(model.train()(batch).values()).isfinite()
    (tested, *_) = next(iter(build_test_loader(six_channels, "arrays")))
    assert len(predict(model.eval(), tested["image"])[0]) > 0
    np.save(tmp_path / "2.npy", np.zeros((40, 64, 6), np.float32))
    with pytest.raises(DatasetError, match=r"2\.npy.*64x40.*64x48"):
        check_datasets(six_channels)


def test_predictor_reads_as_training_does(six_channels: Config, tmp_path: Path) -> None:
    from dimaskdino.modeling.meta_arch import build_model

    torch.manual_seed(0)
    model = build_model(six_channels)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text(six_channels.dump())
    find = Predictor(tmp_path / "config.yaml", tmp_path / "weights.pth", device="cpu")
    found = find(str(tmp_path / "1.npy"))
    array = np.load(tmp_path / "1.npy")
    for other in (array, torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(find(other).instances.scores, found.instances.scores)
    assert found.draw().size[0] > 0
    with pytest.raises(UserError, match="5 channels.*6 numbers"):
        find(array[..., :5])
    with pytest.raises(ConfigError, match=r"INPUT\.READER.*tile"):
        Predictor(tmp_path / "config.yaml", tmp_path / "weights.pth", device="cpu", tile=32)


def test_color_weights_give_the_same_with_zero_channels(six_channels: Config, tmp_path: Path, caplog) -> None:
    color = six_channels.clone()
    color.MODEL.PIXEL_MEAN = color.MODEL.PIXEL_STD = [1.0] * 3
    torch.manual_seed(0)
    of_colors, of_six = build_backbone(color).eval(), build_backbone(six_channels).eval()
    torch.save(of_colors.state_dict(), tmp_path / "r18.pth")

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = of_six

    logger = __import__("logging").getLogger("dimaskdino")
    logger.propagate = True
    Checkpointer(Holder(), finetune=True).load(str(tmp_path / "r18.pth"), checkpointables=[])
    assert "stem.conv1.weight: its filters on 3 channels are used for 6 (zeros for the others)" in caplog.text
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = of_colors(images), of_six(torch.cat((images, torch.randn(1, 3, 64, 64)), dim=1))
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5)


def test_filters_of_fewer_channels() -> None:
    weight = torch.randn(4, 3, 3, 3)
    one = fit_channels({"w": weight}, {"w": torch.zeros(4, 1, 3, 3)})["w"]
    assert torch.allclose(one, weight.sum(1, keepdim=True))
    two = fit_channels({"w": weight}, {"w": torch.zeros(4, 2, 3, 3)})["w"]
    assert torch.equal(two, weight[:, :2] * 1.5)
    other = {"w": torch.zeros(4, 6, 5, 5), "v": torch.zeros(4, 6, 3, 3)}
    assert fit_channels({"w": weight}, other)["w"] is weight


def test_own_reader_is_found_by_extension(tmp_path: Path) -> None:
    class TextReader:
        extensions = (".txt",)

        def __init__(self, cfg: Config) -> None:
            pass

        def read(self, path: str) -> np.ndarray:
            return np.loadtxt(path)

    (tmp_path / "a.txt").write_text("1 2\n3 4\n5 6")
    READER_REGISTRY.register(TextReader)
    try:
        reader = image_reader(reader_cfg("auto", 1))
        assert reader.read(str(tmp_path / "a.txt"))[..., 0].tolist() == [[1, 2], [3, 4], [5, 6]]
        assert reader.header(str(tmp_path / "a.txt")).stored == (3, 2)
        reader = image_reader(reader_cfg("TextReader", 1))
        for method, given in (("size", 5), ("size", "ab"), ("file", None)):
            setattr(TextReader, method, lambda self, path, given=given: given)
            with pytest.raises(DatasetError, match=rf"TextReader \(INPUT\.READER\) gives .*{given}.* {method}"):
                getattr(reader, {"size": "header"}.get(method, method))(str(tmp_path / "a.txt"))
        TextReader.__init__ = lambda self, cfg: 1 / 0
        with pytest.raises(
            ConfigError, match=r"TextReader cannot be made\. .*test_readers\.py, line \d+: ZeroDivision"
        ):
            image_reader(reader_cfg("TextReader", 1))
    finally:
        del READER_REGISTRY._obj_map["TextReader"]


def test_any_image_can_be_looked_at() -> None:
    picture = to_picture(SIX)
    assert (picture.shape, picture.dtype, picture.min(), picture.max()) == ((20, 30, 3), np.uint8, 0, 255)
    assert to_picture(np.zeros((2, 2, 1), np.float32)).max() == 0
    color = np.full((2, 2, 3), 7, np.uint8)
    assert to_picture(color) is color
