"""scales.csv of a GAQAT run: a row for each step size at the end of each window, as the figures of the paper need it.

step             the update that ended the window, from 0
scale            the quantizer, "layer1.0.conv1.weight"; "layer1.0.conv1.weight[3]" of step sizes for each channel
s                the step size before that update's change
sum_task         of the gradients at the weights over the window; sum_smooth: of those uphill
disorder_task    how often the former changed their sign; disorder_smooth: the latter
frozen           1 where it gets no g_task from the next update on, else 0
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from torch import nn

from qdeploy import files
from qdeploy.terminal import note
from qdeploy.training.attached_quantizers import quantizers, step_parameters
from qdeploy.training.methods.freezing import Window
from qdeploy.training.run_files import sound

SCALES = "scales.csv"
COLUMNS = ["step", "scale", *(field.name for field in fields(Window))]


def begin(folder: Path, update: int) -> None:
    """Starts the table, or goes on with it from `update` on: rows of that update and later ones are dropped. They will
    come again: a process wrote them after its last checkpoint. Raises InputError for a file that is no such table."""
    path = folder / SCALES
    if update and not path.exists():
        note(f"warning: the table of step sizes was gone: it has nothing before update {update} - at {path}")
    with sound(path):
        rows = path.read_text().splitlines(keepends=True)[1:] if update and path.exists() else []
        # Of a row cut short not even the update is sure. It is among the last ones, which come again.
        kept = [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) < update]
    with files.atomic_file(path) as file:
        file.write("".join([",".join(COLUMNS) + "\n", *kept]).encode())


def append(folder: Path, update: int, net: nn.Module, window: Window) -> None:
    """The rows of the window that `update` ended, one for each step size of `net` that trains."""
    columns = [getattr(window, field.name).tolist() for field in fields(window)]
    rows = zip(_names(net), *columns, strict=True)
    text = [f"{update},{name},{','.join(map(repr, numbers))},{int(frozen)}\n" for name, *numbers, frozen in rows]
    files.append(folder / SCALES, "".join(text).encode())


def _names(net: nn.Module) -> list[str]:
    """Of all step sizes that train, in the order of `step_parameters`; a shared one has the first of its names."""
    names: dict[int, str] = {}
    for name, quantizer in quantizers(net).items():
        names.setdefault(id(quantizer.step), name)
    found = []
    for step in step_parameters(net):
        name = names[id(step)]
        found += [f"{name}[{i}]" for i in range(len(step))] if step.dim() else [name]
    return found
