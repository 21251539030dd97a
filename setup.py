"""Builds `qdeploy._engine` with CMake. Everything else about the package is in pyproject.toml.

CMAKE_ARGS adds options, e.g. CMAKE_ARGS=-DQDEPLOY_SANITIZE=ON for an ASan + UBSan build.
"""

import os
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path

import cmake
import ninja
import nlohmann_json
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and installs the one target `_engine` to the place where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        run_cmake = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        build = ROOT / "build" / sys.implementation.cache_tag  # kept, so that a second build is incremental
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_COMPILE_WARNING_AS_ERROR": "OFF",
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "NLOHMANN_JSON_INCLUDE": Path(nlohmann_json.__file__).parent / "include",
            "QDEPLOY_PYTHON": "ON",
            "QDEPLOY_SANITIZE": "OFF",
        }
        configure = [f"-D{name}={value}" for name, value in options.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run([run_cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
        subprocess.run([run_cmake, "--build", build, "--target", "_engine"], check=True)
        subprocess.run([run_cmake, "--install", build, "--prefix", destination], check=True)


ROOMS = ("exporter", "exporter.from_onnx", "exporter.from_torch", "exporter.lowering")
ROOMS += ("gpu", "kernels", "networks", "onnx_nodes", "ops", "page")
ROOMS += ("training", "training.figures", "training.measures", "training.methods")

setup(
    packages=["qdeploy", *(f"qdeploy.{room}" for room in ROOMS)],
    package_dir={"qdeploy": "qdeploy", "qdeploy.kernels": "kernels", "qdeploy.training": "training"},
    package_data={
        "qdeploy": ["_engine.pyi", "py.typed", "demo_data/*"],
        "qdeploy.page": ["style.css"],
        "qdeploy.training": ["tables.yaml"],
    },
    include_package_data=False,  # what package_data names, not all that MANIFEST.in packs
    ext_modules=[
        Extension(
            "qdeploy._engine",
            sources=[],
            depends=["CMakeLists.txt", *glob("csrc/**/*.*", recursive=True), *glob("tests/cpp/*.*")],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
