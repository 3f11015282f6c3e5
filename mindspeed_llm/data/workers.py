"""Chunks through a handler in several processes, results in order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from mindspeed_llm.data.handlers.base import ChunkResult, Handler
from mindspeed_llm.data.sources import Chunk
from mindspeed_llm.errors import UserError

_handler: Handler | None = None


def map_chunks(handler: Handler, chunks: Iterable[Chunk], workers: int) -> Iterator[ChunkResult]:
    """`handler.process` of every chunk, in the order of the chunks.

    Args:
        workers: 1 works in this process, where the tokenizer uses all cores by threads; more are processes with one
            thread each, which also parallelises parsing and rendering.

    Raises:
        UserError: a worker process died (killed, or out of memory).
    """
    if workers == 1:
        # Two threads: while one tokenizes (without the interpreter lock), the other parses and renders.
        yield from _in_order(ThreadPoolExecutor(2), handler.process, chunks, 2)
        return
    # forkserver: a fork of this process could inherit locks held by threads of torch or the tokenizer.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mindspeed_llm.data.workers"])
    pool = ProcessPoolExecutor(workers, context, _start, (handler,))
    try:
        yield from _in_order(pool, _process, chunks, workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"workers: one of {workers} processes ended abruptly, because it was killed or memory ran out; nothing was "
            "written; try: fewer --workers"
        ) from error


def _in_order(
    pool: Executor, process: Callable[[Chunk], ChunkResult], chunks: Iterable[Chunk], width: int
) -> Iterator[ChunkResult]:
    pending: deque[Future[ChunkResult]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(process, chunk))
            if len(pending) > 2 * width:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(handler: Handler) -> None:
    global _handler
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _handler = handler


def _process(chunk: Chunk) -> ChunkResult:
    assert _handler is not None
    return _handler.process(chunk)
