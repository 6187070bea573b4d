"""What XLA makes of the loops for a GPU or TPU that is not there: kernels, copies, bytes, memory.

`speed.py --compile-for=h100|tpu-v5e` comes here. A net of this size does little work per kernel, so
that the number of kernels, each a launch of one to three microseconds, says most about its speed.
Needs the compilers of requirements-compilers.txt, and for the GPU `ptxas` on the PATH.
"""

import os
import re
import shutil
from functools import partial
from typing import NamedTuple
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))


class Device(NamedTuple):
    """Public peak figures, of float32 products and of memory, and a rough cost of one launch."""

    tflops: float
    gigabytes_per_second: float
    launch_microseconds: float


# float32 is CUDA cores' on an H100, and six passes of bfloat16 on a TPU, which has no launches.
DEVICES = {"h100": Device(67, 3352, 2.0), "tpu-v5e": Device(197 / 6, 819, 0.0)}

# Not kernels: names for buffers, or (async) halves that are counted once, where they start.
FREE = set(
    "parameter tuple get-tuple-element bitcast constant after-all partition-id opt-barrier "
    "async-done async-update copy-done".split()
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip


def prepare(device):
    """Before JAX looks for devices: its own is the CPU. Autotuning would need the GPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if device == "tpu-v5e":
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    else:
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def describe(device):
    """The topology of one device. Raises SystemExit, with the mend, where there is no compiler."""
    from jax.experimental import topologies

    try:
        if device == "tpu-v5e":
            return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        if shutil.which("ptxas") is None:
            raise RuntimeError("ptxas is not on the PATH; it is part of CUDA's toolkit")
        with open(os.path.join(HERE, "h100.txtpb")) as file:
            target = file.read()
        return topologies.get_topology_desc("1x1x1", "cuda", target_config=target, topology="1x1x1")
    except Exception as error:
        raise SystemExit(
            f"no compiler for {device} ({str(error).splitlines()[0]}): in a virtual environment of "
            "their own, pip install -r requirements.txt -r requirements-compilers.txt"
        ) from None


INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")


class Instruction(NamedTuple):
    """One line of a module's text."""

    name: str
    shape: str
    op: str
    operands: list
    line: str


def parse(text):
    """{computation: its instructions} of a compiled module's text, and the name of the entry."""
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$", line):
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := INSTRUCTION.match(line)):
            name, shape, op, rest = found.groups()
            operands = re.split(r"\), |, kind=|, metadata=", rest)[0]
            operands = re.findall(r"%([\w.\-]+)", operands)
            current.append(Instruction(name, shape, op, operands, line))
    return computations, entry


def size(shape):
    """Bytes of a shape, or of a tuple of shapes, without the compilers' scratch space."""
    total = 0
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += 0 if kind == "s8" else BYTES.get(kind, 4) * count
    return total


def count(computations, name, state_shapes, times=1):
    """Kernels, copies of arrays as large as one of the state's, and bytes moved, each `times`."""
    total = {"kernels": 0, "products": 0, "state_copies": 0, "bytes": 0}
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for _, shape, op, operands, line in computations[name]:
        if op in FREE:
            continue
        if op in ("while", "call", "conditional") or (
            op == "async-start" and "calls=" in line and "_computation" in line
        ):
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            called = re.findall(r"(?:body|to_apply|calls|true_computation)=%?([\w.\-]+)", line)
            for inner in called:
                more = count(computations, inner, state_shapes, int(trips.group(1)) if trips else 1)
                total = {key: total[key] + more[key] for key in total}
            continue
        plain = re.sub(r"\{[^}]*\}", "", shape)
        total["kernels"] += 1
        total["products"] += "dot_general" in line and op in ("custom-call", "fusion", "dot",
                                                             "convolution")  # fmt: skip
        total["state_copies"] += op.startswith("copy") and plain in state_shapes
        # A gather reads the rows that it gives, not the data that it takes them from.
        read = [size(shapes.get(operand, "")) for operand in operands]
        moved = 4 * size(shape)
        total["bytes"] += size(shape) + sum(min(x, moved) if "gather" in line else x for x in read)
    return {key: times * value for key, value in total.items()}


def loop_of(computations, entry):
    """The computation that the entry's longest while repeats; the entry itself without one."""
    lines = [instruction.line for instruction in computations[entry] if instruction.op == "while"]
    bodies = [re.search(r"body=%?([\w.\-]+)", line).group(1) for line in lines]
    return max(bodies, key=lambda body: len(computations[body]), default=entry)


def examine(program, args, keywords, state, updates, sharding):
    """Compiles `program` for arguments of these shapes, the first donated; its counts an update.

    updates: how many of them one turn of the loop makes.
    """
    import jax

    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    whole = jax.jit(
        lambda *args: program.__wrapped__(*args, **keywords),
        donate_argnums=0,
        out_shardings=sharding,
    )
    with mock.patch.object(jax, "default_backend", lambda: "not a cpu"):
        compiled = whole.lower(*jax.tree.map(shaped, args)).compile()
    computations, entry = parse(compiled.as_text())
    names = {"float32": "f32", "int32": "s32"}
    shapes = set()
    for leaf in jax.tree.leaves(state):
        if leaf.size >= 1024:  # with the seed axis and, as one seed runs, without
            for dims in (leaf.shape, leaf.shape[1:]):
                shapes.add(f"{names[str(leaf.dtype)]}[{','.join(map(str, dims))}]")
    counts = count(computations, loop_of(computations, entry), shapes)
    counts = {key: x / updates for key, x in counts.items()}
    memory = compiled.memory_analysis()
    return counts | {
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
        "donated_megabytes": memory.alias_size_in_bytes / 1e6,
    }


def roofline(counts, gflop, device):
    """Rough lower bounds of an update's microseconds, and which of them is the largest."""
    bounds = {
        "arithmetic": gflop / device.tflops * 1e3,
        "memory": counts["bytes"] / device.gigabytes_per_second / 1e3,
        "launches": counts["kernels"] * device.launch_microseconds,
    }
    return {"microseconds": bounds, "bound_by": max(bounds, key=bounds.get)}


def report(device, cases, make_config, make_data, make_state):
    """{case: {program: {seeds: counts and roofline}}}, printed on the way.

    cases: {name: (script, gflop of a config, settings)}. The rest are of speed.py: they say what is
    compiled.
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    jax.config.update("jax_default_matmul_precision", "float32")
    sharding = SingleDeviceSharding(describe(device).devices[0])
    found = {}
    print(f"{'':32}kernels  products  state copies      MB  bound by, at least")
    for case, (script, gflop, settings) in cases.items():
        for seeds in (1, 8):
            config = make_config(
                case, num_seeds=seeds, eval_interval=200, online_steps=250_000, **settings
            )
            data = jax.eval_shape(partial(make_data, script, num_seeds=seeds))
            state = jax.eval_shape(partial(make_state, script, config))
            for name, program, args, keywords, updates in programs(script, state, data, config):
                counts = examine(program, args, keywords, args[0], updates, sharding)
                work = gflop(config) * seeds if name != "iql" else 0
                line = counts | roofline(counts, work, DEVICES[device])
                found.setdefault(case, {}).setdefault(name, {})[str(seeds)] = line
                print(
                    f"{case + ', ' + name + f', {seeds} seeds':32}{line['kernels']:7.1f} "
                    f"{line['products']:9.1f} {line['state_copies']:13.1f} "
                    f"{line['bytes'] / 1e6:7.1f}  {line['bound_by']}, "
                    f"{max(line['microseconds'].values()):.0f} µs",
                    flush=True,
                )
    return found


def programs(script, state, data, config):
    """[(name, jitted program, arguments, keywords, updates a turn of its loop)], of shapes."""
    import jax

    unlabelled = data._replace(trusted=None)
    sizes = data.obs.shape[1], data.action.shape[1]
    iql = jax.eval_shape(jax.vmap(lambda key: script.iql_init(key, *sizes)), state.key)
    buffer = jax.eval_shape(lambda data: script.init_buffer(data, config), data)
    fixed, due = {"config": config}, {}
    if "update_actor" in script.online_step.__wrapped__.__code__.co_varnames:
        due = {"update_actor": True}  # TD3+BC's dearer kind; its scan makes one of either a turn
    step = lambda *args: script.online_step.__wrapped__(*args, **fixed, **due)
    totals = jax.eval_shape(step, state, {}, buffer, data)[1]
    return [
        ("train", script.train_interval, (state, data), fixed, 2 if due else 1),
        ("iql", script.iql_interval, (iql, unlabelled), fixed | {"num_updates": 200}, 1),
        ("online", script.online_step, (state, totals, buffer, data), fixed | due, 1),
    ]
