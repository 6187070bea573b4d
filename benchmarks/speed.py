"""Speed of the training loops, as a share of what this machine's matrix products reach.

    python benchmarks/speed.py [--out=speed.json]

For either script at the paper's sizes (batch 256, 17 observations, 6 actions): seconds to compile,
updates a second, the float32 matmul rate of the same process, the useful arithmetic as a share of
it, and the cost of more seeds. `cql` scores every row's sampled actions; `cql_trusted37` those of
the 37 % that are trusted alone, with the arithmetic of all counted still. `online` is the loop of
`finetune` in Walker2d, a step of the environment and an update in turns: environment steps a
second, and of the loop's time the share inside the environment (env_share), the share outside both
the environment and the compiled update (host_share), and what a call of that update costs over the
same update in a scan (call_share). Within a case, whatever is compared is timed in
turns, so that a machine whose speed drifts slows all alike; medians are reported. Compare ratios,
not seconds.
"""

import argparse
import contextlib
import json
import os
import sys
import time

import gymnasium
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
from common.dataset import Dataset, Normalizer
from common.evaluation import Collector

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


def make_config(case, **overrides):
    """The settings of a case."""
    _, settings, own, _, _ = CASES[case]
    config = settings.get_config("hopper-medium-v2")
    config.update(**own, **overrides)
    return ml_collections.FrozenConfigDict(config)


def make_data(script, num_seeds):
    """Transitions of random numbers, [ROWS, ...]."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return script.Transition(
        obs=normal(ROWS, OBS),
        action=jnp.tanh(normal(ROWS, ACTION)),
        reward=normal(ROWS),
        next_obs=normal(ROWS, OBS),
        terminated=jnp.zeros(ROWS),
        trusted=jnp.asarray(rng.random((num_seeds, ROWS)) < TRUSTED, jnp.float32),
    )


def make_state(script, config):
    """The state of every seed."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(config.num_seeds)])
    return jax.jit(jax.vmap(lambda key: script.init_state(key, OBS, ACTION, config)))(keys)


class Loop:
    """A compiled training interval with its state."""

    def __init__(self, case, num_seeds):
        script, _, _, gflop, self.updates = CASES[case]
        config = make_config(case, eval_interval=self.updates, num_seeds=num_seeds)
        self.data, self.state = make_data(script, num_seeds), make_state(script, config)
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


class OnlineLoop:
    """What `finetune` wants of its surroundings; updates alone are timed between two intervals."""

    def __init__(self, case):
        script, _, _, _, updates = CASES[case]
        self.steps = 2 * updates
        config = make_config(
            case, online_steps=ROUNDS * self.steps, eval_interval=self.steps, warmup_steps=0,
            num_seeds=1,
        )  # fmt: skip
        ends = np.arange(ROWS) % 1000 == 999
        data = script.offline_rows(make_data(script, 1), ends, config)
        self.compile_updates(script, config, data)
        self.seconds = []  # of a step: in the loop, its environment, an update called, in a scan
        empty = np.zeros((0, OBS), np.float32)
        spec = gymnasium.spec("Walker2d-v5")
        walker = Dataset(empty, empty[:, :ACTION], *[empty] * 4, spec, None, spec.id)
        envs = Collector(walker, 1, 0, Normalizer(np.zeros(OBS), np.ones(OBS)))
        script.finetune(make_state(script, config), data, envs, self.evaluate, self, config)

    def compile_updates(self, script, config, data):
        """Two ways to make an interval's updates alone: as finetune's own calls, and in a scan."""
        state, buffer = make_state(script, config), script.init_buffer(data, config)
        _, store, learn, totals = script.compile_online(state, buffer, data, state.key, config)
        buffer = store(buffer, jax.tree.map(lambda x: x[:, 0], buffer.rows))
        kinds = [{}] if script is ssar_cql else [{"update_actor": due} for due in (False, True)]

        def call(carry):
            for step in range(self.steps):
                carry = learn(step, *carry, buffer, data)
            return carry

        def body(carry, _):
            for kind in kinds:
                carry = script.online_step.__wrapped__(*carry, buffer, data, config, **kind)
            return carry, None

        scan = lambda carry: jax.lax.scan(body, carry, None, self.steps // len(kinds))[0]
        self.carry = (state, totals)
        self.ways = (call, jax.jit(scan, donate_argnums=0).lower(self.carry).compile())

    def evaluate(self, _):
        self.alone = []
        for way in self.ways:
            started = time.perf_counter()
            self.carry = jax.block_until_ready(way(self.carry))
            self.alone.append((time.perf_counter() - started) / self.steps)

    def collected(self, _, seconds, envs):
        self.seconds.append((seconds / self.steps, envs.seconds / self.steps, *self.alone))
        envs.seconds, envs.finished = 0.0, []

    def compiling(self):
        return contextlib.nullcontext()

    def interval(self, *_):
        pass

    def headline(self):
        return {}

    def report(self):
        loop, env, called, scanned = np.array(self.seconds[1:]).T  # the first interval warms up
        return {
            "env_steps_per_second": float(np.median(1 / loop)),
            "env_share": float(np.median(env / loop)),
            "host_share": float(np.median((loop - env - called) / loop)),
            "call_share": float(np.median((called - scanned) / loop)),
        }


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


def compiled_for(device, out):
    """What XLA makes of the loops for a device that is not there."""
    cases = {
        "td3bc": (ssar_td3bc, td3bc_gflop, {}),
        "cql": (ssar_cql, cql_gflop, {"block_size": 256}),
    }
    report = compile_for.report(device, cases, make_config, make_data, make_state)
    if out:
        with open(out, "w") as file:
            json.dump({"device": device} | report, file, indent=2)


def main(out):
    rate = matmul_rate()
    report = {"device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}"}
    for case in CASES:
        report[case] = measure(case, seeds=(1, 2, 4) if case == "td3bc" else (1, 2), rate=rate)
        report[case]["online"] = OnlineLoop(case).report()
        print(json.dumps({case: report[case]}, indent=2), flush=True)
    if out:
        with open(out, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the report to this file")
    parser.add_argument(
        "--compile-for", choices=[*compile_for.DEVICES], help="count kernels instead of seconds"
    )
    args = parser.parse_args()
    if args.compile_for:
        compile_for.prepare(args.compile_for)
        compiled_for(args.compile_for, args.out)
    else:
        main(args.out)
