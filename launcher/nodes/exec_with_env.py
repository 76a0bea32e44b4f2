"""A program that reads environment variables from standard input and then executes a command with them.

launcher.nodes.exec_with_env COMMAND ARGUMENT...      first line of the input: {"NAME": "VALUE"}
"""

import json
import os
import sys


def main() -> None:
    environment = json.loads(_line())
    if not isinstance(environment, dict) or len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, **environment})


def _line() -> bytes:
    """The first line only, byte by byte, because the rest is for the command."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


if __name__ == "__main__":
    main()
