"""Compact exports: the rows of the run they came from, small, sound, whole or not at all."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from gymnasium import spaces

from gla_nb import histories
from gla_nb.collect import CollectConfig, collect
from gla_nb.histories import (
    HistoryError,
    HistoryWriter,
    episode_returns,
    export_bytes,
    export_histories,
    export_history,
    export_meta,
    meta_defects,
    open_history,
    plot_history,
    row_fields,
    update_interactions,
    update_returns,
    validate,
)

UPDATES, STREAMS, STEPS = 10, 3, 24
SIZES = {"updates": UPDATES, "streams": STREAMS, "steps_per_update": STEPS, "batch_size": 72}
KEPT = [(update, step) for update in (0, 4, 8) for step in range(7)]  # every=4, steps=7


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    "Stage folders of PPO runs: two in the grid world, one of the pendulum with few long episodes."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("stages")))
        grid = CollectConfig(task="grid", runs=2, **SIZES, epochs=6, width=8, learning_rate=2e-2)
        swing = CollectConfig(task="pendulum", normalise=True, runs=1, **SIZES, log_std=1.0)
        return {"grid": collect(grid, jobs=1), "pendulum": collect(swing, jobs=1)}


@pytest.fixture
def grid(stages):
    return open_history(stages["grid"] / "run_000")


def write(folder, rows=None, updates=4, appended=4, streams=2, steps=6, **space):
    "A history of two-dimensional Box actions in [-0.1, 1e5], whose fields can be replaced."
    rng, lead = np.random.default_rng(0), (streams, steps)
    box = spaces.Box(np.float32([-0.1, -1e5]), np.float32([0.1, 1e5]))
    seen = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    plan = {"streams": streams, "updates": updates, "steps_per_update": steps, "seed": 3}
    plan |= {"observation_space": seen, "action_space": box, "forward_reward": True} | space
    with HistoryWriter(folder, task="pendulum", **plan) as writer:
        for _ in range(appended):
            action = rng.normal(size=(*lead, 2)).astype(np.float32)
            ends = np.arange(steps) % 4 == np.full((streams, 1), 3)
            values = {"observation": rng.normal(size=(*lead, 3)), "action": action}
            values |= {"executed_action": action.clip(box.low, box.high), "truncated": ends}
            values |= {"reward": rng.normal(size=lead), "forward_reward": rng.normal(size=lead)}
            values |= {"final_observation": rng.normal(size=(*lead, 3)) * ends[..., None]}
            values |= {"distribution": rng.normal(size=(*lead, 4)), "terminated": ends & False}
            writer.append(values | (rows or {}))
    return open_history(folder)


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text()) | changes
    meta = {name: value for name, value in meta.items() if value != "absent"}
    (folder / "meta.json").write_text(json.dumps(meta))


def contents(folder):
    "Every file below `folder` by its relative path, locks aside."
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# What is kept


@pytest.mark.parametrize("task", ["grid", "pendulum"])
@pytest.mark.parametrize("streams", [None, 2])
def test_rows_are_those_of_the_run_within_rounding(stages, tmp_path, task, streams):
    source = open_history(stages[task] / "run_000")
    export = open_history(export_history(source, tmp_path / "e", 4, 7, streams))
    kept = streams or STREAMS
    assert (export.streams, export.rows, export.updates, export.every) == (kept, 21, 3, 4)
    for name in row_fields(source.meta):
        full, found = getattr(source, name), getattr(export, name)
        half = full.dtype == np.float32
        assert found.dtype == (np.float16 if half else full.dtype), name
        assert found.shape == (kept, 21, *full.shape[2:])
        for row, (update, step) in enumerate(KEPT):
            expected = full[:kept, update * STEPS + step]
            bound = 2.0**-11 * abs(expected) + 2.0**-25 if half else 0
            assert (abs(found[:, row].astype(np.float64) - expected) <= bound).all(), name
    np.testing.assert_array_equal(export.update[0], [update for update, _ in KEPT])


@pytest.mark.parametrize("task", ["grid", "pendulum"])
@pytest.mark.parametrize("every, steps", [(1, STEPS), (4, 7), (3, 1), (UPDATES, 24)])
def test_an_export_has_no_defect(stages, tmp_path, task, every, steps):
    source = open_history(stages[task] / "run_000")
    export_history(source, tmp_path / "e", every, steps)
    assert validate(tmp_path / "e") == []
    export = open_history(tmp_path / "e")
    assert export.updates == -(-UPDATES // every) and export.exported and not source.exported
    if task == "pendulum":  # some actions were clipped, and rows that end an episode were kept
        assert (export.action != export.executed_action).any()
    if every == 1:
        assert export.truncated.any()


def test_bounds_that_float16_cannot_hold_are_no_defect(tmp_path):
    source = write(tmp_path / "run")
    export = open_history(export_history(source, tmp_path / "e", 1, 6))
    assert validate(tmp_path / "e") == []
    assert (export.executed_action[..., 0] == np.float16(0.1)).any()
    assert (export.forward_reward == source.forward_reward.astype(np.float16)).all()


def test_small_probabilities_are_no_defect(tmp_path):
    "The rounding of log-probabilities is the worst where many actions are equally likely."
    number, rng = 1000, np.random.default_rng(0)
    logits = rng.normal(
        scale=rng.choice([0.0, 1e-3, 1.0, 4.0], size=(2, 6, 1)), size=(2, 6, number)
    )
    rows = {"distribution": logits - np.log(np.exp(logits).sum(-1, keepdims=True))}
    rows |= {"action": np.zeros((2, 6)), "executed_action": np.zeros((2, 6))}
    source = write(tmp_path / "run", rows, action_space=spaces.Discrete(number))
    export = open_history(export_history(source, tmp_path / "e", 2, 6))
    assert validate(tmp_path / "e") == []
    sums = np.exp(export.distribution.astype(np.float64)).sum(-1)
    assert abs(sums - 1).max() > 1e-4, "the float32 tolerance would do, so this tests nothing"


def test_meta_says_where_the_export_comes_from(grid, tmp_path):
    meta = open_history(export_history(grid, tmp_path / "e", 4, 7, streams=2)).meta
    sizes = {"updates": UPDATES, "streams": STREAMS, "steps_per_update": STEPS}
    assert meta["exported_from"] == sizes and meta["precision"] == "float16"
    same = "format version task observation action seed config versions forward_reward".split()
    assert {name: meta[name] for name in same} == {name: grid.meta[name] for name in same}


# Returns


def test_returns_are_those_of_the_full_history(grid, tmp_path):
    export = open_history(export_history(grid, tmp_path / "e", 4, 7))
    np.testing.assert_array_equal(update_returns(export), update_returns(grid)[[0, 4, 8]])
    assert len(set(update_returns(export))) > 1
    expected = np.array([1, 5, 9]) * STEPS * STREAMS
    np.testing.assert_array_equal(update_interactions(export), expected)
    np.testing.assert_array_equal(update_interactions(grid)[[0, 4, 8]], expected)
    with pytest.raises(ValueError, match="every 4 updates, in which no episode can be followed"):
        episode_returns(export)


def test_a_run_without_a_finished_episode_has_no_returns(tmp_path):
    never = {"truncated": np.zeros((2, 6), bool), "final_observation": np.zeros((2, 6, 3))}
    source = write(tmp_path / "run", never)
    for _ in range(2):  # the second time it is reused, although NaN is not equal to itself
        export = open_history(export_history(source, tmp_path / "e", 2, 6))
    assert np.isnan(update_returns(export)).all() and export.meta["returns"] == [None, None]


def test_an_export_is_drawn(grid, tmp_path):
    axis = plot_history(open_history(export_history(grid, tmp_path / "e", 4, 7)))
    (line,) = axis.lines
    np.testing.assert_array_equal(line.get_ydata(), update_returns(grid)[[0, 4, 8]])


# Exports of exports


def test_an_export_can_be_exported(grid, tmp_path):
    first = open_history(export_history(grid, tmp_path / "a", 2, 9))
    twice = export_history(first, tmp_path / "b", 4, 7, 2)
    assert contents(twice) == contents(export_history(grid, tmp_path / "c", 4, 7, 2))
    with pytest.raises(ValueError, match="every is 5.*export of every 2.*multiple of 2"):
        export_history(first, tmp_path / "d", 5, 7)


# Refusals

REFUSED = {
    "steps": ({"steps": STEPS + 1}, f"steps is 25: give 1 to {STEPS}"),
    "no steps": ({"steps": 0}, "steps is 0"),
    "every": ({"every": UPDATES + 1}, f"every is 11: give 1 to {UPDATES}"),
    "no updates": ({"every": 0}, "every is 0"),
    "half a step": ({"every": 2.5}, "every is 2.5"),
    "streams": ({"streams": STREAMS + 1}, f"streams is 4: give 1 to {STREAMS}"),
    "no streams": ({"streams": 0}, "streams is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_fit_are_refused(grid, stages, tmp_path, case):
    change, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected):
        export_history(grid, tmp_path / "e", **({"every": 4, "steps": 7} | change))
    with pytest.raises(ValueError, match=expected):
        export_histories(stages["grid"], tmp_path / "e", **({"every": 4, "steps": 7} | change))
    assert not (tmp_path / "e").exists()


def test_an_unfinished_history_is_refused(tmp_path):
    source = write(tmp_path / "stage" / "run_000", appended=2)
    with pytest.raises(HistoryError, match="has 2 of 4 updates"):
        export_history(source, tmp_path / "e", 1, 6)
    with pytest.raises(HistoryError, match="has 2 of 4 updates"):
        export_histories(tmp_path / "stage", tmp_path / "e", 1, 6)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("name", ["observation", "reward", "forward_reward", "distribution"])
@pytest.mark.parametrize("value", [65505.0, -1e6, np.inf, np.nan])
def test_numbers_beyond_float16_are_named(tmp_path, name, value):
    source = write(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^{name} of .*run holds .*float16 ends at 65504"):
        overwrite(source, name, (1, 14), value)  # update 2, step 2
        export_history(source, tmp_path / "e", 2, 6)
    assert not (tmp_path / "e").exists()
    export_history(source, tmp_path / "e", 2, 2)  # that row is not kept
    overwrite(source, name, (1, 14), 65504.0)
    export = open_history(export_history(source, tmp_path / "f", 2, 6))
    assert (getattr(export, name)[1, 8] == 65504).all()


def overwrite(history, name, index, value):
    np.load(history.folder / f"{name}.npy", mmap_mode="r+")[index] = value


def test_a_final_observation_that_would_vanish_is_named(tmp_path):
    source = write(tmp_path / "run")
    overwrite(source, "final_observation", (0, 3), 1e-9)
    assert validate(source.folder) == []
    with pytest.raises(HistoryError, match=r"final_observation is missing \(all zeros\) in 1 rows"):
        export_history(source, tmp_path / "e", 2, 6)
    assert not (tmp_path / "e").exists()


# Whole stage folders


def test_all_runs_of_a_stage_are_exported(stages, tmp_path):
    target = export_histories(stages["grid"], tmp_path / "e", 4, 7)
    names = sorted(path.name for path in target.iterdir())
    assert names == ["config.json", "run_000", "run_001"]
    for name in ("run_000", "run_001"):
        alone = export_history(open_history(stages["grid"] / name), tmp_path / name, 4, 7)
        assert contents(target / name) == contents(alone) and validate(target / name) == []
    config = json.loads((target / "config.json").read_text())
    assert config == json.loads((stages["grid"] / "config.json").read_text())


def test_a_folder_without_a_configuration_or_without_runs(stages, tmp_path):
    shutil.copytree(stages["grid"] / "run_001", tmp_path / "stage" / "run_001")
    target = export_histories(tmp_path / "stage", tmp_path / "e", 4, 7)
    assert [path.name for path in target.iterdir()] == ["run_001"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(HistoryError, match="empty holds no runs"):
        export_histories(tmp_path / "empty", tmp_path / "f", 4, 7)


def test_too_large_an_export_is_refused_with_nothing_written(stages, tmp_path):
    runs = [open_history(stages["grid"] / name) for name in ("run_000", "run_001")]
    mib = sum(export_bytes(export_meta(run, 4, 7)) for run in runs) / 2**20
    with pytest.raises(ValueError, match=f"2 runs takes {mib:.2f} MiB.*every=4 or lower steps=7"):
        export_histories(stages["grid"], tmp_path / "e", 4, 7, limit_mib=mib - 1e-6)
    assert list(tmp_path.iterdir()) == []
    target = export_histories(stages["grid"], tmp_path / "e", 4, 7, limit_mib=mib)
    files = contents(target)
    assert sum(len(files[name]) for name in files if "/" in name) == mib * 2**20


def test_another_history_in_the_way_is_left_alone(stages, grid, tmp_path):
    stage = shutil.copytree(stages["grid"], tmp_path / "stage")
    before = contents(stage)
    with pytest.raises(HistoryError, match="run_000 holds another history"):
        export_histories(stage, stage, 4, 7)
    with pytest.raises(HistoryError, match="holds another history"):
        export_history(grid, export_history(grid, tmp_path / "e", 4, 7), 4, 8)
    assert contents(stage) == before and open_history(tmp_path / "e").rows == 21


# Reuse, damage and kills


def test_a_complete_export_is_reused_and_a_damaged_one_replaced(grid, tmp_path):
    folder = export_history(grid, tmp_path / "e", 4, 7)
    before = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    export_history(grid, folder, 4, 7)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (folder / "reward.npy").write_bytes(before["reward.npy"][:-1])
    (folder / "update.npy").unlink()
    export_history(grid, folder, 4, 7)
    assert contents(folder) == before


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_kill_9_leaves_no_export(grid, tmp_path, before):
    "A forked writer is killed while it writes each of the arrays, and before `meta.json`."
    fields, save = len(row_fields(grid.meta)), np.save
    for last in range(fields + 1):
        folder, calls = tmp_path / str(last), []

        def dying(path, array, last=last, calls=calls):
            if len(calls) == last:
                path.write_bytes(b"half an array")
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(path)
            save(path, array)

        if before == "damaged":
            export_history(grid, folder, 4, 7)
            (folder / "observation.npy").write_bytes(b"")
        child = os.fork()
        if child == 0:
            try:
                histories.np.save = dying
                if last == fields:
                    histories.write_json = lambda path, value: dying(path, value)
                export_history(grid, folder, 4, 7)
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert len(list(folder.glob("[a-z]*.npy"))) == (fields if before == "damaged" else last)
        with pytest.raises(HistoryError, match="meta.json"):
            open_history(folder)
        (folder / "meta.json").unlink(missing_ok=True)  # half a file, where `whole` was bypassed
        export_history(grid, folder, 4, 7)
        assert validate(folder) == []
        assert len(contents(folder)) == fields + 1, "something was left behind"


# What meta.json says


def test_histories_without_the_new_keys_open(stages, grid):
    assert not {"every", "precision", "returns", "exported_from"} & grid.meta.keys()
    assert validate(stages["grid"] / "run_000") == []
    assert grid.every == 1 and grid.observation.dtype == np.float32
    assert len(episode_returns(grid).returns) > 1


META = {
    "every 0": ({"every": 0}, "says every: 0, where a number"),
    "every true": ({"every": True}, "says every: True"),
    "every text": ({"every": "4"}, "says every: '4'"),
    "every half": ({"every": 4.0}, "says every: 4.0"),
    "another every": ({"every": 2}, f"says 3 updates, every: 2 of {UPDATES}"),
    "no every": ({"every": "absent"}, "says 3 updates, every: 1"),
    "precision": ({"precision": "float64"}, "says precision: 'float64', where float32 or float16"),
    "precision list": ({"precision": ["float16"]}, "says precision:"),
    "precision null": ({"precision": None}, "says precision: None"),
    "no source": ({"exported_from": "absent"}, "says every: 4 and lacks exported_from"),
    "bad source": ({"exported_from": {"updates": 10}}, "does not give updates, streams"),
    "source list": ({"exported_from": [1]}, "does not give updates, streams"),
    "no returns": ({"returns": "absent"}, "lacks returns, one for each of its 3"),
    "few returns": ({"returns": [1.0]}, "lacks returns, one for each of its 3"),
    "text": ({"returns": [1.0, "2", 3.0]}, "has returns that are no numbers"),
}


@pytest.mark.parametrize("case", META)
def test_each_wrong_statement_of_an_export_is_named(grid, tmp_path, case):
    changes, expected = META[case]
    edit_meta(export_history(grid, tmp_path / "e", 4, 7), **changes)
    (defect,) = meta_defects(tmp_path / "e")
    assert expected in defect
    assert defect.endswith(f"{'collect' if case == 'no source' else 'export'} the history again")
    with pytest.raises(HistoryError, match="meta.json"):
        open_history(tmp_path / "e")


def test_the_arrays_tell_a_wrong_precision_and_a_wrong_stride(grid, tmp_path):
    edit_meta(export_history(grid, tmp_path / "a", 4, 7), precision="float32")
    assert "holds float16(3, 21, 9), not float32(3, 21, 9): export" in validate(tmp_path / "a")[0]
    edit_meta(export_history(grid, tmp_path / "b", 3, 7), precision="absent")
    assert "observation.npy holds float16" in validate(tmp_path / "b")[0]
    folder = export_history(grid, tmp_path / "c", 7, 7)  # updates 0 and 7; so would 8 be two
    edit_meta(folder, every=8)
    assert meta_defects(folder) == []
    expected = "update is not the number of the PPO update in 21 rows"
    assert validate(folder) == [f"{folder}: {expected}"]


DAMAGE = {  # in an export: task, array, index, value, what the validator says
    "not clipped": ("pendulum", "executed_action", (0, 0), -1.99, "not the sampled action clipped"),
    "outside": ("pendulum", "executed_action", (0, 0), 2.002, "executed_action is out of range"),
    "infinite": ("pendulum", "reward", (2, 20), np.inf, "reward holds 1 NaN or infinite"),
    "probabilities": ("grid", "distribution", (1, 4, 2), -0.5, "do not sum to 1 in 1 rows"),
    "order": ("grid", "update", (0, 7), 1, "update is not the number of the PPO update in 1"),
    "no end": ("grid", "final_observation", (0, 4, 1), 1.0, "not zero in 1 rows that do not end"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_each_wrong_value_of_an_export_is_named(stages, tmp_path, case):
    task, name, index, value, expected = DAMAGE[case]
    source = open_history(stages[task] / "run_000")
    export = open_history(export_history(source, tmp_path / "e", 4, 7))
    overwrite(export, name, index, value)
    assert any(expected in defect for defect in validate(tmp_path / "e"))
