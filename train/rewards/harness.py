"""The program inside a sandbox: limits itself, runs the code of a reply, then the assertions, and reports each.

Standard library only: `sandbox` hands its text to the sandbox's interpreter, and nothing imports it. Messages, lists of texts,
come from standard input: a line of their lengths in bytes, then the bytes. Lines go to the pipe whose number is the argument,
each behind the token of the message before it: a reply that prints, or writes to all files it has, does not know it. What is
needed after the reply's code has run is written in C and held by locals, out of its reach unless it walks the frames.
"""

import builtins
import os
import resource
import sys
import types


def limit(switch_to: int, seconds: int, memory: int, file_size: int, files: int) -> None:
    """Become user `switch_to`, unless it is 0; set limits that nothing inside can raise. No process or thread can follow."""
    if switch_to:
        os.setgroups([])
        os.setresgid(switch_to, switch_to, switch_to)
        os.setresuid(switch_to, switch_to, switch_to)
    limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NOFILE": files}
    limits |= dict.fromkeys(("NPROC", "CORE", "MEMLOCK", "MSGQUEUE"), 0)
    for name, value in limits.items():
        if (kind := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            resource.setrlimit(kind, (value, value))


def main() -> None:
    os_write, os_exit, run, build, integer = os.write, os._exit, exec, compile, int
    names, original = vars(builtins), dict(vars(builtins))
    failures, form, number = BaseException, "{} {}\n".format, int(sys.argv[1])

    requests, silent = os.fdopen(os.dup(0), "rb"), os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(silent, standard)
    os.set_inheritable(number, False)
    sys.argv[:], sys.orig_argv[:] = [""], []

    def receive() -> list[str]:
        return [requests.read(integer(length)).decode("utf-8", "surrogatepass") for length in requests.readline().split()]

    token, setup, code, limits = receive()
    limit(*map(int, limits.split()))
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    space = vars(module)
    try:
        run(build(setup, "<setup>", "exec"), space)
    except failures as error:
        os_write(number, form(token, f"setup {type(error).__name__}: {str(error)[:200]!r}").encode())
        os_exit(1)
    os_write(number, form(token, "begun").encode())
    try:
        run(build(code, "<reply>", "exec"), space)
    except failures:
        os_exit(1)
    os_write(number, form(token, "ready").encode())
    token, *tests = receive()
    for test in tests:
        names.update(original)  # a reply may have replaced them
        try:
            run(build(test, "<test>", "exec"), space)
            result = "passed"
        except failures:
            result = "failed"
        os_write(number, form(token, result).encode())
    os_exit(0)


if __name__ == "__main__":
    main()
