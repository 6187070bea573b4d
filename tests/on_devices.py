"""A run of eight seeds, its programs recorded; test_devices.py runs this file with eight devices.

With XLA_FLAGS=--xla_force_host_platform_device_count=8: on_devices.py <script> <data> <folder>
"""

import importlib
import json
import os
import re
import sys

import conftest  # noqa: F401  scratch folders
import jax
import numpy as np
from toys import tiny_config

COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def settings(script, data):
    """Eight seeds; online in one of the scripts, as that text is the same in both."""
    online_steps = 40 if script == "ssar_td3bc" else 0
    return tiny_config(
        data, script, num_seeds=8, eval_episodes=1, offline_steps=40, online_steps=online_steps
    )


def main(script, data, workdir):
    """Runs; labels by IQL too, into labels.npy; and returns what was seen."""
    ssar = importlib.import_module(script)
    texts, compile_lowered = [], jax.stages.Lowered.compile
    select_trusted = ssar.select_trusted

    def recorded(lowered, *args, **keywords):
        compiled = compile_lowered(lowered, *args, **keywords)
        texts.append(compiled.as_text())
        return compiled

    def label_too(data, ends, keys, fingerprint, config):
        sizes = data.obs.shape[1], data.action.shape[1]
        state = jax.jit(jax.vmap(lambda key: ssar.iql_init(key, *sizes)))(keys)
        state = ssar.on_devices(state, "seeds")
        ssar.iql_interval.lower(state, data, config, 30).compile()
        ssar.select_by_advantage.lower(state, data).compile()
        os.makedirs(workdir + "-labels")
        np.save(os.path.join(workdir + "-labels", "labels.npy"),
                ssar.label_by_iql(keys, data, config))  # fmt: skip
        return select_trusted(data, ends, keys, fingerprint, config)

    jax.stages.Lowered.compile = recorded
    if script == "ssar_td3bc":
        ssar.select_trusted = label_too
    try:
        results = ssar.main(settings(script, data), workdir)
    finally:
        jax.stages.Lowered.compile, ssar.select_trusted = compile_lowered, select_trusted
    mesh = jax.sharding.get_mesh()
    return {
        "programs": len(texts),
        "collectives": sorted({name for text in texts for name in COLLECTIVE.findall(text)}),
        "devices": 1 if mesh.empty else mesh.size,
        "last": results["last"],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
