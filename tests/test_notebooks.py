"The users' commands for real: run notebooks at the smoke scale, from a foreign folder."

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest
from papermill import inspect_notebook
from scipy import stats

from gla_nb.agent import GLA
from gla_nb.evaluate import claims_table, paired_test, read_table
from gla_nb.figure3 import figure_claims
from gla_nb.train import find_experiment

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "outputs" / "cpu"  # committed results
EPISODES = "task,agent,gap,seed,episode,interactions,length,return"
BINS = "task,agent,gap,seed,bin,interactions,reward,forward_reward,action_rms,"
BINS += "terminations,truncations"
CLAIMS = "claim,figure,task,agent,against,seeds,effect,low,high,p,holds"
PLAIN = {"gla", "random", "ppo_source"}  # curves of the figure without controls
FULL = PLAIN | {"hidden", "yoked", "shuffled", "episode_memory", "untrained", "ad", "dpt"}
SMOKE = "-p scale smoke".split()
CORES = {"LOKY_MAX_CPU_COUNT": None}  # as many as there are, as users have it


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working folder that is not ours, and beside it the outputs that all tests here share."
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "work").mkdir()
    return folder


def command(name):
    "A program that was installed beside this interpreter."
    return str(Path(sys.executable).with_name(name))


def start(place, *words, outputs=None, **variables):
    "Run a command in the working folder; returns exit status and everything it printed."
    variables["GLA_NB_OUTPUTS"] = str(outputs or place / "outputs")
    # One core: at this scale the work takes less time than to start processes for it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOKY_MAX_CPU_COUNT": "1"} | variables
    done = subprocess.run(
        [str(word) for word in words],
        cwd=place / "work",
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def papermill(place, name, output, *words, **options):
    "papermill of one of our notebooks, by its absolute path."
    notebook = ROOT / "nbs" / f"{name}.ipynb"
    return start(place, command("papermill"), notebook, place / output, *words, **options)


def driver(place, name, output, *words, **options):
    "The same through the module that `make` uses."
    module = [sys.executable, "-m", "gla_nb.notebooks"]
    notebook = ROOT / "nbs" / f"{name}.ipynb"
    return start(place, *module, notebook, place / output, *words, **options)


def files(folder):
    "When each file below a folder was written; locks are taken again by every run."
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in paths}


def seconds(notebook, text):
    "How long the cell with `text` in its source took when papermill ran it."
    cells = nbformat.read(notebook, as_version=4).cells
    (cell,) = [c for c in cells if c.cell_type == "code" and text in c.source]
    return cell.metadata.papermill.duration


def injected(notebook):
    "The source of the cell that papermill added."
    cells = nbformat.read(notebook, as_version=4).cells
    (cell,) = [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    return cell.source


def about(folder):
    "What the agent in a checkpoint folder says of itself."
    return GLA.from_pretrained(folder / "agent").about


# -- 03_train and 04_evaluate ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(place):
    "`-p gap 8` from nothing; returns the notebook."
    known = inspect_notebook(str(ROOT / "nbs" / "03_train.ipynb"))
    assert {"gap", "scale"} <= set(known), "without the tag the defaults win: hours of training"
    code, printed = papermill(place, "03_train", "train.ipynb", "-p", "gap", "8", *SMOKE, **CORES)
    assert code == 0, printed
    return place / "train.ipynb"


def test_papermill_trains_from_nothing_with_the_injected_gap(place, trained):
    (folder,) = (place / "outputs" / "checkpoints").iterdir()
    assert folder.name.startswith("grid-gap-8-")
    assert about(folder)["gap"] == 8, "the default overwrote it: is the parameters tag there?"
    assert about(folder)["train"]["steps"] == find_experiment("grid", "smoke").train.steps
    assert "gap = 8" in injected(trained)
    assert len(list((place / "outputs" / "histories").iterdir())) == 1
    assert not list((place / "work").iterdir()), "it left files in the working folder"


def test_a_second_run_reuses_histories_and_agent(place, trained):
    before = files(place / "outputs")
    code, printed = papermill(place, "03_train", "again.ipynb", "-p", "gap", "8", *SMOKE)
    assert code == 0, printed
    assert files(place / "outputs") == before
    notebooks = trained, place / "again.ipynb"
    first, second = (seconds(n, "[collect(config) for config") for n in notebooks)
    assert second < first / 2, "it worked as long as the first time"


def test_evaluation_shares_agents_and_lifetimes_with_the_figure(place, figure):
    before = files(place / "outputs")
    code, printed = papermill(place, "04_evaluate", "evaluate.ipynb", "-p", "gap", "max", *SMOKE)
    assert code == 0, printed
    assert 'gap = "max"' in injected(place / "evaluate.ipynb")
    after = files(place / "outputs")
    assert before.items() <= after.items(), "it collected, trained or tested again"
    # The figure has the agent itself and the random policy; the controls of this gap are new.
    new = [Path(name) for name in after.keys() - before.keys()]
    assert {path.parts[0] for path in new} == {"meta_tests"}
    assert len({path.parts[1] for path in new}) == 4


def test_jupyter_executes_at_the_smoke_scale_where_notebooks_are_tested(place, figure):
    before, notebook = files(place / "outputs"), ROOT / "nbs" / "03_train.ipynb"
    source, listing = notebook.read_bytes(), sorted(os.listdir(notebook.parent))
    code, printed = start(place, command("jupyter"), "execute", notebook, IN_TEST="1")
    assert code == 0, printed
    assert files(place / "outputs") == before, "the figure trained the agent of the default gap"
    assert notebook.read_bytes() == source and sorted(os.listdir(notebook.parent)) == listing
    assert not list((place / "work").iterdir())


# -- 10_figure3 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figure(place):
    "The folder of the figure with its controls, and what the terminal showed meanwhile."
    output = place / "outputs" / "smoke" / "figure3_grid.ipynb"
    code, printed = driver(place, "10_figure3", output, *SMOKE, GLA_NB_QUIET=None, **CORES)
    assert code == 0, printed
    return output.parent, printed


@pytest.fixture(scope="module")
def plain_figure(place, figure):
    "The folder of the figure without controls: everything it needs is there."
    words = "-p controls False -p folder plain".split()
    code, printed = papermill(place, "10_figure3", "figure.ipynb", *SMOKE, *words)
    assert code == 0, printed
    return place / "outputs" / "plain"


def figure_files(controls):
    "What `make figures` leaves for Figure 3, beside the notebook."
    kinds = ["_episodes.csv", "_bins.csv", "_table.md", "_claims.md", ".json", ".png", ".pdf"]
    kinds += ["_controls.png", "_controls.pdf", "_controls.md"] * controls
    return sorted(["claims.csv", *(f"figure3_grid{kind}" for kind in kinds)])


def check_pictures(folder):
    "Every PNG opens and shows something, and every PDF is one."
    for path in folder.glob("*.png"):
        picture = matplotlib.image.imread(path)[..., :3]
        assert min(picture.shape[:2]) > 200, path
        colours = np.unique((picture * 255).astype(np.uint8).reshape(-1, 3), axis=0)
        inked = (picture.min(-1) < 0.9).mean()
        assert len(colours) > 50 and inked > 0.01, f"{path} is blank"
    for path in folder.glob("*.pdf"):
        content = path.read_bytes()
        assert content.startswith(b"%PDF") and b"%%EOF" in content[-32:], path
        assert len(content) > 5_000, f"{path} is blank"


def check_tables(folder, agents):
    "Columns as agreed, the curves that should be there, and both tables tell the same story."
    for name, columns in [("figure3_grid_episodes", EPISODES), ("figure3_grid_bins", BINS)]:
        assert (folder / f"{name}.csv").open().readline().strip() == columns
    assert (folder / "claims.csv").open().readline().strip() == CLAIMS
    episodes, bins = (read_table(folder / f"figure3_grid_{k}.csv") for k in ("episodes", "bins"))
    assert set(episodes["agent"]) == set(bins["agent"]) == agents
    for name in ("task", "agent", "gap", "seed"):
        assert set(episodes[name]) == set(bins[name]), name
    curve, ours = ["agent", "gap", "seed"], ~bins["agent"].str.startswith("ppo")
    assert (bins.groupby(curve).size() == 32).all()
    # In lifetimes of whole episodes of 20 steps nothing is earned outside of finished episodes.
    length = bins[ours].groupby(curve)["interactions"].transform("max")
    assert (length % 20 == 0).all()
    start = bins[ours].groupby(curve)["interactions"].shift(fill_value=0)
    earned = (bins["reward"] * (bins["interactions"] - start))[ours]
    earned = earned.groupby([bins[name] for name in curve]).sum()
    returns = episodes.groupby(curve)["return"].sum()
    np.testing.assert_allclose(earned, returns[earned.index], atol=1e-6)
    return episodes, bins


def check_claims(folder, scale, seed=0):
    "claims.csv follows from the two other tables, as they are on the disk."
    episodes, bins = (read_table(folder / f"figure3_grid_{k}.csv") for k in ("episodes", "bins"))
    row = find_experiment("grid", scale, seed)
    expected = claims_table("figure3_grid", figure_claims(row, episodes, bins), episodes, bins)
    found = read_table(folder / "claims.csv")
    found = found[found["figure"] == "figure3_grid"].reset_index(drop=True)
    # Sums may differ in the last bits between processors, and so in the sixth digit.
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=2e-5, atol=1e-9)
    return found


def test_the_figure_leaves_exactly_its_files(figure, plain_figure):
    folder, _ = figure
    assert sorted(os.listdir(folder)) == sorted([*figure_files(True), "figure3_grid.ipynb"])
    assert sorted(os.listdir(plain_figure)) == figure_files(False)
    for each in (folder, plain_figure):
        check_pictures(each)
        about = json.loads((each / "figure3_grid.json").read_text())
        assert about["experiment"]["train"]["steps"] == find_experiment("grid", "smoke").train.steps
        assert about["seed"] == 0 and about["versions"]["torch"]
        assert set(about["seconds"]) == {"collect", "train", "meta-test", "PPO baselines"}
        table = (each / "figure3_grid_table.md").read_text().splitlines()
        curves = [[cell.strip() for cell in line.split("|")[1:3]] for line in table[2:]]
        assert curves == [["gla", "1"], ["gla", "4"], ["gla", "max"], ["random", ""]]


def test_the_tables_of_the_figure_hold_every_curve(figure, plain_figure):
    episodes, _ = check_tables(figure[0], FULL)
    assert set(episodes.loc[episodes["agent"] == "gla", "gap"]) == {"1", "4", "max"}
    lifetimes = episodes[~episodes["agent"].str.startswith("ppo")]
    assert (lifetimes.groupby(["agent", "gap"])["seed"].nunique() == 8).all()
    plain, _ = check_tables(plain_figure, PLAIN)
    shown = episodes[episodes["agent"].isin(plain["agent"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(shown, plain)  # controls change nothing in the main curves


def test_claims_are_recomputed_from_the_other_tables(figure, plain_figure):
    claims, fewer = check_claims(figure[0], "smoke"), check_claims(plain_figure, "smoke")
    assert len(claims) > len(fewer) > 0
    assert claims["claim"].is_unique and set(fewer["claim"]) < set(claims["claim"])


def test_claims_that_were_edited_are_noticed(figure, tmp_path):
    for name in ("claims.csv", "figure3_grid_episodes.csv", "figure3_grid_bins.csv"):
        (tmp_path / name).write_bytes((figure[0] / name).read_bytes())
    claims = read_table(tmp_path / "claims.csv")
    claims.loc[0, "effect"] += 0.01
    claims.to_csv(tmp_path / "claims.csv", index=False)
    with pytest.raises(AssertionError):
        check_claims(tmp_path, "smoke")


def test_the_terminal_shows_progress_and_no_noise(figure):
    lines = figure[1].splitlines()
    (last,) = [number for number, line in enumerate(lines) if "smoke/figure3_grid*" in line]
    lines = lines[: last + 1]
    assert any(re.match(r"meta-test of grid: (\d+) of \1 curves done", line) for line in lines)
    assert any(line.startswith("training") and "20/20" in line for line in lines)
    assert not [line for line in lines if "<" in line or "\x1b" in line], "objects, not texts"
    assert len(lines) < 100


# -- an environment of one's own -----------------------------------------------------------------


def test_the_tutorial_of_an_environment_runs_from_beginning_to_end(place):
    outputs = place / "own"
    code, printed = papermill(place, "31_your_environment", "own.ipynb", *SMOKE, outputs=outputs)
    assert code == 0, printed
    kinds = {path.name.rsplit("-", 1)[0] for path in (outputs / "histories").iterdir()}
    assert kinds == {"point 0", "point 180", "Pendulum-v1", "dm_control-reacher-easy-v0"}
    assert len(list(outputs.glob("checkpoints/*/agent/model.safetensors"))) == 2
    document = nbformat.read(place / "own.ipynb", as_version=4)
    shown = [o for cell in document.cells for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in shown) >= 5
    (cell,) = [c for c in document.cells if "google.colab" in c.source and c.cell_type == "code"]
    assert not cell.outputs and "constraints.txt" in cell.source


OTHERS = ("unseen, rewards hidden", "random")


def test_the_committed_tutorial_shows_what_it_says():
    "In unseen goals the return rises, and does not where rewards are hidden."
    document = nbformat.read(ROOT / "nbs" / "31_your_environment.ipynb", as_version=4)
    shown = [o for cell in document.cells for o in cell.get("outputs", [])]
    (table,) = [o.data["text/plain"] for o in shown if "gained more than 1" in str(o.get("data"))]
    rows = re.findall(r"^\d+ +(.+?) +([\d.]+) +([\d.]+) +\d+ of \d+$", table, re.M)
    first, last = ({row[0]: float(row[i]) for row in rows} for i in (1, 2))
    assert set(last) == {"goals of the training", "unseen goals", *OTHERS}
    assert last["unseen goals"] > first["unseen goals"] + 8
    for other in OTHERS:
        assert last[other] < first[other] + 2 and last["unseen goals"] > last[other] + 8


# -- mistakes ----------------------------------------------------------------------------------

MISTAKES = {  # command, notebook, parameters, and what must be said
    "experiment": (papermill, "10_figure3", "-p experiment gird", "unknown experiment 'gird'"),
    "scale": (papermill, "10_figure3", "-p scale huge", "unknown scale 'huge'"),
    "gap": (papermill, "03_train", "-p gap eight", "unknown gap 'eight'"),
    "history": (driver, "03_train", "-p gap 99", "gap 99 is larger than the history"),
}


@pytest.fixture(scope="module")
def mistakes(place):
    "Exit status and printed text of all of `MISTAKES`, and of outputs below a file; two at a time."
    (place / "file.txt").write_text("not a folder")
    bad = place / "file.txt" / "outputs"
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            name: pool.submit(
                run, place, notebook, f"{name}.ipynb", *SMOKE, *words.split(), outputs=place / "new"
            )
            for name, (run, notebook, words, _) in MISTAKES.items()
        }
        folder = (place, "10_figure3", "folder.ipynb", *SMOKE)
        jobs["folder"] = pool.submit(papermill, *folder, outputs=bad)
    assert not files(place / "new"), "a command that was refused wrote something"
    return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_value_is_an_error_that_names_it(place, mistakes, name):
    (code, printed), (run, _, _, message) = mistakes[name], MISTAKES[name]
    assert code == 1
    assert f"ValueError: {message}" in printed
    assert ("Traceback" in printed) == (run is papermill), "the driver says it in one line"
    cells = nbformat.read(place / f"{name}.ipynb", as_version=4).cells
    errors = [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert len(errors) == 1 and message in errors[0].evalue, "the notebook keeps the error"


def test_outputs_below_a_file_are_an_error_that_says_what_to_do(place, mistakes):
    code, printed = mistakes["folder"]
    assert code == 1
    assert f"cannot write {place / 'file.txt' / 'outputs'}" in printed
    assert "a part of the path is a file" in printed and "set GLA_NB_OUTPUTS" in printed
    code, printed = driver(place, "03_train", "file.txt/out.ipynb", *SMOKE)
    assert code == 1
    assert f"cannot write {place / 'file.txt'}" in printed and len(printed.splitlines()) == 1
    assert (place / "file.txt").read_text() == "not a folder"


def test_a_mistyped_parameter_is_refused_before_anything_is_written(place):
    code, printed = driver(place, "03_train", "typo/out.ipynb", "-p", "gapp", "8")
    assert code == 2
    assert "no parameter 'gapp'" in printed and "did you mean 'gap'?" in printed
    assert len(printed.splitlines()) == 1 and not (place / "typo").exists()


# -- the committed figure ----------------------------------------------------------------------
# These read outputs/cpu/figure3_grid*: the result that the README shows. They fail where it is
# missing, and where a claim of the paper does not hold in it.


@pytest.fixture(scope="module")
def committed():
    "Episodes and bins of the committed Figure 3 (left)."
    missing = set(figure_files(True)) - set(os.listdir(CPU) if CPU.exists() else [])
    assert not missing, f"outputs/cpu lacks {sorted(missing)}: run `make figures`"
    return check_tables(CPU, FULL | {"ppo", "ppo_small_rollouts"})


def per_lifetime(episodes, gap, effect):
    "An effect of each lifetime of one of our curves, by seed; `effect` takes its episodes."
    ours = episodes[(episodes["agent"] == "gla") & (episodes["gap"] == gap)]
    return pd.Series({seed: effect(lifetime) for seed, lifetime in ours.groupby("seed")})


def to_90_percent(lifetime):
    "End of the first episode at which the mean of the last five is 15.3, else of the last one."
    returns, ends = lifetime["return"].to_numpy(), lifetime["interactions"].to_numpy()
    for last in range(5, len(returns) + 1):
        if returns[last - 5 : last].sum() >= 5 * 15.3 - 1e-9:
            return ends[last - 1]
    return ends[-1]


def last_quarter(lifetime):
    return lifetime["return"].iloc[-(len(lifetime) // 4) :].mean()


def first_quarter(lifetime):
    return lifetime["return"].iloc[: len(lifetime) // 4].mean()


def test_committed_curves_are_64_lifetimes_of_at_least_100_episodes(committed):
    episodes, _ = committed
    ours = episodes[episodes["agent"] == "gla"]
    assert set(ours["gap"]) == {"1", "4", "8", "max"}
    for gap in ("1", "4", "8", "max"):
        counts = per_lifetime(episodes, gap, len)
        assert len(counts) == 64 and counts.min() >= 100, f"g = {gap}"
    others = episodes[~episodes["agent"].str.startswith("ppo")]
    assert (others.groupby(["agent", "gap"])["seed"].nunique() == 64).all()


def test_committed_runs_of_ppo_end_near_the_optimum(committed):
    episodes, _ = committed
    runs = episodes[episodes["agent"] == "ppo_source"].groupby("seed")
    assert runs.ngroups >= 2
    assert runs["return"].apply(lambda r: r.iloc[-32:].mean()).mean() >= 0.95 * 17


def test_committed_largest_gap_is_optimal_from_the_first_episode(committed):
    first = per_lifetime(committed[0], "max", lambda lifetime: lifetime["return"].iloc[0])
    assert first.mean() >= 15.3


@pytest.mark.parametrize("slow, fast", [("1", "4"), ("4", "8")])
def test_committed_larger_gaps_learn_faster(committed, slow, fast):
    before, after = (per_lifetime(committed[0], gap, to_90_percent) for gap in (slow, fast))
    difference = before - after  # paired by seed
    assert difference.mean() > 0
    assert paired_test(difference) < 0.01
    assert stats.wilcoxon(difference).pvalue < 0.01, "a second opinion, from another test"


@pytest.mark.parametrize("gap", ["4", "8", "max"])
def test_committed_agents_end_near_the_optimum(committed, gap):
    assert per_lifetime(committed[0], gap, last_quarter).mean() >= 15.3


def test_committed_smallest_gap_improves(committed):
    first, last = (per_lifetime(committed[0], "1", q) for q in (first_quarter, last_quarter))
    assert (last - first).mean() > 0
    assert paired_test(last - first) < 0.01
    assert stats.wilcoxon(last - first).pvalue < 0.01


def test_committed_claims_follow_from_the_committed_tables(committed):
    claims = check_claims(CPU, "cpu")
    assert len(claims) > 10


def test_committed_figure_is_whole(committed):
    check_pictures(CPU)
    document = nbformat.read(CPU / "figure3_grid.ipynb", as_version=4)
    errors = [o for c in document.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert not errors
    assert 'scale = "cpu"' in injected(CPU / "figure3_grid.ipynb")
