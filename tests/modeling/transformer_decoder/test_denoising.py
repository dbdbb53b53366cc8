import pytest
import torch

from dimaskdino.modeling.transformer_decoder import DIMaskDINODecoder
from dimaskdino.modeling.transformer_decoder.denoising import Denoising, DenoisingQueries
from dimaskdino.structures import Targets, Tokens
from tests.tiny_model import DIM, NUM_CLASSES, encoded, scramble, targets, tiny_cfg

BOXES = [[0, 0, 32, 32], [16, 8, 48, 40], [40, 40, 60, 62]]


def denoising(num_queries: int = 10, noise_scale: float = 0.0) -> Denoising:
    return Denoising(dim=DIM, num_classes=NUM_CLASSES, num_queries=num_queries, noise_scale=noise_scale)


def crowd(count: int) -> Targets:
    """Objects that can be told apart by their boxes."""
    boxes = torch.rand(count, 4) * 0.4 + 0.3
    return Targets(torch.arange(count) % NUM_CLASSES, boxes, None, torch.ones(count, dtype=torch.bool))


def test_groups_repeat_every_object_and_fill_the_budget():
    queries = denoising(10)(targets(BOXES, BOXES[:1]))
    # The largest image has 3 objects: 10 // 3 groups of 3 places.
    assert (queries.num_groups, queries.group_size, queries.num_queries) == (3, 3, 9)
    assert queries.tokens.content.shape == (2, 9, DIM)
    assert queries.tokens.boxes.shape == (2, 9, 4)


def test_without_noise_queries_are_the_objects_label_and_box():
    module, (target, *_) = denoising(), targets(BOXES)
    queries = module([target])
    torch.testing.assert_close(queries.tokens.boxes[0], target.boxes.repeat(3, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(queries.tokens.content[0], module.label_embed(target.labels.repeat(3)))


def test_matches_say_which_query_stands_for_which_object():
    queries = denoising(10)(targets(BOXES, BOXES[:2], []))
    expected = [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 0, 1, 2, 0, 1, 2]),
        ([0, 1, 3, 4, 6, 7], [0, 1, 0, 1, 0, 1]),
        ([], []),
    ]
    assert [(query.tolist(), obj.tolist()) for query, obj in queries.matches] == expected


def test_unused_places_hold_zeros_at_the_middle_box():
    queries = denoising(10)(targets(BOXES, BOXES[:1]))
    unused = [1, 2, 4, 5, 7, 8]
    assert not queries.tokens.content[1, unused].any()
    assert (queries.tokens.boxes[1, unused] == 0.5).all()
    assert queries.tokens.content[1, [0, 3, 6]].any()


def test_images_without_objects_denoise_nothing():
    assert denoising()(targets([], [])) is None


def test_empty_image_beside_another_has_unused_places_alone():
    queries = denoising(10)(targets([], BOXES[:1]))
    assert not queries.tokens.content[0].any()
    assert queries.num_groups == 10


def test_attention_mask_by_hand():
    queries = DenoisingQueries(Tokens(torch.zeros(1, 4, 1), torch.zeros(1, 4, 4)), [], num_groups=2, group_size=2)
    expected = [
        # group 0   group 1  matching        (1: must not be seen)
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
    ]
    assert queries.attention_mask(3).int().tolist() == expected


def run_layer(decoder: DIMaskDINODecoder, queries: DenoisingQueries, content: torch.Tensor) -> torch.Tensor:
    """One real decoder layer on ``content`` (1, P + Q, C) under the attention mask."""
    torch.manual_seed(0)
    levels = [level[:1] for level in encoded().levels[::-1]]
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    shapes = [tuple(level.shape[-2:]) for level in levels]
    boxes, position = torch.rand(1, content.shape[1], 4), torch.randn_like(content)
    mask = queries.attention_mask(content.shape[1] - queries.num_queries)
    return decoder.layers[0](content, position, boxes, tokens, shapes, mask)


@pytest.mark.parametrize(
    ("changed", "reached"), [(0, slice(0, 3)), (3, slice(3, 6)), (6, slice(6, 9)), (-1, slice(None))]
)
def test_groups_see_themselves_and_matching_queries_reach_all(changed, reached):
    decoder = scramble(DIMaskDINODecoder(tiny_cfg())).eval()
    queries = denoising(10)(targets(BOXES))
    content = torch.randn(1, queries.num_queries + 8, DIM)
    before = run_layer(decoder, queries, content)
    content[:, changed] += 1.0
    moved = (run_layer(decoder, queries, content) - before).abs().amax(-1)[0] > 1e-6
    assert moved[reached].all()
    moved[reached] = False
    assert not moved.any()


def test_boxes_move_by_at_most_their_noise():
    scale, module = 0.4, denoising(1000, 0.4)
    box = torch.tensor([[0.5, 0.4, 0.2, 0.1]])
    target = Targets(torch.zeros(1, dtype=torch.int64), box, None, torch.ones(1, dtype=torch.bool))
    boxes = module([target]).tokens.boxes[0]
    shift, size = (boxes - box).abs(), box[:, 2:].repeat(1, 2)
    # Centers by half the size, sizes by the whole, times the scale.
    bound = scale * size * torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert (shift <= bound + 1e-6).all()
    assert (shift.amax(0) > 0.95 * bound).all()
    assert ((boxes - box).mean(0).abs() < 0.1 * bound).all()


def test_noised_boxes_stay_in_the_image():
    target = Targets(
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([[0.02, 0.98, 0.9, 0.9], [0.5, 0.5, 1.0, 1.0]]),
        None,
        torch.ones(2, dtype=torch.bool),
    )
    boxes = denoising(500, 1.0)([target]).tokens.boxes
    assert boxes.isfinite().all()
    assert ((boxes > 0) & (boxes < 1)).all()


def test_labels_flip_with_half_the_noise_scale_to_any_class():
    module = denoising(4000, 0.8)
    target = Targets(torch.tensor([2]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), None, torch.ones(1, dtype=torch.bool))
    content = module([target]).tokens.content[0]
    counts = [int((content == row).all(-1).sum()) for row in module.label_embed.weight]
    assert sum(counts) == 4000
    # 0.4 are redrawn from all five classes: 0.08 each, and 0.68 for the true one.
    assert counts[2] / 4000 == pytest.approx(0.68, abs=0.03)
    assert [count / 4000 for i, count in enumerate(counts) if i != 2] == pytest.approx([0.08] * 4, abs=0.02)


def test_the_same_seed_gives_the_same_queries():
    module, batch = denoising(10, 0.4), targets(BOXES)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(module(batch).tokens.boxes)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_crowded_images_denoise_as_many_objects_as_fit():
    # The releases switch denoising off for the whole batch here.
    batch = [crowd(25), crowd(4)]
    queries = denoising(10)(batch)
    assert (queries.num_groups, queries.group_size) == (1, 10)
    (query, obj), (small_query, small_obj) = queries.matches
    assert query.tolist() == list(range(10))
    assert len(set(obj.tolist())) == 10
    assert (small_query.tolist(), small_obj.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])
    for image, (places, objects) in enumerate(queries.matches):
        torch.testing.assert_close(queries.tokens.boxes[image, places], batch[image].boxes[objects], rtol=0, atol=1e-4)


def test_crowded_images_denoise_other_objects_each_time():
    module, batch = denoising(10), [crowd(25)]
    seen = {tuple(sorted(module(batch).matches[0][1].tolist())) for _ in range(5)}
    assert len(seen) > 1


def test_as_many_objects_as_queries_are_denoised_in_order():
    queries = denoising(10)([crowd(10)])
    assert queries.matches[0][1].tolist() == list(range(10))
