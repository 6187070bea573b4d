"""Settings of ssar_td3bc.py: --config=configs/ssar_td3bc.py:<task>; the default task is demo."""

import ml_collections
from ml_collections import config_dict

# The authors' settings: n_end, how D̂ is selected, G_T or expectile, loosen_bound.
MUJOCO = {
    "halfcheetah-medium-v2": (3.0, "return", 5200, True),
    "halfcheetah-medium-replay-v2": (3.0, "iql", 0.7, True),
    "halfcheetah-medium-expert-v2": (1.5, "iql", 0.7, False),
    "halfcheetah-expert-v2": (1.5, "return", 10500, True),
    "hopper-medium-v2": (3.0, "return", 1800, True),
    "hopper-medium-replay-v2": (3.0, "iql", 0.7, True),
    "hopper-medium-expert-v2": (1.5, "iql", 0.5, True),
    "hopper-expert-v2": (1.5, "return", 3500, True),
    "walker2d-medium-v2": (3.0, "return", 2500, True),
    "walker2d-medium-replay-v2": (3.0, "iql", 0.7, True),
    "walker2d-medium-expert-v2": (1.5, "iql", 0.7, True),
    "walker2d-expert-v2": (1.5, "return", 4500, True),
}
# n_start, n_end
ANTMAZE = {
    "antmaze-umaze-v2": (1.0, 5.0),
    "antmaze-umaze-diverse-v2": (1.0, 3.0),
    "antmaze-medium-play-v2": (5.0, 5.0),
    "antmaze-medium-diverse-v2": (5.0, 5.0),
    "antmaze-large-play-v2": (5.0, 5.0),
    "antmaze-large-diverse-v2": (5.0, 5.0),
}
NEW_POLICY_FREQ = {
    "antmaze-medium-play-v2": 30,
    "antmaze-medium-diverse-v2": 20,
    "antmaze-large-play-v2": 100,
    "antmaze-large-diverse-v2": 100,
}
# custom: your own data, with the paper's sizes; ogbench: OGBench's tasks, with OGBench's sizes
TASKS = ("demo", "demo-sparse", "custom", "ogbench", *MUJOCO, *ANTMAZE)


def defaults():
    """The authors' usual settings for MuJoCo, and selection=auto; get_config adds a task's own."""
    c = ml_collections.ConfigDict()

    # data
    c.task = "custom"
    # demo | demo-sparse | <D4RL task> | d4rl:<HDF5 file> | ogbench:<task> | <Minari id>
    c.dataset = config_dict.placeholder(str)
    c.dataset_path = config_dict.placeholder(str)  # the file to read for that data set
    c.env = config_dict.placeholder(str)  # Gymnasium id; by default the one that the data name
    c.max_episode_steps = config_dict.placeholder(int)  # by default the environment's limit
    # <random return>,<expert return>, which score 0 and 100; by default the data's or D4RL's own
    c.reference = config_dict.placeholder(tuple)
    c.physics = config_dict.placeholder(str)  # d4rl | stock; by default d4rl for D4RL's tasks
    c.observation_keys = ""  # of dictionary observations, such as observation,desired_goal
    c.d4rl_rows = "all"  # all | qlearning: only those that D4RL's qlearning_dataset keeps
    c.normalize_observations = True
    c.reward_scale = 1.0
    c.reward_bias = 0.0

    # the run
    c.seed = 0
    c.num_seeds = 1  # seed, seed + 1, ... train together in one program
    c.offline_steps = 1_000_000
    c.online_steps = 0  # environment steps afterwards; the paper takes 250_000
    # A run of another length than full_length scales eval_interval, update_period and iql_steps in
    # proportion and, in the paper's tasks and the demos, coefficient_lr inversely, unless they are
    # given on the command line.
    c.full_length = 1_000_000
    c.eval_interval = 5_000  # updates offline, environment steps online
    c.eval_episodes = 10
    c.updates_per_call = 250  # in one compiled call, at most; a divisor of eval_interval is used
    c.checkpoint_minutes = 1.0  # between checkpoints; 0: only before evaluations
    c.cache_dir = "~/.cache/ssar-jax"  # compiled programs
    c.wandb = config_dict.placeholder(str)  # project of Weights & Biases to send curves to

    # TD3+BC
    c.matmul_precision = "float32"  # or bfloat16, as JAX understands it; β_φ stays in float32
    c.batch_size = 256
    c.discount = 0.99
    c.target_update_rate = 0.005
    c.actor_lr = 3e-4
    c.actor_lr_decay = False  # offline: to 0 along a cosine; online: constant
    c.critic_lr = 3e-4
    c.hidden_dims = (256, 256)
    c.policy_noise = 0.2  # standard deviation of the noise on the target action
    c.noise_clip = 0.5
    c.policy_freq = 2  # updates of the critics for each one of the actor

    # the coefficient β_φ and its threshold C_n
    c.coefficient = "adaptive"  # adaptive | fixed (plain TD3+BC)
    c.coefficient_init = 0.4
    c.coefficient_lr = 3e-8
    c.coefficient_hidden_dims = (512, 512, 512)
    c.n_start = 1.0
    c.n_end = 3.0
    c.update_period = 50_000  # T_inc
    c.expl_noise = 0.1  # σ, the width of the Gaussian around π(s)

    # the trusted sub-dataset D̂
    # auto: success if rewards take two values only and no return_threshold is given, else return
    c.selection = "auto"  # auto | none | return | success | iql
    c.return_threshold = config_dict.placeholder(float)  # G_T; by default the better half
    c.expectile = 0.7
    c.iql_steps = 1_000_000
    c.select_actions = True
    c.loosen_bound = True

    # online
    c.offline_checkpoint = config_dict.placeholder(str)  # the folder of a run to fine-tune
    # offline transitions in use: all | half (of each batch) | part (the 50 best episodes) | none
    c.buffer_init = "part"
    c.buffer_capacity = config_dict.placeholder(int)  # by default online_steps
    c.warmup_steps = 5_000  # environment steps before the first update
    c.new_policy_freq = 2  # takes the place of policy_freq online
    c.exploration_noise = 0.0  # standard deviation of the noise on π(s) online
    c.anneal = "linear"  # how the frozen β_φ fades: linear | cosine | none
    c.decay_steps = 400_000  # updates until it has faded; 0 or less: never
    return c


def get_config(task="demo"):
    """The settings of one task; raises ValueError for an unknown one."""
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}': choose one of {', '.join(TASKS)}")
    c = defaults()
    if task == "custom":
        # With 0.4, or at a constant rate, short runs may end below their data: see experiments/.
        c.coefficient_init, c.actor_lr_decay = 2.0, True
        return c
    if task == "ogbench":
        c.task, c.selection, c.coefficient_init = task, "iql", 2.0
        c.hidden_dims, c.eval_interval, c.eval_episodes = (512,) * 4, 50_000, 50
        return c
    c.task = c.dataset = task
    if task in MUJOCO:
        c.n_end, c.selection, value, c.loosen_bound = MUJOCO[task]
        if c.selection == "return":
            c.return_threshold = float(value)
        else:
            c.expectile = value
    elif task in ANTMAZE:
        c.n_start, c.n_end = ANTMAZE[task]
        c.selection, c.loosen_bound, c.buffer_init = "success", False, "all"
        c.reward_bias = -1.0
        c.offline_steps = c.full_length = 2_000_000
        c.eval_interval, c.eval_episodes = 50_000, 100
        c.anneal = "linear" if task.startswith("antmaze-umaze") else "none"
        c.new_policy_freq = NEW_POLICY_FREQ.get(task, 2)
    else:  # demo, demo-sparse
        c.offline_steps = c.full_length = c.iql_steps = 20_000
        c.eval_interval, c.eval_episodes = 1_000, 20
        c.hidden_dims, c.coefficient_hidden_dims = (128, 128), (128, 128, 128)
        if task == "demo":
            c.selection, c.return_threshold = "return", -12.0
        else:
            c.selection, c.loosen_bound, c.buffer_init = "success", False, "all"
            c.n_end, c.reward_bias, c.eval_episodes = 5.0, -1.0, 50
        c.update_period, c.coefficient_lr = 1_000, 6e-6
        c.warmup_steps, c.decay_steps = 500, 20_000
    return c
