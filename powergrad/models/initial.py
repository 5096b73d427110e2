"""Initial weights as a function of seed and name: two networks begin alike wherever a tensor of one has a namesake of its shape in the other.

The libraries' networks draw in their constructors, from torch's global generator, in an order of their own, and say nothing of names. So
such a network is made twice: first without memory, for the names that its tensors end up with, in the order in which they are registered;
then in earnest, with the generator set anew, by name, before the draws of each tensor. The distributions stay the library's own.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

NO_TENSOR = "end"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The libraries draw weights from torch's global CPU generator: lends it to them, seeded, and puts it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the generators of the GPUs too
        yield


def initialise(model: nn.Module, *, seed: int) -> None:
    """Fills every parameter and buffer of a network of ours: He et al. 2015 (arXiv 1502.01852) for convolutions, as torchvision.

    A classifier's bias is spread by the inputs of its layer, as torch does it: with more of them it is the same draw on a smaller scale.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            generator = _generator(seed, f"{name}.weight")
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            layer.reset_parameters()  # ones, zeros and a zeroed running mean: no draw
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=_generator(seed, f"{name}.weight"))  # nn.Linear's own
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.bias, -bound, bound, generator=_generator(seed, f"{name}.bias"))


def drawn_by_name(make: Callable[[], nn.Module], *, layout: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `make` gives, each of its tensors drawn by seed and name. torch's global generator is lent to it and put back.

    layout: makes the same network, with the weights of nobody: it is called on the meta device, or on the CPU if that will not do.
    """
    names = _names(layout)
    with seeded(seed), _DrawsByName(names, seed=seed) as draws, _told_of_tensors(draws.register):
        return make()


def _key(seed: int, stream: str) -> int:
    """64 bits, of which torch's generator keeps 32."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {stream}".encode(), digest_size=8).digest(), "little")


def _generator(seed: int, stream: str) -> torch.Generator:
    return torch.Generator().manual_seed(_key(seed, stream))


def _names(layout: Callable[[], nn.Module]) -> list[str]:
    """The name in the finished network of each tensor, in the order in which they are registered; a number for one that is not in it."""
    try:
        return _names_on(layout, "meta")
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return _names_on(layout, "cpu")  # a constructor that reads a value


def _names_on(layout: Callable[[], nn.Module], device: str) -> list[str]:
    tensors: list[Tensor] = []
    with torch.device(device), seeded(0), warnings.catch_warnings(), _told_of_tensors(tensors.append):
        warnings.simplefilter("ignore")  # the network in earnest says the same again
        model = layout()
    named: dict[int, str] = {}
    for name, tensor in itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        named.setdefault(id(tensor), name)
    return [named.get(id(tensor), f"#{place}") for place, tensor in enumerate(tensors)]


@contextmanager
def _told_of_tensors(tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `tell` with each parameter and buffer that any module registers meanwhile."""

    def hook(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            tell(tensor)

    handles = [register_module_parameter_registration_hook(hook), register_module_buffer_registration_hook(hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _DrawsByName(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sets torch's global generator by the name of the tensor that is drawn, and says nothing about what is drawn.

    A draw into a registered tensor, or into a part of it, has a stream of its own, and so has what is drawn on the way to the next tensor
    that is registered (`Parameter(torch.randn(...) * 0.02)`) or beside one that is at hand (the square that becomes an orthogonal weight).
    Within a stream the generator runs on: a rejected draw is followed by another one.
    """

    def __init__(self, names: Sequence[str], *, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._seed = names, seed
        self._registered: list[Tensor] = []  # kept: memory that were freed would be taken for the tensor that it held
        self._owners: dict[int, str] = {}
        self._spent: set[str] = set()
        self._stream, self._owner = "", ""
        self._leave_tensors()

    def register(self, tensor: Tensor) -> None:
        self._owners[_memory(tensor)] = self._name(len(self._registered))
        self._registered.append(tensor)
        self._leave_tensors()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        draws, first = torch.Tag.nondeterministic_seeded in func.tags, args[0] if args else None
        if isinstance(first, list) and first and isinstance(first[0], Tensor):  # torch.cat
            first = first[0]
        if not isinstance(first, Tensor):
            if self._owner:  # new memory that is nobody's yet: torch.empty, torch.randn
                self._leave_tensors()
        elif (owner := self._owners.get(_memory(first))) is not None:
            if draws and func._schema.is_mutable:
                part = f"[{first.storage_offset()}]" if first.storage_offset() else ""
                self._turn_to(owner + part, owner=owner)
            elif owner != self._owner:
                self._turn_to(self._unspent(f"{owner} before {self._next()}"), owner=owner)
        if draws:
            self._spent.add(self._stream)
        return func(*args, **(kwargs or {}))

    def _leave_tensors(self) -> None:
        self._turn_to(self._unspent(f"before {self._next()}"), owner="")

    def _unspent(self, stream: str) -> str:
        """The stream, or the first of its numbered continuations that nothing was drawn from."""
        numbered = itertools.chain([stream], (f"{stream} {number}" for number in itertools.count(1)))
        return next(name for name in numbered if name not in self._spent)

    def _turn_to(self, stream: str, *, owner: str) -> None:
        if stream != self._stream:
            torch.default_generator.manual_seed(_key(self._seed, stream))
        self._stream, self._owner = stream, owner

    def _next(self) -> str:
        return self._name(len(self._registered))

    def _name(self, place: int) -> str:
        return self._names[place] if place < len(self._names) else NO_TENSOR


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
