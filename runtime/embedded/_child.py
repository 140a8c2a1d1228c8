"""What an embedded server's process is before it is the server: asks to die with its parent, gives up root, executes the server.

    python -I -S _child.py '{"parent": 42, "at_its_death": 2, "owner": [65534, 65534], "may_search": false}' command…

A program, not a module, and not a preexec_fn: that would run Python, and gRPC's fork handlers with their threads, in a copy of a process
of many threads. Standard library only; the process id stays the same.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_CAP_DAC_READ_SEARCH = 2
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 8, 47, 2
_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, _SECBIT_KEEP_CAPS = 28, 1 << 2, 1 << 4
_CAPABILITY_VERSION_3 = 0x20080522


def main(parent: int, at_its_death: int, owner: list[int] | None, may_search: bool, command: list[str]) -> None:
    """`at_its_death`: the signal for the death of the parent's thread that forked us (Linux). `owner`: uid and gid to become, with the
    right to search folders (CAP_DAC_READ_SEARCH) or none at all."""
    libc = ctypes.CDLL(None, use_errno=True)
    if owner is not None:
        _become(libc, owner[0], owner[1], may_search)
    if sys.platform == "linux":
        libc.prctl(_PR_SET_PDEATHSIG, at_its_death, 0, 0, 0)  # after the change of user, which would take it back
        if os.getppid() != parent:
            sys.exit(f"the parent {parent} is gone")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and a child of it would
        signal.signal(number, signal.SIG_DFL)
    os.execv(command[0], command)  # noqa: S606


def _become(libc: ctypes.CDLL, uid: int, gid: int, may_search: bool) -> None:
    os.umask(0o077)
    if may_search:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        # access(2), by which initdb looks for its binaries, leaves capabilities aside for a user who is not root, but for this
        libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP | _SECBIT_KEEP_CAPS, 0, 0, 0)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if not may_search:
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    bit = 1 << _CAP_DAC_READ_SEARCH
    # effective, permitted, inheritable; low words, then high words
    data = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)
    if (
        libc.capset(header, data) != 0
        or libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0) != 0
    ):
        raise OSError(ctypes.get_errno(), "no CAP_DAC_READ_SEARCH; use a data folder that every user can enter")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]), command=sys.argv[2:])
