"""Speed of the training loop, as a share of what this machine's matrix products reach.

    python benchmarks/speed.py [--out=speed.json]

For ssar_td3bc at the paper's sizes (batch 256, 17 observations, 6 actions): seconds to compile,
updates a second, the float32 matmul rate of the same process, the useful arithmetic as a share of
it, and the cost of more seeds. Everything is timed in turns, so that a machine whose speed drifts
slows all alike; medians are reported. Compare ratios, not seconds.
"""

import argparse
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ssar_td3bc as ssar
from configs.ssar_td3bc import get_config

OBS, ACTION, ROWS, UPDATES, ROUNDS = 17, 6, 100_000, 200, 9


def mlp_macs(*widths):
    """Multiply-adds of one row: forward, kernel gradients, gradients of all but the first input."""
    layers = [a * b for a, b in zip(widths, widths[1:], strict=False)]
    return sum(layers), sum(layers), sum(layers[1:])


def useful_gflop(config):
    """Multiply-adds that one TD3+BC(SA) update cannot do without, times two, a batch at a time."""
    actor, critic = (
        mlp_macs(OBS, *config.hidden_dims, ACTION),
        mlp_macs(OBS + ACTION, *config.hidden_dims, 1),
    )
    beta = mlp_macs(OBS, *config.coefficient_hidden_dims, 1)
    every = actor[0] + 2 * critic[0] + 2 * sum(critic)  # targets forward; critics forward and back
    delayed = sum(actor) + 2 * critic[0] + sum(beta)  # Q_1 forward and back to the action
    return 2 * config.batch_size * (every + delayed / config.policy_freq) / 1e9


def training(num_seeds):
    """(compiled interval, its state, its data, seconds to compile, config)."""
    config = get_config("hopper-medium-v2")
    config.eval_interval, config.num_seeds = UPDATES, num_seeds
    config = ml_collections.FrozenConfigDict(config)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    trusted = jnp.asarray(rng.random((num_seeds, ROWS)) < 0.37, jnp.float32)
    data = ssar.Transition(
        normal(ROWS, OBS), jnp.tanh(normal(ROWS, ACTION)), normal(ROWS), normal(ROWS, OBS),
        jnp.zeros(ROWS), trusted,
    )  # fmt: skip
    keys = jnp.stack([jax.random.key(seed) for seed in range(num_seeds)])
    state = jax.vmap(ssar.init_state, in_axes=(0, None, None, None))(keys, OBS, ACTION, config)
    started = time.perf_counter()
    compiled = ssar.train_interval.lower(state, data, config=config).compile()
    return compiled, state, data, time.perf_counter() - started, config


def matmul_rate(repeats=200):
    """A timer of float32 products of 256 x 512 by 512 x 512: GFLOP/s."""
    x, w = jnp.ones((256, 512)), jnp.full((512, 512), 1 / 512)
    product = jax.jit(lambda x, w: jax.lax.fori_loop(0, repeats, lambda _, x: x @ w, x))
    product(x, w).block_until_ready()

    def measure():
        started = time.perf_counter()
        product(x, w).block_until_ready()
        return repeats * 2 * 256 * 512 * 512 / (time.perf_counter() - started) / 1e9

    return measure


def main(out):
    seeds = (1, 2, 4)
    loops = {n: training(n) for n in seeds}
    rate = matmul_rate()
    seconds, rates = {n: [] for n in seeds}, []
    for _ in range(ROUNDS):
        for n, (compiled, state, data, compile_seconds, config) in loops.items():
            started = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, data))
            seconds[n].append(time.perf_counter() - started)
            loops[n] = (compiled, state, data, compile_seconds, config)
        rates.append(rate())
    seconds = {n: np.array(taken[1:]) for n, taken in seconds.items()}  # the first round warms up
    rates = np.array(rates[1:])
    gflop = useful_gflop(loops[1][-1])
    report = {
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "matmul_gflops": float(np.median(rates)),
        "td3bc": {
            "compile_seconds": loops[1][3],
            "updates_per_second": float(np.median(UPDATES / seconds[1])),
            "gflop_per_update": gflop,
            "matmul_ratio": float(np.median(gflop * UPDATES / seconds[1] / rates)),
            "seconds_relative_to_one_seed": {
                str(n): float(np.median(seconds[n] / seconds[1])) for n in seeds
            },
        },
    }
    print(json.dumps(report, indent=2))
    if out:
        with open(out, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the report to this file")
    main(parser.parse_args().out)
