"""Training and meta-testing that are killed at random moments end as if nothing had happened."""

import os
import signal
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gla_nb import evaluate as evaluation
from gla_nb import train as training
from gla_nb.collect import CollectConfig, collect
from gla_nb.evaluate import (
    MetaTest,
    load_lifetimes,
    meta_test_folder,
    run_meta_test,
    run_meta_tests,
)
from gla_nb.train import TrainConfig, checkpoint_folder, read_checkpoint, read_log, train

torch.set_num_threads(1)
PPO = {"streams": 3, "updates": 6, "steps_per_update": 20, "batch_size": 30, "epochs": 1}
SIZES = {"tokens": 48, "segment_min": 5, "segment_max": 14, "layers": 1, "width": 16, "heads": 2}
KILLS, LONGEST = 10, 30  # the steps, or interactions, after which the longest life is killed
STEP = 0.01  # seconds that each takes at least while it may be killed
# More steps than all lives together can take: no life before the last one gets to the end.
LONG = TrainConfig(gap=2, batch=4, steps=300, evaluate_every=4, precision="float32", **SIZES)
SHORT = replace(LONG, steps=16)


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("histories")))
        return collect(CollectConfig(runs=2, **PPO), jobs=1)


@pytest.fixture(scope="module")
def agents(histories, tmp_path_factory):
    "The agents of LONG and SHORT, trained without interruption."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("uninterrupted")))
        return {config: train(config, histories, live=False) for config in (LONG, SHORT)}


class Life:
    "A fork of this warm process that does `work(tell)`; what it tells can be read here."

    def __init__(self, work):
        self.told = b""
        self.ear, mouth = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                work(lambda number: os.write(mouth, b"%d\n" % number))
                os._exit(0)
            except BaseException:
                os._exit(1)
        os.close(mouth)

    def wait(self, words=1):
        "Until it has told so many numbers: it is at work then."
        while self.told.count(b"\n") < words:
            part = os.read(self.ear, 1)
            assert part, f"it ended after {self.told}"
            self.told += part

    def kill(self):
        "Send SIGKILL; returns all numbers it told."
        os.kill(self.process, signal.SIGKILL)
        status = os.waitpid(self.process, 0)[1]
        assert os.WIFSIGNALED(status), f"it was not killed: status {status}"
        with os.fdopen(self.ear, "rb") as ear:
            return [int(line) for line in (self.told + ear.read()).split()]


def slow_training(tell):
    "Each step tells its number before it begins, and takes at least STEP."
    real = training.train_step

    def train_step(trainer):
        tell(trainer.step)
        time.sleep(STEP)
        real(trainer)

    training.train_step = train_step  # in a fork: nothing is there to be put back


def hold(tell, name, path, number=1):
    "The `number`-th `os.replace` or `os.rename` onto `path` tells the file's size, and never ends."
    real, count = getattr(os, name), []

    def move(source, target):
        if str(target) == str(path):
            count.append(source)
            if len(count) == number:
                tell(os.path.getsize(source))
                time.sleep(600)
        real(source, target)

    setattr(os, name, move)


def same_agent(one, two):
    "Every bit of the weights, of the log, and of the optimiser in the checkpoint."
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert read_log(one) == read_log(two)
    (a, _), (b, _) = (read_checkpoint(f.parent / "checkpoint.safetensors") for f in (one, two))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_training_killed_ten_times(histories, agents):
    rng, begun, ended = np.random.default_rng(1), [], []
    for _ in range(KILLS):

        def work(tell):
            slow_training(tell)
            train(LONG, histories, live=False)

        life = Life(work)
        life.wait(rng.integers(1, LONGEST))
        time.sleep(rng.uniform(0, 2 * STEP))
        steps = life.kill()
        begun.append(steps[0])
        ended.append(steps[-1])
        assert steps == list(range(steps[0], steps[0] + len(steps)))
    # Each life began where the last checkpoint before it was, and in between work was lost.
    assert begun[0] == 0 and ended[-1] < LONG.steps - 1
    for before, last, now in zip(begun, ended, begun[1:], strict=False):
        assert now % LONG.evaluate_every == 0 and before <= now <= last + 1
    assert len(set(begun)) >= 5 and any(
        last > now for last, now in zip(ended, begun[1:], strict=False)
    )
    same_agent(train(LONG, histories, live=False), agents[LONG])


@pytest.mark.parametrize("number", [1, 3])
def test_killed_while_a_checkpoint_is_written(histories, agents, number):
    "Between writing the file and giving it its name: the earlier one stays, if there is one."
    path = checkpoint_folder(SHORT, histories) / "checkpoint.safetensors"

    def work(tell):
        hold(tell, "replace", path, number)
        train(SHORT, histories, live=False)

    life = Life(work)
    life.wait()
    (size,) = life.kill()
    assert size > 20_000  # the new one was complete
    if number == 1:
        assert not path.exists()
    else:
        assert read_checkpoint(path)[1]["step"] == (number - 1) * SHORT.evaluate_every
    same_agent(train(SHORT, histories, live=False), agents[SHORT])


def test_killed_while_the_agent_is_saved(histories, agents, monkeypatch):
    path = checkpoint_folder(SHORT, histories) / "agent"

    def work(tell):
        hold(tell, "rename", path)
        train(SHORT, histories, live=False)

    life = Life(work)
    life.wait()
    life.kill()
    assert not path.exists() and len(list((path.parent / ".agent.saving").iterdir())) == 3
    monkeypatch.setattr(training, "train_step", None)  # all steps are in the checkpoint
    same_agent(train(SHORT, histories, live=False), agents[SHORT])
    assert [other.name for other in path.parent.glob(".agent*")] == []


def curves(agent):
    "Short ones, of which one needs another; and one that takes longer than any life."
    common = {"task": "grid", "lifetimes": 3, "interactions": 10}
    return [
        MetaTest(agent=str(agent), **common),
        MetaTest(agent=str(agent), feedback="yoked", **common),
        MetaTest(agent="random", **common),
        MetaTest(agent=str(agent), memory="episode", **common | {"interactions": 300}),
    ]


def slow_meta_test(tell):
    "Each interaction tells its number after it was done, and takes at least STEP."

    def progress(*about):
        def live(done):
            tell(done)
            time.sleep(STEP)

        return live

    evaluation.progress = progress


def same_lifetimes(one, two):
    "Every field of two lists of lifetimes."
    for a, b in zip(one, two, strict=True):
        for field in fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.fixture(scope="module")
def lifetimes(agents, tmp_path_factory):
    "The lifetimes of all curves, without interruption."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_NB_OUTPUTS", str(tmp_path_factory.mktemp("lifetimes")))
        return run_meta_tests(curves(agents[SHORT]), jobs=1)


def test_meta_tests_killed_ten_times(agents, lifetimes, outputs):
    rng, told, finished = np.random.default_rng(2), [], {}
    for _ in range(KILLS):

        def work(tell):
            slow_meta_test(tell)
            run_meta_tests(curves(agents[SHORT]), jobs=1)

        life = Life(work)
        life.wait(rng.integers(1, LONGEST))
        time.sleep(rng.uniform(0, 2 * STEP))
        told.append(life.kill())
        now = {path: path.stat().st_mtime_ns for path in outputs.glob("meta_tests/*/lifetimes.npz")}
        assert now.items() >= finished.items()  # what was finished is kept as it was
        for path in now:
            load_lifetimes(path)
        finished = now
    assert len(finished) == 3  # all but the long one
    assert any(1 < steps[-1] < 10 for steps in told)  # some were killed within a short one,
    assert any(steps[-1] > 10 for steps in told)  # and some within the long one
    same_lifetimes(run_meta_tests(curves(agents[SHORT]), jobs=1), lifetimes)
    now = {path: path.stat().st_mtime_ns for path in outputs.glob("meta_tests/*/lifetimes.npz")}
    assert now.items() >= finished.items() and len(now) == 4


def test_killed_while_lifetimes_are_written(agents, lifetimes):
    config = curves(agents[SHORT])[0]
    path = meta_test_folder(config) / "lifetimes.npz"

    def work(tell):
        hold(tell, "replace", path)
        run_meta_test(config)

    life = Life(work)
    life.wait()
    assert life.kill()[0] > 500 and not path.exists()
    same_lifetimes([run_meta_test(config)], lifetimes[:1])
