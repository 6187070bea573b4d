"""Keeps every test away from the user's own runs, caches and Minari data."""

import os
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

SCRATCH = tempfile.mkdtemp(prefix="ssar-tests-")
os.environ["MINARI_DATASETS_PATH"] = os.path.join(SCRATCH, "minari")
os.environ["XDG_CACHE_HOME"] = os.path.join(SCRATCH, "cache")
os.environ["JAX_PLATFORMS"] = "cpu"  # golden numbers and bitwise comparisons are the CPU's
os.makedirs(os.environ["MINARI_DATASETS_PATH"])
