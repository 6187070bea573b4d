"""Speed of the training loops, as a share of what this machine's matrix products reach.

    python benchmarks/speed.py [--out=speed.json] [--quick]
    python benchmarks/speed.py --compile-for=h100

Three cases at the paper's sizes: batches of 256, 17 observations, 6 actions.

    td3bc           TD3+BC(SA)
    cql             CQL(SA) that regularises every transition
    cql_trusted37   CQL(SA) with loosen_bound where 37 % of the data is trusted

Each case prints updates per second, the time to compile, and matmul_ratio: the arithmetic that an
update of cql or td3bc needs, as a share of the rate of float32 products of the same shapes. Updates
and products are timed in turns, so that a drift of the machine slows both. Compare ratios, not
seconds. The growth of an update's time with data, seeds, batch and action dimensions comes last.
--compile-for counts kernels on a device that this machine does not have, see compile_for.py.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import compile_for

import configs.ssar_cql
import configs.ssar_td3bc
import ssar_cql
import ssar_td3bc
from common.seeds import Seeds

OBS, ACTION, ROWS, TRUSTED, ROUNDS = 17, 6, 100_000, 0.37, 9
CALL_GFLOP = {"cpu": 100, "gpu": 2000, "tpu": 2000}  # of updates in a timed call


def mlp_macs(*widths):
    """Multiply-adds for one input: forward, kernel gradients, gradients of inner activations."""
    layers = [a * b for a, b in zip(widths, widths[1:], strict=False)]
    return sum(layers), sum(layers), sum(layers[1:])


def td3bc_gflop(config, action=ACTION):
    """The arithmetic that one TD3+BC(SA) update needs: two operations for each multiply-add."""
    actor = mlp_macs(OBS, *config.hidden_dims, action)
    critic = mlp_macs(OBS + action, *config.hidden_dims, 1)
    beta = mlp_macs(OBS, *config.coefficient_hidden_dims, 1)
    every = actor[0] + 2 * critic[0] + 2 * sum(critic)  # targets forward; critics forward and back
    delayed = sum(actor) + 2 * critic[0] + sum(beta)  # Q_1 forward, and back to the action
    return 2 * config.batch_size * (every + delayed / config.policy_freq) / 1e9


def cql_gflop(config, action=ACTION):
    """The same for CQL(SA): 14.5 at the paper's sizes, of which the regulariser takes 12.5."""
    actor = mlp_macs(OBS, *config.hidden_dims, 2 * action)
    critic = mlp_macs(OBS + action, *config.hidden_dims, 1)
    beta = mlp_macs(OBS, *config.coefficient_hidden_dims, 1)
    policy = sum(actor) + 2 * actor[0] + 4 * critic[0]  # π at s and s', and at s after its step
    td_error = 2 * critic[0] + 2 * sum(critic)
    regulariser = 3 * config.num_sampled_actions * 2 * sum(critic)
    return 2 * config.batch_size * (policy + td_error + regulariser + sum(beta)) / 1e9


# The shapes of the matrix products that most arithmetic is in, with the share in each of them:
# (share, (networks, batch, inputs, outputs)).
BETA, CRITICS, ACTOR = (1, 256, 512, 512), (2, 256, 256, 256), (1, 256, 256, 256)
TD3BC_PRODUCTS = (0.5, BETA), (0.4, CRITICS), (0.1, ACTOR)
CQL_PRODUCTS = (0.87, (2, 32 * 31, 256, 256)), (0.06, BETA), (0.07, CRITICS)
# Script, settings, changes to them, arithmetic of an update, products.
CQL = ssar_cql, configs.ssar_cql
CASES = {
    "td3bc": (ssar_td3bc, configs.ssar_td3bc, {}, td3bc_gflop, TD3BC_PRODUCTS),
    "cql": (*CQL, {"loosen_bound": False}, cql_gflop, CQL_PRODUCTS),
    "cql_trusted37": (*CQL, {}, cql_gflop, CQL_PRODUCTS),
}
# What grows, from the least size; the other sizes are the paper's.
GROWTH = {
    "rows": (10_000, 100_000, 1_000_000, 2_000_000),
    "seeds": (1, 2, 4, 8),
    "batch": (256, 1024, 4096),
    "actions": (4, 8, 16, 32),
}


def make_config(case, on_cpu, **overrides):
    """The settings of a case. On a CPU, CQL scores the actions of 32 rows at once."""
    _, settings, changes, *_ = CASES[case]
    config = settings.get_config("hopper-medium-v2")
    if on_cpu and "block_size" in config:
        config.block_size = 32
    return ml_collections.FrozenConfigDict({**config, **changes, **overrides})


def make_data(script, num_seeds, rows=ROWS, action=ACTION):
    """Random transitions, [rows, ...], and a D̂ for each seed."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    return script.Transition(
        obs=normal(rows, OBS),
        action=jnp.tanh(normal(rows, action)),
        reward=normal(rows),
        next_obs=normal(rows, OBS),
        terminated=jnp.zeros(rows),
        trusted=jnp.asarray(rng.random((num_seeds, rows)) < TRUSTED, jnp.float32),
    )


def make_state(script, config, action=ACTION):
    """The state of every seed."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(config.num_seeds)])
    init = partial(script.init_state, obs_dim=OBS, action_dim=action, config=config)
    return jax.lax.map(init, keys)


class Loop:
    """A compiled training interval with its state, at the paper's sizes except those given."""

    def __init__(self, case, rows=ROWS, seeds=1, batch=256, actions=ACTION):
        script, _, _, gflop, _ = CASES[case]
        device = jax.default_backend()
        config = make_config(case, device == "cpu", num_seeds=seeds, batch_size=batch)
        self.gflop, delay = gflop(config, actions), config.get("policy_freq", 1)
        intervals = CALL_GFLOP[device] / self.gflop / seeds / delay
        self.updates = max(int(intervals), 1) * delay
        spread = Seeds(seeds)
        data = make_data(script, seeds, rows, actions)
        self.data = spread.share(data)._replace(trusted=spread.spread(data.trusted))
        self.state = spread.spread(make_state(script, config, actions))
        train = partial(script.train_interval, config=config, num_updates=self.updates)
        train = spread.vmap(train, in_axes=(0, script.DATA_AXES), donate=0, is_loop=True)
        started = time.perf_counter()
        self.train = train.lower(self.state, self.data).compile()
        self.compile_seconds = time.perf_counter() - started

    def seconds(self):
        """Seconds for an update of every seed."""
        started = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.train(self.state, self.data))
        return (time.perf_counter() - started) / self.updates


def product_timer(networks, batch, inputs, outputs):
    """A function that measures GFLOP/s of float32 products x @ w, [n, b, i] by [n, i, o]."""
    x, w = jnp.ones((networks, batch, inputs)), jnp.full((networks, inputs, outputs), 1 / inputs)
    repeats = int(CALL_GFLOP[jax.default_backend()] / 10 * 1e9 / (2 * x.size * outputs)) + 1
    product = jax.jit(lambda x, w: jax.lax.fori_loop(0, repeats, lambda _, x: x @ w, x))
    product(x, w).block_until_ready()

    def measure():
        started = time.perf_counter()
        product(x, w).block_until_ready()
        return repeats * 2 * x.size * outputs / (time.perf_counter() - started) / 1e9

    return measure


def measure(case):
    """The results of one case; its updates and its products are timed in turns."""
    shares, shapes = zip(*CASES[case][-1], strict=True)
    loop, timers = Loop(case), [product_timer(*shape) for shape in shapes]
    rounds = [(loop.seconds(), *[timer() for timer in timers]) for _ in range(ROUNDS)]
    seconds, *rates = np.array(rounds[1:]).T  # the first round warms up
    rate = 1 / sum(share / rate for share, rate in zip(shares, rates, strict=True))
    return {
        "matmul_ratio": float(np.median(loop.gflop / seconds / rate)),
        "updates_per_second": float(np.median(1 / seconds)),
        "best_updates_per_second": float(np.max(1 / seconds)),
        "compile_seconds": loop.compile_seconds,
        "gflop_per_update": loop.gflop,
        "matmul_gflops": float(np.median(rate)),
    }


def measure_growth(case, what):
    """{size: time of an update relative to the least size}, timed in turns."""
    loops = {size: Loop(case, **{what: size}) for size in GROWTH[what]}
    seconds = np.array([[loop.seconds() for loop in loops.values()] for _ in range(5)])[1:]
    relative = np.median(seconds / seconds[:, :1], axis=0)
    return {str(size): round(float(x), 3) for size, x in zip(loops, relative, strict=True)}


def write(report, path):
    """Replaces the file as a whole, so that it can be read at any moment."""
    if path:
        Path(f"{path}.tmp").write_text(json.dumps(report, indent=2))
        os.replace(f"{path}.tmp", path)


def main(out, quick):
    """Measures all cases, then their growth; prints and writes each result at once."""
    jax.config.update("jax_default_matmul_precision", "float32")
    device = jax.devices()[0]
    report = {"device": f"{device.platform}: {device.device_kind}, {os.cpu_count()} cores"}
    print(report["device"], flush=True)
    for case in CASES:
        report[case] = measure(case)
        line = "{:14} {updates_per_second:8.1f} updates/s, at best {best_updates_per_second:.1f}; "
        line += "matmul_ratio {matmul_ratio:.2f}; compiled in {compile_seconds:.1f} s"
        print(line.format(case, **report[case]), flush=True)
        write(report, out)
    for case, what in [] if quick else [(case, what) for case in CASES for what in GROWTH]:
        growth = report[case].setdefault("growth", {})
        growth[what] = measure_growth(case, what)
        print(f"{case:14} time relative to fewest {what}: {growth[what]}", flush=True)
        write(report, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the results to this JSON file")
    parser.add_argument("--compile-for", choices=[*compile_for.DEVICES], help="count kernels")
    parser.add_argument("--quick", action="store_true", help="leave out the growth")
    args = parser.parse_args()
    if args.compile_for:
        compile_for.prepare(args.compile_for)
        report = compile_for.report(args.compile_for, CASES, make_config, make_data, make_state)
        write(report, args.out)
    else:
        main(args.out, args.quick)
