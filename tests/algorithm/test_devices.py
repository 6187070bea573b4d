"""Seeds spread over devices and processes: the same results, and nothing exchanged in training.

test_eight_devices_equal_one also runs this file as a program, with eight devices.
"""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import conftest  # noqa: F401  sets up the environment before JAX starts
import jax
import numpy as np
import pytest
from helpers import Point, StubRun, batch_of, evaluate, new_states, settings
from toys import arrays, tiny_config, toy_columns, write_hdf5

import ssar_cql
import ssar_td3bc
from common.seeds import Seeds

ROOT = Path(__file__).parents[2]
SCRIPTS = {"ssar_td3bc": ssar_td3bc, "ssar_cql": ssar_cql}
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


class WatchedSeeds(Seeds):
    """Seeds that keep the text of every program, and which of them overwrite their state."""

    def __init__(self, count):
        super().__init__(count)
        self.texts, self.overwrites = [], []

    def vmap(self, *args, **options):
        program, compiled = super().vmap(*args, **options), []

        def call(*args):
            if compiled:
                return compiled[0](*args)
            compiled.append(program.lower(*args).compile())
            results = compiled[0](*args)
            self.texts.append(compiled[0].as_text())
            self.overwrites.append(all(x.is_deleted() for x in jax.tree.leaves(args[0])))
            return results

        return call


def train_eight_seeds(ssar):
    """IQL labelling, offline and online training: the labels, the state and what was seen."""
    lengths = {"offline_steps": 40, "online_steps": 20, "warmup_steps": 5, "iql_steps": 20}
    whole_batch = {"block_size": None} if ssar is ssar_cql else {}  # as several devices have it
    config = settings(ssar, num_seeds=8, **lengths, **whole_batch)
    seeds, run, state = WatchedSeeds(8), StubRun(), new_states(ssar, config, 8)
    data = seeds.share(batch_of(ssar, rows=200))
    labels = ssar.label_by_iql(state.key, data._replace(trusted=None), seeds, run, config)
    shares = np.linspace(0, 1, 8)[:, None]  # each seed has its own D̂, from nothing to all
    trusted = (np.random.default_rng(0).random((8, 200)) < shares).astype(np.float32)
    data = data._replace(trusted=seeds.spread(trusted))
    state = ssar.pretrain(seeds.spread(state), data, evaluate, seeds, run, config)
    trusted = np.stack([metrics["trusted_fraction"] for metrics in run.metrics["offline"]])
    assert (trusted[:, 0] == 0).all() and (trusted[:, -1] == 1).all()
    data = ssar.offline_part(data, np.arange(200) % 5 == 4, config)
    state = ssar.finetune(state, data, Point(8), evaluate, seeds, run, config)
    seen = {
        "devices": len(state.step.sharding.device_set),
        "programs": len(seeds.texts),
        "overwrites": sum(seeds.overwrites),
        "collectives": COLLECTIVE.findall(" ".join(seeds.texts)),
        "used": [Seeds(count).by_seed.num_devices for count in (1, 5, 6, 9, 11, 16)],
    }
    return labels, arrays(state), seen


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_eight_devices_equal_one(name, tmp_path):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, __file__, name, tmp_path / "many.npz"]
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    many, (labels, alone, _) = np.load(tmp_path / "many.npz"), train_eight_seeds(SCRIPTS[name])
    for i, x in enumerate(alone):
        ours = many[f"arr_{i}"].astype(float)
        np.testing.assert_allclose(ours, x.astype(float), rtol=2e-3, atol=2e-5)
    # An advantage of about 0 may have either sign.
    assert (many["labels"] == labels).mean() > 0.99
    seen = json.loads(done.stdout.splitlines()[-1])
    # IQL and its labels, training, play, explore, store, the online updates, play
    programs = 9 if name == "ssar_td3bc" else 8
    assert (seen["programs"], seen["overwrites"]) == (programs, programs - 4)
    assert (seen["devices"], seen["collectives"]) == (8, [])
    assert seen["used"] == [1, 5, 6, 3, 1, 8]  # as many devices as share the seeds evenly


SETTINGS = """
from toys import tiny_config

def get_config(task=None):
    return tiny_config({data!r}, num_seeds=4, offline_steps=20, eval_episodes=1)
"""


@pytest.mark.slow
def test_two_processes_share_the_seeds(tmp_path):
    """Each trains two, bit for bit as a run of these two alone does."""
    data = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(300))
    file = tmp_path / "settings.py"
    file.write_text(SETTINGS.format(data=data))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs, env = tmp_path / "runs", os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, ROOT / "ssar_td3bc.py", f"--config={file}", f"--workdir={runs}"]
    start = partial(subprocess.Popen, env=env, stderr=subprocess.PIPE, text=True)
    processes = [start([*command, f"--distributed={address},2,{i}"]) for i in range(2)]
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-3000:]
    assert sorted(folder.name for folder in runs.iterdir()) == ["0", "2"]
    config = tiny_config(data, num_seeds=2, seed=2, offline_steps=20, eval_episodes=1)
    ssar_td3bc.main(config, str(tmp_path / "alone"))
    scores = [(folder / "scores.csv").read_text() for folder in (runs / "2", tmp_path / "alone")]
    assert scores[0] == scores[1]


if __name__ == "__main__":
    labels, state, seen = train_eight_seeds(SCRIPTS[sys.argv[1]])
    np.savez(sys.argv[2], *state, labels=labels)
    print(json.dumps(seen))
