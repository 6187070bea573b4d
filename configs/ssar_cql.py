"""Settings of ssar_cql.py: --config=configs/ssar_cql.py:<task>; the default task is demo."""

import ml_collections
from ml_collections import config_dict

# The authors' settings: n_end, how D̂ is selected, G_T or expectile, loosen_bound.
MUJOCO = {
    "halfcheetah-medium-v2": (3.0, "return", 6000, True),
    "halfcheetah-medium-replay-v2": (3.0, "return", 6000, True),
    "halfcheetah-medium-expert-v2": (3.0, "return", 11000, True),
    "halfcheetah-expert-v2": (3.0, "return", 11000, True),
    "hopper-medium-v2": (3.0, "return", 2500, True),
    "hopper-medium-replay-v2": (3.0, "iql", 0.7, True),
    "hopper-medium-expert-v2": (1.5, "iql", 0.5, True),
    "hopper-expert-v2": (1.5, "return", 3500, True),
    "walker2d-medium-v2": (3.0, "return", 3600, True),
    "walker2d-medium-replay-v2": (3.0, "iql", 0.7, True),
    "walker2d-medium-expert-v2": (3.0, "iql", 0.7, True),
    "walker2d-expert-v2": (3.0, "return", 4800, True),
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
    # turns rewards of two values into -5 and 5 if only success ends an episode
    c.scale_sparse_rewards = False

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
    c.updates_per_call = 50  # in one compiled call, at most; a divisor of eval_interval is used
    c.checkpoint_minutes = 1.0  # between checkpoints; 0: only before evaluations
    c.cache_dir = "~/.cache/ssar-jax"  # compiled programs
    c.wandb = config_dict.placeholder(str)  # project of Weights & Biases to send curves to

    # CQL
    c.matmul_precision = "float32"  # or bfloat16, as JAX understands it; β_φ stays in float32
    c.batch_size = 256
    c.discount = 0.99
    c.target_update_rate = 0.005
    c.actor_lr = 3e-5
    c.actor_lr_decay = False  # offline: to 0 along a cosine, as is α's rate; online: constant
    c.critic_lr = 3e-4
    c.hidden_dims = (256, 256, 256)
    c.critic_layers = (3, 3)  # hidden layers of each critic, as wide as the actor's
    c.num_sampled_actions = 10  # from each of three sources
    c.importance_sample = True
    c.cql_temperature = 1.0
    c.clip_diff_min = config_dict.placeholder(float)  # bounds of the regulariser
    c.clip_diff_max = config_dict.placeholder(float)
    c.lagrange = False
    c.target_action_gap = 0.8  # with lagrange
    c.max_target_backup = False
    c.backup_entropy = False
    c.bc_weight = 0.0
    # states whose sampled actions are scored at once; by default 32 on a CPU, else the whole batch
    c.block_size = config_dict.placeholder(int)

    # the coefficient β_φ and its threshold C_n
    c.coefficient = "adaptive"  # adaptive | fixed (plain CQL)
    c.coefficient_init = 10.0
    c.cql_alpha = c.get_ref("coefficient_init")  # CQL's own name for it
    c.coefficient_lr = 1e-8
    c.coefficient_hidden_dims = (512, 512, 512)
    c.n_start = 1.0
    c.n_end = 3.0
    c.update_period = 50_000  # T_inc

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
    c.anneal = "cosine"  # how the frozen β_φ fades: linear | cosine | none
    c.decay_steps = 400_000  # updates until it has faded; 0 or less: never
    return c


def get_config(task="demo"):
    """The settings of one task; raises ValueError for an unknown one."""
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}': choose one of {', '.join(TASKS)}")
    c = defaults()
    if task == "custom":
        # With the authors' settings, short runs may fail: see experiments/.
        c.actor_lr, c.actor_lr_decay, c.scale_sparse_rewards = 3e-4, True, True
        c.coefficient_init, c.loosen_bound = 5.0, False
        return c
    if task == "ogbench":
        c.task, c.selection = task, "iql"
        c.hidden_dims, c.critic_layers = (512,) * 4, (4, 4)
        c.eval_interval, c.eval_episodes = 50_000, 50
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
        c.normalize_observations, c.reward_scale, c.reward_bias = False, 10.0, -5.0
        c.offline_steps = c.full_length = 2_000_000
        c.eval_interval, c.eval_episodes = 50_000, 100
        c.actor_lr, c.coefficient_init, c.critic_layers = 1e-4, 5.0, (5, 3)
        c.lagrange, c.clip_diff_min = True, -200.0
        c.max_target_backup, c.bc_weight = True, 0.5
    else:  # demo, demo-sparse
        c.offline_steps = c.full_length = c.iql_steps = 10_000
        c.eval_interval, c.eval_episodes = 500, 20
        c.hidden_dims, c.coefficient_hidden_dims = (128, 128, 128), (128, 128, 128)
        c.num_sampled_actions, c.actor_lr = 4, 3e-4
        if task == "demo":
            c.selection, c.return_threshold = "return", -12.0
        else:
            c.selection, c.loosen_bound, c.buffer_init = "success", False, "all"
            c.n_end, c.eval_episodes = 5.0, 50
            c.reward_scale, c.reward_bias, c.coefficient_init = 10.0, -5.0, 5.0
        c.update_period, c.coefficient_lr = 500, 2e-6
        c.warmup_steps, c.decay_steps = 500, 10_000
    return c
