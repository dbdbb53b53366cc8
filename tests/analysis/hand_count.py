"""Multiply-adds of the models by hand: what each layer's formula says, with no tracing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Widths and counts of a model, and its feature maps (channels, height, width) at strides 4 to 32."""

    features: tuple[tuple[int, int, int], ...]
    dim: int
    encoder_hidden: int
    decoder_hidden: int
    heads: int
    classes: int
    encoder_layers: int
    decoder_layers: int
    first: int
    queries: int
    guides: int = 0  # 0: Mask DINO
    points: int = 4


def total(model: Sizes, backbone: int) -> float:
    """Multiply-adds of an image."""
    c, stage_px = model.dim, [height * width for _, height, width in model.features]
    height, width = model.features[-1][1:]
    extra = -(-height // 2) * -(-width // 2)
    tokens = sum(stage_px[1:]) + extra
    count = backbone + encoder(model, tokens, extra, stage_px)
    count += tokens * c * (c + 5 + model.classes)  # the first selection: projection, norm, class head
    # Boxes of all first tokens, from their masks; prediction of the stage.
    count += model.first * (box_head(c) + stage_heads(model) + c * stage_px[0])
    if model.guides:
        count += 2 * token_interaction(model) + model.first * c * (5 + model.classes)
        count += bato(model, tokens, stage_px[0])
    count += model.queries * stage_heads(model)  # before layer 0
    count += model.decoder_layers * decoder_layer(model, tokens)
    return count + model.queries * c * stage_px[0]  # masks


def encoder(model: Sizes, tokens: int, extra: int, stage_px: list[int]) -> int:
    c, hidden = model.dim, model.encoder_hidden
    channels = [channels for channels, _, _ in model.features]
    count = sum(px * (width * c + 5 * c) for px, width in zip(stage_px[1:], channels[1:], strict=True))
    count += extra * (9 * channels[-1] * c + 5 * c)
    count += model.encoder_layers * (deformable(model, tokens, tokens) + 2 * tokens * c * hidden + 10 * tokens * c)
    # Lateral 1 x 1, interpolation, 3 x 3, two norms, and the last 1 x 1.
    return count + stage_px[0] * c * (channels[0] + 4 + 9 * c + 10 + c)


def deformable(model: Sizes, queries: int, tokens: int) -> int:
    c, samples = model.dim, model.heads * 4 * model.points
    return 3 * queries * c * samples + (queries + tokens) * c * c + 5 * queries * samples * c // model.heads


def attention(queries: int, keys: int, c: int) -> int:
    return 2 * queries * c * c + 2 * keys * c * c + 2 * queries * keys * c


def box_head(c: int) -> int:
    return 2 * c * c + 4 * c


def stage_heads(model: Sizes) -> int:
    """Norm, class head and mask embedding of one query."""
    return model.dim * (5 + model.classes) + 3 * model.dim**2


def token_interaction(model: Sizes) -> int:
    c, n = model.dim, model.first
    count = 3 * n * c * c + attention(n, n, c) + 2 * n * c * model.decoder_hidden + 10 * n * c
    return count + n * (2 * box_head(c) + 5 * c + c * model.classes)


def decoder_layer(model: Sizes, tokens: int) -> int:
    c, n = model.dim, model.queries
    count = 3 * n * c * c + attention(n, n, c) + deformable(model, n, tokens) + 2 * n * c * model.decoder_hidden
    return count + 15 * n * c + n * (stage_heads(model) + 2 * box_head(c))


def bato(model: Sizes, tokens: int, px: int) -> int:
    c, n = model.dim, model.guides
    count = attention(tokens, n, c) + 2 * tokens * c * model.decoder_hidden + 10 * tokens * c
    count += model.queries * c * (3 * c + model.classes) + 3 * n * c * c
    return count + px * c * (4 + 9 * c + 5)


def resnet50(height: int, width: int) -> int:
    """R50 whose stride is in the 3 x 3 convolutions, without its classifier; height and width multiples of 32.

    Every convolution is followed by a frozen norm, two multiply-adds a value.
    """
    count, px, channels = (height // 2) * (width // 2) * 64 * (3 * 49 + 2), height * width // 16, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle, out = 64 * 2**stage, 256 * 2**stage
        for block in range(blocks):
            before, px = px, px // 4 if stage and not block else px
            count += before * middle * (channels + 2) + px * middle * (9 * middle + 2) + px * out * (middle + 2)
            count += px * out * (channels + 2) if not block else 0
            channels = out
    return count
