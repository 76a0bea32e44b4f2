"""What the shaper process adds to its state: files."""

from pathlib import Path

from darts_async.shaper.history import History
from darts_async.shaper.process import load_history, save_history


def test_what_was_learnt_about_prompts_is_there_when_the_run_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    assert load_history(path).num_visits(3) == 0
    history = History()
    history.observe(3, [10, 20, 40], [15, 80], [0.0, 1.0, 1.0])
    save_history(path, history)
    restored = load_history(path)
    assert restored.length(3) == history.length(3)
    assert restored.pass_rate(3) == history.pass_rate(3)
    assert restored.to_state() == history.to_state()
    assert [p.name for p in tmp_path.iterdir()] == ["history.json"]
