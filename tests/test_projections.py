"Random projections from the matrices to training and meta-testing on tasks of several shapes."

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from gla_nb import train as training
from gla_nb.agent import GLA
from gla_nb.collect import CollectConfig, collect, run_folders
from gla_nb.evaluate import MetaTest, meta_test, run_meta_test
from gla_nb.histories import open_history
from gla_nb.projections import (
    ACTION_SCALE,
    LAWS,
    Projections,
    TokenLayout,
    compact_projections,
    draw_projections,
    random_matrices,
)
from gla_nb.train import (
    TrainConfig,
    Trainer,
    divergences,
    make_batch,
    plan_batch,
    sample_batch,
    share_of_one,
    token_table,
    train,
    train_step,
)
from gla_nb.transformer import GLAConfig, log_probability, sample

LAYOUT = TokenLayout(64, 16, False, normalise=64, projection="orthonormal")
CONFIG = TrainConfig(
    gap=1, tokens=48, segment_min=8, segment_max=16, normalise=True, projection="orthonormal",
    layers=1, width=32, heads=2, batch=4, steps=3, evaluate_every=3, precision="float32",
)  # fmt: skip
TASKS = ("Reacher-v4", "HalfCheetah-v4")


@pytest.fixture(scope="module")
def histories():
    "Histories of two tasks of other shapes: 11 and 17 observations, 2 and 6 actions."
    config = CollectConfig(
        runs=2, updates=3, streams=2, steps_per_update=32, batch_size=32, epochs=1
    )
    return [collect(replace(config, task=task)) for task in TASKS]


@pytest.fixture(scope="module")
def agent():
    return GLA(GLAConfig(LAYOUT, layers=1, width=32, heads=2, window=64), seed=0).eval()


def table_of(folders, normalise=48):
    runs = [open_history(run) for folder in folders for run in run_folders(folder)]
    return token_table(runs, normalise=normalise)


def digest(law):
    "A hash of some matrices."
    drawn = draw_projections(law, [(27, 8), (11, 2)], "figure", [5, 6])
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in vars(drawn).values())).hexdigest()


def test_another_process_draws_the_same_projections():
    code = "import sys; sys.path.insert(0, 'tests'); from test_projections import *; "
    code += "print(*map(digest, LAWS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest(law) for law in LAWS]
    assert len({digest(law) for law in LAWS}) == len(LAWS)


def test_streams_never_meet():
    drawn = {s: draw_projections("orthonormal", [(4, 2)] * 50, s, np.arange(50)).observation
             for s in ("train", "validation", "figure")}  # fmt: skip
    every = torch.cat([*drawn.values()]).flatten(1)
    assert (torch.cdist(every, every) + 9 * torch.eye(150)).min() > 0.5


@pytest.mark.parametrize("law", ["orthonormal", "gaussian", "glorot"])
def test_every_channel_of_a_standardised_observation_has_unit_variance(law):
    drawn = draw_projections(law, [(27, 8)] * 2000, "train", np.arange(2000))
    values = torch.randn(2000, 20, 27, generator=torch.Generator().manual_seed(0))
    variance = drawn.observations(values).var((0, 1))
    assert (variance - 1).abs().max() < 0.1


def test_samples_have_the_density_that_the_loss_uses():
    drawn = draw_projections("orthonormal", [(27, 8)], "train", [0])
    generator = torch.Generator().manual_seed(0)
    outputs = 0.5 * torch.randn(1, 33, generator=generator)
    policy = drawn.policy(outputs, -5, 2).expand(100_000, -1)
    noise = torch.randn(100_000, 8, generator=generator)
    actions = sample(policy, noise, False)
    torch.testing.assert_close(actions.mean(0), policy[0, :8], atol=0.03, rtol=0)
    torch.testing.assert_close(actions.std(0).log(), policy[0, 8:], atol=0.02, rtol=0)
    entropy = (policy[0, 8:] + 0.5 * np.log(2 * np.pi * np.e)).sum()
    negative = -log_probability(policy, actions, False).mean()
    assert negative.item() == pytest.approx(entropy.item(), abs=0.03)


def test_turning_a_projection_and_the_outputs_changes_nothing():
    drawn = draw_projections("orthonormal", [(17, 6)], "train", [3])
    turn = torch.from_numpy(random_matrices("orthonormal", 16, 16, [np.random.default_rng(0)])[0])
    turn, outputs = turn.float(), torch.randn(1, 33, generator=torch.Generator().manual_seed(1))
    turned = Projections(drawn.observation, turn @ drawn.action, drawn.inverse @ turn.T)
    both = outputs[:, :32].unflatten(1, (2, 16)) @ turn.T
    again = torch.cat([both.flatten(1), outputs[:, 32:]], 1)
    expected = drawn.policy(outputs, -9, 9)
    torch.testing.assert_close(turned.policy(again, -9, 9), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(turned.policy(outputs, -9, 9), expected, atol=0.1)


def test_the_executed_action_enters_the_context_projected(histories):
    table = table_of(histories[:1])
    plan = plan_batch(CONFIG, table, [0, 1], np.random.default_rng(0), 8)
    batch = make_batch(CONFIG, table, plan)
    inside = plan.offset > 0
    action = table.rows["executed_action"][np.maximum(table.row[plan.token] - 1, 0)]
    shown = batch.tokens[..., 128:144]
    expected = batch.projections.actions(action)
    ordinary = inside & ~table.end[plan.token] & ~table.first[plan.token]
    torch.testing.assert_close(shown[ordinary], expected[ordinary])


def test_each_sequence_has_its_own_projection_and_validation_others(histories):
    table = table_of(histories)
    first, plan = sample_batch(CONFIG, table, range(4), np.random.default_rng(0), 6)
    other, same = sample_batch(
        CONFIG, table, range(4), np.random.default_rng(0), 6, stream="validation"
    )
    assert len(set(plan.projection)) == 6
    np.testing.assert_array_equal(plan.token, same.token)
    apart = (first.projections.observation - other.projections.observation).abs().amax((1, 2))
    assert apart.min() > 0.1


@pytest.mark.parametrize("pool", [1, 16])
def test_a_pool_has_as_many_projections_as_it_says(histories, pool):
    table, config = table_of(histories), replace(CONFIG, pool=pool)
    plan = plan_batch(config, table, range(4), np.random.default_rng(0), 400)
    assert set(plan.projection) == set(range(pool))


def test_the_share_of_one_projection_falls_to_nothing(histories):
    config = replace(CONFIG, one_projection=0.8, one_projection_until=0.5, steps=100)
    assert [share_of_one(config, step) for step in (0, 25, 50, 99)] == [0.8, 0.4, 0, 0]
    plan = plan_batch(config, table_of(histories), range(4), np.random.default_rng(0), 1000, 0.4)
    assert (plan.projection == 0).mean() == pytest.approx(0.4, abs=0.05)


def test_tasks_of_two_shapes_train_in_one_batch(histories):
    table = table_of(histories)
    assert table.widest == (17, 6)
    batch, plan = sample_batch(CONFIG, table, range(4), np.random.default_rng(0), 40)
    reacher = table.shapes[plan.run, 1] == 2
    assert 5 < reacher.sum() < 35
    assert batch.own[reacher].sum(-1).eq(4).all() and batch.own[~reacher].all()
    # A sequence of the smaller task is what it would be without the larger one beside it.
    alone = table_of(histories[:1])
    (row,) = np.flatnonzero(reacher)[:1]
    one = {name: getattr(plan, name)[row : row + 1] for name in plan.__dataclass_fields__}
    same = make_batch(CONFIG, alone, replace(plan, **one))
    torch.testing.assert_close(same.tokens[0], batch.tokens[row])
    torch.testing.assert_close(same.teacher[0, :, :2], batch.teacher[row, :, :2])


def test_padding_adds_nothing_to_the_loss(histories, tmp_path):
    tasks = [[*map(open_history, run_folders(folder))] for folder in histories]
    trainer = Trainer(CONFIG, tasks, tmp_path)
    batch, plan = sample_batch(CONFIG, trainer.table, range(4), np.random.default_rng(0), 40)
    with torch.no_grad():
        terms = trainer.terms(batch)
        outputs = trainer.model(batch.tokens)
    policy = batch.projections.policy(outputs, -5, 2)
    for row, (_, size) in enumerate(trainer.table.shapes[plan.run]):
        own = np.r_[:size, 6 : 6 + size]  # means and log_stds without their padding
        expected = divergences(CONFIG, False, policy[row, :, own], batch.teacher[row, :, own], None)
        for name in ("forward", "reverse"):
            torch.testing.assert_close(terms[name][row], expected[name])


def test_losses_are_validated_on_projections_that_no_training_draws(histories, tmp_path):
    tasks = [[*map(open_history, run_folders(folder))] for folder in histories]
    for pool in ("endless", 1):
        trainer = Trainer(replace(CONFIG, pool=pool), tasks, tmp_path)
        for batch, plan in (trainer.fixed, trainer.projected):
            assert len(set(plan.projection)) == CONFIG.batch
            keys = np.stack([plan.projection * 0, plan.projection], 1)
            drawn = draw_projections(
                "orthonormal", trainer.table.shapes[plan.run], "validation", keys, (17, 6)
            )
            torch.testing.assert_close(batch.projections.observation, drawn.observation)
        assert set(trainer.fixed[1].run) <= {1, 3} and set(trainer.projected[1].run) <= {0, 2}


def test_training_keeps_one_projection_as_long_as_it_says(histories, tmp_path, monkeypatch):
    config = replace(CONFIG, one_projection=1.0, one_projection_until=0.5, steps=2)
    tasks = [[*map(open_history, run_folders(histories[0]))]]
    trainer, plans = Trainer(config, tasks, tmp_path), []
    sample = training.sample_batch

    def spy(*args, **kwargs):
        batch, plan = sample(*args, **kwargs)
        plans.append(plan)
        return batch, plan

    monkeypatch.setattr(training, "sample_batch", spy)
    for _ in range(2):
        train_step(trainer)
    assert (plans[0].projection == 0).all() and (plans[1].projection > 0).all()


def test_an_agent_trained_on_two_shapes_acts_in_a_third(histories, tmp_path):
    folder = train(CONFIG, histories, live=False)
    lifetimes = run_meta_test(MetaTest("Pendulum-v1", str(folder), 2, 32))
    assert np.isfinite(lifetimes.reward).all()
    log = np.array([p.detach().abs().sum() for p in GLA.from_pretrained(folder).parameters()])
    assert np.isfinite(log).all()


class Listener:
    "Acts alike through every projection, and keeps what it reads."

    def __init__(self, agent):
        self.agent, self.config, self.parameters = agent, agent.config, agent.parameters

    def new_cache(self, lifetimes):
        self.read = []
        return self.agent.new_cache(lifetimes)

    def step(self, tokens, cache, active=None):
        active = torch.ones(len(tokens), dtype=torch.bool) if active is None else active
        self.read.append(torch.where(active[:, None], tokens, 0.0))
        return torch.zeros(len(tokens), 33)


@pytest.mark.parametrize("task, shape", [("Reacher-v4", (11, 2)), ("ant", (27, 8))])
def test_a_lifetime_is_read_through_its_own_projection_of_the_figure_stream(agent, task, shape):
    listener, seeds = Listener(agent), [4, 9]
    lifetimes = meta_test(task, listener, seeds, 120)
    seen = torch.stack(listener.read, 1)  # (L, T, 148)
    same = meta_test(task, listener, seeds, 120, projection="identity")
    raw = torch.stack(listener.read, 1)
    np.testing.assert_array_equal(lifetimes.reward, same.reward)
    drawn = draw_projections("orthonormal", [shape] * 2, "figure", seeds)
    now, before, action, rest = raw.split((64, 64, 16, LAYOUT.width - 144), -1)
    assert (now[..., shape[0] :] == 0).all() and now[..., : shape[0]].std() > 0.3
    expected = [drawn.observations(part[..., : shape[0]]) for part in (now, before)]
    expected += [drawn.actions(action[..., : shape[1]] / ACTION_SCALE), rest]
    torch.testing.assert_close(seen, torch.cat(expected, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "task", ["Reacher-v4", "HalfCheetah-v4", "ant", "dm_control/cartpole-swingup-v0"]
)
def test_one_agent_acts_in_tasks_of_all_shapes(agent, task):
    lifetimes = meta_test(task, agent, seeds=[0, 1], interactions=40)
    again = meta_test(task, agent, seeds=[1], interactions=40)
    # Its projection is its own. Rounding grows fast: the first steps only.
    np.testing.assert_allclose(lifetimes.reward[1, :10], again.reward[0, :10], atol=1e-3)
    plain = meta_test(task, agent, seeds=[0, 1], interactions=40, projection="identity")
    assert np.abs(plain.action_rms - lifetimes.action_rms).max() > 0


def test_what_does_not_fit_is_refused(agent):
    with pytest.raises(ValueError, match="105 observations, and only 64"):
        draw_projections("orthonormal", [(105, 8)], "figure", [0])
    with pytest.raises(ValueError, match="17 actions, and only 16"):
        draw_projections("identity", [(27, 17)], "figure", [0])
    with pytest.raises(ValueError, match="unknown projection 'fourier'"):
        meta_test("Reacher-v4", agent, [0], 9, projection="fourier")
    with pytest.raises(ValueError, match="continuous actions, but this task needs"):
        meta_test("CartPole-v1", agent, [0], 9)
    with pytest.raises(ValueError, match="pool is 0"):
        TrainConfig(projection="orthonormal", pool=0)
    bare = GLA(GLAConfig(TokenLayout(11, 2, False), layers=1, width=16, heads=1, window=8), seed=0)
    with pytest.raises(ValueError, match="trained without projections"):
        meta_test("Reacher-v4", bare, [0], 9, projection="orthonormal")
    with pytest.raises(ValueError, match="Discrete"):
        train(replace(CONFIG, segment_max=8), collect(CollectConfig(runs=2, updates=2)), live=False)


@pytest.fixture(scope="module")
def equivariant():
    "An agent with matching heads whose gates have been learned, more or less."
    shape = GLAConfig(LAYOUT, layers=3, width=32, heads=2, window=24, matching=3)
    agent = GLA(shape, seed=0).eval()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name.endswith("gates.weight") or name == "head.weight":
                parameter *= 8
    return agent


def turned(vectors):
    "Tokens as another orthonormal projection shows their task, and the turn of its actions."
    generators = [np.random.default_rng(0)]
    observation, action = (
        torch.from_numpy(random_matrices("orthonormal", n, n, generators)[0]).float()
        for n in (64, 16)
    )
    now, before, act, rest = vectors.split((64, 64, 16, LAYOUT.width - 144), -1)
    parts = [now @ observation.T, before @ observation.T, act @ action.T, rest]
    return torch.cat(parts, -1), action


def test_equivariant_layers_give_the_same_one_token_at_a_time(equivariant):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 60, LAYOUT.width, generator=generator)
    with torch.no_grad():
        whole = equivariant(tokens)
        within = equivariant(tokens[:, :24])  # no longer than the window: another kernel
    torch.testing.assert_close(within, whole[:, :24], atol=2e-5, rtol=0)
    cache, rows = equivariant.new_cache(3), torch.tensor([True, False, True])
    for step in range(60):  # lifetimes that are not active in between read nothing
        equivariant.step(torch.randn_like(tokens[:, 0]), cache, torch.zeros(3, dtype=torch.bool))
        outputs = equivariant.step(tokens[:, step], cache)
        torch.testing.assert_close(outputs, whole[:, step], atol=2e-5, rtol=0)
    cache.empty(rows)
    again = equivariant.step(tokens[:, 0], cache)
    torch.testing.assert_close(again[rows], whole[rows, 0], atol=2e-5, rtol=0)
    assert not torch.allclose(again[~rows], whole[~rows, 0], atol=1e-3)


def test_outputs_turn_with_the_projection(equivariant):
    tokens = torch.randn(2, 30, LAYOUT.width, generator=torch.Generator().manual_seed(2))
    others, turn = turned(tokens)
    with torch.no_grad():
        ours, theirs = equivariant(tokens), equivariant(others)
    torch.testing.assert_close(theirs[..., :16], ours[..., :16] @ turn.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs[..., 16:], ours[..., 16:], atol=1e-4, rtol=0)
    assert ours[..., :16].std() > 0.1 and ours[..., 32].std() > 0.01
    assert (theirs - ours)[..., :16].abs().max() > 0.1  # a turn is not nothing


def test_a_plain_network_does_not_turn():
    "The test above can fail."
    plain = GLA(GLAConfig(LAYOUT, layers=2, width=32, heads=2, window=30), seed=0).eval()
    tokens = torch.randn(2, 30, LAYOUT.width, generator=torch.Generator().manual_seed(2))
    others, turn = turned(tokens)
    with torch.no_grad():
        ours, theirs = plain(tokens)[..., :16], plain(others)[..., :16]
    assert (theirs - ours @ turn.T).abs().max() > 0.1 * ours.std()


def test_a_task_and_its_projection_are_one_to_an_equivariant_agent(equivariant):
    "Policies in the task's own space are the same through any orthonormal projection."
    rng = np.random.default_rng(3)
    observation, before = torch.from_numpy(rng.standard_normal((2, 1, 20, 11))).float()
    action = torch.from_numpy(rng.uniform(-1, 1, (1, 20, 2))).float()
    rest = torch.from_numpy(rng.standard_normal((1, 20, LAYOUT.width - 144))).float()
    policies = []
    for key in (0, 1):
        p = draw_projections("orthonormal", [(11, 2)], "figure", [key])
        parts = [p.observations(observation), p.observations(before), p.actions(action), rest]
        with torch.no_grad():
            policies.append(p.policy(equivariant(torch.cat(parts, -1)), -5, 2))
    torch.testing.assert_close(*policies, atol=1e-4, rtol=0)
    assert policies[0][..., :2].std() > 0.05


def test_a_compact_space_teaches_an_equivariant_agent_the_same(equivariant):
    "Loss and gradient of a batch in the smallest space are those through projections."
    shapes, generator = [(11, 2), (27, 8)], torch.Generator().manual_seed(4)
    numbers = [torch.randn(2, 20, n, generator=generator) for n in (27, 27, 8, LAYOUT.width - 144)]
    for part, place in zip(numbers[:3], (0, 0, 1), strict=True):
        part[0, :, shapes[0][place] :] = 0  # the padding of the smaller task
    found = []
    for p in (
        compact_projections(shapes),
        draw_projections("orthonormal", shapes, "train", [0, 1]),
    ):
        parts = [p.observations(numbers[0]), p.observations(numbers[1]), p.actions(numbers[2])]
        equivariant.zero_grad()
        policy = p.policy(equivariant(torch.cat([*parts, numbers[3]], -1)), -5, 2)
        loss = (policy[0, :, [0, 1, 8, 9]].square().sum() + policy[1].square().sum()) / 20
        loss.backward()
        gradient = torch.cat([each.grad.flatten() for each in equivariant.parameters()])
        found.append((loss.item(), gradient / gradient.norm()))
    equivariant.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and found[0][0] > 0.1
    assert (found[0][1] - found[1][1]).norm() < 1e-3


def test_an_agent_that_is_not_equivariant_is_trained_in_the_large_space(histories):
    "By its projections: only the equivariant one needs none."
    sizes = {}
    for matching in (0, 2):
        config, table = replace(CONFIG, matching=matching), table_of(histories)
        batch, _ = sample_batch(config, table, [0, 1], np.random.default_rng(0), 2)
        sizes[matching] = batch.tokens.shape[-1] - 4  # rewards and flags
    assert sizes == {0: 2 * 64 + 16, 2: 2 * 32 + 8}


def test_matching_heads_need_projections():
    with pytest.raises(ValueError, match="matching heads need a layout with projections"):
        GLAConfig(TokenLayout(11, 2, False), matching=2)
