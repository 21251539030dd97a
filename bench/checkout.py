"""Where qdeploy is not installed, importing this makes it importable from this repository, without its C++ engine.

Its packages lie where `package_dir` in setup.py says. In place of the engine an export's report gets the numpy
reference, which has the same bits.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

try:
    import qdeploy._engine  # noqa: F401
except ImportError:
    sys.path.insert(0, str(ROOT))
    sys.modules["qdeploy._engine"] = ModuleType("qdeploy._engine")
    import qdeploy
    from qdeploy import format, model, reference

    qdeploy.__path__.append(str(ROOT))  # kernels and training
    model.load_int_model = lambda content: partial(reference.run, format.parse(content, "the export"))
