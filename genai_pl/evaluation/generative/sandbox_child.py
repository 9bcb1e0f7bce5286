"""Child process of the sandbox: it takes rights away from itself, runs one program and says how that ended.

`sandbox.py` starts this text as `python -c`, so nothing of the package is imported. A request comes from stdin as JSON
(program, seconds, memory in bytes); two lines of JSON go to what was stdout: the protections that hold, then the reason
and one line of detail. Whatever the program prints is dropped.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types
from contextlib import suppress

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38  # linux/prctl.h
CAPABILITY_VERSION, READ_ALL_FILES = 0x20080522, 1 << 2  # linux/capability.h: version 3, CAP_DAC_READ_SEARCH
NOBODY = 65534
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (  # events of Python's audit hooks (PEP 578), by their beginnings
    *("socket.", "subprocess.", "ctypes.", "shutil.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink"),
    *("os.truncate", "os.utime", "os.setxattr", "os.removexattr", "pty.spawn", "signal.pthread_kill"),
)


def leave_network(libc: ctypes.CDLL) -> bool:
    """Whether the process is now in a network namespace of its own, which has no devices that are up.

    Others than root need a user namespace for that. Root gets none: it would keep its user, and lose the right to read
    Python's files, which may lie in its home.
    """
    if not hasattr(libc, "unshare"):
        return False
    return libc.unshare(CLONE_NEWNET) == 0 or (os.getuid() != 0 and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)


def leave_root(libc: ctypes.CDLL) -> None:
    """Become nobody, if root: root is bound by no limit of processes and may write everywhere.

    Of root's capabilities the one to read files is kept: Python's own may lie in root's home. An OSError where the
    system allows no change.
    """
    if os.getuid() or not hasattr(libc, "capset"):
        return
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    # effective, permitted, inheritable; capabilities 0 to 31, then 32 to 63
    sets = (ctypes.c_uint32 * 6)(READ_ALL_FILES, READ_ALL_FILES, 0, 0, 0, 0)
    if libc.capset(header, sets):
        raise OSError("capset")


def limit(name: str, value: int) -> bool:
    """Whether a limit of the process is now at most this value; it cannot be raised again."""
    kind = getattr(resource, name, None)
    if kind is None:
        return False
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):  # macOS knows RLIMIT_AS and refuses it
        return False
    return True


def no_further_process() -> bool:
    """Whether the system refuses a further process; tried, because root is not bound by the limit."""
    limit("RLIMIT_NPROC", 1)
    try:
        child = os.fork()
    except OSError:
        return True
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return False


def readable_folders() -> tuple[str, ...]:
    """Folders that Python reads modules from, and the empty one that the program runs in."""
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.getcwd(), *filter(None, sys.path)}
    return tuple({os.path.join(os.path.realpath(folder), "") for folder in folders})


def guard(event: str, arguments: tuple, folders: tuple[str, ...]) -> None:
    """Audit hook: PermissionError for what a program to be tested has no need of."""
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str | bytes):
        return
    path = os.path.realpath(os.fsdecode(arguments[0]))
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if path != os.devnull and (writes or not os.path.join(path, "").startswith(folders)):
        raise PermissionError(f"{event} of {path} is not allowed here")


def protect(seconds: float, memory: int) -> dict[str, bool]:
    """Take rights away; which protections hold, by name. Each that the system refuses is False."""
    libc = ctypes.CDLL(None)
    found = {"network": leave_network(libc)}
    with suppress(OSError):
        leave_root(libc)
    found["root"] = os.getuid() != 0 and os.geteuid() != 0
    # no core files, no file with contents; the parent's clock is what ends most programs
    limit("RLIMIT_CORE", 0)
    found["files"] = limit("RLIMIT_FSIZE", 0)
    found["cpu"] = limit("RLIMIT_CPU", int(seconds) + 2)
    limit("RLIMIT_NOFILE", 64)
    found["processes"] = no_further_process()
    found["memory"] = limit("RLIMIT_AS", memory)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # no program outlives its judge
    return found


def run(program: str) -> tuple[str, str]:
    """Reason and detail of how a program ends."""
    module = types.ModuleType("program")  # not __main__: what stands under that condition is for a terminal
    sys.modules["program"] = module
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
    except AssertionError as error:
        return "failed", describe(error)
    except MemoryError as error:
        return "memory", describe(error)
    except BaseException as error:  # SystemExit too: it ends a program before its tests
        return "error", describe(error)
    return "passed", ""


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def main() -> None:
    """Read the request, protect, run, report."""
    request = json.loads(sys.stdin.buffer.read())
    report, write, leave = os.dup(1), os.write, os._exit
    # the program reads nothing and prints nowhere
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, flags), number)
    folders = readable_folders()
    protections = protect(request["seconds"], request["memory"])
    sys.addaudithook(lambda event, arguments: guard(event, arguments, folders))
    write(report, json.dumps(protections).encode() + b"\n")
    verdict = run(request["program"])
    write(report, json.dumps(verdict).encode() + b"\n")
    leave(0)  # without what the program has registered for the end


if __name__ == "__main__":
    main()
