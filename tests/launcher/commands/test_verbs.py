"""Requests over the Unix socket of a run, and the verbs that need no live run."""

import asyncio
import json
import os
import select
import socket
import stat
import subprocess
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from darts_async.config import RunConfig
from darts_async.topology.plan import encode_plan
from darts_async.topology.run_files import CONTROL_SOCKET, older_path
from launcher.analysis.earlier_lives import held
from launcher.commands.cli import app
from launcher.commands.verbs import split_words
from launcher.config_file import load_config
from launcher.control.control_socket import MAX_REQUEST_BYTES, NotRunningError, ask, serving_requests
from launcher.control.requests import Done, GetStatus, Refused, Reply, Request, RestartProcess, StopRun
from launcher.display.summary import summarise
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.plan.plan import link_addresses, plan_run
from launcher.progress.run_view import RunView
from launcher.run_dir.logs import LogTail, bound_outputs, last_lines, last_words
from launcher.run_dir.place import inode_of
from launcher.run_dir.run_dir import RunRecord, write_record, write_summary
from tests.support.launched import CONFIGS

PLAN = plan_run(RunConfig(), Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7006)))


def echo(request: Request) -> Reply:
    return Done(repr(request))


@pytest.mark.parametrize("depth", [0, 9], ids=["short path", "longer than a socket's address"])
async def test_a_request_is_answered_and_the_socket_goes_with_the_server(tmp_path: Path, depth: int) -> None:
    run_dir = tmp_path.joinpath(*["a-directory-of-some-length"] * depth)
    run_dir.mkdir(parents=True, exist_ok=True)
    num_descriptors = len(os.listdir("/proc/self/fd"))
    async with serving_requests(run_dir, echo):
        for request in (GetStatus(), RestartProcess("generator/0"), StopRun("why")):
            assert await asyncio.to_thread(ask, run_dir, request) == Done(repr(request))
        assert stat.S_ISSOCK((run_dir / CONTROL_SOCKET).stat().st_mode)
    assert not (run_dir / CONTROL_SOCKET).exists()
    with pytest.raises(NotRunningError, match="no launcher is running in"):
        ask(run_dir, GetStatus())
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


async def test_a_socket_that_a_killed_launcher_left_is_nobody_and_does_not_bar_the_next(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / CONTROL_SOCKET))
    with pytest.raises(NotRunningError, match="no launcher is running in"):
        ask(tmp_path, GetStatus())
    async with serving_requests(tmp_path, echo):
        assert await asyncio.to_thread(ask, tmp_path, GetStatus()) == Done("GetStatus()")


def answer_of(run_dir: Path) -> Reply | None:
    try:
        return ask(run_dir, GetStatus())
    except NotRunningError:
        return None


async def test_a_socket_that_somebody_removes_is_made_again_and_never_in_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.control.control_socket.LOOK_EVERY_S", 0.01)
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    run_dir.mkdir()
    num_descriptors = len(os.listdir("/proc/self/fd"))
    async with serving_requests(run_dir, echo):
        for _ in range(2):
            (run_dir / CONTROL_SOCKET).unlink()
            async with asyncio.timeout(10):
                while (reply := await asyncio.to_thread(answer_of, run_dir)) is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert reply == Done("GetStatus()")
        run_dir.rename(moved)
        run_dir.mkdir()
        await asyncio.sleep(0.05)
        assert not (run_dir / CONTROL_SOCKET).exists()
        (moved / CONTROL_SOCKET).unlink()
        run_dir.rmdir()
        moved.rename(run_dir)
        async with asyncio.timeout(10):
            while not (run_dir / CONTROL_SOCKET).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert not (run_dir / CONTROL_SOCKET).exists()
    assert len(os.listdir("/proc/self/fd")) == num_descriptors


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"[]\n",
        b'{"type": "Reboot"}\n',
        b'{"type": "GetStatus", "more": 1}\n',
        b"\xff\n",
        b"x" * MAX_REQUEST_BYTES * 3,
    ],
    ids=["empty", "a list", "unknown", "more", "no text", "too long"],
)
async def test_what_is_not_a_request_is_refused_and_harms_nobody(tmp_path: Path, line: bytes) -> None:
    async with serving_requests(tmp_path, echo):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / CONTROL_SOCKET))
        writer.write(line)
        async with asyncio.timeout(10):
            reply = json.loads(await reader.readline())
        assert reply["type"] == "Refused"
        writer.close()
        assert await asyncio.to_thread(ask, tmp_path, GetStatus()) == Done("GetStatus()")


async def test_a_refusal_reaches_who_asked(tmp_path: Path) -> None:
    async with serving_requests(tmp_path, lambda request: Refused("no")):
        assert await asyncio.to_thread(ask, tmp_path, GetStatus()) == Refused("no")


async def test_a_client_that_does_not_read_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.control.control_socket.REQUEST_TIMEOUT_S", 0.1)
    async with serving_requests(tmp_path, lambda request: Done("x" * (1 << 24))):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / CONTROL_SOCKET))
            client.sendall(b'{"type": "GetStatus"}\n')
            end = select.poll()
            end.register(client, 0)  # and only the hang-up is told
            assert await asyncio.to_thread(end.poll, 10_000)


# --- the newest live run ---------------------------------------------------------------------------------------


def run_dir_of(runs_dir: Path, name: str, status: str, started_at_s: float) -> Path:
    run_dir = runs_dir / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("name: a\n")
    write_record(run_dir, RunRecord(status, "why", started_at_s, None, 1))  # type: ignore[arg-type]
    return run_dir


async def test_the_newest_run_that_is_live_is_meant(tmp_path: Path) -> None:
    older = run_dir_of(tmp_path, "older", "running", 1.0)
    newer = run_dir_of(tmp_path, "newer", "running", 2.0)
    run_dir_of(tmp_path, "killed", "running", 3.0)
    run_dir_of(tmp_path, "over", "finished", 4.0)
    arguments = ["down", "--runs-dir", str(tmp_path), "--timeout", "0"]
    heard: list[str] = []

    def hear(name: str) -> Done:
        heard.append(name)
        return Done("")

    with held(older), held(newer):
        async with serving_requests(older, lambda _: hear("older")), serving_requests(newer, lambda _: hear("newer")):
            result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert "newer has not ended within 0 s" in result.output.replace("\n", "")
        assert (result.exit_code, set(heard)) == (1, {"newer"})
        async with serving_requests(older, lambda _: hear("older")):
            await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert heard[-1] == "older", "one that answers comes first"


async def test_a_run_whose_record_is_damaged_does_not_hide_the_others(tmp_path: Path) -> None:
    live = run_dir_of(tmp_path, "live", "running", 1.0)
    for name, data in (("torn", b'{"status": "ru'), ("bytes", b'{"status": "\xff"}'), ("empty", b"")):
        (run_dir_of(tmp_path, name, "running", 2.0) / "state.json").write_bytes(data)
    with held(live):
        async with serving_requests(live, lambda _: Done("")):
            code, output = await asyncio.to_thread(said, ["down", "--runs-dir", str(tmp_path), "--timeout", "0"])
    assert (code, "live has not ended within 0 s; its launcher is pid 1" in output) == (1, True), output


def test_verbs_that_read_files_take_the_newest_run_and_say_which(tmp_path: Path) -> None:
    run_dir_of(tmp_path, "older", "running", 1.0)
    newer = run_dir_of(tmp_path, "newer", "finished", 4.0)
    result = CliRunner().invoke(app, ["status", "--runs-dir", str(tmp_path)])
    assert (result.exit_code, result.stderr.replace("\n", "")) == (0, str(newer))
    assert "newer: finished" in result.stdout.replace("\n", "")
    for verb in (["logs", "shaper"], ["audit"], ["story", "7/3"], ["trace"], ["report"], ["resume", "seed=1"]):
        result = CliRunner().invoke(app, [*verb, "--runs-dir", str(tmp_path / "nothing")])
        assert result.exit_code == 2
        assert "there is no run in" in result.output


@pytest.mark.parametrize("verb", [["restart", "generator/0"], ["down"]])
def test_a_verb_without_a_live_run_is_bad_input(tmp_path: Path, verb: list[str]) -> None:
    over = run_dir_of(tmp_path, "over", "finished", 4.0)
    (over / "plan.json").write_text('{"processes": [], "links": []}')
    result = CliRunner().invoke(app, [*verb, "--runs-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "no run is live in" in result.output
    assert "name one of its 1 runs as RUN_DIR; the newest is" in " ".join(result.output.split())
    result = CliRunner().invoke(app, [*verb, str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "is not a run directory" in result.output


def test_a_run_whose_launcher_was_killed_is_named_so(tmp_path: Path) -> None:
    killed = run_dir_of(tmp_path, "killed", "running", 3.0)
    for verb in (["down", str(killed)], ["status", str(killed)]):
        result = CliRunner().invoke(app, verb)
        assert (result.exit_code, "it was killed" in " ".join(result.output.split())) == (2, True)


def test_the_status_of_a_run_that_has_ended_has_its_totals(tmp_path: Path) -> None:
    run_dir = run_dir_of(tmp_path, "over", "finished", 3.0)
    assert said(["status", str(run_dir)]) == (0, f"{run_dir}: finished: why"), "without totals"
    view = RunView(PLAN, name="mine", run_dir=str(run_dir), total_steps=7, now_s=0.0)
    outcome = RunOutcome("finished", "why")
    write_summary(run_dir, summarise(view, outcome, model_path=None, now_s=65.0))
    code, output = said(["status", str(run_dir)])
    assert (code, "mine finished: 0 of 7 steps in 1:05" in output) == (0, True), output
    (run_dir / "summary.json").write_text("{}")
    code, output = said(["status", str(run_dir)])
    assert (code, "is not a summary of this version" in output) == (2, True), output


def said(arguments: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("verb", [["down"], ["status"], ["restart", "reward"]])
def test_a_run_that_starts_or_ends_is_not_called_killed(tmp_path: Path, verb: list[str]) -> None:
    run_dir = run_dir_of(tmp_path, "a", "running", 1.0)
    (run_dir / "plan.json").write_bytes(encode_plan(PLAN))
    with held(run_dir):  # its launcher lives, and takes no requests
        timeout = ["--timeout", "0"] if verb == ["down"] else []
        code, output = said([*verb, str(run_dir), *timeout])
    assert code == (1 if verb == ["down"] else 2)
    assert "killed" not in output
    assert ("has not ended within 0 s" if verb == ["down"] else "is starting, ending, hanging or elsewhere") in output


def test_down_at_the_moment_a_run_ends_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = run_dir_of(tmp_path, "a", "running", 1.0)

    def end(_: float) -> None:
        write_record(run_dir, RunRecord("finished", "all steps taken", 1.0, 2.0, 1))

    monkeypatch.setattr("launcher.commands.verbs.time.sleep", end)
    with held(run_dir):
        assert said(["down", str(run_dir)]) == (0, f"{run_dir}: finished: all steps taken")


async def test_down_at_the_moment_a_run_is_resumed_ends_it_once_it_takes_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_dir_of(tmp_path, "a", "stopped", 1.0)  # the record of the life before
    (run_dir / "plan.json").write_bytes(encode_plan(PLAN))
    loop = asyncio.get_running_loop()
    resumed = threading.Event()
    asked: list[Request] = []

    def hear(request: Request) -> Reply:
        asked.append(request)
        return Done("the run is stopping")

    def wait(_: float) -> None:
        """Between two looks of `down`."""
        if not resumed.is_set():
            loop.call_soon_threadsafe(begin.set)
            assert resumed.wait(30)
        elif asked:
            write_record(run_dir, RunRecord("stopped", "by down", 2.0, 3.0, 1, life=2))

    begin = asyncio.Event()
    monkeypatch.setattr("launcher.commands.verbs.time.sleep", wait)
    with held(run_dir):
        down = asyncio.create_task(asyncio.to_thread(said, ["down", str(run_dir)]))
        await begin.wait()
        write_record(run_dir, RunRecord("running", "", 2.0, None, 1, life=2))
        async with serving_requests(run_dir, hear):
            resumed.set()
            assert await down == (0, f"{run_dir}: stopped: by down")
    assert len(asked) == 1


def test_a_run_that_is_live_and_has_lost_its_record_is_not_said_to_be_dead(tmp_path: Path) -> None:
    run_dir = run_dir_of(tmp_path, "a", "running", 1.0)
    (run_dir / "state.json").unlink()
    for verb in ("status", "down"):
        code, output = said([verb, str(run_dir)])
        assert (code, f"`darts-launch resume {run_dir}` continues the run" in output) == (2, True), output
    with held(run_dir):
        for verb in ("status", "down"):
            code, output = said([verb, str(run_dir)])
            assert (code, "its launcher is alive: Ctrl-C or SIGTERM ends it" in output) == (2, True), output
            assert "resume" not in output
        code, output = said(["resume", str(run_dir)])
        assert (code, "is live (a launcher)" in output) == (2, True), output


async def test_a_copy_is_called_one_and_nothing_reaches_the_original_through_it(tmp_path: Path) -> None:
    """Also where its files are links to those of the original, its socket and its lock among them."""
    original = run_dir_of(tmp_path, "a", "running", 1.0)
    write_record(original, RunRecord("running", "", 1.0, None, 1, inode=inode_of(original)))
    (original / "plan.json").write_bytes(encode_plan(PLAN))
    heard: list[Request] = []

    def hear(request: Request) -> Reply:
        heard.append(request)
        return Refused("by the original")

    with held(original):
        async with serving_requests(original, hear):
            for name, option in (("copied", "-a"), ("linked", "-al")):
                copy = tmp_path / name
                await asyncio.to_thread(subprocess.run, ["cp", option, original, copy], check=True)
                for verb in (["down"], ["status"], ["restart", "reward"]):
                    code, output = await asyncio.to_thread(said, [*verb, str(copy)])
                    assert (code, "it is a copy" in output) == (2, True), output
                    assert f"`darts-launch resume {copy}`" in output
            code, output = await asyncio.to_thread(said, ["resume", str(tmp_path / "linked")])
            assert (code, "are hard links to those of another run directory" in output) == (2, True)
            code, output = await asyncio.to_thread(said, ["down", str(original)])
            assert (code, "by the original" in output) == (2, True)
    assert len(heard) == 1


# --- logs and init ---------------------------------------------------------------------------------------------


def test_a_tail_gives_whole_lines_once_however_they_come(tmp_path: Path) -> None:
    path = tmp_path / "generator-0.jsonl"
    tail = LogTail(path, "generator/0")
    assert list(tail.new_lines()) == []
    path.write_text('{"level": "info", "event": "begun", "x": 1}\nTrace')
    assert list(tail.new_lines()) == ["generator/0  info begun x=1"]
    with path.open("a") as file:
        file.write("back\n\nend\n")
    assert list(tail.new_lines()) == ["generator/0  Traceback", "generator/0  end"]
    assert list(tail.new_lines()) == []
    assert LogTail(path, "a").skip_to_last(1) == ["a  end"]
    assert LogTail(path, "a").skip_to_last(0) == []


def test_a_tail_follows_a_log_that_was_put_away_and_one_that_was_emptied(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tail = LogTail(path, "a")
    path.write_text("1\n2\n")
    assert list(tail.new_lines()) == ["a  1", "a  2"]
    with path.open("a") as file:
        file.write("3\n")
    path.rename(older_path(path))
    assert list(tail.new_lines()) == ["a  3"]
    path.write_text("4\n")
    assert list(tail.new_lines()) == ["a  4"]
    assert list(tail.new_lines()) == []
    assert LogTail(path, "a").skip_to_last(3) == ["a  2", "a  3", "a  4"]
    path.write_text("")
    assert list(tail.new_lines()) == []
    with path.open("a") as file:
        file.write("5\n")
    assert list(tail.new_lines()) == ["a  5"]


def test_a_line_that_never_ends_is_shown_in_pieces_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.out"
    path.write_bytes(b"x" * (5 << 20))
    tail = LogTail(path, "a")
    assert sum(len(line) for line in tail.skip_to_last(100)) > 3 << 20
    assert len(tail._torn) <= 2 << 20


def test_the_last_words_of_a_process_are_its_error(tmp_path: Path) -> None:
    path = tmp_path / "learner-0.out"
    assert last_words(tmp_path, "learner/0") == ""
    path.write_text("loading\nlearner/0: ModelError: no \x1b[31mweights\nTraceback\n  +------------\n")
    assert last_words(tmp_path, "learner/0") == "ModelError: no \\u001b[31mweights"
    path.write_text("Traceback (most recent call last):\n  | ImportError: no module\n  +------------\n")
    assert last_words(tmp_path, "learner/0") == "ImportError: no module"
    os.utime(path, (0, 0))
    assert last_words(tmp_path, "learner/0") == "", "it is of an earlier end"


def test_what_a_process_prints_is_bounded_while_it_holds_its_file_open(tmp_path: Path) -> None:
    path = tmp_path / "reward-0.out"
    with path.open("ab", buffering=0) as output:
        for number in range(400):
            output.write(f"line {number:04}\n".encode())
            bound_outputs(tmp_path, ["reward/0", "shaper/0"], 1000)
            assert sum(each.stat().st_size for each in tmp_path.iterdir()) <= 1000 + 20
    lines = (older_path(path).read_text() + path.read_text()).splitlines()
    assert lines[-1] == "line 0399"
    assert len(lines) > 40
    assert last_lines(tmp_path, "reward/0", 50)[-1] == "line 0399"


def test_init_writes_a_short_file_for_data_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "mine.yaml"])
    assert (result.exit_code, "darts-launch validate mine.yaml" in result.output) == (0, True)
    text = Path("mine.yaml").read_text()
    assert len(text.splitlines()) < 45
    named = load_config(Path("mine.yaml"))
    assert (named.prompts.source, named.prompts.path, named.reward.function) == ("jsonl", "data.jsonl", "math")
    default = RunConfig()
    assert (named.learner, named.sampling, named.shaping) == (default.learner, default.sampling, default.shaping)
    assert CliRunner().invoke(app, ["validate", "mine.yaml"]).exit_code == 0, "model and data may be elsewhere"


def test_init_all_writes_a_file_that_says_what_would_be_without_it(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    assert CliRunner().invoke(app, ["init", "--all", str(file)]).exit_code == 0
    assert load_config(file) == RunConfig()
    text = file.read_text()
    for meaning in ("Seed of prompts, sampling and selection", "`on_failure`: a process that leaves", "median_tokens"):
        assert meaning in " ".join(text.replace("#", "").split()), meaning
    assert text.count("on_exhausted:") == 1, "what the roles share is written once"
    assert "  generator: {replicas: 1, threads: 1}  # and the other settings of `shaper`\n" in text
    commented = text[text.index("# nodes:") : text.index("\n\n", text.index("# nodes:"))]
    nodes = yaml.safe_load("\n".join(line.removeprefix("# ") for line in commented.splitlines()))
    assert RunConfig.model_validate(nodes) == RunConfig()
    assert CliRunner().invoke(app, ["validate", str(file)]).exit_code == 0


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("mine")
    result = CliRunner().invoke(app, ["init", str(file)])
    assert (result.exit_code, file.read_text()) == (2, "mine")
    assert "exists" in result.output


def test_the_version_is_shown_and_every_verb_with_a_complete_sentence() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"darts-launch {version('darts-async')}\n"
    shown = " ".join(CliRunner().invoke(app, ["--help"], terminal_width=60).output.split())
    for command in app.registered_commands:
        assert command.callback is not None
        sentence = (command.callback.__doc__ or "").partition("\n\n")[0]
        assert " ".join(sentence.split()) in shown
    assert "..." not in shown.partition("Verbs:")[2]


def test_a_mistyped_verb_is_suggested() -> None:
    result = CliRunner().invoke(app, ["statsu"])
    assert (result.exit_code, "Did you mean 'status'" in result.output) == (2, True)


@pytest.mark.parametrize(
    "words", [["learner.steps=7", "RUN"], ["RUN", "learner.steps=7"], ["RUN"], ["learner.steps=7"]]
)
def test_a_run_and_settings_come_in_any_order(words: list[str]) -> None:
    run, settings = split_words(words)
    assert run == (Path("RUN") if "RUN" in words else None)
    assert settings == [word for word in words if word != "RUN"]


def test_settings_of_the_command_line_reach_the_plan(tmp_path: Path) -> None:
    file, more = tmp_path / "run.yaml", tmp_path / "more.yaml"
    file.write_text((CONFIGS / "scripted.yaml").read_text())
    more.write_text("roles: {generator: {replicas: 5}}\n")
    words = [str(file), "--dry-run", "--file", str(more), "learner.steps=77"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "generator/4" in result.output, "77" in result.output) == (0, True, True), result.output
    wrong = CliRunner().invoke(app, ["validate", str(file), "learner.stesp=1"])
    assert wrong.exit_code == 2
    assert "from the command line" in wrong.output
    assert "did you mean learner.steps?" in wrong.output


@pytest.mark.parametrize("words", [["a.yaml", "--learner.steps=3"], ["validate", "a.yaml", "--seed.x=1"]])
def test_a_setting_with_dashes_is_explained(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "write it without dashes" in " ".join(result.output.split())


def test_a_model_is_evaluated_with_settings_and_a_run_with_its_own(tmp_path: Path) -> None:
    nowhere = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert (nowhere.exit_code, "write FILE.yaml after it" in " ".join(nowhere.output.split())) == (2, True)
    (tmp_path / "config.yaml").write_text("learner: {stesp: 3}\n")
    own = CliRunner().invoke(app, ["evaluate", str(tmp_path), "seed=3"])
    assert (own.exit_code, "did you mean learner.steps?" in own.output) == (2, True)
