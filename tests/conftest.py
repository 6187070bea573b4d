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
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(SCRATCH, "jax")  # runs are repeated
os.makedirs(os.environ["MINARI_DATASETS_PATH"])
