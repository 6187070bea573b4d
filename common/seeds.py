"""Many seeds in one program: the only place that adds an axis of seeds, and that knows devices."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# For products of several seeds, XLA's search for the best Triton kernel takes minutes.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Seeds:
    """Runs functions that are written for one seed for `count` seeds at once.

    The seeds are spread evenly over the local devices, or over some of them.
    """

    def __init__(self, count: int):
        devices = jax.local_devices()
        used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
        mesh = Mesh(devices[:used], "seeds")
        self.count, self.is_one_cpu = count, used == 1 and devices[0].platform == "cpu"
        self.by_seed = NamedSharding(mesh, PartitionSpec("seeds"))
        self.on_all = NamedSharding(mesh, PartitionSpec())
        self.options = GPU_OPTIONS if count > 1 and devices[0].platform == "gpu" else None

    def spread(self, tree):
        """Arrays with a leading axis of seeds, [S, ...], on the devices of their seeds."""
        return jax.device_put(tree, self.by_seed)

    def share(self, tree):
        """Arrays that all seeds use, on every device."""
        return jax.device_put(tree, self.on_all)

    def vmap(self, function, in_axes=0, donate=(), is_loop=False):
        """jax.jit(jax.vmap(function, in_axes)) with `donate` as its donate_argnums.

        A CPU runs long loops (is_loop) faster one seed after the other. One seed needs no batching.
        Call the result outside of other jitted functions.
        """
        if self.count == 1 or (is_loop and self.is_one_cpu):
            function = jax.custom_batching.sequential_vmap(function)
        function = jax.vmap(function, in_axes)
        return jax.jit(function, donate_argnums=donate, compiler_options=self.options)
