"""Several ranks on loopback for tests, without torchrun and without importing torch once for each.

A fork server imports everything once; every rank is a fork of it, with the variables that torchrun would set.
"""

import multiprocessing
import os
import traceback

import pytest
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "patchscore.cli"])


def launched(size, function, *arguments, seconds=120, timeout=30, may_die=None):
    """What function(*arguments) returns on each rank; fails, with its traceback, where one raised.

    seconds: for all of it; a rank that takes longer is ended.
    timeout: that ranks wait for each other.
    may_die: a rank that need not return, for which there is None then; the others are waited for.
    """
    # As torchrun's agent does, this process keeps the store in which ranks find each other.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [SERVER.Pipe(duplex=False) for _ in range(size)]
    ranks = []
    for rank, (_, end) in enumerate(pipes):
        where = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        where |= {"LOCAL_RANK": rank, "PATCHSCORE_TIMEOUT": timeout, "TORCHELASTIC_USE_AGENT_STORE": True}
        ranks.append(SERVER.Process(target=_run, args=(where, end, function, arguments), daemon=True))
        ranks[-1].start()
        end.close()
    said = [(None, None)] * size
    for number in sorted(range(size), key=lambda number: number == may_die):
        begin = pipes[number][0]
        try:
            waiting = 0.5 if number == may_die else seconds
            said[number] = begin.recv() if begin.poll(waiting) else (None, "took too long")
        except EOFError:
            said[number] = None, "ended without a word"
        if number == may_die and said[number][1]:
            said[number] = None, None
        ranks[number].join(5 if number != may_die else 0)
        ranks[number].kill()
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(said) if failure]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return [result for result, _ in said]


def _run(where, end, function, arguments):
    os.environ |= {name: str(value) for name, value in where.items()}
    import torch

    torch.set_num_threads(1)
    try:
        said = function(*arguments), None
    except BaseException:
        said = None, traceback.format_exc()
    end.send(said)
    end.close()
    os._exit(0)  # threads may wait for ranks that are gone


def raised(kind, function, *arguments, **options):
    """The message of the error that a call raises on this rank."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    return str(caught.value)
