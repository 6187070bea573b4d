"""Speed of the training loops, as a share of what this machine's matrix products reach.

    python benchmarks/speed.py [--out=speed.json]

For either script at the paper's sizes (batch 256, 17 observations, 6 actions): seconds to compile,
updates a second, the float32 matmul rate of the same process, the useful arithmetic as a share of
it, and the cost of more seeds. `cql` scores every row's sampled actions; `cql_trusted37` those of
the 37 % that are trusted alone, with the arithmetic of all counted still. Within a case, loops and
matmuls are timed in turns, so that a machine whose speed drifts slows all alike; medians are
reported. Compare ratios, not seconds.
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
import configs.ssar_cql
import configs.ssar_td3bc
import ssar_cql
import ssar_td3bc

OBS, ACTION, ROWS, TRUSTED, ROUNDS = 17, 6, 100_000, 0.37, 9


def mlp_macs(*widths):
    """Multiply-adds of one row: forward, kernel gradients, gradients of all but the first input."""
    layers = [a * b for a, b in zip(widths, widths[1:], strict=False)]
    return sum(layers), sum(layers), sum(layers[1:])


def td3bc_gflop(config):
    """Multiply-adds that one TD3+BC(SA) update cannot do without, times two, a batch at a time."""
    actor = mlp_macs(OBS, *config.hidden_dims, ACTION)
    critic = mlp_macs(OBS + ACTION, *config.hidden_dims, 1)
    beta = mlp_macs(OBS, *config.coefficient_hidden_dims, 1)
    every = actor[0] + 2 * critic[0] + 2 * sum(critic)  # targets forward; critics forward and back
    delayed = sum(actor) + 2 * critic[0] + sum(beta)  # Q_1 forward and back to the action
    return 2 * config.batch_size * (every + delayed / config.policy_freq) / 1e9


def cql_gflop(config):
    """The same of one CQL(SA) update: 14.5 at the paper's sizes, 12.5 of them the regulariser's."""
    actor = mlp_macs(OBS, *config.hidden_dims, 2 * ACTION)
    critic = mlp_macs(OBS + ACTION, *config.hidden_dims, 1)
    beta = mlp_macs(OBS, *config.coefficient_hidden_dims, 1)
    policy = sum(actor) + 2 * actor[0] + 4 * critic[0]  # π at s and s', and at s after its step
    td_error = 2 * critic[0] + 2 * sum(critic)
    regulariser = 3 * config.num_sampled_actions * 2 * sum(critic)
    return 2 * config.batch_size * (policy + td_error + regulariser + sum(beta)) / 1e9


# What is measured: the script, its settings, the arithmetic of an update, updates in a round.
CASES = {
    "td3bc": (ssar_td3bc, configs.ssar_td3bc, {}, td3bc_gflop, 200),
    "cql": (ssar_cql, configs.ssar_cql, {"loosen_bound": False}, cql_gflop, 10),
    "cql_trusted37": (ssar_cql, configs.ssar_cql, {}, cql_gflop, 10),
}


class Loop:
    """A compiled training interval with its state."""

    def __init__(self, case, num_seeds):
        script, settings, overrides, gflop, self.updates = CASES[case]
        config = settings.get_config("hopper-medium-v2")
        config.update(eval_interval=self.updates, num_seeds=num_seeds, **overrides)
        config = ml_collections.FrozenConfigDict(config)
        rng = np.random.default_rng(0)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        self.data = script.Transition(
            obs=normal(ROWS, OBS),
            action=jnp.tanh(normal(ROWS, ACTION)),
            reward=normal(ROWS),
            next_obs=normal(ROWS, OBS),
            terminated=jnp.zeros(ROWS),
            trusted=jnp.asarray(rng.random((num_seeds, ROWS)) < TRUSTED, jnp.float32),
        )
        keys = jnp.stack([jax.random.key(seed) for seed in range(num_seeds)])
        init = jax.jit(jax.vmap(lambda key: script.init_state(key, OBS, ACTION, config)))
        self.state = init(keys)
        started = time.perf_counter()
        lowered = script.train_interval.lower(self.state, self.data, config=config)
        self.train = lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        self.gflop = gflop(config)

    def seconds(self):
        """Seconds an update of every seed."""
        started = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.train(self.state, self.data))
        return (time.perf_counter() - started) / self.updates


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


def measure(case, seeds, rate):
    """The report of one case: `seeds` loops and the matmul rate in turns."""
    loops = {n: Loop(case, n) for n in seeds}
    seconds, rates = {n: [] for n in seeds}, []
    for _ in range(ROUNDS):
        for n, loop in loops.items():
            seconds[n].append(loop.seconds())
        rates.append(rate())
    seconds = {n: np.array(taken[1:]) for n, taken in seconds.items()}  # the first round warms up
    rates = np.array(rates[1:])
    gflop = loops[1].gflop
    return {
        "matmul_ratio": float(np.median(gflop / seconds[1] / rates)),
        "updates_per_second": float(np.median(1 / seconds[1])),
        "compile_seconds": loops[1].compile_seconds,
        "gflop_per_update": gflop,
        "matmul_gflops": float(np.median(rates)),
        "seconds_relative_to_one_seed": {
            str(n): float(np.median(seconds[n] / seconds[1])) for n in seeds
        },
    }


def main(out):
    rate = matmul_rate()
    report = {"device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}"}
    for case in CASES:
        report[case] = measure(case, seeds=(1, 2, 4) if case == "td3bc" else (1, 2), rate=rate)
        print(json.dumps({case: report[case]}, indent=2), flush=True)
    if out:
        with open(out, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the report to this file")
    main(parser.parse_args().out)
