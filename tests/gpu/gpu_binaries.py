"""Every GPU kernel compiled for sm_80 and sm_90 on a machine without a GPU, and what is in the binaries.

    python tests/gpu/gpu_binaries.py    # a table: registers, memory, occupancy, instructions

A variant is a call of a launcher. Triton itself specializes the kernels on the arguments and compiles them, and only
the launch is left out: these are the binaries that a GPU would run. Each target has a process of its own, without
Triton's interpreter, which is on in the other tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor, by target
COUNTED = {  # column: the instruction in SASS
    "loads16": r"LDG\.E\.\S*128",
    "loads": r"LDG\.E",
    "stores16": r"STG\.E\.\S*128",
    "stores": r"STG\.E",
    "copies16": r"LDGSTS\.\S*128",
    "tensor_cores": r"IG?MMA\.",
    "mufu": r"MUFU\.",
}
WIDE = ("loads16", "stores16")
ORDERED = ("bar.sync", "atom.global.gpu.acq_rel.add.u32", "bar.sync")


class Variant(NamedTuple):
    """`launch` calls a launcher on tensors that hold nothing. `kernels`: those it launches, and what each must have."""

    launch: Callable[[], object]
    kernels: dict[str, tuple[str, ...]]


def variants() -> dict[str, Variant]:
    return average_variants() | lsq_variants() | int8_variants() | token_variants()


def average_variants() -> dict[str, Variant]:
    from qdeploy.kernels.triton_ensemble import average

    def variant(rule: str, k: int, dtype: torch.dtype, **kernels: tuple[str, ...]) -> Variant:
        return Variant(partial(average, torch.empty(5, 4096, k, dtype=dtype, device="meta"), rule), kernels)

    loads = ("loads16",)
    return {
        "average probs, 7": variant("probs", 7, torch.float32, _average_kernel=()),
        "average logits, 345": variant("logits", 345, torch.float32, _average_kernel=()),
        "average probs, 345": variant("probs", 345, torch.float32, _average_kernel=()),
        "average logits, 1000": variant("logits", 1000, torch.float32, _average_kernel=WIDE),
        "average probs, 1000, bf16": variant("probs", 1000, torch.bfloat16, _average_kernel=WIDE),
        "average logits, 8191": variant("logits", 8191, torch.float32, _average_kernel=()),
        "average probs, 8192": variant("probs", 8192, torch.float32, _average_kernel=WIDE),
        "average logits, 100000": variant(
            "logits", 100000, torch.float32, _largest_kernel=WIDE, _total_kernel=loads, _normalise_kernel=WIDE
        ),
        "average probs, 100000": variant(
            "probs", 100000, torch.float32, _largest_kernel=loads, _total_kernel=loads, _normalise_kernel=WIDE
        ),
    }


def lsq_variants() -> dict[str, Variant]:
    from qdeploy.kernels.triton_lsq import backward, forward
    from qdeploy.kernels.triton_lsq_many import Tables, backward_many, forward_many

    found = {}
    for name, shape, axis, dtype, wide in [
        ("512x512x3x3", (512, 512, 3, 3), 0, torch.float32, WIDE),
        ("64x3x7x7", (64, 3, 7, 7), 0, torch.float32, ()),  # rows of 147
        ("4096x1024, steps of columns", (4096, 1024), 1, torch.float32, WIDE),
        ("32x256x56x56, bf16, one step", (32, 256, 56, 56), -1, torch.bfloat16, WIDE),
    ]:
        value = torch.empty(shape, dtype=dtype, device="meta")
        step = torch.empty(1 if axis == -1 else shape[axis], device="meta")
        found[f"lsq {name}"] = Variant(partial(forward, value, step, -64, 63, axis), {"_forward": wide})
        found[f"lsq backward {name}"] = Variant(
            partial(backward, value, value, step, -64, 63, axis, 0.1), {"_backward": wide, "_sum_partials": ()}
        )
    values = [torch.empty(64, 3, 7, 7), torch.empty(512, 512, 3, 3), torch.empty(512, 512, 3, 3)]
    steps = [torch.empty(64), torch.empty(512), torch.empty(1)]
    tables = Tables(values, steps, ((-64,) * 3, (63,) * 3, (0.1,) * 3))
    found["lsq_many"] = Variant(partial(forward_many, tables), {"_forward_many": WIDE})
    found["lsq_many backward"] = Variant(
        partial(backward_many, values, values, tables, torch.zeros(tables.layout.groups, dtype=torch.int32)),
        {"_backward_many": WIDE},
    )
    return found


def int8_variants() -> dict[str, Variant]:
    from qdeploy.kernels import triton_int8, triton_int8_conv, triton_int8_windows
    from qdeploy.kernels.int8_tiles import TILES, Tile, default
    from qdeploy.kernels.int8_weights import channel_stride, pack_conv

    def activation(size: int, channels: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Of 32 images."""
        return torch.empty(32, size, size, channel_stride(channels), dtype=dtype)

    def conv(
        shape: tuple[int, int, int, int],
        size: int,
        *has: str,
        groups: int = 1,
        stride: int = 1,
        dtype: torch.dtype = torch.uint8,
        residual: bool = False,
        inner: bool = False,
        tile: Tile | None = None,
    ) -> Variant:
        outputs, depth, kernel, _ = shape
        ones = np.ones(outputs, np.float32)
        packed = pack_conv(np.ones(shape, np.int8), groups, ones, ones, 3, torch.device("cpu"))
        x, out = activation(size, depth * groups), activation(size // stride, outputs, dtype)
        tile = tile or default(out[..., 0].numel(), packed.rows_per_superblock, packed.superblocks, packed.k_unit)
        options = {"residual": out, "residual_multiplier": 0.5} if residual else {}
        if inner:
            options["inner"] = triton_int8_conv.InnerCodes(3.0, 250.0, 0.5, 40.0)
        launch = partial(
            triton_int8_conv.conv, x, packed, out, tile, stride=(stride,) * 2, padding=(kernel // 2,) * 4, **options
        )
        return Variant(launch, {"_conv_kernel": ("tensor_cores", *has)})

    found = {
        f"int8 conv 3x3, residual, {'x'.join(map(str, tile[:3]))}": conv(
            (256, 256, 3, 3), 14, "copies16", *WIDE, residual=True, tile=tile
        )
        for tile in TILES[:7]  # the others have fewer accumulators per thread
    }
    found |= {
        f"int8 conv 1x1, s16 residual, {'x'.join(map(str, tile[:3]))}": conv(
            (256, 256, 1, 1), 14, "copies16", *WIDE, dtype=torch.int16, residual=True, tile=tile
        )
        for tile in TILES[:2]
    }
    x = activation(56, 256)
    return found | {
        "int8 conv 3x3, residual, 16x32x32": conv((256, 256, 3, 3), 14, residual=True, tile=TILES[-1]),
        "int8 conv 1x1, inner codes": conv((256, 256, 1, 1), 14, "copies16", *WIDE, residual=True, inner=True),
        "int8 conv 1x1": conv((64, 256, 1, 1), 56, "copies16", "stores16"),
        "int8 conv 7x7, 3 channels, stride 2": conv((64, 3, 7, 7), 224, "stores16", stride=2),
        "int8 conv 3x3, depthwise": conv((256, 1, 3, 3), 56, "copies16", "stores16", groups=256),
        "int8 linear, logits": conv((1000, 2048, 1, 1), 1, "copies16", dtype=torch.float32),
        "int8 quantize": Variant(
            partial(triton_int8.quantize, torch.empty(32, 3, 224, 224), activation(224, 3), 0.1, 3, torch.empty(1)),
            {"_quantize_kernel": ("loads16",)},
        ),
        "int8 lookup": Variant(
            partial(triton_int8.lookup, x, torch.empty(256, dtype=torch.uint8), x, 256), {"_lookup_kernel": WIDE}
        ),
        "int8 add": Variant(partial(triton_int8.add, x, x, x, 256, (0.5, 0.5), 1.0, (0, 255)), {"_add_kernel": WIDE}),
        "int8 mul": Variant(partial(triton_int8.mul, x, x, x, 256, (3, 4), 0.5, 1.0, (0, 255)), {"_mul_kernel": WIDE}),
        "int8 mul by a gate": Variant(
            partial(triton_int8.mul, x, activation(1, 256), x, 256, (3, 4), 0.5, 1.0, (0, 255)),
            {"_mul_kernel": WIDE},
        ),
        "int8 max pool": Variant(
            partial(
                triton_int8_windows.pool,
                x,
                activation(28, 256),
                256,
                kernel=(3, 3),
                stride=(2, 2),
                padding=(1, 1, 1, 1),
            ),
            {"_pool_kernel": ("loads16",)},
        ),
        "int8 average pool": Variant(
            partial(
                triton_int8_windows.pool,
                activation(7, 2048),
                activation(1, 2048),
                2048,
                kernel=(7, 7),
                stride=(1, 1),
                padding=(0, 0, 0, 0),
                multiplier=torch.empty(1),
            ),
            {"_pool_kernel": ("loads16",)},
        ),
    }


def token_variants() -> dict[str, Variant]:
    """Of 32 images of 197 tokens of 384 channels in 6 heads."""
    from qdeploy.kernels import triton_int8, triton_int8_attention, triton_int8_tokens, triton_int8_windows

    tokens, wide, image = torch.empty(32, 197, 1, 384, dtype=torch.uint8), torch.int16, (32, 14, 14, 384)
    stream, pixels = torch.empty(tokens.shape, dtype=wide), torch.empty(image, dtype=torch.uint8)
    rows, factors, limits = torch.empty(197, 384), torch.empty(384), (-32767, 32767)
    index, ids = torch.empty(384, dtype=torch.int32), torch.empty(32, 1, 1, 198, dtype=torch.int32)
    axis = torch.empty(28, dtype=torch.int32), torch.empty(28, 2, dtype=torch.int32)

    def attention(**options: Tensor | int | None) -> Variant:
        segments = {"block": None, "logit_bias": None, "regions": None, "ids": None, "more": 0} | options
        numbers = {"logit_multiplier": 0.1, "peak": 32767, "multiplier": 0.1, "bias": 3.0, "clamp": (0, 255)}
        sizes = {"heads": 6, "channels": (384, 384), "zero_points": (3, 4, 5)}
        launch = partial(triton_int8_attention.attention, *[tokens] * 4, **sizes, **numbers, **segments)
        return Variant(launch, {"_attention_kernel": ("tensor_cores", "copies16")})

    def variant(kernel: str, has: tuple[str, ...], launch: Callable, *arguments: object) -> Variant:
        return Variant(partial(launch, *arguments), {kernel: has})

    space, loads = triton_int8_tokens, ("loads16",)
    grown = torch.empty(32, 28, 28, 384, dtype=torch.uint8)
    return {
        "int8 rescale": variant("_rescale_kernel", WIDE, triton_int8.rescale, stream, tokens, 384, 0.1, 1.0, (0, 255)),
        "int8 resize": variant(
            "_resize_kernel", loads, triton_int8_windows.resize, pixels, grown, 384, axis, axis, 3, 0.1, 1.0, (0, 255)
        ),
        "int8 gather of rows": variant("_gather_kernel", WIDE, space.gather, stream, index[:197], stream, 384, 0, True),
        "int8 gather of channels": variant(
            "_gather_kernel", ("stores16",), space.gather, stream, index, stream, 384, 0, False
        ),
        "int8 position": variant("_position_kernel", WIDE, space.position, tokens, rows, stream, 0, 0.1, limits),
        "int8 embedding": variant(
            "_embedding_kernel",
            WIDE,
            space.embedding,
            ids,
            torch.empty(30522, 384, dtype=torch.int8),
            factors,
            rows,
            stream,
            limits,
        ),
        "int8 mean of texts": variant(
            "_mean_kernel", (), space.mean, tokens, rows[:, 0], pixels[:, :1, :1], 384, 3, 1.0, (0, 255), ids, 0
        ),
        "int8 norm of rows": variant(
            "_norm_kernel", WIDE, space.norm, stream, factors, factors, tokens, None, 0.1, (0, 255)
        ),
        "int8 norm of groups": variant(
            "_norm_kernel", (), space.norm, pixels, factors, factors, pixels, 32, 0.1, (0, 255)
        ),
        "int8 attention": attention(),
        "int8 attention, bias, regions": attention(
            logit_bias=torch.empty(6, 197, 197), regions=torch.empty(197, dtype=torch.int32)
        ),
        "int8 attention of texts": attention(ids=ids),
    }


def compile_variants(target: int) -> None:
    """Prints one line of JSON for every kernel that the launchers of `variants` would launch on sm_<target>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", target, 32),
        )
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    run = JITFunction.run
    compiled = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    for name, variant in variants().items():
        compiled.clear()
        variant.launch()
        launched = {kernel.metadata.name for kernel in compiled}
        if launched != set(variant.kernels):
            raise AssertionError(f"expected {name} to launch {sorted(variant.kernels)}, got {sorted(launched)}")
        for kernel in compiled:
            row = {"variant": name, "target": target, "kernel": kernel.metadata.name}
            row |= _properties(kernel, target, tools) | {"required": variant.kernels[kernel.metadata.name]}
            print(json.dumps(row), flush=True)


def _properties(kernel, target: int, tools: Path) -> dict:
    usage, sass = _dump(kernel.asm["cubin"], tools)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    inexact = set(re.findall(r"\S*(?:\.ftz|div\.full|\.approx)\S*", kernel.asm["ptx"]))
    if kernel.metadata.enable_fp_fusion:
        inexact.add("a * b + c may be one rounding")
    # What a program counts itself for is ordered before it by a barrier, what it then reads after it by another one.
    memory = ["", *re.findall(r"bar\.sync|atom\.\S+|(?:st|ld)\.global|BB\w+:", kernel.asm["ptx"]), ""]
    found = [three for three in zip(memory, memory[1:], memory[2:], strict=False) if three[1].startswith("atom")]
    return {
        "warps": warps,
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "occupancy": _occupancy(registers, warps, shared, target),
        **{column: len(re.findall(rf"\b{pattern}", sass)) for column, pattern in COUNTED.items()},
        "inexact": sorted(inexact),
        "unordered": sorted(" ".join(three) for three in found if three != ORDERED),
    }


@cache
def _dump(cubin: bytes, tools: Path) -> list[str]:
    """Resource usage and instructions; half a second, most of it the start of nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "--print-code", "-ndf"]
        return [
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in commands
        ]


def _occupancy(registers: int, warps: int, shared: int, target: int) -> float:
    """Resident warps over the 64 that a multiprocessor holds, by its 65536 registers, its shared memory, 32 blocks.

    Registers are given out to a warp by 256, to warps by four; a block takes 1 KB of shared memory for the system.
    """
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(32, 64 // warps, 65536 // per_warp // 4 * 4 // warps, SHARED_MEMORY[target] // (shared + 1024))
    return blocks * warps / 64


def measure() -> list[dict]:
    """The properties of all kernels for all targets, which compile side by side."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def of_target(target: int) -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.run(
                [sys.executable, __file__, str(target)],
                env=environment | {"TRITON_CACHE_DIR": folder},
                stdout=subprocess.PIPE,
                check=True,
            )
        return [json.loads(line) for line in process.stdout.splitlines()]

    with ThreadPoolExecutor() as pool:
        return [row for rows in pool.map(of_target, SHARED_MEMORY) for row in rows]


def main() -> None:
    if len(sys.argv) == 2:  # lines of JSON for one target
        return compile_variants(int(sys.argv[1]))
    rows = measure()
    columns = [key for key in rows[0] if key not in ("inexact", "unordered", "required")]
    table = [columns, *([str(row[key]) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
