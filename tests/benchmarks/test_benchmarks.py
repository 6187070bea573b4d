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

# The command with tiny networks. Before each row, the file must hold all earlier ones.
TINY = """
import json, sys

folder, cases, absent = (sys.argv.pop(1) for _ in range(3))
sys.path.insert(0, folder)
sys.modules |= dict.fromkeys(absent.split())  # cannot be imported
import speed

tiny = {"hidden_dims": (16, 16), "coefficient_hidden_dims": (16,)}
for case, (script, settings, changes) in [*speed.CASES.items()]:
    del speed.CASES[case]
    if case in cases.split():
        speed.CASES[case] = script, settings, changes | tiny
speed.ROUNDS, speed.CALL_GFLOP = 3, {"cpu": 0.01}
speed.GROWTH |= {"data": (500,), "batch": (512,), "actions": (4,)}
speed.DIMS = dict.fromkeys(speed.DIMS, ("Hopper-v4", 11, 3))  # its episodes are short
measure, measured = speed.measure, []

def measure_after_saving(setup):
    if "--out=speed.json" in sys.argv:
        assert json.load(open("speed.json"))["rows"] == measured
    measured.append(measure(setup))
    return measured[-1]

speed.measure = measure_after_saving
speed.main()
"""
CASES = [*speed.CASES]
PRINTED = (
    r"(\w+) +(\d+) +(\d+) +(\d+) +(\d+) (float32|bfloat16) +[\d.]+ +[\d.]+-[\d.]+ .* s +\d+ .*"
)


def run_tiny(folder, form, cases, absent=""):
    """Runs `speed.py <form>`; returns the printed lines, and (case, seeds) of the rows in them."""
    arguments = str(ROOT / "benchmarks"), " ".join(cases), absent, *form.split()
    command = [sys.executable, "-c", TINY, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [match.groups() for match in map(re.compile(PRINTED).fullmatch, lines) if match]
    return lines, [(case, int(seeds)) for case, seeds, *_ in rows]


@pytest.mark.slow
def test_speed_needs_few_packages_and_saves_each_row_before_the_next(tmp_path):
    absent = """common.run common.data common.envs common.evaluation gymnasium mujoco minari h5py
        matplotlib tensorboardX tqdm filelock huggingface_hub PIL"""
    lines, rows = run_tiny(tmp_path, "--out=speed.json --csv=speed.csv", CASES, absent)
    assert lines[0].startswith("device: 1 x cpu")
    assert lines[-1].startswith("environments are left out: ")
    assert rows == [(case, 1) for case in CASES]
    report = json.loads((tmp_path / "speed.json").read_text())
    table = list(csv.DictReader((tmp_path / "speed.csv").open()))
    for kept in report["rows"], table:
        assert [(row["algorithm"], int(row["seeds"])) for row in kept] == rows
    for case in CASES:
        for key in ("matmul_ratio", "updates_per_second", "compile_seconds"):
            assert report[case][key] > 0


# Every form that the documentation shows, and the number of seeds in each of its rows.
FORMS = {
    "": [1],
    "--updates-only": [1],
    "--out=speed.json --csv=speed.csv --updates-only": [1],
    "--seeds 1 8 32 --dims=ant --precision=bfloat16": [1, 8, 32],
    "--growth": [1],
}
GROWN = [("td3bc", seeds) for seeds in (1, 2, 8, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "--updates-only"])
def test_every_documented_form_runs_to_its_end(tmp_path, form):
    """--updates-only is in another one."""
    cases = ("td3bc",) if form else ("td3bc", "cql")
    lines, rows = run_tiny(tmp_path, form, cases)
    base = [(case, seeds) for seeds in FORMS[form] for case in cases]
    assert rows == base + GROWN * ("--growth" in form)
    found = [line for line in lines if "evaluation_share 0." in line]
    assert len(found) == (0 if "--updates-only" in form else 2)
    assert (tmp_path / "speed.csv").exists() == ("--csv" in form)


def test_the_arithmetic_of_an_update_at_the_papers_sizes():
    def gflop(case):
        setup = speed.Setup(case)
        return sum(part for part, _ in speed.work(speed.make_config(setup, True), setup))

    expected = {"td3bc": 0.82, "cql": 14.47, "td3bc_plain": 0.41, "cql_plain": 13.65}
    expected["cql_trusted37"] = expected["cql"]  # what is skipped counts as done
    assert {case: round(gflop(case), 2) for case in CASES} == expected


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
