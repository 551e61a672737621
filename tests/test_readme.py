"The README says what the files say, and its example runs."

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "outputs" / "cpu"


TABLES = [
    "figure3_grid_table",
    "figure3_grid_controls",
    "figure3_ant_table",
    "figure3_ant_controls",
    "figure4_table",
    "figure4_controls",
    "long_lifetimes_table",
    "long_lifetimes_standing",
    "figure5_table",
    "figure5_longer_table",
    "figure5_pendulum_table",
    "figure5_pendulum_controls",
    "projection_study_table",
    "projection_study_gone_on",
    "conditioning_claims",
    "claims",
]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_figure(name):
    assert (RESULTS / f"{name}.md").read_text().strip() in README


def test_speeds_are_those_of_the_benchmark():
    table = (ROOT / "outputs" / "benchmarks" / "cpu_table.md").read_text().splitlines()
    section = README.split("## Speed\n")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 10 and not set(shown) - set(table)


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).stat().st_size > 10_000 for picture in pictures)


def run_example(example, **settings):
    "The standard output of a piece of Python, run in the repository."
    command = [sys.executable, "-c", example]
    done = subprocess.run(
        command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOP, LIBRARY = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_loop_runs_as_printed_and_within_the_interval_that_is_stated():
    stated = re.search(r"had ([\d.]+) m/s on average, between (\S+) and ([\d.]+) \(", README)
    mean, low, high = map(float, stated.groups())
    bins = pd.read_csv(RESULTS / "figure3_ant_bins.csv")
    ours = bins[(bins["agent"] == "gla") & (bins["gap"] == "64") & bins["bin"].isin([14, 15])]
    lifetimes = ours.groupby("seed")["forward_reward"].mean()
    assert len(lifetimes) == 256 and ours["interactions"].max() == 4096
    found = [lifetimes.mean(), lifetimes.min(), lifetimes.max()]
    assert [round(value, 1) for value in found] == [mean, low, high]
    speeds = re.findall(r"-?\d+\.\d*", run_example(LOOP))
    assert len(speeds) == 8 and low - 0.1 <= float(speeds[-1]) <= high + 0.1
    assert max(map(float, speeds)) > 2  # it learned to run, whatever became of it


def test_the_example_of_the_library_runs_as_printed(tmp_path):
    printed = run_example(LIBRARY, GLA_NB_OUTPUTS=str(tmp_path / "outputs"))
    rows = re.findall(r"^(\d+) +(\d+\.\d+)$", printed, re.M)
    assert [int(episode) for episode, _ in rows] == list(range(20))  # 400 interactions
    assert all(0 <= float(mean) <= 17 for _, mean in rows)
