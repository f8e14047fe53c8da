"""Runs a command unless another one holds the lock: `python alone.py LOCKFILE COMMAND [ARGUMENT ...]`.

The operating system releases the lock when the process ends, however it ends, so a killed run leaves nothing to unlock.
"""

import fcntl
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    path, *command = sys.argv[1:]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another run of this project is active here ({path} is locked); wait for it, or stop it")
    os.set_inheritable(file, True)
    os.execvp(command[0], command)
