"""What ssar_cql promises beyond the golden numbers: regulariser, blocks, densities and margin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, batch_of, new_state, set_up, settings
from toys import ACTION, OBS, arrays

import ssar_cql as ssar

# ------------------------------------------------------------------------------ the regulariser

UNWEIGHTED = {"importance_sample": False, "cql_temperature": 0.5}
CLIPPED = {"clip_diff_min": 2.5, "clip_diff_max": 4.0, "lagrange": True}


@pytest.mark.parametrize("overrides", [UNWEIGHTED, CLIPPED])
def test_the_regulariser_is_the_papers_with_every_option(overrides):
    config, rng = settings(ssar, **overrides), np.random.default_rng(0)
    q, log_prob, weight = rng.normal(size=(2, 7, 10)), rng.normal(size=(7, 9)), rng.random(7)
    scores = q[..., 1:] - log_prob if config.importance_sample else q
    scores, temperature = scores / config.cql_temperature, config.cql_temperature
    difference = temperature * np.log(np.exp(scores).sum(axis=-1)) - q[..., 0]
    if config.clip_diff_min:
        assert difference.min() < 2.5 and difference.max() > 4
        difference = difference.clip(2.5, 4)
    difference -= config.lagrange * 0.8
    ours = ssar.weighted_regulariser(q, log_prob, weight, config)
    np.testing.assert_allclose(ours, (weight * difference).sum(), rtol=1e-5)


@pytest.mark.parametrize("block_size", [5, 8, 64])
def test_blocks_equal_the_whole_batch_and_skip_what_has_no_weight(block_size):
    """Entries of weight 0 are not looked at, and no block of them is computed."""
    rng = np.random.default_rng(0)
    x, params = rng.standard_normal((32, 3), np.float32), jnp.arange(1.0, 4)
    loss = lambda params, x, weight: (weight * jnp.sin(x @ params)).sum()
    in_blocks = lambda params, *inputs: ssar.sum_in_blocks(loss, block_size, params, inputs) ** 3
    blocks = jax.jit(jax.value_and_grad(in_blocks))
    whole = jax.value_and_grad(lambda params, *inputs: loss(params, *inputs) ** 3)
    count_blocks = partial(ssar.sum_in_blocks, lambda params, weight: params, block_size, 1.0)
    for count in (0, 1, 7, 8, 9, 31, 32):
        weight = np.where(rng.permutation(32) < count, rng.random(32, np.float32) + 0.5, 0)
        seen = np.where(weight[:, None] > 0, x, np.nan)
        assert_close(blocks(params, seen, weight), whole(params, x, weight), rtol=1e-4, atol=1e-5)
        assert count_blocks((jnp.asarray(weight),)) == np.ceil(count / min(block_size, 32))


# --------------------------------------------------------------------------- targets and noise


def test_backup_entropy_counts_for_the_action_that_is_best_by_q_alone():
    """With Q = 0 everywhere, that is the first one, and the target is r - γ (1 - d) α log π."""
    config = settings(ssar, backup_entropy=True, max_target_backup=True, block_size=None)
    state, batch, noise, _ = set_up(ssar, config)
    zero = jax.tree.map(jnp.zeros_like, state.critic)
    state = state._replace(critic=zero, target_critic=zero, log_alpha=jnp.float32(-0.5))
    distribution = ssar.actor(state.actor, batch.obs)
    loss = jax.jit(partial(ssar.critic_loss, config=config))
    _, info = loss(zero, state, batch, noise, distribution, jnp.ones(32))
    next_distribution = ssar.actor(state.actor, batch.next_obs)
    log_prob = ssar.sample(next_distribution, noise.target_action)[1][:, 0]
    target = batch.reward - 0.99 * (1 - batch.terminated) * np.exp(-0.5) * log_prob
    np.testing.assert_allclose(info["td_loss"], 2 * np.square(target).mean(), rtol=1e-5)


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


def test_the_multiplier_is_at_most_a_million():
    config = settings(ssar, lagrange=True)
    value, slope = jax.value_and_grad(partial(ssar.multiplier, config=config))(20.0)
    assert (float(value), float(slope)) == (1e6, 0)


# ------------------------------------------------------------------------------- extreme cases


def test_the_margin_costs_half_n_squared_however_small_sigma_is():
    bias = jnp.array([1.0, 1, -12, -12])  # μ and log σ, for every state
    layer, log_std = {"kernel": jnp.zeros((OBS, 4)), "bias": bias}, jnp.array([1.0, 0])
    batch = batch_of(ssar)._replace(action=jnp.full((32, ACTION), np.tanh(1.0)))
    threshold = ssar.Threshold(jnp.float32(3), jnp.int32(-1))
    margin = ssar.log_likelihood_margin({"Dense_0": layer, "log_std": log_std}, batch, threshold)
    np.testing.assert_allclose(margin, 4.5, atol=0.6)  # μ is 0.2 σ off: its float32 spacing


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


def test_actor_and_critics_start_as_the_authors_do():
    """Small means, σ near exp(-1), orthogonal critics of the given depths."""
    config = settings(ssar, critic_layers=(4, 3), hidden_dims=(64, 64, 64))
    state = new_state(ssar, config)
    mean, log_std = ssar.actor(state.actor, batch_of(ssar).obs)
    assert abs(mean).max() < 0.05
    np.testing.assert_allclose(log_std, -1, atol=0.05)
    for params, depth in zip(state.critic, (4, 3), strict=True):
        assert sum("Dense" in name for name in params) == depth + 1
        kernel, last = params["Dense_1"]["kernel"], params[f"Dense_{depth}"]["kernel"]
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(64), atol=1e-4)
        np.testing.assert_allclose(jnp.linalg.norm(last), 0.01, rtol=1e-4)


# --------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("rewards", "given", "expected"),
    [
        ([0, 1, 0], {}, [-5, 5, -5]),
        ([-1, 0, -1], {}, [-5, 5, -5]),
        ([0, 1, 2], {}, [0, 1, 2]),
        ([1, 1, 1], {}, [1, 1, 1]),
        ([1, 0, 0], {}, [1, 0, 0]),  # a failure ends the episode: -5 a step would reward it
        ([0, 1, 0], {"reward_bias": -1.0}, [-1, 0, -1]),
        ([0, 1, 0], {"return_threshold": 0.5}, [0, 1, 0]),
        ([0, 1, 0], {"scale_sparse_rewards": False}, [0, 1, 0]),
    ],
)
def test_rewards_of_two_values_are_scaled_unless_settings_say_how(rewards, given, expected):
    rewards, ends = np.float32(rewards), np.array([False, True, False])
    config = settings(ssar, **{"scale_sparse_rewards": True, "return_threshold": None} | given)
    config = ssar.scale_sparse_rewards(config, rewards, ends)
    learned = ssar.modify_reward(rewards, config)
    np.testing.assert_allclose(learned, expected, atol=1e-6)
