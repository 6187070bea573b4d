"""From offline to online: environments, ring, batches, one step, and going on from a checkpoint."""

import dataclasses
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
from hypothesis import given, settings
from hypothesis import strategies as st
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
from common.checks import InputError, check_config
from common.dataset import Normalizer
from common.evaluation import Collector, Evaluator
from common.loading import load_dataset

IDENTITY = Normalizer(np.zeros(OBS, np.float32), np.ones(OBS, np.float32))
STARTS = ("all", "half", "part", "none")
sample = jax.jit(ssar.sample_batch, static_argnames="config")


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
    walk = dataclasses.replace(walk, env=spec)
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


@pytest.mark.parametrize("script", [ssar, ssar_cql])
@settings(max_examples=25, deadline=None)
@given(capacity=st.sampled_from([1, 2, 5]), stores=st.integers(1, 14))
def test_the_ring_against_a_plain_list(script, capacity, stores):
    """Of every seed the newest rows, whole, each once; and batches draw from these alone."""
    config = frozen(
        script=script.__name__, online_steps=20, num_seeds=2, buffer_capacity=capacity,
        buffer_init="none",
    )  # fmt: skip
    buffer, kept = script.init_buffer(tagged(range(3)), config), []
    empty = jax.tree.map(lambda x: jnp.asarray(x[:0]), tagged(range(3)))
    for t in range(stores):
        buffer = script.store(buffer, tagged([100 + t, 200 + t]))
        kept = [*kept, t][-capacity:]
        assert int(buffer.added) == t + 1
        for i, base in enumerate((100, 200)):
            for column in buffer.rows:
                values = np.asarray(column[i, : len(kept)]).reshape(len(kept), -1)
                assert sorted(values[:, 0]) == [base + k for k in kept]
                assert (values == values[:, :1]).all()
    for i, base in enumerate((100, 200)):
        rows = jax.tree.map(lambda x, i=i: x[i], buffer.rows)
        batch = sample(jax.random.key(stores), empty, rows, buffer.added, config)
        assert set(np.asarray(batch.reward)) <= {base + k for k in kept}


@pytest.mark.parametrize("buffer_init", STARTS)
def test_batches_hold_offline_and_stored_rows_as_the_start_says(buffer_init):
    """Before the buffer is full and after: the right rows, whole, and all equally often."""
    config = frozen(buffer_init=buffer_init, online_steps=6, batch_size=700)
    data = tagged(range(8))
    data = data._replace(trusted=np.zeros((1, 8), np.float32))
    ends = np.array([0, 1, 0, 0, 1, 0, 0, 1], bool)
    offline = ssar.offline_rows(jax.tree.map(jnp.asarray, data), ends, config)
    old = [] if buffer_init == "none" else list(range(8))  # part: three episodes, all of them
    assert sorted(np.asarray(offline.reward).tolist()) == old
    buffer = ssar.init_buffer(data, config)
    sample = jax.jit(partial(ssar.sample_batch, config=config))
    for t in range(20):
        buffer = ssar.store(buffer, tagged([100 + t])._replace(trusted=np.ones(1, np.float32)))
        if t not in (0, 3, 5, 6, 19):
            continue
        new = [100 + k for k in range(max(0, t - 5), t + 1)]
        one_seed = jax.tree.map(lambda x: x[0], buffer.rows)
        offline_seed = offline._replace(trusted=offline.trusted[0])
        batch = sample(jax.random.key(t), offline_seed, one_seed, buffer.added)
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


def step_arguments(script, config):
    """State, empty buffer, offline rows, a transition of every seed, and the programs of a step."""
    seeds = range(config.num_seeds)
    state = toy_states(config, seeds, script)
    data = toy_batch(rows=50)
    data = data._replace(trusted=jnp.stack([data.trusted for _ in seeds]))
    data = script.offline_rows(data, np.arange(50) % 5 == 4, config)
    transition = jax.tree.map(lambda x: np.asarray(x[: len(seeds)]), toy_batch(trusted=np.ones(32)))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    buffer = script.init_buffer(data, config)
    return state, buffer, data, transition, script.compile_online(state, buffer, data, keys, config)


@pytest.mark.parametrize(
    ("script", "seeds"), [(ssar, 2), pytest.param(ssar_cql, 1, marks=pytest.mark.slow)]
)
def test_a_large_buffer_stays_in_place(script, seeds):
    """It is written where it lies, and nothing copies it, however large and for several seeds."""
    config = frozen(
        script=script.__name__, online_steps=300_000, buffer_init="all", num_seeds=seeds
    )
    state, buffer, data, transition, programs = step_arguments(script, config)
    _, collect, learn, totals = programs
    size = sum(x.nbytes for x in jax.tree.leaves(buffer.rows)) / seeds
    assert collect.memory_analysis().alias_size_in_bytes >= size * seeds
    kind = {"update_actor": True} if script is ssar else {}
    update = script.online_step.lower(state, totals, buffer, data, config, **kind).compile()
    for program in (collect, update):
        assert program.memory_analysis().temp_size_in_bytes < size / 4
    place = buffer.rows.obs.unsafe_buffer_pointer()
    for _ in range(2):
        buffer = collect(buffer, transition)
    assert buffer.rows.obs.unsafe_buffer_pointer() == place
    before = state
    state, totals = learn(1, state, totals, buffer, data)
    assert all(x.is_deleted() for x in jax.tree.leaves(before.critic))
    np.testing.assert_array_equal(
        buffer.rows.obs[:, :2], np.repeat(transition.obs[:, None], 2, axis=1)
    )
    assert not np.asarray(buffer.rows.obs[:, 2:]).any()
    assert int(buffer.added) == 2
    assert state.online_step.tolist() == [1] * seeds


def test_a_step_is_update_step_on_a_batch_of_what_is_stored():
    """With nothing but one row to draw from, every batch is known."""
    config = frozen(buffer_init="none", online_steps=4, policy_noise=0.0, new_policy_freq=3)
    state, buffer, data, transition, (_, collect, learn, totals) = step_arguments(ssar, config)
    buffer = collect(buffer, transition)
    batch = jax.tree.map(lambda x: jnp.repeat(x, config.batch_size, axis=0), transition)
    start = one(state)
    noise = ssar.sample_noise(jax.random.key(0), batch, config)
    expected, info = jax.jit(
        partial(ssar.update_step, config=config, update_actor=True, online=True)
    )(start, batch, noise)
    assert float(info["anneal"]) == pytest.approx(1 - 1 / config.decay_steps)  # N starts at 1
    state, totals = learn(3, state, totals, buffer, data)
    learned = one(state)._replace(key=start.key)
    for a, b in zip(arrays(learned), arrays(expected._replace(key=start.key)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert set(totals) == set(info)
    for name in info:
        np.testing.assert_allclose(totals[name][0][0], info[name], rtol=1e-4, atol=1e-6)
    # Without its turn, the actor and all targets stand still, and their metrics count nothing.
    before = jax.tree.map(jnp.copy, state)
    for step in (4, 5):
        state, totals = learn(step, state, totals, buffer, data)
    for still in ("actor", "target_actor", "target_critic"):
        assert same_bits(getattr(before, still), getattr(state, still))
    assert not same_bits(before.critic, state.critic)
    assert (totals["critic_loss"][1], totals["actor_loss"][1]) == (3, 1)
    # A reward that is not finite shows in the update that meets it, and in those after it.
    assert not any(broke.any() for _, _, broke in totals.values())
    rows = buffer.rows._replace(reward=buffer.rows.reward.at[0, 0].set(jnp.inf))
    for step in (6, 7):
        state, totals = learn(step, state, totals, buffer._replace(rows=rows), data)
    assert (totals["critic_loss"][2][0], totals["actor_loss"][2][0]) == (4, 4)
    assert ssar.broken_parts(state)["critic"].all()


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
    with open(tmp_path / "run" / "timing.json") as file:
        timing = json.load(file)
    assert timing["updates_per_second"] == timing["env_steps_per_second"]
    with open(tmp_path / "run" / "results.json") as file:
        assert json.load(file) == results


@pytest.mark.slow
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
        ({"script": ssar_cql}, "is a run of another script, with expl_noise, exploration_noise, "),
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
    script = overrides.pop("script", ssar)
    monkeypatch.setattr(script, "compile_online", lambda *_: pytest.fail("compiled"))
    before = sorted(os.listdir(offline))
    with pytest.raises(InputError) as error:
        script.main(tiny_config(data, script.__name__, **(settings | overrides)), workdir)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "online").exists()
    assert sorted(os.listdir(offline)) == before


def test_only_online_steps_need_fit_the_interval_of_an_online_run(offline, data):
    config = tiny_config(data, offline_steps=20, online_steps=66, eval_interval=33)
    with pytest.raises(InputError, match="eval_interval=33 must be a multiple of"):
        check_config(config)
    config.offline_checkpoint = offline
    check_config(config)


def settings_of(*arguments, script="ssar_td3bc"):
    """The settings that the command line makes of its arguments."""
    code = "import sys; from common.cli import run; "
    code += f"run(lambda config, *_: print(config.to_json()), '{script}')"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_line_takes_the_settings_of_the_run_to_go_on_from(offline, tmp_path):
    flags = [f"--config.offline_checkpoint={offline}", "--config.online_steps=80"]
    with open(os.path.join(offline, "config.json")) as file:
        recorded = json.load(file)
    config = settings_of(*flags)
    given = {"offline_checkpoint": offline, "online_steps": 80}
    assert config == recorded | given
    assert config["task"] == "toy"
    # A field of two names, given by either of them, is given.
    folder = tmp_path / "cql"
    folder.mkdir()
    recorded = tiny_config(script="ssar_cql").to_dict() | {"clip_diff_min": None}
    (folder / "config.json").write_text(json.dumps(recorded))
    for name in ("cql_alpha", "coefficient_init"):
        arguments = [f"--config.offline_checkpoint={folder}", f"--config.{name}=5.0"]
        config = settings_of(*arguments, script="ssar_cql")
        assert (config["cql_alpha"], config["coefficient_init"]) == (5.0, 5.0)
        assert config["task"] == "toy"
    # Settings chosen by a file are left as they are, to be compared.
    config = settings_of("--config=configs/ssar_td3bc.py:hopper-medium-v2", *flags)
    assert config["task"] == "hopper-medium-v2"
    assert config["online_steps"] == 80
