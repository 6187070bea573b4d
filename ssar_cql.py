r"""SSAR on CQL: selective state-adaptive regularization for offline RL (arXiv 2505.19923).

CQL uses one constant to weigh Bellman backups against lowering the values of actions that the data
do not show. SSAR learns this weight per state: the coefficient β_φ(s), a network that is trained
like a Lagrange multiplier. It falls where the data's action is likely enough under the actor,
log π(a|s) > C_n(s), and rises where it is not. Only the trusted part D̂ of the data D shapes it.
It is the same β_φ as in TD3+BC: for π ∝ exp Q, CQL's regulariser log Σ exp Q - Q(s, a) is
-log π(a|s).                                                                             (Prop. 3.1)

The margin is log π(a|s) - C_n(s), where C_n(s) is the log-density n standard deviations from the
mean of π(s), the smaller of its two sides.

    D̂ ⊆ D: trajectories of return > G_T, or successful ones, or transitions of IQL advantage ≥ 0
    every update, on a batch (s, a, r, s', d) of D, all from the parameters before the update:
        π: Adam on mean α log π(ã|s) - min_i Q_i(s, ã), ã ~ π(s)
        α: Adam on -log α (mean log π(ã|s) - |A|)
        y  = r + γ (1 - d) min_i Q_target_i(s', a'), a' ~ π(s')
        Q_i: Adam on mean (Q_i(s, a) - y)² + mean m_Q β_φ(s) (log Σ_j exp(Q_i(s, a_j))/p_j
            - Q_i(s, a)) over K uniform a_j, K from π(s') and K from π(s), each of density p_j
    then, with the new π:
        margin = mean_dims (max(log π(a|s), C_10(s)) - C_n(s))                               (Eq. 6)
        β_φ: Adam, gradient norm ≤ 0.5, on mean m_β · margin · β_φ(s)                     (Eq. 5, 9)
        every T_inc updates, while n has not stopped: if the mean of m_β · margin is positive,
            n stops for good, else n = min(n + (n_end - n_start) / 10, n_end)             (Sec. 3.2)
        targets: 0.005 new + 0.995 old
    online, after every environment step with a ~ π(s):
        store (s, a, r, s', d) as trusted; after warmup_steps, one update as above on offline and
        online transitions. φ and n are frozen, and β_φ is multiplied by a factor that falls from
        1 to 0 in N_end updates

    symbol  config field         authors' name  paper     meaning
    β_φ     coefficient          ParaNet, beta  Eq. 5, 9  adaptive: a network; fixed: β_init
    β_init  coefficient_init     cql_alpha                β_φ starts near it, below 1.5 β_init
    n       n_start, n_end       n_away         Eq. 6     C_n(s): log-density n σ from the mean
    T_inc   update_period        update_period  Sec. 3.2  updates between two tests of n
    D̂       selection            trusts         Eq. 9     auto | none | return | success | iql
    G_T     return_threshold     ref_return               for returns of scaled and shifted rewards
    m_β     select_actions       select_actions Eq. 9     1[D̂] if set, else 1: what shapes β_φ, n
    m_Q     loosen_bound         loosen_bound             1[D̂] if set, else 1: what is regularised
    K       num_sampled_actions  cql_n_actions            actions drawn from each source
    N_end   decay_steps          decay_steps              online updates until β_φ has faded
            buffer_init          load_way                 all | half | part (best 50) | none
    Defaults and every other field: configs/ssar_cql.py.

    on AntMaze only (the authors' cql_lagrange, cql_target_action_gap, cql_clip_diff_min, ...):
    α'      lagrange, target_action_gap  α' β_φ (regulariser - gap) instead; α' is tuned to the gap
            clip_diff_min                the regulariser's lower bound
            max_target_backup            a' is the best of K by min_i Q_target_i
            bc_weight                    adds bc_weight (ã - a)² to π's loss
            critic_layers                the first critic has five hidden layers, the other three

Where the paper and the authors' code differ, this file follows the code, which produced the
published results: log π and C_n are averaged over the action dimensions; the actions of C_n stay
within ±0.99999 and within 0.1 n of tanh(μ); C_10 is a floor for log π; the annealing is a cosine;
the data's actions are clipped to ±0.9999; the β_φ loss is a mean over the whole batch, not over D̂;
n is tested on one batch. It deviates from that code as follows:
    - The margin is formed in units of σ before tanh, and the data's action stays within ±0.99999
      there, so that rounding cannot make it NaN.
    - A decay_steps of 0 or less means no annealing.
    - Fine-tuning restores the targets, n, and the fact that n has stopped.
    - beta_min, beta_mean and beta_max leave out transitions that are not regularised.
    - A step that ends the task exactly at the time limit counts as terminal.
    - Online transitions never overwrite offline ones, and all of them are trusted.
    - Evaluation has its own environments.

    python ssar_cql.py --config=configs/ssar_cql.py:hopper-medium-v2 --config.num_seeds=5
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

# ------------------------------------------------------------------------------- data structures


class Transition(NamedTuple):
    """A batch of B transitions, or a whole data set of N."""

    obs: jax.Array  # [B, O] standardised
    action: jax.Array  # [B, A] in [-1, 1]
    reward: jax.Array  # [B]
    next_obs: jax.Array  # [B, O]
    terminated: jax.Array  # [B] 1 where the task ended; a time limit does not end it
    trusted: jax.Array  # [B] 1 in D̂, else 0


class Noise(NamedTuple):
    """Every random number of one update. Given these, the update is deterministic."""

    action: jax.Array  # [B, A] N(0, 1)
    target_action: jax.Array  # [B, M, A] N(0, 1); M is K with max_target_backup, else 1
    random_action: jax.Array  # [B, K, A] U(-1, 1)
    current_action: jax.Array  # [B, K, A] N(0, 1)
    next_action: jax.Array  # [B, K, A] N(0, 1)


class Threshold(NamedTuple):
    """The n of C_n(s), and the update at which a test stopped it."""

    n: jax.Array  # []
    stopped_at: jax.Array  # [] i32, -1 until then


class TrainState(NamedTuple):
    """The state of training, for one seed."""

    actor: dict
    critic: chex.ArrayTree  # both critics: stacked, leaves [2, ...]; a tuple where depths differ
    target_critic: chex.ArrayTree
    coefficient: dict
    log_alpha: jax.Array  # [] weight of the entropy
    log_alpha_prime: jax.Array  # [] Lagrange multiplier of the regulariser
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    coefficient_opt: optax.OptState
    log_alpha_opt: optax.OptState
    log_alpha_prime_opt: optax.OptState
    threshold: Threshold
    step: jax.Array  # [] i32, updates so far
    online_step: jax.Array  # [] i32, how many of them were online
    key: jax.Array  # [] PRNG key, constant: update t folds t into it


# -------------------------------------------------------------------------------------- networks


def dense(width, fan_in, kernel_init=None):
    """nn.Dense with PyTorch's init, U(-1, 1) / √fan_in; with a kernel_init, biases start at 0."""
    if kernel_init is not None:
        return nn.Dense(width, kernel_init=kernel_init)
    bound = fan_in**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    return nn.Dense(width, kernel_init=uniform, bias_init=uniform)


class MLP(nn.Module):
    """Linear layers with ReLUs between them, optionally with a LayerNorm before each ReLU."""

    widths: tuple[int, ...]
    layer_norm: bool = False
    kernel_inits: tuple = ()  # one per layer; PyTorch's by default

    @nn.compact
    def __call__(self, x):
        kernel_inits = self.kernel_inits or (None,) * len(self.widths)
        for i, (width, kernel_init) in enumerate(zip(self.widths, kernel_inits, strict=True)):
            if i > 0:
                x = nn.relu(nn.LayerNorm(epsilon=1e-5)(x) if self.layer_norm else x)
            x = dense(width, x.shape[-1], kernel_init)(x)
        return x


def init_mlp(key, in_dim, widths, **options):
    """Parameters of an MLP, [., in_dim] -> [., widths[-1]]."""
    return MLP(widths, **options).init(key, jnp.zeros((1, in_dim)))["params"]


def forward(params, x):
    """Applies an MLP; its widths are read from its parameters."""
    depth = sum(name.startswith("Dense") for name in params)
    widths = tuple(params[f"Dense_{i}"]["kernel"].shape[-1] for i in range(depth))
    return MLP(widths, layer_norm="LayerNorm_0" in params).apply({"params": params}, x)


def actor(params, obs):
    """π(·|s) = tanh N(μ, σ): [B, O] -> μ and log σ, [B, A] each."""
    mean, log_std = jnp.split(forward(params, obs), 2, axis=-1)
    scale, offset = params["log_std"]
    return mean, jnp.clip(scale * log_std + offset, -20, 2)


def init_actor(key, obs_dim, action_dim, hidden_dims):
    """π's parameters, [., obs_dim] -> [., 2 action_dim]: small means, log σ near -1."""
    small = nn.initializers.variance_scaling(0.01**2, "fan_avg", "uniform")  # 0.01 Xavier
    kernel_inits = (None,) * len(hidden_dims) + (small,)
    params = init_mlp(key, obs_dim, (*hidden_dims, 2 * action_dim), kernel_inits=kernel_inits)
    return params | {"log_std": jnp.array([1.0, -1.0])}  # a factor and an offset; both are learned


def log_density(distribution, unit):
    """log π of tanh(μ + σ unit), in each action dimension; finite also where tanh is ±1.

    distribution: μ and log σ. unit: the action before tanh, as (x - μ) / σ. All [..., A].
    """
    mean, log_std = distribution
    x = mean + jnp.exp(log_std) * unit
    log_slope = 2 * (jnp.log(2) - x - nn.softplus(-2 * x))  # log(1 - tanh² x)
    return -0.5 * (jnp.square(unit) + jnp.log(2 * jnp.pi)) - log_std - log_slope


def sample(distribution, unit):
    """Actions and their log-densities: μ, log σ [B, A], unit [B, K, A] -> [B, K, A], [B, K]."""
    mean, log_std = (x[:, None] for x in distribution)
    action = jnp.tanh(mean + jnp.exp(log_std) * unit)
    return action, log_density((mean, log_std), unit).sum(axis=-1)


def critic(params, obs, action):
    """Q(s, a): [B, O], [B, A] -> [B]; or [B, K, A] -> [B, K]."""
    if action.ndim > obs.ndim:
        obs = jnp.broadcast_to(obs[:, None], (*action.shape[:2], obs.shape[1]))
    x = jnp.concatenate([obs, action], axis=-1)
    return forward(params, x.reshape(-1, x.shape[-1])).reshape(action.shape[:-1])


def critics(params, obs, action):
    """Both Q: [B, O], [B, A] -> [2, B]; or [B, K, A] -> [2, B, K]."""
    if isinstance(params, tuple):
        return jnp.stack([critic(each, obs, action) for each in params])
    # vmap would copy a shared input to another layout: 6 % of an update on a CPU.
    obs, action = (jnp.broadcast_to(x, (2, *x.shape)) for x in (obs, action))
    return jax.vmap(critic)(params, obs, action)


def init_orthogonal_critics(key, in_dim, width, depths):
    """Parameters of two critics: orthogonal, gain √2 and 0.01 in the last layer; biases 0."""

    def init(key, depth):
        gains = (2**0.5,) * depth + (0.01,)
        kernel_inits = tuple(nn.initializers.orthogonal(gain) for gain in gains)
        widths = (width,) * depth + (1,)
        return init_mlp(key, in_dim, widths, layer_norm=True, kernel_inits=kernel_inits)

    pair = tuple(init(*args) for args in zip(jax.random.split(key), depths, strict=True))
    return pair if len(set(depths)) > 1 else jax.tree.map(lambda *x: jnp.stack(x), *pair)


def init_critics(key, in_dim, widths, **options):
    """Parameters of two critics with PyTorch's init, stacked."""
    return jax.vmap(lambda key: init_mlp(key, in_dim, widths, **options))(jax.random.split(key))


def coefficient(params, obs, config):
    """β_φ(s): [B, O] -> [B], in (0, 1.5 β_init)."""
    with jax.default_matmul_precision("float32"):  # TF32 would round its small changes away
        return 1.5 * config.coefficient_init * nn.sigmoid(forward(params, obs)[..., 0])


def init_coefficient(key, obs_dim, hidden_dims):
    """β_φ's parameters: Xavier-uniform; biases 0, the last ln 2: 1.5 sigmoid(ln 2) = 1."""
    kernel_inits = (nn.initializers.xavier_uniform(),) * (len(hidden_dims) + 1)
    params = init_mlp(key, obs_dim, (*hidden_dims, 1), kernel_inits=kernel_inits)
    params[f"Dense_{len(hidden_dims)}"]["bias"] += 0.6931
    return params


def descend(loss, params, optimizer, opt_state, *args):
    """One optimizer step down `loss(params, *args) -> (scalar, info)`."""
    grads, info = jax.grad(loss, has_aux=True)(params, *args)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, info


# --------------------------------------------------------------------- the trusted sub-dataset D̂


def episodes_of(rewards, ends):
    """First row, number of rows and undiscounted return of each episode: three arrays [episodes].

    rewards: float [N]. ends: bool [N], true in each episode's last row.
    """
    first = np.r_[0, np.flatnonzero(ends)[:-1] + 1]
    lengths = np.diff(np.r_[first, len(ends)])
    return first, lengths, np.add.reduceat(rewards.astype(np.float64), first)


def select_by_return(rewards, ends, return_threshold=None):
    """D̂ for dense rewards: trajectories of return > G_T; without G_T, the better half. bool [N]."""
    _, lengths, returns = episodes_of(rewards, ends)
    if return_threshold is not None:
        return np.repeat(returns > return_threshold, lengths)
    order = np.argsort(-returns)
    last = np.searchsorted(np.cumsum(lengths[order]), len(rewards) / 2)  # half the transitions
    return np.repeat(returns >= returns[order[last]], lengths)


def select_by_success(rewards, ends, fail_reward):
    """D̂ for sparse rewards: trajectories whose last reward is not fail_reward. bool [N]."""
    _, lengths, _ = episodes_of(rewards, ends)
    return np.repeat(rewards[ends] != np.float32(fail_reward), lengths)


class IQLState(NamedTuple):
    """Implicit Q-learning, only to label D̂, with the script's batch size, γ and target rate."""

    value: dict
    critic: dict  # both critics, stacked
    target_critic: dict
    value_opt: optax.OptState
    critic_opt: optax.OptState
    step: jax.Array  # [] i32
    key: jax.Array  # [] PRNG key, constant


iql_adam = optax.adam(3e-4)


def iql_init(key, obs_dim, action_dim):
    """One V and two Q with two layers of 256 units, without LayerNorm."""
    key, value_key, critic_key = jax.random.split(key, 3)
    value = init_mlp(value_key, obs_dim, (256, 256, 1))
    critic_params = init_critics(critic_key, obs_dim + action_dim, (256, 256, 1))
    target = jax.tree.map(jnp.copy, critic_params)
    adam_states = iql_adam.init(value), iql_adam.init(critic_params)
    return IQLState(value, critic_params, target, *adam_states, jnp.int32(0), key)


def iql_value_loss(params, state, batch, config):
    """Expectile regression of V(s) on min_i Q_target_i(s, a)."""
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
    """One IQL update: V, then both Q with the V(s') from before V's step, then the targets."""
    next_value = forward(state.value, batch.next_obs)[..., 0]
    value, value_opt, info = descend(
        iql_value_loss, state.value, iql_adam, state.value_opt, state, batch, config
    )
    critic_params, critic_opt, critic_info = descend(
        iql_critic_loss, state.critic, iql_adam, state.critic_opt, next_value, batch, config
    )
    target = optax.incremental_update(critic_params, state.target_critic, config.target_update_rate)
    state = IQLState(value, critic_params, target, value_opt, critic_opt, state.step + 1, state.key)
    return state, info | critic_info


def select_by_advantage(state, data):
    """D̂ by IQL: transitions with min(Q_1, Q_2)(s, a) >= V(s). bool [N]."""
    is_trusted = lambda row: critics(state.critic, *row).min() >= forward(state.value, row[0])[0]
    # A row is one (s, a), without a batch axis; a block of them at a time saves memory.
    return jax.lax.map(is_trusted, (data.obs, data.action), batch_size=4096)


# ---------------------------------------------------------------------------------------- losses


def critic_loss(params, state, batch, noise, distribution, weight, config):
    """TD error, and CQL's regulariser times `weight` [B]. distribution: π(·|s) before its step."""
    next_distribution = actor(state.actor, batch.next_obs)
    next_action, next_log_prob = sample(next_distribution, noise.target_action)  # [B, M, A], [B, M]
    next_q = critics(state.target_critic, batch.next_obs, next_action).min(axis=0)  # [B, M]
    best = next_q.argmax(axis=1, keepdims=True)
    if config.backup_entropy:
        next_q -= jnp.exp(state.log_alpha) * next_log_prob
    next_q = jnp.take_along_axis(next_q, best, axis=1)[:, 0]  # the best by Q alone
    target = batch.reward + config.discount * (1 - batch.terminated) * next_q  # [B]
    actions, log_prob = scored_actions(distribution, next_distribution, batch, noise)
    if config.block_size:  # the same result as below, faster on a CPU
        q = critics(params, batch.obs, batch.action)  # [2, B]
        score = lambda p, s, a, *rest: weighted_regulariser(critics(p, s, a), *rest, config)
        inputs = (batch.obs, actions, log_prob, weight)
        penalty = sum_in_blocks(score, config.block_size, params, inputs)
    else:
        scores = critics(params, batch.obs, actions)
        q, penalty = scores[..., 0], weighted_regulariser(scores, log_prob, weight, config)
    penalty /= len(weight)
    chex.assert_equal_shape([target, q[0], weight])
    td_loss = jnp.square(q - target).mean(axis=1).sum()
    loss = td_loss + multiplier(state.log_alpha_prime, config) * penalty
    info = {"critic_loss": loss, "td_loss": td_loss, "regulariser": penalty}
    return loss, info | {"q1": q.mean(axis=1)[0]}


def scored_actions(distribution, next_distribution, batch, noise):
    """The data's action, K uniform ones, K from π(·|s') and K from π(·|s): [B, 1 + 3K, A].

    Also returns the log-densities of the 3K sampled ones, [B, 3K].
    """
    next_action, next_log_prob = sample(next_distribution, noise.next_action)
    action, log_prob = sample(distribution, noise.current_action)
    uniform_log_prob = jnp.full_like(log_prob, action.shape[-1] * jnp.log(0.5))
    actions = [batch.action[:, None], noise.random_action, next_action, action]
    log_probs = [uniform_log_prob, next_log_prob, log_prob]
    return jnp.concatenate(actions, axis=1), jnp.concatenate(log_probs, axis=1)


def weighted_regulariser(q, log_prob, weight, config):
    """Σ weight (log Σ exp Q - Q(s, a)) over states and critics, minus the gap if lagrange.

    q: [2, b, 1 + 3K], the data's action first. The importance weights are 1 / exp(log_prob).
    """
    # Without importance sampling, the data's action counts as one more sample.
    scores = q[..., 1:] - log_prob if config.importance_sample else q
    temperature = config.cql_temperature
    soft_max = temperature * nn.logsumexp(scores / temperature, axis=-1)
    difference = jnp.clip(soft_max - q[..., 0], config.clip_diff_min, config.clip_diff_max)
    gap = config.target_action_gap if config.lagrange else 0
    return (weight * (difference - gap)).sum()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_in_blocks(loss, block_size, params, inputs):
    """loss(params, *inputs), a sum over the batch, computed a block at a time.

    inputs: arrays [B, ...], the weight last. A CPU's cache holds a block. Entries of weight 0 add
    nothing and are skipped. Only `params` get a gradient; the forward pass computes it already.
    """
    return block_gradients(loss, block_size, params, inputs)[0]


def block_gradients(loss, block_size, params, inputs):
    """The sum, and its gradient with respect to `params`."""
    weight = inputs[-1]
    size = min(block_size, len(weight))
    num_blocks = -(-len(weight) // size)
    chosen = jnp.nonzero(weight, size=num_blocks * size, fill_value=len(weight))[0]
    chosen = chosen.reshape(num_blocks, size)  # where weight is not 0; then out of bounds

    def add_block(i, total):
        block = [x.at[chosen[i]].get(mode="fill", fill_value=0) for x in inputs]
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, *block))

    zero = (jnp.zeros((), weight.dtype), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.fori_loop(0, -(-jnp.count_nonzero(weight) // size), add_block, zero)


sum_in_blocks.defvjp(
    block_gradients,  # computes the gradients as well; the backward pass scales them
    lambda loss, size, grads, scale: (jax.tree.map(lambda g: scale * g, grads), None),
)


def multiplier(log_alpha_prime, config):
    """α', or 1 without lagrange."""
    return jnp.clip(jnp.exp(log_alpha_prime), 0, 1e6) if config.lagrange else 1.0


def alpha_prime_loss(log_alpha_prime, penalty, config):
    """Raises α' while the penalty, the regulariser minus its gap, is positive. penalty: []."""
    alpha_prime = multiplier(log_alpha_prime, config)
    return -alpha_prime * penalty / 2, {"alpha_prime": alpha_prime}  # the mean of both critics


def actor_loss(params, state, batch, noise, config):
    """Soft actor-critic's loss, and AntMaze's cloning term; info also holds π(·|s)."""
    distribution = actor(params, batch.obs)
    action, log_prob = (x[:, 0] for x in sample(distribution, noise.action[:, None]))
    q = critics(state.critic, batch.obs, action).min(axis=0)  # [B]
    squared_error = jnp.square(action - batch.action).sum(axis=-1)
    chex.assert_equal_shape([q, log_prob, squared_error])
    loss = jnp.exp(state.log_alpha) * log_prob - q + config.bc_weight * squared_error
    info = {"actor_loss": loss.mean(), "entropy": -log_prob.mean(), "distribution": distribution}
    return loss.mean(), info


def alpha_loss(log_alpha, entropy, batch):
    """Raises α while the entropy is below -|A|."""
    return log_alpha * (entropy + batch.action.shape[-1]), {"alpha": jnp.exp(log_alpha)}


def log_likelihood_margin(params, batch, threshold):
    """log π(a|s) - C_n(s), averaged over action dimensions, log π at least C_10: [B] (Eq. 6)."""
    mean, log_std = actor(params, batch.obs)
    # Actions are in units of σ from μ before tanh, which float32 resolves for any σ. Clipping there
    # clips the action, because tanh is monotone.
    to_unit = lambda a: (jnp.arctanh(jnp.clip(a, -0.99999, 0.99999)) - mean) / jnp.exp(log_std)

    def log_density_away(n):
        low, high = to_unit(jnp.tanh(mean) - 0.1 * n), to_unit(jnp.tanh(mean) + 0.1 * n)
        sides = [log_density((mean, log_std), jnp.clip(unit, low, high)) for unit in (n, -n)]
        return jnp.minimum(*sides)

    log_prob = log_density((mean, log_std), to_unit(batch.action))  # [B, A]
    floored = jnp.maximum(log_prob, log_density_away(10))
    return (floored - log_density_away(threshold.n)).mean(axis=-1)


def coefficient_loss(params, batch, margin, mask, config):
    """Lowers β_φ where the margin [B] is positive and raises it where negative (Eq. 5, 9)."""
    beta = coefficient(params, batch.obs, config)
    chex.assert_equal_shape([beta, margin, mask])
    return (margin * mask * beta).mean(), {}


def update_threshold(threshold, margin, mask, step, config):
    """Raises n, which lowers C_n, until the masked mean margin is positive (Sec. 3.2)."""
    is_test = (step % config.update_period == 0) & (threshold.stopped_at < 0)
    passed = (margin * mask).sum() > 0  # has the sign of the mean; an empty mask never passes
    raised = jnp.minimum(threshold.n + (config.n_end - config.n_start) / 10, config.n_end)
    n = jnp.where(is_test & ~passed, raised, threshold.n)
    return Threshold(n, jnp.where(is_test & passed, step, threshold.stopped_at))


def anneal_factor(online_step, config):
    """The factor on β in online update N = 1, 2, ...: it falls from 1, and is 0 from N_end on."""
    if config.anneal == "none" or config.decay_steps <= 0:
        return 1.0
    done = jnp.clip(jnp.asarray(online_step, float) / config.decay_steps, 0, 1)
    return 1 - done if config.anneal == "linear" else jnp.maximum(jnp.cos(done * jnp.pi / 2), 0)


# -------------------------------------------------------------------------- state and its update


def optimizers(config, step=None):
    """Adam for actor, critics and β_φ; β_φ's gradient is clipped to norm 0.5, as PyTorch clips."""
    factor = lambda grads: jnp.minimum(1, 0.5 / (optax.tree.norm(grads) + 1e-6))
    clip = optax.stateless(lambda grads, _: optax.tree.scale(factor(grads), grads))
    beta_adam = optax.chain(clip, optax.adam(config.coefficient_lr))
    actor_lr = config.actor_lr
    if config.actor_lr_decay and step is not None:  # offline; reaches 0 at update offline_steps
        actor_lr *= 0.5 + 0.5 * jnp.cos(jnp.minimum(jnp.pi * step / config.offline_steps, jnp.pi))
    return optax.adam(actor_lr), optax.adam(config.critic_lr), beta_adam


def init_state(key, obs_dim, action_dim, config):
    """The state before the first update. Targets are copies, so that both can be donated."""
    key, actor_key, critic_key, beta_key = jax.random.split(key, 4)
    actor_params = init_actor(actor_key, obs_dim, action_dim, config.hidden_dims)
    sizes = obs_dim + action_dim, config.hidden_dims[0], config.critic_layers
    critic_params = init_orthogonal_critics(critic_key, *sizes)
    coefficient_params = init_coefficient(beta_key, obs_dim, config.coefficient_hidden_dims)
    log_alpha, log_alpha_prime = jnp.zeros(()), jnp.ones(())
    actor_adam, critic_adam, beta_adam = optimizers(config)
    return TrainState(
        actor=actor_params,
        critic=critic_params,
        target_critic=jax.tree.map(jnp.copy, critic_params),
        coefficient=coefficient_params,
        log_alpha=log_alpha,
        log_alpha_prime=log_alpha_prime,
        actor_opt=actor_adam.init(actor_params),
        critic_opt=critic_adam.init(critic_params),
        coefficient_opt=beta_adam.init(coefficient_params),
        log_alpha_opt=actor_adam.init(log_alpha),
        log_alpha_prime_opt=critic_adam.init(log_alpha_prime),
        threshold=Threshold(n=jnp.asarray(config.n_start, float), stopped_at=jnp.int32(-1)),
        step=jnp.int32(0),
        online_step=jnp.int32(0),
        key=key,
    )


def sample_noise(key, batch, config):
    """The random numbers of one update."""
    (rows, action_dim), samples = batch.action.shape, config.num_sampled_actions
    many = (rows, samples, action_dim)
    next_actions = (rows, samples if config.max_target_backup else 1, action_dim)
    keys = jax.random.split(key, 5)
    return Noise(
        action=jax.random.normal(keys[0], batch.action.shape),
        target_action=jax.random.normal(keys[1], next_actions),
        random_action=jax.random.uniform(keys[2], many, minval=-1),
        current_action=jax.random.normal(keys[3], many),
        next_action=jax.random.normal(keys[4], many),
    )


def update_step(state, batch, noise, config, *, online=False):
    """One update: actor and α, critics and α', then β_φ and the threshold, then the targets.

    batch: actions in [-1, 1]; make_transitions clips the data's to ±0.9999. online: φ and n stay
    frozen, and β_φ is annealed. online and config, a FrozenConfigDict, are static.
    """
    state = state._replace(step=state.step + 1, online_step=state.online_step + online)
    actor_adam, critic_adam, _ = optimizers(config, None if online else state.step)
    everywhere = jnp.ones_like(batch.trusted)
    # --- actor and α: against the critics before their step ---
    actor_params, actor_opt, info = descend(
        actor_loss, state.actor, actor_adam, state.actor_opt, state, batch, noise, config
    )
    distribution = info.pop("distribution")
    log_alpha, log_alpha_opt, alpha_info = descend(
        alpha_loss, state.log_alpha, actor_adam, state.log_alpha_opt, info["entropy"], batch
    )

    # --- critics: β_φ weights the regulariser, which covers D̂ alone if loosen_bound ---
    beta, regularised = config.coefficient_init * everywhere, everywhere
    if config.coefficient == "adaptive":
        beta = coefficient(state.coefficient, batch.obs, config)
        regularised = batch.trusted if config.loosen_bound else everywhere  # m_Q
    anneal = anneal_factor(state.online_step, config) if online else 1.0
    weight = beta * regularised * anneal
    critic_params, critic_opt, critic_info = descend(
        critic_loss, state.critic, critic_adam, state.critic_opt,
        state, batch, noise, distribution, weight, config,
    )  # fmt: skip
    info |= alpha_info | critic_info
    info["anneal"] = jnp.asarray(anneal, beta.dtype)
    state = state._replace(actor=actor_params, actor_opt=actor_opt)
    state = state._replace(critic=critic_params, critic_opt=critic_opt)
    state = state._replace(log_alpha=log_alpha, log_alpha_opt=log_alpha_opt)
    if config.lagrange:
        state, multiplier_info = update_multiplier(state, info["regulariser"], config)
        info |= multiplier_info

    # --- β_φ and n: the margin is that of the actor after its step ---
    margin = log_likelihood_margin(state.actor, batch, state.threshold)
    mask = batch.trusted if config.select_actions else everywhere  # m_β
    if config.coefficient == "adaptive" and not online:
        state = update_coefficient(state, batch, margin, mask, config)

    # --- targets ---
    rate = config.target_update_rate
    state = state._replace(
        target_critic=optax.incremental_update(state.critic, state.target_critic, rate)
    )
    return state, info | coefficient_metrics(beta, regularised, margin, mask, batch)


def update_multiplier(state, penalty, config):
    """One step of α', where `penalty` is the weighted regulariser of both critics."""
    _, critic_adam, _ = optimizers(config)
    log_alpha_prime, opt_state, info = descend(
        alpha_prime_loss, state.log_alpha_prime, critic_adam, state.log_alpha_prime_opt,
        penalty, config,
    )  # fmt: skip
    return state._replace(log_alpha_prime=log_alpha_prime, log_alpha_prime_opt=opt_state), info


def update_coefficient(state, batch, margin, mask, config):
    """One step of β_φ, and the test of n where one is due; `mask`, [B], is m_β."""
    _, _, beta_adam = optimizers(config)
    params, opt_state, _ = descend(
        coefficient_loss, state.coefficient, beta_adam, state.coefficient_opt,
        batch, margin, mask, config,
    )  # fmt: skip
    threshold = update_threshold(state.threshold, margin, mask, state.step, config)
    return state._replace(coefficient=params, coefficient_opt=opt_state, threshold=threshold)


def coefficient_metrics(beta, regularised, margin, mask, batch):
    """Metrics of β_φ, where it has an effect, and of the margin. Scalars."""
    shown = jnp.where(regularised.any(), regularised, 1) > 0  # if there are none, show all
    return {
        "beta_min": beta.min(where=shown, initial=jnp.inf),
        "beta_mean": beta.mean(where=shown),
        "beta_max": beta.max(where=shown, initial=0),
        "margin": margin.mean(),
        "trusted_margin": (margin * mask).sum() / jnp.maximum(mask.sum(), 1),
        "constrained_fraction": (margin < 0).mean(dtype=margin.dtype),  # of the whole batch
        "trusted_fraction": batch.trusted.mean(),
    }


# ================================================================================================
# The algorithm ends here. Below is one way to run it: replace it with yours. `seeds.vmap` compiles
# one-seed functions for S seeds at once. Only `main` and the last lines import common/.
# ================================================================================================


def take(data, indices):
    """The transitions at `indices`, all of them within bounds."""
    return jax.tree.map(lambda x: x.at[indices].get(mode="promise_in_bounds"), data)


def modify_reward(reward, config):
    """The reward to learn from, offline and online: scaled, then shifted."""
    return config.reward_scale * reward + np.float32(config.reward_bias)


def scale_sparse_rewards(config, rewards, terminals):
    """config with the scale and bias that turn recorded rewards of two values into -5 and 5."""
    given = config.reward_scale, config.reward_bias, config.return_threshold
    values = [*map(float, np.unique(rewards))]
    is_sparse = len(values) == 2 and (rewards[terminals] == values[1]).all()  # only success ends it
    if not config.scale_sparse_rewards or given != (1, 0, None) or not is_sparse:
        return config
    scale = 10 / (values[1] - values[0])
    print(f"rewards {values[0]:g} and {values[1]:g} become -5 and 5", flush=True)
    return type(config)({**config, "reward_scale": scale, "reward_bias": -5 - scale * values[0]})


def update_keys(key, step):
    """The keys of update `step`, for its batch and its noise, whatever updates_per_call is."""
    return jax.random.split(jax.random.fold_in(key, step))


def sample_indices(keys, data, config):
    """Uniform indices of one batch per key: keys [T] -> i32 [T, B]."""
    sample = lambda key: jax.random.randint(key, (config.batch_size,), 0, len(data.reward))
    return jax.vmap(sample)(keys)


# ---------------------------------------------------------------- training, acting and labelling


def train_interval(state, data, config, num_updates=None):
    """`num_updates` updates in one scan, by default config.updates_per_call.

    data: Transition [N, ...]. Returns the state and the means of the metrics.
    """
    steps = state.step + 1 + jnp.arange(num_updates or config.updates_per_call)
    keys = jax.vmap(partial(update_keys, state.key))(steps)  # [T, 2]
    draws = sample_indices(keys[:, 0], data, config), keys[:, 1]
    names = []  # of the metrics, which leave the scan as one array: one kernel, not one each

    def body(state, draws):
        indices, key = draws
        batch = take(data, indices)
        noise = sample_noise(key, batch, config)
        state, info = update_step(state, batch, noise, config)
        names[:] = info  # filled when scan traces this function
        return state, jnp.stack([*info.values()])

    state, metrics = jax.lax.scan(body, state, draws)
    return state, dict(zip(names, metrics.mean(axis=0), strict=True))


def act(actor_params, observations):
    """The policy to evaluate, tanh(μ): standardised [B, O] -> [B, A]."""
    mean, _ = actor(actor_params, observations)
    return jnp.tanh(mean)


# The in_axes of a data set: the seeds share it, but each has its own D̂.
DATA_AXES = Transition(None, None, None, None, None, trusted=0)


def pretrain(state, data, evaluate, seeds, run, config):
    """Offline: compiled calls of updates_per_call updates, and an evaluation after each interval.

    state: TrainState [S, ...], donated. data: Transition [N, ...], its `trusted` [S, N].
    """
    train = partial(train_interval, config=config)
    train = seeds.vmap(train, in_axes=(0, DATA_AXES), donate=0, is_loop=True)
    policy = seeds.vmap(act)
    state = run.resume("offline", state, config.offline_steps)
    for end in range(config.eval_interval, config.offline_steps + 1, config.eval_interval):
        for step in run.steps(end, config.updates_per_call):
            state, metrics = train(state, data)
            run.log(step, metrics)
            run.save(step, state)
        run.evaluate(end, partial(evaluate, policy, state.actor), state.threshold.n)
    return state


def iql_interval(state, data, config):
    """config.updates_per_call IQL updates in one scan. Returns the state and the mean losses."""
    steps = state.step + 1 + jnp.arange(config.updates_per_call)
    keys = jax.vmap(partial(jax.random.fold_in, state.key))(steps)
    body = lambda state, indices: iql_step(state, take(data, indices), config)
    state, info = jax.lax.scan(body, state, sample_indices(keys, data, config))
    return state, jax.tree.map(jnp.mean, info)


def label_by_iql(keys, data, seeds, run, config):
    """Trains one IQL for each seed, and labels the data with its advantage: keys [S] -> [S, N]."""
    # init_state uses these keys too: a fold gives IQL keys of its own.
    keys = jax.vmap(partial(jax.random.fold_in, data=2**32 - 1))(keys)
    init = partial(iql_init, obs_dim=data.obs.shape[1], action_dim=data.action.shape[1])
    train = partial(iql_interval, config=config)
    train = seeds.vmap(train, in_axes=(0, None), donate=0, is_loop=True)
    label = seeds.vmap(select_by_advantage, in_axes=(0, None), is_loop=True)
    state = run.resume("iql", seeds.spread(jax.vmap(init)(keys)), config.iql_steps)
    for step in run.steps(config.iql_steps, config.updates_per_call):
        state, metrics = train(state, data)
        run.log(step, metrics)
        run.save(step, state)
    return np.asarray(label(state, data))


def select_trusted(rewards, ends, label, config):
    """D̂ as config.selection builds it: bool [S, N]. `label` trains IQL and labels with it.

    rewards: float [N], scaled and shifted. ends: bool [N], the last row of each episode.
    """
    is_unused = not config.offline_steps and config.buffer_init == "none"  # no row is ever used
    is_sparse = config.return_threshold is None and len(np.unique(rewards)) == 2  # two values
    selection = config.selection.replace("auto", "success" if is_sparse else "return")
    if config.coefficient == "fixed" or selection == "none" or is_unused:
        trusted = np.ones(len(rewards), bool)
    elif selection == "return":
        trusted = select_by_return(rewards, ends, config.return_threshold)
    elif selection == "success":
        trusted = select_by_success(rewards, ends, fail_reward=rewards.min())
    else:
        trusted = label()
    return np.broadcast_to(trusted, (config.num_seeds, len(rewards)))


# ----------------------------------------------------------------------------- offline to online


class ReplayBuffer(NamedTuple):
    """One seed's C latest online transitions: once it is full, a new one replaces the oldest."""

    rows: Transition  # [C, ...]
    added: jax.Array  # [] i32, transitions stored so far


def init_buffer(data, config):
    """An empty replay buffer for rows like those of `data`, but with one seed's `trusted`, [C]."""
    capacity = config.buffer_capacity or config.online_steps
    empty = lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype)
    return ReplayBuffer(jax.tree.map(empty, data._replace(trusted=data.reward)), jnp.int32(0))


def store(buffer, transition):
    """Adds one transition, a Transition without its leading axis."""
    place = buffer.added % len(buffer.rows.reward)
    write = lambda rows, x: rows.at[place].set(x)
    return ReplayBuffer(jax.tree.map(write, buffer.rows, transition), buffer.added + 1)


def offline_part(data, ends, config):
    """The offline transitions that stay in use online, by buffer_init: Transition [M, ...].

    data: Transition [N, ...], its `trusted` [S, N]. ends: bool [N], the last row of each episode.
    """
    if config.buffer_init in ("all", "half"):
        return data
    indices = np.arange(0)
    if config.buffer_init == "part":
        first, lengths, returns = episodes_of(np.asarray(data.reward), ends)
        best = np.argsort(-returns, kind="stable")[:50]
        indices = np.concatenate([np.arange(first[i], first[i] + lengths[i]) for i in best])
    return Transition(*(x[indices] for x in data[:-1]), trusted=data.trusted[:, indices])


def sample_batch(key, data, buffer, config):
    """A batch of offline and online transitions, all equally likely; `half`: half of each."""
    shape, keys = (config.batch_size,), jax.random.split(key, 3)
    num_offline = len(data.reward)
    num_online = jnp.minimum(buffer.added, len(buffer.rows.reward))
    online = take(buffer.rows, jax.random.randint(keys[0], shape, 0, num_online))
    if num_offline == 0:
        return online
    offline = take(data, jax.random.randint(keys[1], shape, 0, num_offline))
    if config.buffer_init == "half":
        is_offline = jnp.arange(config.batch_size) < config.batch_size // 2
    else:
        is_offline = jax.random.randint(keys[2], shape, 0, num_offline + num_online) < num_offline
    pick = partial(jax.vmap(jnp.where), is_offline)  # row by row
    return jax.tree.map(pick, offline, online)


def explore(actor_params, obs, key, step, config):
    """The action at environment step `step`, a sample of π(·|s): standardised [O] -> [A]."""
    mean, log_std = actor(actor_params, obs)
    noise = jax.random.normal(jax.random.fold_in(key, step), mean.shape)
    return jnp.tanh(mean + jnp.exp(log_std) * noise)


def online_update(state, buffer, data, config):
    """One update on a batch of offline and online transitions."""
    index_key, noise_key = update_keys(state.key, state.step + 1)
    batch = sample_batch(index_key, data, buffer, config)
    noise = sample_noise(noise_key, batch, config)
    return update_step(state, batch, noise, config, online=True)


def finetune(state, data, envs, evaluate, seeds, run, config):
    """Online: each seed steps its own environment, then all seeds make one update, and so on.

    state: TrainState [S, ...], donated. data: Transition [M, ...], its `trusted` [S, M].
    envs: a Collector. The first warmup_steps steps collect without updates.
    """
    choose = seeds.vmap(partial(explore, config=config), in_axes=(0, 0, 0, None))
    add = seeds.vmap(store, donate=0)
    learn = partial(online_update, config=config)
    learn = seeds.vmap(learn, in_axes=(0, 0, DATA_AXES), donate=0)
    policy = seeds.vmap(act)
    # Exploration's own keys: no update has the number 2**32 - 1.
    keys = jax.vmap(partial(jax.random.fold_in, data=2**32 - 1))(state.key)
    buffer = seeds.spread(jax.vmap(lambda _: init_buffer(data, config))(keys))
    state, buffer = run.resume("online", (state, buffer), config.online_steps)
    obs = envs.reset(run.step)
    for end in range(0, config.online_steps + 1, config.eval_interval):
        for step in run.steps(end):
            action = np.asarray(choose(state.actor, obs, keys, step))
            outcome = envs.step(action)
            reward = modify_reward(outcome.reward, config)
            ended, trusted = outcome.terminated, np.ones_like(reward)
            buffer = add(buffer, Transition(obs, action, reward, outcome.next_obs, ended, trusted))
            obs, metrics = outcome.obs, {}
            if step > config.warmup_steps:
                state, metrics = learn(state, buffer, data)
            run.log(step, metrics, outcome.finished)
            run.save(step, (state, buffer))
        run.evaluate(end, partial(evaluate, policy, state.actor), state.threshold.n)
    return state


# ------------------------------------------------------------------------------------------ main

NAME = Path(__file__).stem  # names the settings file, configs/NAME.py, and the folder runs/NAME


def make_transitions(dataset, config):
    """The data set as a Transition [N, ...] of NumPy arrays: actions clipped, not labelled yet."""
    return Transition(
        obs=dataset.observations,
        action=dataset.actions.clip(-1 + 1e-4, 1 - 1e-4),
        reward=modify_reward(dataset.rewards, config),
        next_obs=dataset.next_observations,
        terminated=dataset.terminals.astype(np.float32),
        trusted=None,
    )


def main(config, workdir=None, resume=True):
    """Trains and evaluates num_seeds seeds; writes the run folder and returns its results.json.

    resume: whether to continue an unfinished run in `workdir` that has the same settings.
    Raises InputError for settings or data that cannot be used.
    """
    from common.data import load_dataset
    from common.evaluation import Collector, Evaluator
    from common.run import Run, check_trusted, load_offline, prepare, save_checkpoint
    from common.seeds import Seeds

    config, workdir = prepare(config, workdir, NAME, resume)
    dataset = load_dataset(config)
    evaluate = Evaluator(dataset, config.num_seeds, config.eval_episodes, config.seed)
    run = Run(NAME, workdir, config, dataset, resume)
    seeds = Seeds(config.num_seeds)
    keys = jnp.stack([jax.random.key(config.seed + i) for i in range(config.num_seeds)])

    # --- the data, and for each seed its state and the transitions that it trusts ---
    config = scale_sparse_rewards(config, dataset.rewards, dataset.terminals)
    data = make_transitions(dataset, config)
    sizes = {"obs_dim": data.obs.shape[1], "action_dim": data.action.shape[1]}
    init = partial(jax.lax.map, partial(init_state, **sizes, config=config))  # each as if alone
    data = seeds.share(data)
    if config.offline_checkpoint:
        state, trusted = load_offline(config, dataset, like=jax.eval_shape(init, keys))
    else:
        state, label = init(keys), partial(label_by_iql, keys, data, seeds, run, config)
        trusted = select_trusted(np.asarray(data.reward), dataset.episode_ends, label, config)
        check_trusted(trusted, dataset, config)
    state = seeds.spread(state)
    data = data._replace(trusted=seeds.spread(trusted.astype(np.float32)))

    # --- offline, then online ---
    if config.offline_steps and not config.offline_checkpoint:
        state = pretrain(state, data, evaluate, seeds, run, config)
        if config.online_steps:
            save_checkpoint(run.workdir, "offline_checkpoint", state, trusted, dataset)
    if config.online_steps:
        envs = Collector(dataset, config.num_seeds, config.seed)
        data = offline_part(data, dataset.episode_ends, config)
        state = finetune(state, data, envs, evaluate, seeds, run, config)
    save_checkpoint(run.workdir, "checkpoint", state, trusted, dataset)
    return run.finish(state.threshold.stopped_at, trusted)


if __name__ == "__main__":
    from common.run.cli import run

    run(main, NAME)
