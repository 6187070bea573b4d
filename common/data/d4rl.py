"""D4RL's data sets by name: their files, environments and scores."""

import os
import re
from typing import NamedTuple

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
            url = f"{SERVER}/gym_mujoco_v2/{file}"
            yield Task(f"{robot}-{quality}-v2", file, url, env_id)
    for maze, (label, kinds) in ANTMAZE.items():
        for kind, (starts, goals) in kinds.items():
            file = f"Ant_maze_{label}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
            env_id = f"ssar-jax/AntMaze-{maze}-v2"
            url = f"{SERVER}/ant_maze_v2/{file}"
            yield Task(f"antmaze-{maze}{kind}-v2", file, url, env_id)


TASKS = {task.name: task for task in _tasks()}
FILES = {task.file: task for task in TASKS.values()}


def find_task(name: str, file: str | None) -> Task | None:
    """D4RL's data set of that name, or else the one whose file is named like `file`."""
    return TASKS.get(name) or FILES.get(os.path.basename(file or ""))


def reference_of(name: str) -> tuple[float, float] | None:
    """D4RL's (random, expert) return for a task, file or environment, by how its name starts."""
    name = os.path.basename(name).lower()
    if name.startswith(("antmaze-", "ant_maze_")):
        return (0.0, 1.0)
    return ROBOTS.get(re.split("[-_.]", name)[0], (None, None))[1]
