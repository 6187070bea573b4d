"""Keeps every test away from the user's own runs, caches and Minari data."""

import atexit
import os
import shutil
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

SCRATCH = tempfile.mkdtemp(prefix="ssar-tests-")
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
os.environ["MINARI_DATASETS_PATH"] = os.path.join(SCRATCH, "minari")
os.environ["JAX_PLATFORMS"] = "cpu"  # golden numbers and bitwise comparisons are the CPU's
# Tests compile for longer than they run: LLVM's optimisations are left out, XLA's are not.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
# Programs are compiled more than once, and by several pytest-xdist workers.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(SCRATCH, "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.makedirs(os.environ["MINARI_DATASETS_PATH"])
os.environ["D4RL_DATASET_DIR"] = os.path.join(SCRATCH, "d4rl")
