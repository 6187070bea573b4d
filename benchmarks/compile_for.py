"""What XLA makes of the loops for a GPU or TPU that this machine does not have.

`speed.py --compile-for=h100|tpu-v5e` uses this file. It counts kernels, copies of the state and
bytes moved in an update. Networks of this size give each kernel little work. The number of kernels,
each a launch of one to three microseconds, therefore says most about the speed. It needs the
compilers of requirements-compilers.txt and, for the GPU, `ptxas` on the PATH.
"""

import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from common.seeds import Seeds

# Public peak rates, of float32 products in TFLOP/s and of memory in GB/s, and the rough cost of a
# launch in µs. A TPU makes six bfloat16 passes for a float32 product, and launches nothing.
DEVICES = {"h100": (67, 3352, 2), "tpu-v5e": (197 / 6, 819, 0)}
# No kernels: names for buffers, or asynchronous halves, which are counted where they start.
FREE = """parameter tuple get-tuple-element bitcast constant after-all partition-id opt-barrier
    async-done async-update copy-done""".split()
# Bytes of an element; s8 is scratch space of the compilers.
BYTES = {"s8": 0, "pred": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


def prepare(device):
    """Call this before JAX looks for devices. It uses the CPU; autotuning would need the GPU."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "float32")
    if device == "tpu-v5e":
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    else:
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def find_device(device):
    """The placement of arrays on one such device. Raises SystemExit if there is no compiler."""
    try:
        if device == "tpu-v5e":
            topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        elif shutil.which("ptxas"):
            target = Path(__file__).with_name("h100.txtpb").read_text()
            options = {"target_config": target, "topology": "1x1x1"}
            topology = topologies.get_topology_desc("1x1x1", "cuda", **options)
        else:
            raise RuntimeError("ptxas is not on the PATH; it is part of CUDA's toolkit")
        return SingleDeviceSharding(topology.devices[0])
    except Exception as error:
        raise SystemExit(
            f"no compiler for {device} ({str(error).splitlines()[0]}): in a separate virtual "
            "environment, pip install -r requirements.txt -r requirements-compilers.txt"
        ) from None


class Instruction(NamedTuple):
    """One line of a compiled module's text."""

    name: str
    shape: str
    op: str
    operands: list
    line: str


def parse(text):
    """{computation: its instructions} of a compiled module's text, and the name of its entry."""
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (
            found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line)
        ):
            name, shape, op, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", re.split(r"\), |, kind=|, metadata=", rest)[0])
            current.append(Instruction(name, shape, op, operands, line))
    return computations, entry


def size(shape):
    """Bytes of a shape, or of a tuple of shapes."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    count = lambda dims: math.prod(int(dim) for dim in dims.split(",") if dim)
    return sum(BYTES.get(kind, 4) * count(dims) for kind, dims in arrays)


def called_by(instruction):
    """The computations that an instruction runs as kernels of their own, and how many times."""
    _, _, op, _, line = instruction
    is_async = op == "async-start" and "calls=" in line and "_computation" in line
    if op not in ("while", "call", "conditional") and not is_async:
        return [], 0
    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    called = re.findall(r"(?:body|to_apply|calls|true_computation)=%?([\w.\-]+)", line)
    return called, int(trips[1]) if trips else 1


def count(computations, name, state_shapes):
    """Kernels, copies of arrays of `state_shapes`, and bytes moved."""
    total = {"kernels": 0, "state_copies": 0, "bytes": 0}
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        _, shape, op, operands, line = instruction
        inner, times = called_by(instruction)
        for more in [count(computations, called, state_shapes) for called in inner]:
            total = {key: total[key] + times * more[key] for key in total}
        if inner or op in FREE:
            continue
        total["kernels"] += 1
        plain = re.sub(r"\{[^}]*\}", "", shape)
        total["state_copies"] += op.startswith("copy") and plain in state_shapes
        # A gather reads what it returns, not all the data.
        read = [size(shapes.get(operand, "")) for operand in operands]
        most = 4 * size(shape) if "gather" in line else float("inf")
        total["bytes"] += size(shape) + sum(min(x, most) for x in read)
    return total


def loop_of(computations, entry):
    """The body of the entry's longest loop; the entry itself if it has none."""
    bodies = [called_by(line)[0][0] for line in computations[entry] if line.op == "while"]
    return max(bodies, key=lambda body: len(computations[body]), default=entry)


def examine(program, args, updates, sharding):
    """Compiles a jitted program whose first argument is the state; the counts for an update.

    args: of shapes. updates: how many of them one turn of the program's loop makes.
    """
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    compiled = program.lower(*jax.tree.map(shaped, args)).compile()
    computations, entry = parse(compiled.as_text())
    large = [leaf.shape for leaf in jax.tree.leaves(args[0]) if leaf.size >= 1024]
    large += [shape[1:] for shape in large]  # a program for one seed may drop its axis
    large = {f"f32[{','.join(map(str, shape))}]" for shape in large}
    counts = count(computations, loop_of(computations, entry), large)
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {key: x / updates for key, x in counts.items()} | {"temporary_megabytes": megabytes}


def programs(script, state, data, config):
    """(name, jitted program, arguments, updates in a turn of its loop), all of shapes."""
    seeds = Seeds(config.num_seeds)
    seeds.is_one_cpu = False  # the programs are for another device
    vmap = lambda function, in_axes, **options: seeds.vmap(
        partial(function, config=config, **options), in_axes, donate=0, is_loop=True
    )
    sizes = data.obs.shape[1], data.action.shape[1]
    iql = jax.eval_shape(jax.vmap(lambda key: script.iql_init(key, *sizes)), state.key)
    buffer = jax.vmap(lambda key: script.init_buffer(data, config))
    buffer = jax.eval_shape(buffer, state.key)
    delay, axes = config.get("policy_freq", 1), script.DATA_AXES
    due = {"update_actor": True} if delay > 1 else {}  # of TD3+BC's two kinds, the longer one
    return [
        ("train", vmap(script.train_interval, (0, axes)), (state, data), delay),
        ("iql", vmap(script.iql_interval, (0, None)), (iql, data._replace(trusted=None)), 1),
        ("online", vmap(script.online_update, (0, 0, axes), **due), (state, buffer, data), 1),
    ]


def report(device, speed, dims):
    """{case: {program: {seeds: counts}}}, printed on the way. `speed` is the module speed.py.

    dims: of observations and actions. microseconds: rough lower bounds on the time of an update.
    """
    sharding, (tflops, bandwidth, launch), found = find_device(device), DEVICES[device], {}
    print(f"{'':32}kernels  state copies      MB  bound by, at least")
    for case, seeds in [(case, seeds) for case in ("td3bc", "cql") for seeds in (1, 8)]:
        lengths = {"updates_per_call": 200, "online_steps": 250_000}
        setup, script = speed.Setup(case, *dims, seeds), speed.CASES[case][0]
        config = speed.make_config(setup, on_cpu=False, **lengths)
        data = jax.eval_shape(partial(speed.make_data, script, setup))
        state = jax.eval_shape(partial(speed.make_state, script, config, setup))
        gflop = sum(part for part, _ in speed.work(config, setup)) * seeds
        for name, program, args, updates in programs(script, state, data, config):
            line = examine(program, args, updates, sharding)
            line["microseconds"] = bounds = {
                "arithmetic": gflop / tflops * 1e3 if name != "iql" else 0,
                "memory": line["bytes"] / bandwidth / 1e3,
                "launches": line["kernels"] * launch,
            }
            found.setdefault(case, {}).setdefault(name, {})[str(seeds)] = line
            bound = max(bounds, key=bounds.get)
            text = "{:32}{kernels:7.1f} {state_copies:13.1f} {:7.1f}  {}, {:.0f} µs"
            values = f"{case}, {name}, {seeds} seeds", line["bytes"] / 1e6, bound, bounds[bound]
            print(text.format(*values, **line), flush=True)
    return found
