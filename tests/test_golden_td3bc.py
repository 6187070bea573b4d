"""ssar_td3bc's update against the authors' own numbers, in float64 and float32."""

import json
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
    find_cases,
    flatten,
    load_case,
    members,
    pack,
    td3_parameters,
)

import ssar_td3bc as ssar
from configs.ssar_td3bc import get_config

CASES = find_cases("td3_")
SCHEDULE = re.compile("official|stop_late|period4")  # others of td3_a and cql_a


def golden_config(hp):
    """Our config for a case's hyper-parameters."""
    config = get_config()
    config.update(
        discount=hp["discount"],
        target_update_rate=hp["tau"],
        policy_noise=hp["policy_noise"],
        noise_clip=hp["noise_clip"],
        policy_freq=int(hp["policy_freq"]),
        expl_noise=hp["expl_noise"],
        coefficient_init=hp["init_beta"],
        n_start=float(hp["min_n_away"]),
        n_end=float(hp["max_n_away"]),
        update_period=int(hp["update_period"]),
        coefficient_lr=hp["beta_lr"],
        decay_steps=int(hp["decay_steps"]),
        select_actions=bool(hp["select_actions"]),
        loosen_bound=bool(hp["loosen_bound"]),
        hidden_dims=(256, 256),
        coefficient_hidden_dims=(512, 512, 512),
    )
    return ml_collections.FrozenConfigDict(config)


def golden_state(params, config, dtype):
    """A TrainState that starts from the authors' networks."""
    nets = {name: pack(net) for name, net in params.items()}
    nets = jax.tree.map(lambda x: jnp.asarray(x, dtype), nets)
    pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), nets["critic_1"], nets["critic_2"])
    actor_adam, critic_adam, coefficient_adam = ssar.optimizers(config)
    return ssar.TrainState(
        actor=nets["actor"],
        target_actor=nets["actor"],
        critic=pair,
        target_critic=pair,
        coefficient=nets["beta"],
        actor_opt=actor_adam.init(nets["actor"]),
        critic_opt=critic_adam.init(pair),
        coefficient_opt=coefficient_adam.init(nets["beta"]),
        threshold=ssar.Threshold(jnp.asarray(config.n_start, dtype), jnp.int32(-1)),
        step=jnp.int32(0),
        online_step=jnp.int32(0),
        key=jax.random.key(0),
    )


def first_moments(state):
    """Adam's running gradient means, by the fixture's names."""
    return (
        by_name("actor", adam_means(state.actor_opt))
        | by_name("critic", adam_means(state.critic_opt))
        | by_name("beta", adam_means(state.coefficient_opt))
    )


def by_name(name, params):
    if "critic" not in name:
        return flatten(name, params)
    suffix = name.removeprefix("critic")
    first, second = members(params)
    return flatten(f"critic_1{suffix}", first) | flatten(f"critic_2{suffix}", second)


def parameters(state):
    return (
        by_name("actor", state.actor)
        | by_name("actor_target", state.target_actor)
        | by_name("critic", state.critic)
        | by_name("critic_target", state.target_critic)
        | by_name("beta", state.coefficient)
    )


def replay(path, dtype):
    """Runs a case; yields per step what it was given and what came of it."""
    case, hp = load_case(path)
    config = golden_config(hp)
    state = golden_state(td3_parameters(), config, dtype)
    update = jax.jit(
        partial(ssar.update_step, config=config), static_argnames=("update_actor", "online")
    )
    beta = jax.jit(partial(ssar.coefficient, config=config))
    cast = partial(jnp.asarray, dtype=dtype)
    for i in range(len(case["batch/actions"])):
        obs, action, reward, next_obs, done, trusted = (
            cast(case[f"batch/{key}"][i])
            for key in (
                "observations",
                "actions",
                "rewards",
                "next_observations",
                "dones",
                "trusts",
            )
        )
        batch = ssar.Transition(obs, action, reward[:, 0], next_obs, done[:, 0], trusted[:, 0])
        noise = ssar.Noise(cast(case["draw/target_policy_noise_unit"][i]))
        online_step = int(case["batch/online_steps"][i])
        before, beta_before = first_moments(state), beta(state.coefficient, obs)
        # update_actor is left to the state's own counter
        state, info = update(
            state._replace(online_step=jnp.int32(online_step - 1)),
            batch,
            noise,
            online=online_step > 0,
        )
        after = first_moments(state)
        gradients = {key: (after[key] - 0.9 * before[key]) / (1 - 0.9) for key in after}
        yield case, i, batch, state, info, gradients, beta_before, beta(state.coefficient, obs)


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(path, "float64") for path in CASES]
    + [(path, "float32") for path in CASES if not SCHEDULE.search(path)],
    ids=os.path.basename,
)
def test_update_step_reproduces_the_authors(path, dtype):
    golden = Comparison(path, load_case(path)[0], dtype)
    for name, net in td3_parameters().items():
        golden.initial |= flatten(name, net)

    with jax.enable_x64(dtype == "float64"):
        for case, i, batch, state, info, gradients, beta_before, beta_after in replay(path, dtype):
            check = partial(golden.check, i)
            for ours, theirs in LOGS.items():
                if ours in info:
                    check(f"log/{theirs}", info[ours], "log")
            check("log/constrained_nums", info["constrained_fraction"] * len(batch.trusted), "log")
            check("log/beta_mean", authors_beta_mean(beta_before, batch, case), "beta")
            check("beta_net/before", beta_before, "beta")
            check("beta_net/after", beta_after, "beta")
            check("state/n_away", state.threshold.n, "log")
            check("state/update_threshold", state.threshold.stopped_at < 0, "log")
            golden.check_gradients(i, gradients)
            golden.check_parameters(i, parameters(state))

            acts = (
                np.asarray(batch.trusted) > 0
                if state_config(case)["loosen_bound"]
                else np.full(len(beta_before), True)
            )
            acts = acts if acts.any() else ~acts
            beta = np.asarray(beta_before)[acts]
            if np.isfinite(info["beta_mean"]):
                ours = [float(info[f"beta_{kind}"]) for kind in ("min", "mean", "max")]
                np.testing.assert_allclose(ours, [beta.min(), beta.mean(), beta.max()], rtol=1e-5)

    golden.finish()
    assert {"log/critic_loss", "beta_net/after", "state/n_away"} <= golden.compared


LOGS = {
    "critic_loss": "critic_loss",
    "q1": "q1",
    "actor_loss": "actor_loss",
    "margin": "beta_weight",
}


def state_config(case):
    return json.loads(str(case["meta"]))["hyper_parameters"]


def authors_beta_mean(beta, batch, case):
    """Their log counts untrusted rows as zeros, unless loosen_bound; ours leaves them out."""
    trusted = np.asarray(batch.trusted)
    masked = np.asarray(beta) * (trusted if state_config(case)["select_actions"] else 1)
    return (
        masked[trusted > 0].mean()
        if state_config(case)["loosen_bound"] and trusted.any()
        else masked.mean()
    )
