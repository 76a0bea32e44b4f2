"""A whole run with vLLM as the generator, from one command: weights reach it, and it decodes with them."""

from pathlib import Path

import pytest

from tests.generator.vllm.world import needs_vllm
from tests.whole_runs.test_end_to_end import check_ledger, config_file, ended, launch

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_few_steps_on_vllm_publish_every_version_and_account_for_every_token(tmp_path: Path) -> None:
    config = config_file(
        tmp_path,
        "quickstart_vllm.yaml",
        learner={"steps": 3, "groups_per_step": 4},
        prompts={"held_out": 4},
        evaluation={"samples_per_prompt": 1},
        sampling={"max_new_tokens": 64},
        generator={"max_context_tokens": 128},
        weights={"probe_tolerance_nats": 0.001},
    )
    run = ended(launch(config), config)
    assert run.code == 0, run.output
    steps = [line for line in run.metrics() if "weights/stall_s" in line]
    assert len(steps) == 3
    assert all(line["weights/num_bytes"] > 0 for line in steps)
    check_ledger(run, config)
