"""Times on a GPU by CUDA events, contestants in turns; on a CPU, for a dry run, by the host's clock."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qdeploy.timing import Timing

Run = Callable[[], object]
GRAPH = ", CUDA graph"  # ends the name of a contestant whose launches were captured
WARM_UP = 3
ROUNDS = 7
MOST_CALLS = 50  # of one turn


class HostEvent:
    """Stands in for torch.cuda.Event where there is no GPU."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


class Timer:
    """Times calls on `device`: `rounds` turns of each contestant, each of about `turn_ms` milliseconds."""

    def __init__(self, device: str, rounds: int = ROUNDS, turn_ms: float = 15):
        self.device, self.rounds, self.turn_ms = torch.device(device), rounds, turn_ms
        self.on_gpu = self.device.type == "cuda"
        self.generator = torch.Generator(self.device).manual_seed(0)  # not the default one, which captures register
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else 0
        self._other = torch.ones(cache, device=self.device)  # float32: four times the L2
        self._sum = torch.empty((), device=self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def in_a_row(self, run: Run, calls: int) -> list[float]:
        """Milliseconds of one call, the mean of `calls` without a pause: the GPU's time or the host's, the longer."""
        start, end = self._events()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        self.synchronize()
        return [start.elapsed_time(end) / calls]

    def cold(self, run: Run, calls: int) -> list[float]:
        """Milliseconds of each call with an L2 full of other, clean lines. Filling it takes the GPU some 65 us, and
        meanwhile the host launches the kernel or the graph: what is timed is the GPU alone."""
        pairs = [self._events() for _ in range(calls)]
        for start, end in pairs:
            torch.sum(self._other, 0, out=self._sum)  # a write would leave lines that the call has to evict
            start.record()
            run()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def captured(self, run: Run) -> Run:
        """The launches of `run` as one CUDA graph (on a CPU, which has none, `run` itself)."""
        if not self.on_gpu:
            return run
        stream, main = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):  # what the first calls on a stream do may not be captured
            for _ in range(WARM_UP):
                run()
        main.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def compare(self, contestants: dict[str, Run], graphs: Collection[str], cold: bool = False) -> Comparison:
        """Times contestants in turns, those in `graphs` also as a CUDA graph. One that fails is left out."""
        found, runs = Comparison(), {}
        for name, run in contestants.items():
            try:
                for _ in range(WARM_UP):
                    run()
                self.synchronize()
                runs[name] = run
                if name in graphs:
                    runs[name + GRAPH] = self.captured(run)
                    runs[name + GRAPH]()
                    self.synchronize()
            except Exception as error:  # a peer's, of any kind
                found.failed[name] = one_line(error)
        timed = self.cold if cold else self.in_a_row
        calls = {name: round(min(max(self.turn_ms / self._estimate(run), 1), MOST_CALLS)) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                run()
                times[name] += timed(run, calls[name])
        found.timings = {name: Timing.of(ms, self.rounds * calls[name]) for name, ms in times.items()}
        return found

    def _events(self) -> tuple:
        if self.on_gpu:
            return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        return HostEvent(), HostEvent()

    def _estimate(self, run: Run) -> float:
        return max(self.in_a_row(run, 1)[0], 1e-3)


@dataclass
class Comparison:
    """Times by contestant, and the errors of those that have none."""

    timings: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def only(self, keep: Callable[[str], bool]) -> Comparison:
        """The contestants whose names `keep` takes."""
        timings, failed = ({n: x for n, x in of.items() if keep(n)} for of in (self.timings, self.failed))
        return Comparison(timings, failed)

    def ratio(self, slow: str, fast: str) -> tuple[float, float] | None:
        """Median of `slow` over that of `fast`, and the spread that follows from theirs; None where one failed."""
        if slow not in self.timings or fast not in self.timings:
            return None
        return self.timings[slow].over(self.timings[fast])


def one_line(error: BaseException) -> str:
    """What a table has room for: kind, text and place of the first error of a chain. The later ones hide it, as the end
    of a failed capture does."""
    while error.__context__ is not None:
        error = error.__context__
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
