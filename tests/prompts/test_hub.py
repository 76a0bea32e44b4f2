"""Data sets of the hub: found in its cache and in copies, by subset, split and revision; mistakes are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from darts_async.config import RunConfig
from darts_async.errors import ConfigError, DataError
from darts_async.prompts.hub import UnreachableError, find_split, with_commits
from darts_async.prompts.load import PromptSets, load_prompts
from launcher.commands import cli
from launcher.preflight.preflight import Findings, check_data_files
from tests.support.byte_tokenizer import write_tokenizer

NEWEST, SMALL = "a" * 40, "b" * 40
README = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: [main/test-a*, main/test-b*]}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
# Sums
"""


def write_rows(path: Path, *numbers: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{path.parent.name} {path.name} {n}", "answer": f"so #### {n}"} for n in numbers]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def lay_out(root: Path, readme: str | None = README) -> Path:
    """A data set of two subsets."""
    write_rows(root / "main" / "train-00000-of-00002.jsonl", 1, 2, 3)
    write_rows(root / "main" / "train-00001-of-00002.jsonl", 4)
    write_rows(root / "main" / "test-a.jsonl", 5, 6)
    write_rows(root / "main" / "test-b.jsonl", 7)
    write_rows(root / "socratic" / "train-00000-of-00001.jsonl", 8, 9)
    if readme is not None:
        (root / "README.md").write_text(readme)
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, which has two commits of a data set; the hub itself is out of reach."""
    home = tmp_path / "cache" / "datasets--somebody--sums"
    lay_out(home / "snapshots" / NEWEST)
    write_rows(home / "snapshots" / SMALL / "train.jsonl", 9, 10)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(NEWEST)
    (home / "refs" / "small").write_text(SMALL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(model_dir: Path, **prompts: Any) -> PromptSets:
    asked = {"source": "hub", "prompt_field": "question", "answer_pattern": r"####\s*(.+)", "held_out": 1} | prompts
    return load_prompts(RunConfig.model_validate({"model": {"path": str(model_dir)}, "prompts": asked}))


def answers(*prompts: Any) -> list[int]:
    return sorted(int(prompt.answer) for prompt in prompts)


@pytest.mark.slow
def test_a_split_is_read_from_the_cache_and_another_one_is_held_out(cache: Path) -> None:
    model = write_tokenizer(cache / "model")
    sets = loaded(model, path="somebody/sums", subset="main", held_out_split="test", held_out=3)
    assert answers(*sets.train) == [1, 2, 3, 4]
    assert answers(*sets.held_out) == [5, 6, 7]
    both = loaded(model, path="somebody/sums", subset="socratic", split="train", held_out=1)
    assert answers(*both.train, *both.held_out) == [8, 9]


@pytest.mark.slow
def test_a_revision_is_read(cache: Path) -> None:
    sets = loaded(write_tokenizer(cache / "model"), path="somebody/sums", revision="small")
    assert answers(*sets.train, *sets.held_out) == [9, 10]


@pytest.mark.slow
def test_a_run_keeps_the_commits_that_it_begins_with(cache: Path) -> None:
    of_hub = {"source": "hub", "path": "somebody/sums"}
    copy = {"source": "hub", "path": str(lay_out(cache / "copy"))}
    mixture = [of_hub | {"name": "a"}, of_hub | {"name": "b", "revision": "small"}, copy | {"name": "c"}]
    sets = [of_hub | {"name": "d"}, of_hub | {"name": "e", "revision": "c" * 40}, {"name": "f"}]
    given = RunConfig.model_validate({"prompts": {"mixture": mixture}, "evaluation": {"sets": sets}})
    kept = with_commits(given)
    found = {section.name: section.revision for section in (*kept.prompts.mixture, *kept.evaluation.sets)}
    assert found == {"a": NEWEST, "b": SMALL, "c": None, "d": NEWEST, "e": "c" * 40, "f": None}
    assert RunConfig.model_validate(kept.model_dump(mode="json")) == kept

    model = write_tokenizer(cache / "model")
    alone = {"model": {"path": str(model)}, "prompts": of_hub | {"subset": "socratic", "prompt_field": "question"}}
    begun = with_commits(RunConfig.model_validate({**alone, "prompts": alone["prompts"] | {"held_out": 1}}))
    before = load_prompts(begun)
    (cache / "cache" / "datasets--somebody--sums" / "refs" / "main").write_text(SMALL)
    assert [each.text for each in load_prompts(begun).train] == [each.text for each in before.train]
    with pytest.raises(UnreachableError, match="'somebody/else' is not a local directory"):
        with_commits(RunConfig.model_validate({"prompts": {"source": "hub", "path": "somebody/else"}}))


@pytest.mark.slow
def test_the_settings_that_a_run_writes_have_the_commits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[RunConfig]()

    def begin(config: RunConfig) -> None:
        begun.append(config)
        raise ConfigError("no further")

    monkeypatch.setattr(cli, "check_run", lambda *_, **__: Findings((), (), None))
    monkeypatch.setattr(cli, "create_run_dir", begin)
    Path("cluster.yaml").write_text("prompts: {source: hub, path: somebody/sums}\n")
    assert CliRunner().invoke(cli.app, ["cluster.yaml"]).exit_code == 2
    assert [config.prompts.revision for config in begun] == [NEWEST]
    done = CliRunner().invoke(cli.app, ["cluster.yaml", "prompts.path=somebody/else"])
    assert (done.exit_code, len(begun)) == (2, 1)
    assert "the data set 'somebody/else' is not a local directory" in done.output


def test_a_copy_is_read_as_the_data_set_is(tmp_path: Path) -> None:
    found = find_split(str(lay_out(tmp_path)), subset="main", split="test", revision=None)
    assert [file.name for file in found.files] == ["test-a.jsonl", "test-b.jsonl"]
    assert found.file_format == "jsonl"


@pytest.mark.parametrize(
    ("names", "subset", "chosen"),
    [
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-0.jsonl"], None, [0, 1]),
        (["train.jsonl", "test.jsonl", "training_notes.jsonl"], None, [0]),
        (["main/train/0000.jsonl", "main/train/0001.jsonl", "other/train/0000.jsonl"], "main", [0, 1]),
        (["main/train/0000.jsonl", ".cache/train/0000.jsonl"], None, [0]),
    ],
)
def test_without_a_readme_the_names_of_files_tell(
    tmp_path: Path, names: list[str], subset: str | None, chosen: list[int]
) -> None:
    for name in names:
        write_rows(tmp_path / name, 1)
    found = find_split(str(tmp_path), subset=subset, split="train", revision=None)
    assert [file.relative_to(tmp_path).as_posix() for file in found.files] == [names[place] for place in chosen]


@pytest.mark.parametrize(
    "head",
    [
        "configs: [{config_name: default, data_files: main/test-*}]",
        "configs: [{config_name: default, data_files: [main/test-a*, main/test-b*]}]",
        "configs: [{config_name: main, data_dir: main, data_files: {train: test-*, rest: train-*}}]",
        "configs: [{config_name: a, data_files: x}, {config_name: b, default: true, data_files: main/test-*}]",
    ],
)
def test_every_form_in_which_a_readme_names_files_is_understood(tmp_path: Path, head: str) -> None:
    found = find_split(str(lay_out(tmp_path, f"---\n{head}\n---\n")), subset=None, split="train", revision=None)
    assert [file.name for file in found.files] == ["test-a.jsonl", "test-b.jsonl"]


@pytest.mark.parametrize(
    ("readme", "asked", "message"),
    [
        (README, {}, "has the subsets main, socratic; name one in prompts.subset"),
        (README, {"subset": "mian"}, "has no subset 'mian'; it has main, socratic; did you mean 'main'"),
        (README, {"subset": "main", "split": "tset"}, "has no split 'tset'; it has train, test; did you mean 'test'"),
        (None, {"subset": "main", "split": "dev"}, "no files of the split 'dev' of the subset 'main'; there are main/"),
        (None, {}, "has the subsets main, socratic; name one"),
        ("---\na: [\n---\n", {}, "the head of .*README.md cannot be read"),
        ("---\nconfigs: [{data_files: '*.csv'}]\n---\n", {}, "found none, .* prompts.revision: refs/convert/parquet"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(
    tmp_path: Path, readme: str | None, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_split(str(lay_out(tmp_path, readme)), **{"subset": None, "split": "train", "revision": None} | asked)


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs: [{data_files: '*.csv'}]\n---\n")
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"found \['.csv'\], and one of \['.jsonl', '.parquet'\] is needed"):
        find_split(str(tmp_path), subset=None, split="train", revision=None)


@pytest.mark.slow
def test_a_data_set_that_is_out_of_reach_is_a_problem_of_this_machine(cache: Path) -> None:
    with pytest.raises(UnreachableError, match=r"'somebody/else' \(revision 'v2'\) is not a local directory"):
        find_split("somebody/else", subset=None, split="train", revision="v2")
    for path, here in (("somebody/else", True), ("somebody/sums", False)):
        config = RunConfig.model_validate({"prompts": {"source": "hub", "path": path}})
        (problem,) = check_data_files(config)
        assert (problem.place, problem.here) == ("prompts.path", here)


@pytest.mark.slow
def test_parquet_of_a_data_set_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "data" / "train-0.parquet", 1, 2)
    sets = loaded(write_tokenizer(tmp_path / "model"), path=str(tmp_path / "set"))
    assert answers(*sets.train, *sets.held_out) == [1, 2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"source": "hub"}, "prompts.source is 'hub', which needs prompts.path"),
        (
            {"source": "hub", "path": "a/b", "held_out_path": "c"},
            "prompts.held_out_path is set.*held_out_split is there",
        ),
        ({"source": "jsonl", "path": "a", "split": "test"}, "prompts.split is set, which is of the source 'hub'"),
    ],
)
def test_settings_that_do_not_fit_a_data_set_are_refused(prompts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate({"prompts": prompts})


def test_a_copy_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"prompts.revision is .v2., but .* is a local directory; leave the revision out"
    ):
        find_split(str(lay_out(tmp_path)), subset="main", split="test", revision="v2")
