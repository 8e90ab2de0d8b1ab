"""Run the program that stdin holds where it can write no file and reach no network; say a word where it ends well.

A script of its own, started by ``sandbox.py``: what it gives up it cannot get back. Before the program starts it enters
user, network and mount namespaces of its own (unshare(2)), in which there is no interface and every file system is
read-only (mount_setattr(2)), and bounds its processor time, its memory and its processes. It imports nothing of kdctl.
"""

import ctypes
import os
import resource
import sys

NEW_USER, NEW_NETWORK, NEW_MOUNTS = 0x10000000, 0x40000000, 0x20000
PRIVATE, RECURSIVE = 0x40000, 0x4000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
REFUSED = 97
"""Exit code where the system does not let it give up what it may do."""


class MountAttributes(ctypes.Structure):
    """What mount_setattr(2) takes."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]


def main() -> None:
    """Read the program, give up rights, run it."""
    word, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    program = sys.stdin.buffer.read().decode()
    try:
        _give_up()
    except (OSError, AttributeError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(REFUSED)
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    said = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    exec(compile(program, "<answer>", "exec"), {"__name__": "__main__"})  # noqa: S102 - that is what it is for
    os.write(said, word.encode())
    os._exit(0)


def _give_up() -> None:
    """Enter namespaces without network and with nothing to write to. Raises OSError where the system refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    _called(libc.unshare(NEW_USER | NEW_NETWORK | NEW_MOUNTS), "unshare")
    _called(libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None), "mount")
    wanted = MountAttributes(READ_ONLY, 0, 0, 0)
    size = ctypes.sizeof(wanted)
    called = libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(wanted), size)
    _called(called, "mount_setattr")


def _called(result: int, name: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
