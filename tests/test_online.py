"""From offline to online: environments, ring, batches, one step, and going on from a checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from toys import (
    ACTION,
    OBS,
    arrays,
    frozen,
    one,
    same_bits,
    tiny_config,
    toy_batch,
    toy_columns,
    toy_states,
    write_hdf5,
)

import ssar_cql
import ssar_td3bc as ssar
from common.checks import InputError
from common.dataset import Normalizer, load_dataset
from common.evaluation import Collector, Evaluator

IDENTITY = Normalizer(np.zeros(OBS, np.float32), np.ones(OBS, np.float32))
STARTS = ("all", "half", "part", "none")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_hdf5(tmp_path_factory.mktemp("data") / "toy.hdf5", **toy_columns(300))


@pytest.fixture(scope="module")
def walk(data):
    return load_dataset("walk", data, "ssar-test/Walk-v0")


# ----------------------------------------------------------------------- environments


@pytest.mark.parametrize("env_id", ["ssar-test/Walk-v0", "ssar-test/Goal-v0"])
def test_collected_rows_are_those_of_a_loop_by_hand(walk, env_id):
    """Successors are an episode's own, a time limit is no terminal, the next row starts anew."""
    spec = gymnasium.spec(env_id)
    walk = walk.__class__(**{**walk.__dict__, "env": spec})
    normalizer = Normalizer(np.full(OBS, 0.5, np.float32), np.full(OBS, 2, np.float32))
    envs = Collector(walk, num_seeds=2, seed=3, normalizer=normalizer)
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 2, ACTION)).astype(np.float32)
    obs, outcomes, acted_in = envs.reset(), [], []
    for action in actions:
        acted_in.append(obs)
        outcomes.append(envs.step(action))
        obs = outcomes[-1].obs

    def standardise(obs):
        if isinstance(obs, dict):
            obs = np.concatenate([obs[key] for key in sorted(obs)])
        return (np.asarray(obs, np.float32) - np.float32(0.5)) / np.float32(2)

    limits = terminals = 0
    for i in range(2):
        env = gymnasium.make(spec)
        obs, _ = env.reset(seed=100_000 * (3 + i) + 99_999)
        total, length, finished = 0.0, 0, [e for e in envs.finished if e.slot == i]
        for t, action in enumerate(actions[:, i]):
            np.testing.assert_allclose(acted_in[t][i], standardise(obs), rtol=1e-6)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length = total + reward, length + 1
            assert outcomes[t].reward[i] == np.float32(reward)
            assert outcomes[t].terminated[i] == terminated
            np.testing.assert_allclose(outcomes[t].next_obs[i], standardise(obs), rtol=1e-6)
            if terminated or truncated:
                terminals, limits = terminals + terminated, limits + (not terminated)
                episode = finished.pop(0)
                assert (episode.step, episode.length) == (t + 1, length)
                assert episode.episode_return == pytest.approx(total, rel=1e-5)
                obs, _ = env.reset()
                total, length = 0.0, 0
        assert not finished
    assert terminals
    assert limits


def test_evaluation_does_not_touch_the_training_environments(walk):
    act = lambda params, obs: np.zeros((*obs.shape[:2], ACTION), np.float32)
    paths = []
    for evaluated in (False, True):
        evaluate = Evaluator(walk, num_seeds=2, episodes=3, seed=0)
        envs = Collector(walk, num_seeds=2, seed=0, normalizer=IDENTITY)
        assert not set(evaluate.reset_seeds) & set(envs.reset_seeds)
        path = [envs.reset()]
        for _ in range(20):
            path.append(envs.step(np.full((2, ACTION), 0.1, np.float32)).obs)
            if evaluated:
                evaluate(act, None, IDENTITY)
        paths.append(np.stack(path))
    np.testing.assert_array_equal(*paths)
    assert not np.array_equal(paths[0][:, 0], paths[0][:, 1])  # each seed has its own


@pytest.mark.parametrize("script", [ssar, ssar_cql])
def test_acting_online(script):
    config = frozen(script=script.__name__)
    states = toy_states(config, [0, 1], script)
    keys = jnp.stack([jax.random.key(5), jax.random.key(6)])
    obs = np.ones((2, OBS), np.float32)

    def actions(steps, config):
        more = {"config": config} if script is ssar else {}
        return np.stack([script.explore(states.actor, obs, keys, t, **more) for t in steps])

    greedy = np.asarray(script.act(states.actor, obs[:, None]))[:, 0]
    if script is ssar:  # deterministic, unless asked for
        np.testing.assert_array_equal(actions([1], config)[0], greedy)
        noisy = actions(range(400), frozen(exploration_noise=0.1)) - greedy
        np.testing.assert_allclose(noisy.std(axis=0), 0.1, rtol=0.2)
        assert np.abs(actions(range(20), frozen(exploration_noise=9.0))).max() == 1
    else:
        noisy = actions(range(400), config)
        mean, log_std = jax.vmap(script.actor)(states.actor, obs[:, None])
        before_tanh = np.arctanh(noisy.clip(-0.999999, 0.999999))
        np.testing.assert_allclose(before_tanh.mean(axis=0), mean[:, 0], atol=0.1)
        np.testing.assert_allclose(before_tanh.std(axis=0), np.exp(log_std)[:, 0], rtol=0.2)
    assert len(np.unique(noisy[:, :, 0])) == 2 * len(noisy)  # every step, every seed its own


# ----------------------------------------------------------------------- ring and batches


def tagged(tags):
    """Transitions whose every number tells which one it is."""
    tags = np.asarray(tags, np.float32)
    widths = {"obs": (OBS,), "action": (ACTION,), "next_obs": (OBS,)}
    columns = {
        name: np.broadcast_to(
            tags.reshape(-1, *[1] * len(widths.get(name, ()))), (len(tags), *widths.get(name, ()))
        )
        for name in ssar.Transition._fields
    }
    return ssar.Transition(**columns)


def test_a_full_ring_forgets_the_oldest_row_of_every_seed():
    config = frozen(online_steps=5, num_seeds=2)
    ring = ssar.init_ring(tagged(range(3)), config)
    put = jax.jit(ssar.store, donate_argnums=0)
    for t in range(13):
        ring = put(ring, tagged([100 + t, 200 + t]))
        kept = list(range(max(0, t - 4), t + 1))
        held = min(t + 1, 5)
        assert int(ring.added) == t + 1
        for i, base in enumerate((100, 200)):
            for column in ring.rows:
                values = np.asarray(column[i, :held]).reshape(held, -1)
                assert sorted(values[:, 0]) == [base + k for k in kept]
                assert (values == values[:, :1]).all()


@pytest.mark.parametrize("buffer_init", STARTS)
def test_batches_hold_offline_and_stored_rows_as_the_start_says(buffer_init):
    """Before the ring is full and after: the right rows, whole, and all equally often."""
    config = frozen(buffer_init=buffer_init, online_steps=6, batch_size=700)
    data = tagged(range(8))
    data = data._replace(trusted=np.zeros((1, 8), np.float32))
    ends = np.array([0, 1, 0, 0, 1, 0, 0, 1], bool)
    offline = ssar.offline_rows(jax.tree.map(jnp.asarray, data), ends, config)
    old = [] if buffer_init == "none" else list(range(8))  # part: three episodes, all of them
    assert sorted(np.asarray(offline.reward).tolist()) == old
    ring = ssar.init_ring(data, config)
    put = jax.jit(ssar.store, donate_argnums=0)
    draw = jax.jit(partial(ssar.draw, config=config))
    for t in range(20):
        ring = put(ring, tagged([100 + t])._replace(trusted=np.ones(1)))
        if t not in (0, 3, 5, 6, 19):
            continue
        new = [100 + k for k in range(max(0, t - 5), t + 1)]
        one_seed = jax.tree.map(lambda x: x[0], ring.rows)
        offline_seed = offline._replace(trusted=offline.trusted[0])
        batch = draw(jax.random.key(t), offline_seed, one_seed, ring.added)
        drawn = np.asarray(batch.reward)
        np.testing.assert_array_equal(batch.trusted, drawn >= 100)  # what is new is trusted
        for column in (batch.obs, batch.action, batch.next_obs):
            assert (np.asarray(column) == drawn[:, None]).all()
        assert set(drawn) == set(old + new)
        counts = {tag: (drawn == tag).sum() for tag in old + new}
        if buffer_init == "half":
            assert sum(counts[tag] for tag in old) == 350
            expected = {tag: 350 / len(old if tag in old else new) for tag in old + new}
        else:
            expected = {tag: 700 / len(old + new) for tag in old + new}
        for tag in counts:
            assert abs(counts[tag] - expected[tag]) < 6 * np.sqrt(expected[tag]) + 1


def test_the_part_start_keeps_the_50_best_episodes_and_their_trust():
    rng = np.random.default_rng(0)
    ends = np.arange(240) % 3 == 2  # 80 episodes of three rows
    data = tagged(rng.permutation(240))
    trusted = (rng.random((2, 240)) < 0.5).astype(np.float32)
    data = jax.tree.map(jnp.asarray, data._replace(trusted=trusted))
    kept = ssar.offline_rows(data, ends, frozen(buffer_init="part"))
    returns = np.asarray(data.reward).reshape(80, 3).sum(axis=1)
    best = np.argsort(-returns, kind="stable")[:50]
    np.testing.assert_array_equal(kept.reward, np.asarray(data.reward).reshape(80, 3)[best].ravel())
    expected = trusted.reshape(2, 80, 3)[:, best].reshape(2, -1)
    np.testing.assert_array_equal(kept.trusted, expected)
    np.testing.assert_array_equal(kept.obs[:, 0], kept.reward)


# ----------------------------------------------------------------------- one step


def step_arguments(script, config, transition):
    """What compile_online wants, and its programs: keys, ring, offline rows; then the programs."""
    state = toy_states(config, range(config.num_seeds), script)
    data = toy_batch(rows=50)
    data = data._replace(trusted=jnp.stack([data.trusted] * config.num_seeds))
    data = script.offline_rows(data, np.arange(50) % 5 == 4, config)
    ring = script.init_ring(data, config)
    assert jax.tree.map(jnp.shape, transition) == jax.tree.map(lambda x: x[:, 0].shape, ring.rows)
    keys = jnp.stack([jax.random.key(i) for i in range(config.num_seeds)])
    return state, ring, data, script.compile_online(state, ring, data, keys, config)


@pytest.mark.parametrize("script", [ssar, ssar_cql])
def test_a_step_changes_a_large_ring_in_place(script):
    """No copy of the ring, however large, and none of its rows but one moves."""
    config = frozen(script=script.__name__, online_steps=300_000, buffer_init="all")
    transition = jax.tree.map(lambda x: np.asarray(x[:1]), toy_batch())
    state, ring, data, programs = step_arguments(script, config, transition)
    _, collect, learn, totals = programs
    learn = learn[True] if isinstance(learn, list) else learn
    size = sum(x.nbytes for x in jax.tree.leaves(ring))
    for program in (collect, learn):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < size / 4
    place = ring.rows.obs.unsafe_buffer_pointer()
    ring = collect(ring, transition)
    before = state
    state, ring, totals = learn(state, ring, totals, data, transition)
    assert ring.rows.obs.unsafe_buffer_pointer() == place
    assert before.critic is not state.critic
    assert all(x.is_deleted() for x in jax.tree.leaves(before.critic))
    np.testing.assert_array_equal(ring.rows.obs[0, :2], np.repeat(transition.obs, 2, axis=0))
    assert not np.asarray(ring.rows.obs[0, 2:]).any()
    assert int(ring.added) == 2
    assert {name: float(count) for name, (_, count) in totals.items()} == dict.fromkeys(totals, 1.0)


def test_a_step_learns_from_what_it_has_just_stored():
    """With nothing else to draw from, it is update_step on a batch of that one row."""
    config = frozen(buffer_init="none", online_steps=4, policy_noise=0.0)
    transition = jax.tree.map(lambda x: np.asarray(x[:1]), toy_batch(trusted=np.ones(32)))
    state, ring, data, (_, _, learn, totals) = step_arguments(ssar, config, transition)
    batch = jax.tree.map(lambda x: jnp.repeat(x, config.batch_size, axis=0), transition)
    start = one(state)
    noise = ssar.sample_noise(jax.random.key(0), batch, config)
    expected, info = jax.jit(
        partial(ssar.update_step, config=config, update_actor=True, online=True)
    )(start, batch, noise)
    state, ring, totals = learn[True](state, ring, totals, data, transition)
    learned = one(state)._replace(key=start.key)
    for a, b in zip(arrays(learned), arrays(expected._replace(key=start.key)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert set(totals) == set(info)
    for name in info:
        np.testing.assert_allclose(totals[name][0][0], info[name], rtol=1e-4, atol=1e-6)
    # Without its turn, the actor and all targets stand still, and their metrics count nothing.
    before = jax.tree.map(jnp.copy, state)
    state, ring, totals = learn[False](state, ring, totals, data, transition)
    for still in ("actor", "target_actor", "target_critic"):
        assert same_bits(getattr(before, still), getattr(state, still))
    assert not same_bits(before.critic, state.critic)
    assert (totals["critic_loss"][1], totals["actor_loss"][1]) == (2, 1)


# ----------------------------------------------------------------------- whole runs


def online_config(data, script=ssar, **overrides):
    settings = {"offline_steps": 0, "online_steps": 60, "eval_interval": 20, "warmup_steps": 5}
    return tiny_config(data, script.__name__, **(settings | overrides))


def test_plain_td3_learns_without_any_data(tmp_path):
    config = online_config(
        None, dataset=None, buffer_init="none", coefficient="fixed", coefficient_init=0.0,
        exploration_noise=0.3, online_steps=600, eval_interval=300, eval_episodes=20,
        warmup_steps=100, hidden_dims=(32, 32), actor_lr=3e-3, critic_lr=3e-3,
    )  # fmt: skip
    config.dataset_path = None
    results = ssar.main(config, str(tmp_path / "run"))
    assert results["behaviour"] == [None]
    assert results["last"][0] > results["before_online"][0] + 5
    assert results["updates_per_second"] == results["env_steps_per_second"]
    with open(tmp_path / "run" / "results.json") as file:
        assert json.load(file) == results


def test_plain_sac_runs_without_any_data(tmp_path):
    config = online_config(
        None, ssar_cql, dataset=None, buffer_init="none", coefficient="fixed", cql_alpha=0.0,
        backup_entropy=True,
    )  # fmt: skip
    config.dataset_path = None
    results = ssar_cql.main(config, str(tmp_path / "run"))
    assert results["data"]["transitions"] == 0
    assert results["beta_mean"] == [0.0]


@pytest.fixture(scope="module")
def offline(data, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("offline") / "run")
    ssar.main(tiny_config(data, offline_steps=20), workdir)
    return workdir


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"online_steps": 0}, "online_steps=0 leaves nothing to do"),
        ({"offline_checkpoint": "/no/run"}, "/no/run is no run's folder"),
        ({"hidden_dims": (8, 8)}, "other settings than hidden_dims=(8, 8) (there [16, 16])"),
        ({"seed": 4, "n_end": 5.0}, "other settings than n_end=5.0 (there 3.0), seed=4 (there 0)"),
        ({"dataset_path": "other"}, "was trained on other data"),
        ({"workdir": "same"}, "is the run of --config.offline_checkpoint: choose another folder"),
        ({"broken": True}, "has no usable checkpoint"),
        ({"unfinished": True}, "has no usable checkpoint"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_gone_on_from_is_refused(
    offline, data, tmp_path, monkeypatch, overrides, words
):
    overrides = dict(overrides)
    workdir = str(tmp_path / "online")
    if overrides.pop("workdir", None):
        workdir = offline
    if overrides.get("dataset_path"):
        overrides["dataset_path"] = write_hdf5(tmp_path / "other.hdf5", **toy_columns(300, seed=1))
    folder = offline
    if overrides.pop("broken", None):
        folder = shutil.copytree(offline, tmp_path / "broken")
        for path, _, names in os.walk(folder / "checkpoint"):
            for name in names:
                open(os.path.join(path, name), "w").close()
    if overrides.pop("unfinished", None):
        folder = shutil.copytree(offline, tmp_path / "unfinished")
        shutil.rmtree(folder / "checkpoint")
    settings = {"offline_checkpoint": str(folder), "offline_steps": 20, "online_steps": 40}
    monkeypatch.setattr(ssar, "compile_online", lambda *_: pytest.fail("compiled"))
    before = sorted(os.listdir(offline))
    with pytest.raises(InputError) as error:
        ssar.main(tiny_config(data, **(settings | overrides)), workdir)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "online").exists()
    assert sorted(os.listdir(offline)) == before


def settings_of(*arguments):
    """The settings that the command line makes of its arguments."""
    code = "import sys; from common.cli import run; "
    code += "run(lambda config, workdir: print(config.to_json()), 'ssar_td3bc')"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_line_takes_the_settings_of_the_run_to_go_on_from(offline):
    flags = [f"--config.offline_checkpoint={offline}", "--config.online_steps=80"]
    with open(os.path.join(offline, "config.json")) as file:
        recorded = json.load(file)
    config = settings_of(*flags)
    given = {"offline_checkpoint": offline, "online_steps": 80}
    assert config == recorded | given
    assert config["task"] == "toy"
    # Settings chosen by a file are left as they are, to be compared.
    config = settings_of("--config=configs/ssar_td3bc.py:hopper-medium-v2", *flags)
    assert config["task"] == "hopper-medium-v2"
    assert config["online_steps"] == 80
