"""Plays a trained actor under D4RL's physics and Gymnasium's: does it reach its published return?

    python benchmarks/physics.py actor.npz --env=Hopper-v4 [--episodes=100]

The actor is a Stable-Baselines3 SAC or TQC policy of two hidden layers, as arrays by the names of
its state_dict (actor.latent_pi.0.weight, ...); it acts deterministically. Prints mean and standard
deviation of the returns, the mean's standard error, and the mean length of an episode.
"""

import argparse
import os
import sys

import gymnasium
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.dataset import Dataset
from common.environments import env_spec
from common.evaluation import Evaluator
from common.physics import d4rl_physics


def load_actor(path):
    """act(_, observations [S, E, O]) -> actions [S, E, A] of the actor in an .npz file."""
    names = ("actor.latent_pi.0", "actor.latent_pi.2", "actor.mu")
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = [(file[f"{name}.weight"].T, file[f"{name}.bias"]) for name in names]
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"physics: {path} is no such actor ({error}): see --help")

    def act(_, x):
        for i, (kernel, bias) in enumerate(layers):
            x = x @ kernel + bias
            x = np.maximum(x, 0) if i < 2 else np.tanh(x)
        return x

    return act


def play(act, spec, episodes, seed=0):
    """Complete episodes, each from a start of its own: Episodes [1, E]."""
    spaces = gymnasium.make(spec)
    widths = (spaces.observation_space.shape[0], spaces.action_space.shape[0])
    observations, actions = (np.zeros((0, width), np.float32) for width in widths)
    none = np.zeros(0)
    data = Dataset(observations, actions, none, observations, none, none, spec, None, spec.id)
    evaluate = Evaluator(data, num_seeds=1, episodes=episodes, seed=seed)
    return evaluate(act, None, lambda observations: observations)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("actor")
    parser.add_argument("--env", required=True)
    parser.add_argument("--episodes", type=int, default=100)
    given = parser.parse_args()
    act, stock = load_actor(given.actor), env_spec(given.env, given.actor)
    for name, spec in (("d4rl", d4rl_physics(stock)), ("stock", stock)):
        played = play(act, spec, given.episodes)
        returns = played.returns[0]
        print(
            f"{given.env} physics={name}: {returns.mean():.0f} ± {returns.std():.0f}, standard "
            f"error {returns.std() / len(returns) ** 0.5:.1f}, length {played.lengths.mean():.0f}"
        )
