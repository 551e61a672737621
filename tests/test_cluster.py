"The same calls on a Dask cluster: what a killed worker was doing is done again, and all is equal."

import itertools
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from distributed import Client, LocalCluster
from joblib import delayed, parallel_config

from gla_nb.collect import CollectConfig, collect, run_folders, updates_done
from gla_nb.evaluate import MetaTest, run_meta_tests
from gla_nb.histories import validate
from gla_nb.stages import SendError, outputs_folder, run_parallel
from gla_nb.tasks import GridWorldEnv
from gla_nb.train import TrainConfig, train_all

ROOT = Path(__file__).resolve().parents[1]

SMALL = CollectConfig(
    runs=3, updates=16, streams=2, steps_per_update=20, batch_size=20, width=16, epochs=1
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


def kill_in_the_middle(processes, outputs, killed):
    "Kill the process whose run is the first to have some updates, and not yet most."
    deadline = time.monotonic() + 60
    while not killed and time.monotonic() < deadline:
        metas = outputs.glob("histories/*/run_*/meta.json")
        begun = [m.parent for m in metas if 2 <= updates_done(m.parent) < SMALL.updates // 2]
        for run, process in itertools.product(begun, processes):
            if not killed and str(run / "reward.npy") in open_files(process):
                os.kill(process, signal.SIGKILL)
                killed.append((run, updates_done(run)))
        time.sleep(0.01)


def open_files(process):
    "The paths of what a process has open."
    return [os.path.realpath(entry.path) for entry in os.scandir(f"/proc/{process}/fd")]


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
    expected, killed, processes = plain(collect, SMALL), [], client.run(os.getpid).values()
    killer = threading.Thread(target=kill_in_the_middle, args=(processes, outputs_folder(), killed))
    killer.start()
    folder = collect(SMALL)
    killer.join()
    ((run, updates),) = killed
    assert run.parent == folder and 2 <= updates < SMALL.updates
    client.wait_for_workers(2, timeout=60)
    assert len({*client.run(os.getpid).values()} - {*processes}) == 1
    assert folder.parents[1] == outputs_folder() and folder.name == expected.name
    assert_same(folder, expected)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert collect(SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == times


def test_an_environment_registered_in_a_notebook_is_known_there(client, plain, monkeypatch):
    own = type("Own", (GridWorldEnv,), {"__module__": "__main__"})  # as a notebook's classes are
    monkeypatch.setattr(gym.envs.registration, "registry", gym.registry.copy())
    gym.register("Own-v0", own)
    few = replace(SMALL, task="Own-v0", runs=2, updates=2)
    folder = collect(few)
    assert folder.parents[1] == outputs_folder()
    found, expected = arrays(folder), arrays(plain(collect, few))
    assert list(found) == list(expected) and len(found) >= 16
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_agents_and_lifetimes_are_the_same(client, plain, tmp_path, monkeypatch):
    "Folders are given as paths from a working folder that no worker has."
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path / "cluster"))
    monkeypatch.chdir(tmp_path)
    histories = plain(collect, replace(SMALL, runs=2, updates=4)).relative_to(tmp_path)
    config = TrainConfig(
        gap=1, tokens=24, segment_min=4, segment_max=8, layers=1, width=16, heads=1, batch=2,
        steps=2, evaluate_every=2,
    )  # fmt: skip
    configs = [config, replace(config, seed=1)]
    agents, expected = train_all(configs, histories), plain(train_all, configs, histories)
    for agent, other in zip(agents, expected, strict=True):
        assert agent.is_relative_to(tmp_path / "cluster") and agent != other
        weights = [(path / "model.safetensors").read_bytes() for path in (agent, other)]
        assert weights[0] == weights[1]
    relative = str(agents[1].relative_to(tmp_path))
    tests = [MetaTest("grid", "random", 8, 160), MetaTest("grid", relative, 8, 160)]
    tests += [replace(tests[1], feedback="yoked"), replace(tests[1], untrained=True)]
    found, expected = run_meta_tests(tests), plain(run_meta_tests, tests)
    for lifetimes, other in zip(found, expected, strict=True):
        assert lifetimes.agent == other.agent
        for name in ("seeds", "reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(lifetimes, name), getattr(other, name))
    assert len([*(tmp_path / "cluster").glob("meta_tests/*/lifetimes.npz")]) == len(tests)
    assert found[0].reward.any() and len({lifetimes.reward.tobytes() for lifetimes in found}) > 1


def test_what_cannot_be_sent_is_refused(client):
    with pytest.raises(SendError, match="lock"):
        run_parallel([delayed(id)(threading.Lock())])
