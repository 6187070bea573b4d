r"""SSAR on TD3+BC: selective state-adaptive regularization for offline RL (arXiv 2505.19923).

TD3+BC weighs improvement against cloning the data with one constant. SSAR learns that constant per
state: a network β_φ(s) that falls where the data's actions are likely under the policy and rises
where they are not, shaped only by the part D̂ of the data that can be trusted.

    D̂ ⊂ D: trajectories of return > G_T, or successful ones, or rows of IQL advantage ≥ 0
    every update, on a batch (s, a, r, s', d) of D:
        a' = clip(π_target(s') + clip(noise, -c, c), -1, 1)
        y  = r + γ (1 - d) min_i Q_target_i(s', a')
        Q_i: Adam on mean (Q_i(s, a) - y)²
        every policy_freq updates:
            π: Adam on -mean Q_1(s, π(s)) / mean |Q_1| + mean β_φ(s) (π(s) - a)²
            margin = (σn)² - mean_dims min((π(s) - a)², 1), for log π(a|s) - C_n(s)      (Eq. 6)
            β_φ: Adam on mean margin · β_φ(s) over D̂                                  (Eq. 5, 9)
            every T_inc updates: n += (n_end - n_start) / 10,
                until the mean margin over D̂ is > 0 once; n never moves again          (Sec. 3.2)
            targets: 0.005 new + 0.995 old
    online, every seed in an environment of its own, after every step of it:
        store (s, a, r, s', d) as trusted; after warmup_steps, one update as above on offline rows
        (all of D | half a batch | its part of 50 best episodes | none) and stored ones, but with
        β_φ and n frozen, β_φ times max(1 - N / N_end, 0) after N such updates, and new_policy_freq

    symbol  config field      authors' name    in        meaning
    β_φ     coefficient       ParaNet, beta    Eq. 5, 9  adaptive: a network; fixed: plain TD3+BC
    β_init  coefficient_init  1 / alpha                  β_φ starts there, stays in (0, 1.5 β_init)
    n       n_start, n_end    n_away           Eq. 6     how many σ C_n lies from π(s); it grows
    T_inc   update_period     update_period    Sec. 3.2  updates between two tests of the threshold
    σ       expl_noise        expl_noise       Eq. 6     width of the Gaussian that π is read as
    D̂       selection         trusts           Eq. 9     none (all of D) | return | success | iql
    G_T     return_threshold  ref_return                 return above which a trajectory is trusted
            select_actions    select_actions   Eq. 9     only D̂ shapes β_φ and the threshold
            loosen_bound      loosen_bound               only D̂ is cloned
            expectile         iql_tau                    the IQL's expectile, for selection = iql
    c, γ    noise_clip, discount                         TD3's
    N_end   decay_steps       decay_steps                online updates until β_φ has faded
            buffer_init       load_way                   all | half | part | none

Where paper and authors' code differ, the code is followed, for it made the published numbers: β_φ
multiplies the cloning term and the Q term is normalised by its mean size alone; D̂ masks the β_φ
loss but the mean is over the whole batch; n is tested on single batches.
Deviations from that code: the annealing stops at 0 instead of going negative; beta_min, beta_mean
and beta_max are taken over the rows that are cloned, without zeros for the rest; a step that ends
the task at the time limit is a terminal; stored rows never overwrite offline ones; every row stored
online is trusted; evaluation has environments of its own.

    python ssar_td3bc.py
    python ssar_td3bc.py --config=configs/ssar_td3bc.py:hopper-medium-v2 --config.num_seeds=5
    python ssar_td3bc.py --config.offline_checkpoint=runs/ssar_td3bc/hopper-medium-v2/0 \
        --config.online_steps=250000
"""

import math
import os
import time
from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from common.checkpoint import Checkpoints, load_offline, save_checkpoint
from common.checks import InputError, check_config, check_workdir
from common.cli import run
from common.dataset import (
    Fingerprint,
    best_episodes,
    cached_labels,
    episode_lengths,
    episode_returns,
    fit_normalizer,
)
from common.diagnosis import check_labelling
from common.evaluation import Collector, Evaluator
from common.loading import load_dataset
from common.report import RunLog, progress
from common.stopping import wait_for

# ------------------------------------------------------------------------------- data structures


class Transition(NamedTuple):
    """A batch of transitions. The data set is one too, with N rows for B."""

    obs: jax.Array  # [B, O] standardised
    action: jax.Array  # [B, A] in [-1, 1]
    reward: jax.Array  # [B]
    next_obs: jax.Array  # [B, O]
    terminated: jax.Array  # [B] 1 where the task ended; a time limit is no end
    trusted: jax.Array  # [B] 1 in D̂


class Noise(NamedTuple):
    """Every random number of one update: with it given, the update is deterministic."""

    target_action: jax.Array  # [B, A] N(0, 1)


class Threshold(NamedTuple):
    """The width of C_n(s), and the update at which it stopped growing."""

    n: jax.Array  # []
    stopped_at: jax.Array  # [] i32, -1 while growing


class TrainState(NamedTuple):
    """All that training changes. With several seeds, every leaf has a leading axis [S]."""

    actor: dict
    target_actor: dict
    critic: dict  # a pair, stacked: leaves [2, ...]
    target_critic: dict
    coefficient: dict
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    coefficient_opt: optax.OptState
    threshold: Threshold
    step: jax.Array  # [] i32, updates so far
    online_step: jax.Array  # [] i32, those of them online
    key: jax.Array  # [] PRNG key


class ReplayBuffer(NamedTuple):
    """What every seed met online, C rows of each at most: when full, the oldest is overwritten."""

    rows: Transition  # [S, C, ...]
    added: jax.Array  # [] i32, rows written so far


# -------------------------------------------------------------------------------------- networks


def dense(width, fan_in, kernel_init=None):
    """nn.Dense as PyTorch starts it, U(-1, 1) / √fan_in; with a kernel_init, biases start at 0."""
    if kernel_init is not None:
        return nn.Dense(width, kernel_init=kernel_init)
    bound = fan_in**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    return nn.Dense(width, kernel_init=uniform, bias_init=uniform)


class MLP(nn.Module):
    """Linear layers with ReLUs between them, and a LayerNorm before each ReLU if asked for."""

    widths: tuple[int, ...]
    layer_norm: bool = False
    kernel_inits: tuple = ()  # one a layer; by default PyTorch's

    @nn.compact
    def __call__(self, x):
        kernel_inits = self.kernel_inits or (None,) * len(self.widths)
        for i, (width, kernel_init) in enumerate(zip(self.widths, kernel_inits, strict=True)):
            if i > 0:
                x = nn.relu(nn.LayerNorm(epsilon=1e-5)(x) if self.layer_norm else x)
            x = dense(width, x.shape[-1], kernel_init)(x)
        return x


def forward(params, x):
    """The MLP that `params` belong to, whatever its widths."""
    depth = sum(name.startswith("Dense") for name in params)
    widths = tuple(params[f"Dense_{i}"]["kernel"].shape[-1] for i in range(depth))
    return MLP(widths, layer_norm="LayerNorm_0" in params).apply({"params": params}, x)


def actor(params, obs):
    """π(s): [B, O] -> [B, A], in [-1, 1]."""
    return jnp.tanh(forward(params, obs))


def critic(params, obs, action):
    """Q(s, a): [B, O], [B, A] -> [B]."""
    return forward(params, jnp.concatenate([obs, action], axis=-1))[..., 0]


def critics(pair, obs, action):
    """Both Q, of stacked parameters: [B, O], [B, A] -> [2, B]."""
    # Inputs repeated, as to share them would cost copies from layout to layout.
    obs, action = (jnp.broadcast_to(x, (2, *x.shape)) for x in (obs, action))
    return jax.vmap(critic)(pair, obs, action)


def coefficient(params, obs, config):
    """β_φ(s): [B, O] -> [B], in (0, 1.5 β_init); float32 always, as its steps are that fine."""
    with jax.default_matmul_precision("float32"):
        return 1.5 * config.coefficient_init * nn.sigmoid(forward(params, obs)[..., 0])


def init_mlp(key, in_dim, widths, **options):
    """Parameters of an MLP, [., in_dim] -> [., widths[-1]]."""
    return MLP(widths, **options).init(key, jnp.zeros((1, in_dim)))["params"]


def init_pair(key, in_dim, widths, **options):
    """Parameters of two critics, stacked."""
    return jax.vmap(lambda key: init_mlp(key, in_dim, widths, **options))(jax.random.split(key))


def init_coefficient(key, obs_dim, hidden_dims):
    """β_φ's parameters: Xavier-uniform, biases 0, the last 0.6931, at which 1.5 sigmoid is 1."""
    kernel_inits = (nn.initializers.xavier_uniform(),) * (len(hidden_dims) + 1)
    params = init_mlp(key, obs_dim, (*hidden_dims, 1), kernel_inits=kernel_inits)
    params[f"Dense_{len(hidden_dims)}"]["bias"] += 0.6931
    return params


def descend(loss, params, optimizer, opt_state, *args):
    """One optimiser step down `loss(params, *args) -> (scalar, info)`."""
    grads, info = jax.grad(loss, has_aux=True)(params, *args)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, info


def over_seeds(one_seed, shared, *args, is_loop=False):
    """one_seed(shared, *args) under vmap over the seed axis of `args`; with a mesh, on its devices.

    A CPU does best unbatched: one seed alone, and loops (is_loop), which outweigh the copies that
    this makes of `args`, one seed after the other.
    """

    def seeds_of_device(shared, *args):
        if len(jax.tree.leaves(args)[0]) == 1:
            alone = jax.tree.map(lambda x: x[0], args)
            return jax.tree.map(lambda x: x[None], one_seed(shared, *alone))
        if is_loop and jax.default_backend() == "cpu":
            return jax.lax.map(lambda args: one_seed(shared, *args), args)
        return jax.vmap(partial(one_seed, shared))(*args)

    if jax.sharding.get_abstract_mesh().empty:
        return seeds_of_device(shared, *args)
    seeds, everywhere = PartitionSpec("seeds"), PartitionSpec()
    specs = (everywhere, *[seeds] * len(args))
    run = jax.shard_map(seeds_of_device, in_specs=specs, out_specs=seeds, check_vma=False)
    return run(shared, *args)


@jax.jit
def broken_parts(state):
    """Whether a number in it is not finite, of every part of a state: {part: bool [S]}."""
    broken = lambda part: ~jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(part)]).all()
    parts = state._replace(key=())._asdict()
    return jax.vmap(lambda parts: {name: broken(part) for name, part in parts.items()})(parts)


def use_devices(num_seeds):
    """Sets JAX's mesh to as many devices as share the seeds evenly; one device needs no mesh."""
    count = max(n for n in range(1, jax.local_device_count() + 1) if num_seeds % n == 0)
    if count > 1:
        kinds = (jax.sharding.AxisType.Auto,)
        devices = jax.local_devices()[:count]
        jax.set_mesh(jax.make_mesh((count,), ("seeds",), axis_types=kinds, devices=devices))


def on_devices(tree, *axes):
    """`tree` on every device of the mesh, or, with "seeds", on each its share of the seed axis."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*axes)))


def take(data, rows):
    """The transitions at `rows`, all of them within bounds."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), data)


# --------------------------------------------------------------------- the trusted sub-dataset D̂


def select_by_return(rewards, ends, return_threshold):
    """D̂ for dense rewards: trajectories whose undiscounted return is above G_T. bool [N]."""
    return np.repeat(episode_returns(rewards, ends) > return_threshold, episode_lengths(ends))


def select_by_success(rewards, ends, fail_reward):
    """D̂ for sparse rewards: trajectories whose last reward is not the failing one. bool [N]."""
    return np.repeat(rewards[ends] != np.float32(fail_reward), episode_lengths(ends))


class IQLState(NamedTuple):
    """Implicit Q-learning, trained only to label D̂."""

    value: dict
    critic: chex.ArrayTree  # a pair
    target_critic: chex.ArrayTree
    value_opt: optax.OptState
    critic_opt: optax.OptState
    key: jax.Array


iql_adam = optax.adam(3e-4)
IQL_INTERVAL = 1_000  # updates in one program; after it a checkpoint may be written


def iql_init(key, obs_dim, action_dim):
    """One V and two Q of 2 x 256 units, without LayerNorm."""
    key, value_key, critic_key = jax.random.split(key, 3)
    value = init_mlp(value_key, obs_dim, (256, 256, 1))
    pair = init_pair(critic_key, obs_dim + action_dim, (256, 256, 1))
    target = jax.tree.map(jnp.copy, pair)
    return IQLState(value, pair, target, iql_adam.init(value), iql_adam.init(pair), key)


def iql_value_loss(params, state, batch, config):
    """Expectile regression of V(s) on the target critics' min Q(s, a)."""
    q = critics(state.target_critic, batch.obs, batch.action).min(axis=0)
    error = q - forward(params, batch.obs)[..., 0]
    weight = jnp.where(error > 0, config.expectile, 1 - config.expectile)
    loss = (weight * jnp.square(error)).mean()
    return loss, {"iql_value_loss": loss}


def iql_critic_loss(params, next_value, batch, config):
    """Regression of both Q(s, a) on r + γ (1 - d) V(s')."""
    target = batch.reward + config.discount * (1 - batch.terminated) * next_value
    loss = jnp.square(critics(params, batch.obs, batch.action) - target).mean()
    return loss, {"iql_critic_loss": loss}


def iql_step(state, batch, config):
    """One IQL update: V, then Q with the V(s') from before V's step, then the targets."""
    next_value = forward(state.value, batch.next_obs)[..., 0]
    value, value_opt, info = descend(
        iql_value_loss, state.value, iql_adam, state.value_opt, state, batch, config
    )
    pair, critic_opt, critic_info = descend(
        iql_critic_loss, state.critic, iql_adam, state.critic_opt, next_value, batch, config
    )
    target = optax.incremental_update(pair, state.target_critic, config.target_update_rate)
    state = IQLState(value, pair, target, value_opt, critic_opt, state.key)
    return state, info | critic_info


@partial(jax.jit, static_argnames=("config", "num_updates"), donate_argnames="state")
def iql_interval(state, data, config, num_updates):
    """`num_updates` IQL updates of every seed in one scan. state [S, ...] is donated.

    Returns the state; the mean of every loss, [S] each; and of every loss the first of these
    updates at which it was not finite, [S] i32, 0 for none.
    """

    def one_seed(data, state):
        key, index_key = jax.random.split(state.key)
        shape = (num_updates, config.batch_size)
        indices = jax.random.randint(index_key, shape, 0, len(data.reward))
        body = lambda state, rows: iql_step(state, take(data, rows), config)
        state, info = jax.lax.scan(body, state._replace(key=key), indices)
        first = lambda bad: jnp.where(bad.any(), 1 + bad.argmax(), 0)
        broke = jax.tree.map(lambda x: first(~jnp.isfinite(x)), info)
        return state, jax.tree.map(jnp.mean, info), broke

    return over_seeds(one_seed, data, state, is_loop=True)


@jax.jit
def select_by_advantage(state, data):
    """D̂ by IQL: rows with min(Q_1, Q_2)(s, a) >= V(s), not by the targets. bool [S, N]."""
    num_rows = len(data.reward)
    size = min(4096, num_rows)
    starts = jnp.minimum(jnp.arange(0, num_rows, size), num_rows - size)  # the last overlaps
    places = starts[:, None] + jnp.arange(size)

    def one_seed(data, state):
        def trusted(start):
            # Slices, where mapping over the data would copy them.
            rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), data)
            q = critics(state.critic, rows.obs, rows.action).min(axis=0)
            return q >= forward(state.value, rows.obs)[..., 0]

        return jnp.zeros(num_rows, bool).at[places].set(jax.lax.map(trusted, starts))

    return over_seeds(one_seed, data, state, is_loop=True)


def label_by_iql(keys, data, config, folder=None):
    """Trains one IQL a seed for `iql_steps` updates and selects by its advantage. bool [S, N].

    folder: of checkpoints, from the last of which it goes on; None for none.
    """
    # Training splits the same keys: a tag that no split reaches keeps the two apart.
    keys = jax.vmap(partial(jax.random.fold_in, data=2**32 - 1))(keys)
    sizes = data.obs.shape[1], data.action.shape[1]
    state = jax.jit(jax.vmap(lambda key: iql_init(key, *sizes)))(keys)
    state = on_devices(state, "seeds")
    checkpoints = Checkpoints(folder, config.checkpoint_minutes, is_needed=False)
    state, done = checkpoints.resume(state)
    with progress(config.iql_steps, "iql", done=done) as bar:
        while done < config.iql_steps:
            num_updates = min(IQL_INTERVAL, config.iql_steps - done)
            state, info, broke = wait_for(iql_interval(state, data, config, num_updates))
            check_labelling(done, num_updates, broke, broken_parts(state), config)
            done += num_updates
            means = {name: f"{value.mean():.3g}" for name, value in info.items()}
            bar.set_postfix(means, refresh=False)
            bar.update(num_updates)
            if checkpoints.due():
                checkpoints.save(done, state)
    return np.asarray(select_by_advantage(state, data))


def select_trusted(data, ends, keys, data_fingerprint, config):
    """D̂ as `config.selection` builds it: bool [S, N]. Raises InputError when it is empty."""
    rewards = np.asarray(data.reward)
    unused = config.offline_steps == 0 and config.buffer_init == "none"
    if config.coefficient == "fixed" or unused:
        trusted = np.ones(len(rewards), bool)  # the plain algorithm regularises everywhere
    elif config.selection == "iql":
        name = [data_fingerprint, "seed", config.seed, config.num_seeds, "tau", config.expectile]
        name += ["updates", config.iql_steps, IQL_INTERVAL, config.batch_size]
        name += ["rates", config.discount, config.target_update_rate, config.matmul_precision]
        label = partial(label_by_iql, keys, data, config)
        shape = (config.num_seeds, len(rewards))
        trusted = cached_labels(config.cache_dir, name, shape, label)
    elif config.selection == "return":
        trusted = select_by_return(rewards, ends, config.return_threshold)
    elif config.selection == "success":
        trusted = select_by_success(rewards, ends, fail_reward=config.reward_bias)
    else:
        trusted = np.ones(len(rewards), bool)
    if len(rewards) and not trusted.any(axis=-1).all():
        best, bound = episode_returns(rewards, ends).max(), config.return_threshold
        mend = {
            "return": f"lower --config.return_threshold={bound} below the best return, {best:.1f}",
            "success": f"no episode ends in another reward than {config.reward_bias}",
            "iql": "lower --config.expectile or raise --config.iql_steps",
        }
        raise InputError(
            f"selection={config.selection} trusts nothing in {config.dataset}: "
            f"{mend[config.selection]}, or choose another --config.selection"
        )
    return np.broadcast_to(trusted, (config.num_seeds, len(rewards)))


# ---------------------------------------------------------------------------------------- losses


def critic_loss(params, state, batch, noise, config):
    """TD error of both critics against the smoothed, pessimistic target of TD3."""
    smoothing = config.policy_noise * noise.target_action
    smoothing = jnp.clip(smoothing, -config.noise_clip, config.noise_clip)
    next_action = jnp.clip(actor(state.target_actor, batch.next_obs) + smoothing, -1, 1)
    next_q = critics(state.target_critic, batch.next_obs, next_action).min(axis=0)
    target = batch.reward + config.discount * (1 - batch.terminated) * next_q  # [B]
    q = critics(params, batch.obs, batch.action)  # [2, B]
    chex.assert_equal_shape([target, q[0]])
    loss = sum(jnp.square(q - target).mean(axis=1))
    return loss, {"critic_loss": loss, "q1": q.mean(axis=1)[0]}


def actor_loss(params, state, batch, weight, config):
    """Normalised Q plus the cloning error, the latter weighted by `weight` [B]."""
    action = actor(params, batch.obs)
    q = critic(jax.tree.map(lambda x: x[0], state.critic), batch.obs, action)  # [B]
    squared_error = jnp.square(action - batch.action)  # [B, A]
    chex.assert_equal_shape([q, weight])
    scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    loss = -q.mean() / scale + (weight[:, None] * squared_error).mean()
    return loss, {"actor_loss": loss, "squared_error": squared_error}


def log_likelihood_margin(squared_error, threshold, config):
    """log π(a|s) - C_n(s) for a Gaussian of width σ, up to a factor: [B, A] -> [B] (Eq. 6)."""
    return (config.expl_noise * threshold.n) ** 2 - jnp.minimum(squared_error, 1).mean(axis=-1)


def coefficient_loss(params, batch, margin, rows, config):
    """Lowers β_φ where the margin [B] is positive and raises it where negative (Eq. 5, 9)."""
    beta = coefficient(params, batch.obs, config)
    chex.assert_equal_shape([beta, margin, rows])
    return (margin * rows * beta).mean(), {}


def update_threshold(threshold, margin, rows, step, config):
    """Widens C_n every T_inc updates until the mean margin of `rows` is positive (Sec. 3.2)."""
    check = (step % config.update_period == 0) & (threshold.stopped_at < 0)
    passed = (margin * rows).sum() > 0  # the sign of their mean; no rows do not pass
    wider = jnp.minimum(threshold.n + (config.n_end - config.n_start) / 10, config.n_end)
    return Threshold(
        n=jnp.where(check & ~passed, wider, threshold.n),
        stopped_at=jnp.where(check & passed, step, threshold.stopped_at),
    )


def anneal_factor(online_step, config):
    """What the frozen β_φ is multiplied with after N online updates: from 1 at 0 to 0 at N_end."""
    if config.anneal == "none" or config.decay_steps <= 0:
        return 1.0
    done = jnp.clip(jnp.asarray(online_step, float) / config.decay_steps, 0, 1)
    return 1 - done if config.anneal == "linear" else jnp.maximum(jnp.cos(done * jnp.pi / 2), 0)


# -------------------------------------------------------------------------- state and its update


def optimizers(config):
    """Adam for actor, critics and β_φ; β_φ's gradient is clipped to norm 0.5 as PyTorch clips."""
    factor = lambda grads: jnp.minimum(1, 0.5 / (optax.tree.norm(grads) + 1e-6))
    clip = optax.stateless(lambda grads, _: optax.tree.scale(factor(grads), grads))
    beta_adam = optax.chain(clip, optax.adam(config.coefficient_lr))
    return optax.adam(config.actor_lr), optax.adam(config.critic_lr), beta_adam


def init_state(key, obs_dim, action_dim, config):
    """One seed before its first update. Targets are copies: donation overwrites both."""
    key, actor_key, critic_key, beta_key = jax.random.split(key, 4)
    policy = init_mlp(actor_key, obs_dim, (*config.hidden_dims, action_dim))
    pair = init_pair(critic_key, obs_dim + action_dim, (*config.hidden_dims, 1), layer_norm=True)
    beta = init_coefficient(beta_key, obs_dim, config.coefficient_hidden_dims)
    actor_adam, critic_adam, beta_adam = optimizers(config)
    return TrainState(
        actor=policy,
        target_actor=jax.tree.map(jnp.copy, policy),
        critic=pair,
        target_critic=jax.tree.map(jnp.copy, pair),
        coefficient=beta,
        actor_opt=actor_adam.init(policy),
        critic_opt=critic_adam.init(pair),
        coefficient_opt=beta_adam.init(beta),
        threshold=Threshold(n=jnp.asarray(config.n_start, float), stopped_at=jnp.int32(-1)),
        step=jnp.int32(0),
        online_step=jnp.int32(0),
        key=key,
    )


def sample_noise(key, batch, config):
    """The random numbers of one update."""
    return Noise(target_action=jax.random.normal(key, batch.action.shape))


def update_step(state, batch, noise, config, *, update_actor=None, online=False):
    """One update: the critics, and every policy_freq-th time the actor, β_φ, threshold and targets.

    update_actor: whether this is such a time, static; None leaves it to the state's counter.
    online: whether β_φ and n are frozen, β_φ annealed, and new_policy_freq holds; static.
    Returns the new state and scalars, NaN for what the counter left out.
    """
    state = state._replace(step=state.step + 1, online_step=state.online_step + online)

    # --- critics ---
    _, critic_adam, _ = optimizers(config)
    pair, critic_opt, info = descend(
        critic_loss, state.critic, critic_adam, state.critic_opt, state, batch, noise, config
    )
    state = state._replace(critic=pair, critic_opt=critic_opt)

    # --- the delayed rest ---
    delayed = partial(update_policy, batch=batch, config=config, online=online)
    if update_actor is None:
        nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), jax.eval_shape(delayed, state)[1])
        policy_freq = config.new_policy_freq if online else config.policy_freq
        due = state.step % policy_freq == 0
        state, delayed_info = jax.lax.cond(due, delayed, lambda state: (state, nan), state)
        return state, info | delayed_info
    if update_actor:
        state, delayed_info = delayed(state)
        return state, info | delayed_info
    return state, info


def update_policy(state, batch, config, online):
    """Actor, then β_φ and the threshold unless online, then all targets."""
    actor_adam, _, beta_adam = optimizers(config)
    everywhere = jnp.ones_like(batch.trusted)
    adaptive = config.coefficient == "adaptive"

    # --- actor: cloning, weighted by β_φ, on D̂ alone if loosen_bound ---
    if adaptive:
        beta = coefficient(state.coefficient, batch.obs, config)
        regularised = batch.trusted if config.loosen_bound else everywhere
    else:
        beta, regularised = config.coefficient_init * everywhere, everywhere
    anneal = anneal_factor(state.online_step, config) if online else 1.0
    weight = beta * regularised * anneal
    policy, actor_opt, info = descend(
        actor_loss, state.actor, actor_adam, state.actor_opt, state, batch, weight, config
    )

    # --- β_φ and threshold: with the errors of the actor before its step, and the old n ---
    margin = log_likelihood_margin(info.pop("squared_error"), state.threshold, config)
    rows = batch.trusted if config.select_actions else everywhere
    if adaptive and not online:
        beta_params, beta_opt, _ = descend(
            coefficient_loss, state.coefficient, beta_adam, state.coefficient_opt,
            batch, margin, rows, config,
        )  # fmt: skip
        threshold = update_threshold(state.threshold, margin, rows, state.step, config)
        state = state._replace(
            coefficient=beta_params, coefficient_opt=beta_opt, threshold=threshold
        )

    # --- targets ---
    rate = config.target_update_rate
    state = state._replace(
        actor=policy,
        actor_opt=actor_opt,
        target_actor=optax.incremental_update(policy, state.target_actor, rate),
        target_critic=optax.incremental_update(state.critic, state.target_critic, rate),
    )
    regularised = jnp.where(regularised.any(), regularised, everywhere) > 0
    return state, info | {
        "beta_min": beta.min(where=regularised, initial=jnp.inf),
        "beta_mean": beta.mean(where=regularised),
        "beta_max": beta.max(where=regularised, initial=0),
        "margin": margin.mean(),
        "trusted_margin": (margin * rows).sum() / jnp.maximum(rows.sum(), 1),
        "constrained_fraction": (margin < 0).mean(dtype=margin.dtype),
        "trusted_fraction": batch.trusted.mean(),
        "anneal": jnp.asarray(anneal, margin.dtype),
    }


# --------------------------------------------------------------------------- training and acting


def update_keys(key, step):
    """Keys of the rows and of the noise of a seed's update `step`, however updates are divided."""
    index_key, noise_key = jax.random.split(jax.random.fold_in(key, step))
    return index_key, noise_key


@partial(jax.jit, static_argnames=("config", "num_updates"), donate_argnames="state")
def train_interval(state, data, config, num_updates=None):
    """`num_updates`, by default an interval's, of every seed as one scan, sampling and all.

    state: TrainState [S, ...], donated. data: Transition [N, ...], its `trusted` [S, N].
    Returns the state; the mean of every metric, [S] each; and of every metric the first update at
    which it was not finite, [S] i32, 0 for none.
    """
    num_updates = num_updates or config.eval_interval

    def one_seed(data, state, trusted):
        rows_of_seed = data._replace(trusted=trusted)
        steps = state.step + 1 + jnp.arange(num_updates)
        index_keys, noise_keys = jax.vmap(partial(update_keys, state.key))(steps)
        sample = lambda key: jax.random.randint(key, (config.batch_size,), 0, len(data.reward))
        draws = (jax.vmap(sample)(index_keys), noise_keys)
        by_actor_update = lambda x: x.reshape(-1, config.policy_freq, *x.shape[1:])
        draws = jax.tree.map(by_actor_update, draws)

        names = []  # metrics leave the loop as one vector, which costs one kernel

        def body(state, draws):
            infos = []
            for i, (rows, key) in enumerate(zip(*draws, strict=True)):
                # Unrolled: under vmap a lax.cond would compute both its branches every time.
                batch = take(rows_of_seed, rows)
                noise = sample_noise(key, batch, config)
                delayed = i == config.policy_freq - 1
                state, info = update_step(state, batch, noise, config, update_actor=delayed)
                infos.append(info)
            names[:] = [(name, i) for i, info in enumerate(infos) for name in info]
            return state, jnp.stack([infos[i][name] for name, i in names])

        state, infos = jax.lax.scan(body, state, draws)
        at = steps[:: config.policy_freq, None] + np.array([i for _, i in names])  # as infos
        never = np.iinfo(np.int32).max
        at = jnp.where(jnp.isfinite(infos), never, at)
        means, broke = {}, {}
        for name in dict(names):
            columns = np.array([name == other for other, _ in names])
            means[name] = infos[:, columns].mean()
            first = at[:, columns].min()
            broke[name] = jnp.where(first == never, 0, first)
        return state, means, broke

    unlabelled = data._replace(trusted=None)
    return over_seeds(one_seed, unlabelled, state, data.trusted, is_loop=True)


UPDATES_PER_CALL = 2_500  # about; a tenth on a CPU


def updates_per_call(config, done):
    """Updates in one compiled call: an interval, or a part of it that a CPU does in seconds.

    Between two calls a run may be saved and stopped. What it computes does not hang on this.
    done: updates behind a run that is gone on with, perhaps on another device than before.
    """
    most = UPDATES_PER_CALL
    if jax.default_backend() == "cpu":
        most = most / (10 * config.num_seeds)  # they train in turns
    together = config.get("policy_freq", 1)
    sizes = range(together, config.eval_interval + 1, together)
    sizes = [size for size in sizes if config.eval_interval % size == done % size == 0]
    return min(sizes, key=lambda size: abs(np.log(size / most)))


@jax.jit
def act(actor_params, observations):
    """The policy of every seed: parameters [S, ...], standardised [S, E, O] -> [S, E, A]."""
    return jax.vmap(actor)(actor_params, observations)


def pretrain(state, data, evaluate, log, config):
    """Offline: compiled calls, an evaluation after each interval. state [S, ...], given up."""
    interval, done = config.eval_interval, log.done("offline")
    part = updates_per_call(config, done)
    with log.compiling():
        lowered = train_interval.lower(state, data, config, num_updates=part)
        train = lowered.compile()
    zeros = {name: np.zeros(x.shape, x.dtype) for name, x in lowered.out_info[1].items()}
    state, totals = log.restore("offline", (state, zeros))
    first = max(math.ceil(done / interval), 1) * interval  # saved at its end, it is evaluated there
    with progress(config.offline_steps, "offline", done=done) as bar:
        for end in range(first, config.offline_steps + 1, interval):
            # --- learn ---
            for step in range(done + part, end + 1, part):
                with log.training(part):
                    state, means, broke = wait_for(train(state, data))
                log.check_finite("offline", state.step, broke, broken_parts(state), data.reward)
                totals = {name: totals[name] + part * np.asarray(x) for name, x in means.items()}
                bar.update(part)
                if log.is_due(step):
                    log.save((state, totals), "offline", step)

            # --- evaluate ---
            with log.evaluating(bar, (state, totals), "offline", end):
                episodes = evaluate(state.actor)
            info = {name: x / interval for name, x in totals.items()} | {"n": state.threshold.n}
            log.interval("offline", end, episodes, info)
            bar.set_postfix(log.headline())
            totals, done = zeros, end
    return state


# ----------------------------------------------------------------------------- offline to online


def offline_rows(data, ends, config):
    """The offline rows that stay in use online, by `buffer_init`: Transition [M, ...], M >= 0.

    data: Transition [N, ...]. ends: the last rows of its episodes, bool [N].
    """
    if config.buffer_init in ("all", "half"):
        return data
    part = config.buffer_init == "part"
    rows = best_episodes(np.asarray(data.reward), ends, 50) if part else np.arange(0)
    return take(data._replace(trusted=None), rows)._replace(trusted=data.trusted[:, rows])


def init_buffer(data, config):
    """An empty replay buffer on the device."""
    shape = (config.num_seeds, config.buffer_capacity or config.online_steps)
    row = data._replace(trusted=data.reward)
    rows = jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[1:]), x.dtype), row)
    return ReplayBuffer(on_devices(rows, "seeds"), added=on_devices(jnp.int32(0)))


@partial(jax.jit, donate_argnames="buffer")
def store(buffer, transition):
    """Writes a transition of every seed, [S, ...], into the buffer, which is donated, in place."""
    place = buffer.added % buffer.rows.reward.shape[1]
    write = partial(jax.lax.dynamic_update_index_in_dim, index=place, axis=1)
    return ReplayBuffer(jax.tree.map(write, buffer.rows, transition), buffer.added + 1)


def sample_batch(key, data, stored, added, config):
    """A batch [B] of offline and stored rows, each as likely as any other; `half`: half of each.

    data: Transition [M, ...]. stored: one seed's part of the buffer, [C, ...]; added: the buffer's.
    """
    batch, keys = (config.batch_size,), jax.random.split(key, 3)
    num_offline, num_stored = len(data.reward), jnp.minimum(added, len(stored.reward))
    new = take(stored, jax.random.randint(keys[0], batch, 0, num_stored))
    if num_offline == 0:
        return new
    old = take(data, jax.random.randint(keys[1], batch, 0, num_offline))
    if config.buffer_init == "half":
        is_old = jnp.arange(config.batch_size) < config.batch_size // 2
    else:
        is_old = jax.random.randint(keys[2], batch, 0, num_offline + num_stored) < num_offline
    choose = jax.vmap(lambda is_old, old, new: jnp.where(is_old, old, new))
    return jax.tree.map(partial(choose, is_old), old, new)


@partial(jax.jit, static_argnames="config")
def explore(actor_params, observations, keys, step, config):
    """Actions to learn from: parameters [S, ...], standardised [S, O], keys [S] -> [S, A].

    step: of the environment, [] i32; every step has a noise of its own.
    """

    def one_seed(step, params, obs, key):
        action = actor(params, obs)
        noise = jax.random.normal(jax.random.fold_in(key, step), action.shape)
        return jnp.clip(action + config.exploration_noise * noise, -1, 1)

    return over_seeds(one_seed, step, actor_params, observations, keys)


@partial(jax.jit, static_argnames=("config", "update_actor"), donate_argnames=("state", "totals"))
def online_step(state, totals, buffer, data, config, update_actor):
    """One update of every seed, on a batch of its own.

    state: TrainState [S, ...], donated. data: offline_rows. buffer: read alone, for what a program
    both writes and gathers from it would copy for several seeds.
    totals: {metric: (sum [S], count [], first update at which it was not finite [S] or 0)} of the
    updates before, donated; this one is added.
    """

    def one_seed(shared, state, stored, trusted):
        data, added = shared
        index_key, noise_key = update_keys(state.key, state.step + 1)
        rows_of_seed = data._replace(trusted=trusted)
        batch = sample_batch(index_key, rows_of_seed, stored, added, config)
        noise = sample_noise(noise_key, batch, config)
        update = partial(update_step, update_actor=update_actor, online=True)
        return update(state, batch, noise, config)

    shared = (data._replace(trusted=None), buffer.added)
    state, info = over_seeds(one_seed, shared, state, buffer.rows, data.trusted)
    for name, value in info.items():
        total, count, broke = totals.get(name, (0.0, 0.0, 0))
        broke = jnp.where((broke == 0) & ~jnp.isfinite(value), state.step, broke)
        totals = totals | {name: (total + value, count + 1, broke)}
    return state, totals


def zero_totals(totals):
    """Zeros for what is [S], which lies where its seeds do, and what is []."""
    zeros = lambda x: on_devices(jnp.zeros(x.shape, x.dtype), *["seeds"] * x.ndim)
    return jax.tree.map(zeros, totals)


def compile_online(state, buffer, data, keys, config):
    """The programs of an environment step, and the zeros that its metrics are added to.

    Returns explore; store; learn(step, state, totals, buffer, data), online_step for the update
    that brings the state to `step` updates; totals.
    """
    transition = jax.tree.map(lambda x: x[:, 0], buffer.rows)
    choose = explore.lower(state.actor, transition.obs, keys, np.int32(0), config=config).compile()
    collect = store.lower(buffer, transition).compile()
    update = partial(online_step, config=config, update_actor=True)
    totals = jax.eval_shape(update, state, {}, buffer, data)[1]
    totals = zero_totals(totals)
    lower = partial(online_step.lower, state, totals, buffer, data, config=config)
    programs = [lower(update_actor=due).compile() for due in (False, True)]
    learn = lambda step, *args: programs[step % config.new_policy_freq == 0](*args)
    return choose, collect, learn, totals


def finetune(state, data, envs, evaluate, log, config):
    """Online: a step of every seed's environment, then one update of every seed, and so on.

    state: TrainState [S, ...], given up. data: offline_rows. envs: a Collector.
    Returns the state after `online_steps` steps, the first `warmup_steps` of them without update.
    """
    interval, done = config.eval_interval, log.done("online")
    buffer = init_buffer(data, config)
    with log.compiling():
        choose, collect, learn, totals = compile_online(state, buffer, data, state.key, config)
    state, buffer, totals = log.restore("online", (state, buffer, totals))
    # Updates fold their number into the same keys: one that they never reach keeps the two apart.
    keys = jax.vmap(partial(jax.random.fold_in, data=2**32 - 1))(state.key)

    def check():
        """Sums of the metrics so far. Raises Diverged if something is not finite."""
        sums = jax.device_get(totals)  # waits for the last update
        broke = {name: update for name, (_, _, update) in sums.items()}
        log.check_finite("online", state.step, broke, broken_parts(state), buffer.rows.reward)
        return sums

    num_updates = int(state.step[0])
    first = math.ceil(done / interval) * interval  # 0 in a new run: evaluated before it learns
    obs, started = envs.reset(done), time.perf_counter()
    with progress(config.online_steps, "online", "step", done=done) as bar:
        for end in range(first, config.online_steps + 1, interval):
            for step in range(done + 1, end + 1):
                # --- act ---
                action = np.asarray(choose(state.actor, obs, keys, np.int32(step)))
                if not np.isfinite(action).all():  # before the environment is blamed
                    check()
                outcome = envs.step(action)
                transition = Transition(
                    obs=obs,
                    action=action,
                    reward=modify_reward(outcome.reward, config),
                    next_obs=outcome.next_obs,
                    terminated=outcome.terminated,
                    trusted=np.ones_like(outcome.reward),
                )
                obs = outcome.obs

                # --- learn ---
                buffer = collect(buffer, transition)
                if step > config.warmup_steps:
                    num_updates += 1
                    state, totals = learn(num_updates, state, totals, buffer, data)
                bar.update(1)
                if log.is_due(step):
                    check()
                    log.save((state, buffer, totals), "online", step, envs)

            # --- evaluate ---
            sums = check()
            log.collected(end, end - done, time.perf_counter() - started, envs)
            with log.evaluating(bar, (state, buffer, totals), "online", end, envs):
                episodes = evaluate(state.actor)
            info = {name: x / count if count else None for name, (x, count, _) in sums.items()}
            info["n"] = state.threshold.n
            log.interval("online", end, episodes, info)
            bar.set_postfix(log.headline())
            totals = zero_totals(totals)
            done, started = end, time.perf_counter()
    return state


# ------------------------------------------------------------------------------------------ main


def modify_reward(reward, config):
    """The reward that is learned from, offline and online: scaled, then shifted."""
    return config.reward_scale * reward + np.float32(config.reward_bias)


def load_data(dataset, config):
    """The data set on the device, D̂ still unknown, its observation normalizer, its fingerprint.

    Takes the columns out of `dataset`, one after the other, so that the data are held once.
    """
    normalizer = fit_normalizer(dataset.observations, config.normalize_observations)
    fingerprint = Fingerprint()
    put = lambda column: on_devices(jax.device_put(fingerprint.add(column)))
    data = Transition(
        obs=put(normalizer.apply_to(dataset.take("observations"))),
        action=put(dataset.take("actions")),
        reward=put(modify_reward(dataset.rewards, config)),
        next_obs=put(normalizer.apply_to(dataset.take("next_observations"))),
        terminated=put(dataset.terminals.astype(np.float32)),
        trusted=None,
    )
    return data, normalizer, fingerprint.text()


def main(config, workdir=None, resume=True):
    """Trains and evaluates `num_seeds` seeds, writes the run folder and returns its results.json.

    resume: whether an unfinished run in `workdir`, of the same settings, is gone on with.
    Raises InputError when settings or data cannot be used: before anything is compiled or written,
    but for an IQL that trusts no row, which shows when it is trained.
    """
    started = time.perf_counter()
    config = ml_collections.FrozenConfigDict(config)
    default = f"runs/ssar_td3bc/{config.task}/{config.seed}"
    if config.offline_checkpoint:
        default = os.path.expanduser(config.offline_checkpoint).rstrip("/") + "-online"
    workdir = workdir or default
    check_config(config)
    check_workdir(workdir, config, resume)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    use_devices(config.num_seeds)
    dataset = load_dataset(
        config.dataset,
        config.dataset_path,
        config.env,
        rows=config.d4rl_rows,
        physics=config.physics,
        keys=config.observation_keys.replace(",", " ").split(),
        sparse=config.selection == "success",
        cache_dir=config.cache_dir,
    )
    evaluator = Evaluator(dataset, config.num_seeds, config.eval_episodes, config.seed)
    print(dataset, flush=True)

    # --- the data, and the part of it that β_φ may trust ---
    data, normalizer, data_fingerprint = load_data(dataset, config)
    keys = jnp.stack([jax.random.key(config.seed + i) for i in range(config.num_seeds)])
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    init = jax.jit(jax.vmap(lambda key: init_state(key, obs_dim, action_dim, config)))
    if config.offline_checkpoint:
        saved = load_offline(config, data_fingerprint, jax.eval_shape(init, keys))
        state, normalizer, trusted = saved
    else:
        trusted = select_trusted(data, dataset.episode_ends, keys, data_fingerprint, config)
        state = init(keys)
    log = RunLog("ssar_td3bc", workdir, config, dataset, trusted, data_fingerprint, started, resume)
    state = on_devices(state, "seeds")
    data = data._replace(trusted=on_devices(jnp.asarray(trusted, jnp.float32), "seeds"))
    evaluate = partial(evaluator, act, normalizer=normalizer)
    save = partial(save_checkpoint, log.workdir, normalizer, trusted, data_fingerprint)

    # --- offline, then online ---
    if config.offline_steps and not (config.offline_checkpoint or log.was_in("online")):
        state = pretrain(state, data, evaluate, log, config)
        if config.online_steps:
            save("offline_checkpoint", state)
    if config.online_steps:
        envs = Collector(dataset, config.num_seeds, config.seed, normalizer)
        data = offline_rows(data, dataset.episode_ends, config)
        state = finetune(state, data, envs, evaluate, log, config)
    save("checkpoint", state)
    return log.finish(state.threshold.stopped_at)


if __name__ == "__main__":
    run(main, "ssar_td3bc")
