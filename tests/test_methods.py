"""Every row of METHODS: it makes updates, resumes, goes with every average, and its network exports with its codes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric
from test_training import assert_same_outcome
from torch import Tensor, nn
from torch.nn import functional

import qdeploy
from qdeploy import cli, format, reference
from qdeploy.errors import InputError
from qdeploy.training import MODELS, quantize_finished, trainer
from qdeploy.training.attached_quantizers import quantizers, weight_before, weight_quantizer
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.evaluation import apply, evaluation_sets
from qdeploy.training.finished_runs import export_networks
from qdeploy.training.learner import Learner
from qdeploy.training.methods import AXES, METHODS
from qdeploy.training.methods.objectives import Objective
from qdeploy.training.minibatches import RunImages
from qdeploy.training.selected_network import load_trained
from qdeploy.training.start import build_network

BENCHMARK = load_benchmark("debug")
UPDATES = 9
BASE = Config(data="debug", test_domain="debug1", updates=UPDATES, eval_every=1, batch_size=4, accelerator="cpu")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:expected a network that qdeploy.export can write"),  # the transformer
]


class TinyViT(nn.Module):
    """One head, 4 x 4 patches of 16 x 16 images, a class token; written with operators that an export may lack."""

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
            x = x + self.proj(functional.scaled_dot_product_attention(q, k, v))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    def __init__(self, classes: int, in_channels: int, width: int = 16):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 8)
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@pytest.fixture(autouse=True, scope="module")
def text_features(tmp_path_factory):
    """Of four classes, 8 numbers each."""
    global TEXT_FEATURES
    TEXT_FEATURES = tmp_path_factory.mktemp("text") / "features.npy"
    np.save(TEXT_FEATURES, np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32))


@pytest.fixture(autouse=True)
def tiny_vit(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny-vit", TinyViT)


def settings(name: str, **given: object) -> Config:
    """Of a row, with a small network of its kind and its options for a run of nine updates."""
    row = METHODS[name]
    network = {"name": "nin", "depth": 2, "width": 1} if name in CONVOLUTIONAL else "tiny-vit"
    options: dict[str, object] = {"model": network}
    if "clip" in name:
        options["text_features"] = str(TEXT_FEATURES)
    if "quantize_at" not in given and takes_switch(name):
        options["quantize_at"] = 3
    if row.step == "gaqat":
        options["step"] = {"K": 2, "r": 0.5}
    if "swad" in str(given.get("average", row.average)):
        options["average"] = {"name": "swad", "converge": 2, "patience": 3}
    return resolve(replace(BASE, method=name, **{**options, **given}))


def takes_switch(name: str) -> bool:
    return str(METHODS[name].quantization) not in ("none", "uniform-noise", "rtn", "obc")


CONVOLUTIONAL = [name for name in METHODS if "vit" not in name and "clip" not in name]
OF_UPDATES = [name for name, row in METHODS.items() if row.quantization not in ("rtn", "obc")]


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def minibatches(config: Config, t: int) -> list[tuple[Tensor, Tensor]]:
    return RunImages(config, BENCHMARK, fabric(), {}, t, False).minibatches(nullcontext)


def learner_of(config: Config) -> Learner:
    return Learner(build_network(config, BENCHMARK), config, fabric())


@pytest.mark.parametrize("name", OF_UPDATES)
def test_a_method_moves_what_trains_and_nothing_else(name):
    """Before its switch and after it; a frozen tensor keeps its bits. INQ holds weights on their grids."""
    config = settings(name)
    learner = learner_of(config)
    for t in range(UPDATES):
        before = {key: p.detach().clone() for key, p in learner.net.named_parameters()}
        loss = learner.update(t, minibatches(config, t))
        assert loss.isfinite() and loss.shape == () and not loss.requires_grad
        for key, p in learner.net.named_parameters():
            if key in before and not (config.quantization.name == "inq" and t >= 3 and key.endswith("original")):
                assert torch.equal(p, before[key]) != p.requires_grad, (t, key)
    assert bool(quantizers(learner.net)) == (takes_switch(name))


@pytest.mark.parametrize("name", OF_UPDATES)
def test_a_run_killed_after_every_update_equals_one_that_was_not(name, tmp_path, monkeypatch):
    """Before, at and after the switch, after an evaluation and between two: network, log, table of step sizes and model
    file are the same to the byte."""
    config = settings(name, eval_every=2, checkpoint_minutes=0)
    trainer.run(config, BENCHMARK, tmp_path / "whole", fabric())
    update = Learner.update
    for stop in range(1, UPDATES):

        def killed(self, t, minibatches, stop=stop):
            if t == stop:
                raise KeyboardInterrupt
            return update(self, t, minibatches)

        monkeypatch.setattr(Learner, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(config, BENCHMARK, tmp_path / "parts", fabric())
    monkeypatch.setattr(Learner, "update", update)
    trainer.run(config, BENCHMARK, tmp_path / "parts", fabric())
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
    if takes_switch(name) and name in CONVOLUTIONAL:
        for folder in (tmp_path / "whole", tmp_path / "parts"):
            export_networks([load_trained(folder, BENCHMARK)], config, BENCHMARK, folder / "model.safetensors")
        whole, parts = (tmp_path / part / "model.safetensors" for part in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("name", sorted({*METHODS} - {*OF_UPDATES}))
def test_a_finished_network_is_quantized_again_after_a_kill(name, tmp_path, monkeypatch, float_runs):
    """These rows make no updates: what was not finished is made anew."""
    config = settings(name, float_runs=str(float_runs))
    trainer.run(config, BENCHMARK, tmp_path / "whole", fabric())
    for function in ("evaluated", "write_selected"):

        def killed(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(quantize_finished, function, killed)
            with pytest.raises(KeyboardInterrupt):
                trainer.run(config, BENCHMARK, tmp_path / "parts", fabric())
    trainer.run(config, BENCHMARK, tmp_path / "parts", fabric())
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def with_averages() -> list[tuple[str, str]]:
    """Every quantization with its step meets every average; methods that share both take turns, one or more each."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name in OF_UPDATES:
        if METHODS[name].average == "none":
            alike.setdefault((str(METHODS[name].quantization), str(METHODS[name].step)), []).append(name)
    return [(names[i % len(names)], average) for names in alike.values() for i, average in enumerate(AXES["average"])]


@pytest.mark.parametrize(("name", "average"), with_averages())
def test_a_method_goes_with_every_average(name, average, tmp_path):
    """What is selected is the average, of quantized networks where the method quantizes, and it comes back."""
    config = settings(name, average=average)
    selected = trainer.run(config, BENCHMARK, tmp_path, fabric())
    net = load_trained(tmp_path, BENCHMARK)
    assert selected["eligible"] and bool(quantizers(net)) == takes_switch(name)
    domain = BENCHMARK.domains[1]
    _, positions = evaluation_sets(config, BENCHMARK)["debug1_in"]
    with torch.no_grad():
        classes = apply(net, BENCHMARK, 1, positions).argmax(1).numpy()
    assert (classes == domain.labels[positions]).mean() == selected["test"]


# ---- Export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_runs(tmp_path_factory):
    """The folder of a finished run in float, for what quantizes such runs."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("float")
    trainer.run(settings("erm"), BENCHMARK, out / "seed0", fabric())
    return out


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_network_of_a_method_exports_with_the_codes_of_training(name, tmp_path, float_runs):
    """The engine computes what the reference does, to the bit. What stayed float is rounded to 8 bits, and said so."""
    given = {"float_runs": str(float_runs)} if name not in OF_UPDATES else {}
    config = settings(name, **given)
    trainer.run(config, BENCHMARK, tmp_path / "run", fabric())
    net = load_trained(tmp_path / "run", BENCHMARK)
    x = BENCHMARK.inputs.for_network(torch.from_numpy(BENCHMARK.domains[1].images))
    fallback = None if quantizers(net) else 8
    report = qdeploy.export(net, x[:2], tmp_path / "m.safetensors", calibration=[x], fallback_bits=fallback)
    assert_codes_of_training(net, tmp_path / "m.safetensors", fallback)
    rounded = {row.name for row in report.layers if row.quantizer == "rounded"}
    assert rounded >= {"classifier.conv"} and (fallback == 8 or rounded == {"classifier.conv"})
    model = qdeploy.load_int_model(tmp_path / "m.safetensors")
    graph = format.load(tmp_path / "m.safetensors")
    assert model(x.numpy()).tobytes() == reference.run(graph, x.numpy()).tobytes()


def assert_codes_of_training(net: nn.Module, path, fallback: int | None) -> None:
    nodes = {node.name: node for node in format.load(path).members[0].nodes}
    layers = {key: layer for key, layer in net.named_modules() if weight_quantizer(layer) is not None}
    assert bool(layers) == (fallback is None)
    for key, layer in layers.items():
        quantizer = weight_quantizer(layer)
        codes = quantizer.codes(weight_before(layer, quantizer)).detach().numpy()
        assert np.array_equal(nodes[key].constants["weight"], codes)
        assert format.pack_codes(codes.astype(np.int8), quantizer.bits).tobytes() in path.read_bytes()


@pytest.mark.parametrize("bits", [3, 4])
def test_gaqat_at_three_and_four_bits_clamps_its_inputs_in_the_engine(bits, tmp_path):
    """Unsigned inputs of b bits have codes to 2^b - 1: 7 and 15."""
    config = settings("gaqat", bits=bits, activation_bits=bits)
    trainer.run(config, BENCHMARK, tmp_path / "run", fabric())
    net = load_trained(tmp_path / "run", BENCHMARK)
    x = BENCHMARK.inputs.for_network(torch.from_numpy(BENCHMARK.domains[1].images))
    qdeploy.export(net, x[:2], tmp_path / "m.safetensors", calibration=[x])
    graph = format.load(tmp_path / "m.safetensors")
    names = [node.name for node in graph.members[0].nodes]
    _, taps = reference.run(graph, x.numpy(), taps=names)
    inner = [key.removesuffix(".input") for key, q in quantizers(net).items() if key.endswith("input") and not q.qmin]
    assert len(inner) == 6
    assert max(int(taps[name].max()) for name in names if taps[name].dtype == np.uint8) >= 2**bits - 1
    model = qdeploy.load_int_model(tmp_path / "m.safetensors")
    assert model(x.numpy()).tobytes() == reference.run(graph, x.numpy()).tobytes()


def test_the_first_convolution_as_gaqat_has_it_quantizes_its_input_alone(tmp_path, capsys):
    """Addendum to the paper: its weights train in float; the file has them with 8 bits, and the run says so."""
    words = "train --method gaqat --data debug --test-domain debug1 --accelerator cpu --updates 5 --step.K 2".split()
    words += ["--quantize-at", "1", "--eval-every", "2", "--batch-size", "4", "--out", str(tmp_path)]
    bits = ["--bits", "{'*': 4, features.0.conv: null}", "--activation-bits", "{'*': 4}"]
    assert cli.main([*words, *bits]) == 0
    assert "weights that trained in float have 8 bits in the file: features.0.conv" in capsys.readouterr().err
    net = load_trained(tmp_path / "seed0", BENCHMARK)
    names = [f"features.{i}.conv" for i in range(6)]
    assert [*quantizers(net)] == [f"{name}.{kind}" for name in names for kind in ("weight", "input")][1:]
    nodes = {node.name: node for node in format.load(tmp_path / "model.safetensors").members[0].nodes}
    assert [nodes[name].bits for name in (*names, "classifier.conv")] == [8, 4, 4, 4, 4, 4, 8]
    x = BENCHMARK.inputs.for_network(torch.from_numpy(BENCHMARK.domains[1].images)).numpy()
    model, graph = (load(tmp_path / "model.safetensors") for load in (qdeploy.load_int_model, format.load))
    assert model(x).tobytes() == reference.run(graph, x).tobytes()


def test_powers_of_two_above_four_bits_are_refused_by_name_before_the_first_update(tmp_path, capsys):
    words = "train --method inq-pow2 --bits 5 --data debug --test-domain debug1 --accelerator cpu --updates 9".split()
    assert cli.main([*words, "--quantize-at", "3", "--eval-every", "2", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("qdeploy: error: expected powers of two of 4 bits or less")
    assert said.endswith("got 5 bits, whose codes reach 2^7 - at layer `features.0.conv`")


# ---- One's own -------------------------------------------------------------------------------------------------------


class Weighted(Objective):
    """An objective as a user writes it."""

    def __init__(self, weight: float = 2.0):
        self.weight = weight

    def loss(self, net, minibatches, rng):
        return self.weight * sum(functional.cross_entropy(net(images), classes) for images, classes in minibatches)


def test_an_objective_of_ones_own_by_its_place(tmp_path, capsys):
    words = "train --method qt-dog --data debug --test-domain debug1 --accelerator cpu --updates 5".split()
    words += ["--quantize-at", "2", "--eval-every", "2", "--batch-size", "4", "--out", str(tmp_path)]
    own = ["--objective", f"{__name__}:Weighted", "--objective.weight", "3"]
    assert cli.main([*words, *own]) == 0
    assert f"objective {__name__}:Weighted, step plain" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").exists()
    assert cli.main([*words, "--objective", f"{__name__}:Weighted", "--objective.wait", "3"]) == 2
    said = capsys.readouterr().err
    assert said == f"qdeploy: error: expected an option of {__name__}:Weighted: weight, got 'wait' - at --objective\n"
    assert cli.main([*words, "--objective", f"{__name__}:Missing"]) == 2
    assert "has no attribute 'Missing' - at --objective\n" in capsys.readouterr().err


# ---- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_printed_as_they_are_read(name, tmp_path, capsys):
    words = ["train", "--method", name, "--data", "debug", "--test-domain", "debug1"]
    if name not in CONVOLUTIONAL:
        words += ["--model", "tiny-vit"]
    assert cli.main([*words, "--seed", "3", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(printed)
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_options_come_before_the_file_and_the_file_before_the_method(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "data: debug\ntest-domain: debug1\nmethod: sagm-lsq\n"
        "step: {name: sagm, rho: 0.2}\nlr: 1e-2\nbits: {'*': 5, 'features.0.*': 8}\n"
    )
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    assert cli.main([*words, "--step.rho=0.3", "--lr", "3e-4"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["step"] == {"name": "sagm", "rho": 0.3, "alpha": 0.001} and found["lr"] == 3e-4
    assert found["bits"] == {"*": 5, "features.0.*": 8} and found["quantization"]["init"] == "mse"
    # Another class on the axis takes none of its options.
    assert cli.main([*words, "--step", "sam"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["step"] == {"name": "sam", "rho": 0.05}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--steps", "9"], "got --steps (did you mean --step?) - at qdeploy train"),
        (["--step", "sgam"], "expected one of plain, sam, sagm, gaqat or package.module:Class, got 'sgam' - at --step"),
        (["--step", "sagm", "--step.roh", "1"], "expected an option of sagm: rho, alpha, got 'roh' - at --step"),
        (["--step.rho", "1"], "expected an option of plain: none, got 'rho' - at --step"),
        (["--step", "sam", "--step.rho", "x"], "expected a number, got 'x' - at --step.rho"),
        (["--step", "sam", "--step.rho", "-1"], "expected rho of 0 or more, got -1.0"),
        (["--step", "gaqat", "--step.r", "1.5"], "expected r from 0 to 1, got 1.5 - at GAQAT"),
        (["--step", "gaqat", "--step.K", "1"], "expected K of 2 updates or more, got 1 - at GAQAT"),
        (["--method", "best"], "got 'best' - at --method"),
        (["--quantization.bits", "4"], "got 'bits' (a setting of the run: --bits) - at --quantization"),
        (["--method", "erm", "--bits", "4"], "which nothing takes (objective erm, step plain, quantization none"),
        (
            ["--average", "swad", "--eval-every", "600"],
            "expected 3 evaluations or more of the network that is averaged",
        ),
        (
            ["--average", "swa", "--eval-every", "1400", "--quantize-at", "0"],
            "expected an evaluation in the last quarter",
        ),
        (
            ["--method", "inq", "--eval-every", "1500"],
            "expected an evaluation of what the method makes, got none in 2001",
        ),
        (["--selection", "best"], "expected one of validation, oracle, last, lowest-train-loss, got 'best' - at --sel"),
        (["--test-domain", "in-domain", "--selection", "oracle"], "expected a domain held out, got in-domain"),
        (["--config", "none.yaml"], "expected a file of settings, got No such file or directory - at none.yaml"),
        (["--method", "obc"], "expected the folder --out of finished float runs (`--method erm`), which obc"),
        (
            ["--method", "rtn", "--float-runs", "nowhere"],
            "expected a finished run in float, got no done.json - at nowh",
        ),
        (["--objective", "os:getcwd"], "expected a class that inherits from Objective (qdeploy.training.methods.objec"),
        (["--step", "collections:Counter"], "got the class Counter - at --step"),
        (["--optimizer", "sgd", "--optimizer.momentum", "-1"], "got ValueError: Invalid momentum value: -1"),
        (["--optimizer.betas", "[1]"], "expected [value, ...], got '[1]' - at --optimizer.betas"),
        (["--epochs", "2", "--updates", "5"], "expected --updates or --epochs, got both - at --epochs 2"),
        (["--objective", "nowhere:Loss"], "expected a class at nowhere:Loss, got No module named 'nowhere' - at --obj"),
    ],
)
def test_bad_settings_are_one_line(words, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--data", "debug", "--test-domain", "debug1", "--accelerator", "cpu", "--out", "run"]
    assert cli.main(["train", *given, *words]) == 2
    said = capsys.readouterr().err
    assert text in said.splitlines()[-1] and said.startswith("qdeploy: error: ") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_files_of_settings_that_are_none_are_named(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    for content, text in [
        ("a: [", "expected a file of settings in YAML, got another"),
        ("- 3", "expected settings by name, got list"),
        ("", "expected settings by name, got nothing"),
        ("stepp: sam", "got 'stepp' (did you mean step?)"),
    ]:
        path.write_text(content)
        assert cli.main(["train", "--config", str(path), "--print-config"]) == 2
        said = capsys.readouterr().err
        assert text in said and said.endswith(f" - at {path}\n") and said.count("\n") == 1


def test_epochs_are_counted_in_training_images(tmp_path, capsys):
    """Two sources of 48 images in updates of 2 x 4: an epoch is 12 updates."""
    words = "train --data debug --test-domain debug1 --accelerator cpu --batch-size 4 --epochs 3".split()
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    updates = [int(line.split()[3]) for line in err.splitlines() if line.startswith("seed 0 update")]
    assert updates == [0, 12, 24, 36] and "from update 14 on" in err  # 40 % of 37


@pytest.mark.parametrize("name", ["rtn", "obc"])
def test_finished_runs_are_quantized_as_they_are(name, float_runs, tmp_path):
    """The weights move to the nearest code (RTN) or by what makes up for the others (OBC); all else stays."""
    config = settings(name, float_runs=str(float_runs))
    record = trainer.run(config, BENCHMARK, tmp_path / "a", fabric())
    assert record == {**trainer.run(config, BENCHMARK, tmp_path / "a", fabric())}
    base = load_trained(float_runs / "seed0", BENCHMARK)
    net = load_trained(tmp_path / "a", BENCHMARK)
    assert record["update"] < UPDATES and len(quantizers(net)) == 6
    for key, layer in base.named_modules():
        for kind, tensor in layer._parameters.items():
            quantizer = weight_quantizer(net.get_submodule(key))
            now = getattr(net.get_submodule(key), kind)
            if kind == "weight" and quantizer is not None:
                step = quantizer.step.reshape(-1, *[1] * (tensor.dim() - 1))
                inside = (tensor / step).abs() < quantizer.qmax
                error = ((now - tensor) / step).abs()[inside].max()
                assert (error <= 0.5 + 1e-5) == (name == "rtn") and not torch.equal(now, tensor)
            else:
                assert torch.equal(now, tensor)
    with pytest.raises(InputError, match="expected a finished run in float, got one of (rtn|obc) - at .*seed0"):
        (tmp_path / "q").mkdir()
        (tmp_path / "q" / "seed0").symlink_to(tmp_path / "a")
        trainer.run(replace(config, float_runs=str(tmp_path / "q")), BENCHMARK, tmp_path / "b", fabric())
    with pytest.raises(InputError, match="expected a run like this one, got split_seed=0 instead of 1 - at"):
        trainer.run(replace(config, split_seed=1), BENCHMARK, tmp_path / "b", fabric())


# ---- BatchNorm, optimizers, schedules --------------------------------------------------------------------------------


def statistics_of(net: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in net.named_buffers() if "running" in name]


def test_frozen_statistics_stay_and_trained_ones_move():
    for mode, moves in [("frozen", False), ("trained", True), ("synchronized", True)]:
        config = settings("qt-dog", batch_norm=mode)
        learner = learner_of(config)
        before = [buffer.clone() for buffer in statistics_of(learner.net)]
        learner.update(0, minibatches(config, 0))
        changed = [not torch.equal(a, b) for a, b in zip(before, statistics_of(learner.net), strict=True)]
        assert changed == [moves] * len(before) and len(before) == 14


def test_statistics_are_made_anew_of_what_the_selected_network_sees(tmp_path):
    """The mean over the minibatches of 200 updates that would come next, by the network that is kept."""
    config = settings("qt-dog", batch_norm="re-estimated", selection="last")
    record = trainer.run(config, BENCHMARK, tmp_path / "a", fabric())
    trainer.run(replace(config, batch_norm="trained"), BENCHMARK, tmp_path / "b", fabric())
    anew, faded = load_trained(tmp_path / "a", BENCHMARK), load_trained(tmp_path / "b", BENCHMARK)
    for name, value in faded.named_parameters():
        assert torch.equal(value, anew.get_parameter(name))
    seen = []
    faded.train()
    hook = faded.features[0].bn.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for t in range(UPDATES, UPDATES + 200):
            images = torch.cat([x for x, _ in minibatches(replace(config, updates=t + 1), t)])
            faded.features[0].bn(faded.features[0].conv(images))
    hook.remove()
    mean = torch.stack([x.double().mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.double().transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    assert torch.allclose(anew.features[0].bn.running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(anew.features[0].bn.running_var.double(), variance, rtol=1e-4)
    _, positions = evaluation_sets(config, BENCHMARK)["debug1_in"]
    with torch.no_grad():
        classes = apply(anew, BENCHMARK, 1, positions).argmax(1).numpy()
    assert (classes == BENCHMARK.domains[1].labels[positions]).mean() == record["test"]


@pytest.mark.parametrize("optimizer", AXES["optimizer"])
@pytest.mark.parametrize("schedule", AXES["schedule"])
def test_learning_rates_follow_the_schedule_in_every_group(optimizer, schedule):
    config = settings("qt-dog", optimizer=optimizer, schedule=schedule, lr=0.1, weight_decay=0.5)
    learner = learner_of(config)
    for t in range(6):
        learner.update(t, minibatches(config, t))
        factor = learner.schedule.factor(t)
        rates = [(group["lr"], group["weight_decay"]) for group in learner.optimizer.param_groups]
        assert rates == [(0.1 * factor, 0.5), (1e-5 * factor, 0.0)][: 1 + (t >= 3)]
    assert type(learner.optimizer).__name__.lower() == optimizer


def test_gaqat_writes_what_its_step_sizes_do(tmp_path):
    config = settings("gaqat")
    trainer.run(config, BENCHMARK, tmp_path, fabric())
    rows = (tmp_path / "scales.csv").read_text().splitlines()
    assert rows[0] == "step,scale,s,sum_task,sum_smooth,disorder_task,disorder_smooth,frozen"
    # Step sizes come with update 3, windows of 2 end with 5 and 7; 6 layers, each with a weight and an input.
    assert [row.partition(",")[0] for row in rows[1:]] == ["5"] * 12 + ["7"] * 12


def test_a_linear_probe_trains_the_head_alone_and_runs_begin_with_it(tmp_path):
    """As DiWA asks for: the networks that are averaged began as one, its head included."""
    config = settings("erm", train_only="classifier.*", batch_norm="frozen")
    trainer.run(config, BENCHMARK, tmp_path / "probe", fabric())
    before = build_network(config, BENCHMARK).state_dict()
    probed = load_trained(tmp_path / "probe", BENCHMARK).state_dict()
    moved = {name for name in before if not torch.equal(before[name], probed[name])}
    assert moved == {f"classifier.{name}" for name in ("conv.weight", "conv.bias", "bn.weight", "bn.bias")}
    later = settings("erm", weights=str(tmp_path / "probe" / "model.pt"), seed=1)
    begun = build_network(later, BENCHMARK).state_dict()
    assert all(torch.equal(begun[name], probed[name]) for name in probed)
    with pytest.raises(
        InputError, match=r"expected a pattern of parameters \(features.0.conv.weight, .*got 'fc.*train-o"
    ):
        learner_of(settings("erm", train_only="fc.*"))


def test_networks_that_no_file_can_hold_yet_train_without_one(tmp_path, capsys):
    words = "train --method sd-vit+qt-dog --model tiny-vit --data debug --test-domain debug1 --accelerator cpu".split()
    words += "--updates 5 --quantize-at 2 --eval-every 2 --batch-size 4 --seeds 2".split() + ["--out", str(tmp_path)]
    assert cli.main(words) == 2
    assert "expected" in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.glob("seed0/*"))
    assert cli.main([*words, "--no-export"]) == 0
    out = capsys.readouterr().out
    assert "ensemble, logits" in out and "int8" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1", "summary.json"]


@pytest.mark.parametrize(
    ("name", "network"),
    [("mixstyle+qt-dog", "resnet18"), ("gaqat", "resnet18"), ("gaqat", "mobilenet_v1_32px")],
)
def test_other_networks_export_with_the_codes_of_training(name, network, tmp_path):
    config = settings(name, model=network, updates=4, quantize_at=2, batch_size=2)
    data = [replace(domain, images=domain.images.repeat(2, 2).repeat(2, 3)) for domain in BENCHMARK.domains]
    benchmark = replace(BENCHMARK, domains=data)  # 32 x 32
    trainer.run(config, benchmark, tmp_path / "run", fabric())
    net = load_trained(tmp_path / "run", benchmark)
    x = benchmark.inputs.for_network(torch.from_numpy(data[1].images[:8]))
    qdeploy.export(net, x[:2], tmp_path / "m.safetensors", calibration=[x])
    assert_codes_of_training(net, tmp_path / "m.safetensors", None)
    model, graph = (load(tmp_path / "m.safetensors") for load in (qdeploy.load_int_model, format.load))
    assert model(x[:2].numpy()).tobytes() == reference.run(graph, x[:2].numpy()).tobytes()
