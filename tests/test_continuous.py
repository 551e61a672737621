"Continuous control: the figures at the smoke scale by the users' commands, and the committed ones."

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_notebooks import BINS, CLAIMS, EPISODES, check_pictures, papermill

from gla_nb.conditioning import request_claims
from gla_nb.evaluate import claims_table, read_table
from gla_nb.figure3 import figure_claims
from gla_nb.figure4 import direction_claims, direction_control_claims
from gla_nb.long_lifetimes import forgetting_claims
from gla_nb.train import find_experiment

CPU = Path(__file__).resolve().parents[1] / "outputs" / "cpu"  # committed results
SMOKE = "-p scale smoke".split()
KINDS = ["_episodes.csv", "_bins.csv"]


def tables(folder, figure):
    "Episodes and bins of a figure, with the columns that were agreed."
    for kind, columns in zip(KINDS, (EPISODES, BINS), strict=True):
        assert (folder / f"{figure}{kind}").open().readline().strip() == columns
    return [read_table(folder / f"{figure}{kind}") for kind in KINDS]


def claims_of(figure, scale, episodes, bins):
    "The claims that a figure makes, from its tables."
    if figure.startswith("figure3"):
        return figure_claims(find_experiment("ant", scale), episodes, bins)
    if figure == "conditioning":
        return request_claims(find_experiment("ant_told", scale))
    if figure == "long_lifetimes":
        return forgetting_claims(find_experiment("ant", scale).train.gap)
    gap = find_experiment("ant_dir", scale).train.gap
    return (direction_control_claims if "controls" in figure else direction_claims)(gap)


def check_claims(folder, figure, scale):
    "claims.csv follows from the two tables of the figure, as they are on the disk."
    episodes, bins = tables(folder, figure)
    expected = claims_table(figure, claims_of(figure, scale, episodes, bins), episodes, bins)
    found = read_table(folder / "claims.csv")
    found = found[found["figure"] == figure].reset_index(drop=True)
    assert len(found) and list(found.columns) == CLAIMS.split(",")
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=2e-5, atol=1e-9)
    return found


# -- at the smoke scale, by the command that makes the real ones -------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "The folder of all four figures, made one after the other in the same outputs."
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "work").mkdir()
    words = dict.fromkeys(["10_figure3", "11_figure4", "14_long_lifetimes", "15_conditioning"], [])
    words["10_figure3"] = ["-p", "experiment", "ant"]
    for name, more in words.items():
        code, printed = papermill(place, name, f"{name}.ipynb", *more, *SMOKE)
        assert code == 0, printed
    return place / "outputs" / "smoke"


def test_the_figures_leave_exactly_their_files(smoke):
    pictures, rest = [".png", ".pdf"], ["_claims.md", "_table.md", "_controls.md", ".json"]
    names = {"figure3_ant": KINDS + rest, "figure4": KINDS + rest}
    names |= {f"{name}_controls": KINDS for name in [*names]} | {"figure3_ant_ppo": []}
    plain = [kind for kind in KINDS + rest if "controls" not in kind]
    names |= {"figure4_ppo": [], "conditioning": plain, "long_lifetimes": plain}
    expected = {"claims.csv"} | {f"{name}{kind}" for name in names for kind in names[name]}
    drawn = set(names) - {"figure4_controls"}
    assert set(os.listdir(smoke)) == expected | {f"{n}{kind}" for n in drawn for kind in pictures}
    check_pictures(smoke)
    for name in ("figure3_ant", "figure4", "conditioning", "long_lifetimes"):
        about = json.loads((smoke / f"{name}.json").read_text())
        assert about["seed"] == 0 and about["versions"]["mujoco"] and about["seconds"]


FIGURES = ["figure3_ant", "figure3_ant_controls", "figure4", "figure4_controls"]
FIGURES += ["conditioning", "long_lifetimes"]


@pytest.mark.parametrize("figure", FIGURES)
def test_claims_are_recomputed_from_the_other_tables(smoke, figure):
    claims = check_claims(smoke, figure, "smoke")
    assert not claims.duplicated(["claim", "task"]).any()


def test_every_curve_has_what_continuous_control_needs(smoke):
    for figure in FIGURES:
        episodes, bins = tables(smoke, figure)
        assert (bins.groupby(["task", "agent", "gap", "seed"]).size() == 32).all()
        assert bins["forward_reward"].notna().all(), figure
        ours = bins[bins["agent"] != "ppo_source"]
        assert ours["action_rms"].between(0, 1).all()
        # What Ant pays: 1 for being healthy, the velocity, less half the squares of 8 actions; the
        # mean of squares is at least the square of the mean.
        most = 1 + ours["forward_reward"] - 4 * ours["action_rms"] ** 2
        assert (ours["reward"] <= most + 1e-3).all(), figure
    _, bins = tables(smoke, "figure3_ant")
    standing = bins[bins["agent"] == "zero"]
    assert (standing["action_rms"] == 0).all() and abs(standing["reward"].mean() - 1) < 0.1


def test_noise_is_as_strong_as_the_agent_in_every_bin(smoke):
    for figure, name in (("figure3_ant", "gla"), ("figure4", "gla_both")):
        _, bins = tables(smoke, figure)
        key = ["task", "gap", "seed", "bin"]
        ours = bins[bins["agent"] == name].set_index(key)["action_rms"]
        noise = bins[bins["agent"] == "magnitude_matched"].set_index(key)["action_rms"]
        assert set(noise.index) == set(ours.index)
        np.testing.assert_allclose(noise, ours[noise.index], atol=1e-3)


def test_one_agent_is_tested_in_both_directions_on_the_same_seeds(smoke):
    _, bins = tables(smoke, "figure4")
    # Random actions do not know of the direction: the same walk is paid the other way round.
    walk = bins[bins["agent"] == "random"].pivot_table("forward_reward", ["seed", "bin"], "task")
    np.testing.assert_allclose(walk["ant_forward"], -walk["ant_backward"], atol=1e-5)
    rms = bins.pivot_table("action_rms", ["agent", "seed", "bin"], "task")
    assert np.allclose(*rms.loc["random"].to_numpy().T) and set(bins["task"]) == set(rms.columns)
    assert not np.allclose(*rms.loc["gla_both"].to_numpy().T), "rewards reach the agent"
