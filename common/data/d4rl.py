"""D4RL's data sets by name: their files, environments and scores."""

import os
from typing import NamedTuple

import numpy as np

from common.run.errors import explained
from common.run.workdir import absolute

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
# All of D4RL's files on Hugging Face. The pinned revision holds the robots' only.
MIRROR, PINNED = "imone/D4RL", "9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5"


class Task(NamedTuple):
    """One of D4RL's data sets, version 2."""

    name: str
    file: str  # D4RL's name for it
    revision: str  # of the mirror
    env_id: str


def _tasks():
    for robot, (env_id, _) in ROBOTS.items():
        for quality in QUALITIES:
            file = f"{robot}_{quality.replace('-', '_')}-v2.hdf5"
            yield Task(f"{robot}-{quality}-v2", file, PINNED, env_id)
    for maze, (label, kinds) in ANTMAZE.items():
        for kind, (starts, goals) in kinds.items():
            file = f"Ant_maze_{label}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
            yield Task(f"antmaze-{maze}{kind}-v2", file, "main", f"ssar-jax/AntMaze-{maze}-v2")


TASKS = {task.name: task for task in _tasks()}
FILES = {task.file: task for task in TASKS.values()}


def fetch(task: Task) -> str:
    """Path of the task's file in D4RL_DATASET_DIR or ~/.d4rl/datasets; see download."""
    folder = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    return download(MIRROR, task.revision, task.file, absolute(folder, "D4RL_DATASET_DIR"))


def download(mirror: str, revision: str, file: str, folder: str) -> str:
    """Path of a file in `folder`, downloaded from a data set on Hugging Face unless it is there.

    Raises InputError if the download fails.
    """
    path = os.path.join(folder, file)
    if os.path.isfile(path):
        return path
    print(f"downloading {file} into {folder}, once", flush=True)
    what = f"cannot download {file} from huggingface.co/datasets/{mirror} into {folder}"
    with explained(what, "try again, or give a file with --config.dataset_path=<file>"):
        from huggingface_hub import hf_hub_download, logging

        logging.set_verbosity_error()  # without its retries
        place = {"repo_type": "dataset", "revision": revision, "local_dir": folder}
        return hf_hub_download(mirror, file, **place)


def reference_of(metadata, env_id: str) -> tuple[float, float] | None:
    """(random, expert) return: the data set's own, or D4RL's for exactly that environment."""
    scores = [metadata.get("ref_min_score"), metadata.get("ref_max_score")]
    if None not in scores and -np.inf < float(scores[0]) < float(scores[1]) < np.inf:
        return float(scores[0]), float(scores[1])
    if env_id.startswith("ssar-jax/AntMaze-"):
        return (0.0, 1.0)
    return dict(ROBOTS.values()).get(env_id)
