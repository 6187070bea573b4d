"""Speed of the training loops, as a share of what this machine's matrix products reach.

    python benchmarks/speed.py [--out=speed.json] [--quick]
    python benchmarks/speed.py --compile-for=h100

For either script at the paper's sizes (batch 256, 17 observations, 6 actions): seconds to compile,
updates a second, the float32 rate of the same process at products of the same shapes, and the
useful arithmetic as a share of it, matmul_ratio. `cql` scores every row's sampled actions;
`cql_trusted37` those of the 37 % that are trusted alone, with the arithmetic of all counted still.
`growth` is the time of an update with more data, seeds, rows in a batch and dimensions of the
actions, relative to the least (--quick leaves it out). `online` is the loop of `finetune` in
Walker2d, a step of the environment and an update in turns: environment steps a second, and of the
loop's time the share inside the environment (env_share), the share outside both the environment and
the compiled update (host_share), and what a call of that update costs over the same update in a
scan (call_share). Within a case, whatever is compared is timed in turns, so that a machine whose
speed drifts slows all alike; medians are reported. Compare ratios, not seconds. --out also draws a
picture beside the report. --compile-for counts kernels on a device that is not there instead: see
compile_for.py.
"""

import argparse
import contextlib
import json
import os
import resource
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


def td3bc_gflop(config, action=ACTION):
    """Multiply-adds that one TD3+BC(SA) update cannot do without, times two, a batch at a time."""
    actor = mlp_macs(OBS, *config.hidden_dims, action)
    critic = mlp_macs(OBS + action, *config.hidden_dims, 1)
    beta = mlp_macs(OBS, *config.coefficient_hidden_dims, 1)
    every = actor[0] + 2 * critic[0] + 2 * sum(critic)  # targets forward; critics forward and back
    delayed = sum(actor) + 2 * critic[0] + sum(beta)  # Q_1 forward and back to the action
    return 2 * config.batch_size * (every + delayed / config.policy_freq) / 1e9


def cql_gflop(config, action=ACTION):
    """The same of one CQL(SA) update: 14.5 at the paper's sizes, 12.5 of them the regulariser's."""
    actor = mlp_macs(OBS, *config.hidden_dims, 2 * action)
    critic = mlp_macs(OBS + action, *config.hidden_dims, 1)
    beta = mlp_macs(OBS, *config.coefficient_hidden_dims, 1)
    policy = sum(actor) + 2 * actor[0] + 4 * critic[0]  # π at s and s', and at s after its step
    td_error = 2 * critic[0] + 2 * sum(critic)
    regulariser = 3 * config.num_sampled_actions * 2 * sum(critic)
    return 2 * config.batch_size * (policy + td_error + regulariser + sum(beta)) / 1e9


# What is measured: the script, its settings, the arithmetic of an update, updates in a round, and
# the products that most of it is in: their shares, and shapes (networks, rows, inputs, outputs).
REGULARISER = (0.87, (2, 32 * 31, 256, 256))
CASES = {
    "td3bc": (ssar_td3bc, configs.ssar_td3bc, {}, td3bc_gflop, 200,
              [(0.5, (1, 256, 512, 512)), (0.4, (2, 256, 256, 256)), (0.1, (1, 256, 256, 256))]),
    "cql": (ssar_cql, configs.ssar_cql, {"loosen_bound": False}, cql_gflop, 10,
            [REGULARISER, (0.06, (1, 256, 512, 512)), (0.07, (2, 256, 256, 256))]),
    "cql_trusted37": (ssar_cql, configs.ssar_cql, {}, cql_gflop, 10,
                      [REGULARISER, (0.06, (1, 256, 512, 512)), (0.07, (2, 256, 256, 256))]),
}  # fmt: skip

# What grows, from the paper's size where it is that.
GROWTH = {
    "rows": (10_000, 100_000, 1_000_000, 2_000_000),
    "seeds": (1, 2, 4, 8),
    "batch": (256, 1024, 4096),
    "actions": (4, 8, 16, 32),
}


def make_config(case, **overrides):
    """The settings of a case."""
    _, settings, own, *_ = CASES[case]
    config = settings.get_config("hopper-medium-v2")
    config.update(**own, **overrides)
    return ml_collections.FrozenConfigDict(config)


def make_data(script, num_seeds, rows=ROWS, action=ACTION):
    """Transitions of random numbers, [rows, ...]."""
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
    return jax.jit(jax.vmap(lambda key: script.init_state(key, OBS, action, config)))(keys)


class Loop:
    """A compiled training interval with its state; what grows may be given."""

    def __init__(self, case, rows=ROWS, seeds=1, batch=256, actions=ACTION):
        script, _, _, gflop, updates, _ = CASES[case]
        self.updates = max(updates // max(batch // 256, seeds), 2)
        config = make_config(case, eval_interval=self.updates, num_seeds=seeds, batch_size=batch)
        self.data = make_data(script, seeds, rows, actions)
        self.state = make_state(script, config, actions)
        started = time.perf_counter()
        lowered = script.train_interval.lower(self.state, self.data, config=config)
        self.train = lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        self.gflop = gflop(config, actions)

    def seconds(self):
        """Seconds an update of every seed."""
        started = time.perf_counter()
        self.state, *_ = jax.block_until_ready(self.train(self.state, self.data))
        return (time.perf_counter() - started) / self.updates

    def megabytes(self):
        """What the program holds: its arguments and its temporaries."""
        memory = self.train.memory_analysis()
        return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6


def matmul_rate(shape):
    """A timer of float32 products, x [n, rows, k] by w [n, k, m] over and over: GFLOP/s."""
    networks, rows, k, m = shape
    x, w = jnp.ones((networks, rows, k)), jnp.full((networks, k, m), 1 / k)
    repeats = max(1, int(1e10 / (2 * networks * rows * k * m)))
    product = jax.jit(lambda x, w: jax.lax.fori_loop(0, repeats, lambda _, x: x @ w, x))
    product(x, w).block_until_ready()

    def measure():
        started = time.perf_counter()
        product(x, w).block_until_ready()
        return repeats * 2 * networks * rows * k * m / (time.perf_counter() - started) / 1e9

    return measure


class OnlineLoop:
    """What `finetune` wants of its surroundings; updates alone are timed between two intervals."""

    def __init__(self, case):
        script, _, _, _, updates, _ = CASES[case]
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

    def collected(self, _, steps, seconds, envs):
        if not steps:  # before the first
            return
        self.seconds.append((seconds / steps, envs.seconds / steps, *self.alone))
        envs.seconds, envs.finished = 0.0, []

    def compiling(self):
        return contextlib.nullcontext()

    def done(self, _):
        return 0

    def restore(self, _, tree):
        return tree

    def is_due(self, _):
        return False

    def evaluating(self, *_):
        return contextlib.nullcontext()

    def interval(self, *_):
        pass

    check_finite = save = interval

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


def measure(case):
    """The report of one case: its loop and its products in turns."""
    shares, shapes = zip(*CASES[case][-1], strict=True)
    loop, timers = Loop(case), [matmul_rate(shape) for shape in shapes]
    rounds = [(loop.seconds(), *[timer() for timer in timers]) for _ in range(ROUNDS)]
    seconds, *rates = np.array(rounds[1:]).T  # the first round warms up
    rate = 1 / sum(share / rate for share, rate in zip(shares, rates, strict=True))
    return {
        "matmul_ratio": float(np.median(loop.gflop / seconds / rate)),
        "updates_per_second": float(np.median(1 / seconds)),
        "compile_seconds": loop.compile_seconds,
        "gflop_per_update": loop.gflop,
        "matmul_gflops": float(np.median(rate)),
        "matmul_gflops_by_shape": {
            " x ".join(map(str, shape)): float(np.median(rate))
            for shape, rate in zip(shapes, rates, strict=True)
        },
        "program_megabytes": loop.megabytes(),
    }


def measure_growth(case):
    """{what grows: {size: time of an update relative to the least}}, each group in turns."""
    report = {}
    for what, sizes in GROWTH.items():
        loops = {size: Loop(case, **{what: size}) for size in sizes}
        rounds = [[loop.seconds() for loop in loops.values()] for _ in range(5)]
        seconds = np.array(rounds[1:])
        relative = np.median(seconds / seconds[:, :1], axis=0)
        report[what] = {str(size): float(x) for size, x in zip(sizes, relative, strict=True)}
    return report


def draw(report, path):
    """Shares of the matrix-product rate, and growth, as one picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    first, *axes = figure.subplots(1, 1 + len(GROWTH))
    ratios = [report[case]["matmul_ratio"] for case in CASES]
    first.bar(list(CASES), ratios, color=["C0", "C1", "C2"])
    first.set_title("useful arithmetic /\nproduct rate", fontsize=9)
    first.tick_params(axis="x", labelrotation=20, labelsize=7)
    for axis, what in zip(axes, GROWTH, strict=True):
        for i, case in enumerate(CASES):
            if growth := report[case].get("growth"):
                sizes = [int(size) for size in growth[what]]
                axis.loglog(sizes, list(growth[what].values()), "o-", color=f"C{i}", label=case)
        axis.loglog(sizes, np.array(sizes) / sizes[0], "k:", lw=0.8, label="in proportion")
        axis.set_xlabel(what)
        labels = [f"{size / 1e6:g}M" if size >= 1e6 else f"{size:,}" for size in sizes]
        axis.set_xticks(sizes, labels, fontsize=7)
        axis.set_ylim(0.8, 1.3 * max(sizes[-1] / sizes[0] if what in ("seeds", "batch") else 2, 2))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("time of an update, relative")
    axes[0].legend(fontsize=7)
    figure.suptitle(report["device"], fontsize=9)
    figure.savefig(path, dpi=120)


def compiled_for(device, out):
    """What XLA makes of the loops for a device that is not there."""
    cases = {
        "td3bc": (ssar_td3bc, td3bc_gflop, {}),
        "cql": (ssar_cql, cql_gflop, {}),
    }
    report = compile_for.report(device, cases, make_config, make_data, make_state)
    if out:
        with open(out, "w") as file:
            json.dump({"device": device} | report, file, indent=2)


def main(out, quick):
    device = jax.devices()[0]
    report = {"device": f"{device.platform}: {device.device_kind}, {os.cpu_count()} cores"}
    for case in CASES:
        report[case] = measure(case) | {"online": OnlineLoop(case).report()}
        if not quick:
            report[case]["growth"] = measure_growth(case)
        print(json.dumps({case: report[case]}, indent=2), flush=True)
    report["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if out:
        with open(out, "w") as file:
            json.dump(report, file, indent=2)
        if not quick:
            draw(report, os.path.splitext(out)[0] + ".png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the report to this file")
    parser.add_argument(
        "--compile-for", choices=[*compile_for.DEVICES], help="count kernels instead of seconds"
    )
    parser.add_argument("--quick", action="store_true", help="leave out what grows")
    args = parser.parse_args()
    if args.compile_for:
        compile_for.prepare(args.compile_for)
        compiled_for(args.compile_for, args.out)
    else:
        main(args.out, args.quick)
