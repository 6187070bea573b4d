"""The two scripts repeat code on purpose: what is the same must stay the same, word for word."""

import ast
import difflib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("ssar_td3bc", "ssar_cql")
# Where the algorithms differ. Everything else that both scripts define is repeated verbatim.
DIFFERENT = set(
    """
    Noise TrainState actor critic critics critic_loss actor_loss log_likelihood_margin
    init_state sample_noise update_step train_interval act explore online_step compile_online
    load_data main UPDATES_PER_CALL
""".split()
)


def test_the_benchmark_stands_in_for_all_of_the_log_that_finetune_uses():
    """Or `benchmarks/speed.py` breaks, which no other test runs."""
    path = os.path.join(ROOT, "benchmarks", "speed.py")
    with open(path) as file:
        (loop,) = [
            node
            for node in ast.parse(file.read()).body
            if isinstance(node, ast.ClassDef) and node.name == "OnlineLoop"
        ]
    names = {node.name for node in loop.body if isinstance(node, ast.FunctionDef)}
    for node in loop.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets}
    for script in SCRIPTS:
        body = source(script).split("def finetune")[1].split("\n# ---")[0]
        used = set(re.findall(r"\blog\.(\w+)", body))
        assert len(used) > 5 and used <= names, used - names


def source(name):
    with open(os.path.join(ROOT, f"{name}.py")) as file:
        return file.read()


def definitions(text):
    """{name: source} of what a script defines at module scope, in order."""
    found = {}
    for node in ast.parse(text).body:
        names = [target.id for target in getattr(node, "targets", []) if hasattr(target, "id")]
        for name in names or [getattr(node, "name", None)]:
            if name:
                start = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
                found[name] = "\n".join(text.splitlines()[start - 1 : node.end_lineno])
    return found


def test_repeated_definitions_are_identical():
    td3bc, cql = (definitions(source(name)) for name in SCRIPTS)
    shared = [name for name in td3bc if name in cql]
    differing = {name for name in shared if td3bc[name] != cql[name]}
    assert differing <= DIFFERENT
    assert len(set(shared) - DIFFERENT) >= 32
    for network in ("MLP", "coefficient", "coefficient_loss", "update_threshold", "select_trusted",
                    "iql_step", "optimizers", "take", "descend", "ReplayBuffer", "store",
                    "sample_batch", "offline_rows", "pretrain", "finetune",
                    "modify_reward"):  # fmt: skip
        assert td3bc[network] == cql[network]


def test_sections_and_names_come_in_the_same_order():
    texts = [source(name) for name in SCRIPTS]
    banners = [[line for line in text.splitlines() if line.startswith("# ---")] for text in texts]
    assert banners[0] == banners[1]
    assert len(banners[0]) == 8
    td3bc, cql = (list(definitions(text)) for text in texts)
    assert [name for name in td3bc if name in cql] == [name for name in cql if name in td3bc]


@pytest.mark.parametrize(("name", "lines"), [("main", 2), ("load_data", 1)])
def test_programs_differ_in_their_name_and_the_action_clip_alone(name, lines):
    a, b = (definitions(source(script))[name].splitlines() for script in SCRIPTS)
    difference = list(difflib.ndiff(a, b))
    removed = [line for line in difference if line.startswith("- ")]
    changed = [line for line in difference if line.startswith("+ ")]
    assert len(removed) == len(changed) == lines
    assert all("ssar_cql" in line or "clip" in line for line in changed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_has_no_side_effects(script):
    code = f"import sys; sys.argv = ['x', '--no-such-flag']; import {script}; "
    code += "from absl import flags; assert 'config' not in flags.FLAGS"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
