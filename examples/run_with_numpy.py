"""Load a model file and run it: numpy is all that this needs.

python examples/run_with_numpy.py               # the packaged digits
python examples/run_with_numpy.py FILE          # a file of yours, on random images
"""

import sys
import time

import numpy as np

import qdeploy
from qdeploy.demo import DATA, MODEL

path = sys.argv[1] if len(sys.argv) > 1 else MODEL
model = qdeploy.load_int_model(path)  # the best instruction set of this CPU, as many threads as help
print(model)
print(f"bits of the weights: {sorted(set(model.weight_bits.values()))}; {model.nbytes:,} bytes on disk")

if path == MODEL:
    with np.load(DATA / "digits.npz") as archive:
        images, labels = archive["images"], archive["labels"]  # raw u8 [200, 16, 16, 1]
    print(f"{(model.predict(images) == labels).mean():.1%} of {len(images)} digits are right")
else:
    images = np.random.default_rng(0).standard_normal((8, *model.inputs[0]["shape"]), np.float32)

# What runs where: one row a node.
for node in model.plan(len(images))[:3]:
    print(f"  {node['name']:<24} {node['kernel']:<36} {node['share_of_macs']:.0%} of the work")
print("  ...")

times = []
for _ in range(10):
    start = time.perf_counter()
    scores = model(images)  # for an ensemble probabilities, else logits
    times.append(time.perf_counter() - start)
print(f"{len(images)} images in {min(times) * 1e3:.2f} ms on {model.num_threads} thread(s)")

# The scalar kernels are plain C++: the fast ones give the same bits, not just nearly the same numbers.
plain = qdeploy.load_int_model(path, num_threads=1, isa="scalar")
print(f"{model.isa} and scalar agree bit for bit: {plain(images).tobytes() == scores.tobytes()}")
