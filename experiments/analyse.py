"""What finished runs trust, where their policies go, and what their coefficients say there.

    python experiments/analyse.py runs/ssar_td3bc/demo/0
    pip install scikit-learn && python experiments/analyse.py <run> <run> ... --out analysis.png

For each run and seed it plays ten episodes and prints: the share of D̂ that good policies recorded
(precision) and the share of their transitions that D̂ holds (recall), if the file names the policy
of each transition in infos/policy_id; the share of visited states whose nearest state of the data
lies in D̂; β_φ in D̂, in the rest of the data, on data with noise, and where the policy goes; and how
β_φ there goes with the error of Q_1. --out draws data, D̂ and visited states in two dimensions.
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


def play(act, params, dataset, discount, config):
    """States and actions that the policy visits, and its discounted return from each: [T, ...]."""
    states, actions, returns = [], [], []
    slot = Slot(dataset.env, dataset.observation_keys)
    for episode in range(EPISODES):
        slot.start(1000 + episode)
        rewards, ended = [], False
        while not ended:
            states.append(dataset.normalizer(slot.obs))
            actions.append(np.asarray(act(params, states[-1][None]))[0])
            reward, terminated, truncated = slot.step(actions[-1])
            rewards.append(config.reward_scale * reward + config.reward_bias)
            ended = terminated or truncated
        total, reverse = 0.0, []
        for reward in rewards[::-1]:
            total = reward + discount * total
            reverse.append(total)
        returns += reverse[::-1]
    return np.array(states, np.float32), np.array(actions, np.float32), np.array(returns)


def nearest(states, data):
    """Index of the nearest of `data` [M, O] for each of `states` [T, O]: [T]."""
    norms = np.square(data).sum(1)
    return np.concatenate([(norms - 2 * x @ data.T).argmin(1) for x in np.array_split(states, 50)])


def ranks(x):
    return np.argsort(np.argsort(x)).astype(float)


def analyse(folder: Path, seed_index: int):
    """One row of the table, and the three clouds of states: data, D̂, visited. Raises InputError."""
    saved, settings = load_checkpoint(str(folder)), load_settings(str(folder))
    results = json.loads((folder / "results.json").read_text())
    module = importlib.import_module(results["algorithm"])
    config = ml_collections.FrozenConfigDict(settings)
    dataset = load_dataset(SimpleNamespace(**settings))
    if dataset.fingerprint != saved["fingerprint"]:
        raise InputError(f"{folder} was trained on other data than {dataset.source}")
    state = jax.tree.map(lambda x: x[seed_index], saved["state"])
    trusted = saved["trusted"][seed_index]
    row = {"run": str(folder), "seed": results["seeds"][seed_index], "trusted": trusted.mean()}
    path = settings["dataset_path"] or (settings["dataset"] or "").removeprefix("d4rl:")
    good = known_quality(path, dataset)
    if good is not None:
        row |= {"good": good.mean(), "precision": good[trusted].mean()}
        row |= {"recall": trusted[good].mean()}

    states, actions, returns = play(
        jax.jit(module.act), state["actor"], dataset, config.discount, config
    )
    rng = np.random.default_rng(0)
    sample = rng.choice(len(trusted), min(SAMPLE, len(trusted)), replace=False)
    near, obs = trusted[sample], dataset.observations[sample]
    row["visits_nearest_to_trusted"] = near[nearest(states, obs)].mean()
    if config.coefficient == "adaptive":
        beta = lambda x: np.asarray(module.coefficient(state["coefficient"], x, config))
        row |= {"beta_trusted": beta(obs[near]).mean()}
        row |= {"beta_others": beta(obs[~near]).mean() if (~near).any() else np.nan}
        for scale in NOISE:
            noise = rng.standard_normal(obs.shape).astype(np.float32)
            row[f"beta_noise_{scale}"] = beta(obs + scale * noise * obs.std(0)).mean()
        row["beta_visited"] = beta(states).mean()
        q = np.asarray(module.critics(state["critic"], states, actions))[0]
        pairs = ranks(beta(states)), ranks(np.abs(q - returns))
        row |= {
            "q_error": (q - returns).mean(),
            "beta_error_rank_correlation": np.corrcoef(*pairs)[0, 1],
        }
    return row, (obs, obs[near], states)


def draw(clouds, titles, out):
    """Data, D̂ and visited states of each run in two dimensions, by t-SNE."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise InputError(f"--out: {error}: pip install scikit-learn") from None
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("agg")
    figure = Figure(figsize=(4.2 * len(clouds), 4), layout="constrained")
    for axis, parts, title in zip(
        figure.subplots(1, len(clouds), squeeze=False).flat, clouds, titles, strict=True
    ):
        parts = [x[:: max(len(x) // 1000, 1)] for x in parts]
        places = TSNE(random_state=0).fit_transform(np.concatenate(parts))
        looks = (("0.75", "data", 4), ("#1f5fa8", "D̂", 4), ("#c4561a", "visited", 4))
        for points, (color, label, size) in zip(
            np.split(places, np.cumsum([len(x) for x in parts])[:-1]), looks, strict=True
        ):
            axis.scatter(*points.T, s=size, color=color, label=label, lw=0)
        axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3)
    figure.savefig(out, dpi=130)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders")
    parser.add_argument("--out", type=Path, help="draw the states to this picture")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    args = parser.parse_args(arguments)
    try:
        found = []
        for folder in args.runs:
            for i in range(load_settings(str(folder))["num_seeds"]):
                found.append(analyse(folder, i))
                for key, value in found[-1][0].items():
                    print(
                        f"{key:>28}  {value:.3f}"
                        if isinstance(value, float)
                        else f"{key:>28}  {value}"
                    )
                print(flush=True)
        if args.csv:
            names = list(dict.fromkeys(key for row, _ in found for key in row))
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(row for row, _ in found)
        if args.out:
            draw([clouds for _, clouds in found], [row["run"] for row, _ in found], args.out)
    except (InputError, OSError) as error:
        sys.exit(f"analyse: {error}")


if __name__ == "__main__":
    main()
