from typing import overload

import numpy as np

def isas() -> list[str]: ...
def place(blocks: list[tuple[int, int, int]]) -> tuple[list[int], int, int]: ...
def cpu_quota(root: str = "") -> float: ...
def memory_limit(root: str = "") -> int: ...
def default_threads() -> int: ...
def ops() -> list[dict]: ...
def peak_gmacs(isa: str, precision: str, seconds: float) -> float | None: ...
def lsq_forward(
    value: np.ndarray, step: np.ndarray, qmin: int, qmax: int, result: np.ndarray, threads: int, isa: str = ""
) -> None: ...
def lsq_backward(
    grad: np.ndarray,
    value: np.ndarray,
    step: np.ndarray,
    qmin: int,
    qmax: int,
    grad_scale: float,
    grad_value: np.ndarray,
    grad_step: np.ndarray,
    threads: int,
    isa: str = "",
) -> None: ...
def lsq_errors(
    value: np.ndarray, step: np.ndarray, qmin: int, qmax: int, errors: np.ndarray, threads: int, isa: str = ""
) -> None: ...
def norm(
    a: np.ndarray,
    groups: int,
    multiplier: np.ndarray,
    bias: np.ndarray,
    epsilon: float,
    qmin: int,
    qmax: int,
    result: np.ndarray,
    threads: int,
    isa: str = "",
) -> None: ...
def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    zero_points: tuple[int, int, int],
    heads: int,
    logit_multiplier: float,
    multiplier: float,
    bias: float,
    qmin: int,
    qmax: int,
    peak: int,
    most_rows: int,
    most_keys: int,
    block: int,
    logit_bias: np.ndarray | None,
    regions: np.ndarray | None,
    result: np.ndarray,
    threads: int,
    isa: str = "",
) -> None: ...

class Session:
    threads: int
    isa: str
    nbytes: int
    footprint: int  # bytes of weights and constants in memory
    members: list[str]
    classes: list[str]
    preprocess: bool
    vocabulary: int
    variable: bool
    input: int
    outputs: list[int]
    activations: list[dict]

    @overload
    def __init__(
        self, path: str | bytes, threads: int, isa: str, macs_per_thread: int = ..., conv_form: str = ...
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str | bytes,
        content: bytes,
        threads: int,
        isa: str,
        macs_per_thread: int = ...,
        conv_form: str = ...,
    ) -> None: ...
    def run(
        self,
        images: np.ndarray,
        outputs: list[np.ndarray],
        classes: np.ndarray | None,
        taps: list[tuple[int, np.ndarray]],
        step_seconds: np.ndarray | None,
        lengths: np.ndarray | None,
    ) -> None: ...
    def plan(self, batch: int) -> list[dict]: ...
