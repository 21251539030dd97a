"""What is built, and what it needs: the source distribution, the wheel made from it, and an import without torch."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("torch", "triton", "onnx", "onnxruntime", "openvino", "MNN", "lightning_fabric", "rich", "PIL")
PACKAGES = {name: name for name in ("qdeploy", "qdeploy/exporter", "qdeploy/exporter/from_torch")}  # as installed
PACKAGES |= {f"qdeploy/exporter/{name}": f"qdeploy/exporter/{name}" for name in ("from_onnx", "lowering")}
PACKAGES |= {f"qdeploy/{name}": f"qdeploy/{name}" for name in ("gpu", "networks", "onnx_nodes", "ops", "page")}
PACKAGES |= {f"qdeploy/{name}": name for name in ("kernels", "training", "training/figures", "training/measures")}
PACKAGES |= {"qdeploy/training/methods": "training/methods"}
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


def python(code: str, **options: object) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, built offline from an sdist of this tree, and that one unpacked in `source`."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs")
    shutil.copytree(ROOT, tree, ignore=ignored)
    python(f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later have it
        archive.extractall(folder)
    (folder / sdist.name.removesuffix(".tar.gz")).rename(folder / "source")
    python(f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})", cwd=folder / "source")
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_sdist_holds_the_documents_and_the_tests(built: Path):
    source = built / "source"
    for folder in ("bench", "csrc", "docs", "examples", "include", "sweeps", "tests", "wheels"):
        here = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in here if "__pycache__" not in name.parts} == {
            path.relative_to(source) for path in (source / folder).rglob("*") if path.is_file()
        }
    here = {path.name for path in ROOT.glob("[A-Z]*")} | {"constraints.txt", "pyproject.toml", "setup.py"}
    assert here <= {path.name for path in source.iterdir()}


def test_wheel_contents(wheel: Path):
    assert wheel.stat().st_size < 3_000_000
    names = zipfile.ZipFile(wheel).namelist()
    for package, folder in PACKAGES.items():
        installed = {name for name in names if Path(name).parent == Path(package) and name.endswith(".py")}
        assert installed == {f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    data = {f"qdeploy/demo_data/{path.name}" for path in (ROOT / "qdeploy/demo_data").iterdir()}
    data |= {f"qdeploy/{name}" for name in ("_engine.pyi", "py.typed", "page/style.css", "training/tables.yaml")}
    assert data <= set(names)
    assert sum(name.endswith(".so") for name in names) == 1
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qdeploy"}  # no top-level kernels, training, tests


def test_installed_wheel_runs_the_demo_with_numpy_alone(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"{BLOCK}sys.path.insert(0, {str(site)!r})\nfrom qdeploy import cli; sys.exit(cli.main(['demo', '--json']))"
    assert json.loads(python(code, cwd=tmp_path))["equal"] is True


def test_import_loads_nothing_optional():
    loaded = python(
        "import qdeploy, qdeploy.cli, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ).split()
    assert "numpy" in loaded
    assert not set(OPTIONAL) & set(loaded)


def test_dir_shows_what_is_imported_on_use():
    found = python("import qdeploy.training, sys; print(*dir(qdeploy), *dir(qdeploy.training), *sys.modules)").split()
    assert {"export", "export_ensemble", "MODELS", "quantize_", "summary"} <= set(found)
    assert "torch" not in found


def imported(tree: ast.AST) -> set[str]:
    """What an import of this module of qdeploy imports: not what stands in functions and in `if TYPE_CHECKING:`."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["qdeploy"] if node.level else []
            module = ".".join(package + [node.module] * bool(node.module))
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, ast.FunctionDef) and not _for_types(node):
            found |= imported(node)
    return found


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_only_the_rooms_inside_need_more_than_numpy():
    rooms = ("qdeploy.exporter", "qdeploy.gpu", "qdeploy.kernels", "qdeploy.networks")
    for path in (ROOT / "qdeploy").glob("*.py"):
        found = imported(ast.parse(path.read_text()))
        assert [name for name in found if name.partition(".")[0] in OPTIONAL or name.startswith(rooms)] == [], path.name


def test_no_module_imports_back():
    trees = {"qdeploy._engine": ast.parse("")}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).glob("*.py"):
            name = f"{package}/{path.stem}".replace("/", ".").removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text())
    graph = {}
    for name, tree in trees.items():
        among = [[module for module in trees if f"{found}.".startswith(f"{module}.")] for found in imported(tree)]
        graph[name] = {max(modules, key=len) for modules in among if modules} - {name}
    assert graph["qdeploy.exporter.from_torch.quantizers"] >= {"qdeploy.exporter.layers", "qdeploy.exporter.grid"}
    list(TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_import_without_anything_optional():
    python(f"{BLOCK}import qdeploy, qdeploy.cli, qdeploy.format, qdeploy.reference, qdeploy.demo, qdeploy.peers")


def test_export_without_torch_says_what_to_install():
    call = "qdeploy.export(None, numpy.zeros((1, 4), numpy.float32), 'net.safetensors')"
    code = f"{BLOCK}import numpy, qdeploy\ntry: {call}\nexcept ImportError as error: print(error)"
    assert "torch" in python(code)


def test_all_but_the_front_end_exports_without_torch(tmp_path: Path):
    modules = {f"qdeploy.exporter.{path.stem}" for path in (ROOT / "qdeploy/exporter").glob("*.py")}
    imports = "; ".join(f"import {module.removesuffix('.__init__')}" for module in sorted(modules))
    path = [str(ROOT / "tests")]
    code = f"{BLOCK}sys.path += {path}\n{imports}\nfrom network_by_hand import check; check({str(tmp_path)!r})"
    python(code)


def objects(built: Path, folder: str) -> list[Path]:
    found = list((built / "source" / "build").glob(f"*/CMakeFiles/*.dir/{folder}/*.o"))
    assert found
    return found


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} (binutils) is not installed")


def test_only_the_isa_files_hold_their_instructions(built: Path):
    """All else must run on any x86-64: no VEX or EVEX instruction, whose mnemonics all begin with v."""
    objdump = tool("objdump")
    scalar = [path for path in objects(built, "csrc/isa") if path.name == "scalar.cc.o"]
    baseline = objects(built, "csrc") + objects(built, "csrc/ops") + scalar
    for path in baseline:
        code = subprocess.run(
            [objdump, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
        ).stdout
        mnemonics = set(re.findall(r"^\s+[0-9a-f]+:\t(\S+)", code, re.MULTILINE))
        assert {m for m in mnemonics if m.startswith("v") and m not in ("verr", "verw")} == set(), path.name


def test_the_isa_files_export_no_inline_code(built: Path):
    """An inline function compiled with -mavx512f could be the copy that the linker keeps for the whole extension."""
    nm = tool("nm")
    for path in objects(built, "csrc/isa"):
        symbols = subprocess.run([nm, "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        assert [line for line in symbols if re.search(r"^[0-9a-f]+ [WVu] ", line)] == [], path.name


def test_extension_is_stripped(wheel: Path, tmp_path: Path):
    nm = tool("nm")
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))
    path = zipfile.ZipFile(wheel).extract(name, tmp_path)
    assert "no symbols" in subprocess.run([nm, path], capture_output=True, text=True).stderr
