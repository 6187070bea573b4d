"""Seeds spread over the devices of a machine: the same results, and no word between devices."""

import importlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import on_devices
import pytest
from conftest import ROOT
from toys import arrays, toy_columns, toy_states, write_hdf5

import ssar_td3bc
from common.checkpoint import load_checkpoint


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
    # train_interval, iql_interval, select_by_advantage, explore, store, and what updates online
    assert report["programs"] >= 6

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
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "devices", lambda: list(range(devices)))
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, **__: shape)
    monkeypatch.setattr(jax, "set_mesh", meshes.append)
    ssar_td3bc.use_devices(seeds)
    assert meshes == ([(used,)] if used > 1 else [])
