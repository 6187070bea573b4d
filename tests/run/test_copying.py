"""docs/copying.md: its snippets run as they are printed, in a folder without the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# The update alone, the stub of common/, and the call of main
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/copying.md").read_text(), re.DOTALL)
SHORT = {"offline_steps": 200, "eval_interval": 100, "iql_steps": 100, "update_period": 100}
SHORT |= {"hidden_dims": (16, 16), "coefficient_hidden_dims": (16, 16), "num_seeds": 2}

# After this, only what the algorithm may need can be imported. (JAX imports scipy late.)
ALONE = """
import sys
import chex, flax.linen, jax, ml_collections, numpy, optax

allowed = {name.partition(".")[0] for name in sys.modules} | {*sys.stdlib_module_names}
allowed |= {"configs", "scipy", "ssar_td3bc", "ssar_cql"}

class Blocked:
    def find_spec(name, path, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the scripts, their settings and some data, but without common/."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for script in ("ssar_td3bc", "ssar_cql"):
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((500, *shape), np.float32)
    obs, action, reward, next_obs = normal(3), np.tanh(normal(2)), normal(), normal(3)
    ends = np.arange(500) % 50 == 49
    np.savez(
        tmp_path / "data.npz", observations=obs, actions=action, rewards=reward,
        next_observations=next_obs, terminals=ends & False, episode_ends=ends,
    )  # fmt: skip
    np.savez(
        tmp_path / "mine.npz", obs=obs, action=action, reward=reward, next_obs=next_obs,
        terminated=0 * reward, trusted=0 * reward + 1,
    )  # fmt: skip
    return tmp_path


def python(folder, code):
    """Runs code in a folder, away from the repository."""
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_update_step_trains_on_arrays_with_jax_and_its_libraries_alone(folder, script):
    assert len([line for line in SNIPPETS[0].splitlines() if line]) <= 20
    code = SNIPPETS[0].replace("ssar_td3bc", script).replace("20_001", "11")
    code = code.replace('"update_period": 1_000', f"**{SHORT}")
    if script == "ssar_cql":
        code = code.replace("step % config.policy_freq == 0", "True")
        code = code.replace("config, update_actor=update_actor", "config")
    out = python(folder, f"{ALONE}\n{code}\nprint(state.step, metrics['actor_loss'])")
    step, loss = out.split()
    assert step == "10" and np.isfinite(float(loss))


@pytest.mark.parametrize("script", ["ssar_td3bc", pytest.param("ssar_cql", marks=pytest.mark.slow)])
def test_main_runs_with_the_stub(folder, script):
    assert len([line for line in SNIPPETS[1].splitlines() if line]) <= 30
    (folder / "common.py").write_text(SNIPPETS[1])
    code = SNIPPETS[2].replace("ssar_td3bc", script).replace('"none"', '"iql"')
    out = python(folder, code.replace("main(config)", f"config.update({SHORT})\nmain(config)"))
    assert re.findall(r"update (\d+) distance", out) == ["100", "200"]
    with np.load(folder / "checkpoint.npz") as saved:
        assert len(saved["arr_0"]) == 2  # one actor for each seed


def test_the_readme_links_to_definitions():
    links = re.findall(r"\((ssar_\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 16
    for script, line in links:
        assert (ROOT / script).read_text().splitlines()[int(line) - 1].startswith("def ")
