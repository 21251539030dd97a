"""What the compiler made of the micro-kernels: accumulators that stay in registers. GCC 12 spills those of the same
kernels written with intrinsics, and then a ResNet-50 takes half as long again; no test of results would see it.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from qdeploy import _engine

INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(?:\{\w+\} )?(\S+)[ \t]*([^#<\n]*)", re.MULTILINE)
DOT_PRODUCTS = ("vpdpbusd", "vpdpwssd", "vpmaddubsw", "vpmaddwd")
Instruction = tuple[int, str, str]  # address, mnemonic, operands as objdump writes them: the destination last


def inner_loops(listing: str) -> list[list[Instruction]]:
    """The innermost loops of a listing by `objdump -d --no-show-raw-insn`, which needs no symbols: a conditional jump
    backwards ends a loop, and in between there is no other such jump and no return.
    """
    loops = []
    since_last: dict[int, int] = {}  # address: number, of the instructions since the last end of a loop or function
    code = [(int(address, 16), name, operands.strip()) for address, name, operands in INSTRUCTION.findall(listing)]
    for i, (address, name, operands) in enumerate(code):
        since_last[address] = i
        if name == "ret":
            since_last = {}
        elif name.startswith("j") and name != "jmp" and re.fullmatch("[0-9a-f]+", operands):
            target = int(operands, 16)
            if target <= address:
                if target in since_last:
                    loops.append(code[since_last[target] : i + 1])
                since_last = {}
    return loops


def dot_products(loop: list[Instruction]) -> set[str]:
    """Such as "vpdpbusd zmm" for each kind in the loop of a convolution: one that broadcasts activations from memory.
    (Depthwise ones do not, and have more operands than there are registers.)
    """
    if not any(name == "vpbroadcastd" and "(" in operands for _, name, operands in loop):
        return set()
    named = [(name, re.search(r"%([yz]mm)\d+$", operands)) for _, name, operands in loop if name in DOT_PRODUCTS]
    return {f"{name} {register[1]}" for name, register in named if register}


def spills(loop: list[Instruction]) -> list[Instruction]:
    """Vectors that the loop stores on the stack: sums and products belong in registers. What a loop over pixels has in
    the end of each goes through a pointer.
    """
    return [step for step in loop if step[1].startswith("v") and re.search(r"\(%r[sb]p[^()]*\)$", step[2])]


SPILLED = """
0000000000001000 <.text>:
    1000:\tvmovdqa64 %zmm1,0x40(%rsp)
    1008:\tvpbroadcastd (%rax),%zmm0
    100e:\t{vex} vpdpbusd %ymm2,%ymm0,%ymm3
    1014:\tvmovdqa64 0x40(%rsp),%zmm1
    101c:\tvpdpbusd %zmm2,%zmm0,%zmm1
    1022:\tvmovdqa64 %zmm1,0x40(%rsp)
    102a:\tadd    $0x10,%rax
    102e:\tcmp    %rdx,%rax
    1031:\tjne    1008 <.text+0x8>
    1033:\tdec    %ecx
    1035:\tvmovdqu8 %zmm1,(%rdi)
    103b:\tjne    1000 <.text>
    103d:\tret
"""


def test_a_spill_in_an_inner_loop_is_seen():
    (loop,) = inner_loops(SPILLED)
    assert dot_products(loop) == {"vpdpbusd zmm", "vpdpbusd ymm"}
    assert spills(loop) == [(0x1022, "vmovdqa64", "%zmm1,0x40(%rsp)")]


def test_stores_around_an_inner_loop_are_not_spills():
    (loop,) = inner_loops(SPILLED.replace("vmovdqa64 %zmm1,0x40(%rsp)\n    102a", "nop\n    102a"))
    assert loop[0][0] == 0x1008
    assert spills(loop) == []


def test_what_goes_through_a_pointer_is_no_spill():
    (loop,) = inner_loops(SPILLED.replace("0x40(%rsp)", "0x40(%rbx)"))
    assert dot_products(loop) == {"vpdpbusd zmm", "vpdpbusd ymm"}
    assert spills(loop) == []


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the rules are those of x86 assembly")
def test_no_kernel_spills_in_its_inner_loop():
    objdump = shutil.which("objdump") or pytest.skip("objdump (binutils) is not installed")
    command = [objdump, "-d", "--no-show-raw-insn", _engine.__file__]
    loops = inner_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kernels = [loop for loop in loops if dot_products(loop)]
    expected = {f"{name} {width}" for name in DOT_PRODUCTS for width in ("ymm", "zmm")}
    assert set.union(*map(dot_products, kernels)) == expected
    found = [(hex(loop[0][0]), spills(loop)) for loop in kernels if spills(loop)]
    assert found == [], f"{len(found)} of {len(kernels)} inner loops store vectors"
