"""Golden numbers: what the authors' PyTorch classes computed on small fixed inputs.

A case, golden/*.npz, is 8 updates on batches of 32 transitions with 5 observation and 3 action
dimensions: its batches, draws and hyper-parameters and, under f64/, what the authors' networks gave
in float64 after every update.
Uniform initial parameters are not stored, because NumPy's Mersenne Twister yields the same stream
as torch.manual_seed, bit for bit. The orthogonal kernels of CQL's critics are (init_cql*.npz).
"""

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from helpers import one_of

HERE = Path(__file__).parent / "golden"


def find_cases(prefix):
    """Paths of the cases whose file name starts with `prefix`."""
    return sorted(HERE.glob(f"{prefix}*.npz"))


def load_case(path):
    """The arrays of a case, and its hyper-parameters as a dict."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays["meta"]))["hyper_parameters"]


class TorchStream:
    """Tensor.uniform_ of PyTorch's CPU generator, and networks that are initialised with it."""

    def __init__(self, seed=0):
        self.generator = np.random.RandomState(seed)

    def uniform(self, shape, bound):
        """U(-bound, bound) in float32: 24 random bits, scaled and shifted with one rounding."""
        bits = self.generator.randint(0, 2**32, size=int(np.prod(shape)), dtype=np.uint32)
        unit = (bits & np.uint32(2**24 - 1)) * 2.0**-24
        low = np.float32(-bound)
        scaled = unit * np.float64(np.float32(bound) - low) + np.float64(low)
        return scaled.astype(np.float32).reshape(shape)

    def linear(self, fan_in, fan_out):
        """nn.Linear's default initialisation, kernel as (in, out)."""
        bound = 1 / np.sqrt(fan_in)
        kernel = self.uniform((fan_out, fan_in), bound).T
        return {"kernel": kernel, "bias": self.uniform((fan_out,), bound)}

    def mlp(self, *widths, layer_norm=False):
        pairs = zip(widths, widths[1:], strict=False)
        net = {f"Dense_{i}": self.linear(*pair) for i, pair in enumerate(pairs)}
        for i, width in enumerate(widths[1:-1] if layer_norm else ()):
            one, zero = np.ones(width, np.float32), np.zeros(width, np.float32)
            net[f"LayerNorm_{i}"] = {"scale": one, "bias": zero}
        return net

    def coefficient(self, *widths):
        """Linear layers, then all kernels again as Xavier-uniform; biases 0, the last 0.6931."""
        net = self.mlp(*widths)
        for layer, fan_in, fan_out in zip(net.values(), widths, widths[1:], strict=False):
            layer["kernel"] = self.uniform((fan_out, fan_in), np.sqrt(6 / (fan_in + fan_out))).T
            layer["bias"] = np.zeros(fan_out, np.float32)
        layer["bias"] += np.float32(0.6931)
        return net


def td3_parameters():
    """The initial networks of every td3_* case."""
    stream = TorchStream()
    return {
        "actor": stream.mlp(5, 256, 256, 3),
        "critic_1": stream.mlp(8, 256, 256, 1, layer_norm=True),
        "critic_2": stream.mlp(8, 256, 256, 1, layer_norm=True),
        "beta": stream.coefficient(5, 512, 512, 512, 1),
    }


def iql_parameters():
    """The initial networks of the iql case."""
    stream = TorchStream()
    shapes = {"critic_1": 8, "critic_2": 8, "value": 5}
    return {name: stream.mlp(width, 256, 256, 1) for name, width in shapes.items()}


def cql_parameters(antmaze=False):
    """The initial networks of the cql_* cases; with antmaze, the first critic has five layers."""
    stream, nets = TorchStream(seed=int(antmaze)), {}
    with np.load(HERE / f"init_cql{'_antmaze' * antmaze}.npz") as kernels:
        for name, depth in (("critic_1", 5 if antmaze else 3), ("critic_2", 3)):
            nets[name] = stream.mlp(8, *[256] * depth, 1, layer_norm=True)
            for i in range(depth + 1):
                kernel = kernels[f"{name}/layers_{i}/kernel"]
                nets[name][f"Dense_{i}"] = {"kernel": kernel, "bias": np.zeros_like(kernel[0])}
                stream.uniform(kernel.shape, 1)  # the normals it was made of
    nets["actor"] = stream.mlp(5, 256, 256, 256, 6)
    last = stream.uniform((6, 256), 0.01 * np.sqrt(6 / (256 + 6))).T
    nets["actor"]["Dense_3"] = {"kernel": last, "bias": np.zeros(6, np.float32)}
    nets["actor"]["log_std"] = np.array([1, -1], np.float32)
    nets["beta"] = stream.coefficient(5, 512, 512, 512, 1)
    return nets


def pair_of(nets):
    """Both critics as the scripts hold them: stacked, or a tuple where their depths differ."""
    pair = nets["critic_1"], nets["critic_2"]
    is_even = len(pair[0]) == len(pair[1])
    return jax.tree.map(lambda a, b: np.stack([a, b]), *pair) if is_even else pair


def by_authors_name(trees):
    """Flattens {field of the state: parameters or gradients}, as 'actor_target/layers_0/kernel'."""
    found = {}
    for field, tree in trees.items():
        name = field.removeprefix("target_").replace("coefficient", "beta")
        nets = {name: tree}
        if name == "critic":
            pair = tree if isinstance(tree, tuple) else (one_of(tree, 0), one_of(tree, 1))
            nets = {"critic_1": pair[0], "critic_2": pair[1]}
        suffix = "_target" * field.startswith("target_")
        nets = {f"{net}{suffix}": params for net, params in nets.items()}
        for key, x in flatten_dict(nets, sep="/").items():
            key = key.replace("Dense", "layers").replace("LayerNorm", "norm")
            found[key] = np.asarray(x)
            if key.endswith("log_std"):
                found[f"{key}_multiplier"], found[f"{key}_offset"] = found.pop(key)
    return found


def parameters(state):
    """All parameters of a state."""
    fields = [x for x in state._fields if x.startswith("target_") or f"{x}_opt" in state._fields]
    return by_authors_name({field: getattr(state, field) for field in fields})


def first_moments(state):
    """Adam's running means of all gradients."""
    fields = [field for field in state._fields if f"{field}_opt" in state._fields]
    means = {field: optax.tree.get(getattr(state, f"{field}_opt"), "mu") for field in fields}
    return by_authors_name(means)


@cache
def normals(seed, size):
    return np.random.RandomState(seed).standard_normal(size)


def parameter_stats(x, initial):
    """Eight checksums of a tensor: sums, projections on seeded normals, movement so far."""
    x, d = x.ravel().astype(float), (x - initial).ravel().astype(float)
    w0, w1 = normals(0, x.size), normals(1, x.size)
    return np.array(
        [x.sum(), abs(x).sum(), (x**2).sum(), x @ w0, x @ w1, abs(d).sum(), abs(d).max(), d @ w0]
    )


def probe(x):
    """Up to 32 evenly spaced entries of a tensor."""
    return x.ravel()[np.linspace(0, x.size - 1, min(x.size, 32)).astype(int)]


# Fractions of a key's largest golden value. Float32: the worst that the recording itself saw
# against float64, with room for another order of summation.
TOLERANCE = {
    "float64": {"log": 1e-9, "beta": 1e-9, "gradient": 1e-9, "parameter": 1e-8},
    "float32": {"log": 3e-5, "beta": 5e-6, "gradient": 2e-5, "parameter": 1e-5},
}


class Comparison:
    """Compares what an update computed with a case's float64 numbers, and remembers which."""

    def __init__(self, path, case, dtype, initial):
        self.name, self.case, self.dtype, self.initial = path.name, case, dtype, initial
        self.tolerance = TOLERANCE[dtype]
        self.compared, self.flipped, self.count = set(), [], 0

    def check(self, i, key, actual, kind):
        """Compares with f64/<key> where the authors produced it in update i."""
        golden = self.case.get(f"f64/{key}")
        if golden is None or not np.isfinite(golden[i]).all():
            return
        actual = np.ravel(actual).astype(float)
        golden = golden.reshape(len(golden), -1)[:, : len(actual)]
        scale = np.nanmax(np.abs(golden))
        if key.startswith("probe/"):
            scale = max(scale, 0.05)  # parameters: 5e-7 in float32 whatever their size
        atol, error = self.tolerance[kind] * scale, np.abs(actual - golden[i]).max()
        if self.dtype == "float32" and kind == "gradient" and atol < error < 1e-3 * scale:
            self.flipped.append((i, key))  # a ReLU whose input float32 cannot tell from zero
        else:
            assert error <= atol, f"{self.name} update {i + 1}: {key} off by {error / scale:.1e}"
        self.compared.add(key)
        self.count += 1

    def check_gradients(self, i, gradients):
        for key, x in gradients.items():
            self.check(i, f"grad_stats/{key}", parameter_stats(x, 0 * x)[:5], "gradient")
            self.check(i, f"grad_probe/{key}", probe(x), "gradient")

    def check_parameters(self, i, parameters):
        # Adam makes a near-zero gradient +-lr: the movement says nothing in float32.
        columns = 8 if self.dtype == "float64" else 5
        for key, x in parameters.items():
            stats = parameter_stats(x, self.initial[key])
            self.check(i, f"stats/{key}", stats[:columns], "parameter")
            self.check(i, f"probe/{key}", probe(x), "parameter")

    def finish(self):
        """Asserts that all that the authors produced was compared, and that flips were rare."""
        kinds = ("grad_stats", "grad_probe", "stats", "probe", "beta_net")
        prefixes = tuple(f"f64/{kind}/" for kind in kinds)
        recorded = [key for key in self.case if key.startswith(prefixes)]
        recorded = {key[4:] for key in recorded if np.isfinite(self.case[key]).any()}
        assert recorded <= self.compared
        assert len(self.flipped) <= 0.01 * self.count, self.flipped
