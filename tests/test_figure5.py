"Figure 5 and the study of projections: at the smoke scale by the users' commands, and committed."

import json
import os

import numpy as np
import pytest
from test_continuous import CPU, KINDS, SMOKE, check_claims, tables
from test_notebooks import check_pictures, papermill

from gla_nb.evaluate import read_table
from gla_nb.figure3 import markdown
from gla_nb.figure5 import TASKS
from gla_nb.projection_study import (
    CONTEXTS,
    EACH,
    EQUIVARIANT,
    LONG,
    LONGER,
    LOSSES,
    MEASURES,
    POOLS,
    gone_on_table,
    same_sequences,
    tried_rows,
    tried_table,
)
from gla_nb.train import find_experiment

TRIED = "projection_study_tried.csv"
FIGURES = {
    "figure5": TASKS,
    "figure5_controls": TASKS,
    "figure5_longer": TASKS,
    "figure5_pendulum": ("pendulum",),
}
RUNS = {
    "figure5": ("12_figure5", "-p", "controls", "True"),
    "figure5_longer": ("12_figure5", "-p", "experiment", "ant_projected_longer"),
    "figure5_pendulum": ("12_figure5", "-p", "experiment", "pendulum_projected"),
    "projection_study": ("13_projection_study",),
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "The folder of all, from nothing."
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "work").mkdir()
    for figure, (name, *more) in RUNS.items():
        code, printed = papermill(place, name, f"{figure}.ipynb", *more, *SMOKE)
        assert code == 0, printed
    return place / "outputs" / "smoke"


def test_they_leave_exactly_their_files(smoke):
    rest = ["_claims.md", "_table.md", "_controls.md", ".json", ".png", ".pdf"]
    expected = {f"figure5{kind}" for kind in KINDS + rest}
    expected |= {f"figure5_controls{kind}" for kind in KINDS} | {"claims.csv"}
    rest.remove("_controls.md")
    for name in ("figure5_longer", "figure5_pendulum"):
        expected |= {f"{name}{kind}" for kind in KINDS + rest}
    study = ["_losses.csv", "_table.md", ".json", ".png", ".pdf"]
    kinds = (".csv", ".md", ".png", ".pdf")
    study += [f"_{part}{kind}" for part in ("tried", "gone_on") for kind in kinds]
    expected |= {f"projection_study{kind}" for kind in study}
    assert set(os.listdir(smoke)) == expected
    check_pictures(smoke)
    about = json.loads((smoke / "figure5.json").read_text())
    assert about["experiment"]["train"]["projection"] == "orthonormal" and about["seconds"]


@pytest.mark.parametrize("figure", FIGURES)
def test_claims_are_recomputed_from_the_other_tables(smoke, figure):
    claims = check_claims(smoke, figure, "smoke")
    assert not claims.duplicated(["claim", "task"]).any()
    assert set(claims["task"]) == set(FIGURES[figure])


def test_every_task_has_every_curve(smoke):
    _, bins = tables(smoke, "figure5")
    curves = bins.groupby("task")["agent"].unique().map(sorted)
    assert len(curves) == 5 and len({*map(tuple, curves)}) == 1
    trained = {"gla_1", "gla_2", "plain", "no_projection", "no_projection_native"}
    assert trained <= set(curves["ant"])
    assert (bins.groupby(["task", "agent", "seed"]).size() == 32).all()
    assert np.isfinite(bins["reward"]).all()


def test_agents_without_projections_differ_natively_and_through_them(smoke):
    _, bins = tables(smoke, "figure5")
    reward = bins.set_index(["task", "agent", "seed", "bin"])["reward"].sort_index()
    for task in TASKS:
        native, through = (
            reward[task, name].to_numpy() for name in ("no_projection_native", "no_projection")
        )
        assert np.abs(native - through).max() > 1e-4, task


# -- the committed results, whatever they say: see the README ------------------------------------


@pytest.mark.parametrize(
    "figure", ["figure5", "figure5_longer", "figure5_pendulum", "figure5_pendulum_controls"]
)
def test_committed_claims_follow_from_the_committed_tables(figure):
    found = check_claims(CPU, figure, "cpu")
    assert (found["seeds"] == 32).all()


def test_the_committed_study_has_every_pool():
    losses = read_table(CPU / "projection_study_losses.csv")
    last = losses.groupby("agent").last()
    pools = {f"plain, pool of {pool}" for pool in POOLS}
    assert set(last.index) == pools | {"equivariant", LONG, LONGER}
    assert np.isfinite(last[[*LOSSES]].to_numpy()).all()
    # One projection is learned by heart: it says nothing about others. Of endless ones none is.
    gap = last["unseen"] - last["train"]
    assert gap["plain, pool of 1"] > 1 > gap["plain, pool of endless"]
    assert last["unseen"]["equivariant"] < last["unseen"]["plain, pool of endless"] - 1


def test_the_committed_table_of_what_was_tried_follows_from_the_losses():
    rows, losses = tried_rows(find_experiment("ant_projected")), read_table(CPU / TRIED)
    assert (losses.groupby(["tried", "measure"]).size().unstack() >= 32).all(axis=None)
    assert set(losses["tried"]) == set(rows) and set(losses["measure"]) == set(MEASURES)
    told = (CPU / TRIED).with_suffix(".md").read_text()
    assert told == markdown(tried_table(rows, losses)) + "\n"
    compared = [name for name in rows if same_sequences(name, rows)]
    assert len(compared) > 15 and EQUIVARIANT not in compared


def test_the_committed_table_of_agents_that_go_on_follows_from_their_speeds():
    bins = read_table(CPU / "projection_study_gone_on.csv")
    lifetimes = bins.groupby(["agent", "update"])["lifetime"].nunique()
    assert len(lifetimes) == 3 * CONTEXTS and (lifetimes == EACH).all()
    told = (CPU / "projection_study_gone_on.md").read_text()
    assert told == markdown(gone_on_table(bins)) + "\n"
