"Continuous control: the figures at the smoke scale by the users' commands, and the committed ones."

import json
import os
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_notebooks import BINS, CLAIMS, EPISODES, check_pictures, injected, papermill

from gla_nb.claims import PAPER
from gla_nb.conditioning import request_claims
from gla_nb.evaluate import bootstrap_interval, claims_table, paired_test, read_table
from gla_nb.figure3 import figure_claims
from gla_nb.figure4 import direction_claims, direction_control_claims
from gla_nb.figure5 import FIGURE_OF, ONLY_OURS, TASKS_OF, domain_claims, domain_control_claims
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
    if figure.startswith("figure5"):
        named = figure.removesuffix("_controls")
        name = {made: name for name, made in FIGURE_OF.items()}[named]
        row, tasks = find_experiment(name, scale), TASKS_OF[name]
        controls = domain_control_claims(row.train.gap, row.baselines, tasks)
        return (
            controls
            if "controls" in figure
            else domain_claims(row.train.gap, tasks, name in ONLY_OURS)
        )
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
    names = ["10_figure3", "11_figure4", "14_long_lifetimes", "15_conditioning", "16_claims"]
    words = dict.fromkeys(names, [])
    words["10_figure3"] = ["-p", "experiment", "ant"]
    for name, more in words.items():  # the last one only reads what the others left
        code, printed = papermill(place, name, f"{name}.ipynb", *more, *SMOKE)
        assert code == 0, printed
    return place / "outputs" / "smoke"


def test_the_figures_leave_exactly_their_files(smoke):
    pictures, rest = [".png", ".pdf"], ["_claims.md", "_table.md", "_controls.md", ".json"]
    names = {"figure3_ant": KINDS + rest, "figure4": KINDS + rest}
    names |= {f"{name}_controls": KINDS for name in [*names]} | {"figure3_ant_ppo": []}
    plain = [kind for kind in KINDS + rest if "controls" not in kind]
    names |= {"figure4_ppo": [], "conditioning": plain, "long_lifetimes": plain}
    names |= {"long_lifetimes_standing": [".csv", ".md"]}
    expected = {"claims.csv", "claims.md"} | {
        f"{name}{kind}" for name in names for kind in names[name]
    }
    drawn = set(names) - {"figure4_controls"}
    assert set(os.listdir(smoke)) == expected | {f"{n}{kind}" for n in drawn for kind in pictures}
    check_pictures(smoke)
    for name in ("figure3_ant", "figure4", "conditioning", "long_lifetimes"):
        about = json.loads((smoke / f"{name}.json").read_text())
        assert about["seed"] == 0 and about["versions"]["mujoco"] and about["seconds"]


def test_every_sentence_of_the_paper_has_its_tests_in_one_table(smoke):
    lines = (smoke / "claims.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    claims = read_table(smoke / "claims.csv").set_index(["figure", "claim"])
    sentences = [
        sentence for sentence, figure, _ in PAPER if figure.startswith(("figure3_ant", "figure4"))
    ]
    assert [row[0] for row in cells if row[0]] == sentences
    for _, ours, seeds, effect, *_, command in cells:
        figure = command.split("FIGURES=")[1].split()[0]
        found = claims.loc[[(figure, ours.split(" (ant_")[0])]]
        assert int(seeds) in set(found["seeds"])
        assert any(
            abs(float(effect.replace(",", "")) - e) < 0.01 * abs(e) + 1 for e in found["effect"]
        )


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
        assert len(noise)
        assert set(noise.index) <= set(ours.index)
        np.testing.assert_allclose(noise, ours[noise.index], atol=1e-3)


def test_without_rewards_both_directions_are_one_walk_and_with_them_they_are_not(smoke):
    _, bins = tables(smoke, "figure4_controls")
    speed = bins.pivot_table("forward_reward", ["agent", "seed", "bin"], "task")
    hidden, ours = speed.loc["hidden"], speed.loc["gla_both"]
    np.testing.assert_allclose(hidden["ant_forward"], -hidden["ant_backward"], atol=1e-5)
    assert not np.allclose(ours["ant_forward"], -ours["ant_backward"], atol=1e-2)


# -- the committed figures ---------------------------------------------------------------------
# These read outputs/cpu: the results that the README shows. They fail where a file is missing,
# and where a claim of the paper that the README calls reproduced does not hold in it.


def per_lifetime(bins, name, first, last, **curve):
    "Mean of a column over the bins first <= bin < last of one curve, by seed."
    rows = (bins["bin"] >= first) & (bins["bin"] < last)
    for key, value in curve.items():
        rows &= bins[key] == str(value)
    assert rows.any(), curve
    return bins[rows].groupby("seed")[name].mean()


COMMITTED = ["figure3_ant", "figure4", "long_lifetimes", "conditioning"]


@pytest.mark.parametrize("figure", [f for f in FIGURES if f.startswith(tuple(COMMITTED))])
def test_committed_claims_follow_from_the_committed_tables(figure):
    check_claims(CPU, figure, "cpu")


@pytest.mark.parametrize("gap", [32, 64])
def test_committed_ants_learn_to_walk_in_context(gap):
    _, bins = tables(CPU, "figure3_ant")
    ours = {"agent": "gla", "gap": gap}
    gain = per_lifetime(bins, "reward", 24, 32, **ours) - per_lifetime(bins, "reward", 0, 8, **ours)
    noise = {"agent": "magnitude_matched", "gap": gap}
    still = per_lifetime(bins, "reward", 24, 32, **noise)
    still -= per_lifetime(bins, "reward", 0, 8, **noise)
    assert len(gain) == len(still) == 256
    for effect in (gain, gain - still):
        assert effect.mean() > 0 and paired_test(effect) < 0.01
        assert stats.wilcoxon(effect).pvalue < 0.01, "a second opinion, from another test"
    ppo = per_lifetime(bins, "forward_reward", 31, 32, agent="ppo_source").mean()
    assert ppo > 0.5, "standing still earns as much return: the data must walk"
    assert per_lifetime(bins, "forward_reward", 24, 32, **ours).mean() > ppo / 2


def test_committed_largest_gap_starts_above_all_others():
    _, bins = tables(CPU, "figure3_ant")
    gaps = bins.loc[bins["agent"] == "gla", "gap"].unique()
    starts = {g: per_lifetime(bins, "reward", 0, 1, agent="gla", gap=g).mean() for g in gaps}
    assert len(gaps) >= 4 and max(starts, key=starts.get) == "max"


def test_committed_ants_keep_what_they_learned():
    _, bins = tables(CPU, "figure3_ant")
    kept = []
    for gap in (32, 64, 128, "max"):
        ours = {"agent": "gla", "gap": gap}
        early, late = (per_lifetime(bins, "reward", *b, **ours) for b in ((2, 6), (16, 20)))
        noise = per_lifetime(bins, "reward", 2, 6, agent="magnitude_matched", gap=gap)
        low, _ = bootstrap_interval(late - early)
        kept.append(low >= -0.1 * (early - noise).mean())
    assert all(kept)


@pytest.mark.parametrize("task", ["ant_forward", "ant_backward"])
def test_committed_agent_of_both_directions_finds_out_which_is_paid(task):
    _, bins = tables(CPU, "figure4")
    ours = {"agent": "gla_both", "task": task}
    late = per_lifetime(bins, "forward_reward", 24, 32, **ours)
    assert len(late) == 64 and (late > 0).mean() >= 0.8
    window = per_lifetime(bins, "forward_reward", 0, 2, **ours)  # its first window of attention
    half = per_lifetime(bins, "forward_reward", 12, 16, **ours)
    half -= per_lifetime(bins, "forward_reward", 0, 4, **ours)
    for rise in (late - window, half):
        assert rise.mean() > 0.5 and paired_test(rise) < 0.01


def test_committed_agent_of_one_direction_does_not_run_the_other_way():
    _, bins = tables(CPU, "figure4")
    late = per_lifetime(bins, "forward_reward", 24, 32, agent="gla_forward", task="ant_backward")
    assert bootstrap_interval(late)[0] <= 0


@pytest.mark.parametrize("control", ["hidden", "yoked"])
def test_committed_controls_run_the_right_way_by_chance(control):
    _, bins = tables(CPU, "figure4_controls")
    right = [
        per_lifetime(bins, "forward_reward", 24, 32, agent=control, task=task) > 0
        for task in ("ant_forward", "ant_backward")
    ]
    share = sum(each.astype(float) for each in right) / 2
    assert len(share) >= 32 and paired_test(share - 0.5) > 0.05


def test_committed_figures_are_whole():
    for name in COMMITTED:
        document = nbformat.read(CPU / f"{name}.ipynb", as_version=4)
        outputs = [o for c in document.cells for o in c.get("outputs", [])]
        assert not [o for o in outputs if o.output_type == "error"]
        assert 'scale = "cpu"' in injected(CPU / f"{name}.ipynb")
