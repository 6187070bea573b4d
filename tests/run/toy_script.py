"""A script in miniature: a random walk in three phases, driven by Run as the real loops are."""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.data.dataset import Dataset, Normalizer
from common.run import InputError, Run, load_offline, prepare, save_checkpoint
from configs import ssar_td3bc


class State(NamedTuple):
    """Several kinds of leaves, of S seeds."""

    actor: dict  # {"w": [S, 3]}
    critic: jax.Array  # [S]
    optimizer: tuple  # with a count, and a part without arrays
    key: jax.Array  # typed keys [S]
    step: jax.Array  # [S]
    online_step: jax.Array  # [S]


class Buffer(NamedTuple):
    rows: jax.Array  # [S, C], the numbers of the steps stored
    added: jax.Array  # []


# Two episodes, of returns -3 and -2.
COLUMN, REWARDS = np.zeros(6), np.array([-1, -1, -1, 0, -1, -1], np.float32)
ENDS = np.array([0, 0, 1, 0, 0, 1], bool)
NORMALIZER = Normalizer(np.zeros(2, np.float32), np.ones(2, np.float32))
DATA = Dataset(COLUMN, COLUMN, REWARDS, COLUMN, COLUMN, ENDS, SimpleNamespace(id="Toy-v0"), "toy",
               NORMALIZER, "0" * 16)  # fmt: skip


def toy_config(**overrides):
    """Settings that run in a moment: three intervals of three calls."""
    config = ssar_td3bc.get_config()
    config.update(task="toy", num_seeds=2, offline_steps=36, eval_interval=12, updates_per_call=4)
    config.update(update_period=6, iql_steps=24, warmup_steps=5, checkpoint_minutes=0.0)
    config.update(selection="iql", batch_size=1, **overrides)
    return config


def init(config):
    seeds = jnp.arange(config.seed, config.seed + config.num_seeds)
    zeros = [jnp.zeros(config.num_seeds, jnp.int32) for _ in range(3)]
    keys = jax.vmap(jax.random.key)(seeds)
    weights = {"w": jax.vmap(partial(jax.random.normal, shape=(3,)))(keys)}
    return State(weights, seeds / 7, (zeros[0], ()), keys, *zeros[1:])


@partial(jax.jit, static_argnames=("size", "online"), donate_argnums=0)
def train(state, size, online=False):
    """`size` steps of a random walk, and two metrics [S]."""

    def one(_, state):
        keys, walks = jax.vmap(jax.random.split, out_axes=1)(state.key)
        noise = jax.vmap(partial(jax.random.normal, shape=(3,)))(walks)
        actor = {"w": 0.9 * state.actor["w"] + noise}
        count = (state.optimizer[0] + 1, ())
        critic = jnp.sin(state.critic + actor["w"].sum(1))
        return State(actor, critic, count, keys, state.step + 1, state.online_step + online)

    state = jax.lax.fori_loop(0, size, one, state)
    return state, {"critic_loss": state.critic + 2, "margin": state.actor["w"][:, 0]}


@jax.jit
def store(buffer, step):
    rows = buffer.rows.at[:, buffer.added % buffer.rows.shape[1]].set(step)
    return Buffer(rows, buffer.added + 1)


def play(state):
    """Three episodes a seed, whose returns are the weights."""
    returns = np.asarray(state.actor["w"], np.float64)
    return SimpleNamespace(returns=returns, success=np.full(returns.shape, np.nan))


def label(run, config):
    state = run.resume("iql", init(config), config.iql_steps)
    for step in run.steps(config.iql_steps, config.updates_per_call):
        state, metrics = train(state, config.updates_per_call)
        run.log(step, metrics)
        run.save(step, state)
    return np.asarray(state.actor["w"]) > -1


def pretrain(state, run, config):
    state = run.resume("offline", state, config.offline_steps)
    for end in range(config.eval_interval, config.offline_steps + 1, config.eval_interval):
        for step in run.steps(end, config.updates_per_call):
            state, metrics = train(state, config.updates_per_call)
            run.log(step, metrics)
            run.save(step, state)
        run.evaluate(end, partial(play, state), state.critic)
    return state


def finetune(state, run, config, met):
    buffer = Buffer(jnp.zeros((config.num_seeds, config.online_steps)), jnp.int32(0))
    state, buffer = run.resume("online", (state, buffer), config.online_steps)
    for end in range(0, config.online_steps + 1, config.eval_interval):
        for step in run.steps(end):
            buffer, metrics, finished = store(buffer, step), {}, []
            met(step, buffer)
            if step > config.warmup_steps:
                state, metrics = train(state, 1, online=True)
            if step % 5 == 0:
                finished = [{"step": step, "seed": config.seed + 1, "return": -2.0, "length": 5,
                             "success": float(step % 2)}]  # fmt: skip
            run.log(step, metrics, finished)
            run.save(step, (state, buffer))
        run.evaluate(end, partial(play, state), state.critic)
    return state


def main(config, workdir=None, resume=True, met=lambda *_: None):
    config, workdir = prepare(config, workdir, "toy_script", resume)
    run = Run("toy_script", workdir, config, DATA, resume)
    if config.offline_checkpoint:
        state, trusted = load_offline(config, DATA, jax.eval_shape(partial(init, config)))
    else:
        state, trusted = init(config), label(run, config)
        if not trusted.any():
            raise InputError("no row is trusted")
    if config.offline_steps and not config.offline_checkpoint:
        state = pretrain(state, run, config)
        if config.online_steps:
            save_checkpoint(run.workdir, "offline_checkpoint", state, trusted, DATA)
    if config.online_steps:
        state = finetune(state, run, config, met)
    save_checkpoint(run.workdir, "checkpoint", state, trusted, DATA)
    return run.finish(np.array([-1, 12]), trusted)
