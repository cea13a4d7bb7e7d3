"""A zygote in a fresh interpreter: children that start after it run the program as it is on the disk then."""

from __future__ import annotations

import os
import signal

from supervised_tools import nested
from support import eventually

from llm_runtime.supervisors import ChildSpec

PROGRAM = """
from supervised import Steady, note

VERSION = {version}


class Versioned(Steady):
    @classmethod
    def run(cls, context):
        note(context, f"version {{VERSION}}")
        Steady.run(context)
"""


def versioned(id: str) -> ChildSpec:
    return ChildSpec(id=id, start="upgraded:Versioned")


def versions(node) -> list[str]:
    return [line for line in node.journal() if "version" in line]


def upgrade(node, text: str) -> None:
    """Puts another program on the disk, with its compiled form gone: the clock may not tell the two apart."""
    (node.run_dir / "upgraded.py").write_text(text)
    for compiled in (node.run_dir / "__pycache__").glob("upgraded*"):
        compiled.unlink()


def test_renewed_zygote_runs_the_new_program_at_every_depth(start_node):
    node = start_node(versioned("a"), nested("sup", versioned("b")), program=PROGRAM.format(version=1))
    node.up()
    upgrade(node, PROGRAM.format(version=2))
    os.kill(node.running("a")[0], signal.SIGKILL)
    a, b = node.running("a", incarnation=2) + node.running("b")
    assert versions(node) == ["a 1 version 1", "b 1 version 1", "a 2 version 1"]

    assert node.renew() == ""
    assert node.running("a", "b") == [a, b], "nothing is restarted by it"
    assert node.restart("a") == ""
    assert node.restart("sup") == ""
    node.running("a", incarnation=3)
    node.running("b", incarnation=2)
    assert versions(node)[3:] == ["a 3 version 2", "b 2 version 2"]


def test_program_that_kills_its_interpreter_leaves_the_old_zygote(start_node):
    node = start_node(versioned("a"), program=PROGRAM.format(version=1))
    node.up()
    upgrade(node, "import os; os._exit(3)")
    assert "a new zygote could not be started: it ended while it imported the program" in node.renew()
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.running("a", incarnation=2)
    assert versions(node) == ["a 1 version 1", "a 2 version 1"]


def test_children_start_while_the_zygote_is_renewed(start_node):
    node = start_node(versioned("a"), program=PROGRAM.format(version=1))
    node.up()
    upgrade(node, "import pathlib, time\nwhile not pathlib.Path(__file__).with_name('go').exists(): time.sleep(0.01)")
    node.send("renew")
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.running("a", incarnation=2)
    assert versions(node)[-1] == "a 2 version 1"
    os.kill(node.process.pid, signal.SIGTERM)
    assert node.ended().ok, "a stop does not wait for it"


def test_second_renewal_at_the_same_time_is_refused(start_node):
    node = start_node(versioned("a"), program=PROGRAM.format(version=1))
    node.up()
    upgrade(node, "import pathlib, time\nwhile not pathlib.Path(__file__).with_name('go').exists(): time.sleep(0.01)")
    node.send("renew")
    assert "is being renewed already" in node.renew()
    (node.run_dir / "go").touch()
    assert node.answer().error == ""
    eventually(lambda: node.tree().state == "running")
