"""The emulator of a GPU, `ptx.py`: numbers, errors, and the order of threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the emulator needs PyTorch")
from ptx import Memory, PtxError, launch

ENTRY = """
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.wide.u32 	%rd3, %r1, 4, %rd1;
	mad.wide.u32 	%rd4, %r1, 4, %rd2;
	{body}
	ret;
}}
"""
WARP = np.arange(32)


def run(
    body: str, read: np.ndarray, written: np.ndarray, *, blocks: int = 1, warps: int = 1, shared: int = 0, seed=None
):
    """Runs `body`: %rd1 and %rd2 are the addresses of the arrays, %rd3 and %rd4 those of element %r1 of 4 bytes."""
    arrays = read, written
    addresses = [array.ctypes.data for array in arrays]
    memory = Memory([(start, start + array.nbytes) for start, array in zip(addresses, arrays, strict=True)])
    launch(ENTRY.format(body=body), addresses, (blocks,), warps, shared, memory, seed)
    return written


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


NAN = 0x7FC00000


@pytest.mark.parametrize(
    ("instruction", "a", "expected"),
    [
        ("add.rn.f32 %r4, %r3, 0f3F800000", bits(2**24), bits(2**24)),  # 2^24 + 1 is a tie, to even
        ("fma.rn.f32 %r4, %r3, %r3, 0fBF800001", bits(1 + 2**-23), bits(2**-23 + 2**-46)),  # one rounding
        ("max.f32 %r4, %r3, 0f00000000", bits(-0.0), 0),
        ("min.f32 %r4, %r3, 0f80000000", 0, bits(-0.0)),
        ("max.f32 %r4, %r3, 0fBF800000", NAN, bits(-1)),
        ("sqrt.rn.f32 %r4, %r3", bits(2), 0x3FB504F3),
        ("add.s16x2 %r4, %r3, 0x00010001", 0x7FFFFFFF, 0x80000000),  # no carry from half to half
        ("div.s32 %r4, %r3, 2", 2**32 - 7, 2**32 - 3),
        ("rem.s32 %r4, %r3, 4", 2**32 - 7, 2**32 - 3),
        ("mul.hi.s32 %r4, %r3, 2", 2**32 - 1, 2**32 - 1),
        ("shl.b32 %r4, %r3, 32", 1, 0),
        ("shr.s32 %r4, %r3, 40", 2**31, 2**32 - 1),
        ("shr.u32 %r4, %r3, 31", 2**31, 1),
        ("bfe.s32 %r4, %r3, 4, 4", 0x80, 2**32 - 8),
        ("bfi.b32 %r4, %r3, 0x11111111, 8, 4", 0xFF, 0x11111F11),
        ("prmt.b32 %r4, %r3, 0x77665544, 0x7B30U", 0x80000022, 0x77FF8022),
        ("popc.b32 %r4, %r3", 0xF0000103, 7),
        ("cvt.rzi.s32.f32 %r4, %r3", bits(3e9), 2**31 - 1),
        ("cvt.rzi.s32.f32 %r4, %r3", NAN, 0),
        ("cvt.rn.f32.s32 %r4, %r3", 2**24 + 3, bits(2**24 + 4)),
        ("cvt.rn.bf16x2.f32 %r4, %r3, %r3", 0x3F808000, 0x3F803F80),  # a tie, to even
        ("selp.b32 %r4, %r3, 5, %p1", 7, 5),
    ],
)
def test_arithmetic(instruction, a, expected):
    body = f"ld.global.b32 {{ %r3 }}, [ %rd3 + 0 ];\n setp.ne.b32 %p1, %r3, %r3;\n {instruction};\n"
    found = run(body + "st.global.b32 [ %rd4 + 0 ], { %r4 };", np.full(32, a, np.uint32), np.zeros(32, np.uint32))
    assert [hex(n) for n in np.unique(found)] == [hex(expected)]


def test_threads_that_part_meet_again():
    """Thread t adds 1 t times; the shuffle after the loop is of all."""
    loop = """
	mov.b32 %r3, 0;
	setp.eq.b32 %p1, %r1, 0;
	@%p1 bra $L__BB0_2;
$L__BB0_1:
	add.s32 %r3, %r3, 1;
	setp.lt.s32 %p2, %r3, %r1;
	@%p2 bra $L__BB0_1;
$L__BB0_2:
	shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
	st.global.b32 [ %rd4 + 0 ], { %r4 };"""
    assert (run(loop, WARP, np.zeros(32, np.int32)) == WARP ^ 1).all()


def test_product_of_bytes():
    """Against the places of elements as the PTX ISA gives them for mma.m16n8k32."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 32), np.int8), rng.integers(-128, 128, (32, 8), np.int8)
    words = np.zeros((6, 32, 4), np.int8)
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for i in range(16):
            words[i // 4, lane, i % 4] = a[group + 8 * (i // 4 % 2), place * 4 + i % 4 + 16 * (i // 8)]
        for i in range(8):
            words[4 + i // 4, lane, i % 4] = b[place * 4 + i % 4 + 16 * (i // 4), group]
    loads = [f"ld.global.b32 {{ %r{10 + i} }}, [ %rd3 + {128 * i} ];" for i in range(6)]
    zeros = [f"mov.b32 %r{20 + i}, {i};" for i in range(4)]
    product = (
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r20, %r21, %r22, %r23 }, "
        "{ %r10, %r11, %r12, %r13 }, { %r14, %r15 }, { %r20, %r21, %r22, %r23 };"
    )
    stores = [f"st.global.b32 [ %rd4 + {128 * i} ], {{ %r{20 + i} }};" for i in range(4)]
    found = run("\n".join([*loads, *zeros, product, *stores]), words, np.zeros((4, 32), np.int32))
    expected = a.astype(np.int32) @ b.astype(np.int32)
    for lane in range(32):
        for i in range(4):
            assert found[i, lane] == expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] + i


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("ld.global.b32 { %r3 }, [ %rd3 + 4 ]", "outside of all tensors"),
        ("st.global.b32 [ %rd4 + -4 ], { %r1 }", "outside of all tensors"),
        ("ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd3 + 0 ]", "not a multiple of 16"),
        ("st.shared.b32 [ 64 ], %r1", "outside of 64 bytes of shared memory"),
        ("mul.f32 %r3, %r3, %r3", r"expected the rounding \.rn"),
        ("div.full.f32 %r3, %r3, %r3", r"expected the rounding \.rn"),
        ("ex2.approx.f32 %r3, %r3", "unknown here"),
        ("tensormap.replace %r3", "unknown here"),
    ],
)
def test_what_is_an_error(instruction, message):
    with pytest.raises(PtxError, match=message) as error:
        run(instruction + ";", np.zeros(32, np.int32), np.zeros(32, np.int32), shared=64)
    assert instruction in str(error.value)


PASS_ON = """
	shl.b32 %r3, %r1, 2;
	st.shared.b32 [ %r3 + 0 ], %r1;
	{barrier}
	xor.b32 %r4, %r3, 128;
	ld.shared.b32 %r5, [ %r4 + 0 ];
	st.global.b32 [ %rd4 + 0 ], {{ %r5 }};"""


def test_a_missing_barrier_shows():
    """Each thread reads what a thread of another warp wrote."""
    threads = np.arange(64)

    def found(barrier: str, seed: int) -> np.ndarray:
        written = np.zeros(64, np.int32)
        return run(PASS_ON.format(barrier=barrier), threads, written, warps=2, shared=256, seed=seed)

    assert all((found("bar.sync 0;", seed) == threads ^ 32).all() for seed in range(5))
    assert not any((found("$L__BB0_1:", seed) == threads ^ 32).all() for seed in range(5))


COUNT = """
	setp.ne.b32 %p1, %r1, 0;
	@%p1 bra $L__BB0_1;
	atom.global.gpu.acq_rel.add.u32 %r3, [ %rd2 + 0 ], 1;
	mad.wide.u32 %rd3, %r2, 4, %rd2;
	st.global.b32 [ %rd3 + 4 ], { %r3 };
$L__BB0_1:"""


def test_blocks_count_themselves_in_any_order():
    orders = {tuple(run(COUNT, WARP, np.zeros(5, np.int32), blocks=4, seed=seed)) for seed in range(20)}
    assert all(order[0] == 4 and sorted(order[1:]) == [0, 1, 2, 3] for order in orders)
    assert len(orders) > 5


def test_the_example_of_the_page(tmp_path):
    """As a program of another project, beside its sources, which Triton reads."""
    pytest.importorskip("triton", reason="the example is a kernel in Triton")
    folder = Path(__file__).parent
    program, printed = re.findall(r"```(?:python)?\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == (printed, "")
