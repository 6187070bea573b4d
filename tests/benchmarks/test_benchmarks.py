"""The speed benchmark at tiny sizes: what it needs, prints and keeps, and what it counts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import compile_for  # noqa: E402
import speed  # noqa: E402

TINY = {"hidden_dims": (16, 16), "coefficient_hidden_dims": (16,), "num_sampled_actions": 2}

# Measures where nothing can be imported that the update itself does not need.
ALONE = """
import importlib.abc
import json
import sys

class Blocked:
    names = set('''common.run common.data common.envs common.evaluation gymnasium mujoco minari h5py
                   matplotlib tensorboardX tqdm filelock huggingface_hub submitit PIL'''.split())

    def find_spec(name, path, target=None):
        if name in Blocked.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked)
folder, out, tiny = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, folder)
import speed

speed.ROWS, speed.ROUNDS, speed.CALL_GFLOP = 500, 3, {"cpu": 0.01}
speed.GROWTH = {"seeds": (1, 2)}
speed.CASES = {case: speed.CASES[case] for case in ("td3bc", "cql_trusted37")}
make_config, measure, seen = speed.make_config, speed.measure, []

def make_tiny(*args, **overrides):
    config = make_config(*args, **overrides).as_configdict()
    with config.ignore_type():
        config.update({field: value for field, value in tiny.items() if field in config})
    return type(make_config(*args))(config)

def measure_and_look(case):
    if seen:
        assert list(json.load(open(out)))[1:] == seen  # whole, between two cases
    seen.append(case)
    return measure(case)

speed.make_config, speed.measure = make_tiny, measure_and_look
speed.main(out, quick=True)
print(speed.measure_growth("td3bc", "seeds"))
"""


@pytest.mark.slow
def test_speed_prints_and_keeps_each_result_and_needs_few_packages(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, "-c", ALONE, str(ROOT / "benchmarks"), str(out), json.dumps(TINY)]
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


TEXT = """HloModule example

%body (p: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %p = (s32[], f32[64,64]{1,0}) parameter(0)
  %w = f32[64,64]{1,0} get-tuple-element(%p), index=1
  %copy.1 = f32[64,64]{1,0} copy(%w)
  %fusion.1 = f32[64,64]{1,0} fusion(%copy.1, %w), kind=kLoop, calls=%fused
  ROOT %tuple = (s32[], f32[64,64]{1,0}) tuple(%p, %fusion.1)
}

ENTRY %main (a: f32[64,64]) -> (s32[], f32[64,64]) {
  %a = f32[64,64]{1,0} parameter(0)
  %fusion.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%other
  ROOT %loop = (s32[], f32[64,64]{1,0}) while(%a), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
}
"""


def test_kernels_copies_and_bytes_are_counted_inside_the_loop():
    computations, entry = compile_for.parse(TEXT)
    body, array = compile_for.loop_of(computations, entry), 4 * 64 * 64
    inside = compile_for.count(computations, body, {"f32[64,64]"})
    assert (entry, body) == ("main", "body")
    assert inside == {"kernels": 2, "state_copies": 1, "bytes": 5 * array}
    whole = compile_for.count(computations, entry, {"f32[64,64]"})
    assert whole == {"kernels": 21, "state_copies": 10, "bytes": 51 * array + 4 * 8}


def test_every_program_of_both_scripts_is_counted(monkeypatch, capsys):
    def trace(program, args, updates, sharding):
        state, *_ = jax.eval_shape(program, *args)
        assert jax.tree.structure(state) == jax.tree.structure(args[0])
        return {"kernels": 1 / updates, "state_copies": 0, "bytes": 1e6}

    monkeypatch.setattr(compile_for, "find_device", lambda device: None)
    monkeypatch.setattr(compile_for, "examine", trace)
    functions = speed.make_config, speed.make_data, speed.make_state
    report = compile_for.report("h100", speed.CASES, *functions)
    assert report["td3bc"]["train"]["8"]["kernels"] == 0.5  # of two unrolled updates
    assert report["cql"]["online"]["1"]["microseconds"]["launches"] == 2
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 2 * 3


def test_a_missing_compiler_ends_with_one_sentence(monkeypatch):
    monkeypatch.setattr(compile_for.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no compiler for h100 .ptxas.*requirements-compilers"):
        compile_for.find_device("h100")
