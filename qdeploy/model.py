"""A loaded model: `qdeploy.load_int_model(path)` and what it returns. Needs numpy and the C++ engine only."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import numpy as np

from . import _engine, format
from .arguments import integer, path_text
from .errors import InputError, ModelError
from .files import AnyPath
from .terminal import printable
from .texts import TextInput

if TYPE_CHECKING:
    from .gpu import GpuModel

MAX_THREADS = 256
MAX_MACS = 2**63 - 1  # of a call: the engine counts them in 64 bits
MAX_ROUNDS = 1_000_000  # of a measurement: all their times are kept
_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "u8": np.dtype(np.uint8),
    "s16": np.dtype(np.int16),
    "i32": np.dtype(np.int32),
}


class _Readable(Protocol):
    def read(self) -> bytes: ...


Source = AnyPath | bytearray | memoryview | _Readable


@overload
def load_int_model(  # type: ignore[overload-overlap]  # a `str` is for a GPU, though at run time it may be "cpu"
    path: Source, num_threads: int | None = None, isa: str | None = None, device: Literal["cpu"] = "cpu"
) -> Model: ...
@overload
def load_int_model(path: Source, num_threads: None = None, isa: None = None, *, device: str) -> GpuModel: ...
def load_int_model(
    path: Source, num_threads: int | None = None, isa: str | None = None, device: str = "cpu"
) -> Model | GpuModel:
    """Load a model file; an ensemble loads the same way.

    path: a file written by `qdeploy.export` (docs/format.md), or its content: a bytearray, a memoryview, or a binary
        file object, which is read from where it stands to its end. `bytes` are content where they hold a byte 0 (a
        model file has one among its first 8), which no path can, and else a path. The file is data: nothing in it is
        executed or followed, and it is not needed any more once this returns. A path *.onnx is that of an ONNX file,
        quantized throughout, which is converted in memory; that needs the package onnx.
    num_threads: 1 to 256; None takes the cores that this process may use (affinity, cgroup quota, physical cores).
        A call uses fewer where it has less than 4 million multiply-accumulates for each, or where calls side by side
        already keep the cores busy. The bits never depend on it.
    isa: one of the instruction sets that `qdeploy doctor` lists; None takes QDEPLOY_ISA or the best. All give the same
        bits.
    device: "cpu", or "cuda" or "cuda:N" for a `qdeploy.gpu.GpuModel`, which takes and returns torch tensors, needs
        PyTorch and Triton, and gives the same bits.
    Raises ModelError for a file that cannot be run, ExportError for an ONNX file that cannot be converted, InputError
    for the other three and for what is no path.
    """
    name, content = _source(path)
    if str(device) != "cpu":
        return _load_on_gpu(name, content, device, num_threads, isa)
    return _load(name, content, num_threads, isa)


def _source(path: Source) -> tuple[str, bytes | None]:
    """The path; or what stands for it in errors, and the content."""
    if isinstance(path, (str, os.PathLike)) or isinstance(path, bytes) and b"\0" not in path:
        text = path_text(path)
        return text, format.read(text) if format.is_onnx(text) else None
    if isinstance(path, (bytes, bytearray, memoryview)):
        return f"<{type(path).__name__}>", bytes(path)
    file: Any = path
    if not hasattr(file, "read") or isinstance(file, io.TextIOBase):
        expected = "a path, the content of a model file or a file opened in binary mode"
        raise InputError(f"expected {expected}, got {type(path).__name__} - at path")
    name = getattr(file, "name", None)
    text = os.fsdecode(name) if isinstance(name, (str, bytes)) else f"<{type(path).__name__}>"
    try:
        content = file.read()
    except (OSError, ValueError) as error:  # ValueError: a closed file
        raise ModelError(f"expected a readable file, got {getattr(error, 'strerror', error)} - at {text}") from error
    if not isinstance(content, bytes):
        raise InputError(f"expected a file that gives bytes, got {type(content).__name__} - at {text}")
    return text, content


def _load_on_gpu(name: str, content: bytes | None, device: str, num_threads: int | None, isa: str | None) -> GpuModel:
    if num_threads is not None or isa is not None:
        raise InputError(f"expected num_threads and isa with device 'cpu' only, got {device!r} - at load_int_model")
    try:
        from . import gpu
    except ModuleNotFoundError as error:
        needed = "PyTorch and Triton for a model on a GPU (pip install 'qdeploy[train]')"
        raise InputError(f"expected {needed}, got no module {error.name!r} - at device") from None
    return gpu.load(name, device, content)


def _load(name: str, content: bytes | None, num_threads: int | None, isa: str | None) -> Model:
    path, options = os.fsencode(name), (_threads(num_threads), _isa(isa))
    session = _engine.Session(path, *options) if content is None else _engine.Session(path, content, *options)
    kind = TextModel if session.vocabulary else Model
    return kind(session, Path(name), num_threads, isa, content)


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return 0
    try:
        return integer(num_threads, 1, MAX_THREADS, "num_threads")
    except InputError:
        expected = f"1 to {MAX_THREADS} threads"
        raise InputError(f"expected {expected}, got {num_threads!r} - at num_threads") from None


def _isa(isa: str | None) -> str:
    if isa is not None and not (isinstance(isa, str) and isa.isascii() and isa.isprintable()):
        raise InputError(f"expected the name of an instruction set, got {isa!r} - at isa")
    return isa or ""


def check_has_classes(shape: Sequence[int]) -> None:
    """Raise InputError unless an output of this shape, without the batch, has scores to choose a class by."""
    if len(shape) != 1:
        raise InputError(f"expected a model with one score per class, got output {list(shape)} - at predict")
    if shape[0] < 2:
        raise InputError("expected a model with two or more scores, got one (its sign says the class) - at predict")


class Model:
    """An int8 network or ensemble. Immutable: any number of threads may call it. Pickles with its file's content."""

    def __init__(
        self,
        session: _engine.Session,
        path: Path,
        num_threads: int | None,
        isa: str | None,
        content: bytes | None = None,
    ):
        self._session = session
        self._path = path
        self._options = (num_threads, isa)
        self._content = content  # where there may be no file: it was given, or is that of another machine
        self._stamp = None if content is not None else _stamp(path)
        self._activations = session.activations
        self._varies = [entry.pop("varies") for entry in self._activations]  # rows with the length of a text
        self._output = session.outputs[0]
        self._steps = session.plan(1)
        shape = self._activations[session.input]["shape"]
        self._accepted: dict[np.dtype[Any], tuple[int, ...]] = {np.dtype(np.float32): shape}
        self._macs = sum(step["macs"] for step in self._steps)
        self._is_ensemble = len(session.members) > 1
        self._memory = _engine.memory_limit()
        self._result_bytes = [int(np.prod(a["shape"])) * _DTYPES[a["dtype"]].itemsize for a in self._activations]
        if session.preprocess:
            self._accepted[np.dtype(np.uint8)] = (shape[1], shape[2], shape[0])

    # ---- Description ----------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> list[dict]:
        """One entry: `shape` (without the batch), `layouts` accepted, and `scale`, `zero_point` of the codes inside."""
        entry = self._activations[self._session.input]
        layouts = [{1: "f32 [N, F]", 2: "f32 [N, T, D]", 3: "f32 NCHW"}[len(entry["shape"])]]
        return [{**entry, "layouts": layouts + (["u8 NHWC"] if self._session.preprocess else [])}]

    @property
    def outputs(self) -> list[dict]:
        """One entry: `shape` (without the batch), `dtype` and, for codes, `scale` and `zero_point`."""
        return [dict(self._activations[self._output])]  # a copy: the sizes of results follow from ours

    @property
    def members(self) -> list[str]:
        """Names of the networks in the file; more than one for an ensemble."""
        return self._session.members

    @property
    def classes(self) -> list[str]:
        """Names of the classes, where the file has them, else empty."""
        return self._session.classes

    @property
    def weight_bits(self) -> dict[str, int]:
        """Bits of the weight codes in the file, by node (of an ensemble: "member/node")."""
        return {self._tap_name(step): step["bits"] for step in self._steps if step["bits"]}

    @property
    def nbytes(self) -> int:
        """Size of the model file in bytes."""
        return self._session.nbytes

    @property
    def isa(self) -> str:
        return self._session.isa

    @property
    def num_threads(self) -> int:
        return self._session.threads

    def __repr__(self) -> str:
        networks = f"{len(self.members)} member(s), input {self.inputs[0]['shape']}"
        return f"<qdeploy.Model {printable(self._path.name)}: {networks}, {self.isa}, {self.num_threads} thread(s)>"

    # ---- Running --------------------------------------------------------------------------------------------------

    @overload
    def __call__(self, images: np.ndarray) -> np.ndarray: ...
    @overload
    def __call__(self, images: np.ndarray, taps: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]: ...
    def __call__(
        self, images: np.ndarray, taps: Sequence[str] = ()
    ) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
        """Run a batch of any size.

        images: float32 [N, C, H, W] (or [N, T, D] or [N, F]), or, where the file has `preprocess`, uint8 [N, H, W, C].
        taps: names of nodes (of an ensemble "member/node") whose outputs are wanted as well.
        Returns the logits, float32 [N, K]; for an ensemble the probabilities; a network that ends in a feature map or
        tokens or in codes gives that ([N, C, H, W] or [N, T, D], float32, uint8 or int16). With taps also a dict from
        name to codes or float32.
        Raises InputError for any other dtype or shape, NaN or infinity, or an unknown tap.
        """
        return self._call(self._checked(images), None, taps)

    def _call(
        self, inputs: np.ndarray, lengths: np.ndarray | None, taps: Sequence[str]
    ) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
        if not isinstance(taps, str) and not len(taps):
            return self._run(inputs, lengths)[0]
        ids = self._tap_ids(taps)
        output, tapped = self._run(inputs, lengths, taps=ids.values())
        return output, {name: array for name, (_, array) in zip(ids, tapped, strict=True)}

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The class of each image, int64 [N]: the first largest logit, for an ensemble by its rule."""
        check_has_classes(self.outputs[0]["shape"])
        return self._predict(self._checked(images), None)

    def _predict(self, inputs: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
        classes = np.empty(len(inputs), np.int64)
        self._run(inputs, lengths, classes=classes)
        return classes

    def plan(self, batch: int = 1) -> list[dict]:
        """What runs each node: kernel, tile, split over threads, shape of the output without the batch, bits of the
        weights, MACs for `batch` images, and a `note` where a convolution is not in the form that it would have."""
        total = max(1, self._macs)
        batch = integer(batch, 1, MAX_MACS // total, "batch")
        return [
            {
                **step,
                "shape": list(self._activations[step["output"]]["shape"]),
                "share_of_macs": step["macs"] / (batch * total),
            }
            for step in self._session.plan(batch)
        ]

    def profile(self, images: np.ndarray, rounds: int = 10) -> list[dict]:
        """The plan with `microseconds` per node: the median of `rounds` runs (1 to a million) of `images`, one or
        more."""
        return self._profile(self._checked(images), None, rounds)

    def _profile(self, inputs: np.ndarray, lengths: np.ndarray | None, rounds: int) -> list[dict]:
        plan = self.plan(integer(len(inputs), 1, MAX_MACS, "the number of images"))
        seconds = np.zeros((integer(rounds, 1, MAX_ROUNDS, "rounds"), len(self._steps)))
        for row in seconds:
            self._run(inputs, lengths, step_seconds=row)
        return [{**step, "microseconds": s * 1e6} for step, s in zip(plan, np.median(seconds, axis=0), strict=True)]

    def _run(
        self,
        inputs: np.ndarray,
        lengths: np.ndarray | None,
        taps: Collection[int] = (),
        classes: np.ndarray | None = None,
        step_seconds: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
        """Output of checked images, or texts of these lengths, and pairs of the activations `taps` and what they hold;
        fills the other two."""
        n = len(inputs)
        wanted = n * self._result_bytes[self._output]
        for activation in taps:
            wanted += n * self._result_bytes[activation]
        if wanted > self._memory:
            raise self._beyond_memory(n, wanted)
        output = self._empty(inputs, self._output)
        tapped = [(activation, self._empty(inputs, activation)) for activation in taps]
        if n:
            self._session.run(inputs, output, classes, tapped, step_seconds, lengths)
        return output, tapped

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if isinstance(images, np.ndarray) and images.ndim and self._accepted.get(images.dtype) == images.shape[1:]:
            if type(images) is np.ndarray and images.flags.c_contiguous:
                return images
            if np.ma.is_masked(images):
                raise InputError("expected images without masked elements, got some - at the input")
            if images.nbytes > self._memory:
                raise self._beyond_memory(len(images), images.nbytes)
            return np.ascontiguousarray(images)
        accepted = " or ".join(f"{dtype} [N, {', '.join(map(str, size))}]" for dtype, size in self._accepted.items())
        is_array = isinstance(images, np.ndarray)
        got = f"{images.dtype} {list(images.shape)}" if is_array else type(images).__name__
        raise InputError(f"expected {accepted}, got {got} - at the input")

    def _beyond_memory(self, n: int, wanted: int) -> InputError:
        fits = f"a batch that fits the {self._memory} bytes of memory"
        return InputError(f"expected {fits}, got {n} images, which need {wanted} bytes more - at the input")

    def _empty(self, inputs: np.ndarray, activation: int) -> np.ndarray:
        entry = self._activations[activation]
        return np.empty((len(inputs), *entry["shape"]), _DTYPES[entry["dtype"]])

    def _tap_name(self, step: dict) -> str:
        return f"{step['member']}/{step['name']}" if self._is_ensemble else step["name"]

    def _tap_ids(self, taps: Sequence[str]) -> dict[str, int]:
        if isinstance(taps, str):
            raise InputError(f"expected a list of names, got {taps!r} - at taps")
        ids = {self._tap_name(step): step["output"] for step in self._steps}
        for name in taps:
            if not isinstance(name, str) or name not in ids:
                got = repr(name) if isinstance(name, str) else type(name).__name__  # a mask, say, in one line
                raise InputError(f"expected the name of a node, as `qdeploy plan` lists them, got {got} - at taps")
        return {name: ids[name] for name in taps}

    # ---- Pickle ---------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Callable[..., Model], tuple[Any, ...]]:
        if self._content is None and _stamp(self._path) != self._stamp:
            raise ModelError(f"expected the file that was loaded, got another or none (load again) - at {self._path}")
        content = self._path.read_bytes() if self._content is None else self._content
        return _load, (str(self._path), content, *self._options)


class TextModel(Model):
    """A model file whose network reads token ids; what `load_int_model` returns for one."""

    def __init__(self, session: _engine.Session, *file_and_options: Any) -> None:
        super().__init__(session, *file_and_options)
        longest = self._activations[session.input]["shape"][0]
        self._text = TextInput(longest, session.vocabulary, session.variable)

    @property
    def inputs(self) -> list[dict]:
        """One entry: `shape` of the longest text, `dtype`, `layouts` accepted, `vocabulary` (ids are below it), and
        `variable`: whether texts may be shorter."""
        entry = self._activations[self._session.input]
        text = {"vocabulary": self._text.vocabulary, "variable": self._text.variable}
        return [{**entry, **text, "layouts": ["i32 [N, T]", "i64 [N, T]"]}]

    @overload  # type: ignore[override]  # a mask goes with ids
    def __call__(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...
    @overload
    def __call__(
        self, ids: np.ndarray, mask: np.ndarray | None = None, *, taps: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]: ...
    def __call__(
        self, ids: np.ndarray, mask: np.ndarray | None = None, taps: Sequence[str] = ()
    ) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
        """Run a batch of any size.

        ids: int32 or int64 [N, T]; of a network of texts of any length T is at most that of the file, else exactly.
        mask: where texts have any length: [N, T], in each row ones, at least one, and then zeros; None: all have T.
        taps: as of `Model`.
        Returns what `Model` does. Rows of a text at and beyond its length are 0. What stands in `ids` there, T and the
        other texts of a batch never change a bit.
        Raises InputError for any other dtype or shape, an id that the vocabulary does not have, a mask with holes, or
        an unknown tap.
        """
        return self._call(*self._text.checked(ids, mask), taps)

    def predict(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """The class of each text, int64 [N]. Arguments as of a call."""
        check_has_classes(self.outputs[0]["shape"])
        return self._predict(*self._text.checked(ids, mask))

    def profile(self, ids: np.ndarray, rounds: int = 10, mask: np.ndarray | None = None) -> list[dict]:
        """As of `Model`."""
        return self._profile(*self._text.checked(ids, mask), rounds)

    def _empty(self, inputs: np.ndarray, activation: int) -> np.ndarray:
        """Rows that a text does not have stay 0."""
        entry = self._activations[activation]
        if not self._varies[activation]:
            return super()._empty(inputs, activation)
        rows = entry["shape"][0] - self._text.longest + inputs.shape[1]
        return np.zeros((len(inputs), rows, *entry["shape"][1:]), _DTYPES[entry["dtype"]])


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells one content of a file from another without reading it."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns
