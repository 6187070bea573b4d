"""The scripts as files: what they repeat is identical, and either one trains without this repo."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("ssar_td3bc", "ssar_cql")
# Where the algorithms differ. Everything else that both scripts define is repeated verbatim.
DIFFERENT = set(
    """
    Noise TrainState actor critic critics critic_loss actor_loss log_likelihood_margin
    init_state sample_noise update_step train_interval act explore online_update finetune
    make_transitions
    """.split()
)


def definitions(text):
    """{name: source} of what a script defines at module scope, in order."""
    found = {}
    for node in ast.parse(text).body:
        for named in (node, *getattr(node, "targets", [])):
            name = getattr(named, "name", getattr(named, "id", None))
            if name:
                found[name] = ast.get_source_segment(text, node)
    return found


def test_repeated_definitions_are_identical_and_in_the_same_order():
    texts = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    sections = [[line for line in text.splitlines() if line.startswith("# --")] for text in texts]
    assert sections[0] == sections[1]
    td3bc, cql = map(definitions, texts)
    shared = [name for name in td3bc if name in cql]
    assert shared == [name for name in cql if name in td3bc]
    assert {name for name in shared if td3bc[name] != cql[name]} == DIFFERENT


# Trains where nothing can be imported but jax, flax, optax, chex, NumPy, ml_collections and what
# these import. (JAX imports scipy late.)
ALONE = """
import importlib
import sys
from functools import partial

sys.modules |= dict.fromkeys('''common gymnasium mujoco minari h5py matplotlib tensorboardX tqdm
                                filelock huggingface_hub orbax submitit PIL'''.split())
import chex, flax.linen, jax, jaxlib, ml_collections, numpy as np, optax

name, due = sys.argv[1], sys.argv[2:]
allowed = {module.partition(".")[0] for module in sys.modules}
allowed |= {*sys.stdlib_module_names, "scipy", "configs", name}

class Blocked:
    def find_spec(name, path, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked)
ssar = importlib.import_module(name)
jax.config.update("jax_num_cpu_devices", 2)  # fails if the import used a device

config = importlib.import_module(f"configs.{name}").get_config("custom")
config.update(hidden_dims=(8,) * len(config.hidden_dims), coefficient_hidden_dims=(8,))
config = ml_collections.FrozenConfigDict(config)
rng = np.random.default_rng(0)
column = lambda *shape: rng.uniform(-0.9, 0.9, (500, *shape)).astype(np.float32)
zeros = np.zeros(500, np.float32)
data = ssar.Transition(column(3), column(2), column(), column(3), zeros, zeros + 1)
init = partial(ssar.init_state, obs_dim=3, action_dim=2, config=config)
state = jax.jit(init)(jax.random.key(0))
update = jax.jit(partial(ssar.update_step, config=config), static_argnames=due)
for i in range(1, 11):
    batch = jax.tree.map(lambda x: x[rng.integers(500, size=32)], data)
    noise = ssar.sample_noise(jax.random.key(i), batch, config)
    state, info = update(state, batch, noise, **dict.fromkeys(due, i % 2 == 0))
assert int(state.step) == 10
assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.actor, state.critic)))
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_with_jax_and_its_libraries_alone(name):
    due = ["update_actor"] if name == "ssar_td3bc" else []
    command = [sys.executable, "-c", ALONE, name, *due]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
