"""Golden numbers: what the authors' PyTorch classes computed on small fixed inputs.

Observations have 5 dimensions, actions 3, batches 32 rows; a case is 8 updates. Each
tests/golden/*.npz is one case: its batches, draws and hyper-parameters and, under f64/, what a
float64 run of the authors' networks gave after every update. SSAR_GOLDEN=<folder> tests every case
of another folder too. Uniform initial parameters are not stored: the authors drew them with
torch.manual_seed, and NumPy's Mersenne Twister yields the same stream, bit for bit. The orthogonal
kernels of CQL's critics are (init_cql*.npz).
"""

import glob
import json
import os
from functools import cache

import jax
import numpy as np

HERE = os.path.join(os.path.dirname(__file__), "golden")
FOLDERS = [HERE, *filter(None, [os.environ.get("SSAR_GOLDEN")])]


def find_cases(prefix):
    """Paths of the cases whose file name starts with `prefix`."""
    return [
        path
        for folder in FOLDERS
        for path in sorted(glob.glob(os.path.join(folder, f"{prefix}*.npz")))
    ]


def load_case(path):
    """The arrays of a case, and its hyper-parameters as a dict."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays["meta"]))["hyper_parameters"]


class TorchStream:
    """Tensor.uniform_ of PyTorch's CPU generator."""

    def __init__(self, seed=0):
        self.generator = np.random.RandomState(seed)

    def uniform(self, shape, bound):
        """U(-bound, bound) in float32: 24 random bits, scaled and shifted with one rounding."""
        bits = self.generator.randint(
            0, 2**32, size=int(np.prod(shape)), dtype=np.uint32
        ) & np.uint32(2**24 - 1)
        low, width = np.float32(-bound), np.float32(np.float32(bound) - np.float32(-bound))
        return (
            (bits * 2.0**-24 * np.float64(width) + np.float64(low))
            .astype(np.float32)
            .reshape(shape)
        )

    def linear(self, fan_in, fan_out):
        """nn.Linear's default initialisation, kernel as (in, out)."""
        bound = 1 / np.sqrt(fan_in)
        kernel = self.uniform((fan_out, fan_in), bound).T
        return {"kernel": kernel, "bias": self.uniform((fan_out,), bound)}

    def mlp(self, *widths, layer_norm=False):
        net = {
            f"layers_{i}": self.linear(*pair)
            for i, pair in enumerate(zip(widths, widths[1:], strict=False))
        }
        for i, width in enumerate(widths[1:-1] if layer_norm else ()):
            net[f"norm_{i}"] = {
                "scale": np.ones(width, np.float32),
                "bias": np.zeros(width, np.float32),
            }
        return net

    def coefficient(self, *widths):
        """Linear layers, then all kernels again as Xavier-uniform; biases 0, the last 0.6931."""
        net = self.mlp(*widths)
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
            kernel = self.uniform((fan_out, fan_in), np.sqrt(6 / (fan_in + fan_out))).T
            net[f"layers_{i}"] = {"kernel": kernel, "bias": np.zeros(fan_out, np.float32)}
        net[f"layers_{len(widths) - 2}"]["bias"] += np.float32(0.6931)
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
    return {
        "qf1": stream.mlp(8, 256, 256, 1),
        "qf2": stream.mlp(8, 256, 256, 1),
        "vf": stream.mlp(5, 256, 256, 1),
    }


def cql_parameters(antmaze=False):
    """The initial networks of the cql_* cases; with antmaze, the first critic has five layers."""
    with np.load(os.path.join(HERE, f"init_cql{'_antmaze' * antmaze}.npz")) as file:
        kernels = {key: file[key] for key in file.files}
    stream, nets = TorchStream(seed=int(antmaze)), {}
    for name, layers in (("critic_1", 5 if antmaze else 3), ("critic_2", 3)):
        widths = (8, *[256] * layers, 1)
        nets[name] = stream.mlp(*widths, layer_norm=True)
        for i, width in enumerate(widths[1:]):
            kernel = kernels[f"{name}/layers_{i}/kernel"]
            nets[name][f"layers_{i}"] = {"kernel": kernel, "bias": np.zeros(width, np.float32)}
            stream.uniform(kernel.shape, 1)  # the normals it was made of
    nets["actor"] = stream.mlp(5, 256, 256, 256, 6)
    last = stream.uniform((6, 256), 0.01 * np.sqrt(6 / (256 + 6))).T
    nets["actor"]["layers_3"] = {"kernel": last, "bias": np.zeros(6, np.float32)}
    nets["actor"] |= {"log_std_multiplier": np.float32(1), "log_std_offset": np.float32(-1)}
    nets["beta"] = stream.coefficient(5, 512, 512, 512, 1)
    return nets


def pack(net):
    """A network of {'layers_0': {'kernel', 'bias'}, 'norm_0': {'scale', 'bias'}, ...} as ours."""
    rename = lambda name: name.replace("layers", "Dense").replace("norm", "LayerNorm")
    packed = {rename(name): dict(x) for name, x in net.items() if isinstance(x, dict)}
    if "log_std_offset" in net:
        packed["log_std"] = np.stack([net["log_std_multiplier"], net["log_std_offset"]])
    return packed


def unpack(params):
    """The reverse of pack."""
    rename = lambda name: name.replace("Dense", "layers").replace("LayerNorm", "norm")
    net = {rename(name): x for name, x in params.items() if name != "log_std"}
    if "log_std" in params:
        net["log_std_multiplier"], net["log_std_offset"] = params["log_std"]
    return net


def members(pair):
    """The two networks of a pair, whether stacked or a tuple."""
    if isinstance(pair, tuple):
        return pair
    return tuple(jax.tree.map(lambda x, i=i: x[i], pair) for i in range(2))


def flatten(name, params):
    """{'actor/layers_0/kernel': NumPy array, ...} of a network, or {'log_alpha': array}."""
    if not isinstance(params, dict):
        return {name: np.asarray(params)}
    if "Dense_0" in params:
        params = unpack(params)
    return {
        key: x for child in params for key, x in flatten(f"{name}/{child}", params[child]).items()
    }


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


def gradient_stats(x):
    """The first five of them, for a gradient."""
    return parameter_stats(x, np.zeros_like(x))[:5]


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

    def __init__(self, path, case, dtype):
        self.name, self.case, self.dtype = os.path.basename(path), case, dtype
        self.initial, self.compared, self.flipped, self.count = {}, set(), [], 0

    def check(self, i, key, actual, kind, columns=None):
        """Compares with f64/<key> where the authors produced it in update i."""
        golden = self.case.get(f"f64/{key}")
        if golden is None or not np.isfinite(golden[i]).all():
            return
        golden = golden[..., :columns] if columns else golden
        scale = np.nanmax(np.abs(golden))
        if key.startswith("probe/"):
            scale = max(scale, 0.05)  # parameters: 5e-7 in float32 whatever their size
        actual, atol = np.asarray(actual).astype(float), TOLERANCE[self.dtype][kind] * scale
        error = np.abs(actual.reshape(golden[i].shape) - golden[i]).max()
        if self.dtype == "float32" and kind == "gradient" and atol < error < 1e-3 * scale:
            self.flipped.append((i, key))  # a ReLU whose input float32 cannot tell from zero
        else:
            assert error <= atol, f"{self.name} update {i + 1}: {key} off by {error / scale:.1e}"
        self.compared.add(key)
        self.count += 1

    def check_gradients(self, i, gradients):
        for key, x in gradients.items():
            self.check(i, f"grad_stats/{key}", gradient_stats(x), "gradient")
            self.check(i, f"grad_probe/{key}", probe(x), "gradient")

    def check_parameters(self, i, parameters):
        # Adam makes a near-zero gradient +-lr: the movement says nothing in float32.
        columns = 8 if self.dtype == "float64" else 5
        for key, x in parameters.items():
            stats = parameter_stats(x, self.initial[key.replace("_target", "")])
            self.check(i, f"stats/{key}", stats[:columns], "parameter", columns)
            self.check(i, f"probe/{key}", probe(x), "parameter")

    def finish(self):
        """Asserts that all that the authors produced was compared, and that flips were rare."""
        kinds = ("grad_stats", "grad_probe", "stats", "probe", "beta_net")
        recorded = {
            key[4:]
            for key in self.case
            if key.startswith(tuple(f"f64/{kind}/" for kind in kinds))
            and np.isfinite(self.case[key]).any()
        }
        assert recorded - self.compared == set()
        assert len(self.flipped) <= 0.01 * self.count, self.flipped


def adam_means(opt_state):
    """The running gradient means of the one Adam in an optimiser's state."""
    is_adam = lambda s: hasattr(s, "mu")
    (adam,) = filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam))
    return adam.mu
