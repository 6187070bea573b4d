"""What ssar_td3bc promises beyond the golden numbers: who influences what."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import coefficient_of, new_state, set_up, settings
from toys import same_bits, toy_batch

import ssar_td3bc as ssar


def move_actor(config, batch, state):
    """The part of an update that moves the actor, β_φ and the targets."""
    move = partial(ssar.update_actor_and_coefficient, config=config, online=False)
    return jax.jit(move)(state, batch)


@pytest.mark.parametrize("loosen_bound", [True, False])
@pytest.mark.parametrize("select_actions", [True, False])
def test_untrusted_transitions_act_only_where_they_should(loosen_bound, select_actions):
    """With other actions there: the actor must not change under loosen_bound, nor β_φ and n under
    select_actions."""
    config = settings(
        ssar, loosen_bound=loosen_bound, select_actions=select_actions, update_period=2
    )
    state, batch = new_state(ssar, config)._replace(step=jnp.int32(2)), toy_batch()
    untrusted = batch.trusted[:, None] == 0
    other = batch._replace(action=jnp.where(untrusted, -batch.action, batch.action))
    a, _ = move_actor(config, batch, state)
    b, _ = move_actor(config, other, state)
    assert same_bits(a.actor, b.actor) == loosen_bound
    assert same_bits((a.coefficient, a.threshold), (b.coefficient, b.threshold)) == select_actions
    assert not same_bits(a.coefficient, state.coefficient)


def test_fixed_coefficient_is_plain_td3bc():
    config = settings(ssar, coefficient="fixed", update_period=1)
    state, batch = new_state(ssar, config), toy_batch()
    after, info = move_actor(config, batch, state)
    assert same_bits(coefficient_of(after), coefficient_of(state))
    action = np.asarray(ssar.actor(state.actor, batch.obs))
    q = np.asarray(ssar.critics(state.critic, batch.obs, action))[0]
    expected = -q.mean() / np.abs(q).mean() + 0.4 * np.mean((action - batch.action) ** 2)
    np.testing.assert_allclose(info["actor_loss"], expected, rtol=1e-5)
    assert float(info["beta_mean"]) == pytest.approx(config.coefficient_init)


def test_an_update_without_the_actor_moves_the_critics_only():
    state, batch, noise, update = set_up(ssar, settings(ssar))
    after, info = update(state, batch, noise, update_actor=False)
    assert set(info) == {"critic_loss", "q1"}
    moved = {name for name, x in after._asdict().items() if not same_bits(x, getattr(state, name))}
    assert moved == {"critic", "critic_opt", "step"}


def test_initial_networks_are_pytorchs():
    """Uniform up to 1 / √fan_in; targets are equal copies; the two critics differ."""
    config = settings(ssar, hidden_dims=(64, 64))
    state = new_state(ssar, config)
    for params in (state.actor, jax.tree.map(lambda x: x[0], state.critic)):
        for name in ("Dense_0", "Dense_1", "Dense_2"):
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            bound = len(kernel) ** -0.5
            assert abs(kernel).max() <= bound and abs(bias).max() <= bound
            assert abs(kernel).mean() == pytest.approx(bound / 2, rel=0.2)
    assert same_bits((state.actor, state.critic), (state.target_actor, state.target_critic))
    assert not np.array_equal(*state.critic["Dense_0"]["kernel"])
    assert float(state.threshold.n) == config.n_start
    assert int(state.threshold.stopped_at) == -1
