"Causal normalisation: hard rewards, one formula in two forms, and the whole way into the network."

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from gla_nb.evaluate import Lifetimes, meta_test, yoke_to
from gla_nb.projections import (
    LIMIT,
    Normaliser,
    RunningMoments,
    TokenLayout,
    normalise_sequences,
    sequence_moments,
)
from gla_nb.train import (
    ROW_FIELDS,
    Plan,
    TrainConfig,
    Trainer,
    history_tokens,
    make_batch,
    sample_batch,
    token_table,
)

STEPS, CAP = 5400, 300
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=STEPS)
LATE = np.where(np.arange(STEPS) < 4999, 0.0, 1.0 * (NOISE > 1))
LATE[4999] = 1.0  # the first reward, at step 5,000
REWARDS = {
    "constant": np.full(STEPS, 0.1),
    "zero": np.zeros(STEPS),
    "negative": -np.exp(NOISE),
    "late": LATE,
    "offset": 1000 + 0.01 * NOISE,
    "wandering": np.cumsum(NOISE),
    "spikes": np.where(np.arange(STEPS) % 700 == 350, 1e6, NOISE),
    "steps": np.sign(np.sin(np.arange(STEPS) / 900)) * 50 + NOISE,
    "tiny": 1e-20 * NOISE,
    "first spike": np.where(np.arange(STEPS) == 0, 1e6, NOISE),
}
each_reward = pytest.mark.parametrize("name", REWARDS)


def normalise(rewards, cap=CAP, first=None):
    "(T, 2) inputs from (T,) rewards, by the form for sequences."
    reward = torch.tensor(np.asarray(rewards), dtype=torch.float32)[None]
    first = torch.zeros(reward.shape, dtype=torch.bool) if first is None else first
    layout = TokenLayout(1, 1, False, normalise=cap)
    return normalise_sequences(layout, reward[..., None], reward[..., None], reward, first)[2][0]


def by_definition(rewards, cap=CAP):
    "(T, 2) as the words of the notebook say it, one value after the other in plain Python."
    mean, square, rows = 0.0, 0.0, []
    # Mean squares lose digits that the library keeps: extended precision makes up for it.
    for count, reward in enumerate(np.float32(rewards).astype(np.longdouble), 1):
        mean += (reward - mean) / min(count, cap)
        square += (reward**2 - square) / min(count, cap)
        std = np.sqrt(max(square - mean**2, 0) + 1e-10 * square)
        rows.append((reward / np.sqrt(square), (reward - mean) / std) if square else (0.0, 0.0))
    return np.clip(np.array(rows, float), -LIMIT, LIMIT)


@each_reward
def test_rewards_of_every_kind_follow_the_definition(name):
    inputs = normalise(REWARDS[name])
    assert inputs.dtype == torch.float32 and torch.isfinite(inputs).all()
    assert inputs.abs().max() <= LIMIT
    np.testing.assert_allclose(inputs, by_definition(REWARDS[name]), atol=1e-5)


def test_sequences_equal_single_steps_at_every_step():
    rewards = np.stack(list(REWARDS.values()))
    reward = torch.tensor(np.concatenate([rewards, rewards[:, ::-1]]), dtype=torch.float32)
    first = torch.from_numpy(RNG.random(reward.shape) < 0.01)
    observation = torch.stack([reward, torch.full_like(reward, 7.7)], -1)
    previous = observation.roll(1, 1)
    layout = TokenLayout(2, 1, False, normalise=CAP)
    whole = normalise_sequences(layout, observation, previous, reward, first)
    state, rows = Normaliser(layout, len(reward)), []
    for t in range(STEPS):
        rows.append(state(observation[:, t], previous[:, t], reward[:, t], first[:, t]))
    for ours, theirs in zip(whole, zip(*rows, strict=True), strict=True):
        np.testing.assert_allclose(ours, torch.stack(theirs, 1), atol=1e-5)


@pytest.mark.parametrize("factor", [1000.0, 1 / 1000])
@each_reward
def test_the_scale_of_rewards_does_not_reach_the_network(name, factor):
    rewards = torch.tensor(REWARDS[name], dtype=torch.float32).double()
    scaled = rewards * factor  # in double precision: rounding to float32 would be another reward
    layout = TokenLayout(1, 1, False, normalise=CAP)
    ones = torch.zeros(1, STEPS, dtype=torch.bool)
    inputs = [
        normalise_sequences(layout, r[None, :, None], r[None, :, None], r[None], ones)
        for r in (rewards, scaled)
    ]
    for one, other in zip(*inputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_what_single_rewards_look_like():
    constant, negative = normalise(REWARDS["constant"]), normalise(-REWARDS["constant"])
    torch.testing.assert_close(constant, torch.tensor([[1.0, 0.0]]).expand(STEPS, 2))
    torch.testing.assert_close(negative, torch.tensor([[-1.0, 0.0]]).expand(STEPS, 2))
    assert (normalise(REWARDS["zero"]) == 0).all()
    assert (normalise(REWARDS["negative"])[:, 0] < 0).all()  # the sign of a reward is never lost
    late = normalise(LATE)
    assert (late[:4999] == 0).all() and (late[4999] == LIMIT).all()
    spikes = normalise(REWARDS["spikes"])
    assert (spikes[350] == LIMIT).all()
    assert spikes[351:600, 0].abs().max() < 1e-3 < spikes[300:349, 0].abs().median()


def test_a_spike_is_forgotten_and_a_cap_makes_it_so():
    rewards = np.where(np.arange(STEPS) == 10, 1e4, NOISE)
    capped, uncapped = normalise(rewards, cap=100), normalise(rewards, cap=STEPS)
    assert capped[3000:, 1].std() > 0.9 and uncapped[3000:, 1].std() < 0.02


def test_late_steps_look_like_those_seen_in_training():
    "The same stretch of rewards gives the same inputs, however long the agent has lived before."
    rewards, ago = REWARDS["wandering"], 15 * CAP
    young, old = normalise(rewards[ago - 5 * CAP :]), normalise(rewards)
    torch.testing.assert_close(young[-100:], old[-100:], atol=0.05, rtol=0)


def test_statistics_see_nothing_ahead():
    rewards = REWARDS["steps"].copy()
    before = normalise(rewards)
    rewards[3000:] = 1e9
    assert torch.equal(normalise(rewards)[:3000], before[:3000])


def test_a_reward_that_is_not_there_is_not_counted():
    first = torch.from_numpy(RNG.random((1, STEPS)) < 0.3)
    garbage = np.where(first[0], 1e9, NOISE)  # in the first token of an episode there is none
    there = ~first[0]
    inputs = normalise(garbage, first=first)[there]
    torch.testing.assert_close(inputs, normalise(NOISE[there]), atol=1e-6, rtol=0)


def test_constant_channels_are_zero_and_do_not_blow_up_rounding():
    constant = torch.tensor([0.0, 1.0, -0.1, 1e6, 1e-6]).expand(2, STEPS, 5).clone()
    first = torch.zeros(2, STEPS, dtype=torch.bool)
    layout = TokenLayout(5, 1, False, normalise=CAP)
    now, before, _ = normalise_sequences(layout, constant, constant, constant[..., 0], first)
    assert now.abs().max() < 1e-6 and before.abs().max() < 1e-6
    wobble = constant * (1 + 6e-8 * torch.randint(-1, 2, constant.shape))  # the last bit of float32
    now, _, _ = normalise_sequences(layout, wobble, wobble, constant[..., 0], first)
    assert now.abs().max() < 0.05


def test_rows_that_are_not_active_keep_their_state():
    moments, values = RunningMoments(3, 2, 5), torch.arange(6.0).reshape(3, 2)
    moments.add(values, torch.tensor([True, True, True]))
    kept = [moments.count[1].clone(), moments.mean[1].clone(), moments.variance[1].clone()]
    moments.add(values * 100, torch.tensor([True, False, True]))
    for now, before in zip((moments.count, moments.mean, moments.variance), kept, strict=True):
        assert torch.equal(now[1], before)
    layout = TokenLayout(2, 1, False, normalise=5)
    state, no = Normaliser(layout, 2), torch.zeros(2, dtype=torch.bool)
    observation, reward = torch.ones(2, 2), torch.ones(2)
    state(observation, observation, reward, no, torch.tensor([True, False]))
    assert state.observation.count.flatten().tolist() == state.reward.count.flatten().tolist()
    assert state.reward.count.flatten().tolist() == [1, 0]
    state(observation, observation, reward, ~no)
    assert state.observation.count.flatten().tolist() == [2, 1]
    assert state.reward.count.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("cap", [2, 7, 50])
def test_any_cap_and_any_mask_give_the_recurrence(cap):
    values = torch.randn(4, 120, 3, dtype=torch.float64)
    counted = torch.rand(4, 120) < torch.tensor([1.0, 0.5, 0.05, 0.0])[:, None]
    state, rows = RunningMoments(4, 3, cap), []
    for t in range(120):
        state.add(values[:, t], counted[:, t])
        rows.append((state.mean.clone(), state.variance.clone()))
    for ours, theirs in zip(
        sequence_moments(values, counted, cap), zip(*rows, strict=True), strict=True
    ):
        torch.testing.assert_close(ours, torch.stack(theirs, 1), atol=1e-9, rtol=1e-9)


# -- the whole way -----------------------------------------------------------------------------


class Wanderer(gym.Env):
    "Two observations of other scales, one constant; rewards of -50 to 50; ends at odd moments."

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def observe(self):
        return np.array([100 + self.place, 1e-3 * self.place**2, 4.0], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.normal(), 0
        return self.observe(), {}

    def step(self, action):
        self.place += self.np_random.normal() + float(action[0])
        self.steps += 1
        ended = bool(self.np_random.random() < 0.1)
        return self.observe(), 50 * np.tanh(self.place), ended, self.steps >= 12, {}


if "gla_nb_tests/Wanderer-v0" not in gym.registry:
    gym.register("gla_nb_tests/Wanderer-v0", entry_point=Wanderer)


class Listener:
    "Acts by chance alone, whatever it reads, and keeps every token."

    def __init__(self, normalise):
        self.layout = TokenLayout(3, 2, False, normalise=normalise)

    def new_cache(self, lifetimes):
        self.read = [[] for _ in range(lifetimes)]
        return SimpleNamespace(empty=lambda rows: None)

    def step(self, tokens, cache, active=None):
        active = torch.ones(len(tokens), dtype=torch.bool) if active is None else active
        for lifetime in torch.nonzero(active).flatten().tolist():
            self.read[lifetime].append(tokens[lifetime].numpy().copy())
        return torch.zeros(len(tokens), 4)


def listen(normalise, interactions=200, seeds=(3, 4, 5), **controls):
    "A `Listener` after its lifetimes, and these."
    agent = Listener(normalise)
    lifetimes = meta_test("gla_nb_tests/Wanderer-v0", agent, seeds, interactions, **controls)
    return agent, lifetimes


def history_of(raw):
    "The learning history (one stream) behind the raw tokens (T, 12) of one lifetime."
    observation, last, action = raw[:, :3], raw[:, 3:6], raw[:, 6:8]
    reward, terminated, truncated = raw[:, 8], raw[:, 9] > 0, raw[:, 10] > 0
    end = terminated | truncated
    at = np.flatnonzero(~end[:-1])  # the last transition is told by no further token
    assert np.array_equal(observation[at], last[at + 1])
    fields = {
        "observation": observation[at],
        "final_observation": observation[at + 1] * end[at + 1, None],
        "action": action[at + 1],
        "executed_action": action[at + 1],
        "reward": reward[at + 1],
        "terminated": terminated[at + 1],
        "truncated": truncated[at + 1],
        "distribution": np.zeros((len(at), 4), np.float32),
    }
    assert set(fields) == set(ROW_FIELDS)
    return SimpleNamespace(
        **{name: value[None] for name, value in fields.items()},
        update=np.zeros((1, len(at)), int), actions=2, discrete=False, streams=1, every=1,
        rows=len(at), updates=1, meta={"steps_per_update": len(at)},
    )  # fmt: skip


def single_segment(tokens):
    "The plan of one sequence of all tokens, in a single segment."
    zeros, offset = np.zeros((1, tokens), int), np.arange(tokens)[None]
    border, scored = offset == tokens - 1, np.ones((1, tokens), bool)
    one = np.zeros(1, int), np.ones(1, int)  # its run and its gap
    return Plan(offset, zeros, offset, zeros, border, scored, ~scored, *one)


@pytest.mark.parametrize("cap", [0, 40, 1000])
@pytest.mark.parametrize("hidden", [False, True])
def test_training_and_meta_testing_build_the_same_tokens(cap, hidden):
    feedback = "hidden" if hidden else "true"
    raw, _ = listen(0)
    ours, lifetimes = listen(cap, feedback=feedback)
    assert lifetimes.terminated.sum() > 20 and lifetimes.truncated.any()
    for lifetime in range(3):
        history = history_of(np.stack(raw.read[lifetime]))
        table = token_table([history], normalise=cap)
        count = len(history_tokens(history)[0])
        config = TrainConfig(hide_rewards=hidden, normalise=cap > 0)
        batch = make_batch(config, table, single_segment(count))
        tested = np.stack(ours.read[lifetime])[: count - 1]  # the border only looks like an end
        assert count > 190
        np.testing.assert_allclose(batch.tokens[0, :-1], tested, atol=1e-5)
    if cap and not hidden:  # what is compared is really normalised
        assert 0.5 < tested[20:, :2].std() < 2 and np.abs(tested[:, 8:10]).max() <= LIMIT
        assert (tested[:, 2] == 0).all()


def test_statistics_run_on_across_the_segments_of_a_sequence():
    raw, _ = listen(0)
    table = token_table([history_of(np.stack(raw.read[0]))], normalise=1000)
    whole = single_segment(120)
    split = Plan(**vars(whole) | {
        "segment": whole.offset // 40, "offset": whole.offset % 40,
        "border": whole.offset % 40 == 39,
    })  # fmt: skip
    one, other = (make_batch(TrainConfig(), table, plan).tokens[0] for plan in (whole, split))
    torch.testing.assert_close(one[:, :3], other[:, :3])  # every observation was seen in both
    starts = [40, 80]
    assert other[starts, 3:].abs().max() == 0 < one[starts, 3:].abs().max()
    # The reward at the border is never told, so later statistics differ a little, but run on.
    torch.testing.assert_close(one[90:119, 8:10], other[90:119, 8:10], atol=0.1, rtol=0)
    assert not torch.equal(one[90:119, 8:10], other[90:119, 8:10])


def test_episode_memory_forgets_the_statistics_with_the_context():
    ours, lifetimes = listen(1000, memory="episode")
    raw, same = listen(0, memory="episode")
    np.testing.assert_array_equal(lifetimes.reward, same.reward)
    for lifetime in range(3):
        inputs, values = np.stack(ours.read[lifetime]), np.stack(raw.read[lifetime])
        starts = np.flatnonzero(~values[:, 3:].any(1))
        assert len(starts) == lifetimes.done[lifetime, :-1].sum() + 1 > 10
        for begin, stop in zip(starts, [*starts[1:], len(values)], strict=True):
            assert (inputs[begin] == 0).all()  # one value: it is its own mean
            rewards = values[begin + 1 : stop, 8]  # of this episode alone
            if len(rewards):
                expected = by_definition(rewards, 1000)
                np.testing.assert_allclose(inputs[begin + 1 : stop, 8:10], expected, atol=1e-4)


def test_controls_change_the_raw_reward_before_it_is_normalised():
    raw, lifetimes = listen(0)
    hidden, _ = listen(1000, feedback="hidden")
    assert not any(np.stack(read)[:, 8:10].any() for read in hidden.read)
    thousand = Lifetimes(**vars(lifetimes) | {"reward": 1000 * lifetimes.reward})
    tokens = []
    for other in (lifetimes, thousand):
        ours, _ = listen(1000, feedback="yoked", yoke=yoke_to(other))
        tokens.append(np.concatenate([np.stack(read) for read in ours.read]))
    np.testing.assert_allclose(*tokens, atol=1e-4)  # yoked rewards of any scale look alike
    true, _ = listen(1000)
    assert np.abs(np.concatenate([np.stack(r) for r in true.read]) - tokens[0]).max() > 1


def test_a_trainer_builds_what_its_configuration_asks_for(tmp_path):
    raw, _ = listen(0)
    histories = [history_of(np.stack(read)[:150]) for read in raw.read]
    rows = min(h.rows for h in histories)
    for history in histories:  # two updates of equal length
        for name in (*ROW_FIELDS, "update"):
            setattr(history, name, getattr(history, name)[:, : rows // 2 * 2])
        history.rows, history.updates = rows // 2 * 2, 2
        history.update = (np.arange(history.rows) // (rows // 2))[None]
        history.meta = {"steps_per_update": rows // 2, "task": {"name": "wanderer"}}
    config = TrainConfig(
        gap=1, tokens=32, segment_min=8, segment_max=16, batch=4, width=16, layers=1, heads=2
    )
    off, on = (
        Trainer(TrainConfig(**vars(config) | {"normalise": flag}), [histories], tmp_path)
        for flag in (False, True)
    )
    assert (off.table.layout.normalise, on.table.layout.normalise) == (0, config.tokens)
    assert on.agent.config.layout.width == off.agent.config.layout.width + 1
    rng = np.random.default_rng(0)
    batch, _ = sample_batch(on.config, on.table, [0], rng, 4)
    assert batch.tokens.abs().max() <= LIMIT
    assert all(torch.isfinite(term).all() for term in on.terms(batch).values())
    again = type(on.agent).from_pretrained(
        on.agent.save_pretrained(tmp_path / "agent", about={}) or tmp_path / "agent"
    )
    assert again.config.layout == on.table.layout  # meta-testing needs nothing but the agent


def test_off_is_the_default_and_changes_nothing():
    layout = TokenLayout(3, 2, False)
    assert (layout.normalise, layout.width, TrainConfig().normalise) == (0, 11, False)
    values = [torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 5)]
    first = torch.zeros(2, 5, dtype=torch.bool)
    same = normalise_sequences(layout, *values, first)
    assert all(a is b for a, b in zip(same, values, strict=True))
    with pytest.raises(ValueError, match="normalise is -3"):
        TokenLayout(3, 2, False, normalise=-3)
