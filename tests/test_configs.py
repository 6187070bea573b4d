"""The task table against the authors' settings, and checks of what a user may set."""

import ml_collections
import pytest
from toys import tiny_config

from common.checks import InputError, check_config
from configs.ssar_td3bc import TASKS, get_config

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
ROWS = [line.split() for line in AUTHORS.strip().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_tasks_are_the_authors(row):
    task, n_start, n_end, selection, value, loosen = row
    config = get_config(task)
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
    assert (config.reward_scale, config.reward_bias) == (1, -1 if antmaze else 0)
    assert config.normalize_observations
    shared = {"batch_size": 256, "discount": 0.99, "update_period": 50_000, "policy_freq": 2}
    shared |= {"coefficient_lr": 3e-8, "coefficient_init": 0.4, "target_update_rate": 0.005}
    shared |= {"hidden_dims": (256, 256), "coefficient_hidden_dims": (512, 512, 512)}
    assert {key: config[key] for key in shared} == shared


def test_every_task_is_in_the_table():
    assert set(TASKS) == {"demo", "custom", *(row[0] for row in ROWS)}


def test_unknown_task_names_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown task 'hoper-medium-v2'.*hopper-medium-v2.*antmaze"
    ):
        get_config("hoper-medium-v2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"coefficient": "adaptiv"},
            "coefficient=adaptiv is unknown: choose one of adaptive, fixed",
        ),
        ({"selection": "best"}, "selection=best is unknown: choose one of none, return"),
        ({"anneal": "exp"}, "anneal=exp is unknown"),
        ({"eval_interval": 7, "offline_steps": 70}, "eval_interval=7 must be a multiple of"),
        ({"offline_steps": 50}, "offline_steps=50 must be a multiple of --config.eval_interval=20"),
        ({"num_seeds": 0}, "num_seeds=0 must be at least 1"),
        ({"update_period": 0}, "update_period=0 must be at least 1"),
        ({"expectile": 1.5}, "expectile=1.5 must lie between 0 and 1"),
        ({"discount": float("nan")}, "discount=nan must lie between 0 and 1"),
        ({"critic_lr": -1e-3}, "critic_lr=-0.001 must lie between 0 and 1"),
        ({"reward_scale": float("inf")}, "reward_scale=inf must lie between"),
        ({"return_threshold": float("nan")}, "return_threshold=nan is no return to exceed"),
        ({"num_seeds": 99999}, "num_seeds=99999 is more than one program can hold"),
        ({"hidden_dims": ()}, "hidden_dims=() must be layer widths"),
        ({"coefficient_hidden_dims": (16, 0)}, "coefficient_hidden_dims=(16, 0) must be"),
        ({"n_start": 4.0}, "n_start=4.0 must be at most --config.n_end=3.0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"return_threshold": None}, "return_threshold=None is no return to exceed"),
    ],
)
def test_impossible_settings_are_named(overrides, words):
    config = tiny_config()
    config.return_threshold = overrides.pop("return_threshold", config.return_threshold)
    config.update(overrides)
    with pytest.raises(InputError) as error:
        check_config(ml_collections.FrozenConfigDict(config))
    assert words in str(error.value)
