"""What the tests of both scripts share: settings, states, and stubs of Run and Collector."""

from functools import partial
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ACTION, OBS, arrays, frozen

import ssar_cql
import ssar_td3bc
from common.evaluation import Collector

both_scripts = pytest.mark.parametrize("ssar", [ssar_td3bc, ssar_cql], ids=["td3bc", "cql"])
slow_cql = pytest.param(ssar_cql, marks=pytest.mark.slow)  # compiles for long
both_but_cql_slowly = pytest.mark.parametrize("ssar", [ssar_td3bc, slow_cql], ids=["td3bc", "cql"])


def settings(ssar, **overrides):
    """Tiny settings for one of the scripts."""
    return frozen(script=ssar.__name__, **overrides)


def one_of(tree, i=0):
    """A tree with entry i of every array."""
    return jax.tree.map(lambda x: x[i], tree)


def new_states(ssar, config, count):
    """The TrainStates of seeds 0, 1, ..., with a leading axis of seeds."""
    init = partial(ssar.init_state, obs_dim=OBS, action_dim=ACTION, config=config)
    keys = jnp.stack([jax.random.key(seed) for seed in range(count)])
    return jax.jit(jax.vmap(init))(keys)


def new_state(ssar, config):
    """The TrainState of one seed."""
    return one_of(new_states(ssar, config, 1))


def batch_of(ssar, seed=0, rows=32, trusted=None):
    """A random batch; `trusted` is a 0/1 sequence, by default about half of the rows."""
    rng = np.random.default_rng(seed)
    trusted = rng.random(rows) < 0.5 if trusted is None else trusted
    return ssar.Transition(
        obs=jnp.asarray(rng.standard_normal((rows, OBS)), jnp.float32),
        action=jnp.asarray(np.tanh(rng.standard_normal((rows, ACTION))), jnp.float32),
        reward=jnp.asarray(rng.standard_normal(rows), jnp.float32),
        next_obs=jnp.asarray(rng.standard_normal((rows, OBS)), jnp.float32),
        terminated=jnp.asarray(rng.random(rows) < 0.1, jnp.float32),
        trusted=jnp.asarray(trusted, jnp.float32),
    )


def actor_is_due(ssar, due=True):
    """The keyword that only TD3+BC's update takes."""
    return {"update_actor": due} if ssar is ssar_td3bc else {}


def jitted_update(ssar, config):
    """update_step(state, batch, noise, ...), which moves the actor unless update_actor=False."""
    update = partial(ssar.update_step, config=config, **actor_is_due(ssar))
    return jax.jit(update, static_argnames=("online", *actor_is_due(ssar)))


def set_up(ssar, config, **options):
    """A new state, a batch with these options, its noise, and the jitted update."""
    state, batch = new_state(ssar, config), batch_of(ssar, **options)
    noise = ssar.sample_noise(jax.random.key(1), batch, config)
    return state, batch, noise, jitted_update(ssar, config)


def assert_close(a, b, rtol, atol):
    """All arrays of two trees are close."""
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=rtol, atol=atol)


def evaluate(act, actor):
    """Stands in for an Evaluator: the actions of every seed at three observations."""
    return act(actor, jnp.ones((len(jax.tree.leaves(actor)[0]), 3, OBS)))


class StubRun:
    """A run without a folder. It remembers the metrics that it was given, by phase."""

    save = lambda self, step, tree: None
    evaluate = lambda self, step, play, n: play()
    log = lambda self, step, metrics, finished=(): self.metrics[self.phase].append(metrics)

    def __init__(self):
        self.metrics = {}

    def resume(self, phase, tree, total):
        self.step, self.phase, self.metrics[phase] = 0, phase, []
        return tree

    def steps(self, until, size=1):
        while self.step < until:
            self.step += size
            yield self.step


def walks(seeds):
    """A Collector: a Walk for each seed."""
    spec = gymnasium.spec("ssar-test/Walk-v0")
    data = SimpleNamespace(env=spec, observation_keys=None, normalizer=np.float32)
    return Collector(data, seeds, seed=0)
