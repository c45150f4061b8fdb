"""Starts this host's command server (cli/command_server.py), and starts it again whenever it has ended.

Many commands of root run in the command server; without it, each runs in a process of its own. The command server is
another process than the agent, so neither can harm the other. It ends with the agent: its standard input is a pipe
whose other end only the agent has.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from calicoctl.felix.daemon import FIRST_PAUSE, LONGEST_PAUSE

log = logging.getLogger("calico.felix")


def supervise(host: str) -> None:
    """Have a thread keep a host's command server running. Returns at once.

    Does nothing in a process that cannot gain rights (NoNewPrivileges), such as that of calico-node.service: a command
    server that it starts would have fewer rights than those who call commands, so it could not run their commands.
    Beside that unit, systemd runs the command server as calico-commands.service.
    """
    if "NoNewPrivs:\t1" not in Path("/proc/self/status").read_text():
        threading.Thread(target=_supervise, args=(host,), name="command server", daemon=True).start()


def _supervise(host: str) -> None:
    pause, said = FIRST_PAUSE, ""
    while True:
        began = time.monotonic()
        try:
            why = _run(host)
        except OSError as error:
            why = str(error)
        if time.monotonic() - began > LONGEST_PAUSE:
            pause, said = FIRST_PAUSE, ""
        if why != said:
            log.warning("the command server has ended%s; starting it again", f": {why}" if why else "")
        said = why
        time.sleep(pause)  # nothing tells when the next start may succeed
        pause = min(LONGEST_PAUSE, pause * 2)


def _run(host: str) -> str:
    """Run the command server until it ends. Raises OSError if it cannot be started.

    Returns the last line that it has written to standard error, at most 300 characters; an empty text if there is none.
    """
    command = [sys.executable, "-I", "-m", "calicoctl.cli.command_server", f"--commands-of={host}"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd="/",  # Python looks for modules in it, and that of `node --detach=false` may be anybody's
    ) as server:
        assert server.stderr is not None
        lines = deque(server.stderr, maxlen=1)
    return lines[0].strip()[:300] if lines else ""
