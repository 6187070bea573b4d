"""The programs as they are lowered for GPUs and TPUs: no work for the host, and no copied state."""

import re

import jax
import pytest
from helpers import WatchedSeeds, both_scripts, run_all_loops, set_up, settings

import ssar_cql
import ssar_td3bc

# What waits for the host or moves data there: operations, custom calls, and marks on arguments.
HOST = re.compile(r"infeed|outfeed|stablehlo\.(send|recv)|callback|host|annotate_device_placement")


@pytest.mark.parametrize(
    ("ssar", "blocks"), [(ssar_td3bc, {}), (ssar_cql, {"block_size": None})], ids=["td3bc", "cql"]
)
def test_programs_stay_on_the_device_and_overwrite_their_state(ssar, blocks):
    lowered = []

    def watch(program, donate, first, *others):
        for platform in ("cuda", "tpu"):
            traced = program.trace(first, *others)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert not HOST.search(text)
            donated = len(jax.tree.leaves(first)) if donate == 0 else 0
            assert len(re.findall(r"tf\.aliasing_output", text)) == donated
            assert "jax.buffer_donor" not in text  # donated, but no result can take its place
            lowered.append(donated > 0)

    config = settings(ssar, num_seeds=2, offline_steps=20, online_steps=20, iql_steps=20, **blocks)
    seeds = WatchedSeeds(2, watch)
    seeds.is_one_cpu = False  # side by side, as on an accelerator
    run_all_loops(ssar, seeds, config)
    assert sum(lowered) == 2 * (5 if ssar is ssar_td3bc else 4)  # twice iql, train, store, learn


@both_scripts
def test_matmul_precision_does_not_reach_the_coefficient(ssar):
    config = settings(ssar, coefficient_hidden_dims=(24, 24, 24))  # no other network is 24 wide
    *args, update = set_up(ssar, config)
    with jax.default_matmul_precision("bfloat16"):
        text = update.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\] : (.*)", text)
    assert len(products) == text.count("dot_general")
    for left, right, shapes in products:
        is_of_coefficient = "24x" in shapes or "x24" in shapes
        assert {left, right} == {"HIGHEST" if is_of_coefficient else "DEFAULT"}, shapes
    precisions = [left for left, _, _ in products]
    assert precisions.count("HIGHEST") >= 4 + 4 + 3  # forward, and both gradients
    assert precisions.count("DEFAULT") > 12
