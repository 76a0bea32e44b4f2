"""A run that draws from a mixture and evaluates on a further set, each with a reward function of its own."""

from pathlib import Path

import pytest
import yaml

from tests.whole_runs.test_end_to_end import CONFIGS, assert_no_process_is_left, check_ledger, ended, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SOURCE = "darts_async.quickstart.task:prompts"
FUNCTIONS = """
def graded(*, prompt, response, answer, metadata, finish_reason):
    return 0.25

def strict(*, prompt, response, answer, metadata, finish_reason):
    return 0.75
"""


def test_each_part_and_set_has_its_reward_and_its_numbers(tmp_path: Path) -> None:
    settings = yaml.safe_load((CONFIGS / "scripted.yaml").read_text())
    mixture = [
        {"name": "often", "weight": 3.0, "source": SOURCE, "num_train": 32, "held_out": 4},
        {"name": "rare", "source": SOURCE, "num_train": 64, "held_out": 4, "reward": "functions:strict"},
    ]
    settings["prompts"] = {"mixture": mixture, "max_prompt_tokens": 64}
    settings["reward"] = {"function": "functions:graded"}
    probe = {"name": "probe", "source": SOURCE, "held_out": 6, "reward": "functions:strict"}
    settings["evaluation"] |= {"sets": [probe], "pass_above": 0.5}
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(settings))
    run = ended(launch(config), config)
    assert run.code == 0, run.output
    check_ledger(run, config)
    assert_no_process_is_left(run.run_dir)
    for line in (line for line in run.metrics() if line["type"] == "evaluation"):
        means = {name: line[f"sets/{name}/reward/mean"] for name in ("often", "rare", "probe")}
        assert means == {"often": 0.25, "rare": 0.75, "probe": 0.75}
        assert (line["sets/often/pass@1"], line["sets/probe/pass@1"]) == (0.0, 1.0)
        assert line["reward/mean"] == pytest.approx((4 * 0.25 + 10 * 0.75) / 14)
    assert "of which often 0.250, rare 0.750, probe 0.750" in run.output
