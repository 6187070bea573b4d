"""The benchmarks at tiny sizes: what they measure and what they count."""

import csv
import json
import os
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

# The command with tiny networks and short calls
TINY = """
import speed

speed.CASES = {case: speed.CASES[case] for case in ("td3bc", "cql")}
for script, settings, changes in speed.CASES.values():
    changes.update(hidden_dims=(16, 16), coefficient_hidden_dims=(16,))
speed.ROUNDS, speed.CALL_GFLOP, speed.GROWTH = 3, {"cpu": 0.01}, {"data": (500,)}
speed.DIMS["ant"] = ("Hopper-v4", 11, 3)  # its episodes are short
speed.main()
"""


@pytest.mark.slow
def test_speed_measures_updates_and_environments(tmp_path):
    options = "--seeds 2 --dims=ant --precision=bfloat16 --growth --out=speed.json --csv=speed.csv"
    command = [sys.executable, "-c", TINY, *options.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [*csv.DictReader((tmp_path / "speed.csv").open())]
    assert [(row["algorithm"], row["data"]) for row in table] == [
        ("td3bc", "100000"), ("cql", "100000"), ("td3bc", "500"), ("cql", "500"),
    ]  # fmt: skip
    assert {(row["seeds"], row["precision"]) for row in table} == {("2", "bfloat16")}
    report = json.loads((tmp_path / "speed.json").read_text())
    for case in ("td3bc", "cql"):
        for key in ("matmul_ratio", "updates_per_second", "compile_seconds"):
            assert report[case][key] > 0
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
