"""What ssar_cql promises beyond the golden numbers: regulariser, blocks, densities and margin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import members
from helpers import assert_close, batch_of, coefficient_of, new_state, set_up, settings
from toys import ACTION, OBS, arrays, same_bits

import ssar_cql as ssar


@jax.jit
def double(tree):
    to_double = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
    return jax.tree.map(to_double, tree)


# ------------------------------------------------------------------------------ the regulariser


def plain_critic_loss(pair, state, batch, noise, weight, config):
    """The loss of the critics as the paper writes it: source by source, for the whole batch."""

    def draw(obs, unit):
        mean, log_std = (x[:, None] for x in ssar.actor(state.actor, obs))
        x = mean + jnp.exp(log_std) * unit
        log_prob = jax.scipy.stats.norm.logpdf(x, mean, jnp.exp(log_std))
        return jnp.tanh(x), (log_prob - jnp.log(1 - jnp.tanh(x) ** 2)).sum(-1)

    q_of = jax.vmap(ssar.critic, (None, None, 1), 1)  # one action of every state at a time
    next_action, next_log_prob = draw(batch.next_obs, noise.target_action)
    next_q = [q_of(params, batch.next_obs, next_action) for params in members(state.target_critic)]
    next_q = jnp.minimum(*next_q)
    best = jnp.arange(len(next_q)), next_q.argmax(axis=1)
    entropy = config.backup_entropy * jnp.exp(state.log_alpha) * next_log_prob[best]
    target = batch.reward + config.discount * (1 - batch.terminated) * (next_q[best] - entropy)
    uniform = noise.random_action, ACTION * np.log(0.5)
    of_next = draw(batch.next_obs, noise.next_action)
    of_this = draw(batch.obs, noise.current_action)
    loss = 0.0
    for params in members(pair):
        q = ssar.critic(params, batch.obs, batch.action)
        loss += ((q - target) ** 2).mean()
        scores = [
            q_of(params, batch.obs, actions) - config.importance_sample * log_prob
            for actions, log_prob in (uniform, of_next, of_this)
        ]
        if not config.importance_sample:
            scores.append(q[:, None])
        scores = jnp.concatenate(scores, axis=1) / config.cql_temperature
        difference = config.cql_temperature * jnp.log(jnp.exp(scores).sum(1)) - q
        difference = jnp.clip(difference, config.clip_diff_min, config.clip_diff_max)
        if config.lagrange:
            difference = jnp.exp(state.log_alpha_prime) * (difference - config.target_action_gap)
        loss += (weight * difference).mean()
    return loss


@pytest.mark.parametrize(
    "overrides",
    [
        {"block_size": None},
        {"block_size": 8},
        {"block_size": 32},
        {"block_size": 5, "importance_sample": False, "clip_diff_min": 2.31},
        {"block_size": 64, "cql_temperature": 0.5, "backup_entropy": True},
        {"lagrange": True, "max_target_backup": True, "critic_layers": (2, 1)},
    ],
    ids=lambda overrides: "-".join(f"{name}={x}" for name, x in overrides.items()),
)
def test_blocks_equal_the_plain_regulariser(overrides):
    """Loss and gradient, however many transitions have a weight."""
    config = settings(ssar, **overrides)
    state, batch, noise, _ = set_up(ssar, config)
    with jax.enable_x64(True):
        state, batch, noise = double((state, batch, noise))
        scale = lambda leaf: 3 * leaf if leaf.shape[-1] == 1 else leaf  # last kernels
        state = state._replace(critic=jax.tree.map(scale, state.critic))  # a Q worth regularising
        distribution = ssar.actor(state.actor, batch.obs)
        rng = np.random.default_rng(0)
        weigh = lambda count: np.where(np.arange(32) < count, rng.random(32) + 0.5, 0)
        weights = [rng.permutation(weigh(count)) for count in (0, 1, 7, 8, 9, 31, 32)]

        def loss(pair, weight):
            args = state, batch, noise, distribution, weight, config
            value, info = ssar.critic_loss(pair, *args)
            return value, info["regulariser"]

        plain = partial(plain_critic_loss, state=state, batch=batch, noise=noise, config=config)
        ours = jax.jit(jax.value_and_grad(loss, has_aux=True))
        theirs = jax.jit(jax.value_and_grad(plain))
        for i, weight in enumerate(weights):
            (value, regulariser), grads = ours(state.critic, weight)
            expected, expected_grads = theirs(state.critic, weight=weight)
            np.testing.assert_allclose(value, expected, rtol=1e-11)
            assert (float(regulariser) == 0) == (i == 0)
            assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


def test_untrusted_transitions_cost_nothing():
    """No block without a weight is computed, and no entry of weight 0 is looked at."""
    count_blocks = lambda params, x, weight: params + 0 * weight.sum()
    blocks = jax.jit(lambda weight: ssar.sum_in_blocks(count_blocks, 8, 1.0, (weight, weight)))
    order = np.random.default_rng(0).permutation(32)
    for count, expected in ((0, 0), (1, 1), (8, 1), (9, 2), (24, 3), (25, 4), (32, 4)):
        assert blocks(jnp.asarray(order < count, jnp.float32)) == expected
    total = lambda params, x, weight: (params * x * weight).sum()
    x = jnp.ones(32).at[5].set(jnp.nan)
    without = jnp.ones(32).at[5].set(0)
    assert ssar.sum_in_blocks(total, 8, 2.0, (x, without)) == 62  # NaN · 0 would be NaN
    assert np.isnan(ssar.sum_in_blocks(total, 8, 2.0, (x, jnp.ones(32))))


@pytest.mark.parametrize("max_target_backup", [False, True])
def test_noise_is_what_the_losses_expect(max_target_backup):
    """Uniform in [-1, 1], otherwise standard normal, and all columns independent."""
    config = settings(ssar, max_target_backup=max_target_backup, num_sampled_actions=5)
    noise = ssar.sample_noise(jax.random.key(0), batch_of(ssar, rows=4000), config)
    assert noise.target_action.shape == (4000, 5 if max_target_backup else 1, ACTION)
    for name, x in noise._asdict().items():
        is_uniform = name == "random_action"
        np.testing.assert_allclose(x.mean(), 0, atol=0.03, err_msg=name)
        np.testing.assert_allclose(x.std(), 3**-0.5 if is_uniform else 1, rtol=0.03, err_msg=name)
        assert (abs(x).max() <= 1) == is_uniform
    columns = np.concatenate([np.reshape(x, (4000, -1)) for x in noise], axis=1).T
    assert abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.1


def test_proposition_3_1():
    """With π ∝ exp Q over some actions, CQL's regulariser is -log π(a|s): values and gradients."""
    config = settings(ssar)
    pair = new_state(ssar, config).critic
    with jax.enable_x64(True):
        pair = double(pair)
        obs = jnp.asarray(np.random.default_rng(0).standard_normal((6, OBS)))
        grid = jnp.meshgrid(*[jnp.linspace(-0.9, 0.9, 3)] * ACTION)
        grid = jnp.stack(grid, axis=-1).reshape(-1, ACTION)
        taken = jnp.array([0, 4, 8, 2, 2, 7])
        every = jnp.broadcast_to(grid, (6, *grid.shape))
        no_density = jnp.zeros((6, len(grid)))  # a sum over all actions, not a sample

        def regulariser(pair):
            actions = jnp.concatenate([grid[taken][:, None], every], axis=1)
            return ssar.regulariser(config, pair, obs, actions, no_density, jnp.ones(6))

        def cloning(pair):
            log_policy = jax.nn.log_softmax(ssar.critics(pair, obs, every), axis=-1)
            return -log_policy[:, jnp.arange(6), taken].sum()

        value, ours = jax.jit(jax.value_and_grad(regulariser))(pair)
        expected, theirs = jax.jit(jax.value_and_grad(cloning))(pair)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
        assert max(abs(x).max() for x in jax.tree.leaves(ours)) > 0.1


# ------------------------------------------------------------------------ densities and margin


def test_log_density_is_exact_from_tiny_to_saturated():
    grid = np.meshgrid(
        [-30.0, -9.1, -3.0, 0.0, 0.4, 6.0, 40.0],
        [-20.0, -12.0, -5.0, -1.0, 2.0],
        [-4.0, -0.3, 0.0, 1.0, 5.0],
    )
    mean, log_std, unit = (x.ravel() for x in grid)
    x = mean + np.exp(log_std) * unit
    log_cosh = np.abs(x) + np.log1p(np.exp(-2 * np.abs(x))) - np.log(2)
    expected = -0.5 * unit**2 - log_std - 0.5 * np.log(2 * np.pi) + 2 * log_cosh
    single = [jnp.asarray(x, jnp.float32) for x in (mean, log_std, unit)]
    ours = ssar.log_density(single[:2], single[2])
    np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=3e-5)


def margin_of(mean, log_std, action, n):
    """log_likelihood_margin of an actor that outputs μ and log σ, [B, A] each."""
    mean, log_std, action = (np.asarray(x, np.float32) for x in (mean, log_std, action))
    # A linear actor of one-hot observations, whose factor on log σ is 1 and whose offset is 0.
    kernel = np.concatenate([mean, log_std], axis=1)
    layer = {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)}
    actor = {"Dense_0": layer, "log_std": np.array([1, 0], np.float32)}
    batch = batch_of(ssar, rows=len(mean))._replace(obs=np.eye(len(mean)), action=action)
    threshold = ssar.Threshold(jnp.float32(n), jnp.int32(-1))
    return np.asarray(ssar.log_likelihood_margin(actor, batch, threshold), float)


def authors_margin(mean, log_std, action, n):
    """The same through action space and arctanh, as the authors compute it, in float64."""
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
    action = [[-1.0, 1.0], [1.0, 1.0], [0.0, -1.0], [0.99999999, 0.3]]
    for mean in (-20.0, -8.0, 0.0, 8.0, 20.0):
        for log_std in (-20.0, -12.0, -5.0, 2.0):
            ones = np.ones((4, 2))
            margin = margin_of(mean * ones, log_std * ones, action, 2.0)
            assert np.isfinite(margin).all(), (mean, log_std)
    # C_n itself: n σ from the mean costs n² / 2, however small σ is.
    tiny = margin_of(np.full((1, 2), 1.0), np.full((1, 2), -12.0), np.full((1, 2), np.tanh(1.0)), 3)
    assert tiny[0] == pytest.approx(4.5, abs=0.6)  # μ itself is 0.2 σ off: its float32 spacing


def test_extreme_actions_and_actors_leave_no_nan():
    config = settings(
        ssar, lagrange=True, clip_diff_min=-200.0, max_target_backup=True, bc_weight=0.5,
        critic_layers=(5, 3), update_period=2,
    )  # fmt: skip
    state, batch, _, update = set_up(ssar, config)
    batch = batch._replace(action=batch.action.at[:8].set(1.0).at[8:16].set(-1.0))
    for scale in (1.0, 1e4):  # ordinary, and saturated with σ at either end of its range
        last = jax.tree.map(lambda x, scale=scale: scale * x, state.actor["Dense_3"])
        changed = state._replace(actor=state.actor | {"Dense_3": last})
        for i in range(4):
            noise = ssar.sample_noise(jax.random.key(i), batch, config)
            changed, info = update(changed, batch, noise)
            assert all(np.isfinite(x).all() for x in arrays((changed, info))), (scale, i)


# ------------------------------------------------------------------------- who influences what


@pytest.mark.parametrize(("loosen_bound", "select_actions"), [(True, False), (False, True)])
def test_untrusted_transitions_act_only_where_they_should(loosen_bound, select_actions):
    """Their β_φ must not reach the critics under loosen_bound, nor their actions β_φ and n under
    select_actions."""
    config = settings(
        ssar, loosen_bound=loosen_bound, select_actions=select_actions, update_period=1
    )
    state, batch, noise, update = set_up(ssar, config)
    base, _ = update(state, batch, noise)

    # Other samples there: without their regulariser, the critics must not change.
    untrusted = batch.trusted[:, None, None] == 0
    flipped = jnp.where(untrusted, -noise.random_action, noise.random_action)
    other, _ = update(state, batch, noise._replace(random_action=flipped))
    assert same_bits(base.critic, other.critic) == loosen_bound

    # Other actions there: the actor of this update does not depend on them.
    action = jnp.where(untrusted[:, :, 0], -batch.action, batch.action)
    other, _ = update(state, batch._replace(action=action), noise)
    assert same_bits(base.actor, other.actor)
    same = same_bits((base.coefficient, base.threshold), (other.coefficient, other.threshold))
    assert same == select_actions
    assert not same_bits(base.coefficient, state.coefficient)


def test_fixed_coefficient_is_plain_cql():
    config = settings(ssar, coefficient="fixed", update_period=1)
    state, batch, noise, update = set_up(ssar, config)
    after, info = update(state, batch, noise)
    assert same_bits(coefficient_of(after), coefficient_of(state))
    plain = jax.jit(partial(plain_critic_loss, config=config))
    expected = plain(state.critic, state, batch, noise, jnp.full(32, config.cql_alpha))
    np.testing.assert_allclose(info["critic_loss"], expected, rtol=1e-5)
    assert float(info["beta_mean"]) == pytest.approx(config.coefficient_init)


def test_entropy_and_multiplier_move_towards_their_targets():
    batch, config = batch_of(ssar), settings(ssar, lagrange=True)
    slope = jax.grad(lambda log_alpha, entropy: ssar.entropy_loss(log_alpha, entropy, batch)[0])
    assert slope(0.0, -ACTION + 1.0) > 0  # more entropy than -|A|: α falls
    assert slope(0.0, -ACTION - 1.0) < 0
    slope = jax.grad(lambda log, penalty: ssar.multiplier_loss(log, penalty, config)[0])
    assert slope(1.0, 2.0) < 0  # the regulariser is above its gap: α' rises
    assert slope(1.0, -2.0) > 0
    assert slope(20.0, 2.0) == 0  # at most 1e6


def test_initial_networks_are_the_authors():
    """Small means, σ near exp(-1), orthogonal critics of the given depths."""
    config = settings(ssar, critic_layers=(4, 3), hidden_dims=(64, 64, 64))
    state, batch = new_state(ssar, config), batch_of(ssar)
    mean, log_std = ssar.actor(state.actor, batch.obs)
    assert abs(mean).max() < 0.05
    np.testing.assert_allclose(log_std, -1, atol=0.05)
    assert [sum("Dense" in name for name in params) for params in state.critic] == [5, 4]
    for params, last in zip(state.critic, ("Dense_4", "Dense_3"), strict=True):
        kernel = params["Dense_1"]["kernel"]
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(64), atol=1e-4)
        np.testing.assert_allclose(jnp.linalg.norm(params[last]["kernel"]), 0.01, rtol=1e-4)
    assert same_bits(state.critic, state.target_critic)
    assert (float(state.log_alpha), float(state.log_alpha_prime)) == (0, 1)
