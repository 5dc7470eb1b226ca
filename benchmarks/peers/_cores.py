"""Processes that share the jobs of a batch, one process per core.

Whoever is idle takes the next job from a common counter, so no core waits for a slower one's
share. Results stay where they were made until they are collected.
"""

import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


Job = Callable[[int], Any]


def make(maker: str, *arguments: Any) -> Job:
    """The function from job numbers to results that `"module:callable"` makes."""
    module, name = maker.split(":")
    return getattr(importlib.import_module(module), name)(*arguments)


class Cores:
    """`count` processes; with one, the jobs run here and no process is started."""

    def __init__(self, count: int) -> None:
        self._job: Job | None = None
        self._results: dict[int, Any] = {}
        self._links: list[Connection] = []
        if count == 1:
            return
        context = multiprocessing.get_context("spawn")
        self._next = context.Value("q", 0)
        for _ in range(count):
            here, there = context.Pipe()
            context.Process(target=_serve, args=(there, self._next), daemon=True).start()
            there.close()
            self._links.append(here)

    def prepare(self, maker: str, *arguments: Any) -> None:
        """Let every process make its job function by `make`."""
        self._results = {}
        if self._links:
            self._ask("prepare", maker, *arguments)
        else:
            self._job = make(maker, *arguments)

    def run(self, jobs: int) -> None:
        """Do jobs 0 … `jobs` − 1; returns when all are done."""
        if self._links:
            self._next.value = 0
            self._ask("run", jobs)
            return
        assert self._job is not None
        for index in range(jobs):
            self._results[index] = self._job(index)

    def collect(self) -> list[Any]:
        """The results of the last jobs, in their order."""
        for found in self._ask("collect") if self._links else ():
            self._results.update(found)
        return [self._results[index] for index in sorted(self._results)]

    def _ask(self, *request: Any) -> list[Any]:
        for link in self._links:
            link.send(request)
        replies = [link.recv() for link in self._links]
        for failure, _ in replies:
            if failure is not None:
                raise RuntimeError(failure)
        return [reply for _, reply in replies]


def _serve(link: Connection, following: Any) -> None:
    """Answer requests until the process that asks is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    job: Job | None = None
    results: dict[int, Any] = {}
    while True:
        try:
            op, *arguments = link.recv()
        except EOFError:
            return
        reply = None
        try:
            if op == "prepare":
                job, results = make(*arguments), {}
            elif op == "run":
                assert job is not None
                results = {}
                while True:
                    with following.get_lock():
                        index = following.value
                        following.value += 1
                    if index >= arguments[0]:
                        break
                    results[index] = job(index)
            else:
                reply = results
        except Exception as error:  # whatever a solver raises is the reply
            link.send((f"{type(error).__name__}: {error}", None))
        else:
            link.send((None, reply))


def _die_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
