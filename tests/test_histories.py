"""Learning histories across processes: kills, full disks, damage of every kind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from gymnasium import spaces

from gla_nb.histories import HistoryError, HistoryWriter, open_history, row_fields, validate

DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-1.0, 2.0, (2,), np.float32)
SEEN = spaces.Box(-np.inf, np.inf, (4,), np.float32)
STREAMS, STEPS = 3, 5


def rows_of(update, action_space):
    "One update whose every number follows from its update, so that a reader can check it."
    rng = np.random.default_rng(update)
    lead = (STREAMS, STEPS)
    rows = {"observation": rng.normal(size=(*lead, 4)), "reward": rng.normal(size=lead)}
    rows["terminated"] = np.zeros(lead, bool)
    rows["truncated"] = np.arange(STEPS) % 4 == np.full((STREAMS, 1), 3)
    rows["final_observation"] = (1 + rng.random((*lead, 4))) * rows["truncated"][..., None]
    if isinstance(action_space, spaces.Discrete):
        logits = rng.normal(size=(*lead, 3))
        rows["distribution"] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows["action"] = rows["executed_action"] = rng.integers(3, size=lead)
    else:
        rows["distribution"] = rng.normal(size=(*lead, 4))
        rows["action"] = rng.normal(scale=2, size=(*lead, 2)).astype(np.float32)
        rows["executed_action"] = rows["action"].clip(action_space.low, action_space.high)
    return rows


def new_writer(folder, action_space=DISCRETE, updates=4):
    space = {"observation_space": SEEN, "action_space": action_space}
    sizes = {"streams": STREAMS, "updates": updates, "steps_per_update": STEPS}
    return HistoryWriter(folder, task="grid", seed=1, **space, **sizes)


def write(folder, action_space=DISCRETE, updates=4, appended=4):
    with new_writer(folder, action_space, updates) as writer:
        for update in range(appended):
            writer.append(rows_of(update, action_space))
    return folder


def check_committed(folder, action_space=DISCRETE):
    "Every committed row is the one that was appended; returns the number of updates."
    history = open_history(folder)
    for update in range(history.updates):
        for name, expected in rows_of(update, action_space).items():
            found = getattr(history, name)[:, update * STEPS : (update + 1) * STEPS]
            np.testing.assert_array_equal(found, expected.astype(found.dtype))
    assert validate(folder) == []
    return history.updates


@pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "box"])
def test_written_rows_come_back(tmp_path, action_space):
    assert check_committed(write(tmp_path, action_space), action_space) == 4
    history = open_history(tmp_path)
    assert history.meta["complete"] and history.rows == 20
    assert history.discrete == isinstance(action_space, spaces.Discrete)
    np.testing.assert_array_equal(history.update[2], np.repeat(np.arange(4), STEPS))


def test_a_growing_history_can_be_read(tmp_path):
    with new_writer(tmp_path) as writer:
        assert check_committed(tmp_path) == 0
        writer.append(rows_of(0, DISCRETE))
        earlier = open_history(tmp_path)
        writer.append(rows_of(1, DISCRETE))
        assert (earlier.updates, check_committed(tmp_path)) == (1, 2)
        assert earlier.reward.shape == (STREAMS, STEPS)


def test_a_new_history_replaces_what_was_there(tmp_path):
    write(tmp_path)
    write(tmp_path, appended=1)
    assert check_committed(tmp_path) == 1
    assert not np.load(tmp_path / "reward.npy")[:, STEPS:].any()


def test_kill_9_leaves_every_committed_row(tmp_path):
    "A forked writer that never waits is killed ten times, at random moments."
    rng, found = np.random.default_rng(0), []
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        child = os.fork()
        if child == 0:
            try:
                write(folder, updates=100_000, appended=100_000)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.01, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if (folder / "meta.json").exists():
            found.append(check_committed(folder))
        else:  # killed before the first commit: there is no history, and the reader says so
            assert "missing" in validate(folder)[0]
        shutil.rmtree(folder, ignore_errors=True)
    assert max(found) > 10 and len(set(found)) > 3


@pytest.mark.parametrize("limit", ["create", "append"])
def test_no_space_left_keeps_what_was_committed(tmp_path, limit):
    "The kernel refuses to let files grow: the first time at their creation, then in the middle."
    program = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from test_histories import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, limit = sys.argv[2:]
if limit == "create":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    write(folder)
with new_writer(folder) as writer:
    writer.append(rows_of(0, DISCRETE))
    writer.append(rows_of(1, DISCRETE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    writer.append(rows_of(2, DISCRETE))
"""
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", program, here, str(tmp_path / "run"), limit]
    answer = subprocess.run(command, capture_output=True, text=True)
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("OSError: [Errno 27] cannot write") and ".npy" in last
    if limit == "append":
        assert check_committed(tmp_path / "run") == 2


def test_dev_full_is_an_error_with_advice(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with new_writer(tmp_path) as writer:
        writer.append(rows_of(0, DISCRETE))
        writer.files["reward"].file.close()
        writer.files["reward"].file = open("/dev/full", "r+b", buffering=0)
        with pytest.raises(OSError, match=r"reward\.npy: no space is left on the device: free"):
            writer.append(rows_of(1, DISCRETE))
    assert check_committed(tmp_path) == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file/run: a part of the path is a file"):
        new_writer(tmp_path / "file" / "run")


def overwrite(folder, name, index, value):
    np.load(folder / f"{name}.npy", mmap_mode="r+")[index] = value


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize(
    "name",
    list(row_fields({"observation": {"shape": [4]}, "action": {"kind": "Discrete", "n": 3}})),
)
@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "empty", "header", "foreign", "shape", "type"]
)
def test_each_damaged_file_is_named(tmp_path, name, damage):
    path = write(tmp_path) / f"{name}.npy"
    content, array = path.read_bytes(), np.load(path)
    if damage == "missing":
        path.unlink()
    elif damage == "shape":
        np.save(path, array[:, :-1])
    elif damage == "type":
        np.save(path, array.astype(">f8"))
    elif damage == "foreign":
        np.savez(tmp_path / "other.npz", array)
        os.replace(tmp_path / "other.npz", path)
    else:
        keep = {"truncated": len(content) - 1, "empty": 0, "header": 30}[damage]
        path.write_bytes(content[:keep])
    defects = validate(tmp_path)
    assert len(defects) == 1 and str(path) in defects[0]
    with pytest.raises(HistoryError, match=f"{name}.npy .*collect the history again"):
        open_history(tmp_path)


META = {
    "foreign": ({"format": "something else"}, "does not say format"),
    "older version": ({"version": 0}, "has version 0, this library reads 1.*read it with gla_nb"),
    "no streams": ({"streams": None}, "lacks streams"),
    "no spaces": ({"action": {"kind": "Box"}}, "does not describe the spaces"),
    "too many rows": ({"rows": 21}, "says 21 rows in 4 of 4 updates"),
    "too many updates": ({"updates_done": 5, "rows": 25}, "says 25 rows in 5 of 4 updates"),
    "complete too early": ({"updates_done": 3, "rows": 15}, "says complete: True after 3 of 4"),
    "other shape": ({"observation": {"shape": [7]}}, r"observation.npy holds float32\(3, 20, 4\)"),
}


@pytest.mark.parametrize("damage", META)
def test_each_wrong_statement_of_meta_is_named(tmp_path, damage):
    changes, expected = META[damage]
    edit_meta(write(tmp_path), **changes)
    with pytest.raises(HistoryError, match=expected):
        open_history(tmp_path)
    assert validate(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"'])
def test_meta_that_is_no_description_is_named(tmp_path, text):
    (write(tmp_path) / "meta.json").write_text(text)
    with pytest.raises(HistoryError, match="meta.json"):
        open_history(tmp_path)


def test_no_history_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(HistoryError, match="there is no learning history here"):
            open_history(folder)


VALUES = {  # space, array, index, value, what the validator says
    "observation": (BOX, "observation", (1, 2, 3), np.nan, "observation holds 1 NaN"),
    "reward": (BOX, "reward", (2, 19), -np.inf, "reward holds 1 NaN or infinite"),
    "action": (BOX, "action", (0, 0, 1), np.nan, "action holds 1 NaN"),
    "final value": (BOX, "final_observation", (0, 3, 0), np.nan, "final_observation holds 1 NaN"),
    "mean": (BOX, "distribution", (0, 3, 0), np.inf, "distribution holds 1 NaN"),
    "not clipped": (BOX, "executed_action", (0, 0), 1.5, "not the sampled action clipped"),
    "outside the box": (BOX, "executed_action", (0, 0, 0), 2.5, "executed_action is out of range"),
    "action number": (DISCRETE, "action", (1, 1), 3, "action is out of range"),
    "negative": (DISCRETE, "executed_action", (1, 1), -1, "executed_action is out of range"),
    "probabilities": (DISCRETE, "distribution", (1, 4, 2), 0.5, "do not sum to 1 in 1 rows"),
    "no final": (DISCRETE, "final_observation", (0, 3), 0.0, r"missing \(all zeros\) in 1 rows"),
    "no end": (DISCRETE, "final_observation", (0, 4, 1), 1.0, "not zero in 1 rows that do not end"),
    "order": (DISCRETE, "update", (0, 7), 0, "update is not the number of the PPO update in 1"),
    "episode": (DISCRETE, "truncated", (0, 3), False, "not zero in 1 rows that do not end"),
}


@pytest.mark.parametrize("damage", VALUES)
def test_each_wrong_value_is_named(tmp_path, damage):
    action_space, name, index, value, expected = VALUES[damage]
    overwrite(write(tmp_path, action_space), name, index, value)
    assert any(re.search(expected, defect) for defect in validate(tmp_path))
    open_history(tmp_path)  # the files themselves are sound


def test_all_defects_are_named_at_once(tmp_path):
    overwrite(write(tmp_path), "reward", (0, 0), np.nan)
    overwrite(tmp_path, "update", (0, 0), 3)
    overwrite(tmp_path, "distribution", (0, 0), 0.0)
    assert len(validate(tmp_path)) == 3
    for name in ("reward", "update"):
        (tmp_path / f"{name}.npy").unlink()
    assert len(validate(tmp_path)) == 2


def test_rows_that_were_never_committed_are_not_judged(tmp_path):
    overwrite(write(tmp_path, appended=2), "reward", (0, 12), np.nan)
    assert validate(tmp_path) == [] and open_history(tmp_path).rows == 10


def test_no_pickle_is_read(tmp_path):
    path = write(tmp_path) / "reward.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(HistoryError, match="reward.npy is truncated or no array"):
        open_history(tmp_path)
