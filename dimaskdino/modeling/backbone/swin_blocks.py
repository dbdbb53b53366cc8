"""The parts of a Swin Transformer: windows, window attention, blocks, the way down, patches; maps are (B, H, W, C).

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021. As in its use
for detection, maps are padded to whole windows and every second block is shifted at any map size.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def split_windows(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C), of whole windows -> (B * windows, window_size^2, C), the windows in row-major order."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window_size, window_size, width // window_size, window_size, channels)
    return x.transpose(2, 3).reshape(-1, window_size * window_size, channels)


def merge_windows(windows: Tensor, window_size: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`split_windows`: back to (B, height, width, C)."""
    rows, columns = height // window_size, width // window_size
    x = windows.view(-1, rows, columns, window_size, window_size, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for every pair of positions of a window.

    Returns:
        (window_size^2, window_size^2) int64 in [0, (2 window_size - 1)^2).
    """
    axis = torch.arange(window_size)
    positions = torch.cartesian_prod(axis, axis)
    offset = positions[:, None] - positions[None, :] + window_size - 1
    return offset[..., 0] * (2 * window_size - 1) + offset[..., 1]


def shifted_window_mask(height: int, width: int, window_size: int, shift: int, device: torch.device) -> Tensor:
    """What keeps positions apart that only the cyclic shift has brought into one window.

    Returns:
        (windows, window_size^2, window_size^2) float: 0 within a region, -100 across regions.
    """

    def regions(size: int) -> Tensor:
        place = torch.arange(size, device=device)
        return (place >= size - window_size).long() + (place >= size - shift).long()

    labels = 3 * regions(height)[:, None] + regions(width)[None, :]
    windows = split_windows(labels[None, :, :, None], window_size).squeeze(-1)
    return (windows[:, :, None] != windows[:, None, :]).float() * -100.0


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for every relative position."""

    def __init__(
        self,
        *,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop_rate: float,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Let the positions of every window attend to each other.

        Args:
            windows: (B * M, N, C), N positions in each of M windows.
            mask: (M, N, N), added to the attention logits.

        Returns:
            (B * M, N, C).
        """
        total, num_positions, channels = windows.shape
        qkv = self.qkv(windows).view(total, num_positions, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        logits = (query * self.scale) @ key.transpose(-2, -1)
        logits = logits + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            by_image = logits.view(-1, mask.shape[0], *logits.shape[1:]) + mask[:, None].to(logits.dtype)
            logits = by_image.flatten(0, 1)
        attention = self.attn_drop(logits.softmax(dim=-1))
        mixed = (attention @ value).transpose(1, 2).reshape(total, num_positions, channels)
        return self.proj_drop(self.proj(mixed))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, *, dim: int, hidden_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class SwinBlock(nn.Module):
    """Pre-norm window attention, cyclically shifted by `shift`, and an MLP; each a residual."""

    def __init__(
        self,
        *,
        dim: int,
        window_size: int,
        shift: int,
        mlp_ratio: float,
        drop_path_rate: float,
        drop_rate: float,
        **attn: Any,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim=dim, window_size=window_size, drop_rate=drop_rate, **attn)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio), drop_rate=drop_rate)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend, then apply the MLP.

        Args:
            x: (B, H, W, C).
            mask: of :func:`shifted_window_mask` at the padded size; used by shifted blocks.
        """
        x = x + self.drop_path(self._attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size, 0, -height % self.window_size))
        padded_height, padded_width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(split_windows(x, self.window_size), mask if self.shift else None)
        x = merge_windows(windows, self.window_size, padded_height, padded_width)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]


class PatchMerging(nn.Module):
    """Halves the map: a linear layer on each 2x2 neighborhood; odd sizes are zero-padded."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinStage(nn.Module):
    """The blocks of one resolution, every second one shifted, and the way down to the next."""

    def __init__(
        self,
        *,
        dim: int,
        window_size: int,
        drop_path_rates: list[float],
        downsample: bool,
        use_checkpoint: bool,
        **block: Any,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=dim, window_size=window_size, shift=index % 2 * (window_size // 2), drop_path_rate=rate, **block
            )
            for index, rate in enumerate(drop_path_rates)
        )
        self.downsample = PatchMerging(dim=dim) if downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> its map, of the same shape, and the next stage's input (or the map again at the end)."""
        window = self.window_size
        height, width = x.shape[1] + -x.shape[1] % window, x.shape[2] + -x.shape[2] % window
        mask = shifted_window_mask(height, width, window, window // 2, x.device)
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Linear embedding of square patches; the image is zero-padded to whole patches."""

    def __init__(self, *, patch_size: int, in_channels: int, embed_dim: int, patch_norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim) if patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ceil(H / patch), ceil(W / patch), C)."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))
