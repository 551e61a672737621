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


def ant_v4():
    "Ant-v4 as gymnasium makes it, without the word that there is a later version."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return gym.make("Ant-v4")


def falling_ant(env, steps=600):
    "Everything that `env` returns for the same random actions, over resets from the same seed."
    rng, seen = np.random.default_rng(0), [(*env.reset(seed=5), None, None, None)]
    for _ in range(steps):
        # Beyond the bounds on purpose: the ant is thrown over, and episodes end.
        answer = env.step(rng.uniform(-3, 3, 8))
        seen.append(answer)
        if answer[2] or answer[3]:
            seen.append((*env.reset(), None, None, None))
    return seen


@pytest.fixture(scope="module")
def ant_record():
    return falling_ant(ant_v4())


def test_forward_ant_is_ant_v4_to_the_last_bit(ant_record):
    ours = falling_ant(gym.make("gla_nb/AntDir-v0", direction="forward"))
    assert len(ours) == len(ant_record) > 610, "no episode ended: the test compares too little"
    for one, other in zip(ours, ant_record, strict=True):
        assert one[0].dtype == other[0].dtype and one[0].tobytes() == other[0].tobytes()
        assert data_equivalence(one[1:], other[1:], exact=True)


def test_backward_ant_only_turns_the_sign_of_the_velocity(ant_record):
    ours = falling_ant(gym.make("gla_nb/AntDir-v0", direction="backward"))
    moved = 0
    for one, other in zip(ours, ant_record, strict=True):
        assert one[0].tobytes() == other[0].tobytes()
        if one[2] is None:  # a reset
            assert data_equivalence(one[1], other[1], exact=True)
            continue
        assert one[2:4] == other[2:4]
        info, theirs = dict(one[4]), dict(other[4])
        for name in ("reward_forward", "forward_reward"):
            assert info.pop(name) == -theirs.pop(name)
        assert data_equivalence(info, theirs, exact=True)
        rest = theirs["reward_survive"] + theirs["reward_ctrl"]
        assert other[1] - rest == pytest.approx(theirs["x_velocity"], abs=1e-12)
        assert one[1] - rest == pytest.approx(-theirs["x_velocity"], abs=1e-12)
        moved += abs(theirs["x_velocity"]) > 0.1
    assert moved > 100


def test_ant_dir_keeps_the_limits_of_ant_v4():
    ours, theirs = gym.spec("gla_nb/AntDir-v0"), gym.spec("Ant-v4")
    assert ours.max_episode_steps == theirs.max_episode_steps == 1000
    assert ours.reward_threshold == theirs.reward_threshold
    with pytest.raises(ValueError, match="direction is 'left': use one of forward, backward"):
        gym.make("gla_nb/AntDir-v0", direction="left")


def test_ants_open_without_a_warning_and_report_the_commanded_velocity():
    rewards = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("ant", "ant_forward", "ant_backward"):
            envs = make_vector_env(name, 2)
            assert envs.reset(seed=[1, 2])[0].dtype == np.float32
            rewards.append(envs.step(np.full((2, 8), 0.7, np.float32))[4]["reward_forward"])
            assert envs.single_action_space == gym.spaces.Box(-1, 1, (8,), np.float32)
    np.testing.assert_array_equal(rewards[0], rewards[1])
    np.testing.assert_array_equal(rewards[0], -rewards[2])
    assert rewards[0].all()
    with pytest.warns(DeprecationWarning, match="out of date"):  # of others it is not hidden
        gym.make("Ant-v4")


class Torque(gym.Env):
    "Keeps the action that it was given; its bounds differ by dimension and are not symmetric."

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(np.float32([-3, 0.1]), np.float32([-1, 0.7]))

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.zeros(1, np.float32), 0.0, False, False, {"given": action}


@pytest.mark.parametrize(
    ("action", "given"),
    [(-1, (-3, 0.1)), (1, (-1, 0.7)), (0, (-2, 0.4)), (-50, (-3, 0.1)), (50, (-1, 0.7))],
)
def test_actions_are_honoured_up_to_both_bounds_and_never_beyond(monkeypatch, action, given):
    spec = gym.envs.registration.EnvSpec("Torque-v0", entry_point=Torque)
    monkeypatch.setitem(gym.registry, "Torque-v0", spec)
    env, envs = make_env("Torque-v0"), make_vector_env("Torque-v0", 2)
    assert env.action_space == envs.single_action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    env.reset(), envs.reset()
    action = np.full(2, action, np.float32)
    np.testing.assert_allclose(env.step(action)[4]["given"], given, rtol=1e-6)
    np.testing.assert_allclose(envs.step(np.stack([action] * 2))[4]["given"][1], given, rtol=1e-6)


def test_an_ant_pays_for_the_action_that_its_motors_make():
    env = make_env("ant")
    env.reset(seed=0)
    info = env.step(np.full(8, 9, np.float32))[4]
    assert info["reward_ctrl"] == -0.5 * 8  # of the clipped action, not 0.5 * 8 * 81


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


@pytest.mark.parametrize("task", ["Blackjack-v1"])
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
