"""SSAR on TD3+BC: selective state-adaptive regularization for offline RL (arXiv 2505.19923), in one file.

TD3+BC trades Bellman improvement against cloning the data with one constant. SSAR learns that constant per state:
a network beta_phi(s) that falls where the data's actions are likely under the policy and rises where they are not.

    select the trusted sub-dataset D^ of D: return > G_T, success, or IQL advantage >= 0               (Sec. 3.3)
    for every update, on a batch (s, a, r, s', d) of D:
        a' = clip(pi_target(s') + clip(noise, -c, c), -1, 1)
        y  = r + discount (1 - d) min_i Q_target_i(s', a')
        Q_i     <- Adam on mean (Q_i(s, a) - y)^2
        every policy_freq updates:
            pi      <- Adam on -mean Q_1(s, pi(s)) / mean|Q_1| + mean beta_phi(s) (pi(s) - a)^2        (Eq. 3, 4)
            margin   = (sigma n)^2 - mean_dims min((pi(s) - a)^2, 1)         log pi(a|s) - C_n(s)      (Eq. 6)
            beta_phi <- Adam on mean over D^ of margin * beta_phi(s)                                   (Eq. 5, 9)
            every T_inc updates: n stops for good if the mean margin over D^ > 0, else n += (n_end - n_start) / 10
            targets <- 0.005 new + 0.995 old

    symbol       config field         official name     meaning
    beta_phi     coefficient          ParaNet / beta    adaptive: the network; fixed: the constant, plain TD3+BC
    beta_init    coefficient_init     1 / alpha         beta lies in (0, 1.5 beta_init) and starts near beta_init
    C_n          -                    threshold         -(sigma n)^2 up to a constant: n standard deviations away
    n            n_start, n_end       n_away            width of the threshold, grown until it stops itself
    T_inc        update_period        update_period     updates between two threshold tests
    sigma        expl_noise           expl_noise        the deterministic policy read as a Gaussian of this width
    D^           selection            trusts            trusted rows: none (all of D) | return | success | iql
    G_T          return_threshold     ref_return        a trajectory is trusted when its return is above this
    -            select_actions       select_actions    only D^ shapes beta_phi and the threshold test
    -            loosen_bound         loosen_bound      only D^ is cloned: beta becomes beta * trusted

Deviations from the paper follow the authors' code, which made the published numbers: beta multiplies the cloning term
(alpha leaves the Q normaliser), n grows in ten equal steps, each tested on one batch, and the online anneal is linear.
Deviation from that code: the logged beta_min/mean/max are taken over the rows where the regulariser acts.

    python ssar_td3bc.py                                                             # the demo, three minutes
    python ssar_td3bc.py --config=configs/ssar_td3bc.py:hopper-medium-v2 --config.dataset_path=hopper.hdf5
"""

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

from common.checkpoint import save_checkpoint
from common.dataset import InputError, cached_labels, episode_returns, episode_slices, fingerprint
from common.dataset import fit_normalizer, load_dataset
from common.evaluation import Evaluator
from common.report import RunLog, progress

IQL_LR = 3e-4

# ---------------------------------------------------------------------------------------------- data structures


class Transition(NamedTuple):
    """A batch of transitions; the whole data set has the same shape with N rows."""

    obs: jax.Array  # [B, O] standardised
    action: jax.Array  # [B, A] in [-1, 1]
    reward: jax.Array  # [B]
    next_obs: jax.Array  # [B, O]
    terminated: jax.Array  # [B] 1 where the task ended; a time limit is no end
    trusted: jax.Array  # [B] 1 in D^


class Noise(NamedTuple):
    """Every random number of one update: with it given, the update is deterministic."""

    target_action: jax.Array  # [B, A] N(0, 1)


class Threshold(NamedTuple):
    """C_n(s): its width and the update at which it stopped growing."""

    n: jax.Array  # []
    stopped_at: jax.Array  # [] i32, -1 while growing


class TrainState(NamedTuple):
    """Everything that training changes. Seeds are a leading axis [S] on every leaf."""

    actor: dict
    target_actor: dict
    critic: dict  # two critics, stacked: [2, ...]
    target_critic: dict
    coefficient: dict
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    coefficient_opt: optax.OptState
    threshold: Threshold
    step: jax.Array  # [] i32, updates done
    online_step: jax.Array  # [] i32, of which online (N in SPEC section 6)
    key: jax.Array  # [] PRNG key


# ---------------------------------------------------------------------------------------------- networks


def uniform(bound):
    """U(-bound, bound): PyTorch's default for a Linear layer's kernel and bias when bound = 1/sqrt(fan_in)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class MLP(nn.Module):
    """ReLU layers (each after a LayerNorm, if asked for), then a linear one."""

    widths: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            init = uniform(x.shape[-1] ** -0.5)
            x = nn.Dense(width, kernel_init=init, bias_init=init, name=f"layers_{i}")(x)
            if i < len(self.widths) - 1:
                if self.layer_norm:
                    x = nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(x)
                x = nn.relu(x)
        return x


def forward(params, x):
    """Applies the MLP whose widths the parameters themselves tell."""
    widths = tuple(params[f"layers_{i}"]["bias"].shape[0] for i in range(sum("layers" in k for k in params)))
    return MLP(widths, layer_norm="norm_0" in params).apply({"params": params}, x)


def actor(params, obs):
    """pi(s) in [-1, 1]: [B, O] -> [B, A]."""
    return jnp.tanh(forward(params, obs))


def critic(params, obs, action):
    """Q(s, a): [B, O], [B, A] -> [B]."""
    return forward(params, jnp.concatenate([obs, action], axis=-1))[..., 0]


critics = jax.vmap(critic, in_axes=(0, None, None))  # both of a pair: -> [2, B]


def init_mlp(key, in_dim, widths, layer_norm=False):
    """Parameters of an MLP [in_dim] -> [widths[-1]]."""
    return MLP(widths, layer_norm).init(key, jnp.zeros((1, in_dim)))["params"]


def init_pair(key, in_dim, widths, layer_norm=False):
    """Parameters of two critics, stacked."""
    return jax.vmap(lambda key: init_mlp(key, in_dim, widths, layer_norm))(jax.random.split(key))


def init_coefficient(key, obs_dim, hidden_dims):
    """beta_phi: Xavier-uniform kernels, zero biases, last bias 0.6931 so that 1.5 sigmoid(.) starts at 1."""
    params = init_mlp(key, obs_dim, (*hidden_dims, 1))
    for i, key in enumerate(jax.random.split(key, len(params))):
        layer = params[f"layers_{i}"]
        layer["kernel"] = nn.initializers.xavier_uniform()(key, layer["kernel"].shape)
        layer["bias"] = jnp.full_like(layer["bias"], 0.6931 if i == len(params) - 1 else 0.0)
    return params


def coefficient(params, obs, config):
    """beta_phi(s) in (0, 1.5 beta_init): [B, O] -> [B] (SPEC section 2)."""
    return 1.5 * config.coefficient_init * nn.sigmoid(forward(params, obs)[..., 0])


# ---------------------------------------------------------------------------------------------- the trusted sub-dataset


def select_by_return(rewards, episode_ends, return_threshold):
    """D^ of dense rewards: rows of trajectories whose undiscounted return is above G_T. bool [N]."""
    returns = episode_returns(rewards, episode_ends)
    return np.repeat(returns > return_threshold, episode_slices(episode_ends)[1])


def select_by_success(rewards, episode_ends, fail_reward):
    """D^ of sparse rewards: rows of trajectories whose last reward is not the failing one. bool [N]."""
    last = rewards[episode_ends]
    return np.repeat(~np.isclose(last, fail_reward, atol=1e-6), episode_slices(episode_ends)[1])


def over_seeds(one_seed, *args):
    """vmap over the seed axis; a single seed runs unbatched, for an axis of length one slows XLA's CPU code."""
    if len(jax.tree.leaves(args)[0]) == 1:
        return jax.tree.map(lambda x: x[None], one_seed(*jax.tree.map(lambda x: x[0], args)))
    return jax.vmap(one_seed)(*args)


class IQLState(NamedTuple):
    """Implicit Q-learning, trained only to label D^."""

    value: dict
    critic: dict  # two, stacked
    target_critic: dict
    value_opt: optax.OptState
    critic_opt: optax.OptState
    key: jax.Array


def iql_init(key, obs_dim, action_dim):
    """One V and two Q of 2 x 256, without LayerNorm."""
    key, value_key, critic_key = jax.random.split(key, 3)
    value = init_mlp(value_key, obs_dim, (256, 256, 1))
    q = init_pair(critic_key, obs_dim + action_dim, (256, 256, 1))
    adam = optax.adam(IQL_LR)
    return IQLState(value, q, jax.tree.map(jnp.copy, q), adam.init(value), adam.init(q), key)


def iql_value_loss(params, state, batch, config):
    """Expectile regression of V(s) on the target min Q(s, a)."""
    q = critics(state.target_critic, batch.obs, batch.action).min(axis=0)
    error = q - forward(params, batch.obs)[..., 0]
    weight = jnp.where(error > 0, config.expectile, 1 - config.expectile)
    loss = (weight * jnp.square(error)).mean()
    return loss, {"iql_value_loss": loss}


def iql_critic_loss(params, next_value, batch, config):
    """Regression of both Q(s, a) on r + discount (1 - d) V(s')."""
    target = batch.reward + config.discount * (1 - batch.terminated) * next_value
    loss = jnp.square(critics(params, batch.obs, batch.action) - target).mean()
    return loss, {"iql_critic_loss": loss}


def iql_step(state, batch, config):
    """One IQL update: V, then Q with the V(s') from before V's step, then the targets (SPEC section 3)."""
    adam = optax.adam(IQL_LR)
    next_value = forward(state.value, batch.next_obs)[..., 0]
    value, value_opt, info = descend(iql_value_loss, state.value, adam, state.value_opt, state, batch, config)
    q, critic_opt, q_info = descend(iql_critic_loss, state.critic, adam, state.critic_opt, next_value, batch, config)
    target = optax.incremental_update(q, state.target_critic, config.target_update_rate)
    return IQLState(value, q, target, value_opt, critic_opt, state.key), info | q_info


@partial(jax.jit, static_argnames=("config", "num_updates"), donate_argnames="state")
def iql_interval(state, data, config, num_updates):
    """`num_updates` IQL updates of every seed in one scan; `state` [S, ...] is donated, `data` [N, ...] shared."""

    def one_seed(state):
        key, index_key = jax.random.split(state.key)
        indices = jax.random.randint(index_key, (num_updates, config.batch_size), 0, len(data.reward))
        body = lambda state, rows: iql_step(state, take(data, rows), config)
        state, info = jax.lax.scan(body, state._replace(key=key), indices)
        return state, jax.tree.map(jnp.mean, info)

    return over_seeds(one_seed, state)


@jax.jit
def select_by_advantage(state, data):
    """D^ by IQL: rows with min(Q_1, Q_2)(s, a) >= V(s), by the online Q. bool [S, N]."""

    def one_seed(state):
        row = lambda t: critics(state.critic, t.obs, t.action).min(axis=0) >= forward(state.value, t.obs)[..., 0]
        return jax.lax.map(row, data, batch_size=4096)

    return over_seeds(one_seed, state)


def train_iql(keys, data, config):
    """Trains one IQL a seed for `iql_steps` updates and labels D^. bool [S, N]."""
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    state = jax.vmap(iql_init, in_axes=(0, None, None))(keys, obs_dim, action_dim)
    chunk = min(config.eval_interval, config.iql_steps)
    with progress(config.iql_steps, "iql") as bar:
        for start in range(0, config.iql_steps, chunk):
            updates = min(chunk, config.iql_steps - start)
            state, info = iql_interval(state, data, config, updates)
            bar.set_postfix({k: f"{np.mean(v):.3g}" for k, v in info.items()})
            bar.update(updates)
    return np.asarray(select_by_advantage(state, data))


def select_trusted(dataset, data, keys, config):
    """D^ as `config.selection` builds it (SPEC section 3): bool [S, N].

    Raises InputError when it is empty: without a trusted row beta_phi learns nothing.
    """
    rewards, ends = np.asarray(data.reward), dataset.episode_ends
    if config.selection == "iql":
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)  # not the keys that training starts from
        name = (
            f"{fingerprint(*map(np.asarray, data[:5]))}-tau{config.expectile}-seed{config.seed}x{config.num_seeds}"
            f"-{config.iql_steps}x{config.batch_size}-discount{config.discount}"
        )
        trusted = cached_labels(config.cache_dir, name, lambda: train_iql(keys, data, config))
    elif config.selection == "return":
        trusted = select_by_return(rewards, ends, config.return_threshold)
    elif config.selection == "success":
        trusted = select_by_success(rewards, ends, fail_reward=config.reward_bias)
    else:
        trusted = np.ones(len(rewards), bool)
    if not trusted.any():
        raise InputError(
            f"{dataset.source}: selection={config.selection} trusts no transition (G_T {config.return_threshold}, "
            f"best return {episode_returns(rewards, ends).max():.1f}): lower --config.return_threshold "
            "or choose another --config.selection"
        )
    return np.broadcast_to(trusted, (config.num_seeds, len(rewards)))


# ---------------------------------------------------------------------------------------------- losses


def critic_loss(params, state, batch, noise, config):
    """Twin TD error against the smoothed, clipped double-Q target (SPEC 4.1-4.2)."""
    smoothing = jnp.clip(config.policy_noise * noise.target_action, -config.noise_clip, config.noise_clip)
    next_action = jnp.clip(actor(state.target_actor, batch.next_obs) + smoothing, -1, 1)
    next_q = critics(state.target_critic, batch.next_obs, next_action).min(axis=0)
    target = batch.reward + config.discount * (1 - batch.terminated) * next_q  # [B]
    q = critics(params, batch.obs, batch.action)  # [2, B]
    chex.assert_equal_shape([target, q[0]])
    loss = jnp.square(q - target).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q1": q[0].mean()}


def actor_loss(params, state, batch, weight, config):
    """Q maximisation, scaled by 1 / mean|Q|, plus cloning weighted per state by `weight` = beta [B] (SPEC 4.3)."""
    action = actor(params, batch.obs)
    q = critic(jax.tree.map(lambda x: x[0], state.critic), batch.obs, action)
    chex.assert_equal_shape([q, weight])
    squared_error = jnp.square(action - batch.action)  # [B, A]
    scale = 1 / jax.lax.stop_gradient(jnp.abs(q).mean())
    loss = -scale * q.mean() + (weight[:, None] * squared_error).mean()
    return loss, {"actor_loss": loss, "squared_error": squared_error}


def margin_of(squared_error, threshold, config):
    """log pi(a|s) - C_n(s) of a Gaussian of width sigma around pi(s), up to a factor: [B, A] -> [B] (Eq. 6)."""
    return (config.expl_noise * threshold.n) ** 2 - jnp.minimum(squared_error, 1).mean(axis=-1)


def coefficient_loss(params, batch, margin, rows, config):
    """Lowers beta_phi where the margin is positive, raises it where negative (Eq. 5, 9)."""
    beta = coefficient(params, batch.obs, config)
    chex.assert_equal_shape([beta, margin, rows])
    return (margin * rows * beta).mean(), {}


def update_threshold(threshold, margin, rows, step, config):
    """Widens C_n every T_inc updates until the mean margin over `rows` is positive, then never again (Sec. 3.2)."""
    check = (step % config.update_period == 0) & (threshold.stopped_at < 0)
    passed = (margin * rows).sum() > 0  # the mean's sign; a batch without rows does not pass
    wider = jnp.minimum(threshold.n + (config.n_end - config.n_start) / 10, config.n_end)
    return Threshold(
        n=jnp.where(check & ~passed, wider, threshold.n),
        stopped_at=jnp.where(check & passed, step, threshold.stopped_at),
    )


def anneal_factor(online_step, config):
    """What multiplies the frozen beta_phi after N online updates (SPEC section 6): 1 at 0, 0 from N_end on."""
    if config.anneal == "none" or config.decay_steps <= 0:
        return 1.0
    done = jnp.clip(jnp.asarray(online_step, float) / config.decay_steps, 0, 1)
    return 1 - done if config.anneal == "linear" else jnp.cos(done * jnp.pi / 2)


# ---------------------------------------------------------------------------------------------- one update


def optimizers(config):
    """Adam for actor, critics and beta_phi; beta_phi's gradient is clipped to norm 0.5 as PyTorch clips."""
    clip = optax.stateless(
        lambda grads, _: optax.tree.scale(jnp.minimum(1, 0.5 / (optax.tree.norm(grads) + 1e-6)), grads)
    )
    return (
        optax.adam(config.actor_lr),
        optax.adam(config.critic_lr),
        optax.chain(clip, optax.adam(config.coefficient_lr)),
    )


def descend(loss, params, optimizer, opt_state, *args):
    """One optimiser step down `loss(params, *args) -> (scalar, info)`."""
    grads, info = jax.grad(loss, has_aux=True)(params, *args)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, info


def init_state(key, obs_dim, action_dim, config):
    """The state of one seed before its first update; targets are copies, so that donation may overwrite both."""
    key, actor_key, critic_key, coefficient_key = jax.random.split(key, 4)
    policy = init_mlp(actor_key, obs_dim, (*config.hidden_dims, action_dim))
    q = init_pair(critic_key, obs_dim + action_dim, (*config.hidden_dims, 1), layer_norm=True)
    beta = init_coefficient(coefficient_key, obs_dim, config.coefficient_hidden_dims)
    actor_adam, critic_adam, coefficient_adam = optimizers(config)
    return TrainState(
        actor=policy,
        target_actor=jax.tree.map(jnp.copy, policy),
        critic=q,
        target_critic=jax.tree.map(jnp.copy, q),
        coefficient=beta,
        actor_opt=actor_adam.init(policy),
        critic_opt=critic_adam.init(q),
        coefficient_opt=coefficient_adam.init(beta),
        threshold=Threshold(jnp.asarray(config.n_start, float), jnp.asarray(-1, jnp.int32)),
        step=jnp.zeros((), jnp.int32),
        online_step=jnp.zeros((), jnp.int32),
        key=key,
    )


def sample_noise(key, batch, config):
    """All random numbers of one update on `batch`."""
    return Noise(target_action=jax.random.normal(key, batch.action.shape))


def update_step(state, batch, noise, config, *, update_actor=None, online=False):
    """One update (SPEC section 4): the critics, and every policy_freq-th time all the rest.

    update_actor: static, whether this is such a time; None lets the state's counter decide.
    online: static; beta_phi and n are frozen and beta is annealed.
    Returns the new state and a dict of scalars (NaN where `update_actor=None` skipped the actor).
    """
    _, critic_adam, _ = optimizers(config)
    state = state._replace(step=state.step + 1, online_step=state.online_step + online)

    q, critic_opt, info = descend(
        critic_loss, state.critic, critic_adam, state.critic_opt, state, batch, noise, config
    )
    state = state._replace(critic=q, critic_opt=critic_opt)

    delayed = partial(delayed_update, batch=batch, config=config, online=online)
    if update_actor is None:
        skipped = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(delayed, state)[1])
        due = state.step % config.policy_freq == 0
        state, delayed_info = jax.lax.cond(due, delayed, lambda state: (state, skipped), state)
        info |= delayed_info
    elif update_actor:
        state, delayed_info = delayed(state)
        info |= delayed_info
    return state, info


def delayed_update(state, batch, config, online):
    """Actor, then beta_phi and threshold (offline), then all targets (SPEC 4.3)."""
    actor_adam, _, coefficient_adam = optimizers(config)
    adaptive = config.coefficient == "adaptive"
    everywhere = jnp.ones_like(batch.trusted)

    # --- actor: cloning weighted by beta, on D^ alone if loosen_bound ---
    if adaptive:
        beta = coefficient(state.coefficient, batch.obs, config)
        acts = batch.trusted if config.loosen_bound else everywhere
    else:
        beta, acts = config.coefficient_init * everywhere, everywhere
    weight = beta * acts * (anneal_factor(state.online_step, config) if online else 1)
    policy, actor_opt, info = descend(
        actor_loss, state.actor, actor_adam, state.actor_opt, state, batch, weight, config
    )

    # --- beta_phi and threshold: the margin is that of the actor before its step ---
    margin = margin_of(info.pop("squared_error"), state.threshold, config)
    rows = batch.trusted if config.select_actions else everywhere
    beta_params, beta_opt, threshold = state.coefficient, state.coefficient_opt, state.threshold
    if adaptive and not online:
        beta_params, beta_opt, _ = descend(
            coefficient_loss, beta_params, coefficient_adam, beta_opt, batch, margin, rows, config
        )
        threshold = update_threshold(threshold, margin, rows, state.step, config)

    # --- targets ---
    rate = config.target_update_rate
    state = state._replace(
        actor=policy,
        actor_opt=actor_opt,
        coefficient=beta_params,
        coefficient_opt=beta_opt,
        threshold=threshold,
        target_actor=optax.incremental_update(policy, state.target_actor, rate),
        target_critic=optax.incremental_update(state.critic, state.target_critic, rate),
    )
    acts = jnp.where(acts.any(), acts, everywhere) > 0
    return state, info | {
        "beta_min": beta.min(where=acts, initial=jnp.inf),
        "beta_mean": beta.mean(where=acts),
        "beta_max": beta.max(where=acts, initial=0),
        "margin": margin.mean(),
        "trusted_margin": (margin * rows).sum() / jnp.maximum(rows.sum(), 1),
        "constrained_fraction": (margin < 0).mean(),
        "trusted_fraction": batch.trusted.mean(),
    }


# ---------------------------------------------------------------------------------------------- training, acting


def take(data, rows):
    """The transitions at `rows`, which are within bounds."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), data)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_interval(state, data, config):
    """`eval_interval` updates of every seed as one scan; sampling and noise happen on the device.

    state: TrainState [S, ...], donated. data: Transition [N, ...], with `trusted` [S, N].
    Returns the state and the interval's mean metrics, each [S].
    """

    def one_seed(state, trusted):
        rows_of = data._replace(trusted=trusted)
        key, index_key, noise_key = jax.random.split(state.key, 3)
        shape = (config.eval_interval // config.policy_freq, config.policy_freq)
        indices = jax.random.randint(index_key, (*shape, config.batch_size), 0, len(data.reward))

        def body(state, xs):
            infos = []
            for i in range(config.policy_freq):  # unrolled: a lax.cond would compute both branches under vmap
                batch = take(rows_of, xs[0][i])
                noise = sample_noise(xs[1][i], batch, config)
                last = i == config.policy_freq - 1
                state, info = update_step(state, batch, noise, config, update_actor=last)
                infos.append(info)
            return state, infos[-1] | {k: jnp.mean(jnp.stack([info[k] for info in infos])) for k in infos[0]}

        state, info = jax.lax.scan(body, state._replace(key=key), (indices, jax.random.split(noise_key, shape)))
        return state, jax.tree.map(jnp.mean, info) | {"n": state.threshold.n}

    return over_seeds(one_seed, state, data.trusted)


@jax.jit
def act(actor_params, observations):
    """The evaluated policy, every seed at once: parameters [S, ...], standardised observations [S, E, O] -> [S, E, A]."""
    return jax.vmap(actor)(actor_params, observations)


# ---------------------------------------------------------------------------------------------- main


def check_config(config):
    """Raises InputError, naming field and mend, for values that cannot work together."""
    choices = {
        "coefficient": ("adaptive", "fixed"),
        "selection": ("none", "return", "success", "iql"),
        "anneal": ("linear", "cosine", "none"),
    }
    for field, known in choices.items():
        if config[field] not in known:
            raise InputError(f"--config.{field}={config[field]} is unknown: choose one of {', '.join(known)}")
    for field in ("num_seeds", "offline_steps", "eval_interval", "eval_episodes", "batch_size", "policy_freq",
                  "update_period", "iql_steps"):  # fmt: skip
        if config[field] < 1:
            raise InputError(f"--config.{field}={config[field]} must be at least 1")
    for field, divisor in (("eval_interval", "policy_freq"), ("offline_steps", "eval_interval")):
        if config[field] % config[divisor]:
            raise InputError(
                f"--config.{field}={config[field]} must be a multiple of --config.{divisor}={config[divisor]}"
            )
    if config.selection == "return" and config.return_threshold is None:
        raise InputError("--config.selection=return needs a return to exceed: give --config.return_threshold=<G_T>")
    if not 0 < config.expectile < 1:
        raise InputError(f"--config.expectile={config.expectile} must lie between 0 and 1")
    if not 0 < config.n_start <= config.n_end:
        raise InputError(f"--config.n_start={config.n_start} must be positive and at most n_end={config.n_end}")


def load_transitions(dataset, config):
    """The data set as device arrays, standardised and reward-shifted, and its normalizer (SPEC section 7)."""
    normalizer = fit_normalizer(dataset.observations, config.normalize_observations)
    data = Transition(
        obs=normalizer(dataset.observations),
        action=dataset.actions,
        reward=config.reward_scale * dataset.rewards + np.float32(config.reward_bias),
        next_obs=normalizer(dataset.next_observations),
        terminated=dataset.terminals.astype(np.float32),
        trusted=np.zeros(0, np.float32),  # select_trusted comes next
    )
    return jax.tree.map(jnp.asarray, data), normalizer


def main(config, workdir=None):
    """Trains `num_seeds` seeds offline, evaluates them every interval and writes the run folder.

    Returns the content of results.json. Raises InputError before anything is written.
    """
    started = time.perf_counter()
    config = ml_collections.FrozenConfigDict(config)
    check_config(config)
    dataset = load_dataset(config.dataset, config.dataset_path, config.env)
    evaluate = Evaluator(dataset, config.num_seeds, config.eval_episodes, config.seed)

    # --- the data, and the sub-dataset that beta_phi may trust ---
    data, normalizer = load_transitions(dataset, config)
    keys = jnp.stack([jax.random.key(config.seed + i) for i in range(config.num_seeds)])
    trusted = select_trusted(dataset, data, keys, config)
    data = data._replace(trusted=jnp.asarray(trusted, jnp.float32))

    # --- offline: intervals of compiled updates, an evaluation after each ---
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    state = jax.vmap(init_state, in_axes=(0, None, None, None))(keys, obs_dim, action_dim, config)
    log = RunLog("ssar_td3bc", workdir, config, dataset, trusted, fingerprint(*map(np.asarray, data[:5])))
    compile_started = time.perf_counter()
    train = train_interval.lower(state, data, config=config).compile()
    log.compile_seconds = time.perf_counter() - compile_started
    with progress(config.offline_steps, "offline") as bar:
        for step in range(config.eval_interval, config.offline_steps + 1, config.eval_interval):
            interval_started = time.perf_counter()
            state, info = jax.block_until_ready(train(state, data))
            seconds = time.perf_counter() - interval_started
            episodes = evaluate(act, state.actor, normalizer)
            log.interval("offline", step, episodes, info, config.eval_interval / seconds)
            bar.set_postfix(log.headline())
            bar.update(config.eval_interval)

    save_checkpoint(log.workdir, {"state": state, "normalizer": normalizer._asdict()})
    return log.finish(n_stopped_at=state.threshold.stopped_at, wall_seconds=time.perf_counter() - started)


if __name__ == "__main__":
    from absl import app, flags, logging
    from ml_collections import config_flags

    CONFIG = config_flags.DEFINE_config_file("config", "configs/ssar_td3bc.py", "<file>[:<task>]", lock_config=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "run folder, by default runs/ssar_td3bc/<task>/<seed>")

    def run(_):
        logging.set_verbosity(logging.WARNING)
        try:
            main(CONFIG.value, WORKDIR.value)
        except InputError as error:
            raise SystemExit(f"ssar_td3bc: {error}") from None

    app.run(run)
