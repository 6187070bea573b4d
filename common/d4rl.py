"""D4RL's data sets by name: their files, where those are found or downloaded, and scores."""

from __future__ import annotations

import difflib
import os
import re
from typing import NamedTuple

from common.checks import InputError
from common.download import download, verify

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
D4RL_SERVER = "https://rail.eecs.berkeley.edu/datasets/offline_rl"
# A copy of the robots' files at one revision; of AntMaze's there is none.
MIRROR = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5"
)


class Task(NamedTuple):
    """One of D4RL's data sets, version 2."""

    name: str
    file: str  # as D4RL names it
    sources: tuple[str, ...]  # addresses, first choice first
    env_id: str
    reference: tuple[float, float]  # (random, expert) return


def _tasks():
    for robot, (env_id, reference) in ROBOTS.items():
        for quality in QUALITIES:
            file = f"{robot}_{quality.replace('-', '_')}-v2.hdf5"
            sources = (f"{D4RL_SERVER}/gym_mujoco_v2/{file}", f"{MIRROR}/{file}")
            yield Task(f"{robot}-{quality}-v2", file, sources, env_id, reference)
    for maze, (label, kinds) in ANTMAZE.items():
        for kind, (starts, goals) in kinds.items():
            file = f"Ant_maze_{label}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
            sources = (f"{D4RL_SERVER}/ant_maze_v2/{file}",)
            env_id = f"ssar-jax/AntMaze-{maze}-v2"
            yield Task(f"antmaze-{maze}{kind}-v2", file, sources, env_id, (0.0, 1.0))


TASKS = {task.name: task for task in _tasks()}
FILES = {task.file: task for task in TASKS.values()}


def find_task(name: str, file: str | None) -> Task | None:
    """The data set of D4RL that is meant: by its name, or by how D4RL calls the file.

    Raises InputError when the two are different ones.
    """
    named, filed = TASKS.get(name), FILES.get(os.path.basename(file or ""))
    if named and filed and named != filed:
        raise InputError(
            f"{file} is called as the file of {filed.name}, not of {named.name}: give that task's "
            "with --config.dataset_path=<file>, or choose the task that the file is of"
        )
    return named or filed


def suggest(name: str) -> str:
    """A task that `name` may be meant for, as a sentence's end; empty if there is none."""
    stem = name.rpartition("-v")[0] or name
    close = [] if "/" in name else difflib.get_close_matches(f"{stem}-v2", TASKS, 1, 0.8)
    return f"; D4RL's is called {close[0]}" if close else ""


def reference_of(name: str) -> tuple[float, float] | None:
    """D4RL's (random, expert) return of the robot, or AntMaze, whose name begins that of a file or
    environment."""
    name = os.path.basename(name).lower()
    if name.startswith(("antmaze-", "ant_maze_")):
        return (0.0, 1.0)
    _, reference = ROBOTS.get(re.split("[-_.]", name)[0], (None, None))
    return reference


def fetch(task: Task) -> str:
    """Path of the task's file, downloaded unless it is there.

    The folder is D4RL's own, D4RL_DATASET_DIR or ~/.d4rl/datasets. Raises InputError when the file
    is damaged or no source can be reached.
    """
    folder = os.environ.get("D4RL_DATASET_DIR") or os.path.expanduser("~/.d4rl/datasets")
    path = os.path.join(folder, task.file)
    if os.path.isfile(path):
        verify(path)
    else:
        download(task.sources, path)
    return path
