"The guides say what is so: examples run, messages are those of the library, links lead somewhere."

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import nbformat
import numpy as np
import pytest
from markdown_it import MarkdownIt
from nbformat.v4 import new_code_cell, new_notebook

from gla_nb.agent import GLA
from gla_nb.collect import CollectConfig, collect, run_folders
from gla_nb.evaluate import meta_test
from gla_nb.histories import episode_returns, export_histories, open_history
from gla_nb.kernel import run_compiler
from gla_nb.notebooks import check_parameters
from gla_nb.tasks import Task, check_spaces, find_task, make_env
from gla_nb.train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import check_site  # noqa: E402
import repository_pages as pages  # noqa: E402

GUIDES = sorted((ROOT / "docs").glob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def guide(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def fenced(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def table_rows(text):
    "The cells of all rows of all tables."
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]


# -- examples ------------------------------------------------------------------------------------

EXAMPLES = [path for path in GUIDES if "```python" in path.read_text(encoding="utf-8")]


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"extending", "history_format", "scaling"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_as_printed(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for block in fenced(path.read_text(encoding="utf-8"), "python"):
        if "notebook_launcher(" not in block:  # for a fresh kernel, and a test of its own
            exec(compile(block, path.name, "exec"), names)
    printed = capsys.readouterr().out
    if path.stem == "extending":
        first, last = map(float, re.findall(r"episode ([\d.]+), last ([\d.]+)", printed)[0])
        assert first < 7 and last > 8, "the agent does not learn to pull the second lever"
    # A comment behind `print` that shows a shape says what is printed there.
    for block in fenced(path.read_text(encoding="utf-8"), "python"):
        for shape in re.findall(r"print\(.*\.shape.*\)  # \(([^)]*)\)", block):
            numbers = re.findall(r"\d+", shape)
            assert re.search(r"\(" + r",\s*".join(numbers) + r",?\)", printed), shape


def test_a_model_of_ones_own_acts_as_it_is_trained():
    "The recurrent agent of the guide: step by step as on the whole sequence, and rows that wait."
    import torch

    names = {}
    blocks = fenced(guide("extending"), "python")
    imports = "import torch\nfrom gla_nb.projections import TokenLayout\n"
    exec(imports + next(b for b in blocks if "class Recurrent" in b), names)
    layout = names["TokenLayout"](observation=2, action=3, discrete=True)
    model, tokens = names["Recurrent"](layout), torch.randn(2, 5, layout.width)
    cache, active = model.new_cache(2), torch.tensor([True, False])
    with torch.no_grad():
        steps = torch.stack([model.step(tokens[:, t], cache) for t in range(5)], 1)
        torch.testing.assert_close(steps, model(tokens))
        before = cache.hidden.clone()
        model.step(tokens[:, 0], cache, active)
    assert (cache.hidden[1] == before[1]).all() and (cache.hidden[0] != before[0]).any()
    cache.empty(active)
    assert not cache.hidden[0].any() and cache.hidden[1].any()


def test_the_script_for_torchrun_trains_one_agent_in_two_processes(tmp_path):
    script = next(b for b in fenced(guide("scaling"), "python") if "print(train(" in b)
    (tmp_path / "train_grid.py").write_text(script)
    assert "torchrun --nproc_per_node 4 train_grid.py" in guide("scaling")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "train_grid.py"]
    environment = os.environ | {"GLA_NB_OUTPUTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (agent,) = tmp_path.glob("checkpoints/*/agent")
    assert done.stdout.count(str(agent)) == 2  # torchrun does not buffer: lines may mix
    assert GLA.from_pretrained(agent).about["gap"] == 4


def test_a_notebook_launches_two_processes(tmp_path):
    source = next(b for b in fenced(guide("scaling"), "python") if "notebook_launcher(" in b)
    cells = [
        "import logging\n\nlogging.basicConfig(level='INFO')",
        source,
        "print(agent.about['gap'])",
    ]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "launch.ipynb")
    command = [sys.executable, "-m", "papermill", "launch.ipynb", "done.ipynb"]
    environment = os.environ | {"GLA_NB_OUTPUTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, launch, last = nbformat.read(tmp_path / "done.ipynb", 4).cells
    assert "Launching training on 2 " in str(launch.outputs)
    assert "reusing the agent" in str(launch.outputs)  # the processes made it
    assert last.outputs[0].text == "4\n"


# -- messages ------------------------------------------------------------------------------------


class Unstable(gym.Env):
    "Its third step spoils the observation."

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        value = np.nan if self.steps == 3 else 0.0
        return np.full(1, value, np.float32), 0.0, False, False, {}


class Switches(Unstable):
    action_space = gym.spaces.MultiDiscrete([3, 3])


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    "Two short runs in the grid world."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("histories")))
        return collect(CollectConfig(runs=2, updates=6), jobs=1)


def first_update(folder, outputs, name):
    copy = outputs / name
    shutil.copytree(run_folders(folder)[0], copy)
    return copy


def no_python(outputs):
    "What `make` says where no interpreter is on the PATH."
    (outputs / ".ci").mkdir()
    for name in (".ci/install", "settings.ini"):
        shutil.copy(ROOT / name, outputs / name)
    (outputs / "bin").mkdir()
    for tool in ("bash", "sed", "dirname"):
        (outputs / "bin" / tool).symlink_to(shutil.which(tool))
    call = ["bash", str(outputs / ".ci/install"), ""]
    environment = {"PATH": str(outputs / "bin")}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    raise ValueError(done.stderr.splitlines()[0])


def damaged_weights(histories, outputs):
    shutil.copytree(ROOT / "outputs/agents/ant", outputs / "broken")
    (outputs / "broken/model.safetensors").write_bytes(b"version https://git-lfs")
    GLA.from_pretrained(outputs / "broken")


def truncated_array(histories, outputs):
    path = first_update(histories, outputs, "run_000") / "reward.npy"
    os.truncate(path, 1000)
    open_history(path.parent)


def export(histories, outputs):
    return export_histories(histories, outputs / "compact", every=2, steps=40)


def unwritable(histories, outputs):
    (outputs / "a_file").touch()
    os.environ["GLA_NB_OUTPUTS"] = str(outputs / "a_file")  # the test puts it back
    collect(CollectConfig(), jobs=1)


def lone_run(histories, outputs):
    copy = outputs / "one"
    shutil.copytree(run_folders(histories)[0], copy / "run_000")
    train(SMALL, copy)


def not_finite(histories, outputs):
    gym.register("example/NaN-v0", entry_point=Unstable)
    meta_test(Task("nan", "example/NaN-v0"), "random", [0], 4)


SMALL = TrainConfig(
    gap=2, tokens=48, segment_min=5, segment_max=14, layers=1, width=16, heads=1, batch=2,
    steps=8, evaluate_every=4,
)  # fmt: skip
AGENTS = ROOT / "outputs" / "agents"


def shipped(name):
    return GLA.from_pretrained(AGENTS / name)


def no_compiler(*_):
    with patch.dict(os.environ, PATH="", CXX=""):
        run_compiler(given="")


PROVOKED = {
    "python": lambda _, outputs: no_python(outputs),
    "parameter": lambda *_: check_parameters(ROOT / "nbs/10_figure3.ipynb", {"gap": 8}),
    "compiler": no_compiler,
    "task": lambda *_: find_task("Ant-v44"),
    "observation space": lambda *_: make_env("Blackjack-v1"),
    "action space": lambda *_: check_spaces(Switches()),
    "nan": not_finite,
    "other shape": lambda *_: meta_test("pendulum", shipped("ant"), [0], 4),
    "too large": lambda *_: meta_test("Humanoid-v4", shipped("ant_projected"), [0], 4),
    "no agent": lambda _, outputs: GLA.from_pretrained(outputs / "nobody"),
    "damaged weights": damaged_weights,
    "swapped": lambda *_: meta_test("ant", "grid", [0], 4),
    "truncated": truncated_array,
    "no history": lambda _, outputs: open_history(outputs / "run_001"),
    "export": lambda *given: episode_returns(open_history(run_folders(export(*given))[0])),
    "gap": lambda histories, _: train(replace(SMALL, gap=6), histories),
    "gap of export": lambda *given: train(replace(SMALL, gap=3), export(*given)),
    "segment": lambda histories, _: train(replace(SMALL, tokens=128, segment_max=96), histories),
    "loss": lambda histories, _: train(replace(SMALL, learning_rate=1e30, warmup=0), histories),
    "one run": lone_run,
    "unwritable": unwritable,
}


def one_line(text):
    return " ".join(text.split())


def quoted():
    return [one_line(block) for block in fenced(guide("troubleshooting"), "text")]


@pytest.mark.parametrize("what", PROVOKED)
def test_messages_are_those_of_the_library(what, histories, tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    with pytest.raises((ValueError, OSError)) as caught:
        PROVOKED[what](histories, tmp_path)
    message = one_line(str(caught.value).replace(str(tmp_path), "outputs"))
    message = re.sub(r"^\[Errno \d+\] ", "", message)
    assert re.sub(r"-[0-9a-f]{10}\b", "-0123456789", message) in quoted()  # of a configuration


def test_every_quoted_message_is_provoked():
    assert len(quoted()) == len(set(quoted())) == len(PROVOKED)


# -- figures, settings ---------------------------------------------------------------------------


def figures():
    "The names of the Makefile's ALL_FIGURES."
    found = re.search(r"^ALL_FIGURES = ((?:.*\\\n)*.*)", MAKEFILE, re.M)[1]
    return found.replace("\\", " ").split()


def figure_rows(text):
    "The row of each figure by its name in the Makefile."
    rows = {}
    for row in table_rows(text):
        command = re.fullmatch(r"`make figures FIGURES=(\w+)`", row[1] if row[1:] else "")
        if command:
            rows[command[1]] = row
    return rows


def test_every_figure_is_described():
    rows = figure_rows(guide("figures"))
    assert list(rows) == figures()
    for name, row in rows.items():
        pattern = row[-1].strip("`")
        assert list((ROOT / "outputs/cpu").glob(pattern)), f"{name} wrote no {pattern}"


def test_times_are_those_of_the_readme():
    here, there = map(figure_rows, (guide("figures"), (ROOT / "README.md").read_text("utf-8")))
    for name, row in there.items():
        assert row[2] == here[name][2], name


def test_every_kind_of_file_of_a_figure_is_described():
    text, written = guide("figures"), set()
    for path in (ROOT / "outputs/cpu").iterdir():
        longest_first = sorted(figures(), key=len, reverse=True)  # figure5_pendulum, then figure5
        name = next((f for f in longest_first if path.name.startswith(f)), None)
        assert name, f"{path.name} is of no figure"
        written.add("FIGURE" + path.name.removeprefix(name))
    for kind in written:
        kind = re.sub(r"^FIGURE(_controls|_ppo)(?=_(?:bins|episodes)|\.p)", "FIGURE", kind)
        assert kind in text or kind in ("FIGURE.csv", "FIGURE.md", "FIGURE_losses.csv"), kind


def test_every_variable_that_is_read_is_documented():
    rows = table_rows(guide("settings"))
    documented = {name for row in rows for name in re.findall(r"[A-Z][A-Z_]{2,}", row[0])}
    code = {path: path.read_text(encoding="utf-8") for path in (ROOT / "gla_nb").glob("*.py")}
    read = re.findall(r"environ(?:\.get)?[(\[]\"(\w+)\"", "\n".join(code.values()))
    read += re.findall(r"GLA_NB_[A-Z]+", "\n".join(code.values()) + MAKEFILE)
    read += re.findall(r"^(\w+) \?=", MAKEFILE, re.M)
    assert {"GLA_NB_OUTPUTS", "GLA_NB_QUIET", "RANK", "SCALE"} <= set(read)
    assert set(read) <= documented


# -- links ---------------------------------------------------------------------------------------

PAGES = [*ROOT.glob("*.md"), *GUIDES, *sorted((ROOT / "nbs").glob("*.ipynb"))]


def markdown(path):
    "The Markdown of a page; of a notebook that of its cells."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def tokens(path):
    parser = MarkdownIt("commonmark").enable("table")
    for token in parser.parse(markdown(path)):
        yield token
        yield from token.children or []


def anchors(path):
    "The anchors that GitHub gives to the headings of a page."
    found, inside = [], False
    for token in tokens(path):
        if inside and token.type == "inline":
            words = "".join(t.content for t in token.children if t.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
        inside = token.type == "heading_open"
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for token in tokens(path):
        link = token.attrGet("href") or token.attrGet("src") or ""
        target, _, anchor = link.partition("#")
        if not link or re.match(r"\w+:", link):
            continue
        place = (path.parent / target).resolve() if target else path
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link


# -- the site ------------------------------------------------------------------------------------


def test_every_page_of_the_repository_is_in_the_sidebar():
    listed = pages.contents().split()
    for folder, pattern in {"nbs": "*.ipynb", "docs": "*.md", "gla_nb": "[!_]*.py"}.items():
        found = [path.stem for path in (ROOT / folder).glob(pattern)]
        place = "api" if folder == "gla_nb" else folder
        assert found and all(listed.count(f"{place}/{name}") == 1 for name in found)


def test_a_notebook_of_no_group_is_refused(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "90_other.ipynb").touch()
    with pytest.raises(ValueError, match="90_other"):
        pages.notebooks(tmp_path)


def code_cell(source):
    return {"cell_type": "code", "source": source, "metadata": {}, "outputs": []}


def test_directives_and_hidden_cells_are_not_shown():
    sources = ["#| default_exp tasks", "#| export\n\ndef f(): ...", "#| hide\nsecret()"]
    sources += ["#| export\nimport os\nfrom pathlib import Path", "#| slow\nx = '#| hide'", "%pwd"]
    shown = pages.shown({"cells": [code_cell(source) for source in sources]})["cells"]
    kept = ["def f(): ...", "import os\nfrom pathlib import Path", "x = '#| hide'", "%pwd"]
    assert [cell["source"] for cell in shown] == kept
    folded = [cell["metadata"].get("tags") == ["hide-input"] for cell in shown]
    assert folded == [False, True, False, False]


def test_no_directive_is_left_in_any_notebook():
    for paths in pages.notebooks().values():
        for path in paths:
            for cell in pages.shown(json.loads(path.read_text(encoding="utf-8")))["cells"]:
                text = "".join(cell["source"])
                assert cell["cell_type"] != "code" or not re.search(r"^#\|", text, re.M)


@pytest.mark.parametrize(
    "body, message",
    [
        ("<a href='#here'>x</a><h1 id='here'>y</h1><a href='b.html#there'>x</a>", None),
        ("<a href='https://example.org'>x</a><img src='data:image/png;base64,AA=='>", None),
        ("<a href='#nowhere'>x</a>", "#nowhere leads to no place in a.html"),
        ("<a href='b.html#here'>x</a>", "leads to no place in b.html"),
        ("<a href='c.html'>x</a>", "c.html leads to no file"),
        ("<img src='c.png'>", "c.png leads to no file"),
        ("<a href='../c.html'>x</a>", "leaves the site"),
        ("<script src='https://example.org/x.js'></script>", "loaded from elsewhere"),
    ],
)
def test_faults_of_a_site_are_found(tmp_path, body, message):
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text("<h1 id='there'>x</h1>")
    found = check_site.defects(tmp_path, ["a.html", "b.html"])
    assert (len(found) == 1 and message in found[0]) if message else found == []
    assert check_site.defects(tmp_path, ["d.html"])[0] == "d.html is missing"
