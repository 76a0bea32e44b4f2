"""Plans a run with umpires, starts one as a process, and says as JSON what came of it. See `topology.test_new_role`.

python -P umpire_run.py DIRECTORY
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import darts_async
from darts_async.config import RunConfig
from darts_async.faults import parse_faults
from darts_async.machine.spawn import spawn
from darts_async.protocol import Greet, ProcessStatus, Shutdown
from darts_async.topology.links import link_named
from darts_async.topology.plan import RunPlan
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import Endpoint, Link, Mailbox, PeerUp, Received, create_run_keys, load_keys
from launcher.commands.template import run_template
from launcher.lifecycle.restarts import Restarts
from launcher.plan.plan import hub_addresses, plan_run
from launcher.preflight.preflight import link_ports
from launcher.run.boundary import Boundary
from launcher.run_dir.run_dir import create_run_dir, write_inputs

UMPIRE = "umpire/0"
PATIENCE_S = 60.0


def main() -> None:
    settings = {"roles": {"umpire": {"replicas": 2, "restart": {"min_healthy": 2}}}, "runs_dir": sys.argv[1]}
    config = RunConfig.model_validate(settings)
    run_dir = create_run_dir(config)
    plan = plan_run(config, run_dir, hub_addresses(config, link_ports(config)))
    write_inputs(run_dir, config, plan)
    create_run_keys(run_dir / KEYS_DIR, plan.endpoints())
    _, faults = parse_faults("drop umpires:0.1", UMPIRE)
    status = ProcessStatus("watching", -1, 0, 0, 0.0, {}, 0.0)
    told = {
        "package": str(Path(darts_async.__file__).parent),
        "processes": [spec.name for spec in plan.processes],
        "link": [plan.link("umpires").hub, *plan.link("umpires").members],
        "is_told_the_launcher": UMPIRE in plan.link("launcher").members,
        "addresses": len({link.address for link in plan.links}),
        "min_healthy": Restarts(plan, config.roles, 0).policies[UMPIRE].min_healthy,
        "is_in_the_template": "umpire:" in run_template(),
        "faults": [fault.link for fault in faults],
        "refusal": Boundary(plan, 1).refusal(UMPIRE, status),
        **asyncio.run(watched(config, plan, run_dir)),
    }
    sys.stdout.write(json.dumps(told))


async def watched(config: RunConfig, plan: RunPlan, run_dir: Path) -> dict[str, Any]:
    """Start an umpire as the plan says, be its hub and its launcher until it has left."""
    mailbox, links, heard = Mailbox(), {}, []
    endpoints = [bind(config, plan, run_dir, name, links, mailbox) for name in ("umpires", "launcher")]
    spec = plan.process(UMPIRE)
    with (run_dir / "output").open("wb") as output:
        process = await spawn(spec.argv, stdout=output, stderr=asyncio.subprocess.STDOUT, env=spec.env)
    async with asyncio.timeout(PATIENCE_S):
        while process.returncode is None:
            for event in await mailbox.receive(0.1):
                match event:
                    case PeerUp(link="umpires", peer=peer):
                        links["umpires"].send(peer, Greet(7))
                    case Received(link="umpires", message=message):
                        heard.append(str(message))
                        links["launcher"].send(UMPIRE, Shutdown("seen", finished=True))
                    case Received(message=ProcessStatus(state=state)) if state not in heard:
                        heard.append(state)
    for endpoint in endpoints:
        await endpoint.close()
    return {"heard": sorted(heard), "code": process.returncode, "printed": (run_dir / "output").read_text()}


def bind(
    config: RunConfig, plan: RunPlan, run_dir: Path, name: str, links: dict[str, Link], mailbox: Mailbox
) -> Endpoint:
    link, said = plan.link(name), link_named(name)
    keys = load_keys(run_dir / KEYS_DIR, link.hub)
    endpoint = Endpoint(link.hub, 1, keys, config.transport, mailbox)
    allowed = {member: keys.public_of(member) for member in link.members}
    links[name] = endpoint.bind_link(
        name=name, address=link.address, receives=said.member_sends, sends=said.hub_sends, allowed=allowed
    )
    return endpoint


if __name__ == "__main__":
    main()
