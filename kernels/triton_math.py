"""Arithmetic that the Triton kernels share: no loads, no stores, every result to the last bit. And what sizes their
grids on the host.

Launch kernels that use it with `enable_fp_fusion=False`: a contracted multiplication and addition rounds once where
the references round twice. Only `tl.fma` is one rounding, everywhere. Division is `tl.div_rn`: `/` on float32 compiles
to `div.full.f32`, which is off by up to 2 ulp, and no interpreter shows it.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(v, low, high):
    """min(max(v, low), high) of float32; NaN stays NaN, as in torch.clamp."""
    return tl.clamp(v, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_half_even(v):
    """rint(v) of float32 with |v| <= 2^22, the sign of zero kept.

    Adding 1.5 * 2^23 leaves no bits for a fraction, and IEEE addition rounds it away half to even: two additions at
    full rate, where the conversion instructions (FRND, F2I) run at a quarter of it and the interpreter has none.
    """
    r = (v + 12582912.0) - 12582912.0
    sign = v.to(tl.int32, bitcast=True) & -2147483648
    return (r.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def round_to_u8(v):
    """rint(v) as uint8, for float32 within 0..255: the low byte of the number with its fraction rounded away."""
    return ((v + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def round_to_s16(v):
    """rint(v) as int16, for float32 within -32767..32767: the low 16 bits are those of the two's complement."""
    return ((v + 12582912.0).to(tl.int32, bitcast=True) & 0xFFFF).to(tl.int16)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv` runs as a Triton function: 8 us a call under a profiler, 7 calls an LSQ."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
