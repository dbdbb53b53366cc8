"""The configuration files: schedules that are what names say, ablations that change what they say, models that run."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from detectron2.modeling import build_backbone, build_model

import dimaskdino.data  # noqa: F401  (registers the datasets, which know their things)
from dimaskdino.checkpoint import to_release
from dimaskdino.config import Config, flatten, get_cfg
from dimaskdino.reproduction.tables import EPOCH_IMAGES, find_experiment, paper_tables
from tests.parity.dino import cfg as release_cfg
from tests.parity.releases import release
from tests.tiny_model import image, sample

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if not file.stem.startswith("Base-"))
ABLATIONS = {dataset: CONFIGS / "ablation" / dataset for dataset in ("coco", "bdd100k", "shapes")}
# Epochs of the ablations, and the file that they start from.
EPOCHS = {"coco": 12, "bdd100k": 68}
FULL = {
    "coco": CONFIGS / "coco" / "dimaskdino_r50_12ep.yaml",
    "bdd100k": CONFIGS / "bdd100k" / "dimaskdino_r50_68ep.yaml",
    "shapes": CONFIGS / "ablation" / "shapes" / "dimaskdino.yaml",
}
# Where the learning rate drops: the releases' iterations, and the paper's epoch.
DROPS = {12: [81125 / 88500], 24: [147500 / 177000], 50: [327778 / 368750, 355092 / 368750], 68: [50 / 68]}
BATCH = {("coco", "r50"): 16, ("coco", "swinl"): 4, ("bdd100k", "r50"): 8, ("bdd100k", "swinl"): 8}
# Any of the files at a size that trains in a moment; what a file is about stays.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MaskDINO.HIDDEN_DIM": 32,
    "MODEL.MaskDINO.DIM_FEEDFORWARD": 32,
    "MODEL.MaskDINO.TRAIN_NUM_POINTS": 32,
    "MODEL.MaskDINO.DN_NUM": 6,
    "MODEL.TIMM.PRETRAINED": False,
    "MODEL.DINO.HIDDEN_DIM": 64,
    "MODEL.DINO.DIM_FEEDFORWARD": 32,
    "MODEL.DINO.ENC_LAYERS": 1,
    "MODEL.DINO.NUM_QUERIES": 50,
    "MODEL.DINO.DN_NUM": 6,
}
# What the model does not read, or only as a width.
ELSEWHERE = ("MODEL.ON_CPU", "TEST.EVAL_PERIOD", "MODEL.SEM_SEG_HEAD.NUM_CLASSES")


@functools.cache
def contents(file: Path) -> Config:
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    return cfg


def load(file: Path, options: dict[str, Any] | None = None) -> Config:
    cfg = contents(file).clone()
    cfg.merge_from_list([item for pair in (options or {}).items() for item in pair])
    return cfg


def name(file: Path) -> str:
    return file.relative_to(CONFIGS).with_suffix("").as_posix()


def changes(file: Path, base: Path) -> dict[str, Any]:
    """Keys in which ``file`` differs from ``base``, with the values of ``file``."""
    values = dict(flatten(contents(base)))
    return {key: value for key, value in flatten(contents(file)) if value != values[key]}


@pytest.fixture(scope="module")
def trained() -> set[str]:
    """The models and settings that a test has trained: files that differ in schedule and data share them."""
    return set()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_configurations_train_and_evaluate(file, trained):
    cfg = load(file, SMALL)
    same = repr([pair for pair in flatten(cfg) if pair[0].startswith(("MODEL.", "TEST.")) and pair[0] not in ELSEWHERE])
    if same in trained:
        return
    trained.add(same)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    losses = model([sample(64, 64, [[4, 8, 40, 48], [20, 20, 60, 36]]), sample(64, 96, [])])
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    missing = [key for key, value in model.named_parameters() if value.grad is None and value.requires_grad]
    assert missing == []
    with torch.no_grad():
        (result,) = model.eval()([{"image": image(64, 80), "height": 32, "width": 40}])
    is_dino, wanted = cfg.MODEL.META_ARCHITECTURE == "DINO", cfg.MODEL.MaskDINO.TEST
    if "instances" in result:
        found = result["instances"]
        assert found.has("pred_masks") != is_dino
        assert is_dino or found.pred_masks.shape[1:] == (32, 40)
        assert len(found) <= cfg.TEST.DETECTIONS_PER_IMAGE
        assert (found.pred_classes < cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES).all()
    assert is_dino or result.keys() - {"layers"} == {
        *(["instances"] * wanted.INSTANCE_ON + ["panoptic_seg"] * wanted.PANOPTIC_ON + ["sem_seg"] * wanted.SEMANTIC_ON)
    }
    if "sem_seg" in result:
        assert result["sem_seg"].shape == (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, 32, 40)
    assert (
        int(re.findall(r"layer\.(\d+)", model.eval_layer_names()[-1])[0])
        == cfg.MODEL["DINO" if is_dino else "MaskDINO"].DEC_LAYERS - 1
    )


def scheduled() -> list[tuple[Path, str, int]]:
    """Files of the two datasets that the paper trains on, their dataset and the epochs that they claim."""
    found = []
    for dataset, epochs in EPOCHS.items():
        for file in FILES:
            if file.parent == CONFIGS / dataset:
                found.append((file, dataset, int(re.findall(r"_(\d+)ep$", file.stem)[0])))
            elif file.parent == ABLATIONS[dataset]:
                found.append((file, dataset, epochs))
    return found


@pytest.mark.parametrize(("file", "dataset", "epochs"), scheduled(), ids=lambda value: getattr(value, "stem", value))
def test_schedules_match_the_file_names(file, dataset, epochs):
    solver = load(file).SOLVER
    backbone = "swinl" if "swinl" in file.stem else "r50"
    assert BATCH[dataset, backbone] == solver.IMS_PER_BATCH
    assert epochs * EPOCH_IMAGES[dataset] / solver.IMS_PER_BATCH == solver.MAX_ITER
    assert list(solver.STEPS) == [round(fraction * solver.MAX_ITER) for fraction in DROPS[epochs]]
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.BACKBONE_MULTIPLIER) == ("ADAMW", 1e-4, 0.1)
    assert (solver.WEIGHT_DECAY, solver.CLIP_GRADIENTS.CLIP_VALUE, solver.AMP.ENABLED) == (0.05, 0.01, True)


def test_iterations_match_the_releases_and_the_paper():
    # 12 epochs of 118,000 images in batches of 16, and 68 epochs of 7,000 in batches of 8.
    assert load(FULL["coco"]).SOLVER.MAX_ITER == 12 * 7375 == 88500
    assert load(FULL["bdd100k"]).SOLVER.MAX_ITER == 68 * 875 == 59500
    assert load(CONFIGS / "coco" / "dimaskdino_swinl_50ep.yaml").SOLVER.MAX_ITER == 4 * 368750


@pytest.mark.parametrize(
    ("file", "recorded"),
    [
        ("panoptic/maskdino_r50_50ep", "maskdino_panoptic_tiny"),
        ("semantic/maskdino_r50_ade20k_160k", "maskdino_semantic_tiny"),
    ],
)
def test_panoptic_and_semantic_files_are_the_releases(file, recorded):
    ours, theirs = (dict(flatten(cfg)) for cfg in (load(CONFIGS / f"{file}.yaml"), release(recorded).cfg()))
    # What made the recorded model small, what the release leaves at a default, and our own keys.
    ignored = (
        "MODEL.WEIGHTS",
        "MODEL.DEVICE",
        "MODEL.RESNETS.",
        "OUTPUT_DIR",
        "MODEL.META_ARCHITECTURE",
        "DATALOADER.",
    )
    ignored += ("MODEL.MaskDINO.DN_N", *release(recorded).options[::2])
    if not ours["MODEL.MaskDINO.TEST.PANOPTIC_ON"]:
        ignored += ("MODEL.MaskDINO.TEST.OVERLAP", "MODEL.MaskDINO.TEST.OBJECT")
    different = {
        key: (value, theirs[key])
        for key, value in ours.items()
        if key.startswith(("MODEL.", "INPUT.", "DATASETS.T", "SOLVER."))
        and not key.startswith(ignored)
        and (list(value) if isinstance(value, tuple) else value)
        != (list(theirs[key]) if isinstance(theirs[key], tuple) else theirs[key])
    }
    assert different == {}


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_every_panoptic_and_semantic_model_has_both_decoders(kind):
    stems = {file.stem.removeprefix("di") for file in FILES if file.parent.name == kind}
    assert {f"{prefix}{stem}" for stem in stems for prefix in ("", "di")} == {
        file.stem for file in FILES if file.parent.name == kind
    }


# Where DINO's learning rate drops, by epochs.
DINO_DROPS = {12: 11, 24: 20, 36: 30}


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.parent.name == "dino" and "detrex" not in file.stem], ids=name
)
def test_dino_schedules_and_levels_match_the_file_names(file):
    cfg = load(file)
    epochs = int(re.findall(r"_(\d+)ep$", file.stem)[0])
    assert 7375 * epochs == cfg.SOLVER.MAX_ITER
    assert list(cfg.SOLVER.STEPS) == [7375 * DINO_DROPS[epochs]]
    levels = int(re.findall(r"_(\d)scale", file.stem)[0])
    features = ["res2", "res3", "res4", "res5"][5 - levels :]
    assert (levels, features) == (cfg.MODEL.DINO.NUM_LEVELS, cfg.MODEL.DINO.IN_FEATURES)
    assert (cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_EMBED, cfg.SOLVER.WEIGHT_DECAY) == (1e-4,) * 3
    assert (cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.WARMUP_ITERS) == (0.1, False, 0)


@pytest.mark.parametrize(
    ("recorded", "file"),
    [
        ("dino_4scale_r50", "dino_r50_4scale_12ep"),
        ("dino_5scale_r50", "dino_r50_5scale_36ep"),
        ("dino_4scale_swinl", "dino_swinl_4scale_36ep"),
        ("dino_5scale_swinl", "dino_swinl_5scale_36ep"),
        ("detrex_dino_r50_4scale", "dino_detrex_r50_4scale_12ep"),
    ],
)
def test_dino_files_are_the_recorded_releases(recorded, file):
    ours, theirs = load(CONFIGS / "dino" / f"{file}.yaml"), release_cfg(recorded)
    # The release's files hold the box noise of the paper; all of its trainings passed 1.0.
    expected = dict(flatten(theirs.MODEL.DINO)) | {"DN_BOX_NOISE": 1.0}
    assert dict(flatten(ours.MODEL.DINO)) == expected
    assert ours.MODEL.BACKBONE.NAME == theirs.MODEL.BACKBONE.NAME
    assert ours.MODEL.SWIN.EMBED_DIM == theirs.MODEL.SWIN.EMBED_DIM
    assert ours.TEST.DETECTIONS_PER_IMAGE == 300


DINO_ABLATIONS = CONFIGS / "ablation" / "dino"


@pytest.mark.parametrize("dataset", ["coco", "shapes"])
def test_ablations_of_dino_change_the_model_alone(dataset):
    base = DINO_ABLATIONS / dataset / "dino.yaml"
    files = sorted(file for file in (DINO_ABLATIONS / dataset).glob("*.yaml") if file != base)
    keys = {"QUERY_SELECTION", "LOOK_FORWARD_TWICE", "DN", "DN_NUM"}
    changed = {file.stem: changes(file, base) for file in files}
    assert len(files) == 9
    for name_of_file, values in changed.items():
        assert values, name_of_file
        assert set(values) <= {f"MODEL.DINO.{key}" for key in keys}
    assert changed["dino_pure"] == {
        "MODEL.DINO.QUERY_SELECTION": "pure",
        "MODEL.DINO.LOOK_FORWARD_TWICE": False,
        "MODEL.DINO.DN": "plain",
    }
    assert changed["dino_no_dn"] == {"MODEL.DINO.DN": "no"}
    assert load(base).MODEL.DINO.DN_BOX_NOISE == 0.4


def test_small_ablations_train_like_a_shorter_demo():
    demo, short = load(CONFIGS / "demo" / "Base-shapes.yaml"), load(FULL["shapes"])
    assert short.SOLVER.MAX_ITER < demo.SOLVER.MAX_ITER / 2
    for config in (demo, short):
        assert sorted(config.SOLVER.STEPS) == list(config.SOLVER.STEPS)
        assert config.SOLVER.STEPS[-1] < config.SOLVER.MAX_ITER
    changed = changes(FULL["shapes"], CONFIGS / "demo" / "Base-shapes.yaml")
    assert set(changed) == {"SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD", "OUTPUT_DIR"}


@pytest.mark.parametrize("dataset", ["coco", "bdd100k"])
def test_files_of_a_dataset_change_only_their_own_keys(dataset):
    for file in (file for file in FILES if file.parent == CONFIGS / dataset):
        changed = set(changes(file, FULL[dataset]))
        allowed = {"SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD"}
        allowed |= {"TEST.EVAL_PERIOD"}
        if file.stem.startswith("maskdino"):
            allowed |= {"MODEL.MaskDINO.TRANSFORMER_DECODER_NAME", "MODEL.MaskDINO.DEC_LAYERS"}
        if "swinl" in file.stem:
            allowed |= {key for key in changed if key.startswith("MODEL.SWIN.")}
            allowed |= {"MODEL.WEIGHTS", "MODEL.BACKBONE.NAME", "MODEL.MaskDINO.INITIALIZE_BOX_TYPE"}
            allowed |= {
                "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
                "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS",
            }
        if "3level" in file.stem:
            head = ("DIM_FEEDFORWARD", "TOTAL_NUM_FEATURE_LEVELS", "FEATURE_ORDER")
            allowed |= {f"MODEL.SEM_SEG_HEAD.{key}" for key in head} | {"MODEL.MaskDINO.INITIALIZE_BOX_TYPE"}
        assert changed <= allowed, file


def test_bdd100k_changes_only_data_and_schedule():
    changed = changes(FULL["bdd100k"], FULL["coco"])
    assert changed.pop("MODEL.SEM_SEG_HEAD.NUM_CLASSES") == 8
    assert changed.pop("DATASETS.TRAIN") == ("bdd100k_ins_seg_train",)
    assert changed.pop("DATASETS.TEST") == ("bdd100k_ins_seg_val",)
    assert {key.split(".")[0] for key in changed} == {"SOLVER", "TEST"}


@pytest.mark.parametrize("file", sorted(ABLATIONS["coco"].glob("*.yaml")), ids=lambda file: file.stem)
def test_ablations_change_the_same_model_keys_on_both_datasets(file):
    changed = changes(file, FULL["coco"])
    assert changed == changes(ABLATIONS["bdd100k"] / file.name, FULL["bdd100k"])
    assert 1 <= len(changed) <= 2
    assert all(key.startswith("MODEL.MaskDINO.") for key in changed)


# (tokens or layers of the small model, those of the paper's)
SCALED = {
    "MODEL.MaskDINO.DI.NUM_SELECTED": (40, 300),
    "MODEL.MaskDINO.FIRST_SELECTED_QUERIES": (40, 300),
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": (40, 300),
    "MODEL.MaskDINO.DEC_LAYERS": (4, 6),
}


@pytest.mark.parametrize("file", sorted(ABLATIONS["bdd100k"].glob("*.yaml")), ids=lambda file: file.stem)
def test_shapes_ablations_scale_down_the_papers(file):
    expected = {}
    for key, value in changes(file, FULL["bdd100k"]).items():
        small, large = SCALED.get(key, (1, 1))
        if key in SCALED:
            values = [each * small / large for each in (value if isinstance(value, list) else [value])]
            value = values if isinstance(value, list) else values[0]
        expected[key] = value
    assert changes(ABLATIONS["shapes"] / file.name, FULL["shapes"]) == expected


def test_the_small_model_keeps_the_shares_of_counts():
    small, large = load(FULL["shapes"]).MODEL.MaskDINO, load(FULL["bdd100k"]).MODEL.MaskDINO
    for key, (one, other) in SCALED.items():
        if key != "MODEL.MaskDINO.DI.NUM_SELECTED":
            field = key.rsplit(".", 1)[-1]
            assert getattr(small, field) * other == getattr(large, field) * one, key


@pytest.mark.parametrize("condition", ["", "_loss", "_position"])
@pytest.mark.parametrize("model", ["maskdino", "di"])
def test_tolerance_models_have_one_condition_each(model, condition):
    cfg = load(ABLATIONS["bdd100k"] / f"tolerance_{model}{condition}.yaml")
    node = cfg.MODEL.MaskDINO
    assert node.DEC_LAYERS == 3
    if model == "maskdino":
        assert node.TRANSFORMER_DECODER_NAME == "MaskDINODecoder"
    else:
        assert (node.TRANSFORMER_DECODER_NAME, node.DI.ENABLED, node.BATO.ENABLED) == ("DIMaskDINODecoder", True, False)
    weights = (node.BOX_WEIGHT, node.GIOU_WEIGHT)
    assert weights == ((0.5, 0.2) if condition == "_loss" else (5.0, 2.0))
    assert (node.COST_BOX_WEIGHT, node.COST_GIOU_WEIGHT, node.CLASS_WEIGHT) == (5.0, 2.0, 4.0)
    assert node.DI.RANDOM_POSITION is (condition == "_position")


def test_rows_of_the_paper_and_files_match():
    used = set()
    for table in paper_tables().values():
        for row in table.rows:
            for dataset in table.datasets:
                experiment = find_experiment(CONFIGS, dataset, row.experiment)
                papers_alone = row.experiment in ("dn_detr", "release_alone")
                assert experiment is not None or dataset == "shapes" or papers_alone, (table.name, row.labels)
                used |= {experiment.config_file} if experiment else set()
    # Beyond the tables: panoptic and semantic models, one's own data, and DINO's other backbones, detrex, Objects365.
    more_dino = {file for file in FILES if re.match("dino_(swinl|timm|detrex)", file.stem)}
    assert {
        file for file in FILES if file.parent.name not in ("demo", "panoptic", "semantic", "configs")
    } - used - more_dino == set()


def test_configurations_are_short():
    for file in FILES:
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        most = {"demo": 80, "dino": 15, "objects365": 20, "panoptic": 20, "semantic": 60, "configs": 20}.get(
            file.parent.name, 8
        )
        assert len(lines) <= most, file
        assert "_BASE_" in yaml.safe_load(file.read_text()) or file.stem in ("Base-shapes", "dino_shapes")


def test_swin_l_has_as_many_parameters_as_the_public_one(monkeypatch):
    # Nothing is computed with these weights: memory that is never written costs nothing.
    for initialize in ("trunc_normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, initialize, lambda tensor, *_, **__: tensor)
    backbone = build_backbone(load(CONFIGS / "coco" / "dimaskdino_swinl_12ep.yaml"))
    public = timm.create_model("swin_large_patch4_window12_384")
    ours = sum(p.numel() for key, p in backbone.named_parameters() if not re.match(r"norm\d\.", key))
    theirs = sum(p.numel() for key, p in public.named_parameters() if not key.startswith(("norm.", "head.")))
    assert ours == theirs > 190e6


@pytest.mark.parametrize("stem", ["dimaskdino_r50_12ep", "dimaskdino_r50_24ep", "maskdino_r50_50ep"])
def test_full_models_have_every_tensor_of_the_releases(stem):
    with torch.device("meta"):
        model = build_model(load(CONFIGS / "coco" / f"{stem}.yaml", {"MODEL.DEVICE": "meta"}))
    theirs = {key: list(value.shape) for key, value in to_release(model.state_dict()).items()}
    assert theirs == release(stem).keys
