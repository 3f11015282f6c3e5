"""Chunks through a handler in several processes, results in order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from mindspeed_llm.data.handlers.base import ChunkResult, Handler
from mindspeed_llm.data.sources import Chunk
from mindspeed_llm.errors import UserError

SECONDS_TO_END = 5.0


def map_chunks(handler: Handler, chunks: Iterable[Chunk], workers: int) -> Iterator[ChunkResult]:
    """`handler.process` of every chunk, in the order of the chunks.

    Args:
        workers: 1 works in this process, where the tokenizer uses all cores by threads; more are processes with one
            thread each, which also parallelises parsing and rendering.

    Raises:
        UserError: a worker process died (killed, or out of memory).
    """
    if workers == 1:
        return _map_in_threads(handler, chunks)
    return _map_in_processes(handler, chunks, workers)


def _map_in_threads(handler: Handler, chunks: Iterable[Chunk]) -> Iterator[ChunkResult]:
    """Two threads: while one tokenizes (without the interpreter lock), the other parses and renders."""
    pool = ThreadPoolExecutor(2)
    pending: deque[Future[ChunkResult]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(handler.process, chunk))
            if len(pending) > 3:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _map_in_processes(handler: Handler, chunks: Iterable[Chunk], workers: int) -> Iterator[ChunkResult]:
    """Workers take turns; each has a pipe of its own and at most one chunk.

    So nobody waits for a lock or a full pipe that a killed process left behind (a ProcessPoolExecutor of Python 3.11
    does), and the end of a process is the end of its pipe.
    """
    # forkserver: a fork of this process could inherit locks held by threads of torch or the tokenizer.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mindspeed_llm.data.workers"])
    running: list[tuple[BaseProcess, Connection]] = []
    turns: deque[Connection] = deque()
    try:
        for chunk in chunks:
            result = None
            if len(running) < workers:
                running.append(_start(context, handler, workers))
                connection = running[-1][1]
            else:
                connection = turns.popleft()
                result = _receive(connection, workers)
            _send(connection, chunk, workers)
            turns.append(connection)
            if result is not None:
                yield result
        while turns:
            yield _receive(turns.popleft(), workers)
    finally:
        _end(running)


def _start(
    context: multiprocessing.context.BaseContext, handler: Handler, workers: int
) -> tuple[BaseProcess, Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(handler, theirs), daemon=True)
    try:
        process.start()
    except (EOFError, OSError) as error:
        raise _died(workers) from error
    theirs.close()  # otherwise the pipe would not end with the process
    return process, ours


def _send(connection: Connection, chunk: Chunk, workers: int) -> None:
    try:
        connection.send(chunk)
    except OSError as error:
        raise _died(workers) from error


def _receive(connection: Connection, workers: int) -> ChunkResult:
    try:
        result = connection.recv()
    except (EOFError, OSError) as error:
        raise _died(workers) from error
    if isinstance(result, Exception):
        raise result
    return result


def _died(workers: int) -> UserError:
    return UserError(
        f"workers: one of {workers} processes ended abruptly, because it was killed or memory ran out; nothing was "
        "written; try: fewer --workers"
    )


def _end(running: list[tuple[BaseProcess, Connection]]) -> None:
    for process, connection in running:
        connection.close()
        process.terminate()
    for process, _ in running:
        process.join(SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _work(handler: Handler, connection: Connection) -> None:
    """Body of a worker: chunks in, results (or the exception) out, until the pipe ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        try:
            result = handler.process(chunk)
        except Exception as error:  # the parent raises it
            result = error
        connection.send(result)
