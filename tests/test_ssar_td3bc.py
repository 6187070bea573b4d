"""What ssar_td3bc promises beyond the golden numbers: scan, seeds, switches, threshold, D̂."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ACTION, OBS, arrays, frozen, one, same_bits, toy_batch, toy_states

import ssar_td3bc as ssar


@pytest.fixture(scope="module")
def config():
    return frozen()


def jitted_update(config):
    return jax.jit(
        partial(ssar.update_step, config=config), static_argnames=("update_actor", "online")
    )


# ----------------------------------------------------------------------- scan and seeds


def test_scan_equals_a_python_loop(config):
    data = toy_batch(rows=200)._replace(trusted=None)
    trusted = toy_batch(rows=200).trusted[None]
    state = one(toy_states(config, [3]))
    update, infos, indices = jitted_update(config), [], []
    for i in range(1, config.eval_interval + 1):
        index_key, noise_key = ssar.update_keys(state.key, i)
        indices.append(jax.random.randint(index_key, (config.batch_size,), 0, 200))
        batch = ssar.take(data._replace(trusted=trusted[0]), indices[-1])
        noise = ssar.sample_noise(noise_key, batch, config)
        state, info = update(state, batch, noise)  # the counter decides about the actor
        infos.append(info)

    scanned, means, broke = ssar.train_interval(
        toy_states(config, [3]), data._replace(trusted=trusted), config
    )
    for a, b in zip(arrays(one(scanned)), arrays(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    assert int(scanned.step[0]) == config.eval_interval
    assert not any(update.any() for update in broke.values())
    for name, mean in means.items():
        loop = np.nanmean([info[name] for info in infos])
        np.testing.assert_allclose(mean[0], loop, rtol=1e-4, atol=1e-6, err_msg=name)
    assert float(scanned.threshold.n[0]) == float(state.threshold.n)
    # In parts it computes the same.
    size, in_parts, totals = (
        2 * config.policy_freq,
        toy_states(config, [3]),
        dict.fromkeys(means, 0),
    )
    for _ in range(0, config.eval_interval, size):
        in_parts, info, _ = ssar.train_interval(
            in_parts, data._replace(trusted=trusted), config, num_updates=size
        )
        totals = {name: totals[name] + x for name, x in info.items()}
    for a, b in zip(arrays(in_parts), arrays(scanned), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, mean in means.items():
        mean_of_parts = totals[name] * size / config.eval_interval
        np.testing.assert_allclose(mean_of_parts, mean, rtol=1e-5, atol=1e-6, err_msg=name)
    # Poisoned, it tells which update first met a reward that is not finite.
    drawn = np.asarray(indices).reshape(-1, config.batch_size)
    first = {row: (drawn == row).any(axis=1).argmax() + 1 for row in np.unique(drawn)}
    row, update = max(first.items(), key=lambda item: item[1])
    poisoned = data._replace(trusted=trusted, reward=data.reward.at[row].set(jnp.inf))
    scanned, _, broke = ssar.train_interval(toy_states(config, [3]), poisoned, config)
    assert update > 4
    assert broke["critic_loss"].tolist() == [update]
    parts = ssar.broken_parts(scanned)
    assert set(parts) == set(scanned._fields)
    assert parts["critic"][0] and parts["critic_opt"][0]
    assert not (parts["threshold"][0] or parts["step"][0] or parts["key"][0])


def test_batched_seeds_equal_single_seeds_and_differ(config, monkeypatch):
    data = toy_batch(rows=200)
    rng = np.random.default_rng(1)
    trusted = jnp.asarray(rng.random((3, 200)) < 0.5, jnp.float32)  # each seed its own D̂
    with monkeypatch.context() as patch:  # side by side, where a CPU takes one after the other
        patch.setattr(jax, "default_backend", lambda: "not a cpu")
        together, *_ = ssar.train_interval(
            toy_states(config, [5, 6, 7]), data._replace(trusted=trusted), config
        )
    ssar.train_interval.clear_cache()
    for i, seed in enumerate([5, 6, 7]):
        alone, *_ = ssar.train_interval(
            toy_states(config, [seed]), data._replace(trusted=trusted[i : i + 1]), config
        )
        row = jax.tree.map(lambda x, i=i: x[i], together)
        for a, b in zip(arrays(row), arrays(one(alone)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    for net in ("actor", "critic", "coefficient"):
        for leaf in jax.tree.leaves(getattr(together, net)):
            assert not np.array_equal(leaf[0], leaf[1]), net
    pair = together.critic["Dense_0"]["kernel"][0]
    assert not np.array_equal(pair[0], pair[1])  # the two critics of one seed


def test_interval_is_deterministic_and_donates_its_state(config):
    data = toy_batch(rows=200)._replace(trusted=jnp.ones((2, 200)))
    states = [toy_states(config, [0, 1]) for _ in range(2)]
    first, second = (ssar.train_interval(state, data, config)[0] for state in states)
    assert same_bits(first, second)
    assert states[0].critic["Dense_1"]["kernel"].is_deleted()
    assert states[0].target_critic["Dense_1"]["kernel"].is_deleted()


@pytest.mark.parametrize("due", [True, False])
def test_static_flag_equals_the_counter(config, due):
    state = one(toy_states(config, [0]))._replace(step=jnp.int32(1 if due else 0))
    batch, update = toy_batch(), jitted_update(config)
    noise = ssar.sample_noise(jax.random.key(1), batch, config)
    by_counter, counter_info = update(state, batch, noise)
    by_flag, flag_info = update(state, batch, noise, update_actor=due)
    for a, b in zip(arrays(by_counter), arrays(by_flag), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert same_bits(by_flag.actor, state.actor) != due
    assert np.isfinite(counter_info["actor_loss"]) == due
    assert ("actor_loss" in flag_info) == due


def test_coefficient_is_computed_once_for_both_its_uses(config):
    def matmuls(config):
        lowered = jax.jit(
            partial(ssar.update_policy, config=config, online=False)
        ).lower(one(toy_states(config, [0])), toy_batch())  # fmt: skip
        return lowered.compile().as_text().count(" dot(")

    adaptive, fixed = matmuls(frozen()), matmuls(frozen(coefficient="fixed"))
    layers = 4  # forward, kernel gradients, input gradients of all but the first
    assert adaptive - fixed <= layers + layers + layers - 1


# ----------------------------------------------------------------------- who influences what


@partial(jax.jit, static_argnames="config")
def policy_update(config, batch, state):
    return ssar.update_policy(state, batch, config, online=False)


@pytest.mark.parametrize("loosen_bound", [True, False])
@pytest.mark.parametrize("select_actions", [True, False])
def test_untrusted_rows_act_only_where_they_should(loosen_bound, select_actions):
    """Other actions in untrusted rows: the policy must not notice under loosen_bound, nor β_φ and n
    under select_actions."""
    config = frozen(loosen_bound=loosen_bound, select_actions=select_actions, update_period=2)
    state = one(toy_states(config, [0]))._replace(step=jnp.int32(2))
    batch = toy_batch()
    untrusted = batch.trusted[:, None] == 0
    other = batch._replace(action=jnp.where(untrusted, -batch.action, batch.action))
    a, _ = policy_update(config, batch, state)
    b, _ = policy_update(config, other, state)
    assert same_bits(a.actor, b.actor) == loosen_bound
    assert same_bits((a.coefficient, a.threshold), (b.coefficient, b.threshold)) == select_actions
    assert not same_bits(a.coefficient, state.coefficient)


def test_fixed_coefficient_is_plain_td3bc():
    config = frozen(coefficient="fixed", update_period=2)
    state = one(toy_states(config, [0]))._replace(step=jnp.int32(2))
    batch = toy_batch()
    after, info = policy_update(config, batch, state)
    assert same_bits(
        (after.coefficient, after.threshold, after.coefficient_opt),
        (state.coefficient, state.threshold, state.coefficient_opt),
    )
    action = np.asarray(ssar.actor(state.actor, batch.obs))
    q = np.asarray(ssar.critics(state.critic, batch.obs, action))[0]
    expected = -q.mean() / np.abs(q).mean() + 0.4 * np.mean((action - batch.action) ** 2)
    np.testing.assert_allclose(info["actor_loss"], expected, rtol=1e-5)
    assert float(info["beta_mean"]) == pytest.approx(config.coefficient_init)


def test_a_batch_without_trusted_rows_is_harmless():
    config = frozen(update_period=2)
    state = one(toy_states(config, [0]))._replace(step=jnp.int32(2))
    after, info = policy_update(config, toy_batch(trusted=np.zeros(32)), state)
    assert all(np.isfinite(x).all() for x in arrays((after, info)))
    assert same_bits(after.coefficient, state.coefficient)  # Adam at rest: no gradient, no step
    np.testing.assert_allclose(after.threshold.n, config.n_start + 0.2, rtol=1e-6)
    assert int(after.threshold.stopped_at) == -1


def test_coefficient_falls_where_the_margin_is_positive():
    config = frozen()
    state = one(toy_states(config, [0]))
    batch = toy_batch(trusted=np.ones(32))
    before = ssar.coefficient(state.coefficient, batch.obs, config)
    near = batch._replace(action=ssar.actor(state.actor, batch.obs))
    far = batch._replace(action=-jnp.sign(ssar.actor(state.actor, batch.obs)))
    fallen, _ = policy_update(config, near, state)
    risen, _ = policy_update(config, far, state)
    assert (ssar.coefficient(fallen.coefficient, batch.obs, config) < before).all()
    assert (ssar.coefficient(risen.coefficient, batch.obs, config) > before).all()
    assert 0.8 < float(before.mean()) / config.coefficient_init < 1.2


def test_coefficient_gradient_is_clipped_as_pytorch_clips():
    _, _, adam = ssar.optimizers(frozen())
    step = lambda grads: adam.update(grads, adam.init(grads))
    grads = {"a": jnp.full(4, 3.0)}  # norm 6
    _, (_, (moments, *_)) = step(grads)
    np.testing.assert_allclose(moments.mu["a"], 0.1 * 3 * 0.5 / (6 + 1e-6), rtol=1e-6)
    small = {"a": jnp.full(4, 0.1)}  # norm 0.2: untouched
    _, (_, (moments, *_)) = step(small)
    np.testing.assert_allclose(moments.mu["a"], 0.01, rtol=1e-6)


# ----------------------------------------------------------------------- threshold


def reference_threshold(margins, period, n_start, n_end, freq):
    """The rule of Sec. 3.2 in plain Python; margins[i] is the mean at update freq·(i+1)."""
    n, stopped, path = n_start, None, []
    for i, margin in enumerate(margins):
        step = freq * (i + 1)
        if stopped is None and step % period == 0:
            if margin > 0:
                stopped = step
            else:
                n = min(n_end, n + (n_end - n_start) / 10)
        path.append((n, stopped))
    return path


@settings(max_examples=60, deadline=None)
@given(
    margins=st.lists(st.sampled_from([-0.3, -0.01, 0.0, 0.02, 0.5]), min_size=1, max_size=40),
    period=st.integers(1, 7),
    freq=st.integers(1, 3),
    n_start=st.sampled_from([0.5, 1.0, 5.0]),
    growth=st.sampled_from([0.0, 2.0, 12.0]),
)
def test_threshold_follows_the_rule_and_never_moves_after_its_stop(
    margins, period, freq, n_start, growth
):
    config = frozen(update_period=period, n_start=n_start, n_end=n_start + growth)
    threshold = ssar.Threshold(jnp.float32(n_start), jnp.int32(-1))
    expected = reference_threshold(margins, period, n_start, n_start + growth, freq)
    rows = jnp.array([1.0, 0.0, 1.0])
    for i, margin in enumerate(margins):
        per_row = jnp.array([margin, -9.0, margin])  # the untrusted row must not count
        threshold = ssar.update_threshold(threshold, per_row, rows, freq * (i + 1), config)
        n, stopped = expected[i]
        np.testing.assert_allclose(threshold.n, n, rtol=1e-5)
        assert int(threshold.stopped_at) == (-1 if stopped is None else stopped)


@pytest.mark.parametrize(
    ("anneal", "decay_steps", "factors"),
    [
        ("linear", 100, {0: 1, 50: 0.5, 100: 0, 150: 0}),
        ("cosine", 100, {0: 1, 50: np.cos(np.pi / 4), 100: 0, 150: 0}),
        ("linear", -1, {0: 1, 150: 1}),
        ("none", 100, {0: 1, 150: 1}),
    ],
)
def test_annealing(anneal, decay_steps, factors):
    config = frozen(anneal=anneal, decay_steps=decay_steps)
    for step, factor in factors.items():
        np.testing.assert_allclose(ssar.anneal_factor(jnp.int32(step), config), factor, atol=1e-7)


def test_online_updates_freeze_the_coefficient_and_the_threshold():
    config = frozen(update_period=2, decay_steps=3)
    state, batch = one(toy_states(config, [0])), toy_batch()
    update = jitted_update(config)
    start = state
    for i in range(6):
        noise = ssar.sample_noise(jax.random.key(i), batch, config)
        state, _ = update(state, batch, noise, online=True)
    assert same_bits(
        (start.coefficient, start.coefficient_opt, start.threshold),
        (state.coefficient, state.coefficient_opt, state.threshold),
    )
    assert int(state.online_step) == 6
    assert not same_bits(start.actor, state.actor)


# ----------------------------------------------------------------------- selection


def test_selection_by_return_and_success():
    rewards = np.array([1, 2, 0, 3, 5, 0, 0], np.float32)
    ends = np.array([0, 1, 0, 1, 1, 0, 1], bool)
    by_return = ssar.select_by_return(rewards, ends, 3.0)
    np.testing.assert_array_equal(by_return, [0, 0, 0, 0, 1, 0, 0])  # 3 is not above 3
    sparse = np.array([0, 1, 0, 0, 1, 1, 0], np.float32)
    for scale, bias in ((1, 0), (1, -1), (10, -5)):
        shifted = scale * sparse + np.float32(bias)
        by_success = ssar.select_by_success(shifted, ends, fail_reward=bias)
        np.testing.assert_array_equal(by_success, [1, 1, 0, 0, 1, 0, 0])


@pytest.mark.slow
def test_iql_trains_every_seed_on_its_own(config):
    data = toy_batch(rows=300)._replace(trusted=None)
    keys = jnp.stack([jax.random.key(seed) for seed in (0, 1)])
    init = jax.vmap(ssar.iql_init, in_axes=(0, None, None))
    both, info, broke = ssar.iql_interval(init(keys, OBS, ACTION), data, config, 20)
    single, *_ = ssar.iql_interval(init(keys[1:], OBS, ACTION), data, config, 20)
    for a, b in zip(arrays(jax.tree.map(lambda x: x[1:], both)), arrays(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    assert info["iql_value_loss"].shape == (2,)
    labels = ssar.select_by_advantage(both, data)
    assert labels.shape == (2, 300)
    assert labels.dtype == bool
    assert not np.array_equal(labels[0], labels[1])


def test_iql_advantage_finds_the_better_action():
    """One state, two actions, reward 1 for the first: D̂ must be its rows."""
    rng = np.random.default_rng(0)
    good = rng.random(400) < 0.5
    data = ssar.Transition(
        obs=jnp.ones((400, 1)),
        action=jnp.where(good, 0.8, -0.8)[:, None].astype(jnp.float32),
        reward=jnp.asarray(good, jnp.float32),
        next_obs=jnp.ones((400, 1)),
        terminated=jnp.ones(400),
        trusted=None,
    )
    config = frozen(batch_size=64, iql_steps=600, eval_interval=300)
    labels = ssar.label_by_iql(jnp.stack([jax.random.key(0)]), data, config)
    assert (labels[0] == good).mean() > 0.99


def test_iql_labels_need_no_copy_of_the_data(config):
    """Nor leave a row out, whatever the number of rows."""
    state = jax.jit(jax.vmap(lambda key: ssar.iql_init(key, OBS, ACTION)))(
        jnp.stack([jax.random.key(0)])
    )
    for rows in (1, 4096, 10_000):
        data = toy_batch(rows=rows)._replace(trusted=None)
        labels = ssar.select_by_advantage(state, data)
        params = jax.tree.map(lambda x: x[0], state)
        q = ssar.critics(params.critic, data.obs, data.action).min(axis=0)
        value = ssar.forward(params.value, data.obs)[:, 0]
        clear = jnp.abs(q - value) > 1e-5  # not a matter of rounding
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(labels[0][clear], (q >= value)[clear])
    temporary = []
    for rows in (100_000, 1_000_000):
        data = jax.eval_shape(partial(toy_batch, rows=rows))._replace(trusted=None)
        program = ssar.select_by_advantage.lower(state, data).compile()
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    size = sum(x.size * 4 for x in jax.tree.leaves(data))
    assert temporary[1] - temporary[0] < 0.2 * size
