"`python -m gla_nb` says what a question needs, also where the installation is broken."

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gla_nb

ROOT = Path(__file__).resolve().parents[1]
# Without site-packages: nothing that gla_nb needs can be imported.
BARE = (sys.executable, "-S")


def report(folder, *python, path=(ROOT,), **variables):
    "The printed report by the names of its lines; run by an interpreter from another folder."
    variables["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [*(python or [sys.executable]), "-m", "gla_nb"],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    pairs = [line.strip().partition(" ") for line in done.stdout.splitlines()]
    return {name: value.strip() for name, _, value in pairs}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "out" / "checkpoints" / "grid-gap-4").mkdir(parents=True)
    return report(folder, GLA_NB_OUTPUTS="out")


def test_versions_and_the_machine(lines):
    assert lines["gla_nb"] == gla_nb.__version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r".+, \d+ of \d+ cores", lines["processor"])
    assert re.fullmatch(r"\d+\.\d GiB", lines["memory"])
    assert "cpu (" in lines["devices"]
    assert re.match(r"\d+\.\d+.* \(.*<2\.14.*\)", lines["torch"])
    assert not [name for name, value in lines.items() if value.startswith("unknown")], lines


def test_commit(lines):
    if not (ROOT / ".git").exists():
        assert lines["commit"]
        return
    call = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(call, capture_output=True, text=True).stdout.strip()
    assert head and head.startswith(lines["commit"].split(",")[0])


def test_outputs_are_counted(lines):
    assert lines["outputs"].endswith("out")
    assert lines["checkpoints"] == "1, 0.0 MiB"
    assert lines["histories"] == "0, 0.0 MiB"
    assert lines["GLA_NB_OUTPUTS"].startswith("out (")


def test_every_variable_that_the_package_reads_is_listed(lines):
    read = r"environ(?:\.get\(|\.pop\(|\[)\"(\w+)\""
    code = "\n".join(path.read_text() for path in (ROOT / "gla_nb").glob("*.py"))
    found = set(re.findall(read, code))
    assert "GLA_NB_QUIET" in found and not found - set(lines)


def test_under_five_seconds_of_processor_time(tmp_path):
    "Not of the clock: other processes may hold the cores for a while."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    report(tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0.1 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


@pytest.fixture
def alone(tmp_path):
    "The package without its metadata, which an editable installation leaves beside it."
    copied = shutil.copytree(ROOT / "gla_nb", tmp_path / "alone" / "gla_nb")
    return copied.parent


def test_a_report_of_an_installation_that_lacks_everything(tmp_path, alone):
    lines = report(tmp_path, *BARE, path=[alone])
    assert lines["gla_nb"] == gla_nb.__version__
    assert "torch" in lines["devices"] and lines["devices"].startswith("unknown (ModuleNotFound")
    assert "PackageNotFoundError" in lines["needs"]


def test_missing_packages_are_missing(tmp_path, alone):
    about = tmp_path / "gla_nb-0.1.0.dist-info"
    about.mkdir()
    text = "Metadata-Version: 2.1\nName: gla_nb\nVersion: 0.1.0\nRequires-Dist: torch<2.14\n"
    (about / "METADATA").write_text(text + "Requires-Dist: ruff; extra == 'dev'\n")
    lines = report(tmp_path, *BARE, path=[tmp_path, alone])
    assert lines["torch"] == "missing (<2.14)"
    assert lines["ruff"] == "missing"


def test_only_the_report_is_content_with_that(tmp_path):
    for words in (["-c", "import gla_nb"], ["-m", "gla_nb.tasks"]):
        done = subprocess.run(
            [*BARE, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode != 0 and "ModuleNotFoundError" in done.stderr
