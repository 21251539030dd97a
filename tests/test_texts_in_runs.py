"""Runs on texts: csv files and Amazon's reviews, a tiny DistilBERT and a tokenizer of words, to the model file."""

from __future__ import annotations

import csv
import json
import signal

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from test_training import assert_same_outcome

import qdeploy
from qdeploy import cli, format, reference
from qdeploy.errors import InputError
from qdeploy.training import processes, quantizers, trainer
from qdeploy.training.config import Config, resolve
from qdeploy.training.domains import benchmark_of
from qdeploy.training.evaluation import evaluation_sets
from qdeploy.training.finished_runs import finish
from qdeploy.training.minibatches import split_of
from qdeploy.training.pretrained import load_pretrained
from qdeploy.training.selected_network import calibration_images, load_trained
from qdeploy.training.start import build_network

pytest.importorskip("transformers", reason="the `models` extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(36))]
TOKENS = 12
NETWORK = {
    "name": "transformers:DistilBertForSequenceClassification",
    **{"vocab_size": 40, "max_position_embeddings": TOKENS, "n_layers": 1, "n_heads": 2, "dim": 16, "hidden_dim": 32},
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("tokenizer")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def sentence(rng, label: int) -> str:
    """Of 1 to 15 words: the last ones are cut. Each class has words of its own among those of all."""
    own = rng.random(rng.integers(1, 16)) < 0.6
    return " ".join(f"w{rng.integers(6) + 6 * label if o else rng.integers(18, 36)}" for o in own)


def write(path, rows, columns=("text", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for domain in ("books", "films", "games"):
        write(root / f"{domain}.csv", [(sentence(rng, i % 3), "abc"[i % 3]) for i in range(60)])
    return root


def settings(folder, tokenizer, **more) -> Config:
    run = {"updates": 40, "quantize_at": 20, "eval_every": 13, "batch_size": 8, "accelerator": "cpu", "lr": 3e-3}
    data = {"data": str(folder), "tokenizer": tokenizer, "tokens": TOKENS, "from_scratch": True}
    return resolve(Config(**{**run, **data, "test_domain": "films", "model": NETWORK, **more}))


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def test_a_domain_is_ids_cut_at_the_longest(folder, tokenizer):
    benchmark = benchmark_of(settings(folder, tokenizer))
    assert (benchmark.classes, [domain.name for domain in benchmark.domains]) == (
        ["a", "b", "c"],
        ["books", "films", "games"],
    )
    domain = benchmark.domains[1]
    with (folder / "films.csv").open() as file:
        rows = [
            [2, *(WORDS.index(word) for word in row["text"].split())][: TOKENS - 1] + [3]
            for row in csv.DictReader(file)
        ]
    expected = [row + [-1] * (TOKENS - len(row)) for row in rows]
    assert max(map(len, rows)) == TOKENS > min(map(len, rows))
    assert domain.batch(np.arange(60)).tolist() == expected and domain.batch(np.arange(60)).dtype == torch.int32
    assert domain.labels.tolist() == [0, 1, 2] * 20


def test_calibration_rows_begin_as_texts_and_are_full(folder, tokenizer):
    config = settings(folder, tokenizer)
    rows = calibration_images(config, benchmark_of(config), 3)
    assert rows.shape == (6, TOKENS) and rows.dtype == torch.int64 and (rows >= 0).all() and (rows[:, 0] == 2).all()


def test_padding_and_neighbours_change_nothing(folder, tokenizer):
    config = settings(folder, tokenizer)
    benchmark = benchmark_of(config)
    net = build_network(config, benchmark).eval()
    batch = benchmark.inputs.for_network(benchmark.domains[0].batch(np.arange(9)))
    with torch.no_grad():
        alone = [net(text[None, text >= 0]) for text in batch]
        torch.testing.assert_close(net(batch), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_trained_switched_stopped_and_exported(folder, tokenizer, tmp_path, monkeypatch):
    config = settings(folder, tokenizer)
    benchmark = benchmark_of(config)
    trainer.run(config, benchmark, tmp_path / "whole", fabric())
    for updates in (10, 15):  # before the switch, and after it
        asked = iter([None] * (updates - 1))
        monkeypatch.setattr(trainer, "_agreed", lambda signals, fabric, asked=asked: next(asked, signal.SIGTERM))
        with pytest.raises(processes.Interrupted):
            trainer.run(config, benchmark, tmp_path / "parts", fabric())
        monkeypatch.undo()
    record = trainer.run(config, benchmark, tmp_path / "parts", fabric())
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
    assert record["test"] > 0.6
    net = load_trained(tmp_path / "whole", benchmark)
    assert len(quantizers(net)) == 8
    path = tmp_path / "m.safetensors"
    file = finish([net], config, benchmark, torch.device("cpu"), path)["file"]
    assert file["agreement"] >= 0.95 and file["test"] > 0.6
    graph = format.load(path)
    assert graph.variable and graph.classes == ["a", "b", "c"]
    ids = benchmark.domains[1].batch(np.arange(60)).numpy()
    mask = (ids >= 0).astype(np.int64)
    found = qdeploy.load_int_model(path)(ids.clip(0), mask)
    assert np.array_equal(found, reference.run(graph, ids.clip(0), mask=mask))


def test_the_command_and_its_words(folder, tokenizer, tmp_path, capsys):
    words = f"--data {folder} --tokenizer {tokenizer} --tokens {TOKENS} --test-domain films --from-scratch --updates 3"
    words += f" --quantize-at 1 --eval-every 1 --batch-size 4 --accelerator cpu --out {tmp_path / 'run'}"
    options = [f"--model.{key}={value}" for key, value in NETWORK.items() if key != "name"]
    assert cli.main(["train", *words.split(), *options]) == 0
    said = capsys.readouterr().err
    assert "books: 60 texts become token ids\n" in said
    assert "3 updates of 8 texts, 3 evaluations of 84; texts are loaded by the training itself" in said
    assert "preset: texts\n" in said and "images" not in said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["file"]["agreement"] > 0.9 and summary["config"]["optimizer"]["name"] == "adamw"


def test_reviews_are_judged_by_user(tmp_path, tokenizer):
    root, rng = tmp_path / "amazon_v2.1", np.random.default_rng(1)
    codes = [0] * 20 + [2] * 8 + [4] * 12 + [3] * 12 + [-1] * 3
    stars = rng.integers(1, 4, len(codes))
    rows = [(f"user{i % 4}", f"{star}.0", sentence(rng, star - 1)) for i, star in enumerate(stars)]
    write(root / "reviews.csv", rows, ("reviewerID", "overall", "reviewText"))
    write(root / "splits/user.csv", enumerate(codes), ("", "split"))
    config = settings(root, tokenizer, test_domain="id_test,test", updates=4, quantize_at=1, eval_every=3)
    benchmark = benchmark_of(config)
    assert [domain.name for domain in benchmark.domains] == ["id_test", "test", "train"]
    assert [part.tolist() for part in split_of(benchmark.domains[2], config)] == [[*range(20)], [*range(20, 28)]]
    assert sorted(evaluation_sets(config, benchmark)) == ["id_test_in", "test_in", "train_out"]
    assert benchmark.classes == ["1", "2", "3", "4", "5"]
    record = trainer.run(config, benchmark, tmp_path / "run", fabric())
    net, found = load_trained(tmp_path / "run", benchmark), {}
    for domain in benchmark.domains[:2]:
        with torch.no_grad():
            right = net(domain.batch(np.arange(12)).long()).argmax(1).numpy() == domain.labels
        of_users = [right[domain.users == user].mean() for user in range(4)]
        found[domain.name] = np.percentile(of_users, 10)
    assert record["tests"] == pytest.approx(found)
    file = finish([net], config, benchmark, torch.device("cpu"), tmp_path / "m.safetensors")["file"]
    assert sorted(file["tests"]) == ["id_test", "test"]


def test_weights_as_they_are_published(folder, tokenizer, tmp_path):
    """Of the masked language model: without the two layers of the classifier."""
    config = settings(folder, tokenizer)
    net, again = (build_network(config, benchmark_of(config)) for _ in range(2))
    body = {name: value + 1 for name, value in net.state_dict().items() if name.startswith("distilbert.")}
    torch.save(body | {"vocab_layer_norm.weight": torch.ones(16)}, tmp_path / "w.pth")
    said = load_pretrained(again, tmp_path / "w.pth")
    assert said.endswith("without vocab_layer_norm.weight; a new classifier")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in body.items())


# ---- Bad input -------------------------------------------------------------------------------------------------------


def refused(capsys, folder, tokenizer, *more) -> str:
    words = ["--data", folder, "--test-domain", "films", "--from-scratch", "--accelerator", "cpu", "--tokens", TOKENS]
    words += ["--tokenizer", tokenizer] if tokenizer else []
    options = [f"--model.{key}={value}" for key, value in NETWORK.items() if key != "name"]
    status = cli.main([*map(str, ("train", *words, "--out", folder / "run", *options, *more))])
    said = [line for line in capsys.readouterr().err.splitlines() if "become token ids" not in line]
    assert status == 2 and len(said) == 1
    return said[0].removeprefix("qdeploy: error: ")


@pytest.mark.parametrize(
    ("columns", "row", "text"),
    [
        (("text", "class"), ("w1", "a"), "expected a column `label`, got none - at {}"),
        (("text", "label"), ("w1", ""), "expected a label, got none - at row 1 of {}"),
        (("text", "label"), (" ", "a"), "expected a text, got none - at row 1 of {}"),
        (("text", "label"), ("w1",), "expected a label, got none - at row 1 of {}"),
    ],
)
def test_a_bad_csv_file_is_one_line(columns, row, text, tokenizer, tmp_path, capsys):
    write(tmp_path / "books.csv", [("w1", "a"), ("w2", "b")])
    write(tmp_path / "films.csv", [row, ("w2", "b")], columns)
    assert refused(capsys, tmp_path, tokenizer) == text.format(tmp_path / "films.csv")


def test_what_does_not_fit_texts_is_one_line(folder, tokenizer, capsys):
    expected = "expected the tokenizer of the network, a folder or a name, for a folder of texts, got none"
    assert refused(capsys, folder, None) == f"{expected} - at --tokenizer"
    found = refused(capsys, folder, f"{folder}/none")
    assert found.startswith("expected a tokenizer of transformers, a folder or a name, got ")
    found = refused(capsys, folder, tokenizer, "--tokens", TOKENS + 1)
    assert found.startswith(f"expected texts that {NETWORK['name']} can take, got {TOKENS + 1} tokens with ids to 39: ")
    assert found.endswith(" - at --tokens")
    found = refused(capsys, folder, tokenizer, "--model.vocab_size", 39)
    got = "got 12 tokens with ids to 39: index out of range in self"
    assert found == f"expected texts that {NETWORK['name']} can take, {got} - at --tokens"
    for option, value in [("--image-size", 32), ("--normalization", "clip"), ("--skip-unreadable", "bad.txt")]:
        found = refused(capsys, folder, tokenizer, option, value)
        assert found == f"expected data of images, got texts (--tokenizer {tokenizer}) - at {option}"
    found = refused(capsys, folder, tokenizer, "--data", "debug", "--test-domain", "debug1")
    assert (
        found
        == "expected texts: a folder of csv files, one a domain, or WILDS's amazon_v2.1, got debug - at --tokenizer"
    )


@pytest.mark.parametrize(
    ("place", "got"), [("distilbert", "BaseModelOutput"), ("distilbert.embeddings", f"[16, {TOKENS}, 16]")]
)
def test_styles_of_texts_are_refused(place, got, folder, tokenizer, tmp_path):
    config = settings(folder, tokenizer, objective={"name": "mixstyle", "places": [place], "p": 1.0})
    with pytest.raises(InputError) as error:
        trainer.run(config, benchmark_of(config), tmp_path, fabric())
    assert str(error.value) == f"expected maps [N, C, H, W] of 2 positions or more, got {got} - at `{place}`"


def test_a_label_of_the_target_alone_is_said(folder, tokenizer, tmp_path, capsys):
    for name in ("books", "games"):
        write(tmp_path / f"{name}.csv", [("w1", "a"), ("w2", "b")] * 5)
    write(tmp_path / "films.csv", [("w1", "a"), ("w2", "d")] * 5)
    from qdeploy.training.start import describe

    config = settings(tmp_path, tokenizer)
    benchmark = benchmark_of(config)
    lines = describe(config, benchmark, evaluation_sets(config, benchmark))
    assert lines[-1] == "warning: no source domain has texts of d"


def test_another_tokenizer_makes_another_run(folder, tokenizer, tmp_path):
    from qdeploy.training.fingerprint import difference

    first = benchmark_of(settings(folder, tokenizer)).fingerprint
    assert difference(first, benchmark_of(settings(folder, tokenizer)).fingerprint) is None
    assert "token ids" in difference(first, benchmark_of(settings(folder, tokenizer, tokens=9)).fingerprint)
