"""Run a program that nobody has read where it can do no more than compute; say a word where it runs to its end.

A script of its own, started by ``sandbox.py``: what it gives up it cannot get back, and it imports nothing of kdctl. It
reads the word and the program from stdin. Before the program starts, a child of it

- enters user, process, network, mount and IPC namespaces (unshare(2)): it sees no other process, no interface and no
  shared memory, and whatever it starts ends with it;
- has a root with nothing but Python and the system's libraries in it, read-only (mount_setattr(2)), so that there is no
  file, socket or device of anybody's;
- gives up every capability, for good, and bounds its processor time, memory and files.

``ready`` is said when all that is done, the word when the program has run to its end.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence

NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x20000 | 0x08000000  # user, process, network, mount, IPC
BIND, RECURSIVE, PRIVATE, NO_EXTRAS = 0x1000, 0x4000, 0x40000, 0x2 | 0x4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
DEATH_SIGNAL, BOUNDING_SET, NO_NEW_PRIVILEGES, AMBIENT, AMBIENT_CLEAR = 1, 24, 38, 47, 4
LAST_CAPABILITY, CAPABILITIES_3 = 63, 0x20080522
READY = "ready\n"
LIBC = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """What mount_setattr(2) takes."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]


def main() -> None:
    """Read word and program, enter namespaces, run the program in a child, and end with it."""
    seconds, memory, root, *kept = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    word, _, program = sys.stdin.buffer.read().partition(b"\n")
    user, group = os.getuid(), os.getgid()
    _called(LIBC.unshare(NAMESPACES), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    child = os.fork()
    if child:
        os.close(1)
        os.waitpid(child, 0)
        os._exit(0)
    _called(LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    nothing = os.open(os.devnull, os.O_RDWR)
    _enter(root, kept)
    _give_up(seconds, memory)
    said = os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    os.write(said, READY.encode())
    _run(program)
    os.write(said, word)
    os._exit(0)


def _run(program: bytes) -> None:
    exec(compile(program, "<answer>", "exec"), {"__name__": "__main__"})  # noqa: S102 - that is what it is for


def _enter(root: str, kept: Sequence[str]) -> None:
    """Make a folder the root, with some others of the system in it and nothing else, all of it read-only."""
    _called(LIBC.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None), "mount")
    _called(LIBC.mount(b"none", root.encode(), b"tmpfs", NO_EXTRAS, b"size=64k"), "mount tmpfs")
    for folder in kept:
        place = root + folder
        os.makedirs(place, exist_ok=True)
        _called(LIBC.mount(folder.encode(), place.encode(), None, BIND | RECURSIVE, None), f"mount {folder}")
    wanted = MountAttributes(READ_ONLY | NO_EXTRAS, 0, 0, 0)
    size = ctypes.sizeof(wanted)
    called = LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, ctypes.byref(wanted), size)
    _called(called, "mount_setattr")
    os.chroot(root)
    os.chdir("/")


def _give_up(seconds: int, memory: int) -> None:
    """Bound what may be used, and give up every capability."""
    bounds = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_NPROC: 0}
    for kind, most in {**bounds, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}.items():
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))
    for capability in range(LAST_CAPABILITY + 1):
        LIBC.prctl(BOUNDING_SET, capability, 0, 0, 0)  # refused where there is none of the number
    LIBC.prctl(AMBIENT, AMBIENT_CLEAR, 0, 0, 0)
    _called(LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
    _called(LIBC.capset(header, none), "capset")


def _called(result: int, name: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, AttributeError) as error:
        sys.stderr.write(f"{error}\n")
        os._exit(1)
