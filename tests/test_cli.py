"""The command line as a user meets it: reports, exit codes, and one line for every bad input."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builder import Builder, small_text

import qdeploy
from qdeploy import _engine, format
from qdeploy.demo import MODEL
from qdeploy.graph import Graph

COMMAND = [sys.executable, "-m", "qdeploy.cli"]


def run(*args: object, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "QDEPLOY_ISA"} | environment
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, env=env, timeout=120)


def assert_one_line_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("qdeploy: error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    for part in parts:
        assert part in result.stderr


# ---- Reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ("info", MODEL),
        ("plan", MODEL),
        ("profile", MODEL, "--rounds", 2, "--batch", 3),
        ("bench", MODEL, "--rounds", 1),
        ("bench", MODEL, "--rounds", 1, "--no-peers"),
        ("verify", MODEL, "--batch", 1),
        ("doctor",),
        ("demo", "--threads", 1),
    ],
    ids=lambda args: " ".join(str(arg) for arg in args if arg != MODEL),
)
def test_report_as_text_and_as_json(args):
    text = run(*args)
    assert (text.returncode, text.stderr) == (0, "")
    assert len(text.stdout.splitlines()) >= 4
    as_json = run(*args, "--json")
    assert (as_json.returncode, as_json.stderr) == (0, "")
    assert isinstance(json.loads(as_json.stdout), dict)


def test_info_counts_what_the_file_holds():
    report = json.loads(run("info", MODEL, "--json").stdout)
    model = qdeploy.load_int_model(MODEL)
    assert report["bytes"] == MODEL.stat().st_size == model.nbytes
    assert [member["name"] for member in report["members"]] == model.members
    assert sum(member["macs"] for member in report["members"]) == sum(step["macs"] for step in model.plan(1))
    bits = {row["bits"] for member in report["members"] for row in member["weights"]}
    assert bits == set(model.weight_bits.values())


def test_verify_runs_every_instruction_set():
    report = json.loads(run("verify", MODEL, "--batch", 1, "--json").stdout)
    assert report["equal"] is True
    assert {row["isa"] for row in report["runs"]} == set(_engine.isas())
    assert {row["threads"] for row in report["runs"]} == {1, 2}


def test_verify_fails_where_the_reference_differs():
    broken = (
        "import sys; from qdeploy import cli, reference; run = reference.run\n"
        "def wrong(*args, **kw): output, taps = run(*args, **kw); output[0, 0] += 1; return output, taps\n"
        f"reference.run = wrong; sys.exit(cli.main(['verify', {str(MODEL)!r}, '--batch', '1']))"
    )
    result = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, "")
    assert "NOT equal" in result.stdout


def test_plan_obeys_the_instruction_set_of_the_environment():
    for isa in _engine.isas():
        report = json.loads(run("plan", MODEL, "--json", "--threads", 1, QDEPLOY_ISA=isa).stdout)
        assert (report["isa"], report["threads"]) == (isa, 1)


def columns(text: str) -> dict[str, list[str]]:
    """The cells of a printed table by header. A column ends where the next one begins, two blanks apart at least."""
    header, *lines = text.split("\n\n")[1].splitlines()
    blank = [all(i >= len(line) or line[i] == " " for line in [header, *lines]) for i in range(len(header) + 1)]
    starts = [i for i in range(len(header)) if not blank[i] and (i == 0 or blank[i - 1] and (i < 2 or blank[i - 2]))]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in [header, *lines]]
    return {name: list(column) for name, *column in zip(*cells, strict=True)}


def test_plan_is_a_table_of_the_nodes():
    shown, nodes = columns(run("plan", MODEL, "--threads", 1).stdout), qdeploy.load_int_model(MODEL, 1).plan(1)
    assert shown["node"] == [node["name"] for node in nodes]
    assert shown["member"] == [node["member"] for node in nodes]
    for key in ("kernel", "tile", "split"):
        assert shown[key] == [node[key] for node in nodes]
    assert sum(float(share.rstrip("%")) for share in shown["of MACs"]) == pytest.approx(100, abs=0.05 * len(nodes))


def test_profile_adds_times_and_shares():
    result = run("profile", MODEL, "--rounds", 2, "--threads", 1)
    shown = columns(result.stdout)
    assert {"node", "kernel", "tile", "split", "us", "of time", "GMAC/s", "of peak"} <= set(shown)
    report = json.loads(run("profile", MODEL, "--rounds", 2, "--threads", 1, "--json").stdout)
    assert sum(node["of_time"] for node in report["nodes"]) == pytest.approx(1)
    for node in report["nodes"]:
        rate = node["macs"] / node["microseconds"] / 1e3
        assert node["gmacs_per_second"] == (pytest.approx(rate) if node["macs"] else None)
    peak = _engine.peak_gmacs(report["isa"], "int8", 0.001)
    assert (report["of_peak"] is None) == (peak is None)


def test_profile_without_a_known_peak():
    report = json.loads(run("profile", MODEL, "--rounds", 1, "--json", QDEPLOY_ISA="scalar").stdout)
    assert report["of_peak"] is None and all(node["of_peak"] is None for node in report["nodes"])
    assert "of peak" in columns(run("profile", MODEL, "--rounds", 1, QDEPLOY_ISA="scalar").stdout)


def test_bench_shows_a_peer_that_crashes(tmp_path):
    """A runtime whose import kills the process is a row with the reason; the others are timed."""
    pytest.importorskip("onnx", reason="the `onnx` extra is not installed")
    (tmp_path / "openvino.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = run("bench", MODEL, "--rounds", 1, PYTHONPATH=path)
    assert (result.returncode, result.stderr) == (0, "")
    notes = dict(zip(*(columns(result.stdout)[key] for key in ("runtime", "note")), strict=True))
    assert notes["qdeploy int8"] == notes["onnxruntime int8"] == ""
    assert notes["openvino int8"] == notes["openvino float32"] == "crashed (SIGSEGV)"


def test_bench_of_texts_says_that_the_peers_take_none(tmp_path):
    format.save(small_text(), tmp_path / "text.safetensors")
    result = run("bench", tmp_path / "text.safetensors", "--rounds", 1)
    assert (result.returncode, result.stderr) == (0, "")
    notes = dict(zip(*(columns(result.stdout)[key] for key in ("runtime", "note")), strict=True))
    assert notes.pop("qdeploy int8") == ""
    assert set(notes.values()) == {"expected images for a peer, got texts"}


def test_demo_shows_equal_bits():
    report = json.loads(run("demo", "--json").stdout)
    assert report["equal"] is True
    assert set(report["sha256_of_probabilities"]) == {"numpy reference", *_engine.isas()}
    assert len(report["accuracy"]["members"]) > 1
    assert report["accuracy"]["ensemble"] > 0.5  # ten classes


# ---- Train, export, run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two networks trained for 20 steps, quantized after 10, and the ensemble file that `train` wrote of them."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--data", "debug", "--test-domain", "debug0", "--updates", 20, "--quantize-at", 10, "--eval-every", 5]
    result = run("train", *options, "--seeds", 2, "--out", folder, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["file"]["path"] == str(folder / "eoq.safetensors")
    return folder


def test_trained_ensemble_verifies(runs):
    report = json.loads(run("verify", runs / "eoq.safetensors", "--json").stdout)
    assert report["equal"] is True
    assert {row["input"] for row in report["runs"]} == {"f32", "u8"}


def test_export_repeats_the_file_of_train(runs, tmp_path):
    out, html = tmp_path / "eoq.safetensors", tmp_path / "eoq.html"
    result = run("export", runs / "seed0", runs / "seed1", "--out", out, "--html", html)
    assert (result.returncode, result.stderr) == (0, "")
    assert "<h1>eoq.safetensors</h1>" in html.read_text()
    assert (tmp_path / "eoq.safetensors").read_bytes() == (runs / "eoq.safetensors").read_bytes()


def test_export_rounds_as_it_is_told(runs, tmp_path):
    files = [tmp_path / "plain", tmp_path / "other"]
    for out, options in zip(files, ([], ["--rounding", "obc", "--no-correct-bias"]), strict=True):
        assert run("export", runs / "seed0", "--out", out, *options).returncode == 0
    plain, other = (format.load(path).members[0].nodes for path in files)
    same = {
        a.bits: [np.array_equal(a.constants[key], b.constants[key]) for key in ("weight", "bias")]
        for a, b in zip(plain, other, strict=True)
        if a.bits
    }
    assert same == {7: [True, True], 8: [False, False]}  # of training, and of the classifier


def test_export_of_what_is_no_run(runs, tmp_path):
    assert_one_line_error(
        run("export", runs, "--out", tmp_path / "x"), "expected the folder of a finished run", str(runs)
    )
    assert_one_line_error(
        run("export", runs / "seed0", "--out", tmp_path / "no" / "x"), "expected ", str(tmp_path / "no")
    )
    assert_one_line_error(
        run("export", runs / "seed0", "--out", tmp_path / "x", "--observer", "max"),
        "expected observer minmax, percentile, mse, got 'max' - at export",
    )
    assert_one_line_error(
        run("export", runs / "seed0", "--out", tmp_path / "x", "--rounding", "gptq"),
        "expected rounding nearest or obc, got 'gptq' - at export",
    )


# ---- Bad input -------------------------------------------------------------------------------------------------------


def foreign_safetensors() -> bytes:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
    return len(header).to_bytes(8, "little") + header + bytes(4)


BAD_FILES = {
    "empty": lambda valid: b"",
    "text": lambda valid: b"this is no model\n" * 100,
    "foreign": lambda valid: foreign_safetensors(),
    "truncated": lambda valid: valid[:-1],
    "newer version": lambda valid: valid.replace(b'"format_version":"1"', b'"format_version":"3"', 1),
    "unknown op": lambda valid: valid.replace(b'\\"op\\":\\"conv2d\\"', b'\\"op\\":\\"conv9d\\"', 1),
}


def test_plan_notes_why_a_convolution_is_direct(tmp_path):
    """Of 1,832 codes of -128 a pixel, in a layer that would be faster by fewer products."""
    builder = Builder(np.random.default_rng(0), (1832, 32, 32), (1.0, 0))
    builder.conv2d(0, 8, (3, 3), padding=(1, 1, 1, 1), codes="lowest")
    builder.conv2d(1, 8, (3, 3), padding=(1, 1, 1, 1))
    format.save(Graph([builder.member()]), tmp_path / "m.safetensors")
    for isa in _engine.isas():
        shown = run("plan", tmp_path / "m.safetensors", QDEPLOY_ISA=isa).stdout
        faster = isa in ("avx2", "avxvnni", "avx512", "avx512vnni")
        assert shown.count("codes too large for Winograd") == faster, isa


@pytest.mark.parametrize("command", ["info", "plan"])  # the two readers: Python, C++
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path, command, kind):
    valid = MODEL.read_bytes()
    bad = BAD_FILES[kind](valid)
    assert bad != valid
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bad)
    assert_one_line_error(run(command, path), "expected ", "got", " - at ", str(path))


@pytest.mark.parametrize("command", ["info", "plan"])  # the two readers: Python, C++
def test_no_file(tmp_path, command):
    assert_one_line_error(run(command, tmp_path / "missing"), "expected ", str(tmp_path / "missing"))
    assert_one_line_error(run(command, tmp_path), "expected ", str(tmp_path))


@pytest.mark.parametrize("threads", ["0", "-1", "10000", "two", "1.5"])
def test_bad_threads(threads):
    assert_one_line_error(run("plan", MODEL, f"--threads={threads}"), "expected ", ", got ")


def test_bad_options():
    assert_one_line_error(run("plan", MODEL, "--batch", "0"), "expected at least 1, got 0 - at --batch")
    assert_one_line_error(run("plan", MODEL, QDEPLOY_ISA="sse9"), 'got "sse9" - at QDEPLOY_ISA', "scalar")
    assert_one_line_error(run("plan"), "file", "--help")
    assert_one_line_error(run("fly"), "'fly'")
    assert_one_line_error(run(), "command")
    assert_one_line_error(run("info", MODEL, "--frobnicate"), "--frobnicate")


def test_train_needs_its_extra():
    blocked = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from qdeploy import cli; sys.exit(cli.main(['train', '--test-domain', 'mnist', '--out', 'nowhere']))"
    )
    result = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=120)
    assert_one_line_error(result, "pip install 'qdeploy[train]'")


# ---- Interruptions ---------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_no_traceback():
    # A shell starts its background jobs with SIGINT ignored, and they hand that on: undo it, as a terminal would.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += f"from qdeploy import cli; sys.exit(cli.main(['bench', {str(MODEL)!r}, '--rounds', '1000000']))"
    terminal, stderr = pty.openpty()  # on a terminal the command shows its progress
    with subprocess.Popen([sys.executable, "-c", program], stderr=stderr) as process:
        os.close(stderr)
        seen = b""
        try:
            while b"round 2" not in seen:
                seen += os.read(terminal, 1000)
            process.send_signal(signal.SIGINT)
            while chunk := _read_terminal(terminal):
                seen += chunk
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
            os.close(terminal)
    assert b"Traceback" not in seen


def _read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1000)
    except OSError:  # Linux, once the other end is closed
        return b""


def test_reader_that_leaves_early():
    process = subprocess.Popen([*COMMAND, "info", str(MODEL)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (0, b"")
    process.stderr.close()


# ---- The same errors from Python -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return qdeploy.load_int_model(MODEL, num_threads=1)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 1, 16, 15), np.float32),
        np.zeros((1, 3, 16, 16), np.float32),
        np.zeros((1, 16, 16), np.float32),
        np.zeros((1, 1, 16, 16), np.float64),
        np.zeros((1, 16, 16, 3), np.uint8),
        np.float32(0),
        np.full((2, 1, 16, 16), np.nan, np.float32),
        np.full((2, 1, 16, 16), -np.inf, np.float32),
        [[0.0]],
    ],
    ids=["width", "channels", "rank", "dtype", "u8 channels", "scalar", "NaN", "infinity", "list"],
)
def test_bad_images(model, images):
    with pytest.raises(qdeploy.InputError, match=r"^expected .*, got .* - at "):
        model(images)


def test_no_images_give_no_results(model):
    assert model(np.zeros((0, 1, 16, 16), np.float32)).shape == (0, 10)
    assert model.predict(np.zeros((0, 16, 16, 1), np.uint8)).shape == (0,)


@pytest.mark.parametrize("threads", [0, -1, 10_000, 1.5, "2", True])
def test_bad_thread_counts_from_python(threads):
    with pytest.raises(qdeploy.InputError, match="expected 1 to 256 threads, got "):
        qdeploy.load_int_model(MODEL, num_threads=threads)


def test_unknown_isa_from_python():
    with pytest.raises(qdeploy.InputError, match="expected an instruction set that this CPU has"):
        qdeploy.load_int_model(Path(MODEL), isa="sse9")
