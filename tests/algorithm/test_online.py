"""From offline to online: the replay buffer, the batches, exploration and one step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Point,
    StubRun,
    actor_is_due,
    assert_close,
    batch_of,
    both_but_cql_slowly,
    both_scripts,
    evaluate,
    jitted_update,
    new_state,
    new_states,
    one_of,
    settings,
)
from toys import ACTION, OBS, toy_batch

import ssar_cql
import ssar_td3bc
from common.seeds import Seeds


def tagged(tags, trusted=1):
    """Transitions with one number in every column, which identifies them."""
    tags = jnp.asarray(tags, jnp.float32)
    wide = lambda width: jnp.repeat(tags[:, None], width, axis=1)
    trusted = jnp.full(len(tags), trusted, jnp.float32)
    return ssar_td3bc.Transition(wide(OBS), wide(ACTION), tags, wide(OBS), tags, trusted)


store = jax.jit(ssar_td3bc.store)
sample_batch = jax.jit(ssar_td3bc.sample_batch, static_argnames="config")

# --------------------------------------------------------------------------- buffer and batches


@pytest.mark.parametrize("buffer_init", ["all", "half", "part", "none"])
@pytest.mark.parametrize("stored", [1, 6, 20])
def test_batches_hold_offline_and_stored_transitions_as_the_settings_say(buffer_init, stored):
    """Whole transitions, all equally often, and when the buffer is full its newest."""
    config = settings(ssar_td3bc, buffer_init=buffer_init, buffer_capacity=6, batch_size=700)
    data = tagged(range(8), trusted=0)
    ends = np.array([0, 1, 0, 0, 1, 0, 0, 1], bool)
    data = ssar_td3bc.offline_part(data._replace(trusted=data.trusted[None]), ends, config)
    data = data._replace(trusted=data.trusted[0])
    buffer = ssar_td3bc.init_buffer(data, config)
    for tag in range(100, 100 + stored):
        buffer = store(buffer, one_of(tagged([tag])))
    batch = sample_batch(jax.random.key(stored), data, buffer, config)

    old = [] if buffer_init == "none" else list(range(8))  # part: all of the three episodes
    new = list(range(100, 100 + stored))[-6:]
    drawn = np.asarray(batch.reward)
    np.testing.assert_array_equal(batch.trusted, drawn >= 100)  # what is new is trusted
    for column in (batch.obs, batch.action, batch.next_obs):
        assert (np.asarray(column) == drawn[:, None]).all()
    assert set(drawn) == {*old, *new}
    for tag in (*old, *new):
        expected = 700 / len(old + new)
        if buffer_init == "half":
            expected = 350 / len(old if tag in old else new)
        assert abs((drawn == tag).sum() - expected) < 6 * np.sqrt(expected) + 1
    assert buffer_init != "half" or (drawn < 100).sum() == 350


def test_part_keeps_the_50_best_episodes_and_what_each_seed_trusts_of_them():
    rng = np.random.default_rng(0)
    ends = np.arange(240) % 3 == 2  # 80 episodes of three transitions
    trusted = rng.random((2, 240)) < 0.5
    data = tagged(rng.permutation(240))._replace(trusted=trusted)
    kept = ssar_td3bc.offline_part(data, ends, settings(ssar_td3bc, buffer_init="part"))
    rewards = np.asarray(data.reward).reshape(80, 3)
    best = np.argsort(-rewards.sum(axis=1), kind="stable")[:50]
    np.testing.assert_array_equal(kept.reward, rewards[best].ravel())
    np.testing.assert_array_equal(kept.trusted, trusted.reshape(2, 80, 3)[:, best].reshape(2, -1))
    np.testing.assert_array_equal(kept.obs[:, 0], kept.reward)


# ---------------------------------------------------------------------------------- exploration


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
        options, (mean, log_std) = {}, ssar_cql.actor(state.actor, obs[None])
        before_tanh = np.arctanh(actions(400))
        np.testing.assert_allclose(before_tanh.mean(axis=0), mean[0], atol=0.1)
        np.testing.assert_allclose(before_tanh.std(axis=0), np.exp(log_std[0]), rtol=0.2)
        np.testing.assert_allclose(greedy, np.tanh(mean[0]), rtol=1e-5)
    both = np.concatenate([actions(400, key, **options) for key in (5, 6)])
    assert len(np.unique(both[:, 0])) == 800  # every step and every seed has its own noise


# ----------------------------------------------------------------------------- one online step


@both_scripts
def test_an_online_step_is_an_annealed_update_on_what_is_stored(ssar):
    """With one transition to draw from, the batch is known."""
    config = settings(ssar, buffer_init="none", online_steps=4)
    state, row = new_state(ssar, config), batch_of(ssar, rows=1, trusted=[1])
    buffer = ssar.store(ssar.init_buffer(row, config), one_of(row))
    step = jax.jit(partial(ssar.online_update, config=config, **actor_is_due(ssar)))
    ours = step(state, buffer, jax.tree.map(lambda x: x[:0], row))
    batch = jax.tree.map(lambda x: jnp.repeat(x, config.batch_size, axis=0), row)
    noise = ssar.sample_noise(ssar.update_keys(state.key, 1)[1], batch, config)
    expected = jitted_update(ssar, config)(state, batch, noise, online=True)
    assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert float(ours[1]["anneal"]) == float(ssar.anneal_factor(1, config))  # N starts at 1


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_large_buffer_stays_in_place(seeds):
    """A step writes it where it lies, and an update copies none of it."""
    ssar = ssar_td3bc
    config = settings(ssar, online_steps=300_000)
    data, per_seed = toy_batch(), lambda x: jnp.stack([x] * seeds)
    transition = jax.tree.map(per_seed, one_of(data))
    data = data._replace(trusted=per_seed(data.trusted))
    buffer = jax.tree.map(per_seed, ssar.init_buffer(data, config))
    size = sum(x.nbytes for x in jax.tree.leaves(buffer.rows)) / seeds
    learn = partial(ssar.online_update, config=config, update_actor=True)
    learn = Seeds(seeds).vmap(learn, in_axes=(0, 0, ssar.DATA_AXES), donate=0)
    program = learn.lower(new_states(ssar, config, seeds), buffer, data).compile()
    assert program.memory_analysis().temp_size_in_bytes < size / 4
    add = Seeds(seeds).vmap(ssar.store, donate=0).lower(buffer, transition).compile()
    assert add.memory_analysis().temp_size_in_bytes < size / 4
    place = buffer.rows.obs.unsafe_buffer_pointer()
    assert add(buffer, transition).rows.obs.unsafe_buffer_pointer() == place


# ------------------------------------------------------------------------------ the whole loop


@both_but_cql_slowly
def test_finetune_stores_every_step_and_updates_after_the_warmup(ssar):
    delay = {"new_policy_freq": 3} if ssar is ssar_td3bc else {}
    lengths = {"online_steps": 40, "warmup_steps": 10, "eval_interval": 20}
    config = settings(ssar, buffer_init="none", reward_bias=-1.0, **lengths, **delay)
    data = batch_of(ssar, rows=0)._replace(trusted=jnp.zeros((2, 0)))
    run, envs, start = StubRun(), Point(2), new_states(ssar, config, 2)
    keys = jax.vmap(partial(jax.random.fold_in, data=2**32 - 1))(start.key)
    explore = jax.jit(jax.vmap(partial(ssar.explore, config=config), (0, 0, 0, None)))
    act = partial(explore, jax.tree.map(jnp.copy, start.actor))  # the state is donated
    state = ssar.finetune(start, data, envs, evaluate, Seeds(2), run, config)

    assert (state.online_step.tolist(), state.step.tolist()) == ([30, 30], [30, 30])
    assert run.score.shape == (2, 3, ACTION)
    _, buffer = run.tree
    rows = jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), buffer.rows)  # [C, S, ...]
    assert buffer.added.tolist() == [40, 40]
    assert (rows.trusted == 1).all()
    for name in ("obs", "action", "next_obs"):
        np.testing.assert_array_equal(getattr(rows, name), [move[name] for move in envs.moves])
    np.testing.assert_array_equal(rows.reward, [move["reward"] - 1 for move in envs.moves])
    for step in range(1, 11):  # with the first actor
        expected = act(rows.obs[step - 1], keys, step)
        np.testing.assert_allclose(rows.action[step - 1], expected, rtol=1e-5, atol=1e-6)
    assert not any(run.metrics["online"][:10])
    moved = ["actor_loss" in metrics for metrics in run.metrics["online"][10:]]
    assert moved == [ssar is ssar_cql or i % 3 == 0 for i in range(1, 31)]
