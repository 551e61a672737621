"Files for containers and for the hosting of the repository: they parse, and name what exists."

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_the_container_runs_what_exists():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    (target,) = re.findall(r"^make (\S+)$", container["postCreateCommand"])
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)
    minimum = re.search(r"min_python *= *(\S+)", (ROOT / "settings.ini").read_text())[1]
    assert container["image"].startswith(f"python:{minimum}-")


@pytest.mark.parametrize("path", sorted((ROOT / ".github").glob("**/*.yml")), ids=lambda p: p.stem)
def test_forms_ask_for_what_is_needed(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    assert all(part["validations"]["required"] for part in form["body"])
    assert len({part["id"] for part in form["body"]}) == len(form["body"])


def test_bugs_come_with_the_report_of_the_installation():
    assert "-m gla_nb`" in (ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text()
    assert "`make test`" in (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text()
