"What the library says goes through the logger `gla_nb`, and nowhere unless somebody listens."

import ast
import logging
import os
import platform
import select
import subprocess
import sys
from pathlib import Path

import pytest

from gla_nb.collect import CollectConfig, collect
from gla_nb.evaluate import MetaTest, run_meta_test
from gla_nb.stages import locked
from gla_nb.train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "gla_nb").glob("*.py"))
# Commands, whose output is what they print, and the display of progress.
PRINTING = {"__main__": {""}, "films": {"main"}, "notebooks": {"show", "main"}, "stages": {"show"}}


def printing_functions(path):
    "Names of the functions in which a module calls `print`; empty at its top level."
    found = set()

    def visit(node, inside):
        if isinstance(node, ast.FunctionDef):
            inside = node.name
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            found.add(inside)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_only_commands_and_progress_displays_print(module):
    assert printing_functions(module) == PRINTING.get(module.stem, set())


def test_importing_installs_no_handler_that_speaks():
    code = "import logging, gla_nb\n"
    code += "print(*[type(h).__name__ for h in logging.getLogger('gla_nb').handlers])\n"
    code += "print(len(logging.getLogger().handlers))\n"
    code += "logging.getLogger('gla_nb').warning('heard by nobody')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["NullHandler", "0"], done.stderr
    assert "heard by nobody" not in done.stderr


def test_stages_say_what_they_make_and_what_they_reuse(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    caplog.set_level(logging.INFO, "gla_nb")

    def said(call, *arguments):
        caplog.clear()
        return call(*arguments), [record.getMessage() for record in caplog.records]

    config = CollectConfig(task="grid", runs=2, updates=10)
    histories, messages = said(collect, config)
    assert messages == [f"collecting 2 of 2 PPO runs into {histories}"]
    assert said(collect, config)[1] == [f"reusing the learning histories in {histories}"]
    training = TrainConfig(gap=4, steps=2)
    agent, messages = said(train, training, histories)
    assert messages == []
    assert said(train, training, histories)[1] == [f"reusing the agent in {agent.parent}"]
    (agent / "config.json").unlink()  # as after a kill between the last checkpoint and the agent
    _, messages = said(train, training, histories)
    assert messages == [f"going on at step 2 of {agent.parent / 'checkpoint.safetensors'}"]
    test = MetaTest("grid", "random", lifetimes=2, interactions=20)
    assert said(run_meta_test, test)[1] == []
    (message,) = said(run_meta_test, test)[1]
    assert message.startswith("reusing the lifetimes in ")


def test_waiting_for_another_process_is_said(tmp_path):
    code = "import logging, sys\nfrom gla_nb.stages import locked\n"
    code += "logging.basicConfig(format='%(levelname)s %(message)s', stream=sys.stdout)\n"
    code += "with locked(sys.argv[1]): print('inside', flush=True)"
    call = [sys.executable, "-u", "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with locked(tmp_path):
        process = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True)
        ready, _, _ = select.select([process.stdout], [], [], 60)
        first = process.stdout.readline() if ready else "nothing was said"
    rest = process.communicate(timeout=60)[0]
    assert first == f"WARNING waiting for another process that works in {tmp_path}\n"
    assert rest == "inside\n"


def test_leftovers_of_a_killed_process_are_said_to_be_removed(tmp_path, caplog):
    caplog.set_level(logging.INFO, "gla_nb")
    process = 2**22 + 1  # beyond the largest number of Linux
    (tmp_path / f".log.{platform.node()}.{process}.csv").touch()
    with locked(tmp_path):
        pass
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("removing") and ".log" in message
