"""What both scripts promise: a scan is a loop, seeds train alone, β_φ, n and D̂ follow the rules.

Code that the scripts repeat is tested in ssar_td3bc; the first test compares the copies.
"""

import ast
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    StubRun,
    actor_is_due,
    assert_close,
    batch_of,
    both_but_cql_slowly,
    both_scripts,
    jitted_update,
    new_state,
    new_states,
    one_of,
    set_up,
    settings,
)
from toys import arrays, same_bits

import ssar_cql
import ssar_td3bc
from common.seeds import Seeds

# Where the algorithms differ. Everything else that both scripts define is repeated verbatim.
DIFFERENT = set(
    """
    Noise TrainState actor critic critics critic_loss actor_loss log_likelihood_margin
    init_state sample_noise update_step train_interval act explore online_update finetune
    make_transitions main
    """.split()
)


def definitions(text):
    """{name: source} of what a script defines at module scope, in order."""
    found = {}
    for node in ast.parse(text).body:
        for named in (node, *getattr(node, "targets", [])):
            if name := getattr(named, "name", getattr(named, "id", None)):
                found[name] = ast.get_source_segment(text, node)
    return found


def test_repeated_definitions_are_identical_and_in_the_same_order():
    texts = [Path(ssar.__file__).read_text() for ssar in (ssar_td3bc, ssar_cql)]
    sections = [[line for line in text.splitlines() if line.startswith("# --")] for text in texts]
    assert sections[0] == sections[1]
    td3bc, cql = map(definitions, texts)
    shared = [name for name in td3bc if name in cql]
    assert shared == [name for name in cql if name in td3bc]
    assert {name for name in shared if td3bc[name] != cql[name]} == DIFFERENT


# ------------------------------------------------------------------------------ scan and seeds


@both_but_cql_slowly
def test_a_scan_equals_a_python_loop_and_its_parts_bit_for_bit(ssar):
    config = settings(ssar)
    state, data = new_state(ssar, config), batch_of(ssar, rows=200)
    train = jax.jit(partial(ssar.train_interval, config=config), static_argnames="num_updates")
    scanned, means = train(state, data)
    in_parts = state
    for _ in range(5):
        in_parts, _ = train(in_parts, data, num_updates=4)
    assert same_bits(in_parts, scanned)

    infos, update, key = [], jitted_update(ssar, config), state.key
    for i in range(1, 21):
        index_key, noise_key = ssar.update_keys(key, i)
        batch = ssar.take(data, jax.random.randint(index_key, (config.batch_size,), 0, 200))
        noise = ssar.sample_noise(noise_key, batch, config)
        state, info = update(state, batch, noise, **actor_is_due(ssar, i % 2 == 0))
        infos += [info] * ("actor_loss" in info)
    assert_close(scanned, state, rtol=5e-4, atol=5e-6)
    assert_close(means, jax.tree.map(lambda *x: np.mean(x), *infos), rtol=1e-3, atol=1e-5)


@both_but_cql_slowly
def test_each_seed_trains_as_if_alone_in_turns_bit_for_bit(ssar):
    config, data = settings(ssar), batch_of(ssar, rows=200)
    shares = np.array([[0.1], [0.5], [0.9]])  # each seed has its own D̂
    trusted = jnp.asarray(np.random.default_rng(1).random((3, 200)) < shares, jnp.float32)
    start, labelled = new_states(ssar, config, 3), data._replace(trusted=trusted)
    train, axes = partial(ssar.train_interval, config=config), (0, ssar.DATA_AXES)
    donated = jax.tree.map(jnp.copy, start)
    in_turns, _ = Seeds(3).vmap(train, axes, donate=0, is_loop=True)(donated, labelled)
    assert all(x.is_deleted() for x in jax.tree.leaves(donated))  # overwritten by its successor
    train = jax.jit(train)
    for i in range(3):
        alone, _ = train(one_of(start, i), data._replace(trusted=trusted[i]))
        assert same_bits(one_of(in_turns, i), alone)


# ----------------------------------------------------------------------------------- first state


@both_scripts
def test_the_first_state(ssar):
    """Every seed and both critics have their own networks, targets are copies, β_φ is β_init."""
    config = settings(ssar)
    states = new_states(ssar, config, 2)
    for name in ("actor", "critic", "coefficient"):
        networks = getattr(states, name)
        assert not same_bits(one_of(networks, 0), one_of(networks, 1))
        assert same_bits(networks, getattr(states, f"target_{name}", networks))
    assert not np.array_equal(*states.critic["Dense_0"]["kernel"][0])
    beta = ssar.coefficient(one_of(states.coefficient), batch_of(ssar).obs, config)
    assert 0.8 < float(beta.mean()) / config.coefficient_init < 1.2


def test_td3bc_starts_from_pytorchs_uniform_kernels_and_biases():
    state = new_state(ssar_td3bc, settings(ssar_td3bc))
    for params in (state.actor, one_of(state.critic)):
        for layer in (params["Dense_0"], params["Dense_1"]):
            kernel, bias = layer["kernel"], layer["bias"]
            bound = len(kernel) ** -0.5
            assert abs(kernel).max() <= bound and abs(bias).max() <= bound
            assert abs(kernel).mean() == pytest.approx(bound / 2, rel=0.2)


# --------------------------------------------------------- coefficient, threshold, learning rate


@both_scripts
def test_a_batch_without_trusted_transitions_is_harmless(ssar):
    config = settings(ssar, update_period=1)
    state, batch, noise, update = set_up(ssar, config, trusted=np.zeros(32))
    after, info = update(state, batch, noise)
    assert all(np.isfinite(x).all() for x in arrays((after, info)))
    assert same_bits(after.coefficient, state.coefficient)  # Adam at rest: no gradient, no step
    np.testing.assert_allclose(after.threshold.n, config.n_start + 0.2, rtol=1e-6)
    assert float(info.get("regulariser", 0)) == 0


@both_scripts
def test_a_fixed_coefficient_is_beta_init_on_every_transition_and_never_moves(ssar):
    config = settings(ssar, update_period=1, coefficient="fixed", coefficient_init=0.7)
    state, batch, noise, update = set_up(ssar, config)
    after, info = update(state, batch, noise)
    untrusted, _ = update(state, batch._replace(trusted=jnp.zeros(32)), noise)
    assert same_bits(after, untrusted)
    for name in ("coefficient", "coefficient_opt", "threshold"):
        assert same_bits(getattr(after, name), getattr(state, name))
    assert float(info["beta_min"]) == float(info["beta_max"]) == pytest.approx(0.7)


@pytest.mark.parametrize("select_actions", [True, False])
def test_untrusted_transitions_shape_the_coefficient_only_without_select_actions(select_actions):
    config = settings(ssar_td3bc, select_actions=select_actions, update_period=1)
    state, batch, noise, update = set_up(ssar_td3bc, config)
    action = jnp.where(batch.trusted[:, None] > 0, batch.action, -batch.action)
    before, _ = update(state, batch, noise)
    after, _ = update(state, batch._replace(action=action), noise)
    assert same_bits(after.coefficient, before.coefficient) == select_actions


def test_matmul_precision_does_not_reach_the_coefficient():
    config, batch = settings(ssar_td3bc), batch_of(ssar_td3bc)
    beta = lambda params: ssar_td3bc.coefficient(params, batch.obs, config).sum()
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(jax.grad(beta))(new_state(ssar_td3bc, config).coefficient)
    assert "HIGHEST" in str(program) and "DEFAULT" not in str(program)


@pytest.mark.parametrize(
    ("margins", "rises", "stopped_at"),
    [
        ([-1] * 40, 10, -1),  # to n_end and no further
        ([1, -1, 1, 0, 1, -1], 3, -1),  # only every second one is tested, and 0 does not pass
        ([1, -1, 1, 1, 1, -1], 1, 8),  # the fourth one passes, for good
    ],
)
def test_n_rises_until_a_test_passes_and_never_moves_again(margins, rises, stopped_at):
    config = settings(ssar_td3bc, update_period=4, n_start=1.0, n_end=3.0)
    threshold = ssar_td3bc.Threshold(jnp.float32(1), jnp.int32(-1))
    mask = jnp.array([1, 0, 1])
    for i, margin in enumerate(margins, start=1):
        margin = jnp.array([margin, -9, margin])
        threshold = ssar_td3bc.update_threshold(threshold, margin, mask, 2 * i, config)
    np.testing.assert_allclose(threshold.n, 1 + 0.2 * rises, rtol=1e-5)
    assert int(threshold.stopped_at) == stopped_at


def test_annealing_fades_to_zero_and_stays_there_unless_it_is_off():
    for anneal, decay_steps, expected in (
        ("linear", 100, [1, 0.5, 0, 0]),
        ("cosine", 100, [1, np.cos(np.pi / 4), 0, 0]),
        ("linear", -1, [1, 1, 1, 1]),
        ("none", 100, [1, 1, 1, 1]),
    ):
        config = settings(ssar_td3bc, anneal=anneal, decay_steps=decay_steps)
        factors = [ssar_td3bc.anneal_factor(jnp.int32(step), config) for step in (0, 50, 100, 150)]
        np.testing.assert_allclose(factors, expected, atol=1e-7)


@both_but_cql_slowly
def test_the_actors_learning_rate_decays_offline_alone(ssar):
    config = settings(ssar, offline_steps=100, actor_lr_decay=True)
    state, batch, noise, update = set_up(ssar, config)

    def moved(step, **options):  # in Adam's first step, every parameter moves by the learning rate
        after, _ = update(state._replace(step=jnp.int32(step - 1)), batch, noise, **options)
        pairs = zip(arrays(after.actor), arrays(state.actor), strict=True)
        return max(abs(a - b).max() for a, b in pairs) / config.actor_lr

    assert [moved(50), moved(75), moved(100)] == pytest.approx([0.5, 0.146, 0], abs=2e-3)
    assert moved(100, online=True) == pytest.approx(1, abs=2e-3)


# -------------------------------------------------------------------------- the data and their D̂


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"selection": "none"}, [1, 1, 1, 1, 1]),
        ({"selection": "return", "return_threshold": 0.0}, [0, 0, 0, 1, 1]),  # 0 is not above 0
        ({"selection": "success", "reward_bias": -1.0}, [0, 0, 1, 1, 1]),
        ({"selection": "return", "coefficient": "fixed"}, [1, 1, 1, 1, 1]),
        ({"selection": "return", "offline_steps": 0, "buffer_init": "none"}, [1, 1, 1, 1, 1]),
        ({"selection": "iql"}, [1, 0, 0, 1, 0]),
        ({"selection": "return", "return_threshold": None}, [0, 0, 1, 1, 1]),  # the better half
        ({"selection": "auto", "return_threshold": -1.0}, [0, 0, 1, 1, 1]),
    ],
)
def test_the_settings_choose_how_transitions_are_selected(overrides, expected):
    config = settings(ssar_td3bc, num_seeds=2, **overrides)
    label = lambda: np.array([[1, 0, 0, 1, 0]] * 2, bool)
    rewards, ends = np.array([0, -1, 0, -1, 2], np.float32), np.array([0, 1, 1, 0, 1], bool)
    trusted = ssar_td3bc.select_trusted(rewards, ends, label, config)
    np.testing.assert_array_equal(trusted, [expected, expected])


def test_auto_trusts_successes_where_rewards_are_sparse_unless_a_threshold_is_given():
    config = settings(ssar_td3bc, selection="auto", return_threshold=None)
    rewards = np.array([-1, -1, -1, 0, -1, 0, -1], np.float32)
    ends = np.array([0, 1, 0, 1, 0, 1, 1], bool)
    select = partial(ssar_td3bc.select_trusted, label=None, config=config)
    np.testing.assert_array_equal(select(rewards, ends), [[0, 0, 1, 1, 1, 1, 0]])
    alive = select(np.ones(7, np.float32), ends)
    np.testing.assert_array_equal(alive, [[1] * 6 + [0]])  # the longest episodes, all three
    select = partial(select, config=settings(ssar_td3bc, selection="auto", return_threshold=-1.5))
    np.testing.assert_array_equal(select(rewards, ends), [[0, 0, 1, 1, 1, 1, 1]])


def test_iql_finds_the_better_action_for_every_seed():
    """One state, two actions, and a reward of 1 for the first: D̂ is its transitions."""
    good = np.random.default_rng(0).random(400) < 0.5
    action, reward = jnp.where(good, 0.8, -0.8)[:, None], jnp.asarray(good, jnp.float32)
    obs, ended = jnp.ones((400, 1)), jnp.ones(400)
    data = ssar_td3bc.Transition(obs, action, reward, obs, ended, trusted=None)
    config = settings(ssar_td3bc, batch_size=64, iql_steps=200, updates_per_call=100)
    keys, run = jnp.stack([jax.random.key(seed) for seed in (0, 1)]), StubRun()
    labels = ssar_td3bc.label_by_iql(keys, data, Seeds(2), run, config)
    assert ((labels == good).mean(axis=1) > 0.99).tolist() == [True, True]
    losses = run.metrics["iql"][0]["iql_critic_loss"]
    assert losses[0] != losses[1]  # each seed has its own networks and batches


@both_scripts
def test_transitions_have_modified_rewards_and_usable_actions(ssar):
    config = settings(ssar, reward_scale=10.0, reward_bias=-5.0)
    obs, action = np.zeros((3, 2), np.float32), np.array([[-1], [0.5], [1]], np.float32)
    dataset = SimpleNamespace(
        observations=obs, next_observations=obs, actions=action,
        rewards=np.array([0, 1, 0], np.float32), terminals=np.array([False, True, False]),
    )  # fmt: skip
    data = ssar.make_transitions(dataset, config)
    np.testing.assert_array_equal(data.reward, [-5, 5, -5])
    np.testing.assert_array_equal(data.terminated, [0, 1, 0])
    limit = 1 if ssar is ssar_td3bc else 1 - 1e-4  # CQL: log π(a|s) of an action of 1 is infinite
    np.testing.assert_allclose(data.action[:, 0], [-limit, 0.5, limit])
    assert {x.dtype for x in data if x is not None} == {np.dtype(np.float32)}
