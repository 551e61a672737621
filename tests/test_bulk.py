"""Stepping in bulk is an optimisation: to the last bit it gives what single environments give."""

from dataclasses import replace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gla_nb import tasks
from gla_nb.collect import CollectConfig, collect_run
from gla_nb.histories import open_history
from gla_nb.tasks import (
    TASKS,
    AntBulk,
    BulkVectorEnv,
    Task,
    TaskError,
    find_bulk,
    find_task,
    make_env,
    make_vector_env,
)

SHORT = [
    replace(TASKS[name], kwargs=TASKS[name].kwargs | {"max_episode_steps": 150})
    for name in ("ant", "ant_backward")
]  # falls, ends by time, and both at once
CARTS = ["cartpole-swingup", "cartpole-balance"]
NAMES = ["ant", "ant_forward", "ant_backward", *SHORT, "HalfCheetah-v4", "Reacher-v4", *CARTS]


def loop(task, number):
    return SyncVectorEnv([lambda: make_env(task)] * number, autoreset_mode=AutoresetMode.SAME_STEP)


def assert_same(ours, theirs, where):
    "Types, shapes and bits of what `reset` and `step` return, part by part."
    assert type(ours) is type(theirs), where
    if isinstance(theirs, dict):
        keys = [key for key in theirs if "timestep." not in key]  # DeepMind's own are left out
        assert ours.keys() == set(keys), where
        for key in keys:
            assert_same(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, tuple | list) or getattr(theirs, "dtype", "") == "O":
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where} {index}")
    elif theirs is not None:
        assert isinstance(theirs, np.ndarray), where
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        assert np.array_equal(ours, theirs, equal_nan=theirs.dtype.kind == "f"), where


def assert_steps_are_equal(ours, theirs, actions, seeds):
    "Episodes that fell and that ended by time."
    assert_same(ours.reset(seed=seeds), theirs.reset(seed=seeds), "reset")
    ends = np.zeros(2, int)
    for step, action in enumerate(actions):
        answer = ours.step(action)
        assert_same(answer, theirs.step(action), f"step {step}")
        ends += answer[2].sum(), answer[3].sum()
    return ends


def noise(envs, steps, extreme=False):
    "Actions (steps, number, d_a), from none at all for the first environment to far out of bounds."
    shape, generator = (steps, *envs.action_space.shape), np.random.default_rng(envs.num_envs)
    if extreme:
        values = np.float32([-1e30, -np.inf, -1, -0.0, 1, np.inf, 1e30])
        return generator.choice(values, shape)
    strength = np.linspace(0, 3, envs.num_envs)[:, None] if envs.num_envs > 1 else 0.5
    return (generator.normal(size=shape) * strength).astype(envs.action_space.dtype)


@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize("task", NAMES, ids=lambda t: getattr(t, "name", t))
def test_noise_of_any_strength_gives_equal_steps(task, number):
    steps = 400 if task in SHORT or number == 8 else {1: 1100, 3: 1500}[number]
    ours, theirs = make_vector_env(task, number), loop(task, number)
    assert isinstance(ours, BulkVectorEnv)
    for name in ("single_observation_space", "single_action_space", "action_space", "metadata"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.observation_space == theirs.observation_space
    fell, late = assert_steps_are_equal(ours, theirs, noise(ours, steps), [*range(5, 5 + number)])
    ants = task in SHORT or "ant" in str(task)
    assert (fell > 0) == ants
    assert late > 0 or number == 8 or (ants and number == 1)


@pytest.mark.parametrize("task", ["ant", "ant_backward", "HalfCheetah-v4", "Reacher-v4", *CARTS])
def test_extreme_actions_and_seeds_of_all_kinds(task):
    large = 2**32 - (task in CARTS)  # the seeds of DeepMind Control end there
    for seeds in (3, [large, None, 7], np.array([1, 1, 2]).tolist()):
        ours, theirs = make_vector_env(task, 3), loop(task, 3)
        kind = np.random.RandomState if task in CARTS else np.random.default_rng
        ours.generators[1], theirs.envs[1].unwrapped.np_random = kind(9), kind(9)  # None goes on
        assert_steps_are_equal(ours, theirs, noise(ours, 200, extreme=True), seeds)
        again = [env.step(noise(ours, 1)[0])[0] for env in (ours, theirs)]
        assert_same(*again, "one more step")
        assert_same(ours.reset(), theirs.reset(), "reset without a seed")


def test_actions_that_are_no_numbers_and_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it runs
    ours, theirs = make_vector_env("ant", 2), loop("ant", 2)
    actions = noise(ours, 60)
    actions[30:35, 1] = np.nan
    assert_steps_are_equal(ours, theirs, actions, [1, 2])
    for kind in (np.float64, np.asfortranarray, np.ndarray.tolist):
        for action in noise(ours, 5):
            action = action.astype(kind) if kind is np.float64 else kind(action)
            assert_same(ours.step(action), theirs.step(action), str(kind))


@pytest.mark.parametrize("task", CARTS)
def test_a_cart_that_is_cut_off_early_and_an_action_that_is_no_number(task):
    short = replace(find_task(task), kwargs={"max_episode_steps": 40})
    ours, theirs = make_vector_env(short, 2), loop(short, 2)
    assert assert_steps_are_equal(ours, theirs, noise(ours, 100), [1, 2]).tolist() == [0, 4]
    with pytest.raises(TaskError, match=f"'{short.name}'"):
        theirs.step(np.array([[0.0], [np.nan]]))
    with pytest.raises(TaskError, match=f"'{short.name}': an action is no number"):
        ours.step(np.array([[0.0], [np.nan]]))


def test_some_environments_begin_anew():
    ours, theirs = make_vector_env("ant", 3), loop("ant", 3)
    assert_steps_are_equal(ours, theirs, noise(ours, 5), [1, 2, 3])
    for which in ([True, False, False], [False, True, True]):
        options = [{"reset_mask": np.array(which)} for _ in range(2)]
        resets = [
            envs.reset(seed=[7, 8, 9], options=o)
            for envs, o in zip((ours, theirs), options, strict=True)
        ]
        assert_same(*resets, "reset")
        for action in noise(ours, 5):
            assert_same(ours.step(action), theirs.step(action), "step")


def test_a_fall_at_the_time_limit_is_both():
    envs, step, fell = make_vector_env("ant", 1), 0, False
    envs.reset(seed=[5])
    actions = noise(envs, 1000)
    while not fell:
        fell, step = envs.step(actions[step])[2][0], step + 1
    task = replace(TASKS["ant"], kwargs={"max_episode_steps": step})
    ends = assert_steps_are_equal(
        make_vector_env(task, 1), loop(task, 1), actions[:step], seeds=[5]
    )
    assert ends.tolist() == [1, 1]


def test_an_ant_whose_state_is_not_finite_is_not_healthy():
    envs = make_vector_env("ant", 3)
    envs.reset(seed=0)
    envs.qpos[1, 7], envs.qvel[2, 3] = np.nan, np.inf  # MuJoCo would repair it in the next step
    terminated = envs.measure(np.zeros((3, 8)), envs.before, envs.before)[2]
    assert terminated.tolist() == [False, True, True]


def test_threads_change_nothing():
    one, two = AntBulk(make_env("ant"), 5), AntBulk(make_env("ant"), 5, threads=2)
    assert (one.batch.nthread, two.batch.nthread) == (1, 2)
    assert sum(assert_steps_are_equal(two, one, noise(one, 100), [1, 2, 3, 4, 5]))


def test_what_was_returned_is_the_callers():
    ours, theirs = make_vector_env("ant", 2), loop("ant", 2)
    assert_same(ours.reset(seed=[1, 2]), theirs.reset(seed=[1, 2]), "reset")
    actions = noise(ours, 20)
    kept = ours.step(actions[0])
    copies = [part.copy() for part in kept[:4]]
    theirs.step(actions[0])
    ours.step(actions[1])[0].fill(9)  # writing to it does not change the environments
    theirs.step(actions[1])
    for part, copied in zip(kept, copies, strict=False):  # and a step does not write to it
        assert_same(part, copied, "kept")
    masks = [
        envs.reset(options={"reset_mask": np.array([True, False])}, seed=[3, 4])
        for envs in (ours, theirs)
    ]
    assert_same(*masks, "reset of one")
    for action in actions[2:]:
        assert_same(ours.step(action), theirs.step(action), "step")


def test_another_task_of_the_same_name_is_stepped_as_it_is(monkeypatch):
    import gymnasium as gym

    arguments = [{"use_contact_forces": True}, {"healthy_reward": 2.0}, {"render_mode": None}]
    for kwargs in arguments:
        assert find_bulk(Task("mine", "Ant-v4", kwargs)) is None
    assert find_bulk(lambda: make_env("ant")) is None
    assert (
        type(make_vector_env(Task("mine", "Ant-v4", {"healthy_reward": 2.0}), 2)) is SyncVectorEnv
    )
    mine = gym.envs.registration.EnvSpec("Ant-v4", entry_point=tasks.GridWorldEnv)
    monkeypatch.setitem(gym.registry, "Ant-v4", mine)
    assert find_bulk("Ant-v4") is None


def test_failures_name_the_environment(monkeypatch):
    envs = make_vector_env("ant", 2)
    with pytest.raises(TaskError, match="'ant': has not been reset"):
        envs.step(np.zeros((2, 8), np.float32))
    envs.reset(seed=0)
    with pytest.raises(TaskError, match=r"'ant': actions have shape \(2, 7\), not \(2, 8\)"):
        envs.step(np.zeros((2, 7), np.float32))

    def fails(**kwargs):
        raise RuntimeError("MuJoCo raised in 1 of 2 simulations")

    monkeypatch.setattr(envs.batch, "step", fails)
    with pytest.raises(TaskError, match="'ant' raised MuJoCo raised in 1 of 2 simulations"):
        envs.step(np.zeros((2, 8), np.float32))


@pytest.mark.parametrize("task", ["ant", "cartpole-swingup"])
def test_both_ways_collect_the_same_history(tmp_path, monkeypatch, task):
    sizes = {"streams": 3, "steps_per_update": 60, "batch_size": 60, "epochs": 2, "width": 8}
    task = replace(find_task(task), kwargs={"max_episode_steps": 50})
    config = CollectConfig(task, updates=3, normalise=True, **sizes)
    collect_run(config, 0, tmp_path / "bulk")
    monkeypatch.setattr(tasks, "BULK", {})
    assert find_bulk(task) is None
    collect_run(config, 0, tmp_path / "loop")
    names = sorted(path.name for path in (tmp_path / "loop").glob("*.npy"))
    assert ("forward_reward.npy" in names) == (task.name == "ant")
    assert names == sorted(path.name for path in (tmp_path / "bulk").glob("*.npy"))
    for name in names:
        one, other = (np.load(tmp_path / way / name) for way in ("bulk", "loop"))
        assert one.dtype == other.dtype and np.array_equal(one, other), name
    history = open_history(tmp_path / "bulk")
    assert history.updates == 3 and history.truncated.any()
    assert history.terminated.any() == (task.name == "ant")
