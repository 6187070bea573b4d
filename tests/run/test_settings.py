"""The tasks' settings against the authors', and the checks of what a user may set."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import ml_collections
import pytest
from toys import tiny_config

from common.data import d4rl
from common.run.cli import ROOT, load_config
from common.run.errors import InputError
from common.run.settings import check_settings, default_folder, prepare, scale_settings
from common.run.workdir import as_json
from configs import ssar_cql, ssar_td3bc

# The documented table: task; n_end and D̂ of TD3+BC(SA); the same of CQL(SA). †: no loosen_bound.
TABLE = (ROOT / "docs/method.md").read_text().partition("| D4RL v2 | TD3+BC(SA): n_end |")[2]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]]
        for line in TABLE.partition("\n\n")[0].splitlines()[2:]]  # fmt: skip
SHARED = {"batch_size": 256, "discount": 0.99, "update_period": 50_000, "critic_lr": 3e-4}
SHARED |= {"target_update_rate": 0.005, "coefficient_hidden_dims": (512, 512, 512)}
SHARED |= {"warmup_steps": 5000, "decay_steps": 400_000, "buffer_capacity": None, "online_steps": 0}
OF_SCRIPT = {
    "ssar_td3bc": {"coefficient_lr": 3e-8, "coefficient_init": 0.4, "hidden_dims": (256, 256),
                   "policy_freq": 2, "actor_lr": 3e-4, "normalize_observations": True,
                   "reward_scale": 1.0, "exploration_noise": 0.0},
    "ssar_cql": {"coefficient_lr": 1e-8, "hidden_dims": (256,) * 3, "num_sampled_actions": 10,
                 "importance_sample": True, "cql_temperature": 1.0, "backup_entropy": False,
                 "clip_diff_max": None, "anneal": "cosine"},
}  # fmt: skip
OF_KIND = {
    ("ssar_td3bc", "mujoco"): {"reward_bias": 0.0, "anneal": "linear"},
    ("ssar_td3bc", "antmaze"): {"reward_bias": -1.0},
    ("ssar_cql", "mujoco"): {"cql_alpha": 10.0, "actor_lr": 3e-5, "critic_layers": (3, 3),
                             "bc_weight": 0.0, "lagrange": False, "clip_diff_min": None,
                             "max_target_backup": False, "normalize_observations": True,
                             "reward_scale": 1.0, "reward_bias": 0.0},
    ("ssar_cql", "antmaze"): {"cql_alpha": 5.0, "actor_lr": 1e-4, "critic_layers": (5, 3),
                              "bc_weight": 0.5, "lagrange": True, "target_action_gap": 0.8,
                              "clip_diff_min": -200.0, "max_target_backup": True,
                              "normalize_observations": False, "reward_scale": 10.0,
                              "reward_bias": -5.0},
}  # fmt: skip
NEW_POLICY_FREQ = {"antmaze-medium-play-v2": 30, "antmaze-medium-diverse-v2": 20}
NEW_POLICY_FREQ |= {"antmaze-large-play-v2": 100, "antmaze-large-diverse-v2": 100}


@pytest.mark.parametrize("script", [ssar_td3bc, ssar_cql], ids=lambda x: x.__name__[8:])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_tasks_are_the_authors(row, script):
    name, task = script.__name__.split(".")[-1], f"{row[0]}-v2"
    n, subset = row[1:3] if name == "ssar_td3bc" else row[3:]
    n_start, n_end = ["1", *re.findall(r"[\d.]+", n)][-2:]
    selection, value = re.match(r"(return|IQL|success)\D*([\d.]*)", subset).groups()
    selection = selection.lower()
    config, antmaze = script.get_config(task), task.startswith("antmaze")
    check_settings(config)
    expected = SHARED | OF_SCRIPT[name] | OF_KIND[name, "antmaze" if antmaze else "mujoco"]
    expected |= {"n_start": float(n_start), "n_end": float(n_end), "selection": selection}
    expected |= {"loosen_bound": not antmaze and "†" not in n, "select_actions": True}
    expected |= {"buffer_init": "all" if antmaze else "part"}
    expected |= {"offline_steps": 2_000_000 if antmaze else 1_000_000}
    expected |= {"full_length": config.offline_steps, "eval_episodes": 100 if antmaze else 10}
    expected |= {"eval_interval": 50_000 if antmaze else 5_000}
    if selection in ("return", "iql"):
        expected[{"return": "return_threshold", "iql": "expectile"}[selection]] = float(value)
    if name == "ssar_td3bc":
        freely = antmaze and "umaze" not in task
        expected["anneal"] = "none" if freely else "linear"
        expected["new_policy_freq"] = NEW_POLICY_FREQ.get(task, 2)
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("script", [ssar_td3bc, ssar_cql])
def test_every_task_is_in_the_table(script):
    tasks = {f"{row[0]}-v2" for row in ROWS}
    assert set(script.TASKS) == {"demo", "demo-sparse", "custom", "ogbench", *tasks}
    assert tasks <= set(d4rl.TASKS)
    for task in ("custom", "ogbench"):
        config = script.get_config(task)
        config.dataset = "ogbench:cube-single-play-singletask-v0"
        check_settings(config)


# ----------------------------------------------------------------------------- impossible values

NAN, INF = float("nan"), float("inf")
IMPOSSIBLE = [
    ("selection", "best", "is unknown: choose one of auto, none, return, success, iql"),
    ("task", "../../x", "must be letters, digits, . _ and -, because it names a folder"),
    ("eval_interval", 18, "must be a multiple of --config.updates_per_call=20"),
    ("offline_steps", 50, "must be a multiple of --config.eval_interval=20"),
    ("online_steps", 50, "must be a multiple of --config.eval_interval=20"),
    ("update_period", 11, "must be a multiple of --config.policy_freq=2"),
    ("num_seeds", 0, "must be at least 1"),
    ("num_seeds", 99999, "must be at most 4096"),
    ("eval_interval", 3 * 10**9, "must be at most 2147483647"),
    ("discount", NAN, "must be at least 0"),
    ("reward_scale", INF, "must be at most 1e+30"),
    ("hidden_dims", (), "must be whole numbers of at least 1, such as"),
    ("hidden_dims", (1.5, 2), "must be whole numbers of at least 1, such as"),
    ("reference", ("a", 1), "must be <random return>,<expert return>, such as -20.3,3234.3"),
    ("reference", (5, 1), "must be <random return>,<expert return>, such as -20.3,3234.3"),
    ("n_start", 4.0, "must be at most --config.n_end=3.0"),
    ("offline_steps", 0, "leaves nothing to do: give it or --config.online_steps"),
    ("coefficient_init", 0.0, "leaves nothing to adapt: give a larger value, or"),
    ("dataset", None, "needs data: give --config.dataset="),
    ("cql: critic_layers", (3,), "must be one number for each critic"),
    ("cql: hidden_dims", (400, 300), "must be equal widths"),
]


@pytest.mark.parametrize(("field", "value", "words"), IMPOSSIBLE)
def test_impossible_settings_are_named(field, value, words):
    script, _, field = field.rpartition(": ")
    config = tiny_config(script=f"ssar_{script or 'td3bc'}")
    with config.ignore_type():
        config[field] = value
    with pytest.raises(InputError) as error:
        check_settings(ml_collections.FrozenConfigDict(config))
    assert words in str(error.value)
    assert "--config." in str(error.value)


def test_settings_that_depend_on_others(tmp_path):
    check_settings(tiny_config(coefficient="fixed", return_threshold=None))
    online = {"offline_steps": 0, "online_steps": 40}
    alone = online | {"dataset": "", "coefficient": "fixed"}
    check_settings(tiny_config(buffer_init="none", eval_interval=5, **alone))
    for words, refused in {
        "offline_steps=0 needs data: give --config.dataset=": alone | {"buffer_init": "half"},
        "=40 must be smaller than --config.onli": {"online_steps": 40, "warmup_steps": 40},
        "iql_steps=50 must be a multiple of": {"selection": "iql", "iql_steps": 50},
        "iql_steps=30 must be": online | {"selection": "iql", "iql_steps": 30},
    }.items():
        with pytest.raises(InputError, match=words):
            check_settings(tiny_config(**refused))

    config = tiny_config(offline_steps=20, online_steps=66, eval_interval=33)
    with pytest.raises(InputError, match="must be a multiple of"):
        check_settings(config)
    (tmp_path / "config.json").write_text(json.dumps(as_json(config.to_dict())))
    config.offline_checkpoint = str(tmp_path)  # its own steps alone must fit the interval
    check_settings(config)


# --------------------------------------------------------------------------- what is worked out


@pytest.mark.parametrize("text", ["20000", "20_000", "2e4", "20000.0"])
def test_whole_numbers_may_be_written_as_people_write_them(text):
    config = load_config("ssar_td3bc", None, [f"--config.batch_size={text}"])
    assert config.batch_size == 20_000


def test_other_data_with_the_demos_settings_are_noted(capsys):
    flags, file = ["--config.dataset=d4rl:a.hdf5"], f"{ROOT}/configs/ssar_td3bc.py:demo"
    load_config("ssar_td3bc", file, flags)
    assert not capsys.readouterr().out  # asked for
    load_config("ssar_td3bc", None, flags)
    assert "for these data give --config=configs/ssar_td3bc.py:custom" in capsys.readouterr().out


def test_a_settings_file_may_name_a_few_fields(tmp_path):
    """The others are those of task custom."""
    (tmp_path / "my.py").write_text("def get_config(): return {'n_end': 2, 'dataset': 'a.hdf5'}")
    config = load_config("ssar_cql", f"{tmp_path}/my.py", ["--config.cql_alpha=5.0"])
    expected = ssar_cql.get_config("custom")
    expected.update(n_end=2.0, dataset="a.hdf5", coefficient_init=5.0)
    assert config.to_dict() == expected.to_dict()


def test_the_folder_is_named_after_what_is_given():
    config = ssar_td3bc.get_config("demo")
    flags = lambda given: [f"--config.{field}={value}" for field, value in given.items()]
    folder = lambda **given: default_folder("x", config, flags(given))
    assert folder() == folder(seed=3, cache_dir="/x") == "runs/x/demo/0"
    assert folder(n_end=5.0, coefficient="fixed") == "runs/x/demo-coefficient=fixed-n_end=5.0/0"
    assert folder(dataset="d4rl:../my data.hdf5") == "runs/x/demo-dataset=d4rl_.._my_data.hdf5/0"
    config.offline_checkpoint = "/runs/x/demo/0"
    assert folder(offline_checkpoint="0", online_steps=9) == "/runs/x/demo/0-online_steps=9"
    assert default_folder("x", config) == "/runs/x/demo/0-online"


def test_paths_are_complete_and_files_are_found_from_anywhere(tmp_path, monkeypatch):
    """In a folder whose name has a meaning for patterns, URLs and formats."""
    folder = tmp_path / "a [b] {c} #1 ?d=%20 β"
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "config.json").write_text(json.dumps(as_json(tiny_config().to_dict())))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    config = tiny_config(offline_checkpoint="0", online_steps=40, cache_dir="~/x")
    config.dataset = "d4rl:my.hdf5"
    config, workdir = prepare(config, "~/run", "my_script")
    assert (config.dataset_path, workdir) == (f"{folder}/my.hdf5", f"{folder}/run")
    assert (config.offline_checkpoint, config.cache_dir) == (f"{folder}/0", f"{folder}/x")


def test_a_platform_that_is_not_there_is_named():
    command = [sys.executable, f"{ROOT}/ssar_td3bc.py"]
    env = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "JAX finds no device of JAX_PLATFORMS=cuda (" in done.stderr


def test_prepare_fits_the_size_of_a_call_and_freezes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for most, interval, selection, expected in ((8, 20, "none", 4), (250, 36, "iql", 12)):
        config = tiny_config(updates_per_call=most, eval_interval=interval, selection=selection)
        config.update(offline_steps=interval, iql_steps=24, seed=4)
        config, workdir = prepare(config, None, "my_script")
        assert config.updates_per_call == expected
        assert workdir == str(tmp_path / "runs" / "my_script" / "toy" / "4")
        hash(config)
    assert jax.config.jax_default_matmul_precision == "float32"


@pytest.mark.parametrize(("script", "lr"), [("ssar_td3bc", 3e-8), ("ssar_cql", 1e-8)])
@pytest.mark.parametrize("steps", [20_000, 999_982, 50, 2])
def test_a_short_run_is_scaled_to_settings_that_work(script, lr, steps):
    task = f"{ROOT}/configs/{script}.py:hopper-medium-replay-v2"
    config = load_config(script, task, [f"--config.offline_steps={steps}"])
    share = steps / 1_000_000
    assert config.offline_steps == steps
    assert config.coefficient_lr == pytest.approx(lr / share)
    if steps == 20_000:
        assert (config.update_period, config.eval_interval) == (50_000 * share, 5_000 * share)
        assert config.iql_steps == steps
    config.updates_per_call = math.gcd(config.eval_interval, config.iql_steps)
    check_settings(config)


def test_only_what_is_not_given_is_scaled():
    def load(task, **settings):
        flags = [f"--config.{field}={value}" for field, value in settings.items()]
        return load_config("ssar_td3bc", f"{ROOT}/configs/ssar_td3bc.py:{task}", flags)

    task = "hopper-medium-v2"
    config = load(task, update_period=400, coefficient_lr=0.001, offline_steps=20_000)
    assert (config.update_period, config.coefficient_lr, config.eval_interval) == (400, 1e-3, 100)
    config = load(task, offline_steps=100_000, online_steps=30_000)
    assert config.online_steps % config.eval_interval == 0 and config.eval_interval == 500
    config = load("custom", offline_steps=20_000)  # β_φ would outrun the critics
    assert (config.update_period, config.coefficient_lr) == (1_000, 3e-8)
    assert load(task, seed=3).update_period == 50_000
    in_file = ssar_td3bc.get_config(task)
    in_file.offline_steps = 1_000  # by a settings file, which sets the others itself
    scale_settings(in_file, {"seed": 3})
    assert in_file.update_period == 50_000


@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_a_run_that_goes_online_takes_over_its_settings(script, tmp_path):
    recorded = as_json(tiny_config(script=script, seed=7).to_dict())
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    flags = [f"--config.offline_checkpoint={tmp_path}", "--config.online_steps=80"]
    config = as_json(load_config(script, None, flags).to_dict())
    assert config == recorded | {"offline_checkpoint": str(tmp_path), "online_steps": 80}
    file = f"{ROOT}/configs/{script}.py:hopper-medium-v2"  # is left as it is, to be compared
    assert load_config(script, file, flags).task == "hopper-medium-v2"
    if script == "ssar_cql":  # a field of two names
        config = load_config(script, None, [*flags, "--config.cql_alpha=5.0"])
        assert config.cql_alpha == config.coefficient_init == 5.0
