"""Run normfree commands as on a system that is not Linux: python other_system.py NAME COMMAND...

NAME is "nt" (Windows) or "darwin" (macOS). Code of normfree finds neither the modules nor the attributes of `os` and
`signal` that this system lacks, and worker processes are spawned. On Windows, files that are open can be neither
renamed nor deleted, and folders cannot be opened. Other packages see the real system.
"""

import builtins
import functools
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

REFUSED = {
    "nt": {
        "fcntl",
        "resource",
        "pwd",
        "grp",
        "termios",
        "tty",
        "pty",
        "posix",
        "readline",
        "curses",
        "syslog",
    },
    "darwin": set(),
}
MISSING = {
    "nt": {
        "fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "uname", "sysconf", "statvfs", "killpg", "getpgid",
        "setsid", "mkfifo", "getloadavg", "sched_getaffinity", "sched_setaffinity", "wait", "wait3", "wait4",
        "posix_fallocate", "sendfile", "sync", "pread", "pwrite", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY",
        "O_CLOEXEC", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "SIGBUS", "SIGPIPE", "SIGTSTP", "SIGQUIT",
        # not SIGCHLD, for which PyTorch has a handler that we remove; on Windows there is neither
        "alarm", "setitimer", "pause", "sigwait", "pthread_kill", "pthread_sigmask",
    },
    "darwin": {"sched_getaffinity", "sched_setaffinity", "posix_fallocate"},
}  # fmt: skip
VALUES = {
    "nt": {"os": {"name": "nt"}, "sys": {"platform": "win32"}},
    "darwin": {"os": {}, "sys": {"platform": "darwin"}},
}


class Restricted(ModuleType):
    """A module without some of its attributes, and with other values of some."""

    def __init__(self, real: ModuleType, missing: set[str], values: dict[str, object]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(real=real, missing=missing, **values)

    def __getattr__(self, name: str) -> object:
        if name in self.missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self.real, name)


def restrict(system: str) -> None:
    """Show the modules of `system` to normfree."""
    real_import = builtins.__import__
    shown = {
        module.__name__: Restricted(module, MISSING[system], VALUES[system].get(module.__name__, {}))
        for module in (os, signal, sys)
    }

    def restricted_import(name, globals=None, locals=None, fromlist=(), level=0):
        if (globals or {}).get("__name__", "").split(".")[0] == "normfree":
            if name.partition(".")[0] in REFUSED[system]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in shown:
                return shown[name]
        return real_import(name, globals, locals, fromlist, level)

    builtins.__import__ = restricted_import
    if system == "nt":
        for function in ("replace", "rename", "unlink", "remove", "rmdir"):
            setattr(os, function, without_open_files(getattr(os, function)))
        os.open = files_only(os.open)


def without_open_files(function):
    """Return a function of `os` that refuses paths which this process has open, or files below them."""

    @functools.wraps(function)
    def checked(*paths, **options):
        if not options.get("dir_fd"):
            named = [os.path.realpath(path) for path in paths if isinstance(path, str | os.PathLike)]
            for opened in open_files():
                if any(opened == path or opened.startswith(path + os.sep) for path in named):
                    raise PermissionError(13, "the file is open in this process", opened)
        return function(*paths, **options)

    return checked


def open_files() -> set[str]:
    """Return the files that this process has open or mapped (Linux)."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(link))
        except FileNotFoundError:  # that of the listing itself
            continue
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return found | {line.split(maxsplit=5)[5] for line in mapped if len(line.split(maxsplit=5)) == 6}


def files_only(function):
    """Return `os.open` that refuses folders, except for shutil.rmtree, which has another way on Windows."""

    @functools.wraps(function)
    def checked(path, *arguments, **options):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("normfree") and os.path.isdir(path):
            raise PermissionError(13, "a folder cannot be opened", os.fspath(path))
        return function(path, *arguments, **options)

    return checked


restrict(sys.argv[1])

if __name__ == "__main__":
    from normfree.cli import main

    multiprocessing.set_start_method("spawn")
    for command in json.loads(sys.argv[2]):
        if (code := main(command)) != 0:
            sys.exit(f"{' '.join(command)}: exit code {code}")
