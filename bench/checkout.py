"""Where qdeploy is not installed, importing this makes it importable from this repository, without its C++ engine.

Its packages lie where `package_dir` in setup.py says. In place of the engine an export's report gets the numpy
reference, which has the same bits, and its rounding the same sums in numpy.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def _lsq_errors(weights: np.ndarray, step: np.ndarray, low: int, high: int, errors: np.ndarray, threads: int) -> None:
    """As csrc/lsq.h: of each row the squared error of its codes."""
    rows, steps = weights.reshape(len(step), -1), step[:, None]
    errors[:] = np.square(np.clip(np.rint(rows / steps), low, high) * steps - rows).sum(1)


try:
    import qdeploy._engine  # noqa: F401
except ImportError:
    sys.path.insert(0, str(ROOT))
    engine = sys.modules["qdeploy._engine"] = ModuleType("qdeploy._engine")
    engine.lsq_errors, engine.default_threads = _lsq_errors, lambda: 1
    import qdeploy
    from qdeploy import format, model, reference

    qdeploy.__path__.append(str(ROOT))  # kernels and training
    model.load_int_model = lambda content: partial(reference.run, format.parse(content, "the export"))
