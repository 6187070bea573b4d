"""Golden numbers: what the authors' PyTorch classes computed on small fixed inputs.

Observations have 5 dimensions, actions 3, batches 32 rows; a case is 8 updates. Each
tests/golden/*.npz is one case: its batches, draws and hyper-parameters and, under f64/, what a
float64 run of the authors' networks gave after every update. SSAR_GOLDEN=<folder> tests every case
of another folder too. Initial parameters are not stored: the authors drew them with
torch.manual_seed(0), and NumPy's Mersenne Twister yields the same stream, bit for bit.
"""

import glob
import json
import os

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


def flatten(name, params):
    """{'actor/layers_0/kernel': array, ...} of one network."""
    return {
        f"{name}/{layer}/{leaf}": np.asarray(x)
        for layer, leaves in params.items()
        for leaf, x in leaves.items()
    }


def parameter_stats(x, initial):
    """Eight checksums of a tensor: sums, projections on seeded normals, movement so far."""
    x, d = x.ravel().astype(np.float64), (x - initial).ravel().astype(np.float64)
    w0, w1 = (np.random.RandomState(seed).standard_normal(x.size) for seed in (0, 1))
    return np.array(
        [x.sum(), abs(x).sum(), (x**2).sum(), x @ w0, x @ w1, abs(d).sum(), abs(d).max(), d @ w0]
    )


def gradient_stats(x):
    """The first five of them, for a gradient."""
    return parameter_stats(x, np.zeros_like(x))[:5]


def probe(x):
    """Up to 32 evenly spaced entries of a tensor."""
    return x.ravel()[np.linspace(0, x.size - 1, min(x.size, 32)).astype(int)]
