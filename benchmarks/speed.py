"""Speed of the training loops, as a share of what this machine's matrix products reach.

    python benchmarks/speed.py [--out=speed.json] [--csv=speed.csv] [--updates-only]
    python benchmarks/speed.py --seeds 1 8 32 --dims=ant --precision=bfloat16
    python benchmarks/speed.py --growth
    python benchmarks/speed.py --compile-for=h100

Algorithms, at the paper's sizes and on random data: TD3+BC(SA); CQL(SA) that regularises every
transition; CQL(SA) with loosen_bound where 37 % of the data is trusted; and the plain TD3+BC and
CQL of coefficient=fixed. An update trains every seed once, and the hours are for a million of them.

The share, which the files call matmul_ratio, is the arithmetic that an update needs over the rate
of products of the same shapes. Updates and products are timed in turns, so that a drift of the
machine slows both: compare shares, not seconds. MB are data, states and scratch space of the
compiled program. Environments come last, where gymnasium is installed. --growth adds more data,
seeds, batch and actions. --compile-for counts kernels on a device that this machine does not have.
"""

import argparse
import json
import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import NamedTuple

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

TRUSTED, ROUNDS = 0.37, 9
CALL_GFLOP = {"cpu": 50, "gpu": 2000, "tpu": 2000}  # of updates in a timed call
TD3BC, CQL = (ssar_td3bc, configs.ssar_td3bc), (ssar_cql, configs.ssar_cql)
CASES = {  # script, settings, changes to them
    "td3bc": (*TD3BC, {}),
    "cql": (*CQL, {"loosen_bound": False}),
    "cql_trusted37": (*CQL, {}),
    "td3bc_plain": (*TD3BC, {"coefficient": "fixed"}),
    "cql_plain": (*CQL, {"coefficient": "fixed"}),
}
DIMS = {  # environment, dimensions of its observations and actions
    "hopper": ("Hopper-v4", 11, 3),
    "halfcheetah": ("HalfCheetah-v4", 17, 6),
    "ant": ("Ant-v4", 27, 8),
}
GROWTH = {"data": (10_000, 2_000_000), "seeds": (2, 8), "batch": (1024, 4096), "actions": (4, 32)}
HEAD = "algorithm      seeds batch     data actions precision  updates/s (lowest-highest)"
HEAD += "  GFLOP/s  share  compile     MB  hours"
LINE = "{algorithm:14} {seeds:5} {batch:5} {data:8} {actions:7} {precision:9} "
LINE += "{updates_per_second:10.1f}  {lowest:7.1f}-{highest:<7.1f} {gflops:8.0f} "
LINE += "{matmul_ratio:6.2f} {compile_seconds:6.1f} s {megabytes:6.0f} {hours_per_million:6.2f}"


class Setup(NamedTuple):
    """What a row of the table measures."""

    algorithm: str
    observations: int = 17
    actions: int = 6
    seeds: int = 1
    batch: int = 256
    data: int = 100_000  # transitions


def make_config(setup, on_cpu, **overrides):
    """The settings of a row. On a CPU, CQL scores the actions of 32 rows at once."""
    _, settings, changes = CASES[setup.algorithm]
    config = settings.get_config("hopper-medium-v2")
    config.num_seeds, config.batch_size = setup.seeds, setup.batch
    if on_cpu and "block_size" in config:
        config.block_size = 32
    return ml_collections.FrozenConfigDict({**config, **changes, **overrides})


def macs(*widths):
    """Multiply-adds for one input: forward; and with gradients of kernels and inner activations."""
    layers = [a * b for a, b in zip(widths, widths[1:], strict=False)]
    return sum(layers), 2 * sum(layers) + sum(layers[1:])


def work(config, setup):
    """[(GFLOP that an update of one seed needs, shape of most of its matrix products), ...].

    Two operations for each multiply-add. A shape is (networks, batch, inputs, outputs). At the
    paper's sizes TD3+BC(SA) needs 0.82, half of it for β_φ, and CQL(SA) 14.5, 12.5 of it to score.
    """
    is_cql, delay = "num_sampled_actions" in config, config.get("policy_freq", 1)
    policy, actor = macs(setup.observations, *config.hidden_dims, setup.actions * (1 + is_cql))
    q, critic = macs(setup.observations + setup.actions, *config.hidden_dims, 1)
    _, beta = macs(setup.observations, *config.coefficient_hidden_dims, 1)
    (width, *_), (beta_width, *_) = config.hidden_dims, config.coefficient_hidden_dims
    batch, samples = setup.batch, 3 * config.get("num_sampled_actions", 0)
    scored = (config.get("block_size") or batch) * (1 + samples)
    parts = [
        (beta * (config.coefficient == "adaptive") / delay, (1, batch, beta_width, beta_width)),
        # π at s, and at s'; CQL also takes it at s after its step
        (actor / delay + policy * (1 + is_cql), (1, batch, width, width)),
        # targets; critics; forward and back to the action: Q_1, or with CQL both
        (2 * q + 2 * critic + 2 * q * (1 + is_cql) / delay, (2, batch, width, width)),
        (samples * 2 * critic, (2, scored, width, width)),
    ]
    return [(2 * batch * count / 1e9, shape) for count, shape in parts if count]


def make_data(script, setup):
    """Random transitions, [N, ...], and a D̂ for each seed."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((setup.data, *shape), np.float32))
    is_trusted = rng.random((setup.seeds, setup.data)) < TRUSTED
    return script.Transition(
        obs=normal(setup.observations),
        action=jnp.tanh(normal(setup.actions)),
        reward=normal(),
        next_obs=normal(setup.observations),
        terminated=jnp.zeros(setup.data),
        trusted=jnp.asarray(is_trusted, jnp.float32),
    )


def make_state(script, config, setup):
    """The state of every seed."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(setup.seeds)])
    dims = {"obs_dim": setup.observations, "action_dim": setup.actions}
    return jax.lax.map(partial(script.init_state, config=config, **dims), keys)


def prepare(setup, **overrides):
    """Script, settings, states and data of a row, and the Seeds that they are laid out for."""
    script, seeds = CASES[setup.algorithm][0], Seeds(setup.seeds)
    config = make_config(setup, jax.default_backend() == "cpu", **overrides)
    data = make_data(script, setup)
    data = seeds.share(data)._replace(trusted=seeds.spread(data.trusted))
    return script, config, seeds.spread(make_state(script, config, setup)), data, seeds


def seconds(function, *args):
    """How long a call takes, and its result."""
    started = perf_counter()
    result = jax.block_until_ready(function(*args))
    return perf_counter() - started, result


def product_timer(options, networks, batch, inputs, outputs):
    """A function that measures seconds per GFLOP of products x @ w, [n, b, i] by [n, i, o]."""
    x, w = jnp.ones((networks, batch, inputs)), jnp.full((networks, inputs, outputs), 1 / inputs)
    gflop = 2 * x.size * outputs / 1e9
    repeats = int(CALL_GFLOP[jax.default_backend()] / 10 / gflop) + 1
    loop = jax.jit(lambda x, w: jax.lax.fori_loop(0, repeats, lambda _, x: x @ w, x))
    loop = loop.lower(x, w).compile(options)  # those of the updates
    return lambda: seconds(loop, x, w)[0] / repeats / gflop


def measure(setup):
    """A row of the table."""
    script, config, state, data, seeds = prepare(setup)
    parts, delay = work(config, setup), config.get("policy_freq", 1)
    gflop = setup.seeds * sum(part for part, _ in parts)
    updates = max(int(CALL_GFLOP[jax.default_backend()] / gflop / delay), 1) * delay
    train = partial(script.train_interval, config=config, num_updates=updates)
    train = seeds.vmap(train, in_axes=(0, script.DATA_AXES), donate=0, is_loop=True)
    compile_seconds, train = seconds(lambda: train.lower(state, data).compile())
    together = 1 if seeds.is_one_cpu else setup.seeds  # seeds in one product
    timers = [
        (part, product_timer(seeds.options, n * together, *shape)) for part, (n, *shape) in parts
    ]
    rounds = []  # seconds of an update, and of the products that it needs
    for _ in range(ROUNDS):
        taken, (state, _) = seconds(train, state, data)
        needed = setup.seeds * sum(part * timer() for part, timer in timers)
        rounds.append((taken / updates, needed))
    taken, needed = np.array(rounds[1:]).T  # the first round warms up
    memory = train.memory_analysis()
    row = {
        "updates_per_second": np.median(1 / taken),
        "lowest": min(1 / taken),
        "highest": max(1 / taken),
        "gflops": np.median(gflop / taken),
        "matmul_ratio": np.median(needed / taken),
        "compile_seconds": compile_seconds,
        "megabytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
        "hours_per_million": np.median(taken) * 1e6 / 3600,
    }
    names = setup._asdict() | {"precision": jax.config.jax_default_matmul_precision}
    return names | {key: float(x) for key, x in row.items()}


def measure_loops(setup, env, row):
    """Environment steps per second, online and in evaluations, of a row that `measure` returned."""
    from common.envs.make import env_spec
    from common.evaluation import Collector, Evaluator

    interval, marks = 2 + int(row["updates_per_second"] / 3), []
    lengths = {"online_steps": 3 * interval, "eval_interval": interval, "warmup_steps": 0}
    script, config, state, data, seeds = prepare(setup, **lengths)
    dataset = SimpleNamespace(env=env_spec(env, env), observation_keys=None, normalizer=np.float32)
    envs, evaluate = Collector(dataset, setup.seeds, 0), Evaluator(dataset, setup.seeds, 10, 0)
    run = SimpleNamespace(  # in place of common.run.Run
        step=0,
        resume=lambda phase, tree, total: tree,
        steps=lambda end: range(max(end - interval, 0) + 1, end + 1),
        log=lambda step, metrics, finished: jax.block_until_ready(metrics),
        save=lambda step, tree: None,
        evaluate=lambda step, play, n: marks.append((perf_counter(), *seconds(play))),
    )
    script.finetune(state, data, envs, evaluate, seeds, run, config)
    started, taken, episodes = zip(*marks[1:], strict=True)  # without the calls that compile
    steps = np.array([played.lengths.sum() for played in episodes])
    rate = np.median(steps / taken)
    hours = 200 * 10 * 1000 * setup.seeds / rate / 3600  # of all evaluations in the paper's run
    return {
        "online_steps_per_second": float(np.median(interval / (np.diff(started) - taken[:-1]))),
        "evaluation_steps_per_second": float(rate),
        "evaluation_share": float(hours / (hours + row["hours_per_million"])),
    }


def write(path, text):
    """Replaces the file as a whole, so that it can be read at any moment."""
    if path:
        Path(f"{path}.tmp").write_text(text)
        os.replace(f"{path}.tmp", path)


def parse(arguments):
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--out", help="also write all results to this JSON file")
    option("--csv", help="also write the table to this CSV file")
    option("--seeds", type=int, nargs="+", default=[1], help="seeds that train together")
    option("--dims", choices=[*DIMS], default="halfcheetah", help="whose dimensions the data have")
    option("--precision", choices=["float32", "bfloat16"], default="float32", help="of products")
    option("--updates-only", "--quick", action="store_true", help="without environments")
    option("--growth", action="store_true", help="add more data, seeds, batch and actions")
    option("--compile-for", choices=[*compile_for.DEVICES], help="count kernels instead")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Measures what the command line asks for; prints and writes each row at once."""
    args = parse(arguments)
    env, *dims = DIMS[args.dims]
    if args.compile_for:
        compile_for.prepare(args.compile_for)
        counts = compile_for.report(args.compile_for, sys.modules[__name__], dims)
        return write(args.out, json.dumps(counts, indent=2))

    jax.config.update("jax_default_matmul_precision", args.precision)
    plan = [Setup(case, *dims, seeds) for seeds in args.seeds for case in CASES]
    for base in plan[:2] if args.growth else ():  # TD3+BC(SA) and CQL(SA)
        plan += [base._replace(**{k: n}) for k, sizes in GROWTH.items() for n in sizes]
    device, configs = jax.devices()[0], {x.algorithm: make_config(x, True) for x in plan[:2]}
    report = {
        "device": f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} CPU cores",
        "platform": f"{device.platform}, {device.client.platform_version}",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "networks": {name: config.hidden_dims for name, config in configs.items()},
        "coefficient": configs["td3bc"].coefficient_hidden_dims,
        "precision": args.precision,
    }
    print(*(f"{key}: {value}" for key, value in report.items()), HEAD, sep="\n", flush=True)
    rows = report["rows"] = []
    save = lambda: write(args.out, json.dumps(report, indent=2))
    save()  # a path that cannot be written fails at once
    for setup in plan:
        rows.append(measure(setup))
        print(LINE.format(**rows[-1]), flush=True)
        report.setdefault(setup.algorithm, rows[-1])
        save()
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        write(args.csv, "".join(",".join(map(str, line)) + "\n" for line in lines))
    for setup in () if args.updates_only else plan[:2]:
        try:
            loops = measure_loops(setup, env, report[setup.algorithm])
        except ImportError as error:
            return print(f"environments are left out: {error}")
        report[f"{setup.algorithm} in {env}"] = loops
        found = ", ".join(f"{key} {value:.2f}" for key, value in loops.items())
        print(f"{setup.algorithm} in {env}: {found}", flush=True)
        save()


if __name__ == "__main__":
    main()
