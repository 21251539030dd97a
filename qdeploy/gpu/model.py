"""A model file on an NVIDIA GPU: the same graph, the same bits as on a CPU. Needs PyTorch and Triton.

`qdeploy.load_int_model(path, device="cuda")` gives a `GpuModel`: torch tensors of that device in and out, one CUDA
graph for each number of images.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, overload

import torch
from torch import Tensor

from qdeploy import format
from qdeploy.arguments import integer
from qdeploy.errors import InputError, ModelError
from qdeploy.gpu.devices import checked_device
from qdeploy.gpu.program import Program, Visit
from qdeploy.gpu.steps import DTYPES, Conv, Step, View
from qdeploy.graph import Activation, Graph, Output
from qdeploy.kernels import triton_ensemble
from qdeploy.model import check_has_classes
from qdeploy.terminal import progress

MAX_GRAPHS = 8  # sizes of batches whose launches are kept; the one used longest ago goes
MAX_OFFSET = 2**31  # elements: offsets in the kernels are 32 bits
LAUNCHES_TIMED, ROUNDS_TIMED = 20, 10
SMALL_BATCH = 16  # up to here one network leaves multiprocessors idle, and the members of an ensemble run side by side


@dataclass(frozen=True)
class _Captured:
    """The launches for one number of images, from the codes of every member to what `_forward` returns."""

    codes: list[Tensor]
    graph: torch.cuda.CUDAGraph
    results: tuple[Tensor, ...]


class GpuModel:
    """An int8 network or ensemble on a GPU. Any number of threads may call it; their calls take turns.

    The first call with a number of images compiles and captures: meanwhile no other thread may synchronize the GPU.
    """

    def __init__(self, graph: Graph, content: bytes, path: Path, device: torch.device):
        """`graph` is what `content` holds, which pickles."""
        self._done: torch.cuda.Event | None = None  # of the last replay
        self._content, self._path, self.device = content, path, device
        self._graph = graph
        try:
            self._programs = [Program(member, device, graph.variable) for member in graph.members]
        except ModelError as error:
            raise ModelError(f"{error} in {path}") from None
        self._images_per_chunk = max(1, (MAX_OFFSET - 1) // max(p.largest for p in self._programs))
        self._captured: OrderedDict[torch.Size, _Captured] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None  # of memory for the graphs
        # To capture on: the main one, then one for each member. Memory of a graph belongs to the stream that took it.
        count = 1 + len(self._programs) if device.type == "cuda" else 0
        with self._context():
            self._streams = [torch.cuda.Stream() for _ in range(count)]

    def __del__(self) -> None:
        self._wait()  # the graphs and their memory must not go while one runs

    # ---- Description ----------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> list[dict]:
        """One entry: `shape` (without the batch), `layouts` accepted, and `scale`, `zero_point` of the codes inside."""
        entry = self._graph.members[0].tensors[0]
        layouts = [{1: "f32 [N, F]", 2: "f32 [N, T, D]", 3: "f32 NCHW"}[len(entry.shape)]]
        if self._graph.preprocess:
            layouts.append("u8 NHWC")
        return [_described(entry) | {"layouts": layouts}]

    @property
    def outputs(self) -> list[dict]:
        """One entry for each output: `name`, `shape` (without the batch), `dtype` and, for codes, `scale` and
        `zero_point`."""
        member = self._graph.members[0]
        return [_described(member.tensors[i]) for i in member.output_ids]

    @property
    def members(self) -> list[str]:
        """Names of the networks in the file; more than one for an ensemble."""
        return [member.name for member in self._graph.members]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, where the file has them, else empty."""
        return list(self._graph.classes or [])

    @property
    def weight_bits(self) -> dict[str, int]:
        """Bits of the weight codes in the file, by node (of an ensemble: "member/node")."""
        return {name: step.node.bits for name, step in self._steps().items() if step.node.bits}

    @property
    def nbytes(self) -> int:
        """Size of the model file in bytes."""
        return len(self._content)

    def __repr__(self) -> str:
        networks = f"{len(self.members)} member(s), input {self.inputs[0]['shape']}"
        return f"<qdeploy.GpuModel {self._path.name}: {networks}, {self.device}>"

    # ---- Running --------------------------------------------------------------------------------------------------

    @overload
    def __call__(self, images: Tensor) -> Output: ...
    @overload
    def __call__(self, images: Tensor, taps: Sequence[str]) -> tuple[Output, dict[str, Tensor]]: ...
    def __call__(self, images: Tensor, taps: Sequence[str] = ()) -> Output | tuple[Output, dict[str, Tensor]]:
        """Run a batch of any size.

        images: on this device, float32 [N, C, H, W] (or [N, T, D] or [N, F]), or, where the file has `preprocess`,
            uint8 [N, H, W, C]. float32 images are checked for NaN and infinity, and the call returns when the GPU has
            read them; of uint8 ones as soon as the work is queued on the current stream.
        taps: names of nodes (of an ensemble "member/node") whose outputs are wanted as well.
        Returns new tensors on this device, as `qdeploy.Model` returns arrays.
        Raises InputError for any other dtype, shape or device, NaN or infinity, or an unknown tap.
        """
        if not len(taps):
            return self._output(self._run(images))
        unknown = [name for name in taps if not isinstance(name, str) or name not in self._steps()]
        if unknown:
            got = repr(unknown[0]) if isinstance(unknown[0], str) else type(unknown[0]).__name__
            raise InputError(f"expected the name of a node, as `plan` lists them, got {got} - at taps")
        return self._run_tapped(images, taps)

    def predict(self, images: Tensor) -> Tensor:
        """The class of each image, int64 [N]: the first largest logit, for an ensemble by its rule."""
        check_has_classes(self.outputs)
        output, *classes = self._run(images)
        return classes[0] if classes else output.argmax(-1)

    def plan(self, batch: int = 1) -> list[dict]:
        """What runs each node for `batch` images: kernel, tile of a convolution, bits of the weights, MACs."""
        batch = integer(batch, 1, MAX_OFFSET - 1, "batch")
        total = max(1, sum(step.macs for step in self._steps().values()))
        rows = []
        for program in self._programs:
            for step in program.steps:
                node, tile = step.node, step.tile(batch * step.pixels) if isinstance(step, Conv) else None
                rows.append(
                    {
                        "member": program.member.name,
                        "name": node.name,
                        "op": node.op,
                        "kernel": "int8 tensor cores" if tile else step.kernel,
                        "tile": "x".join(map(str, tile[:3])) if tile else "",
                        "bits": node.bits or 0,
                        "macs": step.macs * batch,
                        "share_of_macs": step.macs / total,
                        "residual": isinstance(step, Conv) and len(step.inputs) > 1,
                    }
                )
        return rows

    def profile(self, images: Tensor) -> list[dict]:
        """The plan with `microseconds` per node: each node by itself, replayed from a CUDA graph, median."""
        self._check(images)
        plan = self.plan(integer(len(images), 1, MAX_OFFSET - 1, "the number of images"))
        times = []

        def measure(step: Step, inputs: list[Tensor], output: Tensor) -> None:
            launched = not isinstance(step, View)
            times.append(_milliseconds(lambda: step.launch(inputs, output)) * 1e3 if launched else 0.0)

        self._visit(images, measure)
        return [row | {"microseconds": t} for row, t in zip(plan, times, strict=True)]

    def tune(self, images: Tensor) -> None:
        """Finds the fastest tiles for so many images, on these images, and keeps them on disk (TunedTiles).

        It compiles every tile, which takes minutes. Shapes that the file has are not timed again, so that it goes on
        where it was stopped. Raises InputError where the file cannot be written.
        """
        convolutions = sum(isinstance(step, Conv) for step in self._steps().values())
        with progress("tuning", convolutions) as advance:

            def tune(step: Step, inputs: list[Tensor], output: Tensor) -> None:
                if isinstance(step, Conv):
                    step.tune(inputs, output, _milliseconds)
                    advance()

            self._visit(images, tune)
        with self._lock:
            self._wait()
            self._captured.clear()

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `_forward`."""
        self._check(images)
        with self._context():
            results = [self._run_chunk(chunk) for chunk in images.contiguous().split(self._images_per_chunk)]
            return results[0] if len(results) == 1 else tuple(map(torch.cat, zip(*results, strict=True)))

    def _output(self, results: tuple[Tensor, ...]) -> Output:
        """What a call returns of `_forward`."""
        return list(results) if len(self._graph.members[0].output_ids) > 1 else results[0]

    def _run_chunk(self, images: Tensor) -> tuple[Tensor, ...]:
        if not len(images):
            return self._nothing()
        if self.device.type == "cuda":
            return self._replay(images)
        codes = self._empty_codes(images)  # in Triton's interpreter
        self._quantize(images, codes)()
        return self._forward(codes)

    def _replay(self, images: Tensor) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            raise InputError("expected a call outside of a CUDA graph, as a model replays its own - at the model")
        with self._lock:
            stream = torch.cuda.current_stream()
            if self._done is not None:  # of the last call, maybe on another stream: it has the same memory
                stream.wait_event(self._done)
            captured = self._captured_for(images)
            check = self._quantize(images, captured.codes)
            captured.graph.replay()
            results = tuple(result.clone() for result in captured.results)
            self._done = stream.record_event()
        check()
        return results

    def _quantize(self, images: Tensor, codes: list[Tensor]) -> Callable[[], None]:
        """Queues the quantization; the function it returns waits for it and raises InputError at NaN or infinity."""
        bad = torch.zeros(1, dtype=torch.int32, device=self.device)
        for program, target in zip(self._programs, codes, strict=True):
            program.quantize(images, target, bad)
        if images.dtype != torch.float32:
            return lambda: None
        found = bad.to("cpu", non_blocking=True)  # `bad.item()` later would wait for all that was queued meanwhile
        copied = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None

        def check() -> None:
            if copied is not None:
                copied.synchronize()
            if found.item():
                raise InputError("expected finite numbers, got NaN or infinity - at the input")

        return check

    def _forward(self, codes: list[Tensor], visit: Visit | None = None) -> tuple[Tensor, ...]:
        """The outputs; of an ensemble probabilities and classes."""
        outputs = [output for member in self._run_members(codes, visit) for output in member]
        ends = [step for program in self._programs for step in program.ends]
        arrays = [step.array(output, codes[0]) for step, output in zip(ends, outputs, strict=True)]
        if self._graph.combine is None:
            return tuple(arrays)
        return triton_ensemble.average(torch.stack(arrays), self._graph.combine)

    def _run_members(self, codes: list[Tensor], visit: Visit | None) -> list[list[Tensor]]:
        """The outputs of every member; in a graph of few images they run side by side."""
        pairs = list(zip(self._programs, codes, strict=True))
        few = len(pairs) > 1 and len(codes[0]) <= SMALL_BATCH
        if not few or self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return [program.run(member, visit) for program, member in pairs]
        (main, *sides), outputs = self._streams, []
        for side, (program, member) in zip(sides, pairs, strict=True):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                outputs.append(program.run(member))
        for side in sides:  # not in the loop above: the next member would wait for this one
            main.wait_stream(side)
        return outputs

    def _empty_codes(self, images: Tensor) -> list[Tensor]:
        return [program.empty_codes(images) for program in self._programs]

    def _captured_for(self, images: Tensor) -> _Captured:
        size = images.shape[: 2 if self._graph.vocabulary else 1]
        if size in self._captured:
            self._captured.move_to_end(size)
            return self._captured[size]
        codes = self._empty_codes(images)
        self._quantize(images, codes)  # or token ids and lengths would be what was in the memory
        self._forward(codes)  # compiles the kernels, which a capture cannot
        if not self._captured:  # a pool is gone with the last graph that used it
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with _capture(graph, self._streams[0], self._pool):
            results = self._forward(codes)
        self._captured[size] = _Captured(codes, graph, results)
        if len(self._captured) > MAX_GRAPHS:
            self._wait()
            self._captured.popitem(last=False)
        return self._captured[size]

    def _wait(self) -> None:
        """For the last replay."""
        if self._done is not None:
            self._done.synchronize()

    def _run_tapped(self, images: Tensor, taps: Sequence[str]) -> tuple[Output, dict[str, Tensor]]:
        names = {step: name for name, step in self._steps().items()}
        tapped = {}

        def keep(step: Step, inputs: list[Tensor], output: Tensor) -> None:
            tapped[names[step]] = step.array(output, images).contiguous()

        output = self._output(self._visit(images, keep))
        return output, {name: tapped[name] for name in taps}

    def _visit(self, images: Tensor, visit: Visit) -> tuple[Tensor, ...]:
        """Runs one step after the other without a graph; `visit` sees each with its inputs and output."""
        self._check(images)
        if len(images) > self._images_per_chunk:
            limit = f"at most {self._images_per_chunk} images with taps, to profile or to tune"
            raise InputError(f"expected {limit}, got {len(images)} - at the input")
        images = images.contiguous()
        with self._context():
            codes = self._empty_codes(images)
            self._quantize(images, codes)()
            return self._forward(codes, visit)

    def _nothing(self) -> tuple[Tensor, ...]:
        member = self._graph.members[0]
        outputs = [member.tensors[i] for i in member.output_ids]
        empty = [torch.empty((0, *o.shape), dtype=DTYPES[o.dtype], device=self.device) for o in outputs]
        if self._graph.combine is None:
            return tuple(empty)
        return empty[0], torch.empty(0, dtype=torch.int64, device=self.device)

    def _context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        if self.device.type == "cuda":
            stack.enter_context(torch.cuda.device(self.device))
        return stack

    def _check(self, images: Tensor) -> None:
        shape = self._graph.input_shape
        accepted = {torch.float32: shape}
        if self._graph.preprocess:
            accepted[torch.uint8] = (*shape[1:], shape[0])
        self._check_device(images)
        if images.dim() == 0 or accepted.get(images.dtype) != tuple(images.shape[1:]):
            layouts = (f"{_short(dtype)} [N, {', '.join(map(str, size))}]" for dtype, size in accepted.items())
            got = f"{_short(images.dtype)} {list(images.shape)}"
            raise InputError(f"expected {' or '.join(layouts)}, got {got} - at the input")

    def _check_device(self, value: Tensor, what: str = "input") -> None:
        if not isinstance(value, Tensor):
            raise InputError(f"expected a tensor on {self.device}, got {type(value).__name__} - at the {what}")
        if value.device != self.device:
            raise InputError(f"expected a tensor on {self.device}, got one on {value.device} - at the {what}")

    def _steps(self) -> dict[str, Step]:
        """Every step by the name of its node, in an ensemble "member/node"."""
        prefix = "{}/" if len(self._programs) > 1 else ""
        return {
            prefix.format(program.member.name) + step.node.name: step
            for program in self._programs
            for step in program.steps
        }

    # ---- Pickle ---------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Callable[..., GpuModel], tuple[Any, ...]]:
        return _restore, (type(self), self._content, self._path, str(self.device))


def _restore(kind: type[GpuModel], content: bytes, path: Path, device: str) -> GpuModel:
    return kind(format.parse(content, path), content, path, checked_device(device))


def _described(entry: Activation) -> dict:
    keys = ("name", "shape", "dtype", "scale", "zero_point")
    return {key: getattr(entry, key) for key in keys}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_capture_lock = threading.Lock()


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Records what is launched on the current device. One at a time in the process: beginning a capture synchronizes
    the device, which another thread's capture does not survive. PyTorch's default stream for captures is of the GPU
    that captured first, so it has to be given."""
    with _capture_lock, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        yield


def _milliseconds(launch: Callable[[], None]) -> float:
    """Of one launch, replayed from a CUDA graph: without gaps, its inputs where the launch before left them."""
    launch()  # compiles it
    graph = torch.cuda.CUDAGraph()
    with _capture(graph, torch.cuda.Stream()):
        for _ in range(LAUNCHES_TIMED):
            launch()
    times = []
    for _ in range(ROUNDS_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / LAUNCHES_TIMED)
    return median(times)
