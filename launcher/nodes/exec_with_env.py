"""The first thing that runs on another node: takes an environment from standard input, and becomes a command with it.

launcher.nodes.exec_with_env COMMAND ARGUMENT...      first line of the input: {"NAME": "VALUE"}
"""

import json
import os
import sys


def main() -> None:
    """Entry point."""
    environment = json.loads(_line())
    if not isinstance(environment, dict) or len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, **environment})


def _line() -> bytes:
    """The first line, and not a byte more: the rest is for the command."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


if __name__ == "__main__":
    main()
