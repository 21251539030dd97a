"""What kernels over the pixels (tokens) and channels of an activation share.

An activation is [N, H, W, stride]: NHWC with `channel_stride` elements a pixel, so that loads of 16 bytes are aligned.
Tokens [T, D] are T pixels of D channels. What lies in the elements after the last channel does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qdeploy.kernels.triton_math import cdiv, clamp, next_power_of_2, round_to_s16, round_to_u8


@triton.jit
def offsets(channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The pixels and channels of this program; programs of the same pixels follow each other."""
    blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    return pid // blocks * BLOCK_P + tl.arange(0, BLOCK_P), pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def requantized(result, low, high, dtype: tl.constexpr):
    """float32 results as an output of this type: codes u8 or s16 within [low, high], or the results themselves."""
    value = result
    if dtype == tl.uint8:
        value = round_to_u8(clamp(result, low, high))
    elif dtype == tl.int16:
        value = round_to_s16(clamp(result, low, high))
    return value


def blocks_of(pixels: int, channels: int) -> tuple[tuple[int], dict]:
    """Grid and blocks of 4096 elements, 32 for each thread of 4 warps: up to 128 channels, more of few pixels."""
    block_c = min(next_power_of_2(channels), max(128, 4096 // next_power_of_2(max(pixels, 1))))
    block_p = 4096 // block_c
    grid = (cdiv(pixels, block_p) * cdiv(channels, block_c),)
    return grid, {"BLOCK_P": block_p, "BLOCK_C": block_c, "enable_fp_fusion": False}
