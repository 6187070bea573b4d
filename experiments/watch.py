"""Films the policy of a finished run, from the starts of its evaluations.

    pip install imageio imageio-ffmpeg
    python experiments/watch.py runs/ssar_td3bc/demo/0 --episodes=3

It needs no screen: MuJoCo draws with EGL or OSMesa, or with what MUJOCO_GL names.
"""

import argparse
import copy
import dataclasses
import importlib
import json
import os
import sys
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.run import InputError  # noqa: E402
from common.run.checkpoint import load_checkpoint  # noqa: E402
from common.run.workdir import load_settings  # noqa: E402

FIX = "install EGL or OSMesa (libegl1 or libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"


def load_environment(settings: dict, data: dict):
    """The run's Dataset; without rows where the environment's id is enough, or the data are gone.

    data: what results.json says about them. Raises InputError.
    """
    from common.data import load_dataset

    if data["physics"] != "d4rl" and not settings["env"]:
        try:
            return load_dataset(SimpleNamespace(**settings))
        except InputError as error:
            print(f"warning: uses {data['env']} as registered, because {error}", file=sys.stderr)
    settings |= {"dataset": None, "dataset_path": None}
    settings |= {"env": settings["env"] or data["env"], "physics": data["physics"]}
    return load_dataset(SimpleNamespace(**settings))


def draw(env) -> np.ndarray:
    """The current frame, [height, width, 3]. Raises InputError if there is none."""
    try:
        frame, reason = np.asarray(env.render()), "it has no rgb_array"
    except Exception as error:  # a renderer can raise anything
        frame, reason = np.zeros(0), " ".join(str(error).split())[:200]
    if frame.ndim != 3:
        fix = (
            FIX if hasattr(env.unwrapped, "mujoco_renderer") else "install what its renderer needs"
        )
        raise InputError(f"{env.spec.id} cannot be drawn ({reason}): {fix}")
    return frame


def watch(folder: Path, out: Path, seed: int | None = None, episodes: int = 1) -> None:
    """Writes the video of one seed, by default the first. Raises InputError or OSError."""
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401  imageio writes mp4 with it
        import mujoco  # noqa: F401  fails here if it cannot draw
    except ModuleNotFoundError as error:
        raise InputError(f"{error}: pip install imageio imageio-ffmpeg") from None
    except Exception as error:  # of PyOpenGL, all kinds
        backend = os.environ.get("MUJOCO_GL")
        raise InputError(f"MUJOCO_GL={backend} does not work ({error}): {FIX}") from None
    from common.data.dataset import Normalizer
    from common.evaluation import Evaluator

    saved = load_checkpoint(str(folder))
    settings = load_settings(str(folder))
    results = json.loads((folder / "results.json").read_text())
    name, seeds = results["algorithm"], results["seeds"]
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise InputError(f"--seed={seed} is not in {folder}: choose one of {seeds}")
    if not (ROOT / f"{name}.py").exists():
        raise InputError(f"{folder} was trained by {name}.py, which is missing: restore it")
    actor_params = jax.tree.map(lambda x: x[seeds.index(seed)], saved["state"]["actor"])
    act = jax.jit(importlib.import_module(name).act)
    defaults = importlib.import_module(f"configs.{name}").get_config().to_dict()
    dataset = load_environment(defaults | settings, results["data"])
    spec = copy.deepcopy(dataset.env)
    spec.kwargs["render_mode"] = "rgb_array"
    normalizer = Normalizer(**saved["normalizer"])
    dataset = dataclasses.replace(dataset, env=spec, normalizer=normalizer)
    evaluate = Evaluator(dataset, num_seeds=1, episodes=1, seed=seed)
    (slot,), (first,) = evaluate.slots, evaluate.seeds
    fps = slot.env.metadata.get("render_fps", 30)
    with imageio.get_writer(out, format="FFMPEG", fps=fps, macro_block_size=2) as video:

        def play(params, observations):
            video.append_data(draw(slot.env))
            return act(params, observations[0])

        for episode in range(episodes):
            evaluate.seeds = [first + episode]
            played = evaluate(play, actor_params)
            total, success = played.returns.item(), played.success.item()
            video.append_data(draw(slot.env))
            score = dataset.score(total, success) if dataset.unit != "return" else None
            score = "" if score is None else f", score {score:.1f}"
            print(f"episode {episode}: return {total:.2f}{score}, {slot.length} steps")
    print(f"-> {out}")


if __name__ == "__main__":
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--seed", type=int, help="one of the run's seeds, by default its first")
    parser.add_argument("--episodes", type=int, default=1, help="how many to film, by default 1")
    parser.add_argument("--out", type=Path, help="the video, by default <run>/policy.mp4")
    args = parser.parse_args()
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library):
            os.environ.setdefault("MUJOCO_GL", backend)
    jax.config.update("jax_platforms", "cpu")
    try:
        watch(args.run, args.out or args.run / "policy.mp4", args.seed, args.episodes)
    except (OSError, ValueError) as error:  # InputError is a ValueError
        sys.exit(f"watch: {error}")
