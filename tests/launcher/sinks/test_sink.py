"""What services are shown of a run."""

from darts_async.config import RunConfig
from launcher.sinks.sink import settings_for


def test_no_password_of_an_address_and_no_node_goes_to_a_service() -> None:
    config = RunConfig.model_validate(
        {
            "telemetry": {"sinks": ["mlflow"], "mlflow": {"tracking_uri": "https://me:secret@host:5000/path?a=b@c"}},
            "prompts": {"path": "a@b.jsonl", "source": "jsonl"},
        }
    )
    shown = settings_for(config)
    assert "secret" not in str(shown)
    assert shown["telemetry"]["mlflow"]["tracking_uri"] == "https://host:5000/path?a=b@c"
    assert shown["prompts"]["path"] == "a@b.jsonl"
    assert "nodes" not in shown
