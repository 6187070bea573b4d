"""What finished runs trust, where their policies go, and what their coefficients say there.

    python experiments/analyse.py runs/ssar_td3bc/demo/0
    pip install scikit-learn && python experiments/analyse.py <run> <run> ... --out analysis.png

For each run and seed it plays ten episodes and prints: the share of D̂ that good policies recorded
(precision) and the share of their transitions that D̂ holds (recall), if the file names the policy
of each transition in infos/policy_id; the share of visited states whose nearest state of the data
lies in D̂; β_φ in D̂, in the rest of the data, on data with noise, and where the policy goes; and how
β_φ there correlates with the error of Q_1. --out draws data, D̂ and visited states in the plane.
"""

import argparse
import csv
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import jax
import ml_collections
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.data import load_dataset  # noqa: E402
from common.envs.make import Slot  # noqa: E402
from common.run import InputError  # noqa: E402
from common.run.checkpoint import load_checkpoint  # noqa: E402
from common.run.workdir import load_settings  # noqa: E402

NOISE = (0.3, 1.0, 3.0)  # standard deviations of the data in each dimension
EPISODES = 10
SAMPLE = 4000  # states of the data that are looked at
LOOKS = {"data": "0.75", "D̂": "#1f5fa8", "visited": "#c4561a"}


def known_quality(path, dataset):
    """Whether the policy that recorded each transition is better than the data: bool [N], or None.

    A good policy is one whose mean return is above the mean over all transitions.
    """
    if not path or not str(path).endswith((".hdf5", ".h5")):
        return None
    with h5py.File(path) as file:
        if "infos/policy_id" not in file or len(file["rewards"]) != len(dataset.rewards):
            return None
        policy = file["infos/policy_id"][()].ravel()
    lengths = np.diff(np.r_[-1, np.flatnonzero(dataset.episode_ends)])
    first = np.r_[0, np.cumsum(lengths)[:-1]]
    mean = {i: dataset.returns[policy[first] == i].mean() for i in np.unique(policy)}
    of_row = np.array([mean[i] for i in policy])
    return of_row > of_row.mean() if len(mean) > 1 else None


def play(act, params, value, dataset, config):
    """States and actions that the policy visits, and its discounted return from each: [T, ...].

    value(state, action): what follows where time ends an episode, Q_1.
    """
    states, actions, returns = [], [], []
    slot = Slot(dataset.env, dataset.observation_keys)
    choose = lambda state: np.asarray(act(params, state[None]))[0]
    for episode in range(EPISODES):
        slot.start(episode)
        rewards, ended = [], False
        while not ended:
            states.append(dataset.normalizer(slot.obs))
            actions.append(choose(states[-1]))
            reward, terminated, truncated = slot.step(actions[-1])
            rewards.append(config.reward_scale * reward + config.reward_bias)
            ended = terminated or truncated
        last = dataset.normalizer(slot.obs)
        total = 0.0 if terminated else value(last, choose(last))
        for t in reversed(range(len(rewards))):
            total = rewards[t] = rewards[t] + config.discount * total
        returns += rewards
    return np.array(states), np.array(actions), np.array(returns)


def nearest(states, data):
    """Index of the nearest of `data` [M, O] for each of `states` [T, O]: [T]."""
    norms = np.square(data).sum(1)
    return np.concatenate([(norms - 2 * x @ data.T).argmin(1) for x in np.array_split(states, 50)])


def ranks(x):
    return np.argsort(np.argsort(x)).astype(float)


def load_run(folder: Path):
    """Script, settings, Dataset and checkpoint of a finished run. Raises InputError."""
    saved, settings = load_checkpoint(str(folder)), load_settings(str(folder))
    name = json.loads((folder / "results.json").read_text())["algorithm"]
    settings = importlib.import_module(f"configs.{name}").get_config().to_dict() | settings
    dataset = load_dataset(SimpleNamespace(**settings))
    if dataset.fingerprint != saved["fingerprint"] or not len(dataset.rewards):
        raise InputError(f"{folder} was not trained on {dataset.source}: restore its data, if any")
    module, config = importlib.import_module(name), ml_collections.FrozenConfigDict(settings)
    if hasattr(module, "scale_sparse_rewards"):
        config = module.scale_sparse_rewards(config, dataset.rewards, dataset.terminals)
    return module, config, dataset, saved


def analyse(module, config, dataset, saved, i: int):
    """The numbers of seed number i, and three clouds of states: the data, D̂, visited ones."""
    state = jax.tree.map(lambda x: x[i], saved["state"])
    trusted, row = saved["trusted"][i], {"seed": config.seed + i}
    row["trusted"] = trusted.mean()
    path = config.dataset_path or (config.dataset or "").removeprefix("d4rl:")
    if (good := known_quality(path, dataset)) is not None:
        row |= {"good": good.mean(), "precision": good[trusted].mean()}
        row["recall"] = trusted[good].mean()

    q1 = lambda *row: np.asarray(module.critics(state["critic"], *row))[0]
    value = lambda *row: q1(*(x[None] for x in row)).item()
    act = jax.jit(module.act)
    states, actions, returns = play(act, state["actor"], value, dataset, config)
    rng = np.random.default_rng(0)
    sample = rng.choice(len(trusted), min(SAMPLE, len(trusted)), replace=False)
    near, obs = trusted[sample], dataset.observations[sample]
    row["visits_nearest_to_trusted"] = near[nearest(states, obs)].mean()
    if config.coefficient == "adaptive":
        beta = lambda x: np.asarray(module.coefficient(state["coefficient"], x, config))
        row["beta_trusted"] = beta(obs[near]).mean()
        row["beta_others"] = beta(obs[~near]).mean() if not near.all() else np.nan
        for scale in NOISE:
            noise = scale * obs.std(axis=0) * rng.standard_normal(obs.shape)
            row[f"beta_noise_{scale}"] = beta((obs + noise).astype(np.float32)).mean()
        row["beta_visited"] = beta(states).mean()
        error = q1(states, actions) - returns
        pairs = ranks(beta(states)), ranks(np.abs(error))
        row |= {"q_error": error.mean(), "beta_error_rank_correlation": np.corrcoef(*pairs)[0, 1]}
    row = {key: x if isinstance(x, int) else float(x) for key, x in row.items()}
    return row, (obs, obs[near], states)


def draw(clouds, titles, out):
    """Draws data, D̂ and visited states in two dimensions, by t-SNE. Raises InputError."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise InputError(f"--out: {error}: pip install scikit-learn") from None
    figure = Figure(figsize=(4.2 * len(clouds), 4), layout="constrained")
    axes = figure.subplots(1, len(clouds), squeeze=False).flat
    for axis, parts, title in zip(axes, clouds, titles, strict=True):
        parts = [x[:: len(x) // 1000 + 1] for x in parts]
        places = TSNE(random_state=0).fit_transform(np.concatenate(parts))
        for (label, color), part in zip(LOOKS.items(), parts, strict=True):
            points, places = places[: len(part)], places[len(part) :]
            axis.scatter(*points.T, s=4, color=color, label=label, lw=0)
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(markerscale=3)
    figure.savefig(out, dpi=130)


def main(arguments=None) -> None:
    """Prints the numbers of every seed of the runs, and writes what else is asked for."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders")
    parser.add_argument("--out", type=Path, help="draw the states to this picture")
    parser.add_argument("--csv", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(arguments)
    rows, clouds = [], []
    try:
        for folder in args.runs:
            run = load_run(folder)
            for i in range(run[1].num_seeds):
                row, cloud = analyse(*run, i)
                rows.append({"run": str(folder)} | row)
                clouds.append(cloud)
                for key, x in rows[-1].items():
                    print(f"{key:>28}  {f'{x:.3f}' if isinstance(x, float) else x}", flush=True)
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
                writer.writeheader()
                writer.writerows(rows)
        if args.out:
            names = ["/".join(Path(row["run"]).parts[-3:]) for row in rows]
            draw(clouds, names, args.out)
    except (InputError, OSError) as error:
        sys.exit(f"analyse: {error}")


if __name__ == "__main__":
    main()
