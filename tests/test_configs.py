"""The task table against the authors' settings, and checks of what a user may set."""

import ml_collections
import pytest
from toys import tiny_config

from common import d4rl
from common.checks import InputError, check_config
from configs import ssar_cql, ssar_td3bc

# n_start, n_end, selection, G_T or expectile, loosen_bound: as the authors ran TD3+BC(SA)
AUTHORS = """
halfcheetah-medium-v2         1 3   return  5200  yes
halfcheetah-medium-replay-v2  1 3   iql     0.7   yes
halfcheetah-medium-expert-v2  1 1.5 iql     0.7   no
halfcheetah-expert-v2         1 1.5 return  10500 yes
hopper-medium-v2              1 3   return  1800  yes
hopper-medium-replay-v2       1 3   iql     0.7   yes
hopper-medium-expert-v2       1 1.5 iql     0.5   yes
hopper-expert-v2              1 1.5 return  3500  yes
walker2d-medium-v2            1 3   return  2500  yes
walker2d-medium-replay-v2     1 3   iql     0.7   yes
walker2d-medium-expert-v2     1 1.5 iql     0.7   yes
walker2d-expert-v2            1 1.5 return  4500  yes
antmaze-umaze-v2              1 5   success -     no
antmaze-umaze-diverse-v2      1 3   success -     no
antmaze-medium-play-v2        5 5   success -     no
antmaze-medium-diverse-v2     5 5   success -     no
antmaze-large-play-v2         5 5   success -     no
antmaze-large-diverse-v2      5 5   success -     no
"""
AUTHORS_CQL = """
halfcheetah-medium-v2         1 3   return  6000  yes
halfcheetah-medium-replay-v2  1 3   return  6000  yes
halfcheetah-medium-expert-v2  1 3   return  11000 yes
halfcheetah-expert-v2         1 3   return  11000 yes
hopper-medium-v2              1 3   return  2500  yes
hopper-medium-replay-v2       1 3   iql     0.7   yes
hopper-medium-expert-v2       1 1.5 iql     0.5   yes
hopper-expert-v2              1 1.5 return  3500  yes
walker2d-medium-v2            1 3   return  3600  yes
walker2d-medium-replay-v2     1 3   iql     0.7   yes
walker2d-medium-expert-v2     1 3   iql     0.7   yes
walker2d-expert-v2            1 3   return  4800  yes
antmaze-umaze-v2              1 5   success -     no
antmaze-umaze-diverse-v2      1 3   success -     no
antmaze-medium-play-v2        5 5   success -     no
antmaze-medium-diverse-v2     5 5   success -     no
antmaze-large-play-v2         5 5   success -     no
antmaze-large-diverse-v2      5 5   success -     no
"""
ROWS = [
    (script, *line.split())
    for script, table in ((ssar_td3bc, AUTHORS), (ssar_cql, AUTHORS_CQL))
    for line in table.strip().splitlines()
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].__name__[8:]}-{row[1]}")
def test_tasks_are_the_authors(row):
    script, task, n_start, n_end, selection, value, loosen = row
    config = script.get_config(task)
    check_config(ml_collections.FrozenConfigDict(config))
    assert (config.n_start, config.n_end) == (float(n_start), float(n_end))
    assert config.selection == selection
    assert config.loosen_bound == (loosen == "yes")
    assert config.select_actions
    if selection == "return":
        assert config.return_threshold == float(value)
    if selection == "iql":
        assert config.expectile == float(value)
    antmaze = task.startswith("antmaze")
    assert config.offline_steps == (2_000_000 if antmaze else 1_000_000)
    assert (config.eval_interval, config.eval_episodes) == (
        (50_000, 100) if antmaze else (5_000, 10)
    )
    shared = {"batch_size": 256, "discount": 0.99, "update_period": 50_000, "critic_lr": 3e-4}
    shared |= {"target_update_rate": 0.005, "coefficient_hidden_dims": (512, 512, 512)}
    shared |= {"buffer_init": "all" if antmaze else "part", "warmup_steps": 5000}
    shared |= {"decay_steps": 400_000, "buffer_capacity": None, "online_steps": 0}
    if script is ssar_td3bc:
        shared |= {"coefficient_lr": 3e-8, "coefficient_init": 0.4, "hidden_dims": (256, 256)}
        shared |= {"policy_freq": 2, "actor_lr": 3e-4, "normalize_observations": True}
        shared |= {"reward_scale": 1.0, "reward_bias": -1.0 if antmaze else 0.0}
        freely = antmaze and not task.startswith("antmaze-umaze")
        shared |= {"anneal": "none" if freely else "linear", "exploration_noise": 0.0}
        shared |= {"new_policy_freq": NEW_POLICY_FREQ.get(task, 2)}
    else:
        shared |= {"coefficient_lr": 1e-8, "hidden_dims": (256,) * 3, "num_sampled_actions": 10}
        shared |= {"importance_sample": True, "cql_temperature": 1.0, "backup_entropy": False}
        shared |= {"clip_diff_max": None, "anneal": "cosine", "decay_steps": 400_000}
        shared |= ANTMAZE_CQL if antmaze else MUJOCO_CQL
    assert {key: config[key] for key in shared} == shared


NEW_POLICY_FREQ = {"antmaze-medium-play-v2": 30, "antmaze-medium-diverse-v2": 20}
NEW_POLICY_FREQ |= {"antmaze-large-play-v2": 100, "antmaze-large-diverse-v2": 100}
ANTMAZE_CQL = {"cql_alpha": 5.0, "actor_lr": 1e-4, "critic_layers": (5, 3), "bc_weight": 0.5}
ANTMAZE_CQL |= {"lagrange": True, "target_action_gap": 0.8, "clip_diff_min": -200.0}
ANTMAZE_CQL |= {"max_target_backup": True, "normalize_observations": False}
ANTMAZE_CQL |= {"reward_scale": 10.0, "reward_bias": -5.0}
MUJOCO_CQL = {"cql_alpha": 10.0, "actor_lr": 3e-5, "critic_layers": (3, 3), "bc_weight": 0.0}
MUJOCO_CQL |= {"lagrange": False, "clip_diff_min": None, "max_target_backup": False}
MUJOCO_CQL |= {"normalize_observations": True, "reward_scale": 1.0, "reward_bias": 0.0}


def test_cql_alpha_is_the_initial_coefficient():
    """Either name may be set, also where the settings are frozen."""
    for name in ("cql_alpha", "coefficient_init"):
        config = ssar_cql.get_config("hopper-medium-v2")
        config[name] = 3.0
        frozen = ml_collections.FrozenConfigDict(config)
        assert frozen.cql_alpha == frozen.coefficient_init == 3.0


@pytest.mark.parametrize("script", [ssar_td3bc, ssar_cql])
def test_every_task_is_in_the_table(script):
    tasks = {row[1] for row in ROWS if row[0] is script}
    assert set(script.TASKS) == {"demo", "demo-sparse", "custom", *tasks}
    assert tasks <= set(d4rl.TASKS)


def test_shared_settings_are_named_alike():
    td3bc, cql = ssar_td3bc.defaults(), ssar_cql.defaults()
    own = {"policy_noise", "noise_clip", "policy_freq", "expl_noise"}
    own |= {"new_policy_freq", "exploration_noise"}
    assert set(td3bc) - set(cql) == own
    shared = [name for name in td3bc if name in cql]
    assert shared == [name for name in cql if name in td3bc]


def test_unknown_task_names_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown task 'hoper-medium-v2'.*hopper-medium-v2.*antmaze"
    ):
        ssar_td3bc.get_config("hoper-medium-v2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"coefficient": "adaptiv"},
            "coefficient=adaptiv is unknown: choose one of adaptive, fixed",
        ),
        ({"selection": "best"}, "selection=best is unknown: choose one of none, return"),
        ({"anneal": "exp"}, "anneal=exp is unknown"),
        ({"physics": "mujoco"}, "physics=mujoco is unknown: choose one of d4rl, stock"),
        ({"d4rl_rows": "some"}, "d4rl_rows=some is unknown: choose one of all, qlearning"),
        ({"eval_interval": 7, "offline_steps": 70}, "eval_interval=7 must be a multiple of"),
        ({"offline_steps": 50}, "offline_steps=50 must be a multiple of --config.eval_interval=20"),
        ({"num_seeds": 0}, "num_seeds=0 must be at least 1"),
        ({"update_period": 0}, "update_period=0 must be at least 1"),
        ({"expectile": 1.5}, "expectile=1.5 must lie between 0 and 1"),
        ({"discount": float("nan")}, "discount=nan must lie between 0 and 1"),
        ({"critic_lr": -1e-3}, "critic_lr=-0.001 must lie between 0 and 1"),
        ({"reward_scale": float("inf")}, "reward_scale=inf is too large"),
        ({"return_threshold": float("nan")}, "return_threshold=nan is no return to exceed"),
        ({"num_seeds": 99999}, "num_seeds=99999 is more than one program can hold"),
        ({"hidden_dims": ()}, "hidden_dims=() must be layer widths"),
        ({"coefficient_hidden_dims": (16, 0)}, "coefficient_hidden_dims=(16, 0) must be"),
        ({"n_start": 4.0}, "n_start=4.0 must be at most --config.n_end=3.0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"return_threshold": None}, "return_threshold=None is no return to exceed"),
        ({"buffer_init": "most"}, "buffer_init=most is unknown: choose one of all, half, part"),
        ({"online_steps": 50}, "online_steps=50 must be a multiple of --config.eval_interval=20"),
        ({"online_steps": -20}, "online_steps=-20 must not be negative"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        (
            {"online_steps": 40, "warmup_steps": 40},
            "warmup_steps=40 leaves no update in --config.online_steps=40",
        ),
        ({"offline_steps": 0}, "offline_steps=0 leaves nothing to do: give it or"),
        ({"buffer_capacity": 0}, "buffer_capacity=0 must be at least 1"),
        ({"new_policy_freq": 0}, "new_policy_freq=0 must be at least 1"),
        ({"exploration_noise": -0.1}, "exploration_noise=-0.1 must lie between 0 and inf"),
        ({"dataset": None}, "no data set: give --config.dataset=<local Minari id>"),
        (
            {"dataset": None, "offline_steps": 0, "online_steps": 40, "buffer_init": "half"},
            "only offline_steps=0 with buffer_init=none does without",
        ),
    ],
)
def test_impossible_settings_are_named(overrides, words):
    config = tiny_config()
    with config.ignore_type():
        config.update(overrides)
    with pytest.raises(InputError) as error:
        check_config(ml_collections.FrozenConfigDict(config))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_sampled_actions": 0}, "num_sampled_actions=0 must be at least 1"),
        ({"cql_temperature": 0.0}, "cql_temperature=0.0 must lie between"),
        ({"critic_layers": (3,)}, "critic_layers=(3,) must be the hidden layers of two critics"),
        ({"critic_layers": (3, 0)}, "critic_layers=(3, 0) must be the hidden layers"),
        ({"clip_diff_min": 5.0, "clip_diff_max": 1.0}, "clip_diff_min=5.0 must be below"),
        ({"clip_diff_min": float("nan")}, "clip_diff_min=nan is no number"),
        ({"clip_diff_max": float("nan")}, "clip_diff_max=nan is no number"),
        ({"hidden_dims": (400, 300)}, "hidden_dims=(400, 300) must be equal widths"),
        ({"cql_alpha": 0.0}, "coefficient_init=0.0 (cql_alpha) leaves nothing to adapt"),
        ({"target_action_gap": float("inf")}, "target_action_gap=inf is too large"),
        ({"cql_alpha": -1.0}, "coefficient_init=-1.0 (cql_alpha) must lie between 0"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"matmul_precision": "tf32"}, "matmul_precision=tf32"),
    ],
)
def test_impossible_cql_settings_are_named(overrides, words):
    config = tiny_config(script="ssar_cql", **overrides)
    with pytest.raises(InputError) as error:
        check_config(ml_collections.FrozenConfigDict(config))
    assert words in str(error.value)
