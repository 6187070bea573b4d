"""Seeds spread over devices and processes: the same results, and nothing exchanged in training.

test_eight_devices_equal_one also runs this file as a program, with eight devices.
"""

import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401  sets up the environment before JAX starts
import jax
import numpy as np
import pytest
from helpers import StubRun, batch_of, evaluate, new_states, settings, walks
from toys import arrays, tiny_config, toy_columns, write_hdf5, write_settings

import common.seeds
import ssar_cql
import ssar_td3bc
from common.seeds import Seeds

ROOT = Path(__file__).parents[2]
SCRIPTS = {"ssar_td3bc": ssar_td3bc, "ssar_cql": ssar_cql}
PROGRAMS = ("iql_interval", "select_by_advantage", "train_interval", "online_update", "store")
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def train_eight_seeds(ssar):
    """IQL labelling, offline and online training: the labels and the state."""
    lengths = {"offline_steps": 40, "online_steps": 20, "warmup_steps": 5, "iql_steps": 20}
    whole_batch = {"block_size": None} if ssar is ssar_cql else {}  # as several devices have it
    config = settings(ssar, num_seeds=8, **lengths, **whole_batch)
    seeds, run, state = Seeds(8), StubRun(), new_states(ssar, config, 8)
    data = seeds.share(batch_of(ssar, rows=200))
    labels = ssar.label_by_iql(state.key, data._replace(trusted=None), seeds, run, config)
    shares = np.linspace(0, 1, 8)[:, None]  # each seed has its own D̂, from nothing to all
    trusted = (np.random.default_rng(0).random((8, 200)) < shares).astype(np.float32)
    data = data._replace(trusted=seeds.spread(trusted))
    state = ssar.pretrain(seeds.spread(state), data, evaluate, seeds, run, config)
    data = ssar.offline_part(data, np.arange(200) % 5 == 4, config)
    state = ssar.finetune(state, data, walks(8), evaluate, seeds, run, config)
    assert len(state.step.sharding.device_set) == jax.device_count()
    return labels, arrays(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_eight_devices_equal_one(name, tmp_path):
    flags = f" --xla_force_host_platform_device_count=8 --xla_dump_to={tmp_path}"
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + flags}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, name, tmp_path / "many.npz"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    many, (labels, alone) = np.load(tmp_path / "many.npz"), train_eight_seeds(SCRIPTS[name])
    for i, x in enumerate(alone):
        ours = many[f"arr_{i}"].astype(float)
        np.testing.assert_allclose(ours, x.astype(float), rtol=2e-3, atol=2e-5)
    # An advantage of about 0 may have either sign.
    assert (many["labels"] == labels).mean() > 0.99
    for program in PROGRAMS:
        texts = [x.read_text() for x in tmp_path.glob(f"*.jit_{program}.*after_optimizations.txt")]
        assert texts and not COLLECTIVE.search("".join(texts)), program


def test_only_several_seeds_on_a_gpu_have_options_which_xla_knows(monkeypatch):
    assert Seeds(2).options is None
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(common.seeds, "Mesh", lambda *_: jax.make_mesh((1,), ("seeds",)))
    seeds = Seeds(2)
    assert Seeds(1).options is None and seeds.options
    assert list(seeds.vmap(lambda x: 2 * x)(np.ones(2))) == [2, 2]
    seeds.options = {"no_such_option": True}
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        seeds.vmap(lambda x: 2 * x)(np.ones(2))


@pytest.mark.slow
def test_two_processes_share_the_seeds(tmp_path):
    """Each trains two, bit for bit as a run of these two alone does."""
    data = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(300))
    lengths = {"num_seeds": 4, "offline_steps": 20, "eval_episodes": 1}
    file = write_settings(tmp_path / "settings.py", data, **lengths)
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
    labels, state = train_eight_seeds(SCRIPTS[sys.argv[1]])
    np.savez(sys.argv[2], *state, labels=labels)
    used = [Seeds(count).by_seed.num_devices for count in (1, 5, 6, 9, 11, 16)]
    assert used == [1, 5, 6, 3, 1, 8]  # as many devices as share the seeds evenly
