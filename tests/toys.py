"""Small data, settings and environments that tests can reason about."""

import importlib
import os
from functools import cache

import gymnasium
import h5py
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

OBS, ACTION = 4, 2


class Walk(gymnasium.Env):
    """Two coordinates to drive to zero. Reward -|x|; success is one unit away or less."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (ACTION,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-3, 3, ACTION)
        self.lifetime = self.np_random.integers(3, 9)  # the task ends at its own time
        self.steps = 0
        return self._observation(), {}

    def _observation(self):
        return np.r_[self.x, self.steps, 1].astype(np.float32)

    def step(self, action):
        self.x = self.x + 0.5 * np.asarray(action, float)
        self.steps += 1
        distance = np.abs(self.x).sum()
        ended = self.steps >= self.lifetime
        return self._observation(), -distance, ended, False, {"success": bool(distance <= 1)}


class Goal(Walk):
    """Walk with dictionary observations, of which two parts are discrete."""

    observation_space = gymnasium.spaces.Dict(
        position=gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        one=gymnasium.spaces.MultiBinary(1),
        clock=gymnasium.spaces.Discrete(9),
    )

    def _observation(self):
        position = self.x.astype(np.float32)
        return {"position": position, "one": np.ones(1, np.int8), "clock": self.steps}


for name in ("Walk", "Goal"):
    gymnasium.register(f"ssar-test/{name}-v0", f"{__name__}:{name}", max_episode_steps=7)


def record(env, episodes, act, **extra):
    """Columns in D4RL's layout, from episodes of act(observation, episode's number).

    extra: more columns, each a function of the environment before the step.
    """
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    columns = {name: [] for name in (*names, *extra)}
    for episode in range(episodes):
        obs, done = env.reset(seed=episode)[0], False
        while not done:
            more = [look(env.unwrapped) for look in extra.values()]
            action = act(obs, episode).astype(np.float32)
            next_obs, reward, terminal, timeout, _ = env.step(action)
            done = terminal or timeout
            row = (obs, action, reward, next_obs, terminal, timeout and not terminal, *more)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            obs = next_obs
    kind = {"terminals": bool, "timeouts": bool}
    return {name: np.array(x, kind.get(name, np.float32)) for name, x in columns.items()}


@cache
def _walks(episodes, seed):
    rng = np.random.default_rng(seed)
    skills = rng.uniform(-0.5, 1, episodes)
    noisy = lambda obs, i: np.clip(-skills[i] * obs[:2] + 0.3 * rng.standard_normal(2), -1, 1)
    return record(gymnasium.make("ssar-test/Walk-v0"), episodes, noisy)


def toy_columns(rows=600, seed=0):
    """At least `rows` rows, in whole episodes, of controllers of Walk, in D4RL's columns."""
    columns = _walks(rows // 3 + 1, seed)  # an episode has at least 3 rows
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"])
    stop = ends[ends >= rows - 1][0] + 1
    return {name: column[:stop].copy() for name, column in columns.items()}


def write_hdf5(path, attributes=(), **columns):
    """A file in D4RL's layout; returns its path as text. A column of None leads nowhere."""
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column if column is not None else h5py.SoftLink("/nowhere")
        file.attrs.update(attributes)
    return str(path)


def tiny_config(path=None, script="ssar_td3bc", **overrides):
    """Settings that train in a second."""
    config = importlib.import_module(f"configs.{script}").get_config()
    config.update(
        task="toy",
        dataset="toy",
        env="ssar-test/Walk-v0",
        offline_steps=60,
        eval_interval=20,
        eval_episodes=3,
        batch_size=32,
        hidden_dims=(16, 16),
        coefficient_hidden_dims=(16, 16, 16),
        selection="return",
        return_threshold=-20.0,
        update_period=10,
        coefficient_lr=1e-3,
        iql_steps=40,
        warmup_steps=10,
        decay_steps=60,
        updates_per_call=20,
        cache_dir=os.path.join(os.environ["SSAR_TEST_SCRATCH"], "cache"),
    )
    if script == "ssar_cql":
        config.update(hidden_dims=(16, 16, 16), num_sampled_actions=3, block_size=8)
    if path:
        config.dataset_path = str(path)
    config.update(overrides)
    return config


def write_settings(path, *data, **settings):
    """A settings file that gives tiny_config(*data, **settings); returns its path."""
    call = f"tiny_config(*{data!r}, **{settings!r})"
    path.write_text(f"from toys import tiny_config\nget_config = lambda task=None: {call}\n")
    return path


def frozen(**overrides):
    return ml_collections.FrozenConfigDict(tiny_config(**overrides))


def arrays(tree):
    """Leaves as NumPy arrays, PRNG keys included."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(x)) for x in jax.tree.leaves(tree)]


def same_bits(a, b):
    """Whether two trees hold the same arrays, bit for bit."""
    pairs = zip(arrays(a), arrays(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)
