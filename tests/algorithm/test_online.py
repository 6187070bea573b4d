"""From offline to online: the replay buffer, the batches, exploration and the loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    StubRun,
    batch_of,
    both_scripts,
    evaluate,
    new_state,
    new_states,
    one_of,
    settings,
    walks,
)
from toys import OBS

import ssar_td3bc
from common.seeds import Seeds

# --------------------------------------------------------------------------- buffer and batches


def tagged(tags, trusted):
    """Transitions with one number in every column, which identifies them."""
    tags = jnp.asarray(tags, jnp.float32)
    return ssar_td3bc.Transition(tags, tags, tags, tags, tags, jnp.full(len(tags), trusted))


@pytest.mark.parametrize("buffer_init", ["all", "half", "none"])
def test_batches_hold_offline_and_stored_transitions_as_the_settings_say(buffer_init):
    """Whole transitions, all equally often, and when the buffer is full its newest."""
    config = settings(ssar_td3bc, buffer_init=buffer_init, buffer_capacity=6, batch_size=700)
    data = tagged(range(8), trusted=0.0)
    data = ssar_td3bc.offline_part(data._replace(trusted=data.trusted[None]), None, config)
    data, old = data._replace(trusted=data.trusted[0]), 0 if buffer_init == "none" else 8
    buffer, store = ssar_td3bc.init_buffer(data, config), jax.jit(ssar_td3bc.store)
    for stored in range(1, 21):
        buffer = store(buffer, one_of(tagged([100 + stored], trusted=1.0)))
        if stored not in (1, 6, 20):
            continue
        batch = ssar_td3bc.sample_batch(jax.random.key(stored), data, buffer, config)
        new = min(stored, 6)
        drawn, counts = np.unique(batch.reward, return_counts=True)
        assert drawn.tolist() == [*range(old), *range(101 + stored - new, 101 + stored)]
        expected = np.full(old + new, 700 / (old + new))
        if buffer_init == "half":
            expected[:old], expected[old:] = 350 / old, 350 / new
            assert counts[:old].sum() == 350
        assert (abs(counts - expected) < 6 * np.sqrt(expected) + 1).all()
        np.testing.assert_array_equal(batch.trusted, batch.reward > 100)
        for column in (batch.obs, batch.action, batch.next_obs):
            np.testing.assert_array_equal(column, batch.reward)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_transition_is_stored_in_place(seeds):
    per_seed = lambda x: jnp.stack([x] * seeds)
    batch = batch_of(ssar_td3bc)
    empty = ssar_td3bc.init_buffer(batch, settings(ssar_td3bc, online_steps=300_000))
    buffer, transition = (jax.tree.map(per_seed, x) for x in (empty, one_of(batch)))
    size = sum(x.nbytes for x in jax.tree.leaves(empty))
    add = Seeds(seeds).vmap(ssar_td3bc.store, donate=0).lower(buffer, transition).compile()
    assert add.memory_analysis().temp_size_in_bytes < size / 4
    place = buffer.rows.obs.unsafe_buffer_pointer()
    assert add(buffer, transition).rows.obs.unsafe_buffer_pointer() == place


# ------------------------------------------------------------------------ exploration, the loop


@both_scripts
def test_exploration_is_tanh_gaussian_in_cql_and_adds_noise_in_td3bc(ssar):
    state, obs = new_state(ssar, settings(ssar)), jnp.ones(OBS)

    def actions(steps, key=5, **overrides):
        explore = partial(ssar.explore, config=settings(ssar, **overrides))
        explore = jax.vmap(explore, in_axes=(None, None, None, 0))
        return np.asarray(explore(state.actor, obs, jax.random.key(key), jnp.arange(steps)))

    greedy = np.asarray(ssar.act(state.actor, obs[None]))[0]
    if ssar is ssar_td3bc:  # deterministic by default
        np.testing.assert_allclose(actions(1)[0], greedy, rtol=1e-6)
        options = {"exploration_noise": 0.1}
        np.testing.assert_allclose(actions(400, **options).std(axis=0), 0.1, rtol=0.2)
        assert abs(actions(20, exploration_noise=9.0)).max() == 1
    else:
        options, before_tanh = {}, np.arctanh(actions(400))
        mean, log_std = ssar.actor(state.actor, obs[None])
        np.testing.assert_allclose(before_tanh.mean(axis=0), mean[0], atol=0.1)
        np.testing.assert_allclose(before_tanh.std(axis=0), np.exp(log_std[0]), rtol=0.2)
        np.testing.assert_allclose(greedy, np.tanh(mean[0]), rtol=1e-5)
    both = np.concatenate([actions(400, key, **options) for key in (5, 6)])
    assert len(np.unique(both[:, 0])) == 800  # every step and every seed has its own noise


def test_finetune_moves_the_actor_every_new_policy_freq_updates_after_the_warmup():
    """What it stores and how many updates it makes is checked in test_whole_runs.py."""
    lengths = {"online_steps": 40, "warmup_steps": 10, "eval_interval": 20, "new_policy_freq": 3}
    config = settings(ssar_td3bc, buffer_init="none", **lengths)
    data = batch_of(ssar_td3bc, rows=0)._replace(trusted=jnp.zeros((2, 0)))
    run, start = StubRun(), new_states(ssar_td3bc, config, 2)
    ssar_td3bc.finetune(start, data, walks(2), evaluate, Seeds(2), run, config)
    assert not any(run.metrics["online"][:10])
    moved = ["actor_loss" in metrics for metrics in run.metrics["online"][10:]]
    assert moved == [i % 3 == 0 for i in range(1, 31)]
