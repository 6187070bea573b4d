"""Records play data in OGBench's layout, with the scripted oracles of the package ogbench.

    python -m common.data.ogbench record cube-single --steps=300000

A point mass walks through a maze, or an arm moves cubes and presses buttons, from one random goal
to the next.
"""

import argparse
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import gymnasium
import numpy as np
from tqdm import trange

from common.run.errors import InputError, explained
from common.run.workdir import write_file


def record(env_name: str, steps: int, seed: int) -> dict:
    """Play data in OGBench's layout, trajectories of 1,000 transitions: arrays by key.

    steps: transitions, rounded up to whole trajectories. Raises InputError for an environment that
    has no oracle.
    """
    with explained("recording needs the package ogbench", "pip install ogbench"):
        importlib.import_module("ogbench")
    has_oracle = re.match("pointmaze-|cube-|puzzle-", env_name)
    if not has_oracle or f"{env_name}-v0" not in gymnasium.registry:
        fix = "choose a pointmaze, a cube or a puzzle, such as cube-single"
        raise InputError(f"there is no oracle for {env_name}: {fix}")
    is_maze, rng, rows = env_name.startswith("pointmaze"), np.random.default_rng(seed), {}
    np.random.seed(seed)  # the package draws from it
    options = {"terminate_at_goal": False, "max_episode_steps": 1001}
    options |= {} if is_maze else {"mode": "data_collection"}
    env = gymnasium.make(f"{env_name}-v0", **options)
    for _ in trange(-(-steps // 1000), desc=f"recording {env_name}", unit="trajectory"):
        (obs, info), ended = env.reset(seed=int(rng.integers(2**31))), False
        choose = (walker if is_maze else planner)(env.unwrapped, rng)
        while not ended:
            action = np.clip(choose(obs, info), -1, 1).astype(np.float32)
            row = {"observations": obs, "actions": action}
            obs, _, _, ended, info = env.step(action)
            row |= {"terminals": ended, "qpos": info["prev_qpos"], "qvel": info["prev_qvel"]}
            if "prev_button_states" in info:
                row["button_states"] = info["prev_button_states"]
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
    env.close()
    kinds = {"terminals": bool, "button_states": np.int64}
    return {key: np.array(x, kinds.get(key, np.float32)) for key, x in rows.items()}


def walker(env, rng):
    """Walks from cell to cell with OGBench's noise of 0.5, and from goal to random goal."""
    cells = np.argwhere(env.maze_map == 0)

    def choose(obs, info):
        if info.get("success", 1):
            env.set_goal(goal_ij=tuple(rng.choice(cells)))
        way = env.get_oracle_subgoal(obs[:2], env.cur_goal_xy)[0] - obs[:2]
        return way / (np.linalg.norm(way) + 1e-6) + 0.5 * rng.standard_normal(2)

    return choose


def planner(env, rng):
    """Follows OGBench's plans with its noise of 0.1, from one random target to the next."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan

    button = button_plan.ButtonPlanOracle(env=env, gripper_always_closed=True)
    oracles, oracle = {"cube": cube_plan.CubePlanOracle(env=env), "button": button}, None

    def choose(obs, info):
        nonlocal oracle
        if oracle is None or oracle.done:
            if oracle:
                obs, info = env.set_new_target(p_stack=rng.uniform(0, 0.3))
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(obs, info)
        return oracle.select_action(obs, info)

    return choose


def main() -> None:
    """Records a data set, and prints how to train on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record"])
    parser.add_argument("env", help="such as cube-single, puzzle-3x3 or pointmaze-medium")
    parser.add_argument("--steps", type=int, default=300_000, help="transitions (300000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the .npz file to write, by default recorded/<env>.npz")
    args = parser.parse_args()
    if args.steps < 1 or not 0 <= args.seed < 2**32:
        parser.error("--steps must be at least 1, and --seed from 0 to 4294967295")
    path = Path((args.out or f"recorded/{args.env}").removesuffix(".npz") + ".npz").absolute()
    try:
        if path.exists():
            raise InputError(f"{path} exists: remove it, or give another file with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(content := io.BytesIO(), **record(args.env, args.steps, args.seed))
        write_file(str(path), content.getvalue())
    except (InputError, OSError) as error:
        sys.exit(f"ogbench: {error}")
    except KeyboardInterrupt:
        sys.exit("ogbench: stopped, and nothing was recorded")
    kind = "navigate" if "maze" in args.env else "play"
    print(f"-> {path}\nTo train on it:")
    print("python ssar_td3bc.py --config=configs/ssar_td3bc.py:ogbench", end=" ")
    print(f"--config.dataset=ogbench:{args.env}-{kind}-singletask-v0", end=" ")
    print(f"--config.dataset_path={shlex.quote(str(path))}")
