"Films show the lifetime that was lived, fit, and say what is missing where they cannot be made."

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import nbformat
import numpy as np
import papermill
import pytest

from gla_nb.agent import GLA
from gla_nb.evaluate import episodes_table, meta_test
from gla_nb.films import (
    cannot_draw,
    draw_film,
    drawn_env,
    encode,
    film,
    filmed_episodes,
    frame_steps,
    play,
    record,
    weights_digest,
    write_film,
)
from gla_nb.stages import read_json
from gla_nb.tasks import TASKS, GridWorldEnv

ROOT = Path(__file__).resolve().parents[1]
FILMS = ROOT / "outputs" / "films"
AGENTS = ROOT / "outputs" / "agents"
BALANCE = "dm_control/cartpole-balance-v0"


def python(code, **environment):
    "What a new interpreter without a display prints, and its errors."
    kept = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL")}
    environment = kept | {"PYTHONPATH": str(ROOT)} | environment
    call = [sys.executable, "-c", code]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)


def egl_missing():
    "Why MuJoCo cannot draw through EGL here; empty where it can."
    done = python("from mujoco.egl import GLContext; GLContext(8, 8).free()", MUJOCO_GL="egl")
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


MISSING = egl_missing()
needs_egl = pytest.mark.skipif(bool(MISSING), reason=f"MuJoCo cannot draw here: {MISSING}")


def noise(picture):
    "Mean difference of neighbours: small in a picture of something."
    return np.abs(np.diff(picture.astype(float), axis=0)).mean()


def test_a_recording_is_the_lifetime_of_meta_test():
    for feedback in ("true", "shuffled"):
        recording = record("pendulum", "random", [3, 4], 210, feedback)
        tested = meta_test("pendulum", "random", [3, 4], 210, feedback=feedback)
        assert np.array_equal(recording.lifetimes.reward, tested.reward)
        same = np.array_equal(recording.shown, tested.reward)
        assert same == (feedback == "true")
    assert recording.action.shape == (2, 210, 1) and np.abs(recording.action).max() <= 1


def test_pictures_are_of_the_two_episodes():
    recording = record("grid", "random", [1], 100)
    episodes = filmed_episodes(recording)
    assert episodes["episode"].tolist() == [0, 4] and episodes["start"].tolist() == [0, 80]
    with drawn_env("grid") as env:
        every, milliseconds = frame_steps(env)
        pictures = play(env, recording, episodes, every, 120)
    assert (every, milliseconds) == (1, 250)
    for shown, start in zip(pictures, (0, 80), strict=True):
        squares = [p.reshape(3, 32, 3, 32, 3)[:, 16, :, 16].sum(-1).argmin() for p in shown]
        last = recording.seen[0, start + 19].argmax()
        assert squares == [*recording.observation[0, start : start + 20].argmax(-1), last]
    frames = draw_film(recording, episodes, pictures, every, 160)
    below = [frame[204:] for frame in frames]  # the curve grows to the right, and never shrinks
    dark = [(part < 90).all(-1).sum() for part in below]
    assert dark == sorted(dark) and dark[0] < dark[-1]


def test_the_file_is_whole_fits_and_is_reproduced(tmp_path):
    agent = GLA.from_pretrained(AGENTS / "grid")
    path = film("grid", agent, tmp_path / "a.webp", seed=2, interactions=200, size=120)
    again = film("grid", agent, tmp_path / "b.webp", seed=2, interactions=200, size=120)
    assert path.read_bytes() == again.read_bytes()
    about = read_json(tmp_path / "a.json")
    lived = episodes_table(meta_test("grid", agent, [2], 200))
    assert [row["return"] for row in about["episodes"]] == lived["return"].iloc[[0, -1]].tolist()
    assert about["film"]["bytes"] == path.stat().st_size < 1_000_000
    recording = record("grid", agent, [2], 200)
    small = write_film(recording, tmp_path / "c.webp", size=120, limit=about["film"]["bytes"] - 1)
    assert small.stat().st_size < path.stat().st_size
    with pytest.raises(ValueError, match="give a smaller size"):
        write_film(recording, tmp_path / "d.webp", size=120, limit=500)
    assert sorted(p.name for p in tmp_path.glob("*.webp")) == ["a.webp", "b.webp", "c.webp"]


def test_frames_go_where_quality_is_not_enough():
    frames = list(np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8))
    made = {"bytes": 10**9, "frames": 8}
    while made["frames"] == 8:
        _, made = encode(frames, 50, made["bytes"] - 1)
    assert made["frames"] == 4 and made["quality"] == 40


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"path": "film.gif"}, "name it .webp"),
        ({"frames": 1}, "frames is 1"),
        ({"size": 10}, "size is 10"),
        ({"interactions": 30}, "only 1 episode"),
        ({"task": "gird"}, "did you mean grid"),
    ],
)
def test_what_cannot_be_filmed_is_named(tmp_path, changes, message):
    given = {"task": "grid", "agent": "random", "path": tmp_path / "film.webp"} | changes
    with pytest.raises(ValueError, match=message):
        film(**given)
    assert not list(tmp_path.iterdir())


def test_a_task_without_pictures_is_refused_before_the_lifetime():
    class Blind(GridWorldEnv):
        def render(self):
            return None

    with pytest.raises(ValueError, match="render\\(\\) gives no RGB picture"):
        film(Blind, "random", "film.webp", interactions=10**9)


def test_an_environment_that_earns_something_else_cannot_be_filmed(tmp_path):
    paid = []

    class Capricious(GridWorldEnv):
        def step(self, action):
            observation, _, *rest = super().step(action)
            paid.append(0)
            return observation, float(len(paid)), *rest

    with pytest.raises(ValueError, match="only what happens again can be filmed"):
        film(Capricious, "random", tmp_path / "film.webp", interactions=60)


@pytest.mark.parametrize("backend", ["nothing", "glfw"])
def test_unusable_opengl_is_explained(backend, tmp_path):
    "The user's own setting is kept, and named; nothing was run or written."
    path = str(tmp_path / "film.webp")
    done = python(
        f"from gla_nb.films import film; film('ant', 'zero', {path!r})", MUJOCO_GL=backend
    )
    message = [line for line in done.stderr.splitlines() if line.startswith("ValueError")][-1]
    assert "apt-get install libegl1" in message and f"not MUJOCO_GL={backend}" in message
    assert "task 'ant' cannot be drawn" in message and not list(tmp_path.iterdir())


def test_the_message_without_any_setting(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    error = cannot_draw(TASKS["ant"], RuntimeError("no library\nmore"))
    assert "no library. MuJoCo" in str(error) and str(error).endswith("not without it")


@needs_egl
@pytest.mark.parametrize("order", [("ant", BALANCE), (BALANCE, "ant")])
def test_mujoco_is_drawn_without_a_display_whatever_was_imported_before(order):
    "Also in turns: what one library frees must not be what the other draws with."
    code = f"""
import numpy as np, mujoco
from gla_nb.films import drawn_env
from gla_nb.tasks import make_env
for name in {order!r}:
    make_env(name).close()
for name in 2 * {order!r}:
    with drawn_env(name) as env:
        for _ in range(3):
            picture = env.render().astype(float)
            print(name, picture.shape, picture.std(), np.abs(np.diff(picture, axis=0)).mean())
"""
    done = python(code)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0 and len(lines) == 12, done.stderr
    for line in lines:
        *_, spread, difference = line.split()
        assert "(320, 320, 3)" in line and float(spread) > 10 and float(difference) < 10, line


@needs_egl
def test_the_camera_follows_the_ant():
    done = python(
        "import numpy as np\n"
        "from gla_nb.films import drawn_env\n"
        "with drawn_env('ant') as env:\n"
        "    before, inner = env.render().astype(float), env.unwrapped\n"
        "    inner.data.qpos[0] += 1.3\n"
        "    inner.set_state(inner.data.qpos, inner.data.qvel)\n"
        "    after = env.render().astype(float)\n"
        "    warm = [(p[..., 0] - p[..., 2] > 40).nonzero()[1].mean() for p in (before, after)]\n"
        "    print(abs(warm[0] - warm[1]))\n"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20  # pixels; the ant itself moved by more than its own length


@pytest.mark.parametrize("name", ["ant", "grid"])
def test_the_films_of_the_repository_are_of_its_agents(name):
    path, about = FILMS / f"{name}.webp", read_json(FILMS / f"{name}.json")
    assert path.stat().st_size == about["film"]["bytes"] <= 1_000_000
    assert len(iio.imread(path, index=..., mode="RGB")) > 10
    assert about["agent"]["weights"] == weights_digest(GLA.from_pretrained(AGENTS / name))
    assert about["lifetime"]["seed"] == 0
    assert about["episodes"][1]["return"] > about["episodes"][0]["return"]


def test_the_notebook_of_widgets_runs_without_them_and_stays_clean(tmp_path):
    source = ROOT / "nbs" / "32_watch.ipynb"
    saved = nbformat.read(source, as_version=4)
    assert "widgets" not in saved.metadata and "widget-view" not in json.dumps(saved)
    output = tmp_path / "watch.ipynb"
    kept = {name: os.environ.pop(name, None) for name in ("JPY_SESSION_NAME", "IN_TEST")}
    try:
        papermill.execute_notebook(
            str(source), str(output), {"interactions": 60, "feedback": "hidden"}, progress_bar=False
        )
    finally:
        os.environ.update({name: value for name, value in kept.items() if value})
    ran = nbformat.read(output, as_version=4)
    assert "data:image/webp" in output.read_text() and "widgets" not in ran.metadata
