"""Loading, episodes, returns, normalisation, against golden numbers and slow references."""

import json
import os
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from golden_cases import find_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import frozen, toy_columns, write_hdf5

import ssar_cql
import ssar_td3bc as ssar
from common import demo, loading
from common.checks import InputError
from common.d4rl import reference_of
from common.dataset import (
    Dataset,
    Fingerprint,
    best_episodes,
    cached_labels,
    episode_lengths,
    episode_returns,
    find_episode_ends,
    fit_normalizer,
)
from common.environments import observation_keys
from common.evaluation import Evaluator
from common.loading import load_dataset, select_rows

# ----------------------------------------------------------------------- the authors' helpers


@pytest.fixture(scope="module", params=find_cases("data_helpers"))
def helpers(request):
    with np.load(request.param, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def helper_ends(case, **overrides):
    columns = (case[f"dataset/{key}"] for key in ("observations", "next_observations", "terminals"))
    return find_episode_ends(*columns, **({"max_steps": int(case["max_steps"])} | overrides))


def test_trajectory_selection_matches_the_authors(helpers):
    rewards, ends = helpers["dataset/rewards"], helper_ends(helpers)
    for threshold in (2, 4, 100):
        expected = helpers[f"dense/ref_{threshold}/trusts"][: len(rewards)] > 0
        np.testing.assert_array_equal(ssar.select_by_return(rewards, ends, threshold), expected)
    raw = helpers["sparse/raw_rewards"]
    for script, scale, bias in (("td3", 1, -1), ("cql", 10, -5)):
        shifted = scale * raw + np.float32(bias)
        expected = helpers[f"sparse/{script}/trusts"][: len(raw)] > 0
        np.testing.assert_array_equal(ssar.select_by_success(shifted, ends, bias), expected)


def test_returns_match_the_authors(helpers):
    rewards, ends = helpers["dataset/rewards"], helper_ends(helpers)
    returns = episode_returns(rewards, ends)
    np.testing.assert_allclose(returns.mean(), helpers["avg_high_returns/none"], rtol=1e-6)
    np.testing.assert_allclose(
        returns[returns > 2].mean(), helpers["avg_high_returns/2"], rtol=1e-6
    )
    # their reward range splits on terminals and the time limit alone and drops the unfinished tail
    for limit in (8, 1000):
        ends = helper_ends(helpers, max_steps=limit, tolerance=np.inf)
        complete = episode_returns(rewards, ends)
        if not helpers["dataset/terminals"][-1] and episode_lengths(ends)[-1] < limit:
            complete = complete[:-1]
        low, high = helpers[f"reward_range/max{limit}"]
        np.testing.assert_allclose([complete.min(), complete.max()], [low, high], rtol=1e-6)


def reward_of(rewards, scale, bias):
    """What load_data makes of a file's rewards."""
    zeros = [np.zeros((len(rewards), 1), np.float32) for _ in range(3)]
    ends = np.ones(len(rewards), bool)
    dataset = Dataset(*zeros[:2], rewards, zeros[2], ends, ends, None, None, "")
    config = frozen(reward_scale=float(scale), reward_bias=float(bias))
    return np.asarray(ssar.load_data(dataset, config)[0].reward)


def test_reward_changes_match_the_authors(helpers):
    """Their scales and biases, as reward_scale and reward_bias of the config."""
    rewards = helpers["dataset/rewards"]
    low, high = helpers["reward_range/max8"]
    per_return = float(helpers["max_steps"] / (high - low))
    cases = {
        "td3/antmaze": (1, -1),
        "td3/hopper": (per_return, 0),
        "td3/pen": (1, 0),
        "cql/antmaze/scale1_bias0": (1, 0),
        "cql/antmaze/scale10_bias-5": (10, -5),
        "cql/hopper/scale1_bias0": (per_return, 0),
        "cql/hopper/scale10_bias-5": (10 * per_return, -5),
        "cql/pen/scale10_bias-5": (10, -5),
    }
    for name, (scale, bias) in cases.items():
        ours = reward_of(rewards, scale, bias)
        np.testing.assert_allclose(ours, helpers[f"modify_reward/{name}/rewards"], atol=2e-6)
        online = reward_of(np.full(len(rewards), 1.25, np.float32), scale, bias)
        expected = helpers[f"modify_reward/{name}/online_of_1.25"]
        np.testing.assert_allclose(online, expected, rtol=1e-6)


def test_normalisation_matches_the_authors(helpers):
    normalizer = fit_normalizer(helpers["dataset/observations"])
    np.testing.assert_allclose(normalizer.mean, helpers["normalize/mean"], atol=1e-6)
    np.testing.assert_allclose(normalizer.std, helpers["normalize/std"], atol=1e-6)
    np.testing.assert_allclose(
        normalizer(helpers["dataset/observations"]), helpers["normalize/observations"], atol=2e-5
    )


def test_best_episodes_match_the_authors(helpers):
    """Their 'part' start: no time limit, a coarser gap, no unfinished tail."""
    ends = helper_ends(helpers, max_steps=None, tolerance=1e-4)
    tail = episode_lengths(ends)[-1] if not helpers["dataset/terminals"][-1] else 0
    rows = len(ends) - tail
    for count in (1, 2, 3, 50):
        kept = best_episodes(helpers["dataset/rewards"][:rows], ends[:rows], count)
        np.testing.assert_array_equal(kept, helpers[f"part/nums_{count}/kept_rows_in_order"])


# ----------------------------------------------------------------------- slow references


@settings(max_examples=100, deadline=None)
@given(
    flags=st.lists(
        st.sampled_from(["", "", "", "terminal", "timeout", "gap"]), min_size=1, max_size=40
    ),
    max_steps=st.sampled_from([None, 1, 3, 5]),
)
def test_episodes_against_a_plain_loop(flags, max_steps):
    rows = len(flags)
    obs = np.arange(rows, dtype=np.float32)[:, None]
    next_obs = obs + 1
    next_obs[[flag == "gap" for flag in flags]] += 0.5
    terminals = np.array([flag == "terminal" for flag in flags])
    timeouts = np.array([flag == "timeout" for flag in flags])
    rewards = np.random.default_rng(rows).standard_normal(rows).astype(np.float32)

    episodes, current = [], []
    for i, flag in enumerate(flags):
        current.append(i)
        if flag or len(current) == max_steps or i == rows - 1:
            episodes.append(current)
            current = []

    ends = find_episode_ends(obs, next_obs, terminals, timeouts, max_steps)
    assert np.flatnonzero(ends).tolist() == [episode[-1] for episode in episodes]
    assert episode_lengths(ends).tolist() == [len(episode) for episode in episodes]
    np.testing.assert_allclose(
        episode_returns(rewards, ends), [rewards[e].sum(dtype=float) for e in episodes], atol=1e-6
    )
    kept = best_episodes(rewards, ends, 2)
    order = sorted(episodes, key=lambda e: -rewards[e].sum(dtype=float))[:2]
    assert kept.tolist() == [i for episode in order for i in episode]


EPISODES = st.lists(  # of quarters, whose sums are exact and often equal the threshold
    st.lists(st.integers(-4, 4), min_size=1, max_size=5), min_size=1, max_size=8
)


@pytest.mark.parametrize("script", [ssar, ssar_cql])
@settings(max_examples=100, deadline=None)
@given(episodes=EPISODES, threshold=st.integers(-8, 8), fail=st.integers(-2, 2))
def test_trusted_rows_against_a_plain_loop(script, episodes, threshold, fail):
    rewards = np.concatenate(episodes).astype(np.float32) / 4
    ends = np.concatenate([[False] * (len(episode) - 1) + [True] for episode in episodes])
    by_return, by_success = [], []
    for episode in episodes:
        total, last = 0, None
        for reward in episode:
            total, last = total + reward, reward
        by_return += [total > threshold for _ in episode]
        by_success += [last != fail for _ in episode]
    got = script.select_by_return(rewards, ends, threshold / 4)
    assert got.tolist() == by_return
    assert script.select_by_success(rewards, ends, fail / 4).tolist() == by_success


@settings(max_examples=60, deadline=None)
@given(
    flags=st.lists(st.sampled_from(["", "", "terminal", "timeout"]), min_size=1, max_size=30),
    max_steps=st.sampled_from([None, 1, 4]),
)
def test_rows_without_recorded_successors_against_a_plain_loop(flags, max_steps):
    """A row stays if the next one follows it in its episode, or if its task ended there."""
    columns = {
        "observations": np.arange(len(flags), dtype=np.float32)[:, None],
        "terminals": np.array([flag == "terminal" for flag in flags]),
        "timeouts": np.array([flag == "timeout" for flag in flags]),
    }
    limit = None if columns["timeouts"].any() else max_steps  # else they are the recording's
    expected, length = [], 0
    for i, flag in enumerate(flags):
        length += 1
        ended = flag != "" or length == limit or i == len(flags) - 1
        expected.append(flag == "terminal" or not ended)
        length = 0 if ended else length
    assert select_rows(columns, "all", max_steps)[1].tolist() == expected


def test_hdf5_with_successors_keeps_every_row(tmp_path):
    columns = toy_columns()
    path = write_hdf5(tmp_path / "toy.hdf5", **columns)
    data = load_dataset("toy", path, "ssar-test/Walk-v0")
    for name in ("observations", "actions", "rewards", "next_observations", "terminals"):
        np.testing.assert_array_equal(getattr(data, name), columns[name])
    np.testing.assert_array_equal(data.episode_ends, columns["terminals"] | columns["timeouts"])
    assert data.env.id == "ssar-test/Walk-v0"
    assert data.reference is None
    assert data.score(-3.0) == -3.0


def test_hdf5_without_successors_drops_rows_whose_successor_is_unknown(tmp_path):
    """Against D4RL's rule in a loop: the next row is the successor, time-outs have none."""
    columns = toy_columns()
    del columns["next_observations"]
    path = write_hdf5(tmp_path / "toy.hdf5", **columns)
    data = load_dataset("d4rl:" + path, env="ssar-test/Walk-v0")
    kept = [i for i in range(len(columns["rewards"])) if not columns["timeouts"][i]]
    np.testing.assert_array_equal(data.observations, columns["observations"][kept])
    for row, i in enumerate(kept):
        if not columns["terminals"][i]:
            np.testing.assert_array_equal(
                data.next_observations[row], columns["observations"][i + 1]
            )
    # an episode that lost its last row still ends where it did
    episode = np.cumsum(np.r_[0, (columns["terminals"] | columns["timeouts"])[:-1]])[kept]
    np.testing.assert_array_equal(data.episode_ends, np.r_[np.diff(episode) > 0, True])


def test_hdf5_without_timeouts_ends_episodes_at_the_step_limit(tmp_path):
    columns = toy_columns()
    ends = columns["terminals"] | columns["timeouts"]
    kept = ~ends | columns["terminals"]
    del columns["next_observations"], columns["timeouts"]
    data = load_dataset("toy", write_hdf5(tmp_path / "toy.hdf5", **columns), "ssar-test/Walk-v0")
    np.testing.assert_array_equal(data.observations, columns["observations"][kept])
    steps, next_steps = data.observations[:, 2], data.next_observations[:, 2]
    np.testing.assert_array_equal(next_steps[~data.terminals], steps[~data.terminals] + 1)


@pytest.mark.parametrize("successors", [True, False])
def test_loading_copies_no_large_column(tmp_path, successors):
    """The peak of what NumPy allocates, against the size of what is loaded."""
    rows, rng = 200_000, np.random.default_rng(0)
    columns = {
        "observations": rng.standard_normal((rows, 29)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 8)).astype(np.float32),
        "rewards": np.zeros(rows, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 100 == 99,
    }
    if successors:
        columns["next_observations"] = columns["observations"]
    path = write_hdf5(tmp_path / "large.hdf5", **columns)
    del columns
    config = frozen()
    tracemalloc.start()
    data = load_dataset("large", path, "ssar-test/Walk-v0")
    observations, following = data.observations, data.next_observations
    size = sum(x.nbytes for x in (observations, following, data.actions, data.rewards))
    assert tracemalloc.get_traced_memory()[1] < 1.7 * size
    tracemalloc.reset_peak()
    loaded, _, _ = ssar.load_data(data, config)
    assert tracemalloc.get_traced_memory()[1] < 1.2 * size
    tracemalloc.stop()
    # standardised where they lay
    np.testing.assert_array_equal(observations, loaded.obs)
    np.testing.assert_array_equal(following, loaded.next_obs)


def test_recorded_time_outs_count_for_more_than_the_step_limit(tmp_path):
    """Demonstrations may be longer than the environment allows now."""
    columns = toy_columns()
    columns["timeouts"] = np.zeros_like(columns["timeouts"])
    columns["terminals"] = np.zeros_like(columns["terminals"])
    columns["next_observations"][:-1] = columns["observations"][1:]
    columns["timeouts"][9::10] = True
    data = load_dataset("toy", write_hdf5(tmp_path / "toy.hdf5", **columns), "ssar-test/Walk-v0")
    assert data.env.max_episode_steps == 7
    assert set(episode_lengths(data.episode_ends)[:-1]) == {10}


def d4rl_loop(columns, max_steps):
    """D4RL's qlearning_dataset by its description: row by row, without vectors."""
    view, step = [], 0
    timeouts = columns.get("timeouts")
    for i in range(len(columns["rewards"]) - 1):
        if step == max_steps - 1 if timeouts is None else timeouts[i]:
            step = 0  # the row is left out, even one that is terminal
            continue
        row = (columns["observations"][i], columns["actions"][i], columns["rewards"][i])
        view.append((*row, columns["observations"][i + 1], columns["terminals"][i]))
        step = 1 if columns["terminals"][i] else step + 1  # from 1: D4RL's own off-by-one
    return [np.array(column) for column in zip(*view, strict=True)]


@pytest.mark.parametrize("stored", ["timeouts", "next_observations", "both", "neither"])
def test_qlearning_rows_are_d4rls(tmp_path, stored):
    columns = toy_columns(400)
    for key in ("timeouts", "next_observations"):
        if stored not in (key, "both"):
            del columns[key]
    if stored == "both":
        columns["timeouts"][np.flatnonzero(columns["terminals"])[3]] = True  # ended by both
    path = write_hdf5(tmp_path / "toy.hdf5", **columns)
    data = load_dataset("toy", path, "ssar-test/Walk-v0", rows="qlearning")
    expected = d4rl_loop(columns, max_steps=7)
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    for name, column in zip(names, expected, strict=True):
        ours = getattr(data, name)
        assert ours.dtype == column.dtype
        np.testing.assert_array_equal(ours, column, err_msg=name)
    # episodes end where they were recorded to, so none lies across a reset
    clock = data.observations[:, 2]
    np.testing.assert_array_equal(data.episode_ends[:-1], np.diff(clock) < 1)
    if stored != "neither":
        assert len(data.rewards) < len(columns["rewards"]) - 1  # some rows were left out


def test_columns_of_other_types_and_shapes_are_read_as_d4rl_does(tmp_path):
    """Doubles, integers for flags, and one column where a row of numbers is meant."""
    columns = toy_columns(100)
    expected = load_dataset("toy", write_hdf5(tmp_path / "a.hdf5", **columns), "ssar-test/Walk-v0")
    columns = {key: column.astype(np.float64) for key, column in columns.items()}
    columns["terminals"] = columns["terminals"].astype(np.uint8)[:, None]
    columns["rewards"] = columns["rewards"][:, None]
    data = load_dataset("toy", write_hdf5(tmp_path / "b.hdf5", **columns), "ssar-test/Walk-v0")
    for name in ("observations", "actions", "rewards", "terminals", "episode_ends"):
        assert getattr(data, name).dtype == getattr(expected, name).dtype
        np.testing.assert_array_equal(getattr(data, name), getattr(expected, name))


def test_metadata_of_the_file_name_environment_and_reference(tmp_path):
    path = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(60))
    with h5py.File(path, "a") as file:
        file.attrs.update(env_id="ssar-test/Walk-v0", env_kwargs='{"x": 1}')
        file.attrs.update(ref_min_score=-10.0, ref_max_score=10.0)
    data = load_dataset("d4rl:" + path)
    assert data.env.id == "ssar-test/Walk-v0"
    assert data.env.kwargs == {"x": 1}
    assert data.score(0.0) == 50
    assert load_dataset("d4rl:" + path, env="ssar-test/One-v0").env.kwargs == {}
    assert gymnasium.spec("ssar-test/Walk-v0").kwargs == {}


def test_antmaze_scores_are_success_rates(tmp_path):
    path = write_hdf5(tmp_path / "Ant_maze.hdf5", **toy_columns(60))
    data = load_dataset("antmaze-umaze-v2", path, "ssar-test/Walk-v0")
    assert data.score(0.25) == 25


def test_environment_and_scores_follow_the_file_name(tmp_path):
    columns = toy_columns()
    columns["observations"] = np.zeros((len(columns["rewards"]), 11), np.float32)
    columns["next_observations"] = columns["observations"]
    columns["actions"] = np.zeros((len(columns["rewards"]), 3), np.float32)
    data = load_dataset("d4rl:" + write_hdf5(tmp_path / "hopper_medium-v2.hdf5", **columns))
    assert data.env.id == "Hopper-v4"
    assert data.score(3234.3) == pytest.approx(100)
    assert data.score(-20.272305) == pytest.approx(0)


def fingerprint(*arrays):
    made = Fingerprint()
    for array in arrays:
        assert made.add(array) is array
    return made.text()


def test_references_are_by_the_robots_whole_name():
    hopper = (-20.272305, 3234.3)
    for name in ("Hopper", "hopper_own.hdf5", "/data/hopper-x-v0.hdf5"):
        assert reference_of(name) == hopper
    for name in ("AntMaze-umaze", "Ant_maze_old.hdf5"):
        assert reference_of(name) == (0, 1)
    for name in ("Hopperlike", "AntMaze_UMazeDense", "Ant", "mine.hdf5"):
        assert reference_of(name) is None


def test_fingerprint_sees_every_bit():
    a, b = np.arange(5.0), np.arange(6.0)
    changed = a.copy()
    changed[-1] = np.nextafter(changed[-1], 9)
    prints = {fingerprint(*x) for x in ([a], [b], [a, b], [changed], [a.astype(np.float32)])}
    assert len(prints) == 5
    assert fingerprint(a) == fingerprint(a.copy())


def test_labels_are_cached_and_a_broken_file_is_made_again(tmp_path):
    calls = []

    def make(_):
        calls.append(1)
        return np.array([True, False])

    for _ in range(2):
        labels = cached_labels(str(tmp_path / "new"), ["abc", "tau", 0.7], (2,), make)
        np.testing.assert_array_equal(labels, [True, False])
    assert len(calls) == 1
    (file,) = (tmp_path / "new").glob("*.npz")
    written = file.read_bytes()
    at = written.index(b"\x01\x00", written.index(b"\n"))  # the labels, after NumPy's header
    flipped = written[:at] + b"\x00" + written[at + 1 :]
    at = written.index(b"PK\x01\x02") + 10  # how the archive is compressed
    other_compression = written[:at] + b"\x63" + written[at + 1 :]
    for broken in (written[:-1], written[:50], b"", flipped, other_compression):
        file.write_bytes(broken)
        np.testing.assert_array_equal(
            cached_labels(str(tmp_path / "new"), ["abc", "tau", 0.7], (2,), make), [True, False]
        )
    assert len(calls) == 6
    cached_labels(str(tmp_path / "new"), ["abc", "tau", 0.5], (2,), make)
    assert len(calls) == 7
    fail = mock.Mock(side_effect=RuntimeError)
    with pytest.raises(RuntimeError):
        cached_labels(str(tmp_path / "new"), ["other"], (2,), fail)
    left = [name for name in os.listdir(tmp_path / "new") if not name.endswith(".lock")]
    assert len(left) == 2  # nothing unfinished


def test_labels_that_cannot_be_kept_are_announced_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def make(folder):
        assert folder is None
        assert "labels are not kept, for --config.cache_dir=" in capsys.readouterr().err
        return np.array([True])

    assert cached_labels(str(tmp_path / "file"), ["abc"], (2,), make)


def test_labels_without_room_are_used_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(np, "savez", mock.Mock(side_effect=OSError(28, "No space left on device")))
    assert cached_labels(str(tmp_path), ["abc"], (1,), lambda folder: np.array([True]))
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "abc.npz")


# ----------------------------------------------------------------------- Minari


def test_demo_is_a_real_minari_data_set():
    demo = load_dataset("demo")
    assert demo.observations.shape[1] == 10
    stored = minari.load_dataset("ssar-jax/reacher/mixed-v0")
    episodes = list(stored.iterate_episodes())
    assert len(demo.rewards) == sum(len(episode.rewards) for episode in episodes)
    assert len(demo.returns) == len(episodes)
    np.testing.assert_allclose(
        demo.returns, [episode.rewards.sum() for episode in episodes], rtol=1e-5
    )
    recorded = episodes[0].observations.astype(np.float32)
    rows = len(recorded) - 1
    np.testing.assert_array_equal(demo.observations[:rows], recorded[:-1])
    np.testing.assert_array_equal(demo.next_observations[:rows], recorded[1:])
    assert not demo.terminals.any()  # Reacher ends by time alone
    assert 0 < demo.score(demo.returns).mean() < 90
    assert demo.env.id == "Reacher-v5"
    again = load_dataset("demo")
    assert fingerprint(again.observations) == fingerprint(demo.observations)


def record_goals(name, env_id="ssar-test/Goal-v0", episodes=4, **metadata):
    """A Minari data set of an environment with dictionary observations."""
    env = minari.DataCollector(gymnasium.make(env_id))
    for seed in range(episodes):
        env.reset(seed=seed)
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(np.full(2, 0.1, np.float32))
            done = terminated or truncated
    env.create_dataset(name, algorithm_name="none", author="t", author_email="t",
                       code_permalink="t", eval_env=env_id, description="t",
                       **metadata)  # fmt: skip
    return name


def test_dictionary_observations_are_flattened_as_the_evaluation_does():
    data = load_dataset(record_goals("ssar-test/goal-v0"))
    assert data.observations.shape[1] == 4
    assert data.terminals.sum() + (data.episode_ends & ~data.terminals).sum() == 4
    evaluator = Evaluator(data, num_seeds=1, episodes=1, seed=0)
    seen = []
    act = lambda params, obs: seen.append(obs) or np.zeros((1, 1, 2), np.float32)
    evaluator(act, None, fit_normalizer(data.observations, enabled=False))
    # alphabetical: the clock (steps, 1) before the position
    length = episode_lengths(data.episode_ends)[0]
    np.testing.assert_array_equal(data.observations[:length, 0], np.arange(length))
    assert [float(obs[0, 0, 0]) for obs in seen] == list(range(len(seen)))


def change_metadata(changes):
    return lambda folder, metadata: metadata.update(changes)


def change_spec(**changes):
    def change(folder, metadata):
        metadata["eval_env_spec"] = json.dumps(json.loads(metadata["eval_env_spec"]) | changes)

    return change


def cut_short(folder, metadata):
    with open(folder / "main_data.hdf5", "r+b") as file:
        file.truncate(1500)


def in_episode(change):
    def changed(folder, metadata):
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            change(file["episode_1"])

    return changed


def leads_out(episode):
    del episode["rewards"]
    episode["rewards"] = h5py.ExternalLink("/etc/hosts.hdf5", "rewards")


def lies_out(episode):
    rows = len(episode["rewards"])
    del episode["rewards"]
    episode.create_dataset("rewards", (rows,), np.float32, external=[("/etc/passwd", 0, 4 * rows)])


def lacks_rewards(episode):
    del episode["rewards"]


def lacks_a_reward(episode):
    rewards = episode["rewards"][:-1]
    del episode["rewards"]
    episode["rewards"] = rewards


SHELL = {"name": "shell", "entry_point": "subprocess:getoutput", "kwargs": {"cmd": "touch x"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_spec(id="os:Goal-v0"), "asks for code or files of its own, .* os:Goal-v0: give --"),
        (
            change_spec(additional_wrappers=[SHELL]),
            "of its own, .*Goal-v0, with shell: give --conf",
        ),
        (change_spec(kwargs={"a": [{"b": "/etc/passwd"}]}), "asks for code or files of its own"),
        (change_spec(id="Nowhere-v0"), "unknown environment 'Nowhere-v0'"),
        (
            change_spec(id=3, kwargs="a"),
            "does not tell its environment in a way that can be|broken",
        ),
        (change_metadata({"eval_env_spec": "{"}), "is broken .JSONDecodeError: "),
        (
            change_metadata({"ref_min_score": "low", "ref_max_score": 1.0}),
            "is broken .ValueError: ",
        ),
        (change_metadata({"ref_min_score": 1.0, "ref_max_score": 1.0}), "1.0 is to be below 1.0"),
        (cut_short, "is broken .*: mend it, or delete it"),
        (in_episode(lacks_rewards), "is broken .*rewards.*: mend it, or delete it"),
        (in_episode(lacks_a_reward), "is broken .*: mend it, or delete it"),
        (in_episode(leads_out), "'episode_1/rewards' lies in another file"),
        (in_episode(lies_out), "'episode_1/rewards' lies in another file"),
    ],
)
def test_a_minari_data_set_that_is_broken_or_sly_is_refused(change, words, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    record_goals("ssar-test/bad-v0")
    folder = tmp_path / "ssar-test" / "bad-v0" / "data"
    with open(folder / "metadata.json") as file:
        metadata = json.load(file)
    change(folder, metadata)
    with open(folder / "metadata.json", "w") as file:
        json.dump(metadata, file)
    with pytest.raises(InputError, match=words) as error:
        load_dataset("ssar-test/bad-v0", cache_dir=str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_code_that_a_minari_data_set_names_is_not_run(tmp_path, monkeypatch):
    """The environment is the one that is registered here; Gymnasium's own wrappers stay."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    record_goals("ssar-test/sly-v0")
    path = tmp_path / "ssar-test" / "sly-v0" / "data" / "metadata.json"
    with open(path) as file:
        metadata = json.load(file)
    clip = {"name": "ClipReward", "entry_point": "gymnasium.wrappers.transform_reward:ClipReward"}
    spec = json.loads(metadata["eval_env_spec"])
    spec |= {"entry_point": "subprocess:getoutput", "max_episode_steps": 3}
    spec |= {"additional_wrappers": [clip | {"kwargs": {"max_reward": 0.5}}]}
    with open(path, "w") as file:
        json.dump(metadata | {"eval_env_spec": json.dumps(spec)}, file)
    data = load_dataset("ssar-test/sly-v0", cache_dir=str(tmp_path))
    assert data.env.entry_point == gymnasium.spec("ssar-test/Goal-v0").entry_point
    assert data.env.max_episode_steps == 3
    env = gymnasium.make(data.env)
    assert isinstance(env, gymnasium.wrappers.ClipReward)


def test_keys_of_observations_may_be_chosen():
    data = load_dataset(record_goals("ssar-test/keys-v0"), keys=("position",))
    every = load_dataset("ssar-test/keys-v0")
    np.testing.assert_array_equal(data.observations, every.observations[:, 2:])
    turned = load_dataset("ssar-test/keys-v0", keys=("position", "clock"))
    np.testing.assert_array_equal(turned.observations, every.observations[:, [2, 3, 0, 1]])
    seen = []
    act = lambda params, obs: seen.append(obs) or np.zeros((1, 1, 2), np.float32)
    identity = fit_normalizer(turned.observations, enabled=False)
    Evaluator(turned, num_seeds=1, episodes=1, seed=0)(act, None, identity)
    assert [float(obs[0, 0, 2]) for obs in seen] == list(range(len(seen)))
    data.observation_keys = ("place",)
    with pytest.raises(InputError, match="names 'place', .*: choose from clock, position"):
        Evaluator(data, num_seeds=1, episodes=1, seed=0)
    with pytest.raises(InputError, match="'clok', .* of ssar-test/keys-v0: choose from clock, pos"):
        load_dataset("ssar-test/keys-v0", keys=("clok",))
    data.observation_keys = ("position", "position")
    with pytest.raises(InputError, match="position,position names a key twice"):
        Evaluator(data, num_seeds=1, episodes=1, seed=0)
    data.observation_keys = ("position", "clock")
    with pytest.raises(InputError, match="2 dimensions but ssar-test/Goal-v0 has 4 .position, clo"):
        Evaluator(data, num_seeds=1, episodes=1, seed=0)


def test_goal_environments_are_joined_as_their_data():
    """Where not all keys fit: a goal at the end stays the same in an episode, velocities do not."""
    box = lambda width: gymnasium.spaces.Box(-1, 1, (width,))
    goals = gymnasium.spaces.Dict(achieved_goal=box(2), desired_goal=box(2), observation=box(5))
    everything = ("achieved_goal", "desired_goal", "observation")
    goal_last, goal_first = ("observation", "desired_goal"), ("achieved_goal", "observation")
    ends = np.array([False, False, True, True])

    def keys_of(space, width, moving_last):
        observations = np.arange(4 * width, dtype=np.float32).reshape(4, width)
        if not moving_last:
            observations[:3, -2:] = 7
        data = Dataset(observations, observations, None, None, None, ends, mock.Mock(), None, "")
        return observation_keys(space, data)

    assert keys_of(goals, 9, moving_last=False) == everything
    assert keys_of(goals, 7, moving_last=False) == goal_last
    assert keys_of(goals, 7, moving_last=True) == goal_first
    assert keys_of(goals, 3, moving_last=False) == everything  # and then refused for its width
    assert keys_of(box(4), 4, moving_last=False) is None


def test_minari_episodes_are_kept_flat(tmp_path, monkeypatch, capsys):
    """So that they are read one by one once alone, until the data change."""
    name, cache = record_goals("ssar-test/flat-v0"), {"cache_dir": str(tmp_path / "cache")}
    joined = mock.Mock(side_effect=loading._join_episodes)
    monkeypatch.setattr(loading, "_join_episodes", joined)
    first = load_dataset(name, **cache)
    second = load_dataset(name, **cache)
    assert joined.call_count == 1
    for column in ("observations", "actions", "rewards", "next_observations", "terminals"):
        np.testing.assert_array_equal(getattr(first, column), getattr(second, column))
    np.testing.assert_array_equal(first.episode_ends, second.episode_ends)
    load_dataset(name, keys=("clock",), **cache)
    assert joined.call_count == 2
    number = first.observations[1].tobytes()  # no zeros, which the file holds elsewhere too
    for damaged in (
        lambda copy: copy[:100],
        lambda copy: copy.replace(number, b"?" * len(number)),
    ):
        for flat in (tmp_path / "cache" / "minari").iterdir():
            flat.write_bytes(damaged(flat.read_bytes()))
        again = load_dataset(name, **cache)  # made again
        np.testing.assert_array_equal(again.observations, first.observations)
    assert joined.call_count == 4
    shutil.rmtree(os.path.join(os.environ["MINARI_DATASETS_PATH"], name))
    longer = load_dataset(record_goals(name, episodes=6), **cache)
    assert joined.call_count == 5
    assert len(longer.returns) == 6
    (tmp_path / "file").write_text("")
    load_dataset(name, cache_dir=str(tmp_path / "file"))
    assert "warning: no flat copy is kept in" in capsys.readouterr().err


def test_minari_sets_are_downloaded_when_asked_for(monkeypatch, tmp_path):
    """By their id, or by a remote's address."""
    name = record_goals("ssar-test/remote-v0")
    home = os.path.join(os.environ["MINARI_DATASETS_PATH"], name)
    shutil.move(home, tmp_path / "remote")
    asked = []

    def download(dataset_id):
        asked.append(dataset_id)
        shutil.copytree(tmp_path / "remote", home)

    monkeypatch.setattr(minari, "download_dataset", download)
    for address in (name, name, f"hf://somewhere/{name}"):
        assert len(load_dataset(address).returns) == 4
    assert asked == [name]
    shutil.rmtree(home)
    assert len(load_dataset(f"hf://somewhere/{name}").returns) == 4
    assert asked == [name, f"hf://somewhere/{name}"]


def test_scores_are_on_d4rls_scale_where_minari_has_references():
    """100 is the reference's best return, not 1; raw returns where there is none."""
    record_goals("ssar-test/scored-v0", ref_min_score=-20.0, ref_max_score=-10.0)
    scored = load_dataset("ssar-test/scored-v0")
    assert scored.score(-15.0) == pytest.approx(50)
    stored = minari.load_dataset("ssar-test/scored-v0")
    assert scored.score(-12.0) == pytest.approx(100 * minari.get_normalized_score(stored, -12.0))
    raw = load_dataset(record_goals("ssar-test/raw-v0"))
    assert raw.reference is None
    assert raw.score(-15.0) == -15.0


def test_several_that_want_the_demo_record_it_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(demo, "EPISODES", 3)
    record = mock.Mock(side_effect=demo._record)
    monkeypatch.setattr(demo, "_record", record)
    all_miss_it = threading.Barrier(3)
    monkeypatch.setattr(demo, "_check_room", lambda _: all_miss_it.wait(60))
    with ThreadPoolExecutor(3) as pool:
        ids = list(pool.map(demo.demo_dataset_id, ["demo"] * 3))
    assert len(set(ids)) == 1 and record.call_count == 1
    assert capsys.readouterr().err.count("waits for the process that records the demo") == 2
    assert minari.load_dataset(ids[0]).total_episodes == 3
    assert list(minari.list_local_datasets()) == [ids[0]]


def test_a_demo_that_cannot_be_locked_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / ".ssar-jax.lock").mkdir()
    with pytest.raises(InputError, match="cannot be recorded in .*Is a directory: .*lock.: make"):
        demo.demo_dataset_id("demo")


@pytest.mark.parametrize("missing", [["metadata.json"], ["main_data.hdf5"], None])
def test_a_demo_whose_recording_was_killed_is_recorded_again(missing, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(demo, "EPISODES", 3)
    folder = Path(minari.load_dataset(demo.demo_dataset_id("demo")).storage.data_path)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in missing or whole:
        (folder / name).unlink()
    demo.demo_dataset_id("demo")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_the_sparse_demo_rewards_success_alone():
    demo = load_dataset("demo-sparse", sparse=True)
    assert demo.observations.shape[1] == 10
    assert set(np.unique(demo.rewards)) == {0, 1}
    np.testing.assert_array_equal(demo.rewards == 1, demo.terminals)
    assert 20 < demo.score(demo.returns).mean() < 40
    lengths = episode_lengths(demo.episode_ends)
    assert (lengths[demo.returns == 0] == 50).all()
    assert demo.env.id == "ssar-jax/SparseReacher-v0"


# ----------------------------------------------------------------------- what cannot be used


def spoil(name):
    columns = toy_columns(60)
    if name == "no rewards":
        del columns["rewards"]
    elif name == "short actions":
        columns["actions"] = columns["actions"][:-1]
    elif name == "nan":
        columns["observations"][7, 1] = np.nan
    elif name == "infinite reward":
        columns["rewards"][3] = np.inf
    elif name == "loud action":
        columns["actions"][9, 0] = 1.5
    elif name == "flat observations":
        columns["observations"] = columns["observations"][:, 0]
    elif name == "empty":
        columns = {key: column[:0] for key, column in columns.items()}
    elif name == "two rewards":
        columns["rewards"] = np.stack([columns["rewards"]] * 2, axis=1)
    elif name == "scalar reward":
        columns["rewards"] = np.float32(1)
    elif name == "group":
        columns["actions"] = None
    elif name == "nan terminal":
        columns["terminals"] = np.where(columns["terminals"], np.nan, 0)
    elif name == "narrow successors":
        columns["next_observations"] = columns["next_observations"][:, :2]
    elif name == "text":
        columns["actions"] = np.full(columns["actions"].shape, b"left")
    return columns


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no rewards", ["no key 'rewards'", "needs observations, actions, rewards and terminals"]),
        ("short actions", ["'actions' has", "'observations' has", "one row a transition"]),
        ("nan", ["'observations' is not finite in float32 at row 7", "remove"]),
        ("infinite reward", ["'rewards' is not finite in float32 at row 3"]),
        ("loud action", ["'actions' reaches 1.5 at row 9", "clip"]),
        ("flat observations", ["'observations' has type", "rows by dimensions"]),
        ("empty", ["'observations' is empty"]),
        ("two rewards", ["'rewards' has type", "one a row"]),
        ("text", ["'actions' has type", "numbers"]),
        ("scalar reward", ["'rewards' has type", "one a row"]),
        ("group", ["no key 'actions'"]),
        ("nan terminal", ["'terminals' is not finite"]),
        ("narrow successors", ["'next_observations' has shape", "same dimensions"]),
    ],
)
def test_bad_columns_are_named(tmp_path, name, words):
    path = write_hdf5(tmp_path / "bad.hdf5", **spoil(name))
    with pytest.raises(InputError) as error:
        load_dataset("toy", path, "ssar-test/Walk-v0")
    message = str(error.value)
    assert message.startswith(path)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_bad_sources_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", mock.Mock(side_effect=OSError("no route")))
    text = tmp_path / "page.hdf5"
    text.write_text("<html>")
    good = write_hdf5(tmp_path / "good.hdf5", **toy_columns(60))
    walk = write_hdf5(tmp_path / "walk.hdf5", **toy_columns(60))
    with h5py.File(walk, "a") as file:
        file.attrs["env_id"] = "ssar-test/Walk-v0"
    cases = [
        (("d4rl:/no/such.hdf5", None, "ssar-test/Walk-v0"), ["no file /no/such.hdf5"]),
        (("toy", str(text), "ssar-test/Walk-v0"), [str(text), "not a readable HDF5 file"]),
        (("toy", good, None), [good, "--config.env="]),
        (("toy", good, "Hoper-v4"), ["unknown environment 'Hoper-v4'", "--config.env="]),
        (
            ("toy", good, "no_module:Walk-v0"),
            ["unknown environment 'no_module:Walk-v0'", "<module>"],
        ),
        (("mujoco/none-v0",), ["no Minari data set 'mujoco/none-v0'", "(no route)", "minari list"]),
        (("hopper-medium-v0",), ["'hopper-medium-v0'", "(not asked)", "called hopper-medium-v2"]),
        (("hopper-medium",), ["no Minari data set", "D4RL's is called hopper-medium-v2"]),
        (("antmaze-umaze-v2", "/x/hopper_medium-v2.hdf5"), ["the file of hopper-medium-v2, not"]),
        (("own/hopper_medium.hdf5",), ["no file own/hopper_medium.hdf5"]),
        (("d4rl:",), ["no file :"]),
        (("d4rl:a.hdf5", "b.hdf5"), ["two files are given", "--config.dataset_path=b.hdf5"]),
        (
            ("hopper-medium-v2", walk),
            [f"{walk} is of ssar-test/Walk-v0", "but hopper-medium-v2 of"],
        ),
        ((None,), ["no data set", "--config.dataset="]),
        (("not an id",), ["no Minari data set 'not an id'"]),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError) as error:
            load_dataset(*arguments)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"env_kwargs": "{"}, "attribute 'env_kwargs' is '{'"),
        ({"env_kwargs": "[1]"}, "attribute 'env_kwargs' is '[1]'"),
        ({"ref_min_score": "low", "ref_max_score": 1}, "attribute 'ref_min_score'"),
        ({"env_id": np.bytes_("Walk-v9")}, "unknown environment 'Walk-v9'"),
        ({"env_kwargs": '{"wind": 3}'}, "cannot make environment ssar-test/Walk-v0"),
    ],
)
def test_bad_metadata_are_named(tmp_path, attributes, words):
    path = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(60))
    with h5py.File(path, "a") as file:
        file.attrs.update({"env_id": "ssar-test/Walk-v0"} | attributes)
    with pytest.raises(InputError) as error:
        Evaluator(load_dataset("d4rl:" + path), num_seeds=1, episodes=1, seed=0)
    assert words in str(error.value)


def test_a_file_may_be_named_without_a_prefix(tmp_path, monkeypatch):
    """And is the one that is read, though it is called like one in the cache."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    columns = toy_columns(60)
    (tmp_path / "cache").mkdir()
    write_hdf5(tmp_path / "cache" / "hopper_medium-v2.hdf5", **columns)
    recorded = columns["rewards"].copy()
    columns["rewards"] += 5
    own = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", **columns)
    for name in (own, f"d4rl:{own}"):
        data = load_dataset(name, env="ssar-test/Walk-v0")
        np.testing.assert_array_equal(data.rewards, columns["rewards"])
    data = load_dataset("d4rl:hopper-medium-v2", env="ssar-test/Walk-v0")
    np.testing.assert_array_equal(data.rewards, recorded)


def test_an_environment_may_name_the_module_that_registers_it(tmp_path):
    path = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(60))
    assert load_dataset("toy", path, "toys:ssar-test/Walk-v0").env.id == "ssar-test/Walk-v0"
