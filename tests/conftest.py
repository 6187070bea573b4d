"""Keeps every test away from the user's own runs, caches and data sets."""

import atexit
import os
import shutil
import sys
import tempfile

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

SCRATCH = tempfile.mkdtemp(prefix="ssar-tests-")
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
os.environ["SSAR_TEST_SCRATCH"] = SCRATCH
os.environ["MINARI_DATASETS_PATH"] = os.path.join(SCRATCH, "minari")
os.environ["D4RL_DATASET_DIR"] = os.path.join(SCRATCH, "d4rl")
os.environ["HF_HUB_OFFLINE"] = "1"
# Bitwise comparisons are the CPU's; the golden numbers can be checked on another device.
os.environ["JAX_PLATFORMS"] = os.environ.get("SSAR_TEST_PLATFORM", "cpu")
# Tests compile for longer than they run: this leaves out LLVM's optimisations, not XLA's.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
# Tests compile the same programs more than once, and in several processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(SCRATCH, "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.makedirs(os.environ["MINARI_DATASETS_PATH"])
