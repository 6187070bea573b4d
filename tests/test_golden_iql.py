"""IQL labelling against the authors' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import find_cases, iql_parameters, load_case, pack

import ssar_cql
import ssar_td3bc
from configs.ssar_td3bc import get_config


@pytest.mark.parametrize("ssar", [ssar_td3bc, ssar_cql], ids=lambda script: script.__name__)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", find_cases("iql"))
def test_iql_reproduces_the_authors(path, dtype, ssar):
    case, hp = load_case(path)
    config = get_config()
    config.update(expectile=hp["iql_tau"], discount=hp["discount"], target_update_rate=hp["tau"])
    rtol = 1e-6 if dtype == "float64" else 2e-5
    with jax.enable_x64(dtype == "float64"):
        nets = {name: pack(net) for name, net in iql_parameters().items()}
        nets = jax.tree.map(lambda x: jnp.asarray(x, dtype), nets)
        pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), nets["qf1"], nets["qf2"])
        adam = ssar.iql_adam
        state = ssar.IQLState(
            nets["vf"], pair, pair, adam.init(nets["vf"]), adam.init(pair), jax.random.key(0)
        )
        columns = ("observations", "actions", "rewards", "next_observations", "terminals")
        data = ssar.Transition(
            *(jnp.asarray(case[f"dataset/{key}"], dtype) for key in columns), None
        )
        step = jax.jit(lambda state, batch: ssar.iql_step(state, batch, config))
        for i, rows in enumerate(case["batch/indices"]):
            batch = ssar.take(data, jnp.asarray(rows))
            state, info = step(state, batch)
            for ours, theirs in (
                ("iql_value_loss", "iql_value_loss"),
                ("iql_critic_loss", "iql_q_loss"),
            ):
                np.testing.assert_allclose(
                    float(info[ours]), case[f"f64/log/{theirs}"][i], rtol=rtol
                )
            value = ssar.forward(state.value, batch.obs)[..., 0]
            q = ssar.critics(state.critic, batch.obs, batch.action).min(axis=0)
            scale = np.abs(case["f64/local/v_after"]).max()
            np.testing.assert_allclose(
                value, case["f64/local/v_after"][i], rtol=0, atol=rtol * scale
            )
            if "f64/local/q_after" in case:
                scale = np.abs(case["f64/local/q_after"]).max()
                np.testing.assert_allclose(
                    q, case["f64/local/q_after"][i], rtol=0, atol=rtol * scale
                )
        batched = jax.tree.map(
            lambda x: x[None], state._replace(key=jax.random.key_data(state.key))
        )
        labels = ssar.select_by_advantage(batched, data)[0]
        np.testing.assert_array_equal(labels, case["labels/trusts"][: len(data.reward)] > 0)
        assert 0.1 < labels.mean() < 0.9
