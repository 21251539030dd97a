"""Commands, model files and run folders as nobody should use them: one line on stderr and exit code 2, or all is well.

The commands run in this process, on streams made for them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch
from builder import Builder

import qdeploy
from qdeploy import _engine, cli, format, peers, terminal
from qdeploy.graph import Graph

ON_FILES: dict[str, list[str]] = {
    "info": [],
    "plan": [],
    "profile": ["--rounds", "1"],
    "bench": ["--rounds", "1", "--no-peers"],
    "verify": ["--batch", "1"],
}
NAME = "b\u202ec\u2028d é 中"  # a turn of direction, the end of a line, two letters that some encodings lack
EVIL = f"a\x9b2J{NAME}"  # with a terminal's command, which no file may hold


@pytest.fixture(autouse=True, scope="module")
def little_work():
    """Short measurements; one thread of torch, whose threads wait for each other where others use the machine, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PEAK_SECONDS", 0.001)
        yield
    torch.set_num_threads(before)


# ---- The harness -----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    code: int
    out: bytes
    err: str


def call(*args: object, out: TextIO | None = None, encoding: str = "utf-8", err: TextIO | None = None) -> Result:
    """`qdeploy ARGS` with what it wrote. `out`, `err`: streams instead of those that keep it."""
    kept_out = io.TextIOWrapper(io.BytesIO(), encoding)
    kept_err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with contextlib.redirect_stdout(out or kept_out), contextlib.redirect_stderr(err or kept_err):
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as stop:  # of argparse, and of a training that a signal stopped
            code = stop.code
    kept_out.flush()
    kept_err.flush()
    return Result(code, kept_out.buffer.getvalue(), kept_err.buffer.getvalue().decode())


def assert_refused(result: Result, *parts: str) -> None:
    assert result.code == 2, result
    assert result.out == b""
    assert result.err.startswith("qdeploy: error: ") and result.err.endswith("\n")
    assert len(result.err.splitlines()) == 1 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def table(rng: np.random.Generator) -> Graph:
    builder = Builder(rng, (4, 6, 6), (0.02, 100))
    builder.table(0)
    return Graph([builder.member()])


def network(rng: np.random.Generator, classes: list[str], members: int = 1) -> Graph:
    found = []
    for i in range(members):
        builder = Builder(rng, (3, 8, 8), (0.02, 100))
        x = builder.conv2d(0, 8, (3, 3), (2, 2), (1, 1, 1, 1), bits=4)
        x = builder.max_pool2d(x, (4, 4), (4, 4), (0, 0, 0, 0))
        builder.linear(builder.reshape(x, (8,)), len(classes), dtype="f32")
        found.append(builder.member(f"{NAME}{i}"))
    return Graph(found, "logits" if members > 1 else None, classes=classes)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Files by what is special about them."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("models")
    graphs = {
        "weightless": table(rng),
        "names": network(rng, [NAME, "b"]),
        "one logit": network(rng, ["only"]),
        "one logit of two": network(rng, ["only"], members=2),
    }
    for name, graph in graphs.items():
        format.save(graph, folder / name)
    return {name: folder / name for name in graphs}


# ---- Model files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ON_FILES)
@pytest.mark.parametrize("kind", ["weightless", "names", "one logit", "one logit of two"])
def test_unusual_models(models, command, kind):
    text = call(command, models[kind], *ON_FILES[command])
    assert (text.code, text.err) == (0, "")
    report = call(command, models[kind], *ON_FILES[command], "--json")
    assert (report.code, report.err) == (0, "")
    json.loads(report.out, parse_constant=pytest.fail)


def test_one_logit_is_one_score(models):
    x = np.zeros((3, 3, 8, 8), np.float32)
    assert qdeploy.load_int_model(models["one logit"])(x).shape == (3, 1)
    assert qdeploy.load_int_model(models["one logit of two"])(x).tolist() == [[1.0]] * 3


def bad_files(folder: Path, valid: bytes) -> dict[str, Path]:
    """Paths by what is wrong with them."""
    contents = {"empty": b"", "text": b"no model\n" * 9, "cut": valid[:-1], "zeros": bytes(1000)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with open(folder / "60 GB of holes", "wb") as file:
        file.truncate(60 * 2**30)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    others = ["missing", "file/in/nothing", "x" * 5000, "line\nbreak", EVIL, os.fsdecode(b"caf\xe9")]
    names = [*contents, "60 GB of holes", "pipe", "loop", *others]
    return {name: folder / name for name in names} | {"folder": folder, "device": Path("/dev/zero"), "nothing": Path()}


@pytest.mark.parametrize("command", ON_FILES)
def test_bad_files(models, tmp_path, command):
    for path in bad_files(tmp_path, models["names"].read_bytes()).values():
        assert_refused(call(command, path, *ON_FILES[command]))
    assert_refused(call(command, ""))


@pytest.mark.parametrize("command", ON_FILES)
def test_paths_that_are_no_utf8(models, tmp_path, command):
    path = tmp_path / os.fsdecode(b"caf\xe9 \x9b")
    shutil.copy(models["names"], path)
    for options in ([], ["--json"]):
        result = call(command, path, *ON_FILES[command], *options)
        assert (result.code, result.err) == (0, "")
        assert command not in ("info", "verify") or options or b"\x9b" not in result.out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("plan", "--batch"), "expected at least 1, got 0 - at --batch"),
        (("profile", "--batch"), "expected at least 1, got 0 - at --batch"),
        (("profile", "--rounds"), "expected at least 1, got 0 - at --rounds"),
        (("bench", "--batch"), "expected at least 1, got 0 - at --batch"),
        (("bench", "--rounds"), "expected at least 1, got 0 - at --rounds"),
        (("verify", "--batch"), "expected at least 1, got 0 - at --batch"),
        (("plan", "--threads"), "expected 1 to 256 threads, got 0 - at num_threads"),
    ],
    ids=" ".join,
)
def test_numbers(models, args, text):
    command, option = args
    assert_refused(call(command, models["names"], option, "0"), text)
    for value in ("-1", str(10**12), str(10**30), "9" * 5000, "1e400", "1.5", "nan", "", "\u0663x"):
        assert_refused(call(command, models["names"], option, value))


@pytest.mark.parametrize("command", ["profile", "bench", "verify"])
def test_a_batch_beyond_the_memory_says_how_much_it_wanted(models, command):
    size = 20 * 3 * 8 * 8 + 4 * 2
    result = call(command, models["names"], "--batch", 2**31 - 1)
    assert_refused(result, f"got 2147483647 images: {size * (2**31 - 1):,} bytes - at --batch")


def test_devices_are_refused_before_the_reference_runs(models, monkeypatch):
    monkeypatch.setattr("qdeploy.reference.run", pytest.fail)
    for device in ("abacus", "cuda:-1", "cuda:99999999999999999999", "cpu:0", "", "cu\nda"):
        assert_refused(call("verify", models["names"], "--device", device), " - at device")


# ---- Streams ---------------------------------------------------------------------------------------------------------


SUMMARY = {
    "config": {"test_domain": EVIL, "selection": "validation"},
    "members": [{"seed": 0, "update": 1, "validation": 0.5, "test": 0.25, "tests": {EVIL: 0.25}}],
    "file": {"path": EVIL, "bytes": 100, "test": 0.5, "agreement": 1.0},
}


@pytest.fixture
def every_command(models, monkeypatch) -> list[list[str]]:
    """The arguments of one call of each command; `train` and `export` have their reports at once, and so has `demo`."""
    from qdeploy import demo
    from qdeploy.training import command

    latencies = dict.fromkeys((1, 64), 1.0)
    report = {"about": EVIL, "images": 64, "examples": [], "isa": "scalar", "threads": 1, "latency_us": latencies}
    report |= {"accuracy": {"members": [0.5], "ensemble": 0.5}, "bytes": {"ensemble": 1, "float32_member": 4}}
    example = {"drawing": ["@@"], "class": 0, "probability": 1.0, "label": 0}
    report |= {"examples": [example], "sha256_of_probabilities": {"scalar": "0" * 64}, "equal": True}
    monkeypatch.setattr(demo, "run", lambda threads: report)
    monkeypatch.setattr(command, "main", lambda args: SUMMARY)
    calls = [[name, str(models["names"]), *options] for name, options in ON_FILES.items()]
    return [*calls, ["doctor"], ["demo"], ["train", "--out", "x"], ["--help"], ["train", "--help"], ["--version"]]


def full() -> TextIO:
    return open("/dev/full", "w")


def without_reader() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def read_only() -> TextIO:
    return open(os.open(os.devnull, os.O_RDONLY), "w")


def closed() -> TextIO:
    stream = open(os.devnull, "w")
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (full, "No space left on device - at standard output"),
        (read_only, "Bad file descriptor - at standard output"),
        (closed, "got a closed one - at standard output"),
        (without_reader, None),
    ],
    ids=["full", "read-only", "closed", "without reader"],
)
@pytest.mark.parametrize("json", [[], ["--json"]], ids=["text", "json"])
def test_standard_output(every_command, make, reason, json):
    for args in every_command:
        if json and args[-1].startswith("--"):
            continue
        with contextlib.closing(make()) as out:
            result = call(*args, *json, out=out)
        if reason is None:
            assert (result.code, result.err) == (0, ""), args
        else:
            assert_refused(result, reason)


@pytest.mark.parametrize("make", [full, read_only, closed, without_reader])
def test_standard_error(models, make):
    for args, code in ((["info", "missing"], 2), (["info", models["names"]], 0), (["fly"], 2)):
        with contextlib.closing(make()) as err:
            assert call(*args, err=err).code == code


def test_streams_that_were_closed_before_the_start(models):
    for streams, code in (("<&- >&-", 2), ("<&- 2>&-", 0), (">&- 2>&-", 2)):
        shell = f'"{sys.executable}" -m qdeploy.cli info "$0" {streams}'
        child = subprocess.run(["bash", "-c", shell, models["names"]], capture_output=True, text=True)
        assert child.returncode == code
        assert child.stderr == (
            ""
            if "2>" in streams
            else "qdeploy: error: expected a place for the report, got a closed one - at standard output\n"
        )
        assert bool(child.stdout) == (code == 0)


@pytest.mark.parametrize(
    "encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "gb18030", "utf-8", "utf-16"]
)
def test_every_command_on_a_terminal_of_any_encoding(every_command, encoding):
    for args in every_command:
        result = call(*args, encoding=encoding)
        assert (result.code, result.err) == (0, "")
        text = result.out.decode(encoding)
        assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"\xe9 \u4e2d"),
        ("latin-1", r"é \u4e2d"),
        ("shift_jis", r"\xe9 中"),
        ("utf-8", "é 中"),
        ("utf-16", "é 中"),
    ],
)
def test_escapes_stand_for_what_is_no_character_or_has_no_place(encoding, shown):
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding)):
        assert terminal.printable(EVIL) == rf"a\x9b2Jb\u202ec\u2028d {shown}"
        assert terminal.printable("\x1b[2J\r\n\t\0\udce9") == r"\x1b[2J\r\n\t\x00\udce9"
        assert terminal.columns([{"name": EVIL, "n": 1}, {"name": "b", "n": 2}]).count("\n") == 2


def test_names_of_a_file_do_not_command_the_terminal(models):
    text = call("info", models["names"]).out.decode()
    assert r"classes    b\u202ec\u2028d é 中, b" in text.splitlines()
    assert r"b\u202ec\u2028d é 中0: 0.00 MMAC, output [2]" in text.splitlines()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("has_rich", [True, False])
def test_progress_on_a_terminal_of_any_encoding(monkeypatch, encoding, has_rich):
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(err, "isatty", lambda: True, raising=False)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with terminal.progress(f"[red]{EVIL}", 2, keep=True) as advance:
            advance()
            advance(f"{EVIL}[/red]")
        terminal.status(EVIL)
    err.flush()
    shown = err.buffer.getvalue().decode(encoding)
    assert "\x9b" not in shown and "\u202e" not in shown
    assert r"a\x9b2Jb\u202ec" in shown.replace("\n", "")


def test_no_standard_error_leaves_standard_output_alone(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    terminal.note("nobody hears it")
    terminal.status("nor this")
    with terminal.progress("nor that", 3) as advance:
        advance()
    assert capsys.readouterr().out == ""


# ---- Ends of a command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ON_FILES)
def test_ctrl_c_is_one_line(models, monkeypatch, command):
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, command, stopped)
    stopped.__name__ = command
    result = call(command, models["names"])
    assert (result.code, result.out, result.err) == (130, b"", "qdeploy: stopped by Ctrl-C\n")


def test_ctrl_c_ends_the_child_of_bench(models, monkeypatch):
    children = []

    class Child(subprocess.Popen):
        def communicate(self, *args: object, **kw: object) -> tuple:
            children.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Child)
    pytest.importorskip("onnxruntime", reason="the `bench` extra is not installed")
    assert call("bench", models["names"], "--rounds", 1).code == 130
    assert children and all(child.poll() is not None for child in children)


def test_a_bug_is_no_failed_verification(models, monkeypatch):
    def bug(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(format, "parse", bug)
    result = call("info", models["names"])
    assert (result.code, result.out) == (70, b"")
    assert result.err.startswith("Traceback") and result.err.endswith("RuntimeError: a bug\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "expected memory for this, got: none"),
        (MemoryError("Unable to allocate 1 PiB"), "expected memory for this, got: Unable to allocate 1 PiB"),
        (
            RuntimeError("DefaultCPUAllocator:\ncan't allocate memory"),
            "got: DefaultCPUAllocator: can't allocate memory",
        ),
        (FileNotFoundError(2, "No usable folder"), "got: No usable folder\n"),
        (PermissionError(13, "Permission denied", b"/caf\xe9"), r"got: Permission denied - at /caf\udce9"),
    ],
    ids=["memory", "memory of numpy", "memory of torch", "no name", "bytes"],
)
def test_errors_of_the_machine(models, monkeypatch, error, text):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(format, "parse", fail)
    assert_refused(call("info", models["names"]), text)


# ---- Loading ---------------------------------------------------------------------------------------------------------


class Fspath:
    def __init__(self, path: str | bytes):
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


@pytest.fixture
def odd_path(models, tmp_path) -> Path:
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(models["names"], path)
    return path


SOURCES: dict[str, Callable[[Path], object]] = {
    "path": lambda path: path,
    "str": str,
    "bytes of a path": os.fsencode,
    "fspath": lambda path: Fspath(str(path)),
    "fspath of bytes": lambda path: Fspath(os.fsencode(path)),
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "file": lambda path: io.BytesIO(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
    "unbuffered file": lambda path: path.open("rb", buffering=0),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_of_a_model(odd_path, kind):
    import pickle

    source = SOURCES[kind](odd_path)
    model = qdeploy.load_int_model(source, num_threads=np.int64(1))
    if isinstance(source, io.IOBase):
        assert source.read() == b""  # once, to the end
        source.close()
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = qdeploy.load_int_model(odd_path)(x).tobytes()
    copied = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model))))
    for one in (model, copied):
        assert one(x).tobytes() == expected
        assert one.nbytes == odd_path.stat().st_size and one.num_threads == 1
        assert repr(one).isprintable()
        assert len(one.profile(x, rounds=np.int32(2))) == len(one.plan(np.uint8(3))) == 4


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, "expected a path, the content of a model file or a file opened in binary mode, got NoneType - at path"),
        (3, "got int - at path"),
        (["a"], "got list - at path"),
        (io.StringIO("text"), "got StringIO - at path"),
        ("", "expected a path, got an empty one - at path"),
        (b"", "expected a path, got an empty one - at path"),
        ("a\0b", "expected a path, got one with a byte 0 - at path"),
        (Path("a\0b"), "expected a path, got one with a byte 0 - at path"),
        (
            b"a\0b",
            "expected a whole safetensors file, got 3 bytes that do not hold its header - at the header in <bytes>",
        ),
        (bytearray(b"text"), "got 4 bytes that do not hold its header - at the header in <bytearray>"),
        (io.BytesIO(), "got 0 bytes that do not hold its header - at the header in <BytesIO>"),
        (b"caf\xe9", "expected a readable file, got No such file or directory - at caf\udce9"),
        ("caf\udce9", "expected a readable file, got No such file or directory - at caf\udce9"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_no_source(source, text, device, monkeypatch):
    if device == "cuda":
        from qdeploy.gpu import loading

        monkeypatch.setattr(loading, "checked_device", lambda device: device)
    with pytest.raises(qdeploy.QdeployError) as raised:
        qdeploy.load_int_model(source, device=device)
    assert text in str(raised.value)


def test_files_that_cannot_be_read(odd_path, tmp_path):
    class Text:
        def read(self) -> str:
            return "text"

    with odd_path.open("rb") as file:
        pass
    for source, text in (
        (file, "expected a readable file, got read of closed file - at "),
        (Text(), "expected a file that gives bytes, got str - at <Text>"),
    ):
        with pytest.raises(qdeploy.QdeployError, match=text):
            qdeploy.load_int_model(source)


@pytest.mark.parametrize(
    "options",
    [{"num_threads": n} for n in (0, 257, True, np.True_, 2.0, np.float32(2), "2", [1], 10**30)]
    + [{"isa": isa} for isa in ("sse9", 5, "\udce9", "avx2\0", "é", b"avx2")]
    + [{"device": device} for device in (None, 5.5, "", "cpu:0", "cuda:x", "\udce9", [])],
    ids=str,
)
def test_bad_options_of_load(models, options):
    with pytest.raises(qdeploy.InputError, match="^expected .*, got .* - at ") as raised:
        qdeploy.load_int_model(models["names"], **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("number", [0, -1, 10**30, True, np.True_, 1.0, np.float64(2), "2", None, [1]], ids=repr)
def test_plan_and_profile_take_whole_numbers_from_one(models, number):
    model = qdeploy.load_int_model(models["names"])
    with pytest.raises(qdeploy.InputError, match="^expected .*, got .* - at batch$"):
        model.plan(number)
    with pytest.raises(qdeploy.InputError, match="^expected .*, got .* - at rounds$"):
        model.profile(np.zeros((1, 3, 8, 8), np.float32), rounds=number)


def test_profile_needs_an_image(models):
    with pytest.raises(qdeploy.InputError, match="expected at least 1, got 0 - at the number of images"):
        qdeploy.load_int_model(models["names"]).profile(np.zeros((0, 3, 8, 8), np.float32))


@pytest.mark.parametrize("taps", ["conv2d.0", ["nothing"], [5], [["conv2d.0"]], [b"conv2d.0"], [None]], ids=repr)
def test_bad_taps(models, taps):
    with pytest.raises(qdeploy.InputError, match="^expected .*, got .* - at taps$"):
        qdeploy.load_int_model(models["names"])(np.zeros((1, 3, 8, 8), np.float32), taps=taps)


# ---- Runs ------------------------------------------------------------------------------------------------------------


OPTIONS = ["--data", "debug", "--test-domain", "debug0", "--accelerator", "cpu"]
SHORT = ["--updates", "3", "--quantize-at", "1", "--eval-every", "1", "--batch-size", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A finished run, and one that stopped at a checkpoint."""
    from qdeploy.training import trainer

    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("finished", "stopped")}
    assert call("train", *OPTIONS, *SHORT, "--out", found["finished"]).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_agreed", lambda signals, fabric: 15)
        assert call("train", *OPTIONS, *SHORT, "--out", found["stopped"]).code == 128 + 15
    return found


def altered(path: Path, change: Callable[[dict], object]) -> None:
    """Writes the file of a run anew with what `change` makes of its content."""
    is_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=True)
    content = change(content) or content
    path.write_text(json.dumps(content)) if is_json else torch.save(content, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbled": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "text": lambda path: path.write_text("[[[[" * 50_000),
    "a list": lambda path: altered(path, lambda content: [1, 2]),
    "without settings": lambda path: altered(path, lambda content: content.__delitem__("config")),
    "a setting too many": lambda path: altered(path, lambda content: content["config"].update(more=1)),
    "a setting of another type": lambda path: altered(path, lambda content: content["config"].update(bits="seven")),
    "a setting out of range": lambda path: altered(path, lambda content: content["config"].update(lr=float("nan"))),
    "nothing but settings": lambda path: altered(path, lambda content: {"config": content["config"]}),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture
def damaged(folders, tmp_path) -> Callable[[str, str, Callable[[Path], object]], Path]:
    """A copy of a run, `kind` as in `folders`, whose file `name` was treated with `damage`."""

    def make(kind: str, name: str, damage: Callable[[Path], object]) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folders[kind], copy)
        damage(copy / "seed0" / name)
        return copy

    return make


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_runs(damaged, tmp_path, kind):
    out = tmp_path / "out.safetensors"
    for name in ("done.json", "model.pt"):
        folder = damaged("finished", name, DAMAGES[kind])
        assert_refused(call("export", folder / "seed0", "--out", out), str(folder / "seed0"))
        if (kind, name) != ("missing", "done.json"):  # which is made again
            assert_refused(call("train", *OPTIONS, *SHORT, "--out", folder), f"{folder / 'seed0' / name}\n")
    if kind != "missing":
        folder = damaged("stopped", "checkpoint.pt", DAMAGES[kind])
        result = call("train", *OPTIONS, *SHORT, "--out", folder)
        assert_refused(result, f"{folder / 'seed0' / 'checkpoint.pt'}\n")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("done.json", lambda content: content["selected"].update(test="high")),
        ("done.json", lambda content: content["selected"].update(validation=None)),
        ("done.json", lambda content: content["selected"].update(update=1.5)),
        ("done.json", lambda content: content["selected"].update(test=float("inf"))),
        ("done.json", lambda content: content["selected"].update(tests={})),
        ("done.json", lambda content: content["selected"].update(tests={"mnist": "high"})),
        ("done.json", lambda content: content["selected"].update(tests=[0.5])),
        ("done.json", lambda content: content["config"].update(step="magic")),
        ("model.pt", lambda content: content.update(net=[])),
        ("model.pt", lambda content: content["net"].__delitem__("features.0.conv.bias")),
        ("model.pt", lambda content: content["net"].update({"features.0.conv.bias": 3})),
        ("checkpoint.pt", lambda content: content.update(update=-1)),
        ("checkpoint.pt", lambda content: content.update(update="1")),
        ("checkpoint.pt", lambda content: content.update(update=4)),
        ("checkpoint.pt", lambda content: content.update(records=[{}])),
        ("checkpoint.pt", lambda content: content.update(losses=["x"])),
        ("checkpoint.pt", lambda content: content.update(best={"a": 1})),
        ("checkpoint.pt", lambda content: content.update(learner={})),
        ("checkpoint.pt", lambda content: content["learner"]["optimizer"].clear()),
    ],
)
def test_runs_of_wrong_values(damaged, name, change):
    folder = damaged("stopped" if name == "checkpoint.pt" else "finished", name, lambda path: altered(path, change))
    result = call("train", *OPTIONS, *SHORT, "--out", folder)
    assert_refused(result, "expected a file written by a run, got a damaged one: delete it", f"{name}\n")


def test_a_run_goes_on_from_its_checkpoint(damaged):
    folder = damaged("stopped", "checkpoint.pt", lambda path: None)
    assert call("train", *OPTIONS, *SHORT, "--out", folder).code == 0


@pytest.mark.parametrize(
    "name", ["summary.json", "model.safetensors", "seed0/settings.yaml", "seed0/log.jsonl", "seed0/model.pt", "seed0"]
)
def test_folders_in_the_place_of_files(tmp_path, name):
    out = tmp_path / "out"
    if name == "seed0":
        out.mkdir()
        (out / name).write_text("a file in the place of a folder")
    else:
        (out / name).mkdir(parents=True)
    assert_refused(call("train", *OPTIONS, *SHORT, "--out", out), str(out / name))


def no_download(monkeypatch) -> None:
    from qdeploy.training import digits_dg

    monkeypatch.setattr(digits_dg, "load_digits", pytest.fail)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(
            ((f"--{name}", value), f"at --{name}")
            for name in ("lr", "lr-step-size")
            for value in ("nan", "inf", "-inf", "-1", "1e400")
        ),
        *(
            ((f"--{name}", value), f"at --{name}")
            for name in ("updates", "eval-every", "batch-size", "image-size", "devices", "seeds")
            for value in ("0", "-1", str(10**12), str(10**30))
        ),
        *(
            ((f"--{name}", value), f"at --{name}")
            for name in ("seed", "split-seed", "quantize-at")
            for value in ("-1", str(10**30))
        ),
        *(
            ((f"--{name}", value), f"at --{name}")
            for name in ("bits", "activation-bits")
            for value in ("1", "9", "-7", str(10**30))
        ),
        *(((f"--{name}", "x"), f"got 'x' - at --{name}") for name in ("lr", "updates", "seed", "bits", "precision")),
        (("--eval-every", "5000"), "expected a switch in 0 .. 0 (the last evaluation), got 800 - at --quantize-at"),
        (("--batch-size", "1000000"), "got 4000000 images: 5,120,000,000 bytes - at --batch-size"),
        (("--devices", "33"), "expected a multiple of 33 images, as many for each device, got 32 - at --batch-size"),
        (("--devices", "1000", "--batch-size", "1000"), "at --devices"),
        (("--accelerator", "cuda"), "expected a device of this machine, got "),
        (("--accelerator", "tpu"), "expected a device of this machine, got "),
        (("--model", "alexnet"), "got 'alexnet' - at --model"),
        (("--model", "vgg16_bn"), "expected images that vgg16_bn can take, got 128 of [1, 16, 16]: "),
        (("--domains", "mnist"), "expected two or more domains, or --test-domain in-domain, got 1 - at --domains"),
        (("--domains", "mnist,mnist"), "expected every domain once, got mnist, mnist - at --domains"),
        (("--domains", ""), "expected domains of mfeat, mnist, optdigits, pen, usps, got an empty name - at digits-dg"),
        (("--domains", "pen,usps"), "expected one of pen, usps, got 'mnist' - at the domains of digits-dg"),
        (("--test-domain", "caf\udce9"), r"got 'caf\udce9' - at the domains of digits-dg"),
        (("--weights", "missing"), "expected a file of weights, got No such file or directory - at missing"),
        (("--weights", "/"), "expected a file of weights, got Is a directory - at /"),
        (("--weights", "/dev/null"), "expected a file of weights, got an empty one - at /dev/null"),
        (("--weights", __file__), "expected a file of weights, got another or a damaged one - at "),
        (("--data", ""), "or a folder root/domain/class/image, got '' - at --data"),
        (("--data", "caf\udce9"), r"got 'caf\udce9' - at --data"),
        (("--out", "/dev/null"), "expected a folder to write in, got something else - at /dev/null"),
        (("--out", "/dev/null/run"), "/dev/null"),
        (("--out", "x" * 5000), "File name too long"),
        (("--out", ""), "expected a folder, got '' - at --out"),
    ],
)
def test_settings_are_refused_before_anything_is_downloaded(tmp_path, monkeypatch, options, text):
    no_download(monkeypatch)
    monkeypatch.setattr(_engine, "memory_limit", lambda: 2**32)
    monkeypatch.chdir(tmp_path)
    words = ["--test-domain", "mnist", "--accelerator", "cpu", "--out", "run", *options]
    assert_refused(call("train", *words), text)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(qdeploy.ModelError, match="No space left on device - at .*caf\udce9$"):
        format.save(table(np.random.default_rng(0)), os.fsencode(path))
    result = call("train", *OPTIONS, *SHORT, "--out", tmp_path / "run")
    said = replace(result, err=result.err.splitlines(True)[-1])
    assert_refused(said, "No space left on device - at ", "settings.yaml")
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "seed0"]


@pytest.mark.parametrize("out", ["no/such/folder/x", "", ".", "/dev/full", "/dev/null/x", "x" * 5000])
def test_files_that_export_cannot_write(folders, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qdeploy.training.selected_network.load_trained", pytest.fail)
    assert_refused(call("export", folders["finished"] / "seed0", "--out", out))


def test_no_home_for_the_cache(monkeypatch):
    from qdeploy.files import cache_folder

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(
        qdeploy.InputError, match="expected a home folder or XDG_CACHE_HOME, got neither - at the cache"
    ):
        cache_folder()
