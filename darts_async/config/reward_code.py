"""Settings of a reward that runs the program in a response on the test cases of its record."""

from typing import Annotated, Literal

from pydantic import Field

from darts_async.config.section import Positive, Seconds, Section

Size = Annotated[float, Field(gt=0)]


class CodeConfig(Section):
    """Runs the last fenced block of a response that is labelled as Python, or else the last without a label, in a
    sandbox without network and without files of others. A program that fails or exceeds a limit fails its test case; a
    sandbox that fails gives no reward."""

    tests_field: str = "tests"
    """Field of `metadata` with the test cases: `[{input, output}, ...]`, `{inputs: [...], outputs: [...]}`, a list of
    statements such as `assert f(1) == 2`, or one of these as a JSON text."""
    score: Literal["all", "share"] = "all"
    """`all`: 1 if every test case passes, else 0. `share`: the share of test cases that pass."""
    isolation: Literal["auto", "bubblewrap", "processes"] = "auto"
    """`auto`: bubblewrap where it works, else processes with limits and whatever else the kernel permits. `bubblewrap`
    and `processes`: this one or none. What works is tried at start; `validate` and the log of the reward process say
    what is used."""
    allow_weaker: bool = False
    """Run programs even where they can start processes without a bound, read or write files of others, reach the
    network or send signals to the run. Without it such a machine is refused."""
    python: str = ""
    """Path of the Python that runs the programs, with the packages that they may import. Default: that of the run."""
    wall_s: Seconds = 5.0
    """Time for one test case."""
    total_s: Seconds = 8.0
    """Time for all test cases of a response; what is not begun by then has failed. Less than `reward.deadline_s`."""
    cpu_s: Positive = 5
    """CPU time of each process of a program."""
    memory_mib: Size = 512.0
    """Memory of a program with all its processes. Measured many times a second; the address space of each process is
    limited to twice as much."""
    processes: Positive = 16
    """Processes and threads of a program at a time, itself included. Libraries that start a thread for each core are
    told to start one."""
    file_mib: Size = 16.0
    """Size of each file that a program writes."""
    files_mib: Size = 64.0
    """Size of all files that a program has at a time. Measured many times a second; in bubblewrap `memory_mib` limits
    them, because they are in memory."""
    output_kib: Size = 1024.0
    """Size of what a program prints for one test case."""
