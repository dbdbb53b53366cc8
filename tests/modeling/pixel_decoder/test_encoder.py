import pytest
import torch
from detectron2.layers import ShapeSpec

from dimaskdino.errors import ConfigError
from dimaskdino.layers.position import pixel_centers, pixel_sine_embedding
from dimaskdino.modeling.pixel_decoder import MaskDINOEncoder
from tests.tiny_model import DIM, ToyBackbone, scramble, tiny_cfg

HEAD = "MODEL.SEM_SEG_HEAD."
IN_FEATURES = HEAD + "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
LEVELS = HEAD + "TOTAL_NUM_FEATURE_LEVELS"
ORDER = HEAD + "FEATURE_ORDER"
SHAPE = {
    name: ShapeSpec(channels=channels, stride=4 * 2**index)
    for index, (name, channels) in enumerate(ToyBackbone.channels.items())
}


def build(**options) -> MaskDINOEncoder:
    torch.manual_seed(0)
    return scramble(MaskDINOEncoder(tiny_cfg(options), SHAPE)).eval()


def features(height: int, width: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Features of an image whose sides need not be multiples of the strides."""
    return {
        name: torch.randn(batch, spec.channels, -(-height // spec.stride), -(-width // spec.stride))
        for name, spec in SHAPE.items()
    }


def sizes(encoder: MaskDINOEncoder, height: int = 64, width: int = 128) -> list[tuple[int, int]]:
    return [tuple(level.shape[-2:]) for level in encoder(features(height, width)).levels]


COARSE_TO_FINE = [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]  # strides 64, 32, 16, 8, 4


@pytest.mark.parametrize("order", ["low2high", "high2low"])
@pytest.mark.parametrize(
    ("names", "levels"),
    [
        (["res3", "res4", "res5"], COARSE_TO_FINE[1:4]),
        (["res3", "res4", "res5"], COARSE_TO_FINE[:4]),
        (["res2", "res3", "res4", "res5"], COARSE_TO_FINE),
    ],
    ids=["3 levels", "4 levels", "5 levels"],
)
def test_levels_come_in_the_order_that_is_asked_for(order, names, levels):
    encoder = build(**{IN_FEATURES: names, LEVELS: len(levels), ORDER: order})
    assert sizes(encoder) == (levels[::-1] if order == "low2high" else levels)
    assert encoder.level_embed.shape == (len(levels), DIM)
    assert len(encoder.input_proj) == len(levels)


@pytest.mark.parametrize("order", ["low2high", "high2low"])
def test_two_extra_levels_come_coarsest_first_in_either_order(order):
    encoder = build(**{LEVELS: 5, ORDER: order})
    extra, maps = [(1, 1), (1, 2)], [(2, 4), (4, 8), (8, 16)]
    assert sizes(encoder) == (maps[::-1] + extra if order == "low2high" else extra + maps)


@pytest.mark.parametrize("order", ["low2high", "high2low"])
def test_two_extra_levels_have_each_others_positions(order):
    encoder, seen = build(**{LEVELS: 5, ORDER: order}), []
    encoder.layers[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[1]))
    encoder(features(64, 128))
    # The tokens are those of the 1 x 1 level, then those of the 1 x 2 level; the positions come the other way round.
    embed, cpu = encoder.level_embed, torch.device("cpu")
    wide, single = pixel_sine_embedding(1, 2, DIM, cpu), pixel_sine_embedding(1, 1, DIM, cpu)
    if order == "low2high":
        torch.testing.assert_close(seen[0][-3:], torch.cat((wide + embed[3], single + embed[4])))
    else:
        torch.testing.assert_close(seen[0][:3], torch.cat((wide + embed[0], single + embed[1])))


def test_with_one_extra_level_every_token_has_its_own_position():
    encoder, seen = build(), []
    encoder.layers[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[1]))
    shapes = [tuple(level.shape[-2:]) for level in encoder(features(64, 128)).levels]
    expected = [
        pixel_sine_embedding(*shape, DIM, torch.device("cpu")) + encoder.level_embed[index]
        for index, shape in enumerate(shapes)
    ]
    torch.testing.assert_close(seen[0], torch.cat(expected))


@pytest.mark.parametrize("order", ["low2high", "high2low"])
def test_with_two_fpn_steps_each_joins_the_one_before(order):
    encoder = build(**{IN_FEATURES: ["res4", "res5"], ORDER: order, HEAD + "TRANSFORMER_ENC_LAYERS": 0})
    given = features(64, 64)
    fused = encoder(given).levels[0 if order == "low2high" else -1]
    for index, name in ((1, "res3"), (0, "res2")):
        upsampled = torch.nn.functional.interpolate(fused, scale_factor=2, mode="bilinear")
        fused = encoder.output_convs[index](encoder.lateral_convs[index](given[name]) + upsampled)
    torch.testing.assert_close(encoder(given).mask_features, encoder.mask_features(fused))


@pytest.mark.parametrize("order", ["low2high", "high2low"])
def test_in_features_may_be_listed_in_any_order(order):
    encoder = build(**{IN_FEATURES: ["res5", "res3", "res4"], ORDER: order})
    other = build(**{ORDER: order})
    other.load_state_dict(encoder.state_dict())
    given = features(64, 64)
    for level, expected in zip(encoder(given).levels, other(given).levels, strict=True):
        torch.testing.assert_close(level, expected)


@pytest.mark.parametrize("order", ["low2high", "high2low"])
def test_mask_features_have_the_stride_of_the_finest_backbone_feature(order):
    output = build(**{ORDER: order, HEAD + "MASK_DIM": 32})(features(64, 128, batch=2))
    assert output.mask_features.shape == (2, 32, 16, 32)


def test_sizes_need_not_be_multiples_of_the_strides():
    output = build()(features(70, 100))
    assert [tuple(level.shape[-2:]) for level in output.levels] == [(9, 13), (5, 7), (3, 4), (2, 2)]
    assert output.mask_features.shape == (1, DIM, 18, 25)


@pytest.mark.parametrize("order", ["low2high", "high2low"])
def test_the_extra_level_is_made_from_the_raw_coarsest_feature(order):
    encoder, given = build(**{ORDER: order, HEAD + "TRANSFORMER_ENC_LAYERS": 0}), features(64, 64)
    extra = encoder(given).levels[-1 if order == "low2high" else 0]
    torch.testing.assert_close(extra, encoder.input_proj[3](given["res5"]))


def test_without_layers_the_levels_are_the_projected_features():
    encoder, given = build(**{HEAD + "TRANSFORMER_ENC_LAYERS": 0}), features(64, 64)
    for level, name, proj in zip(encoder(given).levels, ("res3", "res4", "res5"), encoder.input_proj, strict=False):
        torch.testing.assert_close(level, proj(given[name]))
    encoder(given).levels[0].sum().backward()
    assert encoder.level_embed.grad is not None  # data-parallel training waits for it


def test_every_level_influences_every_other():
    encoder, given = build(), features(64, 64)
    before = encoder(given).levels
    given["res5"] = given["res5"] + torch.randn_like(given["res5"])
    for level, expected in zip(encoder(given).levels, before, strict=True):
        assert not torch.allclose(level, expected)


@pytest.mark.parametrize(("order", "finest"), [("low2high", 0), ("high2low", -1)])
def test_mask_features_join_the_finest_level_and_feature(order, finest):
    encoder, given = build(**{ORDER: order}), features(64, 64)
    output = encoder(given)
    upsampled = torch.nn.functional.interpolate(output.levels[finest], scale_factor=2, mode="bilinear")
    fused = encoder.output_convs[0](encoder.lateral_convs[0](given["res2"]) + upsampled)
    torch.testing.assert_close(output.mask_features, encoder.mask_features(fused))


def test_runs_in_float32_under_autocast():
    encoder, given = build(), features(64, 64)
    expected = encoder(given)
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(given)
    assert output.mask_features.dtype == torch.float32
    torch.testing.assert_close(output.mask_features, expected.mask_features)
    for level, other in zip(output.levels, expected.levels, strict=True):
        assert level.dtype == torch.float32
        torch.testing.assert_close(level, other)


def test_takes_half_precision_features():
    given = {name: feature.bfloat16() for name, feature in features(64, 64).items()}
    assert build()(given).mask_features.dtype == torch.float32


def test_images_of_a_batch_do_not_mix():
    encoder, given = build(), features(64, 64, batch=2)
    alone = encoder({name: feature[1:] for name, feature in given.items()})
    torch.testing.assert_close(encoder(given).levels[0][1:], alone.levels[0])


def test_pixel_centers_by_hand():
    expected = [[0.25, 0.5 / 3], [0.75, 0.5 / 3], [0.25, 0.5], [0.75, 0.5], [0.25, 2.5 / 3], [0.75, 2.5 / 3]]
    torch.testing.assert_close(pixel_centers(3, 2, torch.device("cpu")), torch.tensor(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({ORDER: "finest"}, "FEATURE_ORDER is 'finest'"),
        ({IN_FEATURES: ["res3", "res6"]}, "ENCODER_IN_FEATURES is .*res6.* some of IN_FEATURES"),
        ({IN_FEATURES: []}, "ENCODER_IN_FEATURES is "),
        ({HEAD + "IN_FEATURES": ["res2", "p7"]}, "SEM_SEG_HEAD.IN_FEATURES is .*p7.*it must name some"),
        ({LEVELS: 2}, "TOTAL_NUM_FEATURE_LEVELS is 2, fewer than the 3 features"),
    ],
)
def test_settings_that_cannot_work_name_the_key(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
