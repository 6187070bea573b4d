"""What a large data set costs: memory while it is loaded and after, and time to sample from it.

    python benchmarks/data.py [--rows=2000000] [--out=data.json]

Memory, in a process of its own for each layout of the file: its peak while the data set is loaded
and standardised and what it holds afterwards, both above what the process held before, as multiples
of the set's own size (float32, with successors). On a CPU the device's copy is part of that. Time:
an update of TD3+BC(SA), and the drawing of its batch alone, from sets of growing size, timed in
turns, relative to the smallest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import h5py
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import configs.ssar_td3bc
import ssar_td3bc as ssar
from common.loading import load_dataset

OBS, ACTION, EPISODE, UPDATES, ROUNDS = 29, 8, 1000, 100, 7
LAYOUTS = ("without successors", "with successors", "doubles")


def write_file(path, rows, layout):
    """A D4RL file of random numbers, written a piece at a time."""
    kind = np.float64 if layout == "doubles" else np.float32
    widths = {"observations": (OBS,), "actions": (ACTION,), "rewards": ()}
    if layout == "with successors":
        widths["next_observations"] = (OBS,)
    with h5py.File(path, "w") as file:
        for key, width in widths.items():
            column = file.create_dataset(key, (rows, *width), kind)
            for start in range(0, rows, 100_000):
                part = column[start : start + 100_000].shape
                column[start : start + 100_000] = np.random.default_rng(start).uniform(-1, 1, part)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = np.arange(rows) % EPISODE == EPISODE - 1
        file.attrs["env_id"] = "Ant-v5"  # any that exists


def resident(peak=False):
    """Bytes that this process holds now, or has held at most (Linux)."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def measure_memory(path):
    """Loads a file and prints the peak, what is held, and the set's size, in bytes."""
    jnp.zeros(8).block_until_ready()
    before = resident()
    config = ml_collections.FrozenConfigDict(configs.ssar_td3bc.get_config("custom"))
    started = time.perf_counter()
    dataset = load_dataset(None, path)
    data, _, _ = jax.block_until_ready(ssar.load_data(dataset, config))
    jnp.ones(8).block_until_ready()  # JAX lets go of what it has copied when it is next called
    seconds = time.perf_counter() - started
    peak = resident(peak=True)
    size = sum(column.nbytes for column in jax.tree.leaves(data))
    report = {"peak": peak - before, "held": resident() - before, "size": size}
    print(json.dumps(report | {"seconds": seconds}))


def memory(rows):
    """{layout: peak and held, in sizes of the set}."""
    report = {}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "data.hdf5")
            write_file(path, rows, layout)
            command = [sys.executable, __file__, f"--measure={path}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout)
        report[layout] = {key: found[key] / found["size"] for key in ("peak", "held")}
        report[layout] |= {"megabytes": found["size"] / 1e6, "seconds": found["seconds"]}
    return report


class Sampled:
    """Training, and drawing batches alone, from `rows` rows."""

    def __init__(self, rows):
        config = configs.ssar_td3bc.get_config("hopper-medium-v2")
        config.eval_interval = UPDATES
        config = ml_collections.FrozenConfigDict(config)
        keys = jax.random.split(jax.random.key(0), 4)
        self.data = ssar.Transition(
            obs=jax.random.normal(keys[0], (rows, OBS)),
            action=jax.random.uniform(keys[1], (rows, ACTION), minval=-1, maxval=1),
            reward=jnp.zeros(rows),
            next_obs=jax.random.normal(keys[2], (rows, OBS)),
            terminated=jnp.zeros(rows),
            trusted=jnp.ones((1, rows)),
        )
        self.state = jax.jit(jax.vmap(lambda key: ssar.init_state(key, OBS, ACTION, config)))(
            keys[:1]
        )
        self.train = ssar.train_interval.lower(self.state, self.data, config=config).compile()

        def draw(key, data):
            indices = jax.random.randint(key, (UPDATES, config.batch_size), 0, rows)
            data = data._replace(trusted=data.trusted[0])
            total = lambda batch: sum(x.sum() for x in jax.tree.leaves(batch))
            body = lambda carry, index: (carry + total(ssar.take(data, index)), None)
            return jax.lax.scan(body, 0.0, indices)[0]

        self.draw = jax.jit(draw)
        self.key = keys[3]

    def seconds(self):
        """Seconds an update, and a batch."""
        started = time.perf_counter()
        self.state, *_ = jax.block_until_ready(self.train(self.state, self.data))
        between = time.perf_counter()
        self.draw(self.key, self.data).block_until_ready()
        return np.array([between - started, time.perf_counter() - between]) / UPDATES


def sampling(rows):
    """{rows: seconds of an update and a batch, relative to the fewest rows; a batch's share}."""
    counts = [n for n in (10_000, 100_000, 1_000_000) if n < rows] + [rows]
    sets = [Sampled(n) for n in counts]
    seconds = np.array([[s.seconds() for s in sets] for _ in range(ROUNDS)])[
        1:
    ]  # [rounds, sets, 2]
    relative = np.median(seconds / seconds[:, :1], axis=0)
    share = np.median(seconds[..., 1] / seconds[..., 0], axis=0)
    return {
        str(n): {"update": relative[i, 0], "batch": relative[i, 1], "batch_of_update": share[i]}
        for i, n in enumerate(counts)
    }


def main(rows, out):
    report = {"device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}"}
    report |= {"memory": memory(rows), "sampling": sampling(rows)}
    print(json.dumps(report, indent=2))
    if out:
        with open(out, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--out", help="also write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    measure_memory(given.measure) if given.measure else main(given.rows, given.out)
