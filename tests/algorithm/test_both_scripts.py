"""What both scripts promise: a scan is a loop, seeds train alone, D̂ and C_n follow the rules.

Code that the scripts repeat is tested in ssar_td3bc; test_scripts.py compares the copies.
"""

from functools import partial
from types import SimpleNamespace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    StubRun,
    actor_is_due,
    assert_close,
    batch_of,
    both_scripts,
    coefficient_of,
    jitted_update,
    new_state,
    set_up,
    settings,
    stack,
)
from hypothesis import strategies as st
from toys import arrays, same_bits

import ssar_td3bc
from common.seeds import Seeds

# ------------------------------------------------------------------------------ scan and seeds


@both_scripts
def test_a_scan_equals_a_python_loop_and_its_parts_bit_for_bit(ssar):
    config = settings(ssar)
    state, data = new_state(ssar, config, seed=3), batch_of(ssar, rows=200)
    train = jax.jit(partial(ssar.train_interval, config=config), static_argnames="num_updates")
    scanned, means = train(state, data)
    in_parts = state
    for _ in range(5):
        in_parts, _ = train(in_parts, data, num_updates=4)
    assert same_bits(in_parts, scanned)
    assert int(scanned.step) == 20

    infos, update, key = [], jitted_update(ssar, config), state.key
    for i in range(1, 21):
        index_key, noise_key = ssar.update_keys(key, i)
        batch = ssar.take(data, jax.random.randint(index_key, (config.batch_size,), 0, 200))
        noise = ssar.sample_noise(noise_key, batch, config)
        state, info = update(state, batch, noise, **actor_is_due(ssar, i % 2 == 0))
        infos.append(info)
    assert_close(scanned, state, rtol=5e-4, atol=5e-6)
    infos = [info for info in infos if "actor_loss" in info]
    assert_close(means, jax.tree.map(lambda *x: np.mean(x), *infos), rtol=1e-3, atol=1e-5)


@both_scripts
def test_training_is_deterministic_and_each_seed_is_as_if_alone(ssar):
    config, data = settings(ssar), batch_of(ssar, rows=200)
    shares = np.array([[0.1], [0.5], [0.9]])  # each seed has its own D̂
    trusted = jnp.asarray(np.random.default_rng(1).random((3, 200)) < shares, jnp.float32)
    train, axes = partial(ssar.train_interval, config=config), (0, ssar.DATA_AXES)
    states = [new_state(ssar, config, seed) for seed in range(3)]
    labelled = data._replace(trusted=trusted)
    side_by_side, _ = Seeds(3).vmap(train, axes)(stack(states), labelled)
    in_turns = Seeds(3).vmap(train, axes, donate=0, is_loop=True)
    inputs = [stack(states), stack(states)]
    first, second = (in_turns(each, labelled)[0] for each in inputs)
    assert same_bits(first, second)
    assert all(x.is_deleted() for x in jax.tree.leaves(inputs))  # overwritten by its successor
    train = jax.jit(train)
    alone = [train(states[i], data._replace(trusted=trusted[i]))[0] for i in range(3)]
    assert same_bits(first, stack(alone))
    assert_close(side_by_side, stack(alone), rtol=5e-4, atol=5e-6)
    for leaf in arrays((first.actor, first.critic, first.coefficient)):
        if leaf.ndim > 2:  # kernels
            assert not np.array_equal(leaf[0], leaf[1])
    pair = first.critic["Dense_0"]["kernel"][0]
    assert not np.array_equal(pair[0], pair[1])  # the two critics of one seed


# ------------------------------------------------------------------------- who influences what


@both_scripts
def test_a_batch_without_trusted_transitions_is_harmless(ssar):
    config = settings(ssar, update_period=1)
    state, batch, noise, update = set_up(ssar, config, trusted=np.zeros(32))
    after, info = update(state, batch, noise)
    assert all(np.isfinite(x).all() for x in arrays((after, info)))
    assert same_bits(after.coefficient, state.coefficient)  # Adam at rest: no gradient, no step
    np.testing.assert_allclose(after.threshold.n, config.n_start + 0.2, rtol=1e-6)
    assert int(after.threshold.stopped_at) == -1
    assert float(info.get("regulariser", 0)) == 0


@both_scripts
def test_online_updates_freeze_the_coefficient_and_the_threshold(ssar):
    config = settings(ssar, update_period=1, decay_steps=3)
    start, batch, noise, update = set_up(ssar, config)
    state, infos = start, []
    for _ in range(4):
        state, info = update(state, batch, noise, online=True)
        infos.append(info)
    assert same_bits(coefficient_of(start), coefficient_of(state))
    assert (int(state.online_step), int(state.step)) == (4, 4)
    assert not same_bits(start.actor, state.actor)
    factors = [float(info["anneal"]) for info in infos]
    np.testing.assert_allclose(factors, [ssar.anneal_factor(i, config) for i in range(1, 5)])
    assert factors[0] > factors[1] > factors[2] == factors[3] == 0
    if "regulariser" in info:  # CQL: it fades with its coefficient
        sizes = [float(info["regulariser"]) for info in infos]
        assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == 0


@both_scripts
def test_the_coefficient_falls_where_the_data_are_likely_and_rises_elsewhere(ssar):
    config = settings(ssar)
    state, batch, noise, update = set_up(ssar, config, trusted=np.ones(32))
    action = ssar.act(state.actor, batch.obs)
    fallen, _ = update(state, batch._replace(action=action), noise)
    risen, _ = update(state, batch._replace(action=-0.99 * jnp.sign(action)), noise)
    beta = lambda state: ssar.coefficient(state.coefficient, batch.obs, config)
    assert (beta(fallen) < beta(state)).all()
    assert (beta(risen) > beta(state)).all()
    assert 0.8 < float(beta(state).mean()) / config.coefficient_init < 1.2


def test_the_coefficient_gradient_is_clipped_as_pytorch_clips():
    *_, adam = ssar_td3bc.optimizers(settings(ssar_td3bc))
    for size, clipped in ((3.0, 3 * 0.5 / (6 + 1e-6)), (0.1, 0.1)):  # norms 6 and 0.2
        grads = {"a": jnp.full(4, size)}
        _, (_, (moments, *_)) = adam.update(grads, adam.init(grads))
        np.testing.assert_allclose(moments.mu["a"], 0.1 * clipped, rtol=1e-6)


# ------------------------------------------------------------------------------------ threshold


def reference_threshold(margins, period, n_start, n_end, freq):
    """The rule of Sec. 3.2 in plain Python; margins[i] is the mean at update freq (i + 1)."""
    n, stopped = n_start, -1
    for i, margin in enumerate(margins):
        step = freq * (i + 1)
        if stopped < 0 and step % period == 0:
            if margin > 0:
                stopped = step
            else:
                n = min(n_end, n + (n_end - n_start) / 10)
        yield n, stopped


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    margins=st.lists(st.sampled_from([-0.3, -0.01, 0.0, 0.02, 0.5]), min_size=1, max_size=40),
    period=st.integers(1, 7),
    freq=st.integers(1, 3),
    n_start=st.sampled_from([0.5, 1.0, 5.0]),
    growth=st.sampled_from([0.0, 2.0, 12.0]),
)
def test_the_threshold_follows_the_rule_and_never_moves_after_its_stop(
    margins, period, freq, n_start, growth
):
    config = settings(ssar_td3bc, update_period=period, n_start=n_start, n_end=n_start + growth)
    threshold = ssar_td3bc.Threshold(jnp.float32(n_start), jnp.int32(-1))
    expected = reference_threshold(margins, period, n_start, n_start + growth, freq)
    mask = jnp.array([1.0, 0.0, 1.0])
    for i, (margin, (n, stopped)) in enumerate(zip(margins, expected, strict=True)):
        margin = jnp.array([margin, -9.0, margin])  # the second transition does not count
        threshold = ssar_td3bc.update_threshold(threshold, margin, mask, freq * (i + 1), config)
        np.testing.assert_allclose(threshold.n, n, rtol=1e-5)
        assert int(threshold.stopped_at) == stopped


def test_annealing():
    for anneal, decay_steps, expected in (
        ("linear", 100, [1, 0.5, 0, 0]),
        ("cosine", 100, [1, np.cos(np.pi / 4), 0, 0]),
        ("linear", -1, [1, 1, 1, 1]),
        ("none", 100, [1, 1, 1, 1]),
    ):
        config = settings(ssar_td3bc, anneal=anneal, decay_steps=decay_steps)
        factors = [ssar_td3bc.anneal_factor(jnp.int32(step), config) for step in (0, 50, 100, 150)]
        np.testing.assert_allclose(factors, expected, atol=1e-7)
        assert min(factors) >= 0


# -------------------------------------------------------------------------- the data and their D̂


def test_selection_by_return_and_by_success():
    rewards = np.array([1, 2, 0, 3, 5, 0, 0], np.float32)
    ends = np.array([0, 1, 0, 1, 1, 0, 1], bool)
    by_return = ssar_td3bc.select_by_return(rewards, ends, 3.0)
    np.testing.assert_array_equal(by_return, [0, 0, 0, 0, 1, 0, 0])  # 3 is not above 3
    sparse = np.array([0, 1, 0, 0, 1, 1, 0], np.float32)
    for scale, bias in ((1, 0), (1, -1), (10, -5)):
        shifted = scale * sparse + np.float32(bias)
        by_success = ssar_td3bc.select_by_success(shifted, ends, fail_reward=bias)
        np.testing.assert_array_equal(by_success, [1, 1, 0, 0, 1, 0, 0])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"selection": "none"}, [1, 1, 1, 1]),
        ({"selection": "return", "return_threshold": 0.0}, [0, 0, 1, 1]),
        ({"selection": "success", "reward_bias": -1.0}, [0, 0, 1, 1]),
        ({"selection": "return", "coefficient": "fixed"}, [1, 1, 1, 1]),
        ({"selection": "return", "offline_steps": 0, "buffer_init": "none"}, [1, 1, 1, 1]),
        ({"selection": "iql"}, [1, 0, 0, 1]),
    ],
)
def test_the_settings_choose_how_transitions_are_selected(overrides, expected):
    config = settings(ssar_td3bc, num_seeds=2, **overrides)
    label = lambda: np.array([[1, 0, 0, 1]] * 2, bool)
    rewards, ends = np.array([0, -1, -1, 2], np.float32), np.array([0, 1, 0, 1], bool)
    trusted = ssar_td3bc.select_trusted(rewards, ends, label, config)
    np.testing.assert_array_equal(trusted, [expected, expected])


def test_iql_finds_the_better_action_for_every_seed():
    """One state, two actions, and a reward of 1 for the first: D̂ is its transitions."""
    good = np.random.default_rng(0).random(400) < 0.5
    action, reward, one = np.where(good, 0.8, -0.8), good.astype(float), np.ones((400, 1))
    columns = one, action[:, None], reward, one, one[:, 0]
    columns = [jnp.asarray(column, jnp.float32) for column in columns]
    data = ssar_td3bc.Transition(*columns, trusted=None)
    config = settings(ssar_td3bc, batch_size=64, iql_steps=400, updates_per_call=200)
    keys, run = jnp.stack([jax.random.key(seed) for seed in (0, 1)]), StubRun()
    labels = ssar_td3bc.label_by_iql(keys, data, Seeds(2), run, config)
    assert labels.shape == (2, 400)
    assert ((labels == good).mean(axis=1) > 0.99).all()
    losses = [metrics["iql_critic_loss"] for metrics in run.metrics["iql"]]
    assert losses[0][0] != losses[0][1]  # each seed has its own networks and batches
    assert (losses[1] < losses[0]).all()
    assert run.tree.step.tolist() == [400, 400]


@both_scripts
def test_transitions_have_modified_rewards_and_usable_actions(ssar):
    config = settings(ssar, reward_scale=10.0, reward_bias=-5.0)
    obs, action = np.zeros((3, 2), np.float32), np.array([[-1], [0.5], [1]], np.float32)
    dataset = SimpleNamespace(observations=obs, next_observations=obs, actions=action)
    dataset.rewards = np.array([0, 1, 0], np.float32)
    dataset.terminals = np.array([False, True, False])
    data = ssar.make_transitions(dataset, config)
    np.testing.assert_array_equal(data.reward, [-5, 5, -5])
    np.testing.assert_array_equal(data.terminated, [0, 1, 0])
    limit = 1 if ssar is ssar_td3bc else 1 - 1e-4  # CQL: log π(a|s) of an action of 1 is infinite
    np.testing.assert_allclose(data.action[:, 0], [-limit, 0.5, limit])
    assert {x.dtype for x in data if x is not None} == {np.dtype(np.float32)}
