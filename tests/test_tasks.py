"""Tasks across modules and processes: vectorisation, spaces of real suites, a light import."""

import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import SyncVectorEnv

from gla_nb.tasks import (
    TASKS,
    GridWorldEnv,
    GridWorldVectorEnv,
    Task,
    final_observations,
    find_task,
    make_env,
    make_vector_env,
)


def equal_infos(ours, theirs):
    "The same keys, masks and values; object arrays hold arrays, which == cannot compare."
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, dict):
            equal_infos(ours[key], value)
            continue
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape
        for one, other in zip(ours[key], value, strict=True):
            assert data_equivalence(one, other, exact=True)


@pytest.mark.parametrize(
    ("number", "size", "goal", "horizon"), [(1, 3, None, 20), (5, 3, (0, 1), 7), (4, 6, (2, 5), 3)]
)
def test_vectorised_grid_equals_sync_vector_env(number, size, goal, horizon):
    kwargs = {"size": size, "goal": goal, "horizon": horizon}
    fast = GridWorldVectorEnv(number, **kwargs)
    slow = SyncVectorEnv([lambda: GridWorldEnv(**kwargs)] * number, autoreset_mode="SameStep")
    for name in ("single_observation_space", "single_action_space", "action_space", "num_envs"):
        assert getattr(fast, name) == getattr(slow, name)
    assert fast.metadata["autoreset_mode"] == slow.metadata["autoreset_mode"]
    rng = np.random.default_rng(number)
    for step in range(200):
        if step in (0, 90):
            seeds = [int(seed) for seed in rng.integers(1000, size=number)]
            ours, theirs = fast.reset(seed=seeds), slow.reset(seed=seeds)
        elif step % 31 == 0:  # some start again early: from now on they are out of step
            mask = rng.random(number) < 0.5
            mask[0] = True
            ours, theirs = (e.reset(options={"reset_mask": mask.copy()}) for e in (fast, slow))
        else:
            actions = rng.integers(4, size=number)
            ours, theirs = fast.step(actions), slow.step(actions)
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        equal_infos(ours[-1], theirs[-1])


def test_earlier_answers_are_not_overwritten():
    envs = GridWorldVectorEnv(2, horizon=2)
    first, _ = envs.reset()
    kept = first.copy()
    answers = [envs.step(np.array([1, 2])) for _ in range(5)]
    np.testing.assert_array_equal(first, kept)
    assert [bool(answer[3][0]) for answer in answers] == [False, True, False, True, False]


@pytest.mark.parametrize("task", ["grid", "grid5"])
def test_registered_grid_passes_gymnasiums_checker(task):
    task = find_task(task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(task.id, render_mode="rgb_array", **task.kwargs).unwrapped
        check_env(env)


@pytest.mark.parametrize("name", ["grid", "grid5"])
def test_optimum_is_the_return_of_the_shortest_way(name):
    task = TASKS[name]
    env = make_env(task)
    env.reset(seed=0)
    side, total, truncated = env.unwrapped.size, 0.0, False
    actions = [1] * (side - 1) + [2] * 1000
    while not truncated:
        _, reward, _, truncated, _ = env.step(actions.pop(0))
        total += reward
    assert total == task.optimum


def test_each_lifetime_has_its_own_seed_and_keeps_it():
    envs = make_vector_env(Task("swing", "Pendulum-v1", {"max_episode_steps": 5}), 3)
    seeds = [11, 12, 11]
    singles = [make_env(Task("swing", "Pendulum-v1", {"max_episode_steps": 5})) for _ in seeds]
    observation, _ = envs.reset(seed=seeds)
    for index, (env, seed) in enumerate(zip(singles, seeds, strict=True)):
        np.testing.assert_array_equal(observation[index], env.reset(seed=seed)[0])
    for _ in range(12):  # two resets, each drawn from the lifetime's own generator
        actions = np.full((3, 1), 0.3, np.float32)
        observation, reward, _, truncated, infos = envs.step(actions)
        final = final_observations(observation, infos)
        for index, env in enumerate(singles):
            single, single_reward, _, ended, _ = env.step(actions[index])
            assert (single_reward, ended) == (reward[index], truncated[index])
            np.testing.assert_array_equal(final[index], single if ended else 0 * single)
            single = env.reset()[0] if ended else single
            np.testing.assert_array_equal(observation[index], single)


def test_dm_control_is_flattened_and_mujoco_is_float32():
    pytest.importorskip("dm_control")
    env = make_env("dm_control/cartpole-swingup-v0")
    assert env.observation_space.shape == (5,) and env.reset(seed=0)[0].dtype == np.float32
    envs = make_vector_env("Reacher-v5", 2)
    assert envs.reset(seed=[0, 1])[0].dtype == np.float32


@pytest.mark.parametrize("unknown", ["gird", "NoSuchEnv-v0", "dm_control/nothing-v0", "", None])
def test_unknown_task_is_named(unknown):
    with pytest.raises(ValueError, match="unknown task") as error:
        make_vector_env(unknown, 2)
    assert repr(unknown) in str(error.value) and "grid5" in str(error.value)


@pytest.mark.parametrize("task", ["Taxi-v4", "Blackjack-v1"])
def test_unsupported_spaces_are_named(task):
    with pytest.raises(ValueError, match="unsupported observation space"):
        make_vector_env(task, 2)


def test_import_is_light_and_registers():
    program = """
import sys, time
start = time.perf_counter()
import gla_nb
seconds = time.perf_counter() - start
heavy = {"torch", "stable_baselines3", "IPython", "matplotlib", "pandas", "seaborn", "mujoco"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import gymnasium
assert gymnasium.make("gla_nb/GridWorld-v0").spec.id == "gla_nb/GridWorld-v0"
print(seconds)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) < 3.0  # 0.2 s when idle
