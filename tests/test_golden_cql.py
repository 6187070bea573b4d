"""ssar_cql's update against the authors' own numbers, in float64 and float32."""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from golden_cases import (
    Comparison,
    adam_means,
    cql_parameters,
    find_cases,
    flatten,
    load_case,
    members,
    pack,
)

import ssar_cql as ssar
from configs.ssar_cql import get_config

CASES = find_cases("cql_")
SCHEDULE = re.compile("official|stop_late|period4")  # others of td3_a and cql_a


def golden_config(hp):
    """Our config for a case's hyper-parameters."""
    config = get_config("custom")
    config.update(
        discount=hp["discount"],
        target_update_rate=hp["soft_target_update_rate"],
        actor_lr=hp["policy_lr"],
        critic_lr=hp["qf_lr"],
        critic_layers=(int(hp["q_n_hidden_layers"]), 3),
        num_sampled_actions=int(hp["cql_n_actions"]),
        importance_sample=bool(hp["cql_importance_sample"]),
        cql_temperature=float(hp["cql_temp"]),
        clip_diff_min=float(hp["cql_clip_diff_min"]),
        clip_diff_max=float(hp["cql_clip_diff_max"]),
        lagrange=bool(hp["cql_lagrange"]),
        target_action_gap=float(hp["cql_target_action_gap"]),
        max_target_backup=bool(hp["cql_max_target_backup"]),
        backup_entropy=bool(hp["backup_entropy"]),
        bc_weight=0.5 if "ant" in hp["env"] else 0.0,
        cql_alpha=float(hp["cql_alpha"]),
        n_start=float(hp["min_n_away"]),
        n_end=float(hp["max_n_away"]),
        update_period=int(hp["update_period"]),
        coefficient_lr=hp["beta_lr"],
        decay_steps=int(hp["decay_steps"]),
        select_actions=bool(hp["select_actions"]),
        loosen_bound=bool(hp["loosen_bound"]),
        block_size=12,  # no divisor of the batch
    )
    return ml_collections.FrozenConfigDict(config)


def golden_state(params, config, dtype):
    """A TrainState that starts from the authors' networks."""
    nets = {name: pack(net) for name, net in params.items()}
    nets = jax.tree.map(lambda x: jnp.asarray(x, dtype), nets)
    pair = (nets["critic_1"], nets["critic_2"])
    if len(set(config.critic_layers)) == 1:
        pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), *pair)
    log_alpha, log_alpha_prime = jnp.zeros((), dtype), jnp.ones((), dtype)
    actor_adam, critic_adam, coefficient_adam = ssar.optimizers(config)
    return ssar.TrainState(
        actor=nets["actor"],
        critic=pair,
        target_critic=pair,
        coefficient=nets["beta"],
        log_alpha=log_alpha,
        log_alpha_prime=log_alpha_prime,
        actor_opt=actor_adam.init(nets["actor"]),
        critic_opt=critic_adam.init(pair),
        coefficient_opt=coefficient_adam.init(nets["beta"]),
        log_alpha_opt=actor_adam.init(log_alpha),
        log_alpha_prime_opt=critic_adam.init(log_alpha_prime),
        threshold=ssar.Threshold(jnp.asarray(config.n_start, dtype), jnp.int32(-1)),
        step=jnp.int32(0),
        online_step=jnp.int32(0),
        key=jax.random.key(0),
    )


def first_moments(state):
    """Adam's running gradient means, by the fixture's names."""
    first, second = members(adam_means(state.critic_opt))
    return (
        flatten("actor", adam_means(state.actor_opt))
        | flatten("critic_1", first)
        | flatten("critic_2", second)
        | flatten("beta", adam_means(state.coefficient_opt))
        | flatten("log_alpha", adam_means(state.log_alpha_opt))
        | flatten("log_alpha_prime", adam_means(state.log_alpha_prime_opt))
    )


def parameters(state):
    found = flatten("actor", state.actor) | flatten("beta", state.coefficient)
    for i in range(2):
        found |= flatten(f"critic_{i + 1}", members(state.critic)[i])
        found |= flatten(f"critic_{i + 1}_target", members(state.target_critic)[i])
    found |= flatten("log_alpha", state.log_alpha)
    return found | flatten("log_alpha_prime", state.log_alpha_prime)


def replay(path, dtype):
    """Runs a case; yields per step what it was given and what came of it."""
    case, hp = load_case(path)
    config = golden_config(hp)
    state = golden_state(cql_parameters("ant" in hp["env"]), config, dtype)
    update = jax.jit(partial(ssar.update_step, config=config), static_argnames="online")
    beta = jax.jit(partial(ssar.coefficient, config=config))
    margins = jax.jit(ssar.log_likelihood_margin)
    for i in range(len(case["batch/actions"])):
        cast = lambda key, i=i: jnp.asarray(case[key][i], dtype)
        batch = ssar.Transition(
            obs=cast("batch/observations"),
            action=cast("batch/actions"),
            reward=cast("batch/rewards")[:, 0],
            next_obs=cast("batch/next_observations"),
            terminated=cast("batch/dones")[:, 0],
            trusted=cast("batch/trusts")[:, 0],
        )
        target_action = cast("draw/target_policy_eps")
        noise = ssar.Noise(
            policy=cast("draw/policy_eps"),
            target_action=target_action.reshape(len(batch.action), -1, 3),
            random_action=cast("draw/cql_random_actions"),
            current_action=cast("draw/cql_current_eps"),
            next_action=cast("draw/cql_next_eps"),
        )
        online_step = int(case["batch/online_steps"][i])
        before, n = first_moments(state), state.threshold
        beta_before = beta(state.coefficient, batch.obs)
        state = state._replace(online_step=jnp.int32(online_step - 1))
        state, info = update(state, batch, noise, online=online_step > 0)
        after = first_moments(state)
        gradients = {key: (after[key] - 0.9 * before[key]) / (1 - 0.9) for key in after}
        margin = margins(state.actor, batch, n)
        betas = (beta_before, beta(state.coefficient, batch.obs))
        yield i, batch, state, info, gradients, margin, betas


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(path, "float64") for path in CASES]
    + [(path, "float32") for path in CASES if not SCHEDULE.search(path)],
    ids=os.path.basename,
)
def test_update_step_reproduces_the_authors(path, dtype):
    case, hp = load_case(path)
    golden = Comparison(path, case, dtype)
    for name, net in cql_parameters("ant" in hp["env"]).items():
        golden.initial |= flatten(name, net)
    golden.initial |= {"log_alpha": np.zeros(()), "log_alpha_prime": np.ones(())}

    with jax.enable_x64(dtype == "float64"):
        for i, batch, state, info, gradients, margin, betas in replay(path, dtype):
            check = partial(golden.check, i)
            for ours, theirs in LOGS.items():
                if ours in info:
                    check(f"log/{theirs}", info[ours], "log")
            check("log/log_pi", -info["entropy"], "log")
            check("log/constrained_nums", info["constrained_fraction"] * len(margin), "log")
            check("local/train/beta_weight", margin, "log")
            check("beta_net/before", betas[0], "beta")
            check("beta_net/after", betas[1], "beta")
            check("state/n_away", state.threshold.n, "log")
            check("state/update_threshold", state.threshold.stopped_at < 0, "log")
            golden.check_gradients(i, gradients)
            golden.check_parameters(i, parameters(state))

            acts = np.asarray(batch.trusted) > 0
            beta = np.asarray(betas[0])[acts if hp["loosen_bound"] and acts.any() else slice(None)]
            ours = [float(info[f"beta_{kind}"]) for kind in ("min", "mean", "max")]
            np.testing.assert_allclose(ours, [beta.min(), beta.mean(), beta.max()], rtol=1e-5)
            for ours, theirs in (("td_loss", "qf{}_loss"), ("penalty", "cql_min_qf{}_loss")):
                pair = [case[f"f64/log/{theirs.format(critic)}"][i] for critic in (1, 2)]
                info["penalty"] = info["critic_loss"] - info["td_loss"]
                scale = np.abs(case["f64/log/qf_loss"]).max()
                atol = scale * (1e-9 if dtype == "float64" else 3e-5)
                np.testing.assert_allclose(float(info[ours]), sum(pair), rtol=0, atol=atol)

    golden.finish()
    expected = {"log/qf_loss", "beta_net/after", "state/n_away", "grad_stats/log_alpha"}
    assert expected <= golden.compared
    assert ("grad_stats/log_alpha_prime" in golden.compared) == hp["cql_lagrange"]


LOGS = {
    "critic_loss": "qf_loss",
    "actor_loss": "policy_loss",
    "q1": "average_qf1",
    "alpha": "alpha",
    "alpha_prime": "alpha_prime",
    "margin": "beta_weight",
}
