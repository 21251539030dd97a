"""What `qdeploy report` and `qdeploy profile` could find: all that a page can show, from a seed."""

from __future__ import annotations

import numpy as np

ROWS = ("ERM", "SWAD", "QT-DoG, 7 bits", "EoQ of 5", "GAQAT 4/4", "SAGM+LSQ 3/3", "bn_head", "INQ")
TARGETS = ("mnist_m", "svhn", "syn")
SIZES = (140_000, 140_000, 36_000, 180_000, 21_000, 16_500, 36_200, 36_100)


def report(rows: tuple[str, ...] = ROWS, seeds: int = 3, measured: bool = True) -> dict:
    rng = np.random.default_rng(0)
    runs = [
        _run(rng, row, i, target, seed, measured)
        for i, row in enumerate(rows)
        for target in TARGETS
        for seed in range(seeds)
    ]
    files = [{"label": rows[-1], "layers": _layers(rng)}]
    return {"title": "Runs in sweeps/digits", "tables": [_table(rng, rows)], "runs": runs, "files": files}


def _table(rng: np.random.Generator, rows: tuple[str, ...]) -> dict:
    columns = [*TARGETS, "mean", "validation"]
    filled = []
    for i, label in enumerate(rows):
        cells: list[dict | None] = [_cell(rng, 60 + 3 * i % 11, i) for _ in columns]
        if i == len(rows) - 2:
            cells[2:4] = [None, None]  # a target is missing
        known = {"seeds": "3", "networks": 5 if "EoQ" in label else 1, "bits": "7", "size": SIZES[i % len(SIZES)]}
        known |= {"milliseconds": 0.02 + 0.01 * i, "int8": {"mean": 61.25, "error": 0.75, "n": 3}, "agreement": 99.5}
        filled.append({"label": label, "cells": cells, **known})
    notes = ["Mean and standard error over seeds; selection: training-domain validation; split 0."]
    title = "Digits-DG: the rows of QT-DoG"
    about = {"name": "all", "title": title, "columns": columns, "decimals": [1] * 5, "units": ["%"] * 5}
    return {**about, "rows": filled, "notes": notes}


def _cell(rng: np.random.Generator, mean: float, i: int) -> dict:
    published = (
        {"published": mean + 2, "published_error": 0.4} if i < 4 else {"published": None, "published_error": None}
    )
    return {"mean": mean + rng.normal(), "error": abs(rng.normal()), "n": 3, **published}


def _run(rng: np.random.Generator, row: str, i: int, target: str, seed: int, measured: bool) -> dict:
    records = []
    for update in range(0, 1001, 100):
        level = 1 - np.exp(-update / 250) - (0.04 if update == 400 else 0)
        test, validation = (round(float(top * level + rng.normal(0, 0.01)) + 0.1, 4) for top in (0.55, 0.78))
        quantized = row not in ROWS[:2] and update >= 400
        records.append(
            {"update": update, "quantized": quantized, "eligible": True, "test": test} | {"validation": validation}
        )
    config = {"quantize_at": None if row in ROWS[:2] else 400}
    measures = _measures(rng, i) if measured else {}
    folder = f"digits/{row}/{target}/seed{seed}"
    about = {"row": row, "target": target, "seed": seed, "folder": folder, "config": config}
    return {**about, "records": records, "measures": measures}


def _measures(rng: np.random.Generator, i: int) -> dict:
    return {
        "flatness": _flatness(i),
        "surface": _surface(1 + i / 4),
        "gradcam": _gradcam(rng),
        "pac-bayes": {
            "measure": "pac-bayes",
            "version": 1,
            "accuracy": 0.97,
            "table": [
                {"measure": "pac-init", "reading": "exact", "value": 3.25 + i, "saturated": False},
                {"measure": "pac-orig", "reading": "exact", "value": 3.5 + i, "saturated": i == 1},
            ],
        },
        "gaps": {"measure": "gaps", "train_loss": 0.1, "corruption_gap": 0.75, "kinds": [], "table": []},
    }


def _flatness(i: int) -> dict:
    table = []
    for part in ("source", "target"):
        for kind, radii in (("absolute", range(0, 61, 10)), ("relative", (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5))):
            for gamma in radii:
                distance = gamma / 120 if kind == "absolute" else gamma
                row = {"part": part, "kind": kind, "gamma": float(gamma), "gamma_relative": float(gamma)}
                table.append({**row, "mean": (1 + i) * distance**2 * 4, "std": None, "standard_error": None})
    return {"measure": "flatness", "norm": 21.5, "parameters": 34380, "table": table}


def _surface(steepness: float, points: int = 21) -> dict:
    axis = np.linspace(-1, 1, points)
    rows = [
        {"a": float(a), "b": float(b), "loss": float(0.1 + steepness * (a**2 + 0.5 * b**2 + 0.4 * a * b))}
        for a in axis
        for b in axis
    ]
    return {"measure": "surface", "points": points, "loss": 0.1, "table": rows}


def _gradcam(rng: np.random.Generator, size: int = 16) -> dict:
    images, table = [], []
    y, x = np.mgrid[:size, :size]
    for i in range(6):
        ring = np.exp(-((np.hypot(y - size / 2, x - size / 2) - 4) ** 2) / 3)
        pixels = np.clip(40 + 200 * ring + rng.normal(0, 8, (3, size, size)), 0, 255).astype(int)
        spot = np.exp(-((y - 4 - i) ** 2 + (x - 5 - i) ** 2) / 12)
        images.append({"pixels": pixels.tolist(), "map": (spot / spot.max()).round(3).tolist()})
        table.append({"domain": "svhn", "label": i, "predicted": i if i != 3 else 8, "peak": 0.5})
    return {"measure": "gradcam", "stage": "features.3", "table": table, "images": images}


def _layers(rng: np.random.Generator) -> list[dict]:
    return [
        {"name": f"features.{i}.conv", "bits": 8 if i in (0, 19) else 4, "sqnr_db": 20 + 3 * float(rng.normal())}
        | {"microseconds": float(rng.uniform(1, 9)), "macs": 100_000 * (1 + i % 4)}
        for i in range(20)
    ]
