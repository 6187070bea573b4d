"""The demo: Reacher episodes of scripted policies of mixed quality, as a real Minari data set."""

from __future__ import annotations

import gymnasium
import minari
import numpy as np

DATASET_ID = "ssar-jax/reacher/mixed-v0"
ENV_ID = "Reacher-v5"
EPISODES = 600
# Share of the episodes, gain towards the target, joint damping, torque noise. The first policy
# knows its way, the second is timid, the third shaky, and the fourth pulls away.
SKILLS = (
    (0.15, 8.0, 0.05, 0.2),
    (0.15, 1.0, 0.01, 0.2),
    (0.2, 8.0, 0.02, 0.5),
    (0.5, -3.0, 0.02, 0.3),
)
LINKS = (0.1, 0.11)  # metres


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


def demo_dataset_id() -> str:
    """The demo's id; on first use, records it into Minari's local root (MINARI_DATASETS_PATH)."""
    if DATASET_ID in minari.list_local_datasets():
        return DATASET_ID
    rng = np.random.default_rng(0)
    env = minari.DataCollector(gymnasium.make(ENV_ID), record_infos=False)
    skills = rng.choice(len(SKILLS), size=EPISODES, p=[share for share, *_ in SKILLS])
    for skill in skills:
        run_episode(env, rng, *SKILLS[skill][1:])
    env.create_dataset(
        dataset_id=DATASET_ID,
        algorithm_name="scripted Jacobian-transpose control, four skill levels",
        description="Mixed-quality Reacher episodes for the default run.",
        author="ssar-jax",
        author_email="none",
        code_permalink="common/demo.py",
        eval_env=ENV_ID,
        ref_min_score=-43.0,  # uniformly random torques
        ref_max_score=-3.75,  # where Gymnasium calls the task solved
    )
    env.close()
    return DATASET_ID
