"""Compares the simulator with D4RL's: by the return of trained actors, and by recorded states.

    python benchmarks/physics.py actor.npz --env=Hopper-v4 [--episodes=100]

plays a trained actor under D4RL's physics and Gymnasium's. It is a Stable-Baselines3 SAC or TQC
actor of two hidden layers, as arrays named like its state_dict (actor.latent_pi.0.weight, ...), and
acts deterministically. Prints mean and standard deviation of the returns, the standard error of the
mean, and the mean length of an episode.

    python benchmarks/physics.py hopper_medium-v2.hdf5 [--env=Hopper-v4] [--rows=1000]

replays random rows of a file that recorded the simulator's states (infos/qpos, infos/qvel), each
for one step, and prints how far the simulator ends from the recorded successors.
"""

import argparse
import os
import sys
from typing import NamedTuple

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.data import d4rl
from common.data.dataset import Dataset, fit_normalizer
from common.envs.d4rl_physics import MODELS, d4rl_physics
from common.envs.make import env_spec, make_env, try_env
from common.evaluation import Evaluator
from common.run.errors import InputError


def load_actor(path):
    """act(_, observations [S, E, O]) -> actions [S, E, A] of the actor in an .npz file."""
    names = ("actor.latent_pi.0", "actor.latent_pi.2", "actor.mu")
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = [(file[f"{name}.weight"].T, file[f"{name}.bias"]) for name in names]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} holds no such actor ({error}): see --help") from None

    def act(_, x):
        for i, (kernel, bias) in enumerate(layers):
            x = x @ kernel + bias
            x = np.maximum(x, 0) if i < 2 else np.tanh(x)
        return x

    return act


def play(act, spec, episodes, seed=0):
    """Complete episodes, each from a start of its own: Episodes [1, E]."""
    _, widths, _ = try_env(spec, spec.id, ())
    observations, actions = (np.zeros((0, width), np.float32) for width in widths)
    none, identity = np.zeros(0), fit_normalizer(observations)
    columns = (observations, actions, none, observations, none, none)
    dataset = Dataset(*columns, env=spec, source=spec.id, normalizer=identity, fingerprint="")
    return Evaluator(dataset, num_seeds=1, episodes=episodes, seed=seed)(act, None)


class Replay(NamedTuple):
    """Rows replayed for one step: the largest error over the dimensions of each row."""

    observation: np.ndarray  # [K], before the step: 0 if state and row belong together
    next_observation: np.ndarray  # [K], after it
    reward: np.ndarray  # [K]


def read_states(path, spec, num_rows, seed=0):
    """Up to `num_rows` random rows with their successors, as a dict of arrays [K, ...].

    Rows that end an episode are left out. Raises InputError if the file has no such rows.
    """
    needed = ("infos/qpos", "infos/qvel", "observations", "actions", "rewards", "terminals")
    with h5py.File(path, "r") as file:
        missing = [key for key in needed if key not in file]
        if missing:
            raise InputError(f"{path} has no {missing[0]}: give a file that records it")
        ends = file["terminals"][()].astype(bool)
        if "timeouts" in file:
            ends |= file["timeouts"][()].astype(bool)
        rows = np.flatnonzero(~ends[:-1])
        if not len(rows) or num_rows < 1:
            raise InputError(f"{path}: no rows to replay: give --rows=1 or more, and more data")
        count = min(num_rows, len(rows))
        rows = np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
        found = {key: file[key][rows] for key in (*needed, "infos/goal") if key in file}
        is_stored = "next_observations" in file
        found["following"] = file["next_observations" if is_stored else "observations"][
            rows if is_stored else rows + 1
        ]
    return found


def replay(path, spec, num_rows=1000) -> Replay:
    """Sets the simulator to recorded states, takes one step from each, and compares."""
    env, found = make_env(spec), read_states(path, spec, num_rows)
    env.reset(seed=0)
    simulator, errors = env.unwrapped, []
    widths = found["infos/qpos"].shape[1], found["infos/qvel"].shape[1]
    if widths != (simulator.model.nq, simulator.model.nv):
        raise InputError(
            f"{path} has states of {widths} numbers, but {spec.id} "
            f"{(simulator.model.nq, simulator.model.nv)}: name its environment with --env=<id>"
        )
    for i, (qpos, qvel) in enumerate(zip(found["infos/qpos"], found["infos/qvel"], strict=True)):
        simulator.set_state(qpos.astype(float), qvel.astype(float))
        if "infos/goal" in found:
            simulator.goal = found["infos/goal"][i]
        start = simulator._get_obs()
        end, reward, *_ = simulator.step(found["actions"][i])
        pairs = (
            (start, found["observations"][i]),
            (end, found["following"][i]),
            (reward, found["rewards"][i]),
        )
        errors.append([np.abs(np.subtract(*pair)).max() for pair in pairs])
    env.close()
    return Replay(*np.array(errors).T)


def report(path, given):
    """Prints what a file's actor reaches, or how far its states are from the simulator's."""
    env_id, is_actor = given.env, path.endswith(".npz")
    if not is_actor and not env_id:
        with h5py.File(path, "r") as file:
            task = d4rl.FILES.get(os.path.basename(path))
            env_id = file.attrs.get("env_id") or (task.env_id if task else None)
    stock = env_spec(env_id, path)
    old = d4rl_physics(stock)
    if old is None:
        known = f"{', '.join(MODELS)} and AntMaze"
        raise InputError(f"{path} is of {stock.id}, but D4RL has models of {known} only")
    specs = {"d4rl": old} | ({"stock": stock} if stock.name in MODELS else {})
    print(f"{path} in {stock.id}")
    for physics, spec in specs.items():
        if is_actor:
            played = play(load_actor(path), spec, given.episodes)
            returns, length = played.returns[0], played.lengths.mean()
            error = returns.std() / len(returns) ** 0.5
            text = f"{returns.mean():.0f} ± {returns.std():.0f}, standard error {error:.1f}"
            print(f"  physics={physics}: {text}, length {length:.0f}")
        else:
            found = replay(path, spec, given.rows)
            texts = [
                f"{key} {np.median(error):.1e} (at most {error.max():.1e})"
                for key, error in found._asdict().items()
            ]
            print(f"  physics={physics}: {len(found.reward)} rows, error after one step, median of")
            print(f"    {', '.join(texts)}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="actors (.npz), or recordings (.hdf5)")
    parser.add_argument("--env", help="Gymnasium id; by default the recording's own")
    parser.add_argument("--episodes", type=int, default=100, help="of each actor")
    parser.add_argument("--rows", type=int, default=1000, help="of each recording, at most")
    given = parser.parse_args(arguments)
    try:
        for path in given.files:
            report(path, given)
    except (InputError, OSError) as error:
        sys.exit(f"physics: {error}".replace("--config.env", "--env"))


if __name__ == "__main__":
    main()
