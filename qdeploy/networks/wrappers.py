"""Networks as people hold them: in torch.compile, DataParallel, AveragedModel or Fabric. Needs PyTorch."""

from __future__ import annotations

from torch import nn

# Where a wrapper holds the network. By name of the class: importing torch.compile takes a second, and Fabric need not
# be installed.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "_FabricModule": "_forward_module",
}


def _held(module: nn.Module) -> str | None:
    """The name under which `module`, if it is a wrapper, holds the network."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    return next((WRAPPERS[kind] for kind in kinds if kind in WRAPPERS), None)


def unwrapped(net: nn.Module) -> nn.Module:
    """The network itself: `net` without the wrappers around it."""
    while (name := _held(net)) is not None:
        net = getattr(net, name)
    return net


def plain_names(net: nn.Module) -> dict[str, str]:
    """The name of each module of `net`, a path, without the names that wrappers around it or within it add."""
    plain: dict[str, str] = {}
    for path, _ in net.named_modules(remove_duplicate=False):
        parent, _, name = path.rpartition(".")
        prefix = plain[parent] if path else ""
        if path and name == _held(net.get_submodule(parent)):
            plain[path] = prefix
        else:
            plain[path] = f"{prefix}.{name}" if prefix else name
    return plain
