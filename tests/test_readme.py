"The README says what the files say, and its example runs."

import os
import re
import subprocess
import sys
from pathlib import Path

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
    "figure5_table",
    "projection_study_table",
    "conditioning_claims",
    "claims",
]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_figure(name):
    assert (RESULTS / f"{name}.md").read_text().strip() in README


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).stat().st_size > 10_000 for picture in pictures)


def test_the_example_runs_as_printed(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    environment = os.environ | {"GLA_NB_OUTPUTS": str(tmp_path / "outputs")}
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\d+) +(\d+\.\d+)$", done.stdout, re.M)
    assert [int(episode) for episode, _ in rows] == list(range(20))  # 400 interactions
    assert all(0 <= float(mean) <= 17 for _, mean in rows)
