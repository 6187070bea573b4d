"""The loops as lowered for GPU and TPU, which takes neither: what is in them, what is donated."""

import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax import export
from toys import ACTION, OBS, one, tiny_config, toy_batch, toy_states

import ssar_cql
import ssar_td3bc

SEEDS = 2
both_scripts = pytest.mark.parametrize("ssar", [ssar_td3bc, ssar_cql], ids=["td3bc", "cql"])
# What waits for the host or moves data there: operations, custom calls, and marks on arguments.
HOST = re.compile(r"infeed|outfeed|stablehlo\.(send|recv)|callback|host|annotate_device_placement")


def without_locations(text):
    """A module without the names of the files and functions that it comes from."""
    text = re.sub(r"^#loc.*", "", text, flags=re.MULTILINE)
    return re.sub(r"loc\((?:[^()]|\([^()]*\))*\)", "", text)


def programs(ssar, config):
    """[(jitted program, its arguments, keywords, how many arrays it is given to overwrite)]."""
    data = toy_batch(rows=300)._replace(trusted=jnp.ones((SEEDS, 300)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), SEEDS))
    seeds = lambda init, *args: jax.eval_shape(jax.vmap(lambda key: init(key, *args)), keys)
    state = seeds(ssar.init_state, OBS, ACTION, config)
    size = lambda *trees: len(jax.tree.leaves(trees))
    iql = seeds(ssar.iql_init, OBS, ACTION)
    buffer = ssar.init_buffer(data, config)
    transition = jax.tree.map(lambda x: x[:, 0], buffer.rows)
    due = {"update_actor": True} if ssar is ssar_td3bc else {}
    noisy = {"config": config} if ssar is ssar_td3bc else {}
    shapes = jax.eval_shape(
        lambda *args: ssar.online_step(*args, config, **due), state, {}, buffer, data
    )
    totals = shapes[1]
    online = (state, totals, buffer, data)
    unlabelled = data._replace(trusted=None)
    fixed = {"config": config}
    return [
        (ssar.train_interval, (state, data), fixed, size(state)),
        (ssar.iql_interval, (iql, unlabelled), fixed | {"num_updates": 10}, size(iql)),
        (ssar.select_by_advantage, (iql, unlabelled), {}, 0),
        (ssar.explore, (state.actor, data.obs[:SEEDS], state.key, np.int32(1)), noisy, 0),
        (ssar.store, (buffer, transition), {}, size(buffer)),
        (ssar.online_step, online, fixed | due, size(state, totals)),
    ]


@pytest.mark.parametrize(
    ("ssar", "overrides"),
    [(ssar_td3bc, {}), (ssar_cql, {}), (ssar_cql, {"block_size": 32})],
    ids=["ssar_td3bc", "ssar_cql", "ssar_cql-whole-batch"],
)
def test_loops_stay_on_the_device_and_overwrite_their_state(ssar, overrides, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "not a cpu")
    config = tiny_config(
        script=ssar.__name__, num_seeds=SEEDS, online_steps=40, buffer_init="all", **overrides
    )
    config = ml_collections.FrozenConfigDict(config)
    found = programs(ssar, config)
    for program, args, keywords, donated in found[:1] if overrides else found:
        program.clear_cache()  # of what a CPU gets
        for platform in ("cuda", "tpu"):
            text = export.export(program, platforms=[platform])(*args, **keywords).mlir_module()
            code = without_locations(text)
            assert not HOST.search(code), (program.__name__, platform)
            assert len(re.findall(r"tf\.aliasing_output", code)) == donated, program.__name__
            assert "jax.buffer_donor" not in code  # donated, but without a result to go to
        program.clear_cache()


def test_a_callback_would_be_found():
    """The pattern finds one; JAX lowers callbacks for devices that are there alone."""
    program = jax.jit(lambda x: jax.pure_callback(np.sin, x, x))
    text = program.trace(jnp.ones(3)).lower().as_text()
    assert HOST.search(without_locations(text))


@both_scripts
def test_lower_precision_leaves_out_the_coefficient(ssar):
    """matmul_precision is asked of every product, float32 of β_φ's in any case."""
    # no other network has β_φ's width
    config = tiny_config(script=ssar.__name__, coefficient_hidden_dims=(24, 24, 24))
    config = ml_collections.FrozenConfigDict(config)
    state, batch = one(toy_states(config, [0], ssar)), toy_batch()
    noise = ssar.sample_noise(jax.random.key(1), batch, config)
    due = {"update_actor": True} if ssar is ssar_td3bc else {}
    update = lambda state: ssar.update_step(state, batch, noise, config, **due)
    for precision in ("float32", "bfloat16"):
        with jax.default_matmul_precision(precision):
            text = jax.jit(update).lower(state).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        full = [line for line in products if "HIGHEST" in line]
        if precision == "float32":
            assert full == products
        else:
            assert 0 < len(full) < len(products)
            assert all("24x" in line or "x24" in line for line in full)
