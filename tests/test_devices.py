"""Seeds spread over the devices of a machine: the same results, and no word between devices."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import on_devices
import pytest
from conftest import ROOT
from toys import arrays, tiny_config, toy_columns, toy_states, write_hdf5

import ssar_td3bc
from common.checkpoint import load_checkpoint
from common.checks import InputError
from common.cli import join_hosts


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_eight_devices_equal_one(script, tmp_path):
    data = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(300))
    many, one = str(tmp_path / "many"), str(tmp_path / "one")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, os.path.join(ROOT, "tests", "on_devices.py"), script, data, many]
    env = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["devices"] == 8
    assert report["collectives"] == []
    # train_interval; and iql_interval, select_by_advantage, explore, store, two online updates
    assert report["programs"] == (7 if script == "ssar_td3bc" else 1)

    if script == "ssar_cql":  # whose own part is the loop over blocks; the rest is the same text
        return

    alone = on_devices.main(script, data, one)
    assert (alone["devices"], alone["collectives"]) == (1, [])
    np.testing.assert_allclose(report["last"], alone["last"], rtol=1e-3, atol=0.1)
    ssar = importlib.import_module(script)
    config = ssar.ml_collections.FrozenConfigDict(on_devices.settings(script, data))
    state = jax.eval_shape(lambda: toy_states(config, range(8), ssar))
    saved, labels = [], []
    for folder in (many, one):
        like = load_checkpoint(folder) | {"state": state}
        saved.append(load_checkpoint(folder, like)["state"])
        labels.append(np.load(os.path.join(folder + "-labels", "labels.npy")))
    for a, b in zip(*map(arrays, saved), strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=2e-3, atol=2e-5)
    assert labels[0].shape == labels[1].shape
    assert (labels[0] == labels[1]).mean() > 0.99  # an advantage of about 0 may have either sign


@pytest.mark.parametrize(
    ("seeds", "devices", "used"), [(5, 8, 5), (6, 4, 3), (7, 4, 1), (16, 8, 8)]
)
def test_as_many_devices_as_share_the_seeds_evenly(seeds, devices, used, monkeypatch):
    meshes = []
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: list(range(devices)))
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, **__: shape)
    monkeypatch.setattr(jax, "set_mesh", meshes.append)
    ssar_td3bc.use_devices(seeds)
    assert meshes == ([(used,)] if used > 1 else [])


SETTINGS = """
import sys
sys.path.insert(0, {tests!r})
from toys import tiny_config

def get_config(task=None):
    return tiny_config({data!r}, num_seeds=4, offline_steps=20, eval_episodes=1)
"""


@pytest.mark.slow
def test_two_processes_share_the_seeds(tmp_path):
    """Each trains its own two as a run of them alone does, bit for bit."""
    data = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(300))
    file = tmp_path / "settings.py"
    file.write_text(SETTINGS.format(tests=os.path.join(ROOT, "tests"), data=data))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, os.path.join(ROOT, "ssar_td3bc.py"), f"--config={file}",
               f"--workdir={tmp_path}/runs"]  # fmt: skip
    processes = [
        subprocess.Popen(
            [*command, f"--distributed={address},2,{i}"], stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-3000:]
    assert sorted(os.listdir(tmp_path / "runs")) == ["0", "2"]
    config = tiny_config(
        data, num_seeds=2, seed=2, offline_steps=20, eval_episodes=1
    )  # the second's share
    ssar_td3bc.main(config, str(tmp_path / "alone"))
    scores = [(tmp_path / folder / "scores.csv").read_text() for folder in ("runs/2", "alone")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("hosts", "overrides", "message"),
    [
        ("auto", {}, "finds no cluster"),
        ("somewhere", {}, "cannot be read: give auto, or <host>:<port>,<processes>,<i>"),
        ("a:1,2,x", {}, "cannot be read"),
        ("a:1,2,2", {}, "is no process of 2"),
        ("a:1,2,0", {}, "num_seeds=3 cannot be shared by 2 processes: give a multiple"),
        ("a:1,3,0", {"offline_checkpoint": "runs/x"}, "go on from each process's folder"),
    ],
)
def test_hosts_that_cannot_be_joined(hosts, overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
        join_hosts(hosts, tiny_config(num_seeds=3, **overrides))
