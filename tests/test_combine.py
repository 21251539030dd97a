"""What is made of finished runs: ensembles by each rule, averages, their files, and runs that do not go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

import qdeploy
from qdeploy import cli, format, reference
from qdeploy.errors import InputError
from qdeploy.training import MODELS, judging, quantize_, trainer
from qdeploy.training.attached_quantizers import weight_before, weight_quantizer
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.fingerprint import network_hash
from qdeploy.training.minibatches import split
from qdeploy.training.reducers import diwa_restricted, diwa_uniform
from qdeploy.training.selected_network import load_trained

BENCHMARK = load_benchmark("debug")
MODEL = {"name": "nin", "depth": 1, "width": 1}
SHARED = {"data": "debug", "test_domain": "debug1", "model": MODEL, "accelerator": "cpu", "batch_size": 8}
SHORT = {"updates": 9, "eval_every": 4, "lr": 0.02}
RULES = ("logits", "probs", "vote")
RUNS = {
    **{f"lsq/seed{seed}": {"method": "qt-dog", "quantize_at": 3, "seed": seed} for seed in range(3)},
    **{f"erm/seed{seed}": {"method": "erm", "seed": seed} for seed in (2, 10)},
    **{f"sma/seed{seed}": {"method": "sma", "average": {"first": 2}, "seed": seed} for seed in range(2)},
    "lr0": {"method": "erm", "lr": 0.001},
    "lr1": {"method": "erm", "lr": 0.01},
    "lr2": {"method": "erm", "lr": 0.03, "weight_decay": 1e-4},
    "bits4": {"method": "qt-dog", "quantize_at": 3, "bits": 4},
    "split": {"method": "erm", "split_seed": 4},
    "target": {"method": "erm", "test_domain": "debug2"},
    "domains": {"method": "erm", "domains": "debug0,debug1"},
    "network": {"method": "erm", "model": {**MODEL, "depth": 2}},
    "oracle": {"method": "erm", "selection": "oracle"},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All RUNS."""
    torch.set_num_threads(1)
    folder, fabric = tmp_path_factory.mktemp("runs"), Fabric(accelerator="cpu", devices=1)
    benchmarks = {None: BENCHMARK, "debug0,debug1": load_benchmark("debug", ["debug0", "debug1"])}
    for name, given in RUNS.items():
        config = resolve(Config(**{**SHARED, **SHORT, **given}))
        trainer.run(config, benchmarks[config.domains], folder / name, fabric)
    return folder


@pytest.fixture
def combine(root, capsys):
    """Runs the command; returns its report."""

    def run(*words: object) -> dict:
        capsys.readouterr()
        names = [root / word if str(word) in RUNS or str(word) in ("lsq", "erm", "sma") else word for word in words]
        assert cli.main(["combine", "--json", "--accelerator", "cpu", *map(str, names)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(root, capsys):
    """Runs the command; returns the one line of its error."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert cli.main(["combine", "--accelerator", "cpu", *map(str, words)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("qdeploy: error: expected ") and said.err.count("\n") == 1
        return said.err.removeprefix("qdeploy: error: ").rstrip()

    return run


def part(domain: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images as the networks take them, and classes: 80 % of a held-out domain, or 20 % of a source."""
    positions = split(60, domain, 0)[0 if held_out else 1]
    found = BENCHMARK.domains[domain]
    return (found.images[positions] / np.float32(255)).astype(np.float32), found.labels[positions]


def answers(folder: Path, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return load_trained(folder, BENCHMARK)(torch.from_numpy(images)).numpy().astype(np.float64)


def decided(logits: np.ndarray, rule: str) -> np.ndarray:
    """Classes [N] from logits [M, N, K], in float64."""
    mean = logits.mean(0)
    if rule == "logits":
        return mean.argmax(-1)
    if rule == "probs":
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return (powers / powers.sum(-1, keepdims=True)).mean(0).argmax(-1)
    classes = []
    for votes, scores in zip(logits.argmax(-1).T, mean, strict=True):
        counts = np.bincount(votes, minlength=logits.shape[-1])
        first = [k for k in range(logits.shape[-1]) if counts[k] == counts.max()]
        classes.append(max(first, key=lambda k: scores[k]))
    return np.array(classes)


# ---- Ensembles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "members"),
    [
        (["lsq"], "EoQ", ["lsq/seed0", "lsq/seed1", "lsq/seed2"]),
        (["lsq", "--rule", "eoq"], "EoQ", ["lsq/seed0", "lsq/seed1", "lsq/seed2"]),
        (["erm", "--rule", "erm-ensemble"], "ERM ensemble", ["erm/seed2", "erm/seed10"]),
        (["sma", "--rule", "eoa"], "EoA", ["sma/seed0", "sma/seed1"]),
        (["sma/seed0", "lr1"], "ensemble", ["sma/seed0", "lr1"]),
    ],
)
def test_an_ensemble_decides_by_each_rule_as_numpy_does(combine, root, given, kind, members):
    report = combine(*given)
    images, labels = part(1, held_out=True)
    logits = np.stack([answers(root / name, images) for name in members])
    assert report["kind"] == kind and report["runs"] == [str(root / name) for name in members]
    for rule in RULES:
        accuracy = (decided(logits, rule) == labels).mean()
        assert report["ensemble"][rule] == pytest.approx(accuracy, abs=1e-6)
        assert report["ensemble_tests"][rule] == {"debug1": report["ensemble"][rule]}
    assert "file" not in report and "average" not in report


class Constant(nn.Module):
    """One answer to all images."""

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_the_rules_are_not_the_same():
    """Mean logit says class 0, mean probability 1, votes 2."""
    nets = [Constant(40, 0, 0, -9), Constant(0, 20, 0, -9), *[Constant(0, 0.05, 0.1, -9)] * 3]
    config = resolve(Config(**SHARED, **SHORT, method="erm"))
    labels = part(1, held_out=True)[1]
    found = judging.judge(nets, config, BENCHMARK, torch.device("cpu"))["rules"]
    for said, rule in enumerate(RULES):
        assert found[rule]["test"] == pytest.approx((labels == said).mean(), abs=1e-6)
    assert {rule: decided(np.stack([[net.logits.numpy()] for net in nets]), rule)[0] for rule in RULES} == {
        "logits": 0,
        "probs": 1,
        "vote": 2,
    }


@pytest.mark.parametrize("rule", ["logits", "probs"])
def test_the_file_of_an_ensemble_has_the_codes_of_its_members(combine, root, tmp_path, rule):
    path = tmp_path / "eoq.safetensors"
    report = combine("lsq", "--out", path, "--combine", rule)
    graph, model = format.load(path), qdeploy.load_int_model(path)
    assert graph.combine == rule and len(graph.members) == 3
    images, labels = part(1, held_out=True)
    assert model(images).tobytes() == reference.run(graph, images).tobytes()
    logits = []
    for member, folder in zip(graph.members, report["runs"], strict=True):
        net, nodes = load_trained(Path(folder), BENCHMARK), {node.name: node for node in member.nodes}
        layers = {name: layer for name, layer in net.named_modules() if weight_quantizer(layer) is not None}
        assert len(layers) == 3
        for name, layer in layers.items():
            quantizer = weight_quantizer(layer)
            codes = quantizer.codes(weight_before(layer, quantizer)).detach().numpy()
            assert np.array_equal(nodes[name].constants["weight"], codes)
        logits.append(answers(Path(folder), images))
    int8 = model.predict(images)
    file = report["file"]
    assert file["path"] == str(path) and file["bytes"] == path.stat().st_size
    assert file["test"] == pytest.approx((int8 == labels).mean(), abs=1e-6)
    assert file["agreement"] == pytest.approx((int8 == decided(np.stack(logits), rule)).mean(), abs=1e-6)
    assert len(report["layers"]) == 3


def test_training_ends_with_the_same_file_and_table(root, tmp_path, capsys):
    words = "train --data debug --test-domain debug1 --accelerator cpu --updates 5 --quantize-at 1 --eval-every 2"
    words += f" --batch-size 4 --seeds 2 --out {tmp_path / 'run'}"
    assert cli.main(words.split()) == 0
    table = capsys.readouterr().out
    out = tmp_path / "again.safetensors"
    assert cli.main(["combine", str(tmp_path / "run"), "--accelerator", "cpu", "--out", str(out)]) == 0
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert first == "EoQ: 2 runs that differ in seed (0, 1)"
    assert rest == table.replace(str(tmp_path / "run" / "eoq.safetensors"), str(out))
    assert out.read_bytes() == (tmp_path / "run" / "eoq.safetensors").read_bytes()


def test_members_may_have_other_bits(combine, tmp_path):
    report = combine("lsq/seed0", "bits4", "--out", tmp_path / "m")
    assert report["differ"] == {"bits": [7, 4]}
    bits = [{node.bits for node in member.nodes if node.bits} for member in format.load(tmp_path / "m").members]
    assert bits == [{7, 8}, {4, 8}]


def test_networks_in_float_are_rounded_for_a_file_where_that_is_asked_for(combine, refused, root, tmp_path, capsys):
    path = tmp_path / "m"
    expected = "expected --fallback-bits for a file of networks in float (ERM ensemble), got none - at --out"
    assert refused(root / "erm", "--out", path) == expected and not path.exists()
    report = combine("erm", "--out", path, "--fallback-bits", "5")
    bits = [{node.bits for node in member.nodes if node.bits} for member in format.load(path).members]
    assert bits == [{5}, {5}] and 0 <= report["file"]["agreement"] <= 1
    words = ["combine", root / "erm", "--accelerator", "cpu", "--out", path, "--fallback-bits", "8"]
    assert cli.main([*map(str, words)]) == 0
    assert capsys.readouterr().out.endswith("\nweights that were in float are rounded to 8 bits in the file\n")


# ---- Averages --------------------------------------------------------------------------------------------------------


def states(names: list[Path]) -> list[dict[str, np.ndarray]]:
    found = [load_trained(name, BENCHMARK).state_dict() for name in names]
    return [{key: value.numpy() for key, value in state.items()} for state in found]


def assert_mean(found: dict[str, torch.Tensor], of: list[dict[str, np.ndarray]]) -> None:
    """Of floats to a rounding; integers are those of the first."""
    for key, value in found.items():
        if value.is_floating_point():
            mean = np.mean([state[key].astype(np.float64) for state in of], axis=0)
            np.testing.assert_allclose(value.numpy(), mean, rtol=1e-5, atol=1e-7)
        else:
            assert np.array_equal(value.numpy(), of[0][key])


def accuracy_of(net: nn.Module, domain: int, held_out: bool) -> float:
    images, labels = part(domain, held_out)
    with torch.no_grad():
        return (net(torch.from_numpy(images)).numpy().argmax(-1) == labels).mean()


def test_diwa_is_the_mean_of_the_networks(combine, root, tmp_path):
    report = combine("lr0", "lr1", "lr2", "--rule", "diwa-uniform", "--state", tmp_path / "mean.pt")
    folders = [root / name for name in ("lr0", "lr1", "lr2")]
    state = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert_mean(state, states(folders))
    net = load_trained(root / "lr0", BENCHMARK)
    net.load_state_dict(state)
    average = report["average"]
    assert report["kind"] == "DiWA, uniform" and average["kept"] == report["runs"] == [*map(str, folders)]
    assert average["test"] == average["tests"]["debug1"] == pytest.approx(accuracy_of(net, 1, True), abs=1e-6)
    validation = np.mean([accuracy_of(net, 0, False), accuracy_of(net, 2, False)])
    assert average["validation"] == pytest.approx(validation, abs=1e-6)
    assert report["differ"] == {"lr": [0.001, 0.01, 0.03], "weight_decay": [0.0, 0.0, 1e-4]}
    assert "ensemble" not in report and "file" not in report


def test_diwa_restricted_keeps_a_run_where_validation_does_not_fall(combine, root, tmp_path):
    report = combine("lr0", "lr1", "lr2", "--rule", "diwa-restricted", "--state", tmp_path / "mean.pt")
    folders = [root / name for name in ("lr0", "lr1", "lr2")]
    recorded = {folder: json.loads((folder / "done.json").read_text())["selected"]["validation"] for folder in folders}
    net, kept, best = load_trained(root / "lr0", BENCHMARK), [], -1.0
    for folder in sorted(folders, key=lambda folder: -recorded[folder]):
        mean = {key: np.mean([one[key] for one in states([*kept, folder])], axis=0) for key in net.state_dict()}
        net.load_state_dict({key: torch.as_tensor(value) for key, value in mean.items()})
        validation = np.mean([accuracy_of(net, 0, False), accuracy_of(net, 2, False)])
        if validation >= best:
            kept, best = [*kept, folder], validation
    assert report["kind"] == "DiWA, restricted" and report["average"]["kept"] == [*map(str, kept)]
    assert report["average"]["validation"] == pytest.approx(best, abs=1e-6)
    assert_mean(torch.load(tmp_path / "mean.pt", weights_only=True), states(kept))


def numbers(*values: float) -> nn.Module:
    net = nn.BatchNorm1d(len(values))
    net.weight.data.copy_(torch.tensor(values))
    return net


def test_restricted_goes_by_the_average_and_counts_each_network_once():
    nets = [("a", numbers(0, 1)), ("b", numbers(4, 1)), ("c", numbers(-2, 3)), ("d", numbers(1, 5))]
    seen: list[list[float]] = []

    def accuracy(net: nn.Module) -> float:
        seen.append(net.weight.tolist())
        return {0.0: 0.5, 2.0: 0.4, -1.0: 0.5}.get(seen[-1][0], 0.75)

    average, kept = diwa_restricted(nets, accuracy)
    assert seen[:3] == [[0, 1], [2, 1], [-1, 2]]  # b makes it worse, c as good
    assert seen[3] == pytest.approx([-1 / 3, 3])
    assert kept == ["a", "c", "d"] and average.weight.tolist() == seen[3]
    assert nets[0][1].weight.tolist() == [0, 1]


def test_the_mean_of_equal_networks_is_that_network():
    torch.manual_seed(0)
    net = MODELS["nin"](4, 1, depth=1, width=1)
    mean = diwa_uniform([(str(i), net) for i in range(3)])
    assert mean is not net
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in mean.state_dict().items())


def test_what_has_no_average():
    for reduce in (diwa_uniform, lambda nets: diwa_restricted(nets, lambda net: 0.5)):
        with pytest.raises(InputError, match="expected a network or more, got none - at DiWA"):
            reduce([])
        with pytest.raises(InputError, match="expected the tensors of the networks before it, got others - at two"):
            reduce([("one", numbers(1, 2)), ("two", numbers(1, 2, 3))])
        quantized = MODELS["nin"](4, 1, depth=1, width=1)
        quantize_(quantized, 7)
        with pytest.raises(InputError, match="network in float, which DiWA averages, got a quantized one - at q"):
            reduce([("q", quantized)])


def test_an_average_exports_where_rounding_is_asked_for(combine, refused, root, tmp_path):
    words = ["lr0", "lr1", "--rule", "diwa-uniform", "--out", tmp_path / "m"]
    expected = "expected --fallback-bits for a file of networks in float (diwa-uniform), got none - at --out"
    assert refused(root / "lr0", root / "lr1", *words[2:]) == expected
    report = combine(*words, "--fallback-bits", "8")
    graph, model = format.load(tmp_path / "m"), qdeploy.load_int_model(tmp_path / "m")
    images, labels = part(1, held_out=True)
    assert len(graph.members) == 1 and model(images).tobytes() == reference.run(graph, images).tobytes()
    assert report["file"]["test"] == pytest.approx((model.predict(images) == labels).mean(), abs=1e-6)


def test_a_run_starts_from_an_average(combine, tmp_path, fabric):
    """And seeds that share such a start, classifier included, can be averaged again."""
    combine("lr0", "lr1", "--rule", "diwa-uniform", "--state", tmp_path / "mean.pt")
    for seed in range(2):
        config = resolve(
            Config(**SHARED, updates=1, eval_every=1, method="erm", weights=str(tmp_path / "mean.pt"), seed=seed)
        )
        trainer.run(config, BENCHMARK, tmp_path / f"run/seed{seed}", fabric)
    done = [json.loads((tmp_path / f"run/seed{seed}/done.json").read_text()) for seed in range(2)]
    start = MODELS["nin"](4, 1, depth=1, width=1)
    start.load_state_dict(torch.load(tmp_path / "mean.pt", weights_only=True))
    assert done[0]["initial"] == done[1]["initial"] == network_hash(start)
    assert combine(tmp_path / "run", "--rule", "diwa-uniform")["differ"] == {"seed": [0, 1]}


def test_a_network_is_told_by_names_types_shapes_and_bytes():
    def net(*names: str, size: int = 2, kind: torch.dtype = torch.float32) -> nn.Module:
        found = nn.Module()
        for name in names:
            found.register_buffer(name, torch.zeros(size, dtype=kind))
        return found

    found = [net("a"), net("b"), net("a", size=3), net("a", kind=torch.bfloat16), net("a", kind=torch.int32)]
    found += [net("a", "b"), net("b", "a"), net("a")]
    found[-1].a[0] = 1
    assert len({network_hash(one) for one in found}) == len(found)
    assert network_hash(net("a", "b")) == network_hash(net("a", "b"))


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["lr0"], "expected two or more runs, got 1 - at {0}"),
        (["lr0", "lr0"], "expected every run once, got one twice - at {1}"),
        (["erm", "erm/seed2"], "expected every run once, got one twice - at {1}"),
        (["lr0", "split"], "{one}, split_seed=0, got split_seed=4 - at {1}"),
        (["lr0", "target"], "{one}, test_domain='debug1', got test_domain='debug2' - at {1}"),
        (["lr0", "network"], "{one}, model.depth=1, got model.depth=2 - at {1}"),
        (["lr0", "oracle"], "{one}, selection='validation', got selection='oracle' - at {1}"),
        (["lr0", "domains"], "expected the images of {0}, got no domain `debug2` - at {1}"),
        (["lr0", "lsq/seed0"], "expected a float network as in {0}, got a quantized one - at {1}"),
        (["lsq/seed0", "lr0"], "expected a quantized network as in {0}, got a float one - at {1}"),
        (["lr0", "lr1", "--rule", "eoq"], "expected runs for an EoQ, got those of an ERM ensemble - at --rule"),
        (["sma", "--rule", "erm-ensemble"], "expected runs for an ERM ensemble, got those of an EoA - at --rule"),
        (["lr0", "lr1", "--state", "x"], "expected diwa-uniform or diwa-restricted, got ensemble - at --state"),
        (
            ["lr0", "lr1", "--rule", "diwa-uniform", "--combine", "probs"],
            "expected an ensemble, got diwa-uniform - at --combine",
        ),
        (
            ["lsq/seed0", "bits4", "--rule", "diwa-uniform"],
            "expected a network in float, which DiWA averages, got a quantized one - at {0}",
        ),
        (
            ["lr0", "erm/seed2", "--rule", "diwa-restricted"],
            "expected a run that began with the network of {0}, classifier included, got another - at {1}",
        ),
    ],
)
def test_runs_that_do_not_go_together(refused, root, names, text):
    words = [root / name if (root / name).exists() else name for name in names]
    one = "expected runs of one network, split, held-out domain and selection"
    assert refused(*words) == text.format(*words, one=one)


def test_other_classes_and_an_unfinished_run_are_named_before_a_network_is_loaded(refused, root, tmp_path, monkeypatch):
    monkeypatch.setattr("qdeploy.training.selected_network.load_trained", pytest.fail)
    other = shutil.copytree(root / "lr1", tmp_path / "other")
    done = json.loads((other / "done.json").read_text())
    done["images"]["classes"][-1] = "z"
    (other / "done.json").write_text(json.dumps(done))
    assert refused(root / "lr0", other) == f"expected the images of {root / 'lr0'}, got no class `d` - at {other}"
    (other / "done.json").unlink()
    expected = "expected the folder of a finished run (OUT/seed0 of `qdeploy train`), got no done.json"
    assert refused(root / "lr0", other) == f"{expected} - at {other}"
    unfinished = Path(shutil.copytree(root / "lsq", tmp_path / "lsq")) / "seed1"
    (unfinished / "done.json").unlink()
    assert refused(tmp_path / "lsq") == f"{expected} - at {unfinished}"
    assert refused(root / "lr0", root) == f"{expected} - at {root}"
    (other / "done.json").write_text("{}")
    damaged = f"expected a file written by a run, got a damaged one: delete it - at {other / 'done.json'}"
    assert refused(root / "lr0", other) == damaged


@pytest.mark.parametrize("option", ["--out", "--state"])
def test_a_file_that_cannot_be_written_is_named_before_any_loading(refused, root, tmp_path, monkeypatch, option):
    monkeypatch.setattr("qdeploy.training.selected_network.load_trained", pytest.fail)
    words = [root / "lr0", root / "lr1", "--rule", "diwa-uniform", "--fallback-bits", "8", option]
    assert "got a folder that does not exist - at " in refused(*words, tmp_path / "no" / "x")
    assert "got something that is not a regular file - at " in refused(*words, tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "the following arguments are required: RUN"),
        (["x", "--rule", "best"], "argument --rule: invalid choice: 'best'"),
        (["x", "--combine", "vote"], "argument --combine: invalid choice: 'vote'"),
        (["x", "--fallback-bits", "9"], "argument --fallback-bits: invalid choice: 9"),
    ],
)
def test_words_that_are_none(capsys, words, text):
    with pytest.raises(SystemExit) as stop:
        cli.main(["combine", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"qdeploy: error: {text}") and said.count("\n") == 1


def test_bits_of_a_file_that_nobody_asked_for_are_refused(root, refused):
    assert (
        refused(root / "erm", "--fallback-bits", "8") == "expected the file to write, got none - at --fallback-bits 8"
    )


def test_a_device_that_is_not_here(root, capsys):
    assert cli.main(["combine", str(root / "erm"), "--accelerator", "tpu"]) == 2
    assert capsys.readouterr().err.endswith(" - at --accelerator\n")
