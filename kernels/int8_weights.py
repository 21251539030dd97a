"""The weights of a convolution or linear layer, laid out for the int8 tensor cores (kernels/triton_int8_conv.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qdeploy.errors import ModelError
from qdeploy.kernels.int8_tiles import TILES

K_STEP = 32  # bytes of K in one tensor-core instruction (mma.m16n8k32)
LONGEST_K_TILE = max(tile.block_k for tile in TILES)


def channel_stride(channels: int) -> int:
    """Bytes from one pixel to the next of an activation with so many channels.

    32 and more keep every K tile within one cell. Fewer channels (images, first layers of small networks) would be
    mostly padding there: they take 4, 8 or 16, and a K tile spans cells.
    """
    if channels <= 16:
        return max(4, 1 << (channels - 1).bit_length())
    return math.ceil(channels / K_STEP) * K_STEP


@dataclass(frozen=True)
class PackedConv:
    """Rows are outputs, superblock after superblock, padded to `rows_per_superblock`; columns are (cell, channel)."""

    codes: Tensor  # s8 [superblocks * rows_per_superblock, K]
    compensation: Tensor  # i32 [rows]: (128 - zero_point) * sum of the row
    multiplier: Tensor  # f32 [rows]
    bias: Tensor  # f32 [rows]
    kh: int
    kw: int
    flat: bool  # K tiles span cells
    superblocks: int
    inputs_per_superblock: int
    outputs_per_superblock: int
    outputs: int
    padding: Tensor  # u8 [LONGEST_K_TILE]: the zero-point of the input

    @property
    def rows_per_superblock(self) -> int:
        return self.codes.shape[0] // self.superblocks

    @property
    def k_unit(self) -> int:
        """A K tile divides it: the channels of one cell, or K itself where tiles span cells."""
        return self.codes.shape[1] if self.flat else self.codes.shape[1] // (self.kh * self.kw)


def pack_conv(
    weight: np.ndarray, groups: int, multiplier: np.ndarray, bias: np.ndarray, zero_point: int, device: torch.device
) -> PackedConv:
    """weight: int8 [O, C/groups, KH, KW]; multiplier, bias: f32 [O].

    Raises ModelError where the kernels cannot address what groups take as block-diagonal weights.
    """
    outputs, depth, kh, kw = weight.shape
    per_superblock = _groups_per_superblock(groups, depth)
    superblocks = math.ceil(groups / per_superblock)
    missing = superblocks * per_superblock - groups  # in the last superblock
    group_outputs = outputs // groups
    block_outputs, block_inputs = per_superblock * group_outputs, per_superblock * depth
    width = channel_stride(block_inputs)
    step = 64 if block_outputs > K_STEP else K_STEP
    rows = math.ceil(block_outputs / step) * step

    size = superblocks * rows * kh * kw * width
    if size >= 2**31:
        raise ModelError(f"expected weights that take less than 2^31 bytes on a GPU, got {size}")
    whole = np.pad(weight, ((0, missing * group_outputs), (0, 0), (0, 0), (0, 0)))
    by_group = whole.reshape(superblocks, per_superblock, group_outputs, depth, kh * kw).transpose(0, 1, 2, 4, 3)
    dense = np.zeros((superblocks, rows, kh * kw, width), np.int8)
    for g in range(per_superblock):
        dense[:, g * group_outputs : (g + 1) * group_outputs, :, g * depth : (g + 1) * depth] = by_group[:, g]
    codes = dense.reshape(superblocks * rows, kh * kw * width)
    flat = width < K_STEP
    if flat:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % K_STEP)))

    def per_row(values: np.ndarray) -> Tensor:
        padded = np.zeros((superblocks, rows), values.dtype)
        padded[:, :block_outputs] = np.pad(values, (0, missing * group_outputs)).reshape(superblocks, block_outputs)
        return torch.from_numpy(padded.reshape(-1)).to(device)

    sums = weight.reshape(outputs, -1).sum(axis=1, dtype=np.int64)
    return PackedConv(
        codes=torch.from_numpy(codes).to(device),
        compensation=per_row(((128 - zero_point) * sums).astype(np.int32)),
        multiplier=per_row(multiplier),
        bias=per_row(bias),
        kh=kh,
        kw=kw,
        flat=flat,
        superblocks=superblocks,
        inputs_per_superblock=block_inputs,
        outputs_per_superblock=block_outputs,
        outputs=outputs,
        padding=torch.full((LONGEST_K_TILE,), zero_point, dtype=torch.uint8, device=device),
    )


def _groups_per_superblock(groups: int, depth: int) -> int:
    """As few groups as fill a multiple of K_STEP channels.

    The last superblock may lack groups only where superblocks are K_STEP channels: the padding of a pixel
    (channel_stride) then reaches to its end. Otherwise one superblock takes all groups.
    """
    few = K_STEP // math.gcd(K_STEP, depth)
    return few if few < groups and (groups % few == 0 or few * depth == K_STEP) else groups
