"""Many processes that share each batch, one GPU each: what a rank knows of the others, and the agent that starts and ends them.

`Ranks` is what the training loop sees. `launch` makes the calling process torchrun's elastic agent: it forks the ranks, hands on what
rank 0 says and what it is told, and ends all when one of them ends badly. A second attempt is the job's affair, from a checkpoint, so the
agent never restarts anything. Nothing listens outside this machine: the store, gloo and NCCL's bootstrap are bound to the loopback.
"""

from __future__ import annotations

import gc
import inspect
import logging
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.nn.parallel import DistributedDataParallel

from powergrad.process import ORPHANED, die_with_parent
from powergrad.protocol import Control, Done, Failure, Message, TrainerConfig, decode_control, decode_message, encode

log = logging.getLogger(__name__)

Stop = Literal["checkpoint", "now"]
Emit = Callable[[Message], None]

LOOPBACK = "127.0.0.1"
LONGEST_WAIT = timedelta(days=7)
"""For one collective: rank 0 may score a large split meanwhile. Who hangs is found by its supervisor's stall limit, not by this."""
LOOK_S = 0.05
"""Seconds between two looks of the agent at the orders it hands on, and at its ranks."""
READ_BYTES = 1 << 16


class Orders(Protocol):
    """What the outside wants."""

    @property
    def stop(self) -> Stop | None: ...


# newer torch has another name for it; either way it saves a broadcast a step of values that no training step reads
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


class FirstRankFailed(OSError):
    """What the first rank was to do alone did not succeed."""


# --- what a rank knows of the others -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among those that share each batch. Every method but `share` is collective: all ranks call it, in the same order."""

    rank: int
    size: int
    _side: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """A gloo group for words between CPUs, apart from the gradients' own."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks, writes and is told."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of `count` things: contiguous, in the order of ranks, sizes differing by one at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place and returned. Any shape, on the ranks' device (on the CPU with gloo)."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: int) -> int:
        """The largest value that any rank came with. On the CPU: it waits for the other ranks, not for a device."""
        if self.size == 1:
            return value
        word = torch.tensor([value])
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self._side)
        return int(word[0])

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Gives every rank the first one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self._side)

    @contextmanager
    def first_succeeds(self) -> Iterator[bool]:
        """A block of which the first rank alone does the work, and knows it by True. If it fails there, the block raises on every rank.

        Raises what the first rank's block raises there, FirstRankFailed (an OSError, for what is done so is writing) on the others.
        """
        try:
            yield self.is_first
        except Exception:
            self.agree(1)
            raise
        if self.agree(0):
            raise FirstRankFailed("the first rank could not do it; its own error says why")

    def wrap(self, model: nn.Module, *, device: torch.device) -> nn.Module:
        """The model, its gradients summed (not averaged) over the ranks in each backward pass; itself where this rank is alone.

        Every rank's weights become the first one's. Buffers stay each rank's own: without synchronisation, running statistics are of
        the rank's own slices, and those of the first rank are the run's. Score and save the wrapped module, not the wrapper.
        """
        if self.size == 1:
            return model
        wrapped = DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device],
            **_OWN_BUFFERS,
            gradient_as_bucket_view=True,  # no second copy of the gradients
            # otherwise the buckets are laid out anew after the first step, and with them the order of a sum over three or more ranks: a
            # resumed run, whose first step is another, had other bits (measured). Torch's warning that nothing is unused is beside this
            find_unused_parameters=True,
        )
        wrapped.register_comm_hook(None, lambda _, bucket: _summed(bucket))  # it refuses annotations that are strings
        return wrapped

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around forward and backward of all but a step's last micro-batch: gradients stay here, to be summed with the last one's."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def convert_sync_bn(self, model: nn.Module) -> nn.Module:
        """The model, on its device already, with batch statistics over all ranks; the names in its state stay. Goes before `wrap`.

        Raises ValueError on a CPU: torch has no kernels for it there.
        """
        if self.size == 1:
            return model
        if any(parameter.device.type == "cpu" for parameter in model.parameters()):
            raise ValueError("model.sync_batch_norm=true: torch can do it on GPUs only; set it to false, or take norm group or none")
        from timm.layers.norm_act import convert_sync_batchnorm  # knows timm's layers that carry an activation, and torch's own

        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted


ALONE = Ranks(0, 1)
"""The one process of an ordinary run: every method returns at once."""


def _summed(bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Sums a bucket over ranks. DDP's own hook also divides by their number.

    The loss is normalised by the whole batch's normaliser, so the sum is the gradient. Multiplying the loss by the number of ranks for
    DDP to divide again would round twice where that is no power of two, and could overflow a scaled fp16 loss.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None, "asked for asynchronously"
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


# --- the agent ---------------------------------------------------------------------------------------------------------------------

Body = Callable[[TrainerConfig, Ranks, Emit, Orders], Done | Failure]


def launch(config: TrainerConfig, *, body: Body, emit: Emit, orders: Orders) -> Done | Failure:
    """Runs `body` in `config.ranks` forks of this process and returns how it ended, once all of them are gone.

    body: gets the config of its rank (one device, a share of the cores and threads). What rank 0 emits reaches `emit`, from a thread of
    this process; what `orders` say reaches rank 0 within LOOK_S. The end is returned, not emitted.
    If a rank fails or dies, the others are ended and the first cause is returned. If this process dies, the kernel kills the ranks.
    To be called from a thread that outlives the ranks, in a process that has touched neither CUDA nor a parallel region: a fork would
    break. A SIGTERM ends the ranks, then this process.
    """
    board = _Switchboard(_Pipes(config.ranks), emit=emit, orders=orders)
    with _own_signals(), board.listening(), TemporaryDirectory(prefix="powergrad-ranks-") as logs:
        exit_codes = _run_ranks((config, body, board.pipes, os.getpid()), ranks=config.ranks, run_id=config.run_id, logs=logs)
    # the agent is a cycle that holds the store, whose server is a thread: left to be collected in a later fork, it would crash there
    gc.collect()
    if board.broken is not None:
        raise board.broken
    return board.verdict(exit_codes)


def _run_ranks(args: tuple[object, ...], *, ranks: int, run_id: str, logs: str) -> dict[int, int | None]:
    """Forks the ranks, each of which calls `_rank(*args)`, and returns their exit codes once all are gone (negative: the signal)."""
    spec = WorkerSpec(
        role="rank",
        local_world_size=ranks,
        entrypoint=_rank,
        args=args,
        rdzv_handler=_Loopback(run_id),
        max_restarts=0,
        monitor_interval=LOOK_S,
        local_addr=LOOPBACK,
    )
    agent = _Agent(spec, DefaultLogsSpecs(log_dir=logs), start_method="fork")  # a spawned rank would import torch anew
    agent.run()
    return agent.exit_codes()


class _Agent(LocalElasticAgent):
    """The elastic agent, which tells only one of its failed ranks; this one knows them all."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids: dict[int, Any] = super()._start_workers(worker_group)
        children = {child.pid: child for child in multiprocessing.active_children()}
        self._children = {rank: children.get(pid) for rank, pid in pids.items()}
        return pids

    def exit_codes(self) -> dict[int, int | None]:
        return {rank: None if child is None else child.exitcode for rank, child in self._children.items()}


class _Loopback(RendezvousHandler):
    """A single node whose store listens on the loopback only, on a port bound here: the one that others make listens on every address."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listening = socket.create_server((LOOPBACK, 0))
        self._port: int = listening.getsockname()[1]
        self._store = TCPStore(LOOPBACK, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
        self._closed = False

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        where = RendezvousStoreInfo(LOOPBACK, self._port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), rank=0, world_size=1, bootstrap_store_info=where)

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self.set_closed()
        return True


@contextmanager
def _own_signals() -> Iterator[None]:
    """Puts back the handler that the elastic agent replaces. A signal that it ended the ranks for then ends this process too."""
    before = signal.getsignal(signal.SIGTERM)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"  # Ctrl-C stays with whoever handles it in this process
    with warnings.catch_warnings():
        # the threads of this process hold no lock when it forks: they wait for pipes and clocks
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        try:
            yield
        except SignalException as error:
            signal.signal(error.sigval, before)
            os.kill(os.getpid(), error.sigval)
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)


class _Pipes:
    """Two pipes a rank: what it says, what it is told. They are made before the ranks and inherited by all."""

    def __init__(self, ranks: int) -> None:
        self.said = [os.pipe() for _ in range(ranks)]
        self.told = [os.pipe() for _ in range(ranks)]

    def as_rank(self, rank: int) -> tuple[int, int]:
        """Closes, in a rank, all ends but its own two: where it says, and where it is told. So each pipe ends with its other side."""
        say, hear = self.said[rank][1], self.told[rank][0]
        for fd in {fd for pair in (*self.said, *self.told) for fd in pair} - {say, hear}:
            os.close(fd)
        return say, hear


class _Cause(IntEnum):
    """Why a rank failed; the smallest is what everything else follows from."""

    ITSELF = 0
    PEER = 1
    AGENT = 2


class _Switchboard:
    """The agent's side of the pipes: a thread that hears all ranks and hands orders on to the first."""

    def __init__(self, pipes: _Pipes, *, emit: Emit, orders: Orders) -> None:
        self.pipes = pipes
        self.broken: BaseException | None = None
        """What `emit` raised: nobody listens any more."""
        self._emit, self._orders = emit, orders
        self._size = len(pipes.said)
        self._started: set[int] = set()
        self._rests = [b""] * self._size
        self._ends: dict[int, Done | Failure | None] = {}  # in the order they came; None: without a word
        self._told: Stop | None = None
        self._open = {fd for pair in (*pipes.said, *pipes.told) for fd in pair}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears the ranks for the time of the block, and then what is left in their pipes."""
        thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._close(*(write for _, write in self.pipes.said))  # a rank that never came to speak: let its pipe end
            thread.join()
            self._close(*self._open)

    def verdict(self, exit_codes: dict[int, int | None]) -> Done | Failure:
        """How the whole ended: by the first failure that no other one caused, or well."""
        failures: list[tuple[_Cause, Failure]] = []
        for rank, end in self._ends.items():
            if end is None:
                code = exit_codes[rank]
                failures.append((_Cause.AGENT if code in (-signal.SIGTERM, ORPHANED) else _Cause.ITSELF, _died(rank, self._size, code)))
            elif isinstance(end, Failure):
                failures.append((_Cause.PEER if _follows(end) else _Cause.ITSELF, end))
        if failures:
            return min(failures, key=lambda failure: failure[0])[1]
        first = self._ends[0]
        assert isinstance(first, Done), "there are no others left"
        return first

    def _close(self, *fds: int) -> None:
        for fd in fds:
            if fd in self._open:
                self._open.discard(fd)
                os.close(fd)

    def _listen(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for rank, (read, _) in enumerate(self.pipes.said):
                    selector.register(read, selectors.EVENT_READ, rank)
                while selector.get_map():
                    for key, _ in selector.select(LOOK_S):
                        if not self._hear(key.data):
                            selector.unregister(key.fd)
                    self._hand_on_orders()
        except BaseException as error:  # noqa: BLE001 # raised again by `launch`
            self.broken = error
            self._close(*(write for _, write in self.pipes.told))  # ends the ranks, and so the agent

    def _hear(self, rank: int) -> bool:
        """Takes what the rank has said; False at its end."""
        data = os.read(self.pipes.said[rank][0], READ_BYTES)
        *lines, self._rests[rank] = (self._rests[rank] + data).split(b"\n")
        for line in lines:
            if rank not in self._started:
                self._started.add(rank)
                if len(self._started) == self._size:  # not earlier: a rank yet to be forked must not find another file under these numbers
                    self._close(*(write for _, write in self.pipes.said), *(read for read, _ in self.pipes.told))
            else:
                self._take(rank, decode_message(line))
        if not data:
            self._ends.setdefault(rank, None)
        return bool(data)

    def _take(self, rank: int, message: Message) -> None:
        match message:
            case Done() | Failure():
                self._ends[rank] = message
            case _:
                self._emit(message)

    def _hand_on_orders(self) -> None:
        stop = self._orders.stop
        if stop is not None and stop != self._told:
            self._told = stop
            with suppress(BrokenPipeError):
                os.write(self.pipes.told[0][1], encode(Control(stop=stop)))


def _died(rank: int, size: int, exit_code: int | None) -> Failure:
    if exit_code is None:
        how = "without a word"
    elif exit_code < 0:
        how = f"by signal {signal.Signals(-exit_code).name}"
    else:
        how = f"with exit code {exit_code}"
    hint = "the end of the log says more"
    if exit_code == -signal.SIGKILL:
        hint += "; the system kills so when memory runs out: lower data.batch_size or data.workers"
    return Failure(code="crashed", detail=f"rank {rank} of {size} ended {how}", hint=hint, traceback="")


_LOST_PEER = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "DistNetworkError")
"""What a rank's errors say when another one has left."""


def _follows(failure: Failure) -> bool:
    return any(sign in failure.detail or sign in failure.traceback for sign in _LOST_PEER)


# --- a rank ------------------------------------------------------------------------------------------------------------------------


class _Told:
    """The orders that have reached this rank."""

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def obey(self, hear: int) -> None:
        """Reads orders until the agent is gone, and ends this process with it (the kernel does so first, on Linux)."""
        with os.fdopen(hear, "rb") as lines:
            for line in lines:
                self.stop = decode_control(line).stop or self.stop
        os._exit(ORPHANED)


def _rank(config: TrainerConfig, body: Body, pipes: _Pipes, agent: int) -> None:
    """The body of a rank's process: the elastic agent has forked it and set its environment."""
    die_with_parent(agent)
    gc.freeze()  # what came along is the agent's: its threads are not here, and what stands on them must not be taken down here
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's handler came along, and would not run inside a collective
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the agent decides
    rank = int(os.environ["RANK"])
    say, hear = pipes.as_rank(rank)
    _write(say, b"here\n")
    own = _config_of(config, rank)
    _settle(own, rank)
    told = _Told()
    threading.Thread(target=told.obey, args=(hear,), name="orders", daemon=True).start()

    def emit(message: Message) -> None:
        if rank == 0:
            _write(say, encode(message))

    try:
        ranks = _join(own)
        end = body(own, ranks, emit, told)
    except BaseException as error:  # noqa: BLE001 # its last word, whatever it is
        end = _failure_of(error)
    _write(say, encode(end))
    if isinstance(end, Failure):
        _leave(1)  # before the group is taken down: this word must come before those of the ranks that lose this one
    ranks.barrier()
    dist.destroy_process_group()


def _config_of(config: TrainerConfig, rank: int) -> TrainerConfig:
    """One device, a share of the cores (all distinct where there are enough) and of the threads."""
    size, cpus = config.ranks, config.cpus
    if len(cpus) >= size:
        cpus = cpus[Ranks(rank, size).share(len(cpus))]
    elif cpus:
        cpus = [cpus[rank % len(cpus)]]
    device = f"cuda:{rank}" if config.device.startswith("cuda") else config.device
    return config.model_copy(update={"device": device, "cpus": cpus, "cpu_threads": max(1, config.cpu_threads // size)})


def _settle(config: TrainerConfig, rank: int) -> None:
    if config.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config.cpus)  # before any thread is made: they inherit it
    torch.set_num_threads(config.cpu_threads)
    if rank != 0:
        logging.getLogger().setLevel(logging.WARNING)  # the first one's log is the run's
    with suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(f"{setproctitle.getproctitle()} rank {rank}")


def _join(config: TrainerConfig) -> Ranks:
    """Meets the other ranks. Reads the environment that the elastic agent has made."""
    device = torch.device(config.device)
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=LONGEST_WAIT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    side = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    assert isinstance(side, dist.ProcessGroup), "this rank is one of its members"
    return Ranks(dist.get_rank(), dist.get_world_size(), side)


def _failure_of(error: BaseException) -> Failure:
    from powergrad.trainer import failure_of  # which launches, and so imports, this module

    return failure_of(error)


def _write(fd: int, line: bytes) -> None:
    while line:
        line = line[os.write(fd, line) :]


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
