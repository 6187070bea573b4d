"""D4RL's data sets by name: their files, environments and scores."""

from typing import NamedTuple

import numpy as np

# Robots: the Gymnasium task of the same rewards, and D4RL's random and expert returns, between
# which score = 100 (return - random) / (expert - random).
ROBOTS = {
    "halfcheetah": ("HalfCheetah-v4", (-280.178953, 12135.0)),
    "hopper": ("Hopper-v4", (-20.272305, 3234.3)),
    "walker2d": ("Walker2d-v4", (1.629008, 4592.3)),
}
QUALITIES = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
# Mazes: name in D4RL's files, and for each data set whether starts and goals vary.
ANTMAZE = {
    "umaze": ("u-maze", {"": (False, False), "-diverse": (True, True)}),
    "medium": ("big-maze", {"-play": (True, False), "-diverse": (True, True)}),
    "large": ("hardest-maze", {"-play": (True, False), "-diverse": (True, True)}),
}
SERVER = "https://rail.eecs.berkeley.edu/datasets/offline_rl"


class Task(NamedTuple):
    """One of D4RL's data sets, version 2."""

    name: str
    file: str  # D4RL's name for it
    url: str
    env_id: str


def _tasks():
    for robot, (env_id, _) in ROBOTS.items():
        for quality in QUALITIES:
            file = f"{robot}_{quality.replace('-', '_')}-v2.hdf5"
            yield Task(f"{robot}-{quality}-v2", file, f"{SERVER}/gym_mujoco_v2/{file}", env_id)
    for maze, (label, kinds) in ANTMAZE.items():
        for kind, (starts, goals) in kinds.items():
            file = f"Ant_maze_{label}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
            name, env_id = f"antmaze-{maze}{kind}-v2", f"ssar-jax/AntMaze-{maze}-v2"
            yield Task(name, file, f"{SERVER}/ant_maze_v2/{file}", env_id)


TASKS = {task.name: task for task in _tasks()}
FILES = {task.file: task for task in TASKS.values()}


def reference_of(metadata, env_name: str) -> tuple[float, float] | None:
    """(random, expert) return: the data set's own, or D4RL's for that environment, if any."""
    scores = [metadata.get("ref_min_score"), metadata.get("ref_max_score")]
    if None not in scores and -np.inf < float(scores[0]) < float(scores[1]) < np.inf:
        return float(scores[0]), float(scores[1])
    if env_name.startswith("AntMaze-"):
        return (0.0, 1.0)
    return ROBOTS.get(env_name.lower(), (None, None))[1]
