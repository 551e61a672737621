"`make` on machines without a suitable Python, and after installations that were interrupted."

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "awk bash cat dirname echo env find make mkdir mktemp mv rm sed sh sleep touch".split()

# Stands for an interpreter: suits, makes environments that hold a copy of itself, and "installs"
# by adding a line to a log. While slow.txt exists pip is busy; broken.txt makes it fail. Notebooks
# that it is asked to run are noted, and leave the table that `make demo` prints.
PRETENDER = """#!/bin/sh
case "$1 $2" in
  "-c "*"version_info"*) echo True ;;
  "-c "*"flock"*) exec "INTERPRETER" "$@" ;;
  "-m venv")
    mkdir -p "$3/bin" && cat "$0" > "$3/bin/python" && chmod +x "$3/bin/python"
    echo venv >> log.txt ;;
  "-m pip")
    if [ "$3" = install ]; then
      echo started >> log.txt
      while [ -e slow.txt ]; do sleep 0.1; done
      if [ -e broken.txt ]; then echo "pip: no network" >&2; exit 1; fi
      echo pip >> log.txt
    fi ;;
  "-m gla_nb.notebooks")
    shift 2; echo "$@" >> notebooks.txt
    folder=$(dirname "$2"); mkdir -p "$folder"; echo "| gap |" > "$folder/figure3_grid_table.md" ;;
  "--version "*) echo "Python 3.12.0" ;;
esac
""".replace("INTERPRETER", sys.executable)


@pytest.fixture
def checkout(tmp_path):
    "What the set-up needs, in a folder whose name has spaces, with a PATH that has no Python."
    folder = tmp_path / "a check out"
    folder.mkdir()
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (tmp_path / "bin").mkdir()
    for name in [*TOOLS, "chmod"]:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return folder


def make(checkout, *words, **options):
    environment = {"PATH": str(checkout.parent / "bin"), "HOME": str(checkout.parent)}
    return subprocess.Popen(
        ["make", *words],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group that a test may kill
        **options,
    )


def finish(process, timeout=60):
    output = process.communicate(timeout=timeout)[0]
    return process.returncode, output


def pretend(checkout):
    "Put the pretender on the PATH as python3.12."
    path = checkout.parent / "bin" / "python3.12"
    path.write_text(PRETENDER)
    path.chmod(0o755)


def log(checkout, slow=False):
    path = checkout / "log.txt"
    words = path.read_text().split() if path.exists() else []
    return words if slow else [word for word in words if word != "started"]


def wait_for_pip(checkout, process):
    while "started" not in log(checkout, slow=True):
        assert process.poll() is None
        time.sleep(0.05)


def test_help_lists_every_target(checkout):
    code, output = finish(make(checkout))
    assert code == 0
    for target in (".venv", "demo", "test", "lab", "figures", "docs", "clean"):
        assert f"make {target} " in output
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("target", [".venv", "demo", "test"])
def test_a_missing_python_is_said_clearly(checkout, target):
    code, output = finish(make(checkout, target, f"PYTHON={shutil.which('false')}"))
    assert code != 0
    assert "No Python 3.11 or newer" in output and "PYTHON=" in output
    assert not (checkout / ".venv").exists()


def test_shims_that_fail_are_passed_over(checkout):
    for name in ("python3.11", "python3"):
        shim = checkout.parent / "bin" / name
        shim.write_text("#!/bin/sh\necho 'command not found' >&2; exit 127\n")
        shim.chmod(0o755)
    pretend(checkout)
    code, output = finish(make(checkout, ".venv"))
    assert code == 0, output
    assert log(checkout) == ["venv", "pip"]


def test_up_to_date_until_a_dependency_or_the_place_changes(checkout):
    pretend(checkout)
    assert finish(make(checkout, ".venv"))[0] == 0
    assert finish(make(checkout, ".venv"))[0] == 0
    assert log(checkout) == ["venv", "pip"]
    later = time.time() + 5
    os.utime(checkout / "constraints.txt", (later, later))
    assert finish(make(checkout, ".venv"))[0] == 0
    assert log(checkout) == ["venv", "pip", "pip"], "installed again, in the same environment"
    moved = checkout.with_name("moved check out")
    checkout.rename(moved)
    assert finish(make(moved, ".venv"))[0] == 0
    assert log(moved)[3:] == ["venv", "pip"], "scripts in .venv/bin name the old folder"


def test_a_failing_pip_is_shown_and_the_next_make_completes(checkout):
    pretend(checkout)
    (checkout / "broken.txt").touch()
    code, output = finish(make(checkout, ".venv"))
    assert code != 0 and "no network" in output and "did not finish" in output
    (checkout / "broken.txt").unlink()
    assert finish(make(checkout, ".venv"))[0] == 0
    assert log(checkout) == ["venv", "venv", "pip"]


def test_after_a_kill_the_next_make_completes(checkout):
    pretend(checkout)
    (checkout / "slow.txt").touch()
    process = make(checkout, ".venv")
    wait_for_pip(checkout, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    (checkout / "slow.txt").unlink()
    code, output = finish(make(checkout, ".venv"))
    assert code == 0, output
    assert log(checkout) == ["venv", "venv", "pip"]
    assert (checkout / ".venv" / ".installed").exists()
    assert not (checkout / ".venv" / ".installing").exists()


def test_two_makes_at_once_install_once(checkout):
    pretend(checkout)
    (checkout / "slow.txt").touch()
    first = make(checkout, ".venv")
    wait_for_pip(checkout, first)
    second = make(checkout, ".venv")
    assert "waiting" in second.stdout.readline()
    (checkout / "slow.txt").unlink()
    assert finish(first)[0] == 0
    assert finish(second)[0] == 0
    assert log(checkout) == ["venv", "pip"]


@pytest.mark.parametrize("left", ["empty", "python without pip"])
def test_a_half_made_environment_is_repaired(checkout, left):
    pretend(checkout)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    if left != "empty":
        (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
        (checkout / ".venv" / "bin" / "python").chmod(0o755)
    assert finish(make(checkout, ".venv"))[0] == 0
    assert log(checkout) == ["venv", "pip"]


def test_an_unknown_scale_is_refused(checkout):
    pretend(checkout)
    code, output = finish(make(checkout, "figures", "SCALE=huge"))
    assert code != 0 and "huge" in output and "smoke, cpu or paper" in output


def test_demo_and_figures_start_notebooks_through_the_module_that_checks_parameters(checkout):
    pretend(checkout)
    code, output = finish(make(checkout, "demo"))
    assert code == 0 and "| gap |" in output, output
    code, output = finish(make(checkout, "figures", "SCALE=smoke", "GLA_NB_OUTPUTS=elsewhere"))
    assert code == 0, output
    assert (checkout / "notebooks.txt").read_text().splitlines() == [
        "nbs/10_figure3.ipynb outputs/demo/figure3_grid.ipynb "
        "-p experiment grid -p scale cpu -p controls False -p folder demo",
        "nbs/10_figure3.ipynb elsewhere/smoke/figure3_grid.ipynb -p experiment grid -p scale smoke",
        "nbs/10_figure3.ipynb elsewhere/smoke/figure3_ant.ipynb -p experiment ant -p scale smoke",
        "nbs/11_figure4.ipynb elsewhere/smoke/figure4.ipynb -p scale smoke",
        "nbs/12_figure5.ipynb elsewhere/smoke/figure5.ipynb -p scale smoke",
        "nbs/12_figure5.ipynb elsewhere/smoke/figure5_longer.ipynb "
        "-p experiment ant_projected_longer -p scale smoke",
        "nbs/12_figure5.ipynb elsewhere/smoke/figure5_pendulum.ipynb "
        "-p experiment pendulum_projected -p controls True -p scale smoke",
        "nbs/13_projection_study.ipynb elsewhere/smoke/projection_study.ipynb -p scale smoke",
        "nbs/14_long_lifetimes.ipynb elsewhere/smoke/long_lifetimes.ipynb -p scale smoke",
        "nbs/15_conditioning.ipynb elsewhere/smoke/conditioning.ipynb -p scale smoke",
        "nbs/16_claims.ipynb elsewhere/smoke/claims.ipynb -p scale smoke",
    ]
    for name in ("figure4", "figure6"):
        code, output = finish(make(checkout, "figures", "SCALE=smoke", f"FIGURES={name}"))
        assert (code == 0) == (name == "figure4"), output
    assert "unknown figure figure6" in output
    assert log(checkout) == ["venv", "pip"], "installed once"


def test_a_notebook_that_fails_fails_the_target(checkout):
    pretend(checkout)
    assert finish(make(checkout, ".venv"))[0] == 0
    path = checkout / ".venv" / "bin" / "python"
    path.write_text(path.read_text().replace("shift 2;", "exit 1;"))
    for target in ("demo", "figures"):
        code, output = finish(make(checkout, target))
        assert code != 0 and "Figure:" not in output, output
