"""The benchmarks at tiny sizes: what they need, print and keep, and what they count."""

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

# Measures where nothing can be imported that the update itself does not need.
ALONE = """
import sys

sys.modules |= dict.fromkeys('''common.run common.data common.envs common.evaluation gymnasium
    mujoco minari h5py matplotlib tensorboardX tqdm filelock huggingface_hub PIL'''.split())
folder, out = sys.argv[1:]
sys.path.insert(0, folder)
import speed

tiny = {"hidden_dims": (16, 16), "coefficient_hidden_dims": (16,), "num_sampled_actions": 2}
speed.ROWS, speed.ROUNDS, speed.CALL_GFLOP = 500, 3, {"cpu": 0.01}
speed.GROWTH = {"seeds": (1, 2)}
for case in ("td3bc", "cql_trusted37"):
    script, settings, changes, *others = speed.CASES[case]
    speed.CASES[case] = script, settings, changes | tiny, *others
del speed.CASES["cql"]
speed.main(out, quick=True)
print(speed.measure_growth("td3bc", "seeds"))
"""


@pytest.mark.slow
def test_speed_prints_and_keeps_each_result_and_needs_few_packages(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, "-c", ALONE, str(ROOT / "benchmarks"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    for case in ("td3bc", "cql_trusted37"):
        assert re.search(rf"{case} .* updates/s.*; matmul_ratio .*; compiled in", done.stdout)
        for key in ("matmul_ratio", "updates_per_second", "compile_seconds"):
            assert report[case][key] > 0
    assert "{'1': 1.0, '2': " in done.stdout  # calls for two seeds are made of whole intervals


def test_the_arithmetic_of_an_update_at_the_papers_sizes():
    gflop = {case: speed.CASES[case][3](speed.make_config(case, True)) for case in speed.CASES}
    assert gflop["td3bc"] == pytest.approx(0.82, abs=0.01)
    assert gflop["cql"] == gflop["cql_trusted37"] == pytest.approx(14.47, abs=0.01)


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


def test_every_program_is_counted_stays_on_the_device_and_overwrites_its_state(monkeypatch, capsys):
    def lower(program, args, updates, sharding):
        for platform in ("cuda", "tpu"):
            text = program.trace(*args).lower(lowering_platforms=(platform,)).as_text()
            assert not HOST.search(text)
            # All of the state, and nothing donated that no result can take the place of.
            assert len(re.findall(r"tf\.aliasing_output", text)) == len(jax.tree.leaves(args[0]))
            assert "jax.buffer_donor" not in text
        return {"kernels": 1 / updates, "state_copies": 0, "bytes": 1e6}

    monkeypatch.setattr(compile_for, "find_device", lambda device: None)
    monkeypatch.setattr(compile_for, "examine", lower)
    functions = speed.make_config, speed.make_data, speed.make_state
    report = compile_for.report("h100", speed.CASES, *functions)
    assert report["td3bc"]["train"]["8"]["kernels"] == 0.5  # of two unrolled updates
    assert report["cql"]["online"]["1"]["microseconds"]["launches"] == 2
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 2 * 3


def test_a_missing_compiler_ends_with_one_sentence(monkeypatch):
    monkeypatch.setattr(compile_for.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no compiler for h100 .ptxas.*requirements-compilers"):
        compile_for.find_device("h100")
