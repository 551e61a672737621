"The same calls on a Dask cluster: what a killed worker was doing is done again, and all is equal."

import os
import signal
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
from distributed import Client, LocalCluster
from joblib import parallel_config

from gla_nb.collect import CollectConfig, collect, collect_all, run_folders, updates_done
from gla_nb.evaluate import MetaTest, run_meta_tests
from gla_nb.histories import validate
from gla_nb.stages import outputs_folder
from gla_nb.tasks import GridWorldEnv

SMALL = CollectConfig(
    runs=5, updates=12, streams=4, steps_per_update=40, batch_size=80, width=16, epochs=2
)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    "Two processes whose environment names an outputs folder that is not ours."
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(elsewhere))
        patch.chdir(elsewhere)
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1",
            dashboard_address=None, local_directory=str(elsewhere / "dask"),
        )  # fmt: skip
    with cluster, Client(cluster) as client, parallel_config(backend="dask"):
        yield client
    assert [path.name for path in elsewhere.iterdir() if path.name != "dask"] == []


def arrays(folder):
    "Every array of every run by its place in the folder."
    return {f"{p.parent.name}/{p.name}": np.load(p) for p in sorted(folder.glob("run_*/*.npy"))}


def assert_same(folder, other):
    "The same runs, whole, with equal arrays."
    found, expected = arrays(folder), arrays(other)
    assert list(found) == list(expected) and len(found) >= 8 * SMALL.runs
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    for run in run_folders(folder):
        assert validate(run) == [] and updates_done(run) == SMALL.updates
        assert not [path for path in run.glob(".*") if path.name != ".lock"]


def by_process(dask_worker):
    return os.getpid()


def what_it_does(dask_worker):
    return [key for key, task in dask_worker.state.tasks.items() if task.state == "executing"]


def kill_in_the_middle(client, outputs, killed):
    "Kill the worker whose run is the first to have some updates, and not yet all."
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metas = outputs.glob("histories/*/run_*/meta.json")
        begun = [m.parent for m in metas if 2 <= updates_done(m.parent) < SMALL.updates - 4]
        for run in begun:
            for process in client.run(by_process).values():
                held = {os.readlink(f) for f in open_files(process)}
                if str(run / "reward.npy") in held:
                    os.kill(process, signal.SIGKILL)
                    killed.append((process, run, updates_done(run)))
                    return
        time.sleep(0.01)


def open_files(process):
    return list(os.scandir(f"/proc/{process}/fd"))


@pytest.fixture
def plain(tmp_path, monkeypatch):
    "Call a function without the cluster, in an outputs folder of its own."

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch, parallel_config(backend="loky"):
            patch.setenv("GLA_NB_OUTPUTS", str(tmp_path / "plain"))
            return function(*args, jobs=1, **kwargs)

    return call


def test_a_killed_worker_loses_nothing(client, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path / "cluster"))
    expected, before, killed = plain(collect, SMALL), client.run(by_process), []
    killer = threading.Thread(target=kill_in_the_middle, args=(client, outputs_folder(), killed))
    killer.start()
    folder = collect(SMALL)
    killer.join()
    ((process, run, updates),) = killed
    assert process in before.values() and 2 <= updates < SMALL.updates
    assert folder.parents[1] == outputs_folder() and folder.name == expected.name
    assert_same(folder, expected)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert collect(SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == times
