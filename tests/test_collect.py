"""Collection across processes: what PPO did is what is recorded, whatever happens on the way."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from gla_nb import collect as collection
from gla_nb.collect import (
    CollectConfig,
    HistoryCallback,
    collect,
    collect_run,
    histories_folder,
    learning_curves,
    make_ppo,
    own_generators,
    run_folders,
    run_seeds,
)
from gla_nb.histories import (
    HistoryError,
    HistoryWriter,
    open_history,
    update_returns,
    validate,
)
from gla_nb.stages import locked, read_json
from gla_nb.tasks import (
    TASKS,
    GridWorldEnv,
    Task,
    final_observations,
    find_task,
    make_vector_env,
)
from gla_nb.train import find_experiment

torch.set_num_threads(1)
SMALL = {"streams": 3, "steps_per_update": 20, "batch_size": 30, "epochs": 1, "width": 8}
TINY = CollectConfig(runs=4, updates=5, **SMALL)


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("GLA_NB_QUIET", "1")
    # Episodes of 7 steps do not fit into updates of 20: they cross the border of updates.
    monkeypatch.setitem(TASKS, "swing", Task("swing", "Pendulum-v1", {"max_episode_steps": 7}))
    monkeypatch.setitem(TASKS, "short", Task("short", "gla_nb/GridWorld-v0", {"horizon": 7}))
    return tmp_path


def files(folder):
    "The content of every file of every run, by name; the lock is empty."
    paths = sorted(path for path in folder.glob("run_*/*") if path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "The files of an uninterrupted collection of TINY in this process."
    before = {name: os.environ.get(name) for name in ("GLA_NB_OUTPUTS", "GLA_NB_QUIET")}
    os.environ |= {"GLA_NB_OUTPUTS": str(tmp_path_factory.mktemp("reference")), "GLA_NB_QUIET": "1"}
    try:
        return files(collect(TINY, jobs=1))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Acting(BaseCallback):
    "Keeps the log-probabilities of the actions by Stable-Baselines3 itself, when they are drawn."

    def __init__(self):
        super().__init__()
        self.log_probabilities = []

    def _init_callback(self):
        policy = self.model.policy
        act = policy.act

        def spied(observation):
            action = act(observation)
            self.log_probabilities.append(policy.evaluate_actions(observation, action)[1].numpy())
            return action

        policy.act = spied

    def _on_step(self):
        return True


def log_probability(history):
    "Of the sampled actions under the recorded distributions, in float64."
    distribution = history.distribution.astype(float)
    if history.discrete:
        return np.take_along_axis(distribution, history.action[..., None], -1)[..., 0]
    mean, log_std = np.split(distribution, 2, -1)
    standard = (history.action - mean) / np.exp(log_std)
    return (-0.5 * standard**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


TASK_SETTINGS = [("short", False), ("CartPole-v1", False), ("swing", True), ("swing", False)]


@pytest.mark.parametrize(("task", "normalise"), TASK_SETTINGS)
def test_recorded_distribution_is_the_one_that_acted(tmp_path, task, normalise):
    config = CollectConfig(task=task, updates=4, normalise=normalise, **SMALL)
    with own_generators(3):
        model, recorder = make_ppo(config, 0)
        space = {"observation_space": recorder.observation_space}
        space |= {"action_space": recorder.action_space, "task": task, "seed": 0}
        sizes = {"streams": 3, "updates": 4, "steps_per_update": 20}
        with HistoryWriter(tmp_path / "run", **space, **sizes) as writer:
            acting = Acting()
            model.learn(4 * 60, [HistoryCallback(recorder, writer), acting])
    history = open_history(tmp_path / "run")
    expected = np.stack(acting.log_probabilities, axis=1)
    np.testing.assert_allclose(log_probability(history), expected, rtol=0, atol=1e-5)
    assert validate(tmp_path / "run") == []
    assert len({part.tobytes() for part in np.split(expected, 4, axis=1)}) == 4  # PPO has moved
    if not history.discrete:
        assert (history.action != history.executed_action).mean() > 0.01  # some were clipped


@pytest.mark.parametrize(("task", "normalise"), TASK_SETTINGS)
def test_a_replay_of_the_executed_actions_gives_the_recorded_rows(tmp_path, task, normalise):
    config = CollectConfig(task=task, updates=3, normalise=normalise, **SMALL)
    collect_run(config, 1, tmp_path / "run")
    history = open_history(tmp_path / "run")
    envs = make_vector_env(task, 3)
    observation, _ = envs.reset(seed=run_seeds(config, 1)[1:])
    for row in range(history.rows):
        np.testing.assert_array_equal(history.observation[:, row], observation)
        actions = np.array(history.executed_action[:, row])
        observation, reward, terminated, truncated, infos = envs.step(actions)
        # Stable-Baselines3 adds the value of the last state to rewards at time limits, in place.
        np.testing.assert_array_equal(history.reward[:, row], reward.astype(np.float32))
        np.testing.assert_array_equal(history.terminated[:, row], terminated)
        np.testing.assert_array_equal(history.truncated[:, row], truncated)
        final = final_observations(observation, infos)
        np.testing.assert_array_equal(history.final_observation[:, row], final)
    ends = history.terminated if task == "CartPole-v1" else history.truncated
    assert ends.sum() >= 3


UPDATES = {
    "ant": {"normalise": True, "log_std": -0.7, "entropy": 0.01, "batch_size": 128},
    "short": {"entropy": 0.05, "batch_size": 100},
    "swing": {"batch_size": 73, "clip": 0.02, "max_gradient": 0.05},  # the last minibatch has 1 row
}


@pytest.mark.parametrize("task", UPDATES)
def test_an_update_is_that_of_stable_baselines(monkeypatch, task):
    "The same rollout and minibatches; after ten epochs the weights differ by rounding alone."
    warnings.filterwarnings("ignore", "You have specified a mini-batch size")
    sizes = {"updates": 2, "streams": 8, "steps_per_update": 64, "epochs": 10}
    config = CollectConfig(task, **sizes | UPDATES[task])
    ours = one_update(config)
    monkeypatch.setattr(collection, "QuickPPO", PPO)
    monkeypatch.setattr(collection, "QuickPolicy", "MlpPolicy")
    theirs = one_update(config)
    for name in ("begun", "observations", "actions", "episode_starts", "random"):
        assert np.array_equal(ours[name], theirs[name]), name
    for name in ("rewards", "values", "log_probs", "advantages", "weights"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)
    assert np.abs(ours["weights"] - ours["begun"]).max() > 1e-3
    assert ours["kind"] != theirs["kind"]


def one_update(config):
    "The weights before and after, what the buffer holds, and the next random numbers."
    with own_generators(3):
        model = make_ppo(config, 0)[0]
        weights = [vector(model.policy)]
        model.learn(config.streams * config.steps_per_update, log_interval=None)
        draws = [*torch.rand(3).tolist(), np.random.rand()]
    names = ("observations", "actions", "episode_starts", "rewards", "values", "log_probs")
    buffer = model.rollout_buffer
    columns = {name: getattr(buffer, name) for name in (*names, "advantages")}
    for name, column in columns.items():
        if column.shape[:2] == (config.steps_per_update, config.streams):
            columns[name] = buffer.swap_and_flatten(column)  # as training leaves the others
    about = {"begun": weights[0], "weights": vector(model.policy), "random": draws}
    return columns | about | {"kind": type(model)}


def vector(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach().numpy().copy()


def test_weights_that_diverge_cost_one_update(tmp_path, monkeypatch):
    real = collection.QuickPPO.loss

    def loss(model, rows, clip):
        return real(model, rows, clip) * (np.nan if model.num_timesteps == 3 * 60 else 1)

    monkeypatch.setattr(collection.QuickPPO, "loss", loss)
    with pytest.raises(ValueError, match="PPO diverged in update 2: lower its learning rate"):
        collect_run(CollectConfig("short", updates=5, **SMALL), 0, tmp_path / "run")
    assert open_history(tmp_path / "run").updates == 3 and validate(tmp_path / "run") == []


def test_rewards_of_the_grid_are_those_of_the_grid():
    folder = collect(CollectConfig(runs=1, updates=3, **SMALL), jobs=1)
    assert set(np.unique(open_history(folder / "run_000").reward)) <= {0.0, 1.0}


def test_same_seed_same_files_whatever_the_global_state(reference):
    random.seed(123), np.random.seed(123), torch.manual_seed(123)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    folder = collect(TINY, jobs=1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert files(folder) == reference and len(reference) == 4 * 10
    assert state == after


def test_seeds_runs_and_streams_differ(reference):
    actions = [reference[f"run_{run:03d}/action.npy"] for run in range(4)]
    for changes in ({"seed": 1}, {"stream": "validation"}):
        folder = collect(CollectConfig(runs=1, updates=5, **SMALL, **changes), jobs=1)
        actions.append((folder / "run_000" / "action.npy").read_bytes())
    assert len(set(actions)) == 6
    history = open_history(folder / "run_000")
    assert len({history.action[stream].tobytes() for stream in range(3)}) == 3


def fork(function):
    "Run `function` in a fork of this warm process and return its process number."
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_killed_ten_times_then_equal_to_the_uninterrupted(tmp_path, reference):
    rng, kills, interrupted = np.random.default_rng(1), 0, 0
    while kills < 10:
        child = fork(lambda: collect(TINY, jobs=1))
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            kills += 1
        else:  # it was finished: start again from nothing
            folder = next((tmp_path / "histories").iterdir())
            assert files(folder) == reference
            folder.rename(tmp_path / f"finished_{kills}_{time.monotonic_ns()}")
        for meta in tmp_path.glob("histories/*/run_*/meta.json"):
            assert validate(meta.parent) == []  # committed rows are intact at any time
            interrupted += not read_json(meta)["complete"]
    assert interrupted > 0
    assert files(collect(TINY, jobs=1)) == reference


def test_finished_runs_are_reused_and_partial_ones_start_again(reference):
    folder = collect(TINY, jobs=1)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("run_*/*.npy")}
    meta = json.loads((folder / "run_002" / "meta.json").read_text())
    meta |= {"updates_done": 2, "rows": 40, "complete": False}
    (folder / "run_002" / "meta.json").write_text(json.dumps(meta))
    assert files(collect(TINY, jobs=1)) == reference
    changed = {path.parent.name for path, then in times.items() if path.stat().st_mtime_ns != then}
    assert changed == {"run_002"}


def test_processes_give_the_same_files_even_after_their_parent_was_killed(tmp_path, reference):
    "Two jobs, killed as soon as they write; the next start goes on beside the orphaned workers."
    program = "from gla_nb.collect import *; collect(CollectConfig(**eval(input())), jobs=2)"
    command = [sys.executable, "-c", program]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    print(asdict(TINY), file=parent.stdin, flush=True)
    while not list(tmp_path.glob("histories/*/run_*/meta.json")):
        assert parent.poll() is None
        time.sleep(0.005)
    parent.kill()
    parent.wait()
    assert len(list(tmp_path.glob("histories/*/run_*/update.npy"))) < TINY.runs  # in the middle
    assert files(collect(TINY, jobs=1)) == reference


def test_a_run_that_another_process_still_writes_is_waited_for(tmp_path, monkeypatch):
    looked = threading.Event()  # at the folder, the first thing after the lock
    monkeypatch.setattr(collection, "is_complete", lambda folder: looked.set() or True)
    waiting = threading.Thread(target=collect_run, args=(TINY, 0, tmp_path / "run"))
    with locked(tmp_path / "run"):
        waiting.start()
        assert not looked.wait(0.3)
    assert looked.wait(10)
    waiting.join()


class SpoiltEnv(GridWorldEnv):
    "A grid world that gives NaN at the `at`-th step of all steps since it was made."

    def __init__(self, what="reward", at=50, **kwargs):
        super().__init__(**kwargs)
        self.what, self.at, self.total = what, at, 0

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total == self.at and SpoiltEnv.spoilt:
            reward = float("nan") if self.what == "reward" else reward
            observation = observation * np.nan if self.what == "observation" else observation
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("what", "at"), [("reward", 45), ("observation", 45), ("observation", 60), ("reward", 60)]
)
def test_nan_from_an_environment_is_named_and_costs_one_update(tmp_path, monkeypatch, what, at):
    "Step 60 ends an episode, so that the NaN is in its final observation alone."
    monkeypatch.setattr(SpoiltEnv, "spoilt", True, raising=False)
    monkeypatch.setitem(
        gym.registry, "Spoilt-v0", gym.envs.registration.EnvSpec("Spoilt-v0", SpoiltEnv)
    )
    monkeypatch.setitem(TASKS, "spoilt", Task("spoilt", "Spoilt-v0", {"what": what, "at": at}))
    config = CollectConfig(task="spoilt", runs=1, updates=4, **SMALL)
    expected = rf"task 'spoilt' gave {what} .*nan.* in stream 0, update 2"
    with pytest.raises(ValueError, match=expected):
        collect(config, jobs=1)
    run = next(tmp_path.glob("histories/*/run_*"))
    assert open_history(run).updates == 2 and validate(run) == []
    monkeypatch.setattr(SpoiltEnv, "spoilt", False)  # repaired: the run starts again
    assert open_history(collect(config, jobs=1) / "run_000").updates == 4


def test_full_disk_costs_one_run_and_says_what_to_do(tmp_path, monkeypatch, reference):
    real, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(1)
        if len(calls) > 9 * 3 * 5 + 40:  # in the second update of the second run
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="no space is left on the device: free some") as error:
            collect(TINY, jobs=1)
    assert error.value.errno == errno.ENOSPC
    runs = run_folders(next(tmp_path.glob("histories/*")))
    assert [open_history(run).updates for run in runs] == [5, 1]
    assert files(collect(TINY, jobs=1)) == reference


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path / "file" / "outputs"))
    with pytest.raises(OSError, match="cannot write .*a part of the path is a file"):
        collect(TINY, jobs=1)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "older"])
def test_damaged_history_in_the_way_is_named_and_kept(damage):
    config = CollectConfig(runs=1, updates=1, **SMALL)
    run = collect(config, jobs=1) / "run_000"
    meta = json.loads((run / "meta.json").read_text())
    if damage == "truncated":
        os.truncate(run / "distribution.npy", 300)
    changes = {"foreign": {"format": "x"}, "older": {"version": 0}}.get(damage, {})
    (run / "meta.json").write_text(json.dumps(meta | changes))
    before = files(run.parent)
    name = "distribution.npy" if damage == "truncated" else "meta.json"
    with pytest.raises(HistoryError, match=rf"run_000/{name}"):
        collect(config, jobs=1)
    assert files(run.parent) == before


@pytest.mark.parametrize("changes", [{"task": "gird"}, {"task": "Blackjack-v1"}])
def test_wrong_tasks_are_refused_before_anything_is_written(tmp_path, changes):
    with pytest.raises(ValueError, match="unknown task 'gird'|unsupported observation space"):
        collect(CollectConfig(**changes))
    assert list(tmp_path.iterdir()) == []


def test_learning_curves_are_those_of_the_histories():
    folder = collect(CollectConfig(runs=2, updates=3, **SMALL), jobs=1)
    table = learning_curves(folder)
    for run, path in enumerate(run_folders(folder)):
        part = table[table["run"] == run]
        np.testing.assert_array_equal(part["return"], update_returns(open_history(path)))
        np.testing.assert_array_equal(part["interactions"], [60, 120, 180])


def test_ppo_learns_the_grid_gradually(tmp_path):
    "The defaults reach 95 % of the optimum, but not at once: the gaps need the way there."
    config = CollectConfig()
    collect_run(config, 0, tmp_path / "run")
    returns = update_returns(open_history(tmp_path / "run"))
    assert returns[-3:].mean() >= 0.95 * 17
    assert returns[:3].mean() < 4 and returns[10] < 0.8 * 17


OWN = """
"A user's own script: everything below is of `__main__`, which no worker process can import."
import gymnasium as gym
import numpy as np
from gla_nb import tasks
from gla_nb.collect import collect, collect_all, run_folders
from gla_nb.histories import open_history, validate
from gla_nb.stages import run_parallel
from joblib import delayed

PAID = 1.0  # a variable that a method uses


class Line(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, goal=1.0):
        self.goal = goal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0.0, 0
        return np.float32([self.place]), {}

    def step(self, action):
        self.place, self.steps = self.place + 0.1 * float(action[0]), self.steps + 1
        reward = PAID * (self.goal - abs(self.place - self.goal))
        return np.float32([self.place]), reward, False, self.steps == 10, {}


gym.register("Line-v0", Line)
gym.register("LineByName-v0", "__main__:Line")
few = dict(runs=2, updates=2, streams=2, steps_per_update=10, batch_size=10, epochs=1, width=8)
ways = ["Line-v0", "LineByName-v0", Line, Line(2.0), lambda: Line(3.0)]
ways += [tasks.Task("far", "Line-v0", {"goal": 4.0})]
folders = collect_all(ways, jobs=2, **few)
assert len(set(folders)) == len(ways), folders
for folder in folders:
    assert [validate(run) for run in run_folders(folder)] == [[], []], folder
names = [open_history(run_folders(folder)[0]).meta["task"]["name"] for folder in folders]
assert names == ["Line-v0", "LineByName-v0", "Line", "Line", "Line", "far"], names
assert collect_all(ways, **few) == folders

there = [tasks.registering("Line-v0", tasks.code_hash)] * 2
here = tasks.code_hash(tasks.find_task("Line-v0"))
assert run_parallel([delayed(call)(tasks.find_task("Line-v0")) for call in there], 2) == [here] * 2

PAID = 2.0
assert collect("Line-v0", jobs=1, **few) not in folders
PAID = 1.0
assert collect("Line-v0", **few) == folders[0]
Line.observation_space = gym.spaces.Box(-8, 9, (1,), np.float32)
assert not set(collect_all(ways, jobs=1, **few)) & set(folders)
print("all well")
"""


def test_environments_of_a_script_go_to_other_processes_and_never_meet_old_histories(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    answer = subprocess.run(
        [sys.executable, str(tmp_path / "own.py")], capture_output=True, text=True, cwd=tmp_path
    )
    assert answer.stdout.strip() == "all well", answer.stderr


def test_histories_of_the_table_of_tasks_keep_their_folders():
    "The README names the first one; a new hash would collect everything again."
    row = find_experiment("ant", "cpu").collect
    folders = [
        row,
        replace(row, task="ant_backward"),
        CollectConfig(),
        CollectConfig("CartPole-v1"),
    ]
    names = [histories_folder(replace(c, task=find_task(c.task))).name for c in folders]
    known = ["ant-03a25147fe", "ant_backward-cb5f69518e", "grid-6ff01c3f3a"]
    assert names == [*known, "CartPole-v1-c612644a10"]


class Uncopied(GridWorldEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lock = threading.Lock()


def test_an_object_that_cannot_be_copied_asks_for_a_function():
    with pytest.raises(ValueError, match="Uncopied cannot be copied .*lock.* pass a function that"):
        collect(Uncopied(), runs=1)
    assert collect(lambda: Uncopied(), runs=1, updates=1, **SMALL).exists()
