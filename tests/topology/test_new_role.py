"""A role that does not exist is added to a copy of the package by an entry in each table, and by nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

FAKES = ROOT / "tests" / "fakes"

ENTRIES = (
    (
        "roles.py",
        ')\n"""In the order of starting',
        '    UMPIRE := Role("umpire", module="darts_async.umpire.process"),\n',
    ),
    (
        "links.py",
        ')\n"""In the order of their ports',
        '    Link("umpires", SHAPER.first, (UMPIRE,), Greet, RewardReady),\n',
    ),
    ("links.py", "from darts_async.topology.roles import", "from darts_async.protocol import Greet, RewardReady\n"),
    ("links.py", "from darts_async.topology.roles import", "from darts_async.topology.roles import UMPIRE\n"),
)
"""Of each file of the tables: before what a line is put."""


@pytest.mark.slow
def test_a_role_is_one_entry_and_a_link_another(tmp_path: Path) -> None:
    for package in ("darts_async", "launcher"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, line in ENTRIES:
        path = tmp_path / "darts_async" / "topology" / name
        text = path.read_text()
        assert text.count(before) == 1, f"{name} has no one place for an entry"
        path.write_text(text.replace(before, line + before))
    home = tmp_path / "darts_async" / "umpire"
    home.mkdir()
    shutil.copy(FAKES / "umpire_process.py", home / "process.py")
    command = (sys.executable, "-P", str(FAKES / "umpire_run.py"), str(tmp_path / "runs"))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("package") == str(tmp_path / "darts_async"), "the copy is what ran"
    assert told == {
        "processes": ["shaper/0", "learner/0", "reward/0", "generator/0", "umpire/0", "umpire/1"],
        "link": ["shaper/0", "umpire/0", "umpire/1"],
        "is_told_the_launcher": True,
        "addresses": 7,
        "min_healthy": 2,
        "is_in_the_template": True,
        "faults": ["umpires"],
        "refusal": None,
        "heard": ["RewardReady(num_workers=7)", "watching"],
        "code": 0,
        "printed": "",
    }
