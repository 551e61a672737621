"""Training: which tokens are shown, what is asked, and the same weights whatever happens."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from gla_nb import train as training
from gla_nb.agent import GLA
from gla_nb.collect import CollectConfig, collect, run_folders
from gla_nb.evaluate import meta_test
from gla_nb.histories import HistoryError, export_histories, open_history, update_returns
from gla_nb.projections import TokenLayout
from gla_nb.tasks import TASKS, Task
from gla_nb.train import (
    EXPERIMENTS,
    OBJECTIVES,
    TrainConfig,
    Trainer,
    batch_of,
    checkpoint_folder,
    divergence,
    eta_values,
    find_experiment,
    floor_teacher,
    load_checkpoint,
    make_batch,
    new_agent,
    next_batch,
    optimizer_step,
    plan_batch,
    read_checkpoint,
    read_log,
    sample_batch,
    save_checkpoint,
    ship_agent,
    shipped_agent,
    smooth_returns,
    token_table,
    train,
    train_all,
    train_step,
)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
STEPS, UPDATES, STREAMS, RUNS = 20, 6, 4, 3
# Episodes do not fit into updates of 20 steps: they cross the border of updates.
TASK_TABLE = {
    "short": Task("short", "gla_nb/GridWorld-v0", {"horizon": 7}),  # ends at time limits
    "pole": Task("pole", "CartPole-v1", {"max_episode_steps": 12}),  # ends in both ways
    "swing": Task("swing", "Pendulum-v1", {"max_episode_steps": 7}),  # a Box of actions
}
TINY = TrainConfig(
    gap=2,
    tokens=48,
    segment_min=5,
    segment_max=14,
    layers=1,
    width=16,
    heads=2,
    batch=8,
    steps=15,
    warmup=3,
    learning_rate=1e-2,
    evaluate_every=5,
    precision="float32",
)


def tiny(**changes):
    return training.replace(TINY, **changes)


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path / "outputs"))
    for name, task in TASK_TABLE.items():
        monkeypatch.setitem(TASKS, name, task)
    return tmp_path / "outputs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Folders of three PPO runs of each task, collected once."
    sizes = {"runs": RUNS, "updates": UPDATES, "streams": STREAMS, "steps_per_update": STEPS}
    ppo = {"batch_size": 40, "epochs": 6, "width": 8, "learning_rate": 5e-2}  # policies move fast
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("histories")))
        answer = {}
        for name, task in TASK_TABLE.items():
            patch.setitem(TASKS, name, task)
            config = CollectConfig(task=name, normalise=name == "swing", **sizes, **ppo)
            answer[name] = collect(config, jobs=1)
    return answer


@pytest.fixture(scope="module")
def histories(folders):
    return {name: [open_history(run) for run in run_folders(f)] for name, f in folders.items()}


@pytest.fixture(scope="module")
def tables(histories):
    return {name: token_table(opened) for name, opened in histories.items()}


def generator(seed=0):
    return np.random.default_rng(seed)


def same(one, two):
    "Whether two trained agents have the same log, weights and weights in their checkpoints."
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    equal = [a[name].equal(b[name]) for name in a.keys() | b.keys()]
    files = [(folder.parent / "checkpoint.safetensors").read_bytes() for folder in (one, two)]
    return read_log(one) == read_log(two), all(equal), files[0] == files[1]


# Which tokens are shown


def tokens_by_loops(opened):
    "`(run, stream, row, end)` of each token, in the order of the table, by loops alone."
    answer = []
    for run, history in enumerate(opened):
        for stream in range(history.streams):
            for row in range(history.rows):
                answer.append((run, stream, row, False))
                if history.terminated[stream, row] or history.truncated[stream, row]:
                    answer.append((run, stream, row, True))
    return answer


def segments_of(plan, sequence):
    "The positions of each segment of a sequence, as lists."
    parts = []
    for position, offset in enumerate(plan.offset[sequence]):
        parts.append([]) if offset == 0 else None
        parts[-1].append(position)
    return parts


@pytest.mark.parametrize("gap", [1, 2, 5, "max"])
@pytest.mark.parametrize("task", TASK_TABLE)
def test_segments_are_consecutive_tokens_of_one_update_of_one_stream(histories, tables, task, gap):
    config, places = tiny(gap=gap), tokens_by_loops(histories[task])
    plan = plan_batch(config, tables[task], [0, 2], generator(), 300)
    lengths, streams = set(), set()
    for sequence in range(300):
        parts = segments_of(plan, sequence)
        assert parts[0][0] == 0 and len({len(part) for part in parts[:-1]}) == 1
        assert 1 <= len(parts[-1]) <= len(parts[0])
        lengths.add(len(parts[0]))
        for number, part in enumerate(parts):
            tokens = plan.token[sequence, part]
            assert (np.diff(tokens) == 1).all()
            found = [places[token] for token in tokens]
            assert {run for run, *_ in found} == {plan.run[sequence]} <= {0, 2}
            assert len({stream for _, stream, *_ in found}) == 1
            streams.add(found[0][1])
            updates = {
                int(histories[task][run].update[stream, row]) for run, stream, row, _ in found
            }
            assert updates == set(plan.update[sequence, part]) and len(updates) == 1
            assert set(plan.segment[sequence, part]) == {number}
    assert lengths == set(range(5, 15)) and streams == set(range(STREAMS))


def updates_of(plan, sequence):
    "`(updates, scored)` of the segments of a sequence."
    firsts = [part[0] for part in segments_of(plan, sequence)]
    return plan.update[sequence, firsts].tolist(), plan.scored[sequence, firsts].tolist()


@pytest.mark.parametrize("gap", [1, 2, 5])
def test_segments_are_a_gap_apart_and_clamped_at_both_ends(tables, gap):
    plan = plan_batch(tiny(gap=gap), tables["short"], [0], generator(), 400)
    chains = {}
    for begin in range(-2 * gap, UPDATES):
        chain = [min(max(begin + gap * s, 0), UPDATES - 1) for s in range(10)]
        chains[begin] = chain
    begun = set()
    for sequence in range(400):
        updates, scored = updates_of(plan, sequence)
        fitting = [b for b, chain in chains.items() if chain[: len(updates)] == updates]
        assert fitting, f"{updates} is not a chain of gap {gap}"
        begun.update(fitting[:1])
        # Update 0 with an empty context is what a lifetime begins with; later ones cannot know.
        assert scored == [updates[0] == 0] + [True] * (len(updates) - 1)
    assert {b for b in chains if b > 0} <= begun and min(begun) <= -gap
    assert (plan.gap == gap).all()


def best_update(history):
    "The update with the best mean of five neighbours, by loops."
    returns = update_returns(history)
    means = []
    for update in range(len(returns)):
        near = [returns[u] for u in range(update - 2, update + 3) if 0 <= u < len(returns)]
        means.append(sum(near) / len(near))
    return int(np.argmax(means))


def test_max_gap_asks_for_the_best_update_of_the_same_run(histories, tables):
    bests = []
    for task, table in tables.items():
        best = [best_update(history) for history in histories[task]]
        plan = plan_batch(tiny(gap="max"), table, range(RUNS), generator(), 400)
        contexts = set()
        for sequence in range(400):
            updates, scored = updates_of(plan, sequence)
            wanted = best[plan.run[sequence]]
            assert set(np.array(updates)[scored]) == {wanted} and all(scored[1:])
            contexts.update(updates[:1] if not scored[0] else [])
        assert contexts == set(range(UPDATES))  # any policy may come before
        share = np.mean([updates_of(plan, sequence)[1][0] for sequence in range(400)])
        assert 0.5 < share < 0.8  # two of three sequences begin with nothing but the best
        bests += best
    assert len(set(bests)) > 2  # not simply the last


def test_several_gaps_are_drawn_alike(tables):
    plan = plan_batch(tiny(gaps=(1, 3, "max")), tables["short"], [1], generator(), 600)
    values, counts = np.unique(plan.gap, return_counts=True)
    assert values.tolist() == [1, 3, UPDATES] and counts.min() > 150


@pytest.mark.parametrize("held_out", [1, 2])
def test_held_out_runs_are_never_trained_on_and_training_runs_never_held_out(
    folders, histories, monkeypatch, held_out
):
    seen, real = [], training.plan_batch

    def plan_batch(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(training, "plan_batch", plan_batch)
    train(tiny(held_out=held_out, batch=16), folders["short"], live=False)
    places = tokens_by_loops(histories["short"])
    runs = [{places[token][0] for token in plan.token.ravel()} for plan in seen]
    assert len(runs) == 1 + TINY.steps
    assert runs[0] == set(range(RUNS - held_out, RUNS))
    assert set.union(*runs[1:]) == set(range(RUNS - held_out))


# What stands in them


def token_by_loops(history, place, first, border, layout):
    "One token, field by field, from the rows of a history."
    _, stream, row, end = place
    last = row if end else row - 1  # the row of the previous transition
    now = history.final_observation if end else history.observation
    fields = {
        "observation": now[stream, row],
        "previous": np.zeros(layout.observation),
        "action": np.zeros(layout.action),
        "reward": 0.0,
        "terminated": 0.0,
        "truncated": 0.0,
    }
    if not first:
        fields["previous"] = history.observation[stream, last]
        if layout.discrete:
            fields["action"][history.executed_action[stream, last]] = 1
        else:
            fields["action"] = history.executed_action[stream, last]
        fields["reward"] = history.reward[stream, last]
        fields["terminated"] = float(end and history.terminated[stream, row])
        fields["truncated"] = float(border or (end and history.truncated[stream, row]))
    return np.concatenate([np.atleast_1d(value) for value in fields.values()]).astype(np.float32)


def is_done(history, stream, row):
    return row >= 0 and bool(history.terminated[stream, row] | history.truncated[stream, row])


@pytest.mark.parametrize("gap", [2, "max"])
@pytest.mark.parametrize("task", TASK_TABLE)
def test_batches_hold_what_the_rows_hold(histories, tables, task, gap):
    config, table, places = tiny(gap=gap), tables[task], tokens_by_loops(histories[task])
    batch, plan = sample_batch(config, table, range(RUNS), generator(3), 40)
    seen = {"end": 0, "border": 0, "first": 0}
    for sequence in range(40):
        parts, scored = segments_of(plan, sequence), updates_of(plan, sequence)[1]
        for part, target in zip(parts, scored, strict=True):
            for position in part:
                run, stream, row, end = place = places[plan.token[sequence, position]]
                history = histories[task][run]
                first = position == part[0] or (
                    not end and (row == 0 or is_done(history, stream, row - 1))
                )
                border = position - part[0] == len(parts[0]) - 1 and not end
                expected = token_by_loops(history, place, first, border, table.layout)
                where = sequence, position
                np.testing.assert_array_equal(batch.tokens[where].numpy(), expected)
                for name, array in (("teacher", "distribution"), ("action", "action")):
                    value = getattr(history, array)[stream, row]
                    np.testing.assert_array_equal(getattr(batch, name)[where], value)
                assert batch.weight[where] == (target and not end and not border)
                seen["end"] += end
                seen["border"] += border and not first
                seen["first"] += first and position != part[0]
                assert not (border and first)  # the end would be announced twice
    assert min(seen.values()) > 10
    if task == "pole":  # both kinds of ends are there to be told from each other
        done = batch.tokens[..., -2:].flatten(0, 1).unique(dim=0).tolist()
        assert sorted(done)[:3] == [[0, 0], [0, 1], [1, 0]]


def test_a_border_never_leaves_its_update_where_segments_just_fit(outputs):
    "Episodes of 19 steps: update 0 has 21 tokens, and its last one begins an episode."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "tight", Task("tight", "gla_nb/GridWorld-v0", {"horizon": 19}))
        config = CollectConfig(
            task="tight", runs=1, updates=2, streams=1, steps_per_update=20, batch_size=20
        )
        opened = [open_history(run) for run in run_folders(collect(config, jobs=1))]
    table, places = token_table(opened), tokens_by_loops(opened)
    with pytest.raises(ValueError, match="segment_max 21 does not fit into an update"):
        plan_batch(tiny(gap=1, segment_min=20, segment_max=21), table, [0], generator(), 50)
    plan = plan_batch(tiny(gap=1, segment_min=20, segment_max=20), table, [0], generator(), 50)
    for sequence in range(50):
        for part in segments_of(plan, sequence):
            tokens = plan.token[sequence, part]
            updates = {opened[0].update[0, places[token][2]] for token in tokens}
            assert updates == set(plan.update[sequence, part]) and tokens.min() >= 0
            last = table.first[tokens[-1]] and plan.border[sequence, part[-1]]
            assert not last


def test_hidden_rewards_change_the_reward_column_alone(tables):
    table = tables["pole"]
    plan = plan_batch(TINY, table, [0], generator(), 20)
    shown, hidden = (
        make_batch(tiny(hide_rewards=hide), table, plan).tokens for hide in (False, True)
    )
    column = 2 * table.layout.observation + table.layout.action
    assert (shown[..., column] == 1).float().mean() > 0.5  # CartPole pays 1 for each step
    assert (hidden[..., column] == 0).all()
    shown[..., column] = 0
    assert torch.equal(shown, hidden)


def test_noise_is_in_training_batches_alone_and_follows_the_seed(histories):
    noisy = tiny(normalise=True, reward_shift=1.0, observation_noise=0.1)
    trainers = [Trainer(c, [histories["short"]], "") for c in (tiny(normalise=True), noisy, noisy)]
    (plain, _), (calm, _), _ = (trainer.fixed for trainer in trainers)
    assert torch.equal(plain.tokens, calm.tokens)
    without, one, other = (batch_of(trainer, 1).tokens for trainer in trainers)
    assert torch.equal(one, other) and not torch.equal(without, one)
    assert not torch.equal(one, batch_of(trainers[1], 2).tokens)


def test_rewards_that_are_hidden_are_not_shifted(tables):
    config = tiny(hide_rewards=True, reward_shift=1.0)
    shifted, _ = sample_batch(config, tables["short"], [0], generator(), 20)
    rewards = shifted.tokens[..., shifted.tokens.shape[-1] - 3]
    assert not rewards.any()


def test_eta_is_that_of_the_policy_that_acted(histories):
    eta = ("return", "gap", "position")
    config = tiny(eta=eta, gaps=(1, 3, "max"), eta_dropout=0.0)
    table = token_table(histories["short"], eta)
    batch, plan = sample_batch(config, table, range(RUNS), generator(1), 30)
    values = batch.tokens[..., -3:].numpy()
    for sequence in range(30):
        returns = table.returns[plan.run[sequence]].tolist()
        for position, update in enumerate(plan.update[sequence]):
            rank, gap, place = values[sequence, position]
            below = sum(other < returns[update] for other in returns)
            equal = sum(other == returns[update] for other in returns)
            assert below + 1 <= round(rank * UPDATES, 4) <= below + equal
            assert gap == pytest.approx(np.log(1 + plan.gap[sequence]))
            assert place == pytest.approx((update + 1) / UPDATES)
    assert len(np.unique(values[..., 0])) > 3
    assert table.layout.width == 2 * 9 + 4 + 3 + 3


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)])
def test_each_eta_is_dropped_for_whole_sequences(histories, dropout, low, high):
    config = tiny(eta=("gap", "position"), eta_dropout=dropout)
    table = token_table(histories["short"], config.eta)
    plan = plan_batch(config, table, [0], generator(), 300)
    given = eta_values(config, table, plan, generator()) != 0  # (B, T, 2)
    assert torch.equal(given.all(1), given.any(1))
    for each in range(2):
        assert low <= (~given[:, 0, each]).double().mean() <= high
    together = (given[:, 0, 0] & given[:, 0, 1]).double().mean()
    assert abs(together - (1 - dropout) ** 2) < 0.1  # each by itself, so one is often alone
    assert eta_values(TINY, table, plan, generator()) is None


@pytest.fixture(scope="module")
def two_directions(tmp_path_factory):
    "Two PPO runs of each direction of the ant, a few steps long, and their table."
    sizes = {"runs": 2, "updates": 3, "streams": 2, "steps_per_update": 32, "batch_size": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("directions")))
        folders = [collect(CollectConfig(task=t, **sizes), jobs=1) for t in ("ant", "ant_backward")]
    opened = [[open_history(run) for run in run_folders(folder)] for folder in folders]
    return opened, token_table(opened[0] + opened[1])


def test_turned_contexts_are_of_the_other_direction_and_paid_as_in_this_one(two_directions):
    opened, table = two_directions
    histories = opened[0] + opened[1]
    config = tiny(gap=1, turned=0.5, segment_min=8, segment_max=16)
    plan = plan_batch(config, table, range(4), generator(), 400)
    batch = make_batch(config, table, plan)
    rows = table.row[plan.token]  # of all histories, one after the other
    run, row = np.divmod(rows, histories[0].streams * histories[0].rows)
    other = (run // 2) != (plan.run // 2)[:, None]
    np.testing.assert_array_equal(other, plan.turned)
    assert abs(plan.turned.any(1).mean() - 0.5) < 0.08 and not plan.turned[:, -5:].all(1).any()
    assert not (plan.turned & plan.scored).any() and not batch.weight[plan.turned].any()
    first_only = np.diff(plan.turned.astype(int), axis=1)
    assert first_only.max() <= 0, "what follows is right"
    rewards = np.stack([h.reward.ravel() for h in histories])
    forward = np.stack([h.forward_reward.ravel() for h in histories])
    paid = rewards[run, row - 1] - 2 * plan.turned * forward[run, row - 1]
    seen = batch.tokens[..., 2 * 27 + 8].numpy()  # raw: this configuration normalises nothing
    inside = (plan.offset > 0) & ~table.end[plan.token] & ~table.first[plan.token]
    np.testing.assert_allclose(seen[inside], paid[inside], rtol=1e-5, atol=1e-5)
    assert plan.turned[inside].any() and (~plan.turned[inside]).any()
    hidden = make_batch(tiny(gap=1, turned=0.5, hide_rewards=True), table, plan)
    assert not hidden.tokens[..., 2 * 27 + 8].any()


def test_turned_contexts_need_two_directions(two_directions, tables):
    _, table = two_directions
    with pytest.raises(ValueError, match="turned is 0.5: it needs two tasks"):
        plan_batch(tiny(turned=0.5, segment_min=8), table, [0, 1], generator(), 8)
    with pytest.raises(ValueError, match="that report a forward reward"):
        plan_batch(tiny(turned=0.5), tables["short"], [0, 1], generator(), 8)
    with pytest.raises(ValueError, match="turned is 1.0: give a share"):
        tiny(turned=1.0)


# What is asked


def laws(discrete, rows=50, dimensions=3):
    "Parameters of two random distributions, and the two of torch."
    draw = torch.Generator().manual_seed(0)
    pair = []
    for _ in range(2):
        if discrete:
            # Teachers are log-probabilities; agents give logits, which need not be normalised.
            parameters = 2 * torch.randn(rows, dimensions, generator=draw)
            parameters = parameters.log_softmax(-1) if not pair else parameters
            law = torch.distributions.Categorical(logits=parameters)
        else:
            parameters = torch.randn(rows, 2 * dimensions, generator=draw)
            mean, log_std = parameters.chunk(2, -1)
            law = torch.distributions.Independent(
                torch.distributions.Normal(mean, log_std.exp()), 1
            )
        pair.append((parameters, law))
    return pair


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("discrete", [True, False])
def test_divergence_is_that_of_torch_distributions(discrete, objective):
    (teacher, p), (agent, q) = laws(discrete)
    action = p.probs.argmax(-1) if discrete else p.mean + 0.5
    divergence_of = torch.distributions.kl_divergence
    expected = {
        "both": divergence_of(p, q) + divergence_of(q, p),
        "forward": divergence_of(p, q),
        "reverse": divergence_of(q, p),
        "nll": -q.log_prob(action),
    }[objective]
    config = tiny(objective=objective, probability_floor=0.0, blur=0.0)
    found = divergence(config, discrete, agent, teacher, action)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    floored = divergence(tiny(objective=objective), discrete, agent, teacher, action)
    assert torch.isfinite(floored).all()


def test_floors_keep_late_teachers_from_dominating():
    certain = torch.tensor([[0.0, -200.0, -200.0, -200.0]])  # log-probabilities
    floored = floor_teacher(tiny(probability_floor=0.01), certain).exp()
    torch.testing.assert_close(floored, torch.tensor([[0.97, 0.01, 0.01, 0.01]]))
    uniform = torch.zeros(1, 4)
    reverse = divergence(
        tiny(objective="reverse", probability_floor=0.01), True, uniform, certain, None
    )
    expected = 0.25 * np.log(0.25 / 0.97) + 0.75 * np.log(0.25 / 0.01)
    np.testing.assert_allclose(reverse, [expected], rtol=1e-5)
    narrow, agent = torch.tensor([[0.3, -9.0]]), torch.tensor([[0.5, -2.0]])  # mean, log_std
    found = divergence(tiny(blur=0.4), False, agent, narrow, None).item()
    p = torch.distributions.Normal(0.3, np.hypot(np.exp(-9.0), 0.4))
    q = torch.distributions.Normal(0.5, np.hypot(np.exp(-2.0), 0.4))
    between = torch.distributions.kl_divergence
    assert abs(found - (between(p, q) + between(q, p)).item()) < 1e-5
    sharp = divergence(tiny(blur=0.0), False, agent, narrow, None).item()
    assert sharp > 1e5 > 1 > found  # a late teacher alone would be the whole loss
    assert divergence(tiny(blur=0.4), False, narrow, narrow, None).item() == 0


# Training


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    "Agents of TINY, trained without interruption, by task."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("trained")))
        return {task: train(TINY, folder, live=False) for task, folder in folders.items()}


@pytest.mark.parametrize("task", TASK_TABLE)
def test_the_loss_falls(folders, task):
    log = read_log(train(tiny(steps=70, evaluate_every=20), folders[task], live=False))
    assert [row["step"] for row in log] == [20, 40, 60, 70]
    assert log[-1]["train"] < 0.8 * log[0]["train"]
    for row in log:
        names = {"step", "train", "held_out", "held_out_head", "held_out_segments"}
        assert row.keys() == names | {"held_out_forward", "held_out_reverse"}
        both = np.add(row["held_out_forward"], row["held_out_reverse"])
        np.testing.assert_allclose(both, row["held_out_segments"], rtol=1e-6)


@pytest.mark.parametrize("task", TASK_TABLE)
def test_same_seed_same_weights_another_seed_others(folders, trained, task):
    torch.manual_seed(99), np.random.seed(99)  # noqa: NPY002  # must not matter
    assert same(trained[task], train(TINY, folders[task], live=False)) == (True, True, True)
    other = train(tiny(seed=1), folders[task], live=False)
    assert same(trained[task], other) == (False, False, False)


def test_held_out_losses_are_means_over_scored_tokens(folders, histories, outputs):
    "Of the same tokens each time, by loops, from the saved agent."
    config = tiny(segment_min=17, segment_max=20, steps=5)  # longer than a segment's head
    saved = train(config, folders["short"], live=False)
    batch, plan = Trainer(config, [histories["short"]], outputs).fixed
    agent = GLA.from_pretrained(saved)
    with torch.no_grad():
        losses = divergence(config, True, agent(batch.tokens), batch.teacher, None)
    parts = {"held_out": [], "held_out_head": []}
    segments = [[] for _ in range(plan.segment.max() + 1)]
    for sequence in range(TINY.batch):
        for position in range(TINY.tokens):
            if not batch.weight[sequence, position]:
                continue
            value = losses[sequence, position].item()
            parts["held_out"].append(value)
            segments[plan.segment[sequence, position]].append(value)
            if plan.offset[sequence, position] < 16:
                parts["held_out_head"].append(value)
    row = read_log(saved)[-1]
    for name, values in parts.items():
        np.testing.assert_allclose(row[name], np.mean(values), rtol=1e-5)
    expected = [np.mean(values) if values else 0.0 for values in segments]
    np.testing.assert_allclose(row["held_out_segments"], expected, rtol=1e-5)


@pytest.mark.parametrize("task", ["short", "swing"])
def test_all_objectives_train_to_different_weights(folders, task):
    weights = []
    for objective in OBJECTIVES:
        agent = train(tiny(objective=objective, steps=5), folders[task], live=False)
        weights.append((agent / "model.safetensors").read_bytes())
        assert np.isfinite(read_log(agent)[-1]["held_out"])
    assert len(set(weights)) == 4


def test_switches_train_to_different_agents(folders):
    names = []
    changes = ({}, {"hide_rewards": True}, {"eta": ("gap",), "gaps": (1, 3)}, {"gap": "max"})
    for change in changes:
        agent = train(tiny(steps=5, **change), folders["short"], live=False)
        about = GLA.from_pretrained(agent).about
        assert about["gap"] == change.get("gap", 2) and about["tasks"][0]["name"] == "short"
        names.append((agent / "model.safetensors").read_bytes())
    assert len(set(names)) == len(changes)


def test_bfloat16_trains_close_to_float32(folders, trained):
    agent = train(tiny(precision="bfloat16"), folders["short"], live=False)
    log, exact = read_log(agent), read_log(trained["short"])
    assert log != exact  # it is another arithmetic,
    np.testing.assert_allclose(
        [row["train"] for row in log], [row["train"] for row in exact], rtol=0.1
    )
    weights = load_file(agent / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}  # but the weights stay exact


def test_finished_agents_are_reused(folders, monkeypatch):
    agent = train(TINY, folders["short"], live=False)
    files = [path for path in agent.parent.rglob("*") if path.is_file() and path.name != ".lock"]
    times = {path: path.stat().st_mtime_ns for path in files}
    monkeypatch.setattr(training, "Trainer", None)  # nothing may be made
    assert train(TINY, folders["short"], live=False) == agent
    assert {path: path.stat().st_mtime_ns for path in files} == times and len(files) >= 6


def test_all_at_once_gives_the_same_agents_as_one_by_one(folders, trained):
    configs = [tiny(gap="max"), TINY]
    together = train_all(configs, folders["short"], jobs=1)
    assert same(together[1], trained["short"]) == (True, True, True)
    assert same(together[0], together[1]) == (False, False, False)
    assert [GLA.from_pretrained(agent).about["gap"] for agent in together] == ["max", 2]
    short, swing = train_all([TINY, TINY], [folders["short"], [folders["swing"]]], jobs=1)
    assert same(short, trained["short"]) == same(swing, trained["swing"]) == (True, True, True)
    with pytest.raises(ValueError, match="2 histories for 1 configurations"):
        train_all([TINY], [folders["short"], folders["swing"]])


@pytest.mark.parametrize("task", ["swing", "short"])
def test_trained_agents_can_be_meta_tested(trained, task):
    agent = GLA.from_pretrained(trained[task])
    lifetimes = meta_test(task, agent, [0, 1, 2], 60)  # longer than its window of 48 tokens
    assert (lifetimes.task, lifetimes.agent, lifetimes.gap) == (task, "gla", 2)
    assert np.isfinite(lifetimes.reward).all() and lifetimes.truncated.sum() == 3 * (60 // 7)
    again = meta_test(task, agent, [0, 1, 2], 60)
    np.testing.assert_array_equal(again.reward, lifetimes.reward)


def in_processes(count, function):
    "Run `function` as `torchrun` would, in forks of this process; returns their exit codes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
                names |= {"LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ["MASTER_ADDR"] = "127.0.0.1"
                AcceleratorState._reset_state(reset_partial_state=True)  # of the parent
                signal.alarm(60)  # a process whose partner has failed would wait for ever
                function(rank)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def test_two_processes_share_the_batch_and_give_the_loss_curve_of_one(
    folders, trained, tmp_path, monkeypatch
):
    real = training.train_loop

    def train_loop(trainer, live):
        real(trainer, live)
        about = {
            "log": trainer.log,
            "weights": [p.sum().item() for p in trainer.agent.parameters()],
        }
        about |= {"processes": trainer.accelerator.num_processes}
        (tmp_path / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(about))

    monkeypatch.setattr(training, "train_loop", train_loop)
    assert in_processes(2, lambda rank: train(TINY, folders["short"], live=False)) == [0, 0]
    about = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert [one["processes"] for one in about] == [2, 2]
    assert about[0] == about[1]
    agent = train(TINY, folders["short"], live=False)
    for row, expected in zip(read_log(agent), read_log(trained["short"]), strict=True):
        for name in ("train", "held_out", "held_out_head"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    first, second = (load_file(a / "model.safetensors") for a in (agent, trained["short"]))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4)


def test_batches_made_ahead_are_those_of_their_steps(histories, outputs):
    ahead, in_turn = (Trainer(TINY, [histories["short"]], outputs) for _ in range(2))
    for _ in range(3):
        train_step(ahead)
        optimizer_step(in_turn, batch_of(in_turn, in_turn.step))
    assert [*ahead.ahead] == [3] and not in_turn.ahead
    for one, two in zip(ahead.agent.parameters(), in_turn.agent.parameters(), strict=True):
        assert torch.equal(one, two)
    ahead.step = 1  # as a checkpoint may set it; what was made for step 3 is not for this one
    assert torch.equal(next_batch(ahead).tokens, batch_of(in_turn, 1).tokens)
    assert [*ahead.ahead] == [2]


def test_an_error_in_a_batch_made_ahead_is_raised_at_its_step(histories, outputs, monkeypatch):
    trainer = Trainer(TINY, [histories["short"]], outputs)
    real, made = training.batch_of, []

    def broken(trainer, step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            raise ValueError("the disk is gone")
        return real(trainer, step)

    monkeypatch.setattr(training, "batch_of", broken)
    train_step(trainer)
    with pytest.raises(ValueError, match="the disk is gone"):
        train_step(trainer)
    assert made == [(0, True), (1, False)] and trainer.step == 1


# Interruptions


class Stop(Exception):
    "Raised by the tests."


def stop(*arguments, **keywords):
    raise Stop


@pytest.mark.parametrize("task", ["short", "swing"])
@pytest.mark.parametrize(("stop_at", "resumed_at"), [(3, 0), (5, 5), (14, 10)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    folders, trained, monkeypatch, task, stop_at, resumed_at
):
    steps = []

    def stopping(trainer):
        if trainer.step == stop_at and stop_at not in steps:
            steps.append(trainer.step)
            raise Stop
        steps.append(trainer.step)
        train_step(trainer)

    monkeypatch.setattr(training, "train_step", stopping)
    with pytest.raises(Stop):
        train(TINY, folders[task], live=False)
    agent = train(TINY, folders[task], live=False)
    assert steps == [*range(stop_at + 1), *range(resumed_at, TINY.steps)]
    assert same(agent, trained[task]) == (True, True, True)


def test_interrupted_between_the_last_step_and_saving_the_agent(folders, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(GLA, "save_pretrained", stop)
        with pytest.raises(Stop):
            train(TINY, folders["short"], live=False)
    monkeypatch.setattr(training, "train_step", None)  # no step is left
    agent = train(TINY, folders["short"], live=False)
    assert same(agent, trained["short"]) == (True, True, True)


def test_no_space_while_a_checkpoint_is_renamed(folders, trained, monkeypatch):
    real, checkpoints = os.replace, []

    def replace(source, target):
        if str(target).endswith("checkpoint.safetensors"):
            checkpoints.append(target)
            if len(checkpoints) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="checkpoint.safetensors: no space is left.* free some"):
            train(TINY, folders["short"], live=False)
    assert read_checkpoint(checkpoints[0])[1]["step"] == 5
    assert [path.name for path in checkpoints[0].parent.glob(".checkpoint*")] == []
    agent = train(TINY, folders["short"], live=False)
    assert same(agent, trained["short"]) == (True, True, True)


def test_a_file_that_cannot_grow_is_named_and_the_earlier_checkpoint_kept(
    folders, trained, monkeypatch
):
    "The system itself refuses to write more than 10 kB, in a fork that has half its steps done."
    with monkeypatch.context() as patch:
        patch.setattr(training, "report", stop)
        with pytest.raises(Stop):  # right after the first checkpoint
            train(TINY, folders["short"], live=False)
    path = checkpoint_folder(TINY, folders["short"]) / "checkpoint.safetensors"
    before, child = path.read_bytes(), os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            train(TINY, folders["short"], live=False)
            os._exit(1)
        except OSError as error:
            named = str(error).startswith(f"[Errno {errno.EFBIG}] cannot write {path}")
            os._exit(0 if named else 2)
        except BaseException:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_bytes() == before and len(before) > 20_000
    assert [other.name for other in path.parent.glob(".checkpoint*")] == []
    agent = train(TINY, folders["short"], live=False)
    assert same(agent, trained["short"]) == (True, True, True)


# Mistakes


@pytest.fixture
def checkpoint(histories, outputs):
    "A trainer after two steps, with its checkpoint saved."
    trainer = Trainer(TINY, [histories["short"]], outputs)
    train_step(trainer), train_step(trainer)
    save_checkpoint(trainer)
    return trainer


def test_checkpoints_hold_everything(checkpoint, histories):
    other = Trainer(TINY, [histories["short"]], checkpoint.folder)
    assert load_checkpoint(other) and other.step == 2
    for trainer in (checkpoint, other):
        train_step(trainer)
    for one, two in zip(checkpoint.agent.parameters(), other.agent.parameters(), strict=True):
        assert torch.equal(one, two)
    nowhere = Trainer(TINY, [histories["short"]], checkpoint.folder / "nowhere")
    assert not load_checkpoint(nowhere) and nowhere.step == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 32, "heads": 4}, r"model\.blocks\.0.* is \(.*16.*, but .* needs \(.*32"),
        ({"layers": 2}, r"model\.blocks\.1\..* is missing, but .* needs \("),
        ({"eta": ("gap",)}, r"model\.embed\.weight is \(16, 25\), but .* needs \(16, 26\)"),
    ],
)
def test_checkpoints_of_another_shape_are_named(checkpoint, histories, changes, expected):
    path = checkpoint.folder / "checkpoint.safetensors"
    before = path.read_bytes()
    other = Trainer(tiny(**changes), [histories["short"]], checkpoint.folder)
    with pytest.raises(
        ValueError, match=rf"checkpoint\.safetensors is of another shape: {expected}"
    ):
        load_checkpoint(other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "state"])
def test_damaged_and_foreign_checkpoints_are_named_and_kept(folders, monkeypatch, damage):
    with monkeypatch.context() as patch:
        patch.setattr(training, "report", stop)
        with pytest.raises(Stop):
            train(TINY, folders["short"], live=False)
    path = checkpoint_folder(TINY, folders["short"]) / "checkpoint.safetensors"
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 100)
    elif damage == "foreign":
        save_file({"weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    elif damage == "state":
        save_file({"weight": torch.zeros(3)}, path, metadata={"state": "resumed"})
    else:
        path.write_text("" if damage == "empty" else "Dear diary")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not a checkpoint") as error:
        train(TINY, folders["short"], live=False)
    assert str(path) in str(error.value) and "remove it to train again" in str(error.value)
    assert path.read_bytes() == before


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_checkpoint(folders):
    config = tiny(learning_rate=1e30, warmup=0, evaluate_every=1, steps=3)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 1: .* than 1e\+30"):
        train(config, folders["short"], live=False)
    assert not (checkpoint_folder(config, folders["short"]) / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gap": 6}, "gap 6 is larger than the history: its runs have 6 PPO updates"),
        ({"gaps": (1, 9)}, "gap 9 is larger than the history"),
        ({"gaps": (1, "often")}, "unknown gap 'often'"),
        ({"held_out": 3}, "held_out is 3, but there are 3 PPO runs"),
        ({"held_out": 0}, "held_out is 0"),
        (
            {"segment_max": 40},
            "segment_max 40 does not fit into an update, which has room for 2[0-9] tokens",
        ),
        ({"eta": ("gap", "age")}, r"unknown eta \['age'\]"),
        ({"heads": 3}, "self.heads=3"),
    ],
)
def test_what_does_not_fit_the_histories_is_named_before_any_step(
    folders, monkeypatch, changes, expected
):
    monkeypatch.setattr(training, "train_step", None)
    config = tiny(**changes)
    with pytest.raises(ValueError, match=expected):
        train(config, folders["short"], live=False)
    folder = checkpoint_folder(config, folders["short"])
    assert {path.name for path in folder.iterdir()} == {"config.json", ".lock"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gap": 0}, "unknown gap 0"),
        ({"gap": "most"}, "unknown gap 'most'"),
        ({"objective": "mse"}, "unknown objective 'mse': use one of"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"segment_min": 1}, "they are 1, 14, 48"),
        ({"segment_min": 15}, "they are 15, 14, 48"),
        ({"segment_max": 49}, "they are 5, 49, 48"),
        ({"steps": 0}, "steps is 0: give at least 1"),
        ({"stay": -0.1}, "stay is -0.1: give a share"),
        ({"reward_shift": -1.0}, "reward_shift is -1.0: give a number from 0"),
        ({"observation_noise": float("nan")}, "observation_noise is nan: give a number from 0"),
        ({"evaluate_every": 0}, "evaluate_every is 0: give at least 1"),
        ({"batch": -1}, "batch is -1: give at least 1"),
        ({"threads": 0}, "threads is 0: give at least 1"),
    ],
)
def test_configurations_that_cannot_be_trained_cannot_be_made(changes, expected):
    with pytest.raises(ValueError, match=expected):
        tiny(**changes)


def test_a_share_of_the_sequences_shows_the_last_policy_alone(tables):
    plan = plan_batch(tiny(gap=1, stay=0.4), tables["short"], [0], generator(), 600)
    alone = (plan.update == UPDATES - 1).all(1).mean()
    # Of the others, one beginning in eight is the last update by itself.
    assert abs(alone - (0.4 + 0.6 / (UPDATES + 2))) < 0.05
    assert not plan.scored[plan.update[:, 0] > 0][:, 0].any()  # no empty context begins there


def test_two_tasks_are_trained_on_together_and_each_holds_a_run_out(folders, histories, outputs):
    tasks = [histories["short"], histories["short"][:2]]
    trainer = Trainer(TINY, tasks, outputs)
    assert (trainer.train_runs, trainer.held_out_runs) == ([0, 1, 3], [2, 4])
    assert set(trainer.fixed[1].run) == {2, 4}
    agent = train(tiny(steps=2), [folders["short"], folders["short"]], live=False)
    assert [task["name"] for task in GLA.from_pretrained(agent).about["tasks"]] == ["short"] * 2
    one = checkpoint_folder(TINY, folders["short"])
    assert one == checkpoint_folder(TINY, [folders["short"]]) != agent.parent
    with pytest.raises(ValueError, match="must agree in shape"):
        train(TINY, [folders["short"], folders["pole"]], live=False)


@pytest.mark.parametrize("task", ["short", "swing"])
def test_exports_train_as_the_updates_they_keep(folders, tmp_path, task):
    every, steps = 2, 16
    small = export_histories(folders[task], tmp_path / f"{task}-export", every=every, steps=steps)
    opened = [open_history(run) for run in run_folders(small)]
    table = token_table(opened)
    assert (table.every, table.updates) == (2, UPDATES // 2)
    assert {array.dtype for array in table.rows.values() if array.is_floating_point()} == {
        torch.float32
    }
    whole = [open_history(run) for run in run_folders(folders[task])]
    plan = plan_batch(tiny(gap=2), table, [0, 1], generator(), 50)
    batch = make_batch(tiny(gap=2), table, plan)
    for sequence, position in np.argwhere(batch.weight.numpy()[:20]):
        run, update = plan.run[sequence], plan.update[sequence, position] * every
        rows = slice(update * STEPS, update * STEPS + steps)
        source = whole[run].distribution[:, rows].reshape(-1, batch.teacher.shape[-1])
        near = np.abs(source - batch.teacher[sequence, position].numpy()).max(1).min()
        assert near < 5e-3  # one of the rows of that update, in float16
    agent = train(tiny(gap=2, steps=2), small, live=False)
    assert np.isfinite(read_log(agent)[-1]["held_out"])
    with pytest.raises(ValueError, match="gap 3 is not in these .* use a multiple of 2"):
        train(tiny(gap=3, steps=2), small, live=False)
    with pytest.raises(ValueError, match="gap 6 is larger than .* 6 PPO updates"):
        train(tiny(gap=6, steps=2), small, live=False)


def test_a_sequence_may_be_longer_than_the_window(folders):
    config = tiny(window=16, steps=3)
    agent = GLA.from_pretrained(train(config, folders["swing"], live=False))
    assert agent.config.window == 16 < config.tokens
    tokens = torch.randn(2, 40, agent.config.layout.width, generator=torch.manual_seed(0))
    far = tokens.clone()
    far[:, :5] += 1  # out of sight of the last tokens: more than the layers pass on
    with torch.no_grad():
        near, others = agent(tokens), agent(far)
    sight = agent.config.layers * (agent.config.window - 1)
    torch.testing.assert_close(near[:, 5 + sight :], others[:, 5 + sight :])
    assert (near[:, :5] != others[:, :5]).any()
    assert checkpoint_folder(config, folders["swing"]) != checkpoint_folder(TINY, folders["swing"])
    for window in (1, 49, -1):
        with pytest.raises(ValueError, match=f"window is {window}: give .* from 2 to the 48"):
            tiny(window=window)


def test_two_folders_of_one_name_train_two_agents(folders, tmp_path):
    small, other = (
        export_histories(folders["short"], tmp_path / name / "data", every=every, steps=16)
        for name, every in (("one", 1), ("two", 2))
    )
    assert small.name == other.name
    assert checkpoint_folder(TINY, small) != checkpoint_folder(TINY, other)
    shutil.copytree(small, tmp_path / "elsewhere" / "data")  # the same data has the same agent
    assert checkpoint_folder(TINY, small) == checkpoint_folder(TINY, tmp_path / "elsewhere/data")


def test_training_waits_for_all_runs_to_be_complete(folders, tmp_path):
    part = shutil.copytree(folders["short"], tmp_path / "part")
    about = part / "run_001" / "meta.json"
    about.write_text(about.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(HistoryError, match="run_001"):
        train(tiny(steps=2), part, live=False)
    shutil.rmtree(about.parent)
    with pytest.raises(HistoryError, match=f"{RUNS - 1} of {RUNS} runs"):
        train(tiny(steps=2), part, live=False)


def test_batches_without_a_target_do_no_harm(folders):
    config = tiny(tokens=16, segment_min=16, segment_max=16, batch=2, steps=20, before=0)
    table = token_table([open_history(run) for run in run_folders(folders["short"])])
    rng = generator()
    targets = [plan_batch(config, table, [0, 1], rng, 2).scored.any() for _ in range(9)]
    assert not all(targets)  # whose only segment has no update before it
    log = read_log(train(config, folders["short"], live=False))
    assert all(np.isfinite(row["train"]) for row in log)


def test_without_an_end_of_an_episode_the_best_update_has_the_best_rewards(monkeypatch):
    monkeypatch.setattr(training, "update_returns", lambda history: np.full(6, np.nan))
    rewards = np.repeat([0, 1, 5, 2, 4, 3], STEPS)[None].repeat(STREAMS, 0).astype(np.float32)
    endless = SimpleNamespace(streams=STREAMS, updates=6, reward=rewards)
    assert smooth_returns(endless, window=1).tolist() == [0, 1, 5, 2, 4, 3]


def test_the_largest_gap_is_the_last_update(folders):
    assert read_log(train(tiny(gap=UPDATES - 1, steps=2), folders["short"], live=False))


def test_histories_that_differ_in_shape_or_are_not_there(folders, histories, tmp_path):
    with pytest.raises(ValueError, match=r"must agree in shape.*\(4,\), 2, 6, 4.*\(9,\), 4, 6, 4"):
        token_table([histories["short"][0], histories["pole"][0]])
    mixed = tmp_path / "short-0123456789"
    shutil.copytree(folders["short"], mixed)
    meta = json.loads((mixed / "run_001" / "meta.json").read_text())
    meta |= {"updates_done": 4, "rows": 4 * STEPS, "complete": False}  # a run that was killed
    (mixed / "run_001" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(HistoryError, match=r"not complete.*run_001"):
        train(TINY, mixed, live=False)
    with pytest.raises(HistoryError, match="elsewhere holds no runs: collect them first"):
        train(TINY, tmp_path / "elsewhere", live=False)
    os.truncate(mixed / "run_001" / "reward.npy", 100)
    with pytest.raises(HistoryError, match=r"run_001/reward\.npy is truncated"):
        train(TINY, mixed, live=False)


def test_outputs_that_cannot_be_written(folders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path / "file" / "outputs"))
    with pytest.raises(OSError, match="cannot write .*a part of the path is a file"):
        train(TINY, folders["short"], live=False)


def test_rows_of_the_table_of_experiments():
    for name, scale in EXPERIMENTS:
        row = EXPERIMENTS[name, scale]
        if row.train.gaps:
            with pytest.raises(ValueError, match=f"{name} is told its gap, one of"):
                find_experiment(name, scale, gap=row.gaps[0])
        for gap in [] if row.train.gaps else row.gaps:
            found = find_experiment(name, scale, seed=7, gap=str(gap))
            assert (found.train.gap, found.train.seed, found.collect.seed) == (gap, 7, 7)
            changed = {"gap": row.train.gap, "seed": row.train.seed}
            assert training.replace(found.train, **changed) == row.train
            assert training.replace(found.collect, seed=row.collect.seed) == row.collect
        if name.startswith("ant_projected"):  # four episodes of 1,000 steps, or a multiple
            assert scale == "smoke" or row.interactions % 4000 == 0
        elif name.startswith("ant"):  # the claims count windows of attention by their bins
            assert row.interactions == (8 if name == "ant_dir" else 16) * row.train.attended
        # Segments must fit into the updates of that experiment, and runs must be left to train on.
        assert row.train.segment_max <= row.collect.steps_per_update
        assert row.train.held_out < row.collect.runs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("gird",), "unknown experiment 'gird': use one of .*grid"),
        (("grid", "huge"), "unknown scale 'huge' of grid: use one of cpu, paper, smoke"),
        (("grid", "cpu", 0, 80), "gap 80 is larger than the history: PPO makes 80 updates"),
        (("grid", "smoke", 0, "12"), "gap 12 is larger .* 12 updates at scale smoke"),
        (("grid", "cpu", 0, "mox"), "unknown gap 'mox'"),
        (("grid", "cpu", 0, 0), "unknown gap 0"),
    ],
)
def test_unknown_experiments_scales_and_gaps(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        find_experiment(*arguments)


def test_a_shipped_agent_stands_in_for_exactly_its_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    row = replace(find_experiment("grid", "smoke"), tasks=())
    agent = new_agent(row.train, TokenLayout(9, 4, True))
    about = {"gap": 4}
    agent.save_pretrained(tmp_path / "trained", about=about)
    assert shipped_agent("tiny", row) is None
    told = {"limits": "It is untrained.", "command": "make nothing"}
    folder = ship_agent(tmp_path / "trained", "tiny", row, told)
    assert folder == tmp_path / "agents" / "tiny" == shipped_agent("tiny", row)
    assert shipped_agent("tiny", replace(row, train=replace(row.train, seed=1))) is None
    assert shipped_agent("tiny", replace(row, collect=replace(row.collect, runs=9))) is None
    assert shipped_agent("tiny", replace(row, tasks=("grid", "other"))) is None
    card = (folder / "README.md").read_text()
    assert "# tiny: a general" in card and "It is untrained." in card and "make nothing" in card
    shipped = GLA.from_pretrained(folder)
    for ours, theirs in zip(shipped.parameters(), agent.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.bfloat16().float())
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "trained")]
    assert sizes[0] < 0.7 * sizes[1]


SHIPPED = {  # and their tasks
    "ant": 1,
    "ant_dir": 2,
    "ant_projected": 5,
    "grid": 1,
    "pendulum_projected": 1,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_agents_are_those_of_the_experiments(name, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(ROOT / "outputs"))
    folder = shipped_agent(name, find_experiment(name, "cpu"))
    assert folder is not None, "make figures SCALE=cpu ships them"
    assert 100_000 < (folder / "model.safetensors").stat().st_size < 16_000_000
    assert sorted(path.name for path in (ROOT / "outputs" / "agents").iterdir()) == [*SHIPPED]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_agents_earn_what_their_cards_say(name):
    agent = GLA.from_pretrained(ROOT / "outputs" / "agents" / name)
    assert len(agent.about["expected"]) == SHIPPED[name]
    for task, check in agent.about["expected"].items():
        length, (low, high) = check["interactions"], check["reward"]
        lifetimes = meta_test(task, agent, range(check["lifetimes"]), length)
        last = lifetimes.reward[:, length - length // 4 :].mean()
        assert low <= last <= high, (task, last)
    card = (ROOT / "outputs" / "agents" / name / "README.md").read_text()
    for part in ("## Results", "## Limits", "## Made by", "## Data and recipe"):
        assert part in card
