"""The demos: Reacher episodes of scripted policies of mixed quality, as real Minari data sets.

`demo` has Reacher's own rewards. In `demo-sparse`, as in AntMaze, only success counts: reward 1
where the fingertip is within 5 cm of the target, which ends the episode, and else 0.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile

import gymnasium
import minari
import numpy as np
from minari.storage.datasets_root_dir import get_dataset_path

from common.checks import InputError
from common.dataset import wait_for

EPISODES = 600
SIZE = 2**24  # bytes that recording takes, at most
# Name: id of the data set, environment, returns between which scores are normalised.
DEMOS = {
    # Uniformly random torques, and where Gymnasium calls the task solved.
    "demo": ("ssar-jax/reacher/mixed-v0", "Reacher-v5", (-43.0, -3.75)),
    "demo-sparse": ("ssar-jax/reacher/sparse-v0", "ssar-jax/SparseReacher-v0", (0.0, 1.0)),
}
# Share of the episodes, gain towards the target, joint damping, torque noise. The first policy
# knows its way, the second is timid, the third shaky, and the fourth pulls away.
SKILLS = (
    (0.15, 8.0, 0.05, 0.2),
    (0.15, 1.0, 0.01, 0.2),
    (0.2, 8.0, 0.02, 0.5),
    (0.5, -3.0, 0.02, 0.3),
)
LINKS = (0.1, 0.11)  # metres


class SparseReacher(gymnasium.Wrapper):
    """Reacher with reward 1 and an end where the fingertip is within `radius` m of the target."""

    def __init__(self, radius: float = 0.05, **kwargs):
        super().__init__(gymnasium.make("Reacher-v5", max_episode_steps=-1, **kwargs))
        self.radius = radius

    def step(self, action):
        observation, _, _, _, info = super().step(action)
        reached = bool(np.linalg.norm(observation[8:10]) <= self.radius)
        return observation, float(reached), reached, False, info | {"success": reached}


gymnasium.register("ssar-jax/SparseReacher-v0", "common.demo:SparseReacher", max_episode_steps=50)


def torque(observation: np.ndarray, gain: float, damping: float) -> np.ndarray:
    """Jacobian-transpose control of the fingertip towards the target: [10] -> [2], unclipped."""
    cos1, cos2, sin1, sin2 = observation[:4]
    sin12, cos12 = sin1 * cos2 + cos1 * sin2, cos1 * cos2 - sin1 * sin2
    jacobian = np.array([
        [-LINKS[0] * sin1 - LINKS[1] * sin12, -LINKS[1] * sin12],
        [LINKS[0] * cos1 + LINKS[1] * cos12, LINKS[1] * cos12],
    ])  # fmt: skip
    towards = -observation[8:10]  # target minus fingertip
    return gain * jacobian.T @ towards - damping * observation[6:8]


def run_episode(env, rng, gain, damping, noise) -> float:
    """One episode of a scripted policy; returns its return."""
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    total, done = 0.0, False
    while not done:
        action = torque(observation, gain, damping) + noise * rng.standard_normal(2)
        observation, reward, terminated, truncated, _ = env.step(
            np.clip(action, -1, 1).astype(np.float32)
        )
        total, done = total + reward, terminated or truncated
    return total


def _check_room(folder):
    """Raises InputError unless a demo fits there: HDF5 would not survive a full disk."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
    except OSError as error:
        raise _unrecordable(folder, error.strerror) from None


def _unrecordable(folder, reason):
    return InputError(
        f"the demo cannot be recorded in {folder} ({reason}): make room, or name another folder by "
        "the environment variable MINARI_DATASETS_PATH"
    )


def demo_dataset_id(name: str) -> str:
    """A demo's Minari id; on first use, records it into the local root (MINARI_DATASETS_PATH).

    Of several processes that want it, one records it and the others wait. Raises InputError when
    there is no room.
    """
    dataset_id, root = DEMOS[name][0], get_dataset_path()
    if not _is_whole(dataset_id):
        _check_room(root)
        with _locked(root):
            if not _is_whole(dataset_id):
                shutil.rmtree(get_dataset_path(dataset_id), ignore_errors=True)  # of one killed
                _record(*DEMOS[name])
    return dataset_id


@contextlib.contextmanager
def _locked(root):
    try:
        lock = open(os.path.join(root, ".ssar-jax.lock"), "a")
        wait_for(lock, "records the demo")
    except OSError as error:
        raise _unrecordable(root, f"{error.strerror}: {error.filename or lock.name}") from None
    with lock:
        yield


def _is_whole(dataset_id):
    try:
        stored = minari.load_dataset(dataset_id)
    except Exception:  # whatever Minari makes of what a killed process has left
        return False
    return os.path.exists(os.path.join(stored.storage.data_path, "main_data.hdf5"))


def _record(dataset_id, env_id, reference):
    rng, (low, high) = np.random.default_rng(0), reference
    env = minari.DataCollector(gymnasium.make(env_id), record_infos=False)
    skills = rng.choice(len(SKILLS), size=EPISODES, p=[share for share, *_ in SKILLS])
    for skill in skills:
        run_episode(env, rng, *SKILLS[skill][1:])
    env.create_dataset(
        dataset_id=dataset_id,
        algorithm_name="scripted Jacobian-transpose control, four skill levels",
        description="Mixed-quality Reacher episodes for the first runs.",
        author="ssar-jax",
        author_email="none",
        code_permalink="common/demo.py",
        eval_env=env_id,
        ref_min_score=low,
        ref_max_score=high,
    )
    env.close()
