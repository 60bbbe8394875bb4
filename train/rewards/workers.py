"""Processes that run the functions of a user's files, each call with a timeout.

A worker is started by spawn, imports the files, and computes one function for one group of replies at a time. It ignores
Ctrl-C and SIGTERM, which a terminal or a scheduler sends to all processes of a run: the run decides when it ends. It ends when
its pipe is closed, when the run is gone, or after a timeout, when it is killed.
"""

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from multiprocessing.connection import Connection, wait

from data.messages import format_count
from train.rewards.sample import Sample, describe_sample
from train.rewards.user import UserReward, call, load_functions
from train.runs.errors import TrainError

IMPORT_SECONDS = 300  # a file may import torch or more
GRACE_SECONDS = 5
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # the training has the cores

Task = tuple[int, list[Sample]]  # the index of a function, and a group of replies


def work(connection: Connection, rewards: list[UserReward], timeout: float) -> None:
    """Run in a worker: load the functions, then answer each task by (True, values) or (False, message)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ.update(dict.fromkeys(THREADS, "1"))
    if "torch" in sys.modules:  # it was imported with the main module, and has read them
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    silent = open(os.devnull, "w")
    try:
        functions = load_functions(rewards)
    except TrainError as error:
        connection.send((False, str(error)))
        return
    connection.send((True, []))
    while True:
        try:
            index, samples = connection.recv()
        except EOFError:
            return
        except Exception as error:
            connection.send((False, f"the record cannot be read in a worker process ({error}): --reward-workers 0"))
            continue
        # The thread above cannot end a call that never lets go of Python's lock, as in the standard library's re; this can.
        faulthandler.dump_traceback_later(timeout + GRACE_SECONDS, exit=True, file=silent)
        try:
            answer = (True, call(rewards[index], functions[index], samples))
        except TrainError as error:
            answer = (False, str(error))
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()  # what the function has printed, before a later call is killed
        connection.send(answer)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class _Worker:
    def __init__(self, rewards: list[UserReward], timeout: float):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, rewards, timeout), name="reward", daemon=True)
        self.process.start()
        other.close()

    def close(self, seconds: float = 1) -> None:
        """End the process, which is killed if it is still at work after so long."""
        self.connection.close()
        self.process.join(seconds)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def how_it_ended(self) -> str:
        self.process.join(GRACE_SECONDS)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name


class Workers:
    """`count` processes that compute user functions. timeout: seconds for one function and the replies to one prompt."""

    def __init__(self, rewards: list[UserReward], count: int, timeout: float):
        self.rewards, self.count, self.timeout = rewards, count, timeout
        self.workers: list[_Worker] = []

    def start(self) -> None:
        """Start the processes and import the files. Errors (TrainError): a file that does not import."""
        if self.workers:
            return
        atexit.register(self.close)  # before multiprocessing's own, which would wait for the workers
        try:
            for _ in range(self.count):
                self.workers.append(_Worker(self.rewards, self.timeout))
            until = time.monotonic() + IMPORT_SECONDS
            files = ", ".join(dict.fromkeys(reward.path for reward in self.rewards))
            for worker in self.workers:
                if not worker.connection.poll(max(0, until - time.monotonic())):
                    raise TrainError(f"--reward: {files} did not import within {IMPORT_SECONDS} s")
                _receive(worker, f"--reward: the worker process ended while it imported {files}")
        except BaseException:
            self._kill()
            raise

    def __call__(self, tasks: list[Task]) -> list[list[float]]:
        """Return the values of each task, in the tasks' order whichever ends first.

        Errors (TrainError), after which all processes are stopped: those of `call`; no result in time; a process that ended; a
        record that cannot be sent.
        """
        self.start()
        results: list[list[float]] = [[] for _ in tasks]
        waiting, idle = deque(range(len(tasks))), list(self.workers)
        busy: dict[Connection, tuple[_Worker, int, float]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    worker, index = idle.pop(0), waiting.popleft()
                    self._send(worker, tasks[index])
                    busy[worker.connection] = worker, index, time.monotonic() + self.timeout
                first = min(until for *_, until in busy.values())
                for connection in wait(list(busy), max(0, first - time.monotonic())):
                    worker, index, _ = busy.pop(connection)
                    option, group = self._named(tasks[index])
                    results[index] = _receive(worker, f"{option}: its worker process ended while it judged {group}")
                    idle.append(worker)
                self._refuse_late(tasks, busy)
        except BaseException:
            self._kill()
            raise
        return results

    def _send(self, worker: _Worker, task: Task) -> None:
        option, group = self._named(task)
        try:
            worker.connection.send(task)
        except OSError:
            raise TrainError(f"{option}: its worker process has ended ({worker.how_it_ended()}) before {group}") from None
        except Exception as error:  # of pickle, which raises any
            kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in task[1][0].record.items())
            raise TrainError(
                f"{option}: a record cannot be sent to a worker process ({error}), {task[1][0].name} with {kinds}: "
                "give it plain values, or --reward-workers 0"
            ) from None

    def _refuse_late(self, tasks: list[Task], busy: dict[Connection, tuple[_Worker, int, float]]) -> None:
        now = time.monotonic()
        for worker, index, until in busy.values():
            if until <= now and not worker.connection.poll():
                option, group = self._named(tasks[index])
                raise TrainError(f"{option}: no result after {self.timeout:g} s for {group} (--reward-timeout)")

    def _named(self, task: Task) -> tuple[str, str]:
        index, samples = task
        count = format_count(len(samples), "reply", "replies")
        return self.rewards[index].option, f"{count} to a prompt, the first: {describe_sample(samples[0])}"

    def close(self) -> None:
        """End the processes."""
        self._end(lambda worker: worker.close())

    def _kill(self) -> None:
        self._end(lambda worker: worker.kill())

    def _end(self, end) -> None:
        while self.workers:
            end(self.workers.pop())
        atexit.unregister(self.close)


def _receive(worker: _Worker, ended: str) -> list[float]:
    try:
        is_good, answer = worker.connection.recv()
    except (EOFError, OSError):
        raise TrainError(f"{ended} ({worker.how_it_ended()})") from None
    if not is_good:
        raise TrainError(answer)
    return answer
