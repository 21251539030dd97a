"""The protocol, the learner and the training loop, on small random images."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import nn

import qdeploy
from qdeploy import reference
from qdeploy.errors import InputError
from qdeploy.graph import COMBINE
from qdeploy.kernels import ensemble
from qdeploy.kernels.ensemble import combine
from qdeploy.training import command, processes, trainer
from qdeploy.training.attached_quantizers import quantizers, step_parameters
from qdeploy.training.config import SELECTIONS, Config, plain, resolve
from qdeploy.training.domains import load_benchmark
from qdeploy.training.evaluation import apply, evaluation_sets, select
from qdeploy.training.learner import Learner
from qdeploy.training.minibatches import RunImages, sample, split
from qdeploy.training.models import MODELS
from qdeploy.training.progress import progress_of_run
from qdeploy.training.seeds import seed_hash
from qdeploy.training.selected_network import load_trained
from qdeploy.training.start import build_network
from qdeploy.training.trainer import run

BASE = Config(data="debug", test_domain="debug1", updates=9, eval_every=2, batch_size=8, accelerator="cpu")
SMALL = resolve(replace(BASE, quantize_at=3))
BENCHMARK = load_benchmark("debug")


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_learner(fabric, config):
    torch.manual_seed(0)
    return Learner(MODELS["nin"](4, 1, depth=1, width=1), resolve(config), fabric)


def minibatches(number, config=SMALL):
    images = RunImages(config, BENCHMARK, Fabric(accelerator="cpu", devices=1), {}, number, False)
    return images.minibatches(nullcontext)


# ---- Protocol --------------------------------------------------------------------------------------------------------


def test_split_is_that_of_domainbed():
    assert [seed_hash(0, i) for i in range(4)] == [894182419, 1514274641, 1325548499, 1796103049]
    assert seed_hash(1, 0) == 785910682
    training, validation = split(1003, 2, 0)
    assert len(validation) == 200
    assert sorted([*training, *validation]) == list(range(1003))
    keys = list(range(1003))
    np.random.RandomState(1325548499).shuffle(keys)
    assert [*validation, *training] == keys


def test_samples_are_a_function_of_seed_update_and_domain():
    drawn = sample(3, 77, 1, 50, 4000)
    assert np.array_equal(drawn, sample(3, 77, 1, 50, 4000))
    assert set(drawn) == set(range(50))  # with replacement, every image can come
    for other in [(4, 77, 1), (3, 78, 1), (3, 77, 2)]:
        assert not np.array_equal(drawn, sample(*other, 50, 4000))


def test_minibatches_hold_training_images_of_the_sources():
    for domain, (images, classes) in zip((0, 2), minibatches(5), strict=True):
        source = BENCHMARK.domains[domain]
        keys, _ = split(60, domain, 0)
        picked = keys[sample(0, 5, domain, len(keys), 8)]
        assert torch.equal(images, BENCHMARK.inputs.for_network(source.batch(picked)))
        assert classes.tolist() == source.labels[picked].tolist()


def test_selection_ignores_records_before_the_switch():
    accuracies = [(0, 0.5), (100, 0.99), (200, 0.7), (300, 0.8), (400, 0.8)]
    records = [{"update": s, "validation": v, "eligible": s >= 200} for s, v in accuracies]
    assert select(records, "validation", [])["update"] == 300  # the first of equals
    assert select([{**record, "eligible": True} for record in records], "validation", [])["update"] == 100
    assert select(records[:2], "validation", []) is None


def test_a_network_is_selected_by_the_rule_that_is_asked_for():
    rows = [(0, 0.1, 0.9, 0.9), (1, 0.6, 0.2, 0.8), (2, 0.5, 0.7, 0.3), (3, 0.5, 0.7, 0.3), (4, 0.4, 0.1, 0.5)]
    records = [
        {"update": t, "eligible": t > 0, "validation": v, "loss": loss, "accuracy": {"a_out": a, "b_out": 0.5}}
        for t, v, a, loss in rows
    ]
    found = {rule: select(records, rule, ["a"])["update"] for rule in SELECTIONS}
    assert found == {"validation": 1, "oracle": 2, "last": 4, "lowest-train-loss": 2}
    assert select(records, "oracle", ["a", "b"])["update"] == 2


def test_ensembles_average_logits_or_probabilities():
    """The example in which the two rules disagree: the mean of logits is the rule of EoQ."""
    logits = torch.tensor([[[10.0, 0.0, 9.0]], [[0.0, 3.0, 0.5]], [[0.0, 3.0, 0.5]]])
    assert combine(logits, "logits")[1].tolist() == [0]
    assert combine(logits, "probs")[1].tolist() == [1]
    assert combine(logits, "vote")[1].tolist() == [1]
    for scale in (1.0, 1e4):
        logits = torch.randn(5, 64, 7, generator=torch.Generator().manual_seed(0)) * scale
        exact = logits.double().numpy()
        expected = {"logits": exact.mean(0), "probs": exact}
        for rule, values in expected.items():
            powers = np.exp(values - values.max(-1, keepdims=True))
            p = powers / powers.sum(-1, keepdims=True)
            p = p if rule == "logits" else p.mean(0)
            found, classes = combine(logits, rule)
            np.testing.assert_allclose(found.numpy(), p, rtol=1e-3, atol=1e-6)
            assert (np.take_along_axis(p, classes.numpy()[:, None], 1)[:, 0] >= p.max(-1) - 1e-6).all()
    with pytest.raises(InputError, match="expected rule logits, probs or vote, got 'mean'"):
        combine(logits, "mean")


def test_votes_that_tie_follow_the_mean_logit():
    logits = torch.tensor([[[5.0, 0.0, 4.0]], [[0.0, 6.0, 5.5]]])  # one vote each for 0 and 1, none for 2
    assert combine(logits, "vote")[1].tolist() == [1]
    assert combine(logits, "logits")[1].tolist() == [2]


@pytest.mark.parametrize("rule", COMBINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ensemble_is_judged_with_the_bits_of_its_file(dtype, rule, monkeypatch):
    monkeypatch.setattr(ensemble, "ELEMENTS_PER_PIECE", 3 * 7)  # 50 rows of 7 in many pieces, the last one short
    logits = torch.randn(5, 50, 7, generator=torch.Generator().manual_seed(0)).mul_(9).to(dtype).requires_grad_()
    expected, scores = reference.combine(list(logits.detach().float().numpy()), rule)
    found, classes = combine(logits, rule)
    assert np.array_equal(found.numpy().view(np.int32), expected.view(np.int32))
    assert np.array_equal(classes.numpy(), scores.argmax(-1))


@pytest.mark.parametrize("rule", COMBINE)
def test_logits_that_are_not_finite_spoil_their_image_alone(rule):
    logits = torch.zeros(2, 6, 3)
    logits[0, 0, 2] = torch.nan
    logits[1, 1, 0] = torch.inf
    logits[:, 2] = torch.inf
    logits[0, 3] = -torch.inf
    logits[:, 4, 1] = -torch.inf  # a class that cannot be
    found, classes = combine(logits, rule)
    assert found.isnan().all(1).tolist() == [True] * 4 + [False] * 2
    assert found[4].tolist() == [0.5, 0, 0.5] and found[5].unique().numel() == 1
    assert classes[4:].tolist() == [0, 0] and ((classes >= 0) & (classes < 3)).all()


def test_what_is_no_output_of_an_ensemble_is_refused():
    with pytest.raises(InputError, match=r"expected \[M, N, K\] with M and K > 0, got \[5, 3\]"):
        combine(torch.zeros(5, 3), "logits")
    with pytest.raises(InputError, match="expected float32, bfloat16 or float16, got torch.float64"):
        combine(torch.zeros(2, 5, 3, dtype=torch.float64), "probs")


# ---- One learner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_scale", ["tensor", "channel", "none"])
def test_weights_and_step_sizes_go_on_training_after_the_switch(fabric, grad_scale, monkeypatch):
    """A quantizer that puts new Parameters in the network and leaves the optimizer as it was trains neither weights nor
    step sizes from there on, and no error tells so."""
    learner = tiny_learner(fabric, replace(SMALL, quantization={"grad_scale": grad_scale}))
    for number in range(3):
        learner.update(number, minibatches(number))
        assert not quantizers(learner.net)
    weights = dict(learner.net.named_parameters())
    state = learner.optimizer.state
    moments = {name: state[p]["exp_avg"] for name, p in weights.items()}
    before, seen = {name: p.detach().clone() for name, p in weights.items()}, []
    attach = learner.quantization.attach
    monkeypatch.setattr(
        learner.quantization,
        "attach",
        lambda *args: (attach(*args), seen.extend(s.detach().clone() for s in step_parameters(args[0]))),
    )
    learner.update(3, minibatches(3))
    assert all(state[p]["exp_avg"] is moments[name] for name, p in weights.items())  # the moments survive
    assert len(seen) == 3
    assert all(not torch.equal(p, before[name]) for name, p in weights.items())
    assert all((s != old).all() for s, old in zip(step_parameters(learner.net), seen, strict=True))
    assert all(state[p]["step"] == 4 for p in weights.values())


def test_the_switch_happens_at_the_start_of_its_update(fabric):
    learner = tiny_learner(fabric, SMALL)
    twin = tiny_learner(fabric, SMALL)
    for number in range(3):
        assert torch.equal(learner.update(number, minibatches(number)), twin.update(number, minibatches(number)))
    twin.quantization.attach(twin.net, twin.optimizer, [])
    twin.train_mode()
    images, classes = (torch.cat(parts) for parts in zip(*minibatches(3), strict=True))
    expected = nn.functional.cross_entropy(twin.net(images), classes)
    assert torch.equal(learner.update(3, minibatches(3)), expected.detach())


def test_step_sizes_stay_positive_at_an_absurd_learning_rate(fabric):
    learner = tiny_learner(fabric, replace(SMALL, quantize_at=0, lr_step_size=10.0))
    for number in range(8):
        learner.update(number, minibatches(number))
        assert all((s > 0).all() for s in step_parameters(learner.net))


def test_step_sizes_that_would_move_too_far_are_warned_of_at_the_switch(fabric, capsys):
    """Adam moves each by about the rate, so the smallest one says it."""
    for rate, warns in [(1e-5, False), (1e-2, True)]:
        learner = tiny_learner(fabric, replace(SMALL, quantize_at=0, lr_step_size=rate))
        learner.update(0, minibatches(0))
        assert ("warning: --lr-step-size 0.01 is " in capsys.readouterr().err) == warns


def test_scopes_freeze_what_they_say(fabric):
    for scope in ("bn_head", "no_s"):
        learner = tiny_learner(fabric, replace(SMALL, quantization={"scope": scope}))
        for number in range(3):
            learner.update(number, minibatches(number))
        learner.update(3, minibatches(3))
        before = {name: p.detach().clone() for name, p in learner.net.named_parameters()}
        batch = minibatches(4)
        for number in range(4, 104):
            learner.update(number, batch)
        moved = {name for name, p in learner.net.named_parameters() if not torch.equal(p, before[name])}
        frozen = {name for name in before if name.endswith("step")}
        if scope == "bn_head":
            frozen |= {name for name in before if name.endswith("weight.original")}
        assert moved == set(before) - frozen


def test_reset_optimizer_forgets_the_moments(fabric):
    learner = tiny_learner(fabric, replace(SMALL, quantization={"reset_optimizer": True}))
    for number in range(4):
        learner.update(number, minibatches(number))
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {1}


def test_bf16_autocast_trains_float32_parameters():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    learner = tiny_learner(fabric, SMALL)
    for number in range(6):
        assert learner.update(number, minibatches(number)).isfinite()
    assert {p.dtype for p in learner.net.parameters()} == {torch.float32}


def test_fine_tuning_keeps_the_statistics_of_batch_norm(fabric, tmp_path):
    torch.manual_seed(1)
    pretrained = MODELS["resnet18"](1000, 1)
    pretrained.bn1.running_mean.fill_(0.25)
    torch.save(pretrained.state_dict(), tmp_path / "weights.pth")
    config = resolve(replace(BASE, method="erm", model="resnet18", weights=str(tmp_path / "weights.pth")))
    net = build_network(config, BENCHMARK)
    assert net.fc.weight.shape == (4, 512)  # a new classifier on pretrained features
    assert torch.equal(net.layer1[0].conv1.weight, pretrained.layer1[0].conv1.weight)
    learner = Learner(net, config, fabric)
    gain = net.bn1.weight.detach().clone()
    learner.update(0, minibatches(0))
    assert (net.bn1.running_mean == 0.25).all() and not torch.equal(net.bn1.weight, gain)
    for bad, text in [
        ("nothing.pth", "expected a file of weights, got No such file"),
        ("x.pth", "expected the weights of"),
    ]:
        torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
        with pytest.raises(InputError, match=text):
            build_network(replace(config, weights=str(tmp_path / bad)), BENCHMARK)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def outcome(directory):
    """All that a run leaves, without what depends on the machine."""
    state = torch.load(directory / "model.pt", weights_only=True)
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    done = json.loads((directory / "done.json").read_text())
    for record in [*log, done["selected"]]:
        record.pop("machine")
    scales = directory / "scales.csv"
    return state["net"], log, done, scales.read_text() if scales.exists() else None


def assert_same_outcome(a, b, but=()):
    """`but`: settings in which they may differ."""
    (net_a, *rest_a), (net_b, *rest_b) = outcome(a), outcome(b)
    for _, done, _ in (rest_a, rest_b):
        for key in but:
            done["config"].pop(key)
    assert rest_a == rest_b
    assert net_a.keys() == net_b.keys()
    assert all(torch.equal(net_a[key], net_b[key]) for key in net_a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("run")
    record = run(SMALL, BENCHMARK, directory, Fabric(accelerator="cpu", devices=1))
    return directory, record


def test_a_run_logs_selects_and_reloads(finished, fabric):
    directory, record = finished
    net, log, done, _ = outcome(directory)
    assert [r["update"] for r in log] == [0, 2, 4, 6, 8]
    assert [r["quantized"] for r in log] == [False, False, True, True, True]
    assert set(log[0]["accuracy"]) == {"debug0_out", "debug1_in", "debug1_out", "debug2_out"}
    accuracy = log[3]["accuracy"]
    assert log[3]["validation"] == (accuracy["debug0_out"] + accuracy["debug2_out"]) / 2
    assert log[3]["test"] == accuracy["debug1_in"]
    assert record["update"] >= SMALL.quantize_at and done["selected"]["update"] == record["update"]
    assert not (directory / "checkpoint.pt").exists()
    trained = load_trained(directory, BENCHMARK)
    domain, positions = evaluation_sets(SMALL, BENCHMARK)["debug1_in"]
    with torch.no_grad():
        classes = apply(trained, BENCHMARK, domain, positions).argmax(1)
    assert (classes.numpy() == BENCHMARK.domains[1].labels[positions]).mean() == record["test"]
    modified = (directory / "model.pt").stat().st_mtime_ns
    assert run(SMALL, BENCHMARK, directory, fabric) == record  # finished: nothing is done again
    assert (directory / "model.pt").stat().st_mtime_ns == modified


def test_stopped_at_any_update_and_continued_equals_uninterrupted(finished, fabric, tmp_path, monkeypatch):
    update = Learner.update
    for stop in range(SMALL.updates):

        def failing(self, number, minibatches, stop=stop):
            if number == stop:
                raise MemoryError
            return update(self, number, minibatches)

        monkeypatch.setattr(Learner, "update", failing)
        with pytest.raises(MemoryError):
            run(SMALL, BENCHMARK, tmp_path / str(stop), fabric)
        monkeypatch.setattr(Learner, "update", update)
        run(SMALL, BENCHMARK, tmp_path / str(stop), fabric)
        assert_same_outcome(finished[0], tmp_path / str(stop))


def test_quantized_inputs_resume_too(fabric, tmp_path, monkeypatch):
    config = replace(SMALL, activation_bits=8, updates=7)
    run(config, BENCHMARK, tmp_path / "a", fabric)
    monkeypatch.setattr(trainer, "_agreed", lambda signals, fabric: signal.SIGTERM)
    for _ in range(6):  # stopped after every update
        with pytest.raises(processes.Interrupted):
            run(config, BENCHMARK, tmp_path / "b", fabric)
    monkeypatch.undo()
    run(config, BENCHMARK, tmp_path / "b", fabric)
    assert_same_outcome(tmp_path / "a", tmp_path / "b")
    assert "classifier.conv.input" not in quantizers(load_trained(tmp_path / "a", BENCHMARK))


# Trains with the settings argv[1] in the folder argv[2], in one process after another, each of which sends itself a
# signal when it is to make an update: argv[3] holds the pairs.
CHILDREN = """
import os, sys, torch
torch.set_num_threads(1)
from lightning_fabric import Fabric
from pathlib import Path
from qdeploy.training import trainer
from qdeploy.training.config import Config
from qdeploy.training.domains import load_benchmark
from qdeploy.training.learner import Learner
update = Learner.update
for stop, signum in eval(sys.argv[3]):
    def signalling(self, t, minibatches):
        if t == stop:
            os.kill(os.getpid(), signum)
        return update(self, t, minibatches)
    child = os.fork()
    if not child:
        Learner.update = signalling
        config = Config(**eval(sys.argv[1]))
        trainer.run(config, load_benchmark("debug"), Path(sys.argv[2]), Fabric(accelerator="cpu", devices=1))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(("workers", "minutes"), [(0, 10.0), (2, 0.0)])
def test_killed_processes_continue_bit_for_bit(finished, fabric, tmp_path, workers, minutes):
    """SIGKILL before, at and after the switch, and while images are loaded ahead, then SIGTERM, which saves; each
    process goes on where the last one was, at an evaluation or, with a checkpoint after every update, between two, and
    nothing is left of it."""
    config, directory = replace(SMALL, workers=workers, checkpoint_minutes=minutes), tmp_path / "run"
    signals = [(stop, int(signal.SIGKILL)) for stop in (0, 1, 3, 6, 7)] + [(7, int(signal.SIGTERM))]
    arguments = [repr(plain(config)), str(directory), repr(signals)]
    child = subprocess.run([sys.executable, "-c", CHILDREN, *arguments], capture_output=True, text=True)
    assert child.stdout.split() == [str(-signal.SIGKILL)] * 5 + ["1"], child.stderr
    message = f"stopped before update 8: run the same command again to continue - at {directory}"
    assert message in child.stderr
    assert torch.load(directory / "checkpoint.pt", weights_only=True)["update"] == 8
    run(config, BENCHMARK, directory, fabric)
    assert_same_outcome(finished[0], directory, but=("workers", "checkpoint_minutes"))
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["done.json", "log.jsonl", "model.pt", "settings.yaml"]


def test_another_run_in_the_folder_is_an_error(finished, fabric, tmp_path, monkeypatch):
    directory, _ = finished
    text = "expected the settings of the run begun here, bits=7, got bits=4: give another --out - at .*done.json"
    with pytest.raises(InputError, match=text):
        run(replace(SMALL, bits=4), BENCHMARK, directory, fabric)
    monkeypatch.setattr(trainer, "_agreed", lambda signals, fabric: signal.SIGINT)
    with pytest.raises(processes.Interrupted) as stop:
        run(SMALL, BENCHMARK, tmp_path, fabric)
    assert stop.value.signum == signal.SIGINT
    with pytest.raises(InputError, match="lr=0.001, got lr=0.1: give another --out - at .*checkpoint.pt"):
        run(replace(SMALL, lr=0.1), BENCHMARK, tmp_path, fabric)


def test_a_damaged_checkpoint_is_named(fabric, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(
        InputError, match="expected a file written by a run, got a damaged one: delete it - at .*point.pt"
    ):
        run(SMALL, BENCHMARK, tmp_path, fabric)


def test_a_diverging_run_stops(fabric, tmp_path):
    with pytest.raises(InputError, match="expected a finite loss, got (nan|inf): lower --lr - at update 1"):
        run(replace(SMALL, lr=1e30), BENCHMARK, tmp_path, fabric)


def test_the_splits_do_not_change_with_the_seed(fabric, tmp_path):
    a = evaluation_sets(SMALL, BENCHMARK)
    b = evaluation_sets(replace(SMALL, seed=5), BENCHMARK)
    assert all(np.array_equal(a[key][1], b[key][1]) for key in a)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"test_domain": None}, "expected the domain to hold out, got none - at --test-domain"),
        ({"bits": 9}, "expected 2 to 8 bits, got 9 - at --bits"),
        ({"activation_bits": 1}, "expected 2 to 8 bits, got 1 - at --activation-bits"),
        ({"updates": 0}, "expected at least 1, got 0 - at --updates"),
        ({"quantize_at": 9}, r"expected a switch in 0 .. 8 \(the last evaluation\), got 9 - at --quantize-at"),
        ({"seed": -1}, "expected 0 or more, got -1 - at --seed"),
    ],
)
def test_settings_are_checked(changes, text):
    with pytest.raises(InputError, match=text):
        resolve(replace(SMALL, **changes))


def test_presets_follow_the_data():
    small = resolve(Config(test_domain="mfeat"))
    assert (small.model.name, small.lr, small.updates, small.quantize_at, small.eval_every) == (
        "nin",
        1e-3,
        2001,
        800,
        100,
    )
    photos = resolve(Config(data="/data/PACS", test_domain="sketch", updates=10000))
    assert (photos.model.name, photos.lr, photos.updates, photos.quantize_at, photos.eval_every) == (
        *("resnet50", 5e-5, 10000, 2000, 300),
    )


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args, args.unknown = parser.parse_known_args(["--data", "debug", "--accelerator", "cpu", *words])
    return args


def test_command_trains_an_ensemble(tmp_path, capsys):
    words = ("--method", "erm", "--test-domain", "debug2", "--updates", "3", "--eval-every", "1", "--seeds", "3")
    args = arguments(*words, "--out", str(tmp_path / "run"))
    summary = command.main(args)
    command.show(summary)
    out, err = capsys.readouterr()
    assert [member["seed"] for member in summary["members"]] == [0, 1, 2]
    assert set(summary["ensemble"]) == {"logits", "probs", "vote"}
    assert "ensemble, logits" in out and "standard error" in out
    assert sum(line.startswith("seed ") for line in err.splitlines()) == 9 and "seed 2 update 2 float loss" in err
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert command.main(args) == summary
    assert not capsys.readouterr().err  # nothing is trained again


def test_command_writes_an_ensemble_that_the_engine_runs(tmp_path, capsys):
    words = ("--test-domain", "debug0", "--updates", "21", "--quantize-at", "5", "--eval-every", "10", "--seeds", "2")
    summary = command.main(arguments(*words, "--out", str(tmp_path)))
    command.show(summary)
    model = qdeploy.load_int_model(tmp_path / "eoq.safetensors")
    images, labels = BENCHMARK.domains[0].images, BENCHMARK.domains[0].labels
    held_out = split(60, 0, 0)[0]
    classes = model.predict(images[held_out].transpose(0, 2, 3, 1))  # raw images, u8 [N, H, W, C]
    assert (classes == labels[held_out]).mean() == summary["file"]["test"]
    assert summary["file"]["agreement"] >= 0.95  # activations are rounded to 8 bits: a close call may turn
    assert summary["file"]["bytes"] == (tmp_path / "eoq.safetensors").stat().st_size
    assert [layer["bits"] for layer in summary["layers"][1]] == [7] * 6
    assert "the same class as the trained network in" in capsys.readouterr().out


def test_folders_of_images_train(fabric, tmp_path):
    rng = np.random.default_rng(0)
    for domain in ("art", "photo", "sketch"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / domain / label).mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / domain / label / f"{i}.png")
    data = str(tmp_path / "data")
    settings = {"model": "resnet18", "image_size": 32, "updates": 3, "quantize_at": 1, "eval_every": 1, "batch_size": 2}
    config = resolve(Config(data=data, test_domain="photo", accelerator="cpu", workers=0, **settings))
    record = run(config, load_benchmark(data, image_size=32), tmp_path / "run", fabric)
    assert record["update"] >= 1 and set(record["accuracy"]) == {"art_out", "photo_in", "photo_out", "sketch_out"}


def test_command_explains_bad_input(tmp_path):
    out = ("--out", str(tmp_path))
    for words, text in [
        (("--test-domain", "nowhere"), "expected one of debug0, debug1, debug2, got 'nowhere'"),
        (
            ("--test-domain", "debug0", "--domains", "debug0"),
            "expected two or more domains, or --test-domain in-domain, got 1 - at --domains",
        ),
        (("--test-domain", "debug0", "--accelerator", "abacus"), "expected a device of this machine, got .*abacus"),
        (("--test-domain", "debug0", "--seeds", "0"), "expected at least 1, got 0 - at --seeds"),
        (("--test-domain", "debug0", "--model", "alexnet"), "expected one of resnet18, .* got 'alexnet' - at --model"),
    ]:
        with pytest.raises(InputError, match=text):
            command.main(arguments(*words, *out))


def test_command_exits_with_the_number_of_the_signal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "_agreed", lambda signals, fabric: signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        words = ("--test-domain", "debug0", "--updates", "4", "--quantize-at", "0", "--out", str(tmp_path))
        command.main(arguments(*words))
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped before update 1: run the same command again to continue - at" in capsys.readouterr().err


def test_signals_are_caught_once():
    # Background jobs of a shell are started with SIGINT ignored; here it does what it does at a terminal.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with processes.signals_received() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_progress_bar_on_a_terminal(monkeypatch, fabric, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    with progress_of_run(SMALL, 2, fabric) as progress:
        progress.updated(16)
        progress.evaluated(30, 72)
        progress.recorded({"update": 3, "quantized": True, "loss": 1.0, "validation": 0.5, "test": 0.25})
    assert "seed 0 update 3 7 bit loss 1.0000 validation 0.5000 debug1 0.2500" in capsys.readouterr().err.replace(
        "\n", ""
    )
