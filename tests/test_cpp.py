"""The C++ library, built without Python and installed as its users get it: the bits, plans and errors of Python.

`.ci/run cpp` runs these tests once more with CMAKE_ARGS=-DQDEPLOY_SANITIZE=ON, for an ASan + UBSan build.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cmake
import ninja
import nlohmann_json
import numpy as np
import pytest
from builder import Builder, batch, small_ensemble, small_network, text_batch

import qdeploy
from qdeploy import _engine, cli
from qdeploy.demo import DATA, MODEL
from qdeploy.format import load, save
from qdeploy.graph import Graph

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cpp"  # kept, so that a second build is incremental
FILES = [*sorted((ROOT / "tests/data").glob("v*/*.safetensors")), MODEL]
VERSION = qdeploy.__version__
CMAKE = Path(cmake.CMAKE_BIN_DIR) / "cmake"
GENERATOR = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}")


def run(*command: object, status: int = 0, **options: object) -> subprocess.CompletedProcess:
    result = subprocess.run([str(part) for part in command], capture_output=True, timeout=600, **options)
    assert result.returncode == status, result.stdout.decode() + result.stderr.decode()
    return result


@dataclass
class Installation:
    prefix: Path
    programs: Path  # call_model, linked with the static library, and the code of docs/cpp.md with the shared one
    classify: Path

    def call_model(self, *arguments: object, **options: object) -> bytes:
        return run(self.programs / "call_model", *arguments, **options).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("installed")
    prefix, source, programs = (folder / name for name in ("prefix", "source", "programs"))
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_COMPILE_WARNING_AS_ERROR": "ON",
        "CMAKE_DISABLE_FIND_PACKAGE_Python": "ON",
        "CMAKE_DISABLE_FIND_PACKAGE_pybind11": "ON",
        "NLOHMANN_JSON_INCLUDE": Path(nlohmann_json.__file__).parent / "include",
        "QDEPLOY_SANITIZE": "OFF",
    }
    arguments = [f"-D{name}={value}" for name, value in options.items()] + shlex.split(os.environ.get("CMAKE_ARGS", ""))
    run(CMAKE, "-S", ROOT, "-B", BUILD, *GENERATOR, *arguments)
    run(CMAKE, "--build", BUILD)
    run(CMAKE, "--install", BUILD, "--prefix", prefix)
    source.mkdir()
    page = (ROOT / "docs/cpp.md").read_text()
    (source / "documented.cc").write_text(re.search(r"```cpp\n(.*?)```", page, re.DOTALL)[1])
    found, _ = re.search(r"```cmake\n(.*)\n(.*)\n```", page).groups()
    (source / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.24)\nproject(programs LANGUAGES CXX)\n{found}\n"
        f"add_executable(call_model {ROOT}/tests/cpp/call_model.cc)\n"
        "target_link_libraries(call_model PRIVATE qdeploy::qdeploy_static)\n"
        "add_executable(documented documented.cc)\ntarget_link_libraries(documented PRIVATE qdeploy::qdeploy)\n"
    )
    warnings = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    for tree, built in ((source, programs), (ROOT / "examples", folder / "examples")):
        run(CMAKE, "-S", tree, "-B", built, *GENERATOR, f"-DCMAKE_PREFIX_PATH={prefix}", warnings)
        run(CMAKE, "--build", built)
    return Installation(prefix, programs, folder / "examples" / "classify")


# ---- Bits -----------------------------------------------------------------------------------------------------------


def real(model: qdeploy.Model, output: np.ndarray) -> np.ndarray:
    """What an output stands for, in float32; rows that a text does not have are 0 in both."""
    entry = model.outputs[0]
    if entry["dtype"] == "f32":
        return output
    return np.float32(entry["scale"]) * (output.astype(np.int32) - entry["zero_point"]).astype(np.float32)


def check_images(installed: Installation, path: Path, x: np.ndarray) -> None:
    model = qdeploy.load_int_model(path)
    kind = "u8" if x.dtype == np.uint8 else "f32"
    expected = real(model, model(x)).tobytes()
    if len(model.outputs[0]["shape"]) == 1:
        expected += model.predict(x).tobytes()
    for threads in (1, 2):
        got = installed.call_model("run", path, kind, len(x), threads, input=x.tobytes())
        assert got == expected, (path, kind, threads)


def check_texts(installed: Installation, path: Path, ids: np.ndarray, mask: np.ndarray | None) -> None:
    model = qdeploy.load_int_model(path)
    output = real(model, model(ids, mask))
    lengths = [] if mask is None else mask.sum(axis=1).tolist()
    if output.ndim == 3 and lengths:  # a code 0 in a row that is not there stands for nothing
        for text, length in zip(output, lengths, strict=True):
            text[length:] = 0
    expected = output.tobytes()
    if output.ndim == 2:
        expected += model.predict(ids, mask).tobytes()
    arguments = ("run", path, "ids", len(ids), 2, ids.shape[1], *lengths)
    assert installed.call_model(*arguments, input=ids.astype(np.int64).tobytes()) == expected, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_bits_of_python(installed, path):
    graph, rng = load(path), np.random.default_rng(0)
    if graph.vocabulary is not None:
        ids, mask = text_batch(graph, 5, rng)
        check_texts(installed, path, ids, mask)
        return check_texts(installed, path, np.maximum(ids, 0), None)
    check_images(installed, path, batch(graph, 3, rng))
    if graph.preprocess:
        check_images(installed, path, batch(graph, 3, rng, np.uint8))


@pytest.mark.parametrize("dtype", ["u8", "s16", "f32"])
def test_a_network_that_ends_in_codes_gives_numbers(installed, tmp_path, dtype):
    net = Builder(np.random.default_rng(3), (3, 6, 5), (0.02, 110))
    net.conv2d(0, 7, (3, 3), dtype=dtype)
    graph, path = Graph([net.member()]), tmp_path / "net.safetensors"
    save(graph, path)
    check_images(installed, path, batch(graph, 3, np.random.default_rng(0)))


def network_of_texts(dtype: str, variable: bool) -> Graph:
    net = Builder(np.random.default_rng(5), (9,), None)
    net.linear(net.norm(net.position(net.embedding(11, 12), exact=True)), 7, dtype=dtype)
    return Graph([net.member()], vocabulary=11, variable=variable)


@pytest.mark.parametrize("dtype", ["u8", "s16", "f32"])
def test_tokens_of_texts_of_one_length(installed, tmp_path, dtype):
    graph, path = network_of_texts(dtype, variable=False), tmp_path / "net.safetensors"
    save(graph, path)
    check_texts(installed, path, *text_batch(graph, 5, np.random.default_rng(0)))


@pytest.mark.parametrize("dtype", ["u8", "s16", "f32"])
def test_tokens_of_texts_of_any_length(installed, tmp_path, dtype):
    graph, path = network_of_texts(dtype, variable=True), tmp_path / "net.safetensors"
    rng = np.random.default_rng(0)
    save(graph, path)
    ids, mask = text_batch(graph, 5, rng)
    check_texts(installed, path, ids, mask)
    check_texts(installed, path, np.maximum(ids[:, :4], 0), np.arange(4) < rng.integers(1, 5, 5)[:, None])


# ---- Plans and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_plan_of_the_command_line(installed, path, capsys, monkeypatch):
    monkeypatch.setattr(_engine, "Session", _engine.Session.func)  # threads as users have them: see conftest.py
    for images in (1, 3000):
        cli.main(["plan", str(path), "--batch", str(images), "--threads", "2"])
        assert installed.call_model("plan", path, images, 2).decode() == capsys.readouterr().out


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes of the header changed, or the end cut off."""
    if rng.random() < 0.2:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(header)] = rng.choice(b'0129-eE,:"{}[]\\ \x00\x7f\xff')
    return bytes(changed)


def python_says(source: Path | bytes) -> str:
    try:
        qdeploy.load_int_model(source, 1, "scalar")
    except qdeploy.ModelError as error:
        return str(error)
    return "ok"


def test_the_errors_of_python(installed, tmp_path):
    rng, paths = random.Random(4), [tmp_path, tmp_path / "none"]
    for name, graph in (("network", small_network()), ("ensemble", small_ensemble())):
        save(graph, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for i in range(60):
            paths.append(tmp_path / f"{name}{i}")
            paths[-1].write_bytes(damaged(content, rng))
    assert lines(installed.call_model("open", *paths)) == [python_says(path) for path in paths]
    contents = [path.read_bytes() for path in paths[2:]]
    assert lines(installed.call_model("bytes", *paths[2:])) == [python_says(content) for content in contents]


def lines(said: bytes) -> list[str]:
    return os.fsdecode(said).splitlines()


def test_what_does_not_fit_is_one_line(installed):
    memory, isas = _engine.memory_limit(), ", ".join(_engine.isas())
    f32 = "expected float32 [N, 1, 16, 16] or uint8 [N, 16, 16, 1]"
    assert installed.call_model("misuse", MODEL).decode().splitlines() == [
        "ok",
        "expected at least 0, got -1 - at n",
        f"expected a batch that fits the {memory} bytes of memory, got {2**63 - 1} images, which need 296 bytes each"
        " - at the input",
        "expected room for the results, got a null pointer - at the output",
        "expected images, got a null pointer - at the input",
        "ok",
        "expected finite numbers, got NaN or infinity - at the input, images 0 to 0",
        f"{f32}, got int64 [1, 1] - at the input",
        f"{f32}, got int64 [1, 2] - at the input",
        f"{f32}, got int64 [1, 1] - at the input",
        "expected 0 tokens, got 2 - at width",
        "expected at least 1 image, got 0 - at batch",
        f"expected at most {(2**63 - 1) // macs_of(MODEL)}, got {2**63 - 1} - at batch",
        "ok",
        "expected 1 to 256 threads, got 257 - at num_threads",
        f'expected an instruction set that this CPU has ({isas}), got "abacus" - at isa',
        "expected a path, got an empty one - at path",
        "expected a path, got one with a byte 0 - at path",
        "expected the content of a file, got a null pointer - at <bytes>",
    ]


def macs_of(path: Path) -> int:
    return sum(node["macs"] for node in qdeploy.load_int_model(path).plan())


def test_what_does_not_fit_a_network_of_texts(installed):
    said = installed.call_model("misuse", ROOT / "tests/data/v3/text.safetensors").decode().splitlines()
    sizes = "int64 [N, T] with T from 1 to 21"
    assert said[5:11] == [
        f"expected {sizes}, got uint8 - at the input",
        f"expected {sizes}, got float32 - at the input",
        "expected token ids from 0 to 49, got 50 - at the input",
        f"expected {sizes}, got int64 [1, 22] - at the input",
        "expected 1 to 21 tokens, got 22 - at text 0 of the lengths",
        "expected 1 to 21 tokens, got 22 - at width",
    ]


def test_a_class_needs_two_scores(installed, tmp_path):
    net = Builder(np.random.default_rng(3), (5,), (0.02, 110))
    net.linear(0, 1, dtype="f32")
    save(Graph([net.member()]), tmp_path / "net")
    model = qdeploy.load_int_model(tmp_path / "net")
    with pytest.raises(qdeploy.InputError) as error:
        model.predict(np.zeros((1, 5), np.float32))
    said = installed.call_model("run", tmp_path / "net", "f32", 1, 1, input=bytes(20), status=2)
    assert said[4:].decode() == f"{error.value}\n"


# ---- The installation -----------------------------------------------------------------------------------------------


def shared_library(installed: Installation) -> Path:
    (path,) = installed.prefix.glob(f"lib*/**/libqdeploy.so.{VERSION}")
    return path


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} (binutils) is not installed")


def test_only_the_interface_is_exported(installed):
    exported = run(tool("nm"), "-DC", "--defined-only", shared_library(installed)).stdout.decode()
    of_error = {f"{kind} for qdeploy::Error" for kind in ("typeinfo", "typeinfo name", "vtable")}
    names = {line.split(maxsplit=2)[2] for line in exported.splitlines()}
    assert {name for name in names if not name.startswith("qdeploy::Model::")} == of_error
    assert any(name.startswith("qdeploy::Model::predict(") for name in names)


def test_the_version_is_in_the_name(installed):
    dynamic = run(tool("readelf"), "-d", shared_library(installed)).stdout.decode()
    assert f"Library soname: [libqdeploy.so.{VERSION.rpartition('.')[0]}]" in dynamic
    assert "python" not in dynamic


def test_the_header_needs_the_standard_library_alone(installed):
    header = (installed.prefix / "include/qdeploy.h").read_text()
    assert all(re.fullmatch(r"<[a-z]+>", name) for name in re.findall(r"#include (.*)", header))


def test_the_code_of_the_page(installed):
    said = run(installed.programs / "documented", MODEL).stdout.decode()
    model = qdeploy.load_int_model(MODEL)
    classes = model.predict(np.zeros((8, *model.inputs[0]["shape"]), np.float32))
    assert said.startswith("".join(f"class {i}\n" for i in classes) + f"{model.isa}, ")
    assert run(installed.programs / "documented", "none", status=2).stderr == (
        b"expected a readable file, got No such file or directory - at none\n"
    )


def test_the_example_shows_the_best_classes(installed, tmp_path):
    with np.load(DATA / "digits.npz") as archive:
        image = archive["images"][:1]
    (tmp_path / "digit.raw").write_bytes(image.tobytes())
    model = qdeploy.load_int_model(MODEL)
    (scores,) = model(image)
    best = np.argsort(-scores, kind="stable")[:5]
    shown = "".join(f"{scores[i]:9.4f}  {model.classes[i] if model.classes else f'class {i}'}\n" for i in best)
    assert run(installed.classify, MODEL, tmp_path / "digit.raw").stdout.decode() == shown
    failed = run(installed.classify, MODEL, MODEL, status=2).stderr.decode()
    assert failed == f"expected 256 bytes of pixels, got {MODEL.stat().st_size} - at {MODEL}\n"
