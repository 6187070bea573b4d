"""OGBench's single-task data sets by name; the package ogbench is optional. To record such data:

python -m common.data.ogbench record cube-single --steps=300000
"""

import re
import warnings
import zipfile

import gymnasium

from common.data.d4rl import download
from common.data.hdf5 import read_columns
from common.envs.make import env_spec, make_env
from common.run.errors import InputError, explained
from common.run.workdir import absolute

FOLDER = "~/.ogbench/data"  # the package's own
MIRROR = "zhouzypaul/ogbench_datasets"
NAME = re.compile(r"([\w-]+)-([a-z]+)-singletask(-task[1-5])?-v0")  # environment, kind, task
# The package's spaces are float64 and its environments look for a screen: each warns many times.
warnings.filterwarnings("ignore", ".*(precision lowered|DISPLAY)")


def read_ogbench(name: str, path: str | None, env: str | None) -> tuple:
    """Reads <environment>-<kind>-singletask[-task<1 to 5>]-v0; returns what load._read returns.

    path: the file, by default OGBench's own, downloaded if it is missing. Raises InputError.
    """
    with explained(f"ogbench:{name} needs the package ogbench", "pip install ogbench"):
        from ogbench import load_dataset
        from ogbench.relabel_utils import relabel_dataset
    env_id, file = parse(name)
    spec = env_spec(env or env_id, f"ogbench:{name}")
    fix = f"give a complete {file}" if path else "remove it, and it is downloaded again"
    path = path or download(MIRROR, "main", file, absolute(FOLDER, "OGBench's folder"))
    # NumPy takes what is no zip file for a pickle, and says how to load it unsafely.
    with explained(f"{path} is not readable as OGBench's {file}", fix), zipfile.ZipFile(path):
        data = load_dataset(path, add_info=True)  # without the last state of each trajectory
        with make_env(gymnasium.spec(env_id)) as task:
            relabel_dataset(env_id, task, data)
    # A trajectory continues after a success, and its end is a time-out.
    data |= {"timeouts": data["terminals"], "terminals": 1 - data["masks"]}
    return path, None, (spec, None, read_columns(path, data))


def parse(name: str) -> tuple[str, str]:
    """The environment and the file of a task. Raises InputError for what is not a task."""
    if found := NAME.fullmatch(name):
        env, kind, task = found.groups(default="")
        if (env_id := f"{env}-singletask{task}-v0") in gymnasium.registry:
            return env_id, f"{env}-{kind}-v0.npz"
    fix = "give a name such as ogbench:cube-single-play-singletask-task2-v0"
    raise InputError(f"ogbench:{name} is not one of OGBench's single tasks: {fix}")


if __name__ == "__main__":
    from experiments.record import main

    main()
