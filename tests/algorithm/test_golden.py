"""update_step and IQL labelling against the authors' own numbers, in float64 and float32."""

import importlib
from functools import partial

import golden_cases as golden
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import ssar_cql
import ssar_td3bc

# Our names of the authors' hyper-parameters, where they differ by more than "cql_"
RENAMED = {
    "iql_tau": "expectile",
    "tau": "target_update_rate",
    "soft_target_update_rate": "target_update_rate",
    "init_beta": "coefficient_init",
    "policy_lr": "actor_lr",
    "qf_lr": "critic_lr",
    "cql_n_actions": "num_sampled_actions",
    "cql_temp": "cql_temperature",
    "min_n_away": "n_start",
    "max_n_away": "n_end",
    "beta_lr": "coefficient_lr",
}
# Our metrics, and what the authors call them in TD3+BC and in CQL
LOGS = {
    "critic_loss": ("critic_loss", "qf_loss"),
    "q1": ("q1", "average_qf1"),
    "actor_loss": ("actor_loss", "policy_loss"),
    "alpha": ("alpha",),
    "alpha_prime": ("alpha_prime",),
    "margin": ("beta_weight",),
}
CASES = [*golden.find_cases("td3_"), *golden.find_cases("cql_")]
# These differ from td3_a_fast and cql_a_fast in their schedule alone.
SCHEDULES = ("official", "stop_late", "period4")
IN_FLOAT32 = [path for path in CASES if not path.stem.endswith(SCHEDULES)]


def golden_config(ssar, hp, dtype):
    """Our settings for a case's hyper-parameters."""
    config = importlib.import_module(f"configs.{ssar.__name__}").get_config("custom")
    config.actor_lr_decay = False
    for theirs, value in hp.items():
        name = RENAMED.get(theirs, theirs if theirs in config else theirs.removeprefix("cql_"))
        if name in config:
            config[name] = config.get_type(name)(value)
    if ssar is ssar_cql:
        config.critic_layers = (int(hp["q_n_hidden_layers"]), 3)
        config.bc_weight = 0.5 if "ant" in hp["env"] else 0.0
        config.block_size = 12 if dtype == "float64" else None  # 12 is no divisor of the batch
    return ml_collections.FrozenConfigDict(config)


def in_dtype(tree, dtype):
    """A tree with all its floating-point arrays cast."""
    cast = lambda x: np.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, tree)


def golden_state(ssar, config, hp, dtype):
    """A TrainState that starts from the authors' networks."""
    nets = golden.td3_parameters()
    if ssar is ssar_cql:
        nets = golden.cql_parameters("ant" in hp["env"])
    init = partial(ssar.init_state, obs_dim=5, action_dim=3, config=config)
    state = jax.jit(init)(jax.random.key(0))
    new = {"actor": nets["actor"], "critic": golden.pair_of(nets), "coefficient": nets["beta"]}
    targets = {f"target_{name}": net for name, net in new.items()}
    new |= {name: net for name, net in targets.items() if name in state._fields}
    return in_dtype(state._replace(**new), dtype)


def golden_inputs(ssar, case, i, dtype):
    """The batch and the noise of update i."""
    get = lambda key: jnp.asarray(case[key][i], dtype)
    names = ("observations", "actions", "rewards", "next_observations", "dones", "trusts")
    columns = [get(f"batch/{name}") for name in names]
    columns = [x[:, 0] if x.shape[1] == 1 else x for x in columns]
    if ssar is ssar_td3bc:
        noise = ssar.Noise(get("draw/target_policy_noise_unit"))
    else:
        noise = ssar.Noise(
            action=get("draw/policy_eps"),
            target_action=get("draw/target_policy_eps").reshape(len(columns[0]), -1, 3),
            random_action=get("draw/cql_random_actions"),
            current_action=get("draw/cql_current_eps"),
            next_action=get("draw/cql_next_eps"),
        )
    return ssar.Transition(*columns), noise


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(path, "float64") for path in CASES]
    + [pytest.param(path, "float32", marks=pytest.mark.slow) for path in IN_FLOAT32],
    ids=lambda x: getattr(x, "stem", x),
)
def test_update_step_reproduces_the_authors(path, dtype):
    ssar = ssar_td3bc if path.stem.startswith("td3") else ssar_cql
    case, hp = golden.load_case(path)
    config = golden_config(ssar, hp, dtype)
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("float32"):
        state = golden_state(ssar, config, hp, dtype)
        comparison = golden.Comparison(path, case, dtype, golden.parameters(state))
        static = ("online", "update_actor") if ssar is ssar_td3bc else "online"
        update = jax.jit(partial(ssar.update_step, config=config), static_argnames=static)
        coefficient = jax.jit(partial(ssar.coefficient, config=config))
        margins = jax.jit(ssar.log_likelihood_margin)
        for i in range(len(case["batch/actions"])):
            batch, noise = golden_inputs(ssar, case, i, dtype)
            online_step = int(case["batch/online_steps"][i])
            options = {"online": online_step > 0}
            if ssar is ssar_td3bc:
                options["update_actor"] = (i + 1) % config.policy_freq == 0
            before = state._replace(online_step=jnp.int32(online_step - 1))
            state, info = update(before, batch, noise, **options)
            beta, beta_after = (coefficient(x.coefficient, batch.obs) for x in (before, state))
            comparison.check(i, "beta_net/before", beta, "beta")
            comparison.check(i, "beta_net/after", beta_after, "beta")
            comparison.check(i, "state/n_away", state.threshold.n, "log")
            comparison.check(i, "state/update_threshold", state.threshold.stopped_at < 0, "log")
            old, new = golden.first_moments(before), golden.first_moments(state)
            comparison.check_gradients(i, {key: (new[key] - 0.9 * old[key]) / 0.1 for key in new})
            comparison.check_parameters(i, golden.parameters(state))
            check_metrics(ssar, comparison, i, info, batch, beta, config)
            if ssar is ssar_cql:
                margin = margins(state.actor, batch, before.threshold)
                comparison.check(i, "local/train/beta_weight", margin, "log")
    comparison.finish()
    logs = {"log/critic_loss"} if ssar is ssar_td3bc else {"log/qf_loss", "grad_stats/log_alpha"}
    assert logs | {"beta_net/after", "state/n_away"} <= comparison.compared
    assert ("grad_stats/log_alpha_prime" in comparison.compared) == hp.get("cql_lagrange", False)


def check_metrics(ssar, comparison, i, info, batch, beta, config):
    """Compares the metrics of update i with the authors' logs, and β_φ's with `beta`."""
    for ours, names in LOGS.items():
        for theirs in names if ours in info else ():
            comparison.check(i, f"log/{theirs}", info[ours], "log")
    if ssar is ssar_cql:
        comparison.check(i, "log/log_pi", -info["entropy"], "log")
        penalty = info["critic_loss"] - info["td_loss"]
        for ours, theirs in ((info["td_loss"], "qf{}_loss"), (penalty, "cql_min_qf{}_loss")):
            logs = [comparison.case[f"f64/log/{theirs.format(critic)}"][i] for critic in (1, 2)]
            atol = np.abs(comparison.case["f64/log/qf_loss"]).max() * comparison.tolerance["log"]
            np.testing.assert_allclose(float(ours), sum(logs), rtol=0, atol=atol)
    if "margin" in info:
        count = info["constrained_fraction"] * len(batch.trusted)
        comparison.check(i, "log/constrained_nums", count, "log")
        acts = np.asarray(batch.trusted) > 0 if config.loosen_bound else slice(None)
        beta = np.asarray(beta)[acts] if np.any(acts) else np.asarray(beta)
        ours = [float(info[f"beta_{kind}"]) for kind in ("min", "mean", "max")]
        np.testing.assert_allclose(ours, [beta.min(), beta.mean(), beta.max()], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", golden.find_cases("iql"), ids=lambda path: path.stem)
def test_iql_reproduces_the_authors(path, dtype):
    ssar, (case, hp) = ssar_td3bc, golden.load_case(path)
    config = golden_config(ssar, hp, dtype)
    rtol = 1e-6 if dtype == "float64" else 2e-5

    def assert_golden(ours, key, i):
        golden = case[f"f64/{key}"]
        atol = rtol * abs(golden if golden[i].ndim else golden[i]).max()
        np.testing.assert_allclose(ours, golden[i], rtol=0, atol=atol)

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("float32"):
        nets, state = golden.iql_parameters(), ssar.iql_init(jax.random.key(0), 5, 3)
        pair = golden.pair_of(nets)
        state = state._replace(value=nets["value"], critic=pair, target_critic=pair)
        state = in_dtype(state, dtype)
        columns = ("observations", "actions", "rewards", "next_observations", "terminals")
        columns = [jnp.asarray(case[f"dataset/{name}"], dtype) for name in columns]
        data = ssar.Transition(*columns, trusted=None)
        step = jax.jit(partial(ssar.iql_step, config=config))
        for i, indices in enumerate(case["batch/indices"]):
            batch = ssar.take(data, jnp.asarray(indices))
            state, info = step(state, batch)
            assert_golden(info["iql_value_loss"], "log/iql_value_loss", i)
            assert_golden(info["iql_critic_loss"], "log/iql_q_loss", i)
            value = ssar.forward(state.value, batch.obs)[..., 0]
            assert_golden(value, "local/v_after", i)
            if "f64/local/q_after" in case:
                q = ssar.critics(state.critic, batch.obs, batch.action).min(axis=0)
                assert_golden(q, "local/q_after", i)
        labels = np.asarray(ssar.select_by_advantage(state, data))
        np.testing.assert_array_equal(labels, case["labels/trusts"][: len(data.reward)] > 0)
        assert 0.1 < labels.mean() < 0.9
