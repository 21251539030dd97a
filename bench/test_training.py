"""What training pays beside its network: images decoded by workers and by the training process itself, LSQ, and the
steps and averages of the methods.

Rates are of alternating rounds; those of workers with processes of their own in each.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from targets import LSQ_ON_CPU, UPDATED, UPDATES

from qdeploy.terminal import columns
from qdeploy.timing import spread

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install 'qdeploy[train]'")

from qdeploy.kernels.lsq import fake_quantize  # noqa: E402
from qdeploy.training.domains import Benchmark, load_benchmark  # noqa: E402
from qdeploy.training.images import Draw, load_image  # noqa: E402
from qdeploy.training.loader import Keys, load  # noqa: E402
from qdeploy.training.methods.averages import SMA, Average, NoAverage  # noqa: E402
from qdeploy.training.methods.steps import GAQAT, SAGM, SAM, Plain, Step  # noqa: E402
from qdeploy.training.models import MODELS  # noqa: E402
from qdeploy.training.quantize import quantize_  # noqa: E402

FILES, SIZE, BATCH = 64, 224, 32
BATCHES = 24  # of a round; a multiple of the workers


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A tree of JPEGs of 500 x 375, as VLCS and Caltech have them: smooth areas, edges and some noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for domain in ("art", "photo"):
        (root / domain / "class").mkdir(parents=True)
        for i in range(FILES):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            pixels = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / domain / "class" / f"{i}.jpg", quality=90)
    return root


def images_per_second(benchmark: Benchmark, workers: int, batches: int) -> float:
    """Of all but the first batch of each worker, so that starting them is not counted. Nothing is being decoded when
    the last one is there. A process that decodes itself makes floats of the bytes as well: one thread did both."""
    positions, places = np.arange(BATCH), np.arange(BATCH)
    order = [[Keys(0, positions, update, places)] for update in range(batches)]
    with closing(load(benchmark, order, 0, workers)) as loaded:
        first = max(workers, 1)
        for _ in islice(loaded, first):
            pass
        began = time.perf_counter()
        for [(pixels, _)] in loaded:
            if not workers:
                benchmark.inputs.for_network(pixels)
        return (batches - first) * BATCH / (time.perf_counter() - began)


def test_loader(benchmark, results, images, rounds, progress):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("2 workers on fewer CPUs")
    torch.set_num_threads(1)
    data = load_benchmark(str(images), None, SIZE)
    batches = 4 if benchmark.disabled else BATCHES
    found: dict[int, list[float]] = {workers: [] for workers in (0, 1, 2)}
    for turn in range(1 + rounds(9)):  # the first brings the files into memory and starts what workers are forked from
        progress(f"round {turn}")
        for workers in found:
            found[workers].append(images_per_second(data, workers, batches))
    rates = {workers: np.array(of_rounds[1:]) for workers, of_rounds in found.items()}
    for workers in (1, 2):
        ratios = rates[workers] / rates[workers - 1]
        results.figure(f"training/loader/{workers}", float(np.median(ratios)), spread(ratios))
    rows = []
    for workers, of_rounds in rates.items():
        rate = {"images_per_second": float(np.median(of_rounds)), "spread": spread(of_rounds)}
        rows.append({"workers": workers, **rate})
    title = "Training images of 224 x 224 from JPEGs of 500 x 375"
    results.reports[title], results.tables[title] = {"results": rows}, columns(rows)
    benchmark.pedantic(images_per_second, args=(data, 0, 2), rounds=1)


def test_image(benchmark, results, images, rounds, progress):
    """Decoded, cropped, resized, flipped and recolored: the CPU time of each, whoever else uses the machine."""
    ms = []
    for turn in range(1 + rounds(9)):
        progress(f"round {turn}")
        began = time.process_time()
        for i in range(FILES):
            load_image(images, f"photo/class/{i}.jpg", SIZE, Draw(0, turn, 1, i))
        ms.append((time.process_time() - began) / FILES * 1e3)
    results.figure("training/image", float(np.median(ms[1:])), spread(ms[1:]))
    title = "A training image of 224 x 224 from a JPEG of 500 x 375, CPU time"
    rows = [{"median_ms": float(np.median(ms[1:])), "min_ms": min(ms[1:]), "spread_ms": spread(ms[1:])}]
    results.reports[title], results.tables[title] = {"results": rows}, columns(rows)
    benchmark.pedantic(load_image, args=(images, "photo/class/0.jpg", SIZE, Draw(0, 0, 1, 0)), rounds=10)


def composed(value: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """LSQ at 7 bits along axis 0 as plain tensors: straight-through differences, as its authors write it."""
    scaled = (step * 0.01 + (step - step * 0.01).detach()).reshape(-1, 1, 1, 1)
    x = (value / scaled).clamp(-64, 63)
    return (x + (x.round() - x).detach()) * scaled


@pytest.mark.parametrize("shape", LSQ_ON_CPU)
def test_lsq_on_a_cpu(benchmark, results, rounds, shape):
    torch.set_num_threads(1)
    value = torch.randn(shape, requires_grad=True)
    step = torch.full((shape[0],), 0.1, requires_grad=True)
    grad = torch.randn(shape)
    ways = {"qdeploy": lambda v, s: fake_quantize(v, s, -64, 63, 0, 0.01), "autograd": composed}

    def both_ways(way: str, calls: int) -> float:
        """Milliseconds of one forward and backward pass."""
        began = time.perf_counter()
        for _ in range(calls):
            torch.autograd.grad(ways[way](value, step), (value, step), grad)
        return (time.perf_counter() - began) / calls * 1e3

    calls = max(2, 100_000 // value.numel())
    ms: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + rounds(30)):
        for way in ways:
            ms[way].append(both_ways(way, calls))
    ratios = np.array(ms["autograd"][1:]) / np.array(ms["qdeploy"][1:])
    results.figure(f"training/lsq/{shape}", float(np.median(ratios)), spread(ratios))
    benchmark.pedantic(both_ways, args=("qdeploy", calls), rounds=10)


class Updates:
    """Updates of a network of its own on one minibatch: images that are no use, but as many as a run has."""

    def __init__(
        self, net: str, size: int, step: Callable[[torch.nn.Module], Step], average: Average, quantized: bool = False
    ):
        torch.manual_seed(0)
        shape = (size, 1, 16, 16) if net == "nin" else (size, 3, 64, 64)
        self.images, self.classes = torch.rand(shape), torch.randint(7, shape[:1])
        options = {"depth": 2, "width": 2} if net == "nin" else {}
        self.net = MODELS[net](7, shape[1], **options).train()
        if quantized:
            quantize_(self.net, 4, 4, per_channel=False, calibration=[self.images])
        self.step, self.average, self.made = step(self.net), average, 0
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-5)

    def milliseconds(self, count: int) -> float:
        """CPU time of one, whoever else uses the machine."""
        began = time.process_time()
        for _ in range(count):
            self.step.gradients(lambda: torch.nn.functional.cross_entropy(self.net(self.images), self.classes))
            self.optimizer.step()
            self.average.update(self.net, self.made)
            self.made += 1
        return (time.process_time() - began) / count * 1e3


def keep_freed_memory() -> None:
    """Whether glibc hands the top of its heap back depends on how blocks happen to lie there: from one way of updating
    to another 0 to 3,300 page faults an update, up to 8% of GAQAT's with NiN on a Xeon, which would be what is shown.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that there is
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@pytest.mark.parametrize("net", UPDATED)
def test_updates(benchmark, results, rounds, progress, net):
    keep_freed_memory()
    torch.set_num_threads(1)
    size = 4 if benchmark.disabled else 128 if net == "nin" else 16
    ways = {
        "plain": Updates(net, size, Plain, NoAverage()),
        "lsq": Updates(net, size, Plain, NoAverage(), quantized=True),
        "sam": Updates(net, size, SAM, NoAverage()),
        "sagm": Updates(net, size, SAGM, NoAverage()),
        "gaqat": Updates(net, size, lambda own: GAQAT(own, r=0.3, K=5), NoAverage(), quantized=True),
        "sma": Updates(net, size, Plain, SMA(1)),
    }
    count = 5 if net == "nin" and not benchmark.disabled else 1
    ms: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(1 + rounds(30 if net == "nin" else 8)):
        progress(f"round {turn}")
        names = [*ways]
        for way in names[turn % len(names) :] + names[: turn % len(names)]:  # none always follows the same one
            ms[way].append(ways[way].milliseconds(count))
    for way in UPDATES:
        ratios = np.array(ms[way][1:]) / np.array(ms["lsq" if way == "gaqat" else "plain"][1:])
        results.figure(f"training/update/{net}/{way}", float(np.median(ratios)), spread(ratios))
    rows = [{"update": way, "median_ms": float(np.median(of_rounds[1:]))} for way, of_rounds in ms.items()]
    title = f"Updates of {UPDATED[net]}, CPU time on one thread"
    results.reports[title], results.tables[title] = {"results": rows}, columns(rows)
    benchmark.pedantic(ways["plain"].milliseconds, args=(1,), rounds=3)
