"""A run directory without a launcher, and keepers that are started there by hand."""

import json
import subprocess
from pathlib import Path

from darts_async.config import RunConfig
from darts_async.machine.spawn import module_command
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import create_run_keys
from launcher.plan.plan import hub_addresses, plan_run
from launcher.preflight.preflight import link_ports
from launcher.run_dir.run_dir import create_run_dir, write_inputs


def prepared(tmp_path: Path) -> Path:
    """All that a keeper and its agent read."""
    config = RunConfig.model_validate({"runs_dir": str(tmp_path), "name": "node"})
    run_dir = create_run_dir(config)
    plan = plan_run(config, run_dir, hub_addresses(config, link_ports(config)))
    write_inputs(run_dir, config, plan)
    create_run_keys(run_dir / KEYS_DIR, plan.endpoints())
    return run_dir


def keep(run_dir: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the keeper of the node `local`."""
    command = module_command("launcher.nodes.keeper", "--run-dir", str(run_dir), "--node", "local", *options)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def detached(run_dir: Path, life: int = 1) -> dict[str, int]:
    """What a keeper says that goes on by itself."""
    done = keep(run_dir, "--life", str(life), "--detach", "30")
    assert done.returncode == 0, done.stderr
    said: dict[str, int] = json.loads(done.stdout)
    return said
