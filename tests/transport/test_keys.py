"""Keys of a run: private files, and errors that say what to do."""

import stat
from pathlib import Path

import pytest

from darts_async.errors import TransportError
from darts_async.transport import create_run_keys, load_keys

NAMES = ["shaper", "generator/0", "generator/1"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "keys"
    create_run_keys(directory, NAMES)
    return directory


def test_every_process_knows_all_public_keys_and_its_own_secret(directory: Path) -> None:
    keys = {name: load_keys(directory, name) for name in NAMES}
    assert len({key.secret_key for key in keys.values()}) == len(NAMES)
    for name in NAMES:
        assert all(key.public_of(name) == keys[name].public_key for key in keys.values())


def test_files_are_private(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


def test_secret_does_not_show_in_a_repr(directory: Path) -> None:
    keys = load_keys(directory, "shaper")
    assert keys.secret_key not in repr(keys)


def test_readable_file_is_refused_with_the_fix(directory: Path) -> None:
    path = directory / "shaper.json"
    path.chmod(0o640)
    with pytest.raises(TransportError, match=r"mode 0640.*chmod 0600"):
        load_keys(directory, "shaper")


def test_readable_directory_is_refused(directory: Path) -> None:
    directory.chmod(0o755)
    with pytest.raises(TransportError, match=r"mode 0755.*chmod 0700"):
        load_keys(directory, "shaper")


def test_missing_and_malformed_files_are_named(directory: Path) -> None:
    with pytest.raises(TransportError, match=r"no keys at .*reward%2F0\.json"):
        load_keys(directory, "reward/0")
    (directory / "shaper.json").write_text('{"public_key": "short"}')
    with pytest.raises(TransportError, match=r"cannot read keys from .*shaper\.json"):
        load_keys(directory, "shaper")


def test_unknown_name_is_refused(directory: Path) -> None:
    with pytest.raises(TransportError, match="no key was made for 'reward/0'"):
        load_keys(directory, "shaper").public_of("reward/0")


def test_keys_of_another_run_are_refused(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_run_keys(other, NAMES)
    (directory / "shaper.json").write_bytes((other / "shaper.json").read_bytes())
    with pytest.raises(TransportError, match="are not of the run"):
        load_keys(directory, "shaper")


def test_keys_are_never_overwritten(directory: Path) -> None:
    with pytest.raises(TransportError, match="keys are created once per life of a run"):
        create_run_keys(directory, NAMES)
