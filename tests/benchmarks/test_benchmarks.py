"""The benchmarks at tiny sizes: what they need, print and keep, and what they count."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import compile_for  # noqa: E402
import speed  # noqa: E402

# The command with tiny networks and short calls, where some packages cannot be imported.
TINY = """
import sys

folder, cases, absent = (sys.argv.pop(1) for _ in range(3))
sys.path.insert(0, folder)
sys.modules |= dict.fromkeys(absent.split())
import speed

speed.CASES = {case: speed.CASES[case] for case in cases.split()}
for script, settings, changes in speed.CASES.values():
    changes.update(hidden_dims=(16, 16), coefficient_hidden_dims=(16,))
speed.ROUNDS, speed.CALL_GFLOP = 3, {"cpu": 0.01}
speed.GROWTH = {"data": (500,), "seeds": (2,)}
speed.DIMS = dict.fromkeys(speed.DIMS, ("Hopper-v4", 11, 3))  # its episodes are short
speed.main()
"""


def run_tiny(folder, options, cases, absent=""):
    """Runs speed.py; returns the printed lines, the JSON report and the rows of the CSV table."""
    command = [sys.executable, "-c", TINY, str(ROOT / "benchmarks"), " ".join(cases), absent]
    command += ["--out=speed.json", "--csv=speed.csv", *options.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "speed.json").read_text())
    return done.stdout.splitlines(), report, [*csv.DictReader((folder / "speed.csv").open())]


@pytest.mark.slow
def test_speed_measures_every_algorithm_with_few_packages(tmp_path):
    absent = """common.run common.data common.envs common.evaluation gymnasium mujoco minari h5py
        matplotlib tensorboardX tqdm filelock huggingface_hub PIL"""
    lines, report, table = run_tiny(tmp_path, "", speed.CASES, absent)
    assert lines[-1].startswith("environments are left out: ")
    assert [row["algorithm"] for row in table] == [*speed.CASES]
    for case in speed.CASES:
        for key in ("matmul_ratio", "updates_per_second", "compile_seconds"):
            assert report[case][key] > 0


@pytest.mark.slow
def test_speed_measures_more_sizes_and_the_environments(tmp_path):
    options, cases = "--seeds 1 4 --dims=ant --precision=bfloat16 --growth", ["td3bc", "cql"]
    _, report, table = run_tiny(tmp_path, options, cases)
    assert [(row["algorithm"], int(row["seeds"])) for row in table] == [
        *(("td3bc", 1), ("cql", 1), ("td3bc", 4), ("cql", 4)),
        *(("td3bc", 1), ("td3bc", 2), ("cql", 1), ("cql", 2)),  # more data, more seeds
    ]
    assert {row["precision"] for row in table} == {"bfloat16"}
    for case in cases:
        assert 0 < report[f"{case} in Hopper-v4"]["evaluation_share"] < 1


def test_the_arithmetic_of_an_update_at_the_papers_sizes():
    def gflop(case):
        setup = speed.Setup(case)
        return sum(part for part, _ in speed.work(speed.make_config(setup, True), setup))

    expected = {"td3bc": 0.82, "cql": 14.47, "td3bc_plain": 0.41, "cql_plain": 13.65}
    assert {case: round(gflop(case), 2) for case in expected} == expected


def test_kernels_copies_and_bytes_are_counted_inside_the_loop():
    """A CPU's program has three kernels in its loop: the product, tanh and the counter."""
    loop = lambda w, x: jax.lax.fori_loop(0, 10, lambda _, w: jnp.tanh(w @ x), w)
    program, w = jax.jit(loop), jnp.ones((64, 64))
    counts = compile_for.examine(program, (w, w), 1, w.sharding)
    inside = {"kernels": 3, "state_copies": 0, "bytes": 5 * w.nbytes + 3 * 4}
    assert counts.items() >= inside.items()
    computations, entry = compile_for.parse(program.lower(w, w).compile().as_text())
    whole = compile_for.count(computations, entry, {"f32[64,64]"})  # copies w and the counter
    assert whole["bytes"] == 10 * inside["bytes"] + 2 * (w.nbytes + 4)
    assert (whole["kernels"], whole["state_copies"]) == (10 * 3 + 2, 1)


# What waits for the host or moves data there: operations, custom calls, and marks on arguments.
HOST = re.compile(r"infeed|outfeed|stablehlo\.(send|recv)|callback|host|annotate_device_placement")


@pytest.mark.slow
def test_every_program_is_counted_stays_on_the_device_and_overwrites_its_state(monkeypatch):
    def lower(program, args, updates, sharding):
        text = program.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert not HOST.search(text)
        # All of the state, and nothing donated that no result can take the place of.
        assert len(re.findall(r"tf\.aliasing_output", text)) == len(jax.tree.leaves(args[0]))
        assert "jax.buffer_donor" not in text
        return {"kernels": 1 / updates, "state_copies": 0, "bytes": 1e6}

    monkeypatch.setattr(compile_for, "find_device", lambda device: None)
    monkeypatch.setattr(compile_for, "examine", lower)
    report = compile_for.report("h100", speed, (17, 6))
    assert report["td3bc"]["train"]["8"]["kernels"] == 0.5  # of two unrolled updates
    assert report["cql"]["online"]["1"]["microseconds"]["launches"] == 2


def test_a_missing_compiler_ends_with_one_sentence(monkeypatch):
    monkeypatch.setattr(compile_for.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no compiler for h100 .ptxas.*requirements-compilers"):
        compile_for.find_device("h100")
