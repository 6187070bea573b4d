"""The demos: Reacher episodes of scripted controllers of mixed quality, as real Minari data sets.

`demo` has Reacher's own rewards. In `demo-sparse`, as in AntMaze, only success counts.
"""

import contextlib
import shutil
import sys

import filelock
import gymnasium
import minari
import numpy as np
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

from common.envs.make import env_spec

EPISODES = 600
# Name: id of the data set, environment, returns between which scores are normalised.
DEMOS = {
    # Uniformly random torques, and where Gymnasium calls the task solved.
    "demo": ("ssar-jax/reacher/mixed-v0", "Reacher-v5", (-43.0, -3.75)),
    "demo-sparse": ("ssar-jax/reacher/sparse-v0", "ssar-jax/SparseReacher-v0", (0.0, 1.0)),
}
# Share of the episodes, gain towards the target, joint damping, torque noise. The first controller
# knows its way, the second is timid, the third shaky, and the fourth pulls away.
SKILLS = (
    (0.15, 8.0, 0.05, 0.2),
    (0.15, 1.0, 0.01, 0.2),
    (0.2, 8.0, 0.02, 0.5),
    (0.5, -3.0, 0.02, 0.3),
)
LINKS = (0.1, 0.11)  # metres


class SparseReacher(gymnasium.Wrapper):
    """Reacher with reward 1 and an end where the fingertip is near the target; 0 elsewhere."""

    def __init__(self, **kwargs):
        super().__init__(gymnasium.make("Reacher-v5", max_episode_steps=-1, **kwargs))

    def step(self, action):
        observation, _, _, _, info = super().step(action)
        reached = bool(np.linalg.norm(observation[8:10]) <= 0.05)  # metres
        return observation, float(reached), reached, False, info | {"success": reached}


gymnasium.register("ssar-jax/SparseReacher-v0", f"{__name__}:SparseReacher", max_episode_steps=50)


def demo_dataset_id(name: str) -> str:
    """A demo's Minari id; on first use, one process records it and the others wait."""
    dataset_id = DEMOS[name][0]
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # some file systems have no locks
            held.enter_context(filelock.FileLock(get_dataset_path(".ssar-jax.lock")))
        with contextlib.suppress(Exception):  # Minari raises many kinds for what a kill has left
            if minari.load_dataset(dataset_id).total_episodes > 0:
                return dataset_id
        shutil.rmtree(get_dataset_path(dataset_id), ignore_errors=True)
        _record(*DEMOS[name], held)
    return dataset_id


def _record(dataset_id, env_id, reference, held):
    rng = np.random.default_rng(0)
    env = minari.DataCollector(gymnasium.make(env_spec(env_id, dataset_id)), record_infos=False)
    held.callback(env.close)  # which deletes what is not yet a data set
    skills = rng.choice(len(SKILLS), size=EPISODES, p=[share for share, *_ in SKILLS])
    pause = 0.5 if sys.stderr.isatty() else 30
    for skill in tqdm(skills, f"recording {dataset_id}, once", unit="episode", mininterval=pause):
        _, gain, damping, noise = SKILLS[skill]
        observation, _ = env.reset(seed=int(rng.integers(2**31)))
        terminated = truncated = False
        while not (terminated or truncated):
            action = _torque(observation, gain, damping) + noise * rng.standard_normal(2)
            action = np.clip(action, -1, 1).astype(np.float32)
            observation, _, terminated, truncated, _ = env.step(action)
    env.create_dataset(
        dataset_id=dataset_id,
        algorithm_name="scripted Jacobian-transpose control, four skill levels",
        description="Mixed-quality Reacher episodes for the first runs.",
        author="ssar-jax",
        author_email="none",
        code_permalink="common/data/demo.py",
        eval_env=env_id,
        ref_min_score=reference[0],
        ref_max_score=reference[1],
    )


def _torque(observation: np.ndarray, gain: float, damping: float) -> np.ndarray:
    """Jacobian-transpose control of the fingertip towards the target: [10] -> [2], unclipped."""
    cos1, cos2, sin1, sin2 = observation[:4]
    lower = LINKS[1] * np.array([-sin1 * cos2 - cos1 * sin2, cos1 * cos2 - sin1 * sin2])
    upper = LINKS[0] * np.array([-sin1, cos1]) + lower
    towards = -observation[8:10]  # target minus fingertip
    return gain * np.array([upper, lower]) @ towards - damping * observation[6:8]
