"""Bubblewrap sandboxes: one process without network, files or children, in which one reply's code meets its assertions.

bwrap makes the namespaces and mounts; the program inside, `harness`, sets the limits. There is no other sandbox: without bwrap,
or where the machine forbids user namespaces, nothing is run.
"""

import math
import os
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from train.runs.errors import TrainError

NOBODY = 65534
MEMORY = 512 * 2**20  # of address space
FILES = 16 * 2**20  # of /tmp, and of the largest file
OPEN_FILES = 64
START_SECONDS = 60  # for bwrap, the interpreter and the record's setup: a busy machine is no fault of a reply
END_SECONDS = 10
MOST_READ = 2**20
HARNESS = Path(__file__).with_name("harness.py")
REPOSITORY = Path(__file__).resolve().parents[2]
ADVICE = (
    "It needs bubblewrap 0.8 or newer (apt install bubblewrap) and user namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns; in Docker --security-opt "
    "seccomp=unconfined). Nothing is run without it"
)


class SandboxError(TrainError):
    """No sandbox can be started."""


class SetupError(TrainError):
    """A record's own code fails, before that of a reply is run."""


class Program(NamedTuple):
    """Code to judge: the record's setup, the reply's code, the record's assertions."""

    setup: str
    code: str
    tests: Sequence[str]


def find_bwrap() -> str:
    """Return the path of bwrap. Errors (SandboxError): it is not installed."""
    if found := shutil.which("bwrap"):
        return found
    raise SandboxError(f"the code of replies is run only by bubblewrap, and there is no bwrap on the PATH. {ADVICE}")


def switches_user() -> bool:
    """Return True for root, which a process limit does not bind: the program inside then becomes another user."""
    if os.geteuid():
        return False
    lines = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= NOBODY < first + count for first, _, count in lines)


def mounts() -> tuple[str, ...]:
    """Return bwrap's options for the files inside: libraries and the interpreter with the standard library, read-only; /tmp;
    four devices. Not there: /proc, /etc, /home, programs, installed packages, the working directory, this repository."""
    python, base = Path(os.path.realpath(sys._base_executable)), Path(sys.base_prefix).resolve()
    libraries = [Path(each) for each in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")]
    whole = [each for each in libraries if each.is_dir() and not each.is_symlink()]
    own = [base / name for name in ("lib", "lib64") if (base / name).is_dir() and not (base / name).is_symlink()]
    whole += [each for each in own if not any(map(each.is_relative_to, whole))]
    options = ["--perms", "1777", "--size", str(FILES), "--tmpfs", "/tmp"]
    for path in (*whole, python):
        for parent in [*path.parents][-2::-1]:  # bwrap's own would be closed to another user
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", str(path), str(path)]
    for path in (*libraries, base / "lib64"):
        if path.is_symlink() and path.is_dir():
            options += ["--symlink", os.readlink(path), str(path)]
    for path in ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"):
        options += ["--ro-bind-try", path, path]
    for path in hidden(whole):
        options += ["--tmpfs", path, "--remount-ro", path]
    options += ["--tmpfs", "/dev"]
    for name in ("null", "zero", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return (*options, "--remount-ro", "/dev", "--remount-ro", "/")


def hidden(whole: list[Path]) -> Iterator[str]:
    """Yield the folders inside those mounted whole that are to be empty: installed packages, and what is the user's own."""
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    packages = {sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")}
    library = Path(sysconfig.get_path("stdlib")).resolve()
    for path in sorted({Path(each).resolve() for each in (*packages, os.path.expanduser("~"), os.getcwd(), REPOSITORY)}):
        inside = any(each in path.parents for each in whole)
        if inside and path.is_dir() and not library.is_relative_to(path):
            yield str(path)


def command(bwrap: str, results: int, life: int, info: int | None, wait: int | None) -> list[str]:
    """Return the command line of a sandbox.

    results: the file number that the program writes to; life: one that is open as long as the sandbox is; info, wait: those by
    which the user namespace is set up from outside (None: bwrap does it).
    """
    options = ["--sync-fd", str(life)]
    options += ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if info is None:
        options += ["--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    else:  # capabilities that end when the program becomes nobody
        options += ["--info-fd", str(info), "--userns-block-fd", str(wait)]
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    values = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0"}
    options += ["--clearenv", *(part for item in values.items() for part in ("--setenv", *item))]
    python = os.path.realpath(sys._base_executable)
    program = [python, "-S", "-P", "-B", "-c", HARNESS.read_text(encoding="utf-8"), str(results)]
    return [bwrap, *options, *mounts(), "--chdir", "/tmp", "--", *program]


class Sandbox:
    """A started sandbox; leaving the block ends all that runs in it. Errors (SandboxError): it does not start."""

    def __init__(self):
        self.buffer, self.seen = b"", 0
        (self.results, theirs), (self.life, life) = os.pipe(), os.pipe()
        info, wait = (os.pipe(), os.pipe()) if switches_user() else ((None, None), (None, None))
        passed = [each for each in (theirs, life, info[1], wait[0]) if each is not None]
        try:
            words = command(find_bwrap(), theirs, life, info[1], wait[0])
            null, pipe = subprocess.DEVNULL, subprocess.PIPE
            self.process = subprocess.Popen(words, env={}, pass_fds=passed, stdin=pipe, stdout=null, stderr=pipe, bufsize=0)
        except BaseException as error:
            for each in (self.results, self.life, info[0], wait[1], *passed):
                if each is not None:
                    os.close(each)
            if isinstance(error, OSError):
                raise SandboxError(f"bwrap cannot be started: {error}. {ADVICE}") from None
            raise
        for each in passed:
            os.close(each)
        os.set_blocking(self.process.stdin.fileno(), False)
        try:
            if info[0] is not None:
                self._map_users(info[0], wait[1])
        except BaseException:
            self.close()
            raise

    def _map_users(self, info: int, wait: int) -> None:
        """Give the namespace root, as which bwrap mounts, and nobody, whom the program becomes."""
        with open(info, "rb") as told, open(wait, "wb", buffering=0) as go:
            text = told.read().decode()  # to its end, which comes also if bwrap fails
            child = text.partition('"child-pid":')[2].partition(",")[0].strip(" }\n")
            if not child.isdecimal():
                raise SandboxError(self.failure())
            try:
                for kind in ("uid", "gid"):
                    Path(f"/proc/{child}/{kind}_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            except OSError as error:
                raise SandboxError(f"the sandbox's users cannot be mapped ({error}). {ADVICE}") from None
            go.write(b"1")

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill bwrap, and with it all in its namespace; return when all have ended: the first of them, and the program."""
        self.process.kill()
        self.process.wait()
        until = time.monotonic() + END_SECONDS
        for pipe in (self.life, self.results):
            while time.monotonic() < until and self._has(pipe, select.POLLIN, until) and os.read(pipe, 65536):
                pass
            os.close(pipe)
        for each in (self.process.stdin, self.process.stderr):
            with suppress(OSError):
                each.close()

    def failure(self) -> str:
        """Describe why bwrap has ended, by its own words."""
        file = self.process.stderr.fileno()
        said = os.read(file, 65536) if self._has(file, select.POLLIN, time.monotonic() + 1) else b""
        lines = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return f"bubblewrap cannot start a sandbox here: {lines[-1]:.300}. {ADVICE}"

    @staticmethod
    def _has(file: int, event: int, until: float) -> bool:
        poll = select.poll()
        poll.register(file, event)
        return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))

    def send(self, texts: Sequence[str], until: float) -> None:
        """Write a message, as `harness` reads it; a program that does not read it before `until` never gets its end."""
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        left = memoryview(" ".join(str(len(part)) for part in parts).encode() + b"\n" + b"".join(parts))
        with suppress(BrokenPipeError):
            while left and self._has(self.process.stdin.fileno(), select.POLLOUT, until):
                left = left[os.write(self.process.stdin.fileno(), left[:65536]) :]

    def receive(self, token: str, until: float) -> str | None:
        """Return the text of the next line behind the token; other lines are not the harness's.

        None: the program has ended, the time is up, or it has written more than a harness does.
        """
        while True:
            line, end, rest = self.buffer.partition(b"\n")
            if end:
                self.buffer = rest
                if line.startswith(f"{token} ".encode()):
                    return line.decode(errors="replace").removeprefix(f"{token} ")
                continue
            if time.monotonic() >= until or self.seen > MOST_READ or not self._has(self.results, select.POLLIN, until):
                return None
            if not (more := os.read(self.results, 65536)):
                return None
            self.buffer, self.seen = self.buffer + more, self.seen + len(more)


def run_tests(program: Program, seconds: float) -> list[bool]:
    """Return for each assertion whether it passes behind the reply's code, which has so many seconds in all.

    Code that is no Python, raises, exits, is late or breaks a limit fails all assertions that are not reported by then. Errors:
    SandboxError, SetupError.
    """
    first, second = secrets.token_hex(16), secrets.token_hex(16)
    passed: list[bool] = []
    with Sandbox() as sandbox:
        until = time.monotonic() + START_SECONDS
        limits = (NOBODY if switches_user() else 0, math.ceil(seconds) + START_SECONDS, MEMORY, FILES, OPEN_FILES)
        sandbox.send([first, program.setup, program.code, " ".join(map(str, limits))], until)
        said = sandbox.receive(first, until)
        if said is None and program.setup:
            raise SetupError(f"the record's setup does not come to its end within {START_SECONDS} s and {MEMORY >> 20} MiB")
        if said is None:
            raise SandboxError(sandbox.failure())
        if said.startswith("setup "):
            raise SetupError(f"the record's setup raises {said.removeprefix('setup ')}; it has the standard library alone")
        until = time.monotonic() + seconds
        if sandbox.receive(first, until) == "ready":
            sandbox.send([second, *program.tests], until)
            while len(passed) < len(program.tests) and (said := sandbox.receive(second, until)) is not None:
                passed.append(said == "passed")
    return passed + [False] * (len(program.tests) - len(passed))
