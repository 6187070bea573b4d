"""What ssar_cql promises beyond the golden numbers: regulariser, blocks, margin, seeds."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from golden_cases import members
from toys import ACTION, OBS, arrays, one, same_bits, tiny_config, toy_batch, toy_states

import ssar_cql as ssar
from configs.ssar_cql import get_config


def frozen(**overrides):
    return ml_collections.FrozenConfigDict(tiny_config(script="ssar_cql", **overrides))


@pytest.fixture(scope="module")
def config():
    return frozen()


def states(config, seeds):
    return toy_states(config, seeds, ssar)


def jitted_update(config):
    return jax.jit(partial(ssar.update_step, config=config), static_argnames="online")


@jax.jit
def double(tree):
    to_double = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
    return jax.tree.map(to_double, tree)


# ----------------------------------------------------------------------- the regulariser


def plain_critic_loss(pair, state, batch, noise, weight, config):
    """The critics' loss as the paper writes it: every action of every row, source by source."""

    def draw(obs, unit):
        mean, log_std = (x[:, None] for x in ssar.actor(state.actor, obs))
        x = mean + jnp.exp(log_std) * unit
        log_prob = jax.scipy.stats.norm.logpdf(x, mean, jnp.exp(log_std))
        return jnp.tanh(x), (log_prob - jnp.log(1 - jnp.tanh(x) ** 2)).sum(-1)

    q_values = jax.vmap(ssar.critic, (None, None, 1), 1)  # one action of every row at a time

    next_action, next_log_prob = draw(batch.next_obs, noise.target_action)
    both = [
        q_values(params, batch.next_obs, next_action) for params in members(state.target_critic)
    ]
    next_q = jnp.minimum(*both)
    best = jnp.argmax(next_q, axis=1)
    rows = jnp.arange(len(best))
    entropy = config.backup_entropy * jnp.exp(state.log_alpha) * next_log_prob[rows, best]
    target = batch.reward + config.discount * (1 - batch.terminated) * (
        next_q[rows, best] - entropy
    )
    loss = 0.0
    for params in members(pair):
        q = ssar.critic(params, batch.obs, batch.action)
        loss += ((q - target) ** 2).mean()
        scores = []
        uniform = (noise.random_action, ACTION * np.log(0.5))
        sources = (
            uniform, draw(batch.next_obs, noise.next_action), draw(batch.obs, noise.current_action)
        )  # fmt: skip
        for actions, log_prob in sources:
            value = q_values(params, batch.obs, actions)
            scores.append(value - log_prob if config.importance_sample else value)
        if not config.importance_sample:
            scores.append(q[:, None])
        scores = jnp.concatenate(scores, axis=1) / config.cql_temperature
        difference = config.cql_temperature * jnp.log(jnp.exp(scores).sum(1)) - q
        difference = jnp.clip(difference, config.clip_diff_min, config.clip_diff_max)
        if config.lagrange:
            multiplier = jnp.exp(state.log_alpha_prime)
            loss += multiplier * (weight * (difference - config.target_action_gap)).mean()
        else:
            loss += (weight * difference).mean()
    return loss


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"block_size": 32},
        pytest.param({"block_size": 5, "importance_sample": False, "clip_diff_min": 2.31},
                     marks=pytest.mark.slow),
        pytest.param({"block_size": 64, "cql_temperature": 0.5, "backup_entropy": True},
                     marks=pytest.mark.slow),
        pytest.param({"lagrange": True, "target_action_gap": 0.8, "max_target_backup": True,
                      "critic_layers": (2, 1)}, marks=pytest.mark.slow),
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)  # fmt: skip
def test_blocks_of_trusted_rows_equal_the_plain_regulariser(overrides):
    """Loss and gradient, for every number of rows with a weight, alone and with seeds batched."""
    config = frozen(**overrides)
    state, batch = one(states(config, [0])), toy_batch()
    with jax.enable_x64(True):
        state, batch = double(state), double(batch)
        scale = lambda leaf: 3 * leaf if leaf.shape[-1] == 1 else leaf  # last kernels
        state = state._replace(critic=jax.tree.map(scale, state.critic))  # a Q worth regularising
        noise = double(ssar.sample_noise(jax.random.key(1), batch, config))
        policy = ssar.actor(state.actor, batch.obs)
        rng = np.random.default_rng(0)
        weights = [np.where(np.arange(32) < count, rng.random(32) + 0.5, 0)
                   for count in (0, 1, 7, 8, 9, 31, 32)]  # fmt: skip
        weights = jnp.asarray([rng.permutation(weight) for weight in weights])

        def loss(pair, weight):
            value, info = ssar.critic_loss(pair, state, batch, noise, policy, weight, config)
            return value, info["regulariser"]

        def plain(pair, weight):
            return plain_critic_loss(pair, state, batch, noise, weight, config)

        ours = jax.jit(jax.value_and_grad(loss, has_aux=True))
        theirs = jax.jit(jax.value_and_grad(plain))
        seeds = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (None, 0)))
        together = seeds(state.critic, weights)[0] if overrides == {} else None
        for i, weight in enumerate(weights):
            (value, regulariser), grads = ours(state.critic, weight)
            expected, expected_grads = theirs(state.critic, weight)
            np.testing.assert_allclose(value, expected, rtol=1e-11)
            assert (float(regulariser) == 0) == (i == 0)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
            if together is not None:
                alone = jax.tree.map(lambda x, i=i: x[i], together)
                for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(grads), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        if "clip_diff_min" in overrides:  # the clip must bite in some rows and not in all
            clipped = [theirs(state.critic, 1.0 * (np.arange(32) == i))[0] for i in range(32)]
            rest = theirs(state.critic, jnp.zeros(32))[0]
            floor = 2 * config.clip_diff_min / 32
            at_floor = np.isclose(np.array(clipped) - rest, floor)
            assert at_floor.any()
            assert not at_floor.all()


def test_untrusted_rows_cost_nothing():
    """No block without a weighted row is computed, and no row of weight 0 is looked at."""
    count_blocks = lambda params, x, weight: params + 0 * weight.sum()
    blocks = jax.jit(lambda weight: ssar.sum_in_blocks(count_blocks, 8, 1.0, (weight, weight)))
    order = np.random.default_rng(0).permutation(32)
    for rows, expected in ((0, 0), (1, 1), (8, 1), (9, 2), (24, 3), (25, 4), (32, 4)):
        assert blocks(jnp.asarray(order < rows, jnp.float32)) == expected
    total = lambda params, x, weight: (params * x * weight).sum()
    x = jnp.ones(32).at[5].set(jnp.nan)
    without = jnp.ones(32).at[5].set(0)
    assert ssar.sum_in_blocks(total, 8, 2.0, (x, without)) == 62  # NaN · 0 would be NaN
    assert np.isnan(ssar.sum_in_blocks(total, 8, 2.0, (x, jnp.ones(32))))


def test_noise_is_what_the_losses_expect():
    """Uniform in [-1, 1], standard normal otherwise, and every field independent of the others."""
    for max_target_backup in (False, True):
        config = frozen(max_target_backup=max_target_backup, num_sampled_actions=5)
        batch = toy_batch(rows=4000)
        noise = ssar.sample_noise(jax.random.key(0), batch, config)
        assert noise.target_action.shape == (4000, 5 if max_target_backup else 1, ACTION)
        columns = {}
        for name, x in noise._asdict().items():
            x = np.asarray(x)
            uniform = name == "random_action"
            np.testing.assert_allclose(x.mean(), 0, atol=0.03, err_msg=name)
            np.testing.assert_allclose(x.std(), 3**-0.5 if uniform else 1, rtol=0.03, err_msg=name)
            assert (abs(x).max() <= 1) == uniform
            flat = x.reshape(4000, -1)
            columns |= {(name, i): flat[:, i] for i in range(flat.shape[1])}
        correlation = np.corrcoef(list(columns.values())) - np.eye(len(columns))
        assert abs(correlation).max() < 0.1


def test_proposition_3_1():
    """With π ∝ exp Q, the gradient of CQL's regulariser is that of -log π(a|s)."""
    config = frozen()
    pair = one(states(config, [0])).critic
    with jax.enable_x64(True):
        pair = double(pair)
        obs = jnp.asarray(np.random.default_rng(0).standard_normal((6, OBS)))
        grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(-0.9, 0.9, 3)] * ACTION), -1).reshape(
            -1, ACTION
        )
        taken = jnp.array([0, 4, 8, 2, 2, 7])
        every = jnp.broadcast_to(grid, (6, *grid.shape))
        counted_once = jnp.zeros((6, len(grid)))  # a sum over all actions: no density to divide by

        def regulariser(pair):
            actions = jnp.concatenate([grid[taken][:, None], every], axis=1)
            return ssar.regulariser(config, pair, obs, actions, counted_once, jnp.ones(6))

        def cloning(pair):
            log_policy = jax.nn.log_softmax(ssar.critics(pair, obs, every), axis=-1)
            return -log_policy[:, jnp.arange(6), taken].sum()

        value, ours = jax.jit(jax.value_and_grad(regulariser))(pair)
        expected, theirs = jax.jit(jax.value_and_grad(cloning))(pair)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)
        assert max(abs(x).max() for x in jax.tree.leaves(ours)) > 0.1


def test_policy_is_evaluated_once_per_state():
    """In a whole update: at s before the actor's step, at s', and at s after it; forward only."""
    config = frozen(coefficient_hidden_dims=(8, 8, 8))
    state, batch = one(states(config, [0])), toy_batch()
    noise = ssar.sample_noise(jax.random.key(0), batch, config)
    program = jax.make_jaxpr(partial(ssar.update_step, config=config))(state, batch, noise)
    found = [
        eqn
        for eqn in program.jaxpr.eqns
        if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.shape == (OBS, 16)
    ]
    assert len(found) == 3
    assert {eqn.invars[0].aval.shape for eqn in found} == {(32, OBS)}


# ----------------------------------------------------------------------- densities and margin


def test_log_density_is_exact_from_tiny_to_saturated():
    grid = np.meshgrid([-30.0, -9.1, -3.0, 0.0, 0.4, 6.0, 40.0], [-20.0, -12.0, -5.0, -1.0, 2.0],
                       [-4.0, -0.3, 0.0, 1.0, 5.0])  # fmt: skip
    mean, log_std, unit = (x.ravel() for x in grid)
    x = mean + np.exp(log_std) * unit
    log_cosh = np.abs(x) + np.log1p(np.exp(-2 * np.abs(x))) - np.log(2)
    expected = -0.5 * unit**2 - log_std - 0.5 * np.log(2 * np.pi) + 2 * log_cosh
    single = [jnp.asarray(x, jnp.float32) for x in (mean, log_std, unit)]
    ours = ssar.log_density(single[:2], single[2])
    np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=3e-5)


def margin_of(mean, log_std, action, n):
    """log_likelihood_margin of a policy with the given μ and log σ, in float32."""
    mean, log_std, action = (jnp.asarray(x, jnp.float32) for x in (mean, log_std, action))
    batch = toy_batch(rows=len(mean))._replace(action=action)
    original = ssar.actor
    try:
        ssar.actor = lambda params, obs: (mean, log_std)
        threshold = ssar.Threshold(jnp.float32(n), jnp.int32(-1))
        return np.asarray(ssar.log_likelihood_margin(None, batch, threshold), float)
    finally:
        ssar.actor = original


def authors_margin(mean, log_std, action, n):
    """The same through action space and arctanh, as the authors do, in float64."""
    std = np.exp(log_std)

    def density(a):
        x = np.arctanh(a)
        return -0.5 * ((x - mean) / std) ** 2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - a**2)

    def away(n):
        limits = np.tanh(mean) - 0.1 * n, np.tanh(mean) + 0.1 * n
        sides = [np.clip(np.tanh(mean + side * n * std), -0.99999, 0.99999) for side in (1, -1)]
        return np.minimum(*[density(np.clip(side, *limits)) for side in sides])

    return (np.maximum(density(action), away(10)) - away(n)).mean(axis=1)


@pytest.mark.parametrize("n", [1.0, 2.4, 5.0, 10.0, 14.0])
def test_margin_is_the_authors(n):
    rng = np.random.default_rng(3)
    mean = rng.uniform(-2, 2, (300, ACTION))
    log_std = rng.uniform(-4, 1, (300, ACTION))
    action = np.tanh(mean + np.exp(log_std) * rng.standard_normal(mean.shape) * 3)
    action = np.clip(action, -0.9999, 0.9999)
    expected = authors_margin(mean, log_std, action, n)
    np.testing.assert_allclose(margin_of(mean, log_std, action, n), expected, rtol=2e-3, atol=2e-3)
    assert (expected < 0).any() == (n != 10)  # at n = 10 the floor is C_n itself


def test_margin_is_finite_wherever_the_authors_is_not():
    values = [[-1.0, 1.0], [1.0, 1.0], [0.0, -1.0], [0.99999999, 0.3]]
    for mean in (-20.0, -8.0, 0.0, 8.0, 20.0):
        for log_std in (-20.0, -12.0, -5.0, 2.0):
            shape = np.ones((4, 2))
            margin = margin_of(mean * shape, log_std * shape, values, 2.0)
            assert np.isfinite(margin).all(), (mean, log_std)
    # C_n itself: n σ from the mean costs n² / 2, however small σ (authors' form: off by thousands)
    tiny = margin_of(np.full((1, 2), 1.0), np.full((1, 2), -12.0), np.full((1, 2), np.tanh(1.0)), 3)
    assert tiny[0] == pytest.approx(4.5, abs=0.6)  # μ itself is 0.2 σ off: its float32 spacing


def test_extreme_actions_and_policies_leave_no_nan():
    settings = get_config("antmaze-umaze-v2")  # every part of the losses
    settings.update(hidden_dims=(16, 16, 16), coefficient_hidden_dims=(16, 16), update_period=2)
    settings.update(num_sampled_actions=3)
    config = ml_collections.FrozenConfigDict(settings)
    state, batch = one(states(config, [0])), toy_batch()
    batch = batch._replace(action=batch.action.at[:8].set(1.0).at[8:16].set(-1.0))
    update = jitted_update(config)
    for scale in (1.0, 1e4):  # ordinary, and saturated with σ at either end of its range
        last = {"Dense_3": jax.tree.map(lambda x, scale=scale: scale * x, state.actor["Dense_3"])}
        changed = state._replace(actor=state.actor | last)
        for i in range(4):
            noise = ssar.sample_noise(jax.random.key(i), batch, config)
            changed, info = update(changed, batch, noise)
            assert all(np.isfinite(x).all() for x in arrays((changed, info))), (scale, i)


# ----------------------------------------------------------------------- scan and seeds


def test_scan_equals_a_python_loop(config):
    data = toy_batch(rows=200)
    trusted = data.trusted[None]
    state = one(states(config, [3]))
    update, infos, indices = jitted_update(config), [], []
    for i in range(1, config.eval_interval + 1):
        index_key, noise_key = ssar.update_keys(state.key, i)
        indices.append(jax.random.randint(index_key, (config.batch_size,), 0, 200))
        batch = ssar.take(data, indices[-1])
        state, info = update(state, batch, ssar.sample_noise(noise_key, batch, config))
        infos.append(info)
    scanned, means, broke = ssar.train_interval(
        states(config, [3]), data._replace(trusted=trusted), config
    )
    for a, b in zip(arrays(one(scanned)), arrays(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-6)
    assert int(scanned.step[0]) == config.eval_interval
    assert not any(update.any() for update in broke.values())
    for name, mean in means.items():
        loop = np.mean([info[name] for info in infos])
        np.testing.assert_allclose(mean[0], loop, rtol=1e-3, atol=1e-5, err_msg=name)
    # In parts it computes the same.
    size, in_parts, totals = 4, states(config, [3]), dict.fromkeys(means, 0)
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
    scanned, _, broke = ssar.train_interval(states(config, [3]), poisoned, config)
    assert update > 4
    assert broke["critic_loss"].tolist() == [update]
    parts = ssar.broken_parts(scanned)
    assert set(parts) == set(scanned._fields)
    assert parts["critic"][0] and parts["critic_opt"][0]
    assert not (parts["threshold"][0] or parts["step"][0] or parts["key"][0])


@pytest.mark.slow
def test_batched_seeds_equal_single_seeds_and_differ(config, monkeypatch):
    data = toy_batch(rows=200)
    rng = np.random.default_rng(1)
    shares = np.array([[0.1], [0.5], [0.9]])  # each seed its own number of blocks
    trusted = jnp.asarray(rng.random((3, 200)) < shares, jnp.float32)
    with monkeypatch.context() as patch:  # side by side, where a CPU takes one after the other
        patch.setattr(jax, "default_backend", lambda: "not a cpu")
        together, *_ = ssar.train_interval(
            states(config, [5, 6, 7]), data._replace(trusted=trusted), config
        )
    ssar.train_interval.clear_cache()
    for i, seed in enumerate([5, 6, 7]):
        alone, *_ = ssar.train_interval(
            states(config, [seed]), data._replace(trusted=trusted[i : i + 1]), config
        )
        row = jax.tree.map(lambda x, i=i: x[i], together)
        for a, b in zip(arrays(row), arrays(one(alone)), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-6)
    for leaf in jax.tree.leaves((together.actor, together.critic, together.coefficient)):
        if leaf.ndim > 1:
            assert not np.array_equal(leaf[0], leaf[1])
    pair = together.critic["Dense_0"]["kernel"][0]
    assert not np.array_equal(pair[0], pair[1])  # the two critics of one seed
    in_turns, *_ = ssar.train_interval(
        states(config, [5, 6, 7]), data._replace(trusted=trusted), config
    )
    assert same_bits(jax.tree.map(lambda x: x[2], in_turns), one(alone))  # the last one above


def test_interval_donates_its_state(config):
    data = toy_batch(rows=200)._replace(trusted=jnp.ones((1, 200)))
    state = states(config, [0])
    ssar.train_interval(state, data, config)
    assert state.critic["Dense_1"]["kernel"].is_deleted()
    assert state.target_critic["Dense_1"]["kernel"].is_deleted()


# ----------------------------------------------------------------------- who influences what


@pytest.mark.parametrize(("loosen_bound", "select_actions"), [(True, False), (False, True)])
def test_untrusted_rows_act_only_where_they_should(loosen_bound, select_actions):
    """β_φ of untrusted rows must not reach the critics under loosen_bound, nor their actions β_φ
    and n under select_actions."""
    config = frozen(loosen_bound=loosen_bound, select_actions=select_actions, update_period=1)
    state, batch = one(states(config, [0])), toy_batch()
    noise = ssar.sample_noise(jax.random.key(1), batch, config)
    update = jitted_update(config)
    base, info = update(state, batch, noise)

    # other samples in untrusted rows: without their regulariser, no critic can notice
    untrusted = batch.trusted[:, None, None] == 0
    flipped = jnp.where(untrusted, -noise.random_action, noise.random_action)
    other, _ = update(state, batch, noise._replace(random_action=flipped))
    assert same_bits(base.critic, other.critic) == loosen_bound

    # other actions in untrusted rows: the actor of this update does not depend on them
    action = jnp.where(untrusted[:, :, 0], -batch.action, batch.action)
    other, _ = update(state, batch._replace(action=action), noise)
    assert same_bits(base.actor, other.actor)
    same = same_bits((base.coefficient, base.threshold), (other.coefficient, other.threshold))
    assert same == select_actions
    assert not same_bits(base.coefficient, state.coefficient)

    beta = np.asarray(ssar.coefficient(state.coefficient, batch.obs, config))
    beta = beta[np.asarray(batch.trusted) > 0] if loosen_bound else beta
    ours = [info["beta_min"], info["beta_mean"], info["beta_max"]]
    np.testing.assert_allclose(ours, [beta.min(), beta.mean(), beta.max()], rtol=1e-5)


def test_fixed_coefficient_is_plain_cql():
    fixed = frozen(coefficient="fixed", update_period=1)
    state, batch = one(states(fixed, [0])), toy_batch()
    noise = ssar.sample_noise(jax.random.key(1), batch, fixed)
    after, info = jitted_update(fixed)(state, batch, noise)
    frozen_parts = lambda s: (s.coefficient, s.coefficient_opt, s.threshold)
    assert same_bits(frozen_parts(after), frozen_parts(state))
    everywhere = jnp.full(32, fixed.cql_alpha)
    plain = jax.jit(partial(plain_critic_loss, config=fixed))
    expected = plain(state.critic, state, batch, noise, everywhere)
    np.testing.assert_allclose(info["critic_loss"], expected, rtol=1e-5)
    assert float(info["beta_mean"]) == pytest.approx(fixed.coefficient_init)


def test_a_batch_without_trusted_rows_is_harmless():
    config = frozen(update_period=1)
    state = one(states(config, [0]))
    batch = toy_batch(trusted=np.zeros(32))
    after, info = jitted_update(config)(
        state, batch, ssar.sample_noise(jax.random.key(1), batch, config)
    )
    assert all(np.isfinite(x).all() for x in arrays((after, info)))
    assert same_bits(after.coefficient, state.coefficient)
    assert float(info["regulariser"]) == 0
    np.testing.assert_allclose(after.threshold.n, config.n_start + 0.2, rtol=1e-6)


def test_online_updates_freeze_the_coefficient_and_fade_the_regulariser():
    config = frozen(update_period=1, decay_steps=3)
    state, batch = one(states(config, [0])), toy_batch()
    update, start, sizes = jitted_update(config), one(states(config, [0])), []
    for _ in range(4):
        noise = ssar.sample_noise(jax.random.key(0), batch, config)
        state, info = update(state, batch, noise, online=True)
        sizes.append(float(info["regulariser"]))
    frozen_parts = lambda s: (s.coefficient, s.coefficient_opt, s.threshold)
    assert same_bits(frozen_parts(start), frozen_parts(state))
    assert int(state.online_step) == 4
    assert not same_bits(start.actor, state.actor)
    assert sizes[0] > sizes[1] > 0
    assert sizes[2:] == [0, 0]  # at decay_steps and past it


def test_entropy_and_multiplier_move_towards_their_targets(config):
    batch = toy_batch()
    slope = jax.grad(lambda log_alpha, entropy: ssar.entropy_loss(log_alpha, entropy, batch)[0])
    assert slope(0.0, -ACTION + 1.0) > 0  # more entropy than -|A|: α falls
    assert slope(0.0, -ACTION - 1.0) < 0
    lagrange = frozen(lagrange=True)
    slope = jax.grad(lambda log, penalty: ssar.multiplier_loss(log, penalty, lagrange)[0])
    assert slope(1.0, 2.0) < 0  # regulariser above its gap: α' rises
    assert slope(1.0, -2.0) > 0
    assert slope(20.0, 2.0) == 0  # capped at 1e6


def test_initial_networks_are_the_authors():
    """Small means, σ near exp(-1), orthogonal critics of the given depths."""
    config = frozen(critic_layers=(4, 3), hidden_dims=(64, 64, 64))
    state, batch = one(states(config, [0])), toy_batch()
    mean, log_std = ssar.actor(state.actor, batch.obs)
    assert abs(mean).max() < 0.05
    np.testing.assert_allclose(log_std, -1, atol=0.05)
    assert [sum(name.startswith("Dense") for name in params) for params in state.critic] == [5, 4]
    for params in state.critic:
        kernel = params["Dense_1"]["kernel"]
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(64), atol=1e-4)
        last = params[f"Dense_{len(params) // 2}"]["kernel"]
        np.testing.assert_allclose(jnp.linalg.norm(last), 0.01, rtol=1e-4)
    assert same_bits(state.critic, state.target_critic)
    assert (float(state.log_alpha), float(state.log_alpha_prime)) == (0, 1)
    assert float(state.threshold.n) == config.n_start
    assert int(state.threshold.stopped_at) == -1


def test_seeds_are_initialised_without_batched_qr(config):
    """jax.jit(jax.vmap(init_state)) with batched QR factorisations hangs now and then on two cores:
    both of XLA's threads wait inside a factorisation for a thread to do their parts."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(3)])
    program = jax.make_jaxpr(jax.vmap(lambda key: ssar.init_state(key, OBS, ACTION, config)))(keys)
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("qr", "geqrf", "householder_product"):
                found.append(eqn.invars[0].aval.ndim)
            for child in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(child)

    visit(program.jaxpr)
    assert len(found) >= 8  # four layers of two critics
    assert set(found) == {2}


def test_act_is_the_mean_policy(config):
    both = states(config, [0, 1])
    obs = jnp.stack([toy_batch(0).obs, toy_batch(1).obs])
    actions = ssar.act(both.actor, obs)
    for i in range(2):
        mean, _ = ssar.actor(jax.tree.map(lambda x, i=i: x[i], both.actor), obs[i])
        np.testing.assert_allclose(actions[i], np.tanh(mean), rtol=1e-5, atol=1e-7)
