"""The benchmarks at tiny sizes: what they need, print and keep, and what they count."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import compile_for  # noqa: E402
import speed  # noqa: E402

CASES = [*speed.CASES]
PRINTED = (
    r"(\w+) +(\d+) +(\d+) +(\d+) +(\d+) (float32|bfloat16) +[\d.]+ +[\d.]+-[\d.]+ .* s +\d+ .*"
)
# Every form that the documentation shows, and the number of seeds in each of its rows.
FORMS = {
    "": [1],
    "--out=speed.json --csv=speed.csv --updates-only": [1],
    "--seeds 1 8 32 --dims=ant --precision=bfloat16": [1, 8, 32],
    "--growth": [1],
}
GROWN = [("td3bc", seeds) for seeds in (1, 2, 8, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_documented_form_runs_to_its_end(form, tmp_path, monkeypatch, capsys):
    """With tiny networks; --updates-only is in another one."""
    names = CASES if "--out" in form else ("td3bc",) if form else ("td3bc", "cql")
    tiny = {"hidden_dims": (16, 16), "coefficient_hidden_dims": (16,)}
    cases = {name: (*speed.CASES[name][:2], speed.CASES[name][2] | tiny) for name in names}
    sizes = speed.GROWTH | {"data": (500,), "batch": (512,), "actions": (4,)}
    dims = dict.fromkeys(speed.DIMS, ("Hopper-v4", 11, 3))  # its episodes are short
    changes = {"CASES": cases, "GROWTH": sizes, "DIMS": dims, "ROUNDS": 3}
    for name, value in (changes | {"CALL_GFLOP": {"cpu": 0.01}}).items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.chdir(tmp_path)
    speed.main(form.split())
    lines = capsys.readouterr().out.splitlines()
    matches = filter(None, map(re.compile(PRINTED).fullmatch, lines))
    rows = [(match[1], int(match[2])) for match in matches]
    base = [(case, seeds) for seeds in FORMS[form] for case in names]
    assert rows == base + GROWN * ("--growth" in form)
    found = [line for line in lines if "evaluation_share 0." in line]
    assert len(found) == (0 if "--updates-only" in form else 2)
    if "--out" in form:
        report = json.loads(Path("speed.json").read_text())
        for kept in report["rows"], list(csv.DictReader(open("speed.csv"))):
            assert [(row["algorithm"], int(row["seeds"])) for row in kept] == rows
            assert min(float(row["matmul_ratio"]) for row in kept) > 0


def test_speed_needs_few_packages():
    absent = """common.run common.data common.envs common.evaluation gymnasium mujoco minari h5py
        matplotlib tensorboardX tqdm filelock huggingface_hub PIL""".split()
    code = f"import sys; sys.path.append({BENCHMARKS!r}); sys.modules |= dict.fromkeys({absent})"
    subprocess.run([sys.executable, "-c", f"{code}; import speed"], check=True)


def test_the_arithmetic_of_an_update_at_the_papers_sizes():
    def gflop(case):
        setup = speed.Setup(case)
        return sum(part for part, _ in speed.work(speed.make_config(setup, True), setup))

    expected = {"td3bc": 0.82, "cql": 14.47, "td3bc_plain": 0.41, "cql_plain": 13.65}
    expected["cql_trusted37"] = expected["cql"]  # what is skipped counts as done
    assert {case: round(gflop(case), 2) for case in CASES} == expected


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
