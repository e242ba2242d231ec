"""`Chains`: finds norms (and scales) next to a convolution that can take them in.

Most networks keep a convolution and its norm in different modules, so the two are looked up through
any depth: the *tail* of a module is the layer whose output it returns untouched, its *head* is what
alone consumes its input. One walk per call of a layer, `_followers`, goes from reader to reader for
as long as there is only one, across whatever moves values and changes none, and notes the heads. A
norm behind a concatenation goes in parts into the convolutions in front of it. The same walk from a
norm finds the convolution that it alone feeds. Nothing is replaced but the layer itself and the
norm, which becomes an identity: every class and every forward stays.

A fold must hold for every call, in every way that a forward may take. So the walks only collect
candidates: a norm goes if it follows the same layer at each call of this layer, and if these calls
account for all calls of the norm. A norm that fails this stays, and with it the norms behind it,
which may uncover others; hence the loop in `find`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.convolution import Layer
from repnet.fold.frame import Frame
from repnet.fold.kernels import CONVOLVING, Kernels, argument_of, run
from repnet.fold.record import RecordingError
from repnet.fold.regions import Region
from repnet.fold.survey import Survey, users_of
from repnet.kernel import ConvKernel, NotFoldableError

# What moves values and changes none.
REARRANGING = {
    "contiguous", "flatten", "permute", "reshape", "reshape_as", "squeeze", "swapaxes",
    "swapdims", "transpose", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip

UNFED = "no convolution before it feeds it alone"


@dataclass(frozen=True)
class Head:
    """What alone consumes the input of a module: a channelwise map or a layer.

    Args:
        name: of the module that holds it.
        prefix: whether that module goes on after it.
        scales: whether it is a channelwise map; else a convolution or linear layer.
    """

    name: str
    prefix: bool = False
    scales: bool = True


@dataclass(frozen=True)
class Link:
    """A follower of a layer, and which of its channels come from that layer."""

    head: Head
    start: int
    stop: int


Calls = list[tuple[Link, set[fx.Node]]]  # followers, each with all its calls after one layer


def _once(find: Callable[[Chains, str], Any]) -> Callable[[Chains, str], Any]:
    """Let a method remember what it found for each name: None while it looks for it."""

    @wraps(find)
    def found(self: Chains, name: str) -> Any:
        known = self._known[find.__name__]
        if name not in known:
            known[name] = None  # of a module that calls itself
            known[name] = find(self, name)
        return known[name]

    return found


class Chains:
    """Finds the chains of a model.

    Args:
        survey: of the model.
        kernels: without values.
        whole: names of the modules that become one convolution.
        regions: parts of forwards that become one convolution.
    """

    def __init__(
        self, survey: Survey, kernels: Kernels, whole: Iterable[str], regions: Iterable[Region]
    ) -> None:
        self.survey, self.kernels, self.whole = survey, kernels, set(whole)
        self.taken = {node for region in regions for node in region.nodes}
        gone = [*self.whole, *(str(n.target) for n in self.taken if n.op == "call_module")]
        self.gone = {inner for name in gone for inner in survey.below(name)}
        self.reasons: dict[str, str] = {}  # by name, why a norm stays
        self._known: dict[str, dict[str, Any]] = defaultdict(dict)
        self._after: dict[str, list[list[tuple[Link, fx.Node]]]] = defaultdict(list)
        self._calls: dict[str, set[fx.Node]] = defaultdict(set)  # by head
        self._barred: dict[tuple[str, str], str] = {}  # heads and tails with a call not understood
        rewritten = {region.frame for region in regions}
        for name, frames in survey.frames.items():
            if name not in self.gone:
                for frame in frames[:1] if name in rewritten else frames:
                    self._collect(frame)

    def find(self) -> dict[str, tuple[Link, ...]]:
        """Return the followers of each convolution, by its name."""
        chains: dict[str, Calls] = {}
        for tail, sequences in self._after.items():
            if self.tail(tail) is not None:
                chains[tail] = [calls for calls in _common(sequences) if calls[0].head.scales]
                for link, _ in sequences[0][len(chains[tail]) :]:
                    if link.head.scales:
                        self.reasons.setdefault(link.head.name, f"'{tail}' is also used elsewhere")
        while True:
            covered = _covered(chains)
            kept = {}
            for tail, own in chains.items():
                length, reason = self._check(tail, own, covered)
                kept[tail] = own[:length]
                for link, _ in own[length:]:
                    self.reasons.setdefault(link.head.name, reason)
            if kept == chains:
                return {tail: tuple(link for link, _ in own) for tail, own in kept.items() if own}
            chains = kept

    def fronts(self, absorbed: set[str]) -> dict[str, Head]:
        """Return the norm that alone feeds a convolution, by the name of the convolution.

        Only where the convolution inserts no zeros behind the norm: those would have to be what
        the norm makes of zero.

        Args:
            absorbed: names of the norms that have gone into a convolution already.
        """
        found: dict[str, Head] = {}
        used = set(absorbed)
        for norm, sequences in self._after.items():
            calls = _common(sequences)[:1]
            layer = calls[0][0].head.name if calls else ""
            if layer not in self.survey.leaves or used & {norm, layer}:
                continue
            if not (self._is_map(norm) and isinstance(self.survey.modules[layer], Layer)):
                continue
            if not self._check(norm, calls, _covered({norm: calls}))[0]:
                continue
            first, second = (self.survey.leaves[name][0][1] for name in (norm, layer))
            try:
                self.kernels.alone(first).then(self.kernels.alone(second))
            except NotFoldableError:
                continue
            found[layer] = Head(norm)
            used |= {norm, layer}
        return found

    def _check(
        self, tail: str, own: Calls, covered: Mapping[str, Counter[fx.Node]]
    ) -> tuple[int, str]:
        """Return how many followers of a layer are known to follow it, and why no more do.

        Args:
            tail: the layer.
            own: its followers.
            covered: by follower and call, how many channels come from layers before it.
        """
        if not own:
            return 0, ""
        names = [link.head.name for link, _ in own]
        if reason := self._barred.get(("tail", tail), "") or self._refusal([tail, *names]):
            return 0, reason
        for n, name in enumerate(names):
            calls = covered[name]
            if reason := self._barred.get(("head", name), ""):
                return n, reason
            if calls.keys() != self._calls[name]:
                return n, f"'{name}' is also used elsewhere"
            if any(calls[call] != _channels(call) for call in calls):
                return n, UNFED
        return len(own), ""

    def _refusal(self, names: Sequence[str]) -> str:
        """Return why code outside could see that these layers are gone."""
        if reason := self.survey.entanglement(names):
            return reason
        outside = next((o for n in names if (o := self.survey.callers_outside(n))), "")
        return f"'{outside}' is also used elsewhere" if outside else ""

    # One forward

    def _collect(self, frame: Frame) -> None:
        """Note what each call in a forward begins with, and what follows it."""
        calls = [n for n in frame.graph.nodes if n.op == "call_module"]
        if not any(self._ends(call) for call in calls):
            return
        try:
            paths = self.survey.paths(frame)
        except RecordingError as error:
            for call in calls:
                self._bar(call, str(error))
            return
        for path in paths:
            given, result = self.survey.tensor_argument(path), self.survey.output(path)
            calls = [n for n in path.graph.nodes if n.op == "call_module"]
            for call in calls:
                if call in self.taken:
                    continue
                for kind, name in self._ends(call):
                    # The first and the last call are those of the caller, if there is one.
                    if kind == "head":
                        outer = path.parent and call.args == (given,) and self.head(path.name)
                        if not outer or outer.name != name:
                            self._calls[name].add(call)
                    elif not (path.parent and call is result and self.tail(path.name) == name):
                        self._after[name].append(self._followers(call))
            self._bar_undecided(path, calls)

    def _ends(self, call: fx.Node) -> list[tuple[str, str]]:
        """Return what a call begins with ("head") and what computes its output ("tail")."""
        name = str(call.target)
        head, tail = self.head(name), self.tail(name)
        if tail is None and self._is_map(name):
            tail = name
        ends = [] if head is None else [("head", head.name)]
        return ends if tail is None else [*ends, ("tail", tail)]

    def _bar(self, call: fx.Node, reason: str) -> None:
        for end in self._ends(call):
            self._barred.setdefault(end, reason)

    def _bar_undecided(self, frame: Frame, calls: Iterable[fx.Node]) -> None:
        """Bar the layers whose calls may depend on a number that was not followed.

        What was called before it, and has left nothing that can be used after it, does not. Neither
        does what was called outside of the function that took the decision.
        """
        reason = f"{self.survey.whose(frame)} makes a number of a size"
        for decision in frame.decisions:
            for call in calls if not decision.forced else ():
                time = call.meta["time"]
                if decision.end is None:
                    if time >= decision.time or call in decision.alive:
                        self._bar(call, reason)
                elif decision.time <= time < decision.end:
                    self._bar(call, f"{reason} around it")

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """Return what alone reads a value, if nobody keeps or changes the value."""
        users = users_of(node)
        if len(users) != 1 or users[0] in self.taken:
            return None
        return None if node.meta.get("escaped") or node.meta.get("changed") else users[0]

    def _followers(self, begin: fx.Node) -> list[tuple[Link, fx.Node]]:
        """Return what alone consumes the output of a layer, one after the other."""
        shape = begin.meta.get("shape", ())
        if len(shape) < 2:
            return []
        tail = self.tail(str(begin.target))
        is_linear = tail is not None and isinstance(self.survey.modules[tail], nn.Linear)
        axis = -1 if is_linear else 1
        channels = total = shape[axis]
        start = 0
        found: list[tuple[Link, fx.Node]] = []
        node, path = begin, [begin]
        while (user := self._reader(node)) is not None:
            if total == channels and _rearranges(user, node):
                path.append(user)
            elif _is_call(user, node):
                head = self.head(str(user.target))
                if head is None or not (head.scales or node is begin):
                    break
                if not self._keeps_channels(path, axis):
                    break
                found.append((Link(head, start, start + channels), user))
                if not head.scales or head.prefix or head.name != str(user.target):
                    break  # the module goes on after it
            elif total == channels:
                offset = _offset(user, node)
                if offset is None:
                    break
                start, total = offset
            else:
                break
            node = user
        return found

    def _keeps_channels(self, path: Sequence[fx.Node], axis: int) -> bool:
        """Return whether axis 1 at the end is the channel axis of the layer, in every run.

        Labels are moved like the values, in a run where no other size is 1: what moves an axis of
        size 1 cannot be seen.
        """
        if len(path) == 1:
            return axis == 1 or len(path[0].meta["shape"]) == 2
        for same in self._runs_of(path):
            shape = same[0].meta.get("shape", (1,))
            if all(size > 1 for n, size in enumerate(shape) if n != axis % len(shape)):
                return _moves_labels(same, axis)
        return False

    def _runs_of(self, path: Sequence[fx.Node]) -> Iterator[Sequence[fx.Node]]:
        """Yield a path, and where other calls went the same way."""
        yield path
        names = [_written(node) for node in path]
        for frame in chain.from_iterable(self.survey.frames.values()):
            for node in frame.graph.nodes:
                if node is path[0] or _written(node) != names[0]:
                    continue
                other = [node]
                while len(other) < len(path) and len(users := users_of(other[-1])) == 1:
                    other.append(users[0])
                if [_written(node) for node in other] == names:
                    yield other

    # What a module begins and ends with

    @_once
    def head(self, name: str) -> Head | None:
        """Return what alone consumes the input of a module."""
        survey = self.survey
        if name in survey.leaves:
            return self._leaf(name)
        if not survey.is_uniform(name) or name in self.gone:
            return None
        frame = survey.frames[name][0]
        given = survey.tensor_argument(frame)
        first = None if given is None else self._reader(given)
        if given is None or first is None:
            return None
        if _is_call(first, given):
            if name in survey.hooked:
                return None
            if (found := self.head(str(first.target))) is not None:
                return found
        if survey.keeps(name):
            return None
        try:
            _, prefix = prefix_of(given, self.kernels)
        except NotFoldableError:
            return None
        try:
            if _is_scaling(self.kernels.frame(frame, self.kernels.identity(given))):
                return Head(name)
        except NotFoldableError:
            pass
        can_rewrite = frame.rewritable and name not in survey.hooked
        return Head(name, prefix=True) if can_rewrite and _is_scaling(prefix) else None

    def _leaf(self, name: str) -> Head | None:
        module, (_, call) = self.survey.modules[name], self.survey.leaves[name][0]
        try:
            scales = _is_scaling(self.kernels.alone(call))
        except NotFoldableError as error:
            if isinstance(module, _BatchNorm):
                self.reasons.setdefault(name, str(error))
            scales = False
        return Head(name, scales=scales) if scales or isinstance(module, Layer) else None

    def _is_map(self, name: str) -> bool:
        """Return whether a module without a forward of its own is a channelwise map."""
        head = self.head(name)
        return head is not None and head.scales and name in self.survey.leaves

    @_once
    def tail(self, name: str) -> str | None:
        """Return the layer whose output a module returns, untouched and unseen."""
        survey = self.survey
        if name in self.whole:
            return name
        if name in survey.leaves:
            return name if isinstance(survey.modules[name], Layer) else None
        if name in survey.hooked:
            return None
        found: set[str | None] = set()
        try:
            for frame in survey.frames.get(name, ()):
                found |= {self._tail_of(path) for path in survey.paths(frame)}
        except RecordingError as error:
            self.reasons.setdefault(name, str(error))
            return None
        return found.pop() if len(found) == 1 else None

    def _tail_of(self, frame: Frame) -> str | None:
        result = self.survey.output(frame)
        if result is None or result in self.taken or self._reader(result) is None:
            return None
        if result.op == "call_module":
            return self.tail(str(result.target))
        is_own = isinstance(frame.module, Layer) and _is_own(result, frame.name)
        return frame.name if is_own else None


def prefix_of(given: fx.Node, kernels: Kernels) -> tuple[list[fx.Node], ConvKernel]:
    """Return the nodes that a forward begins with while they scale channels, and their map.

    Args:
        given: the input of the forward.
        kernels: with or without values.

    Raises:
        NotFoldableError: the input is no feature map.
    """
    nodes: list[fx.Node] = []
    node, kernel = given, kernels.identity(given)
    while len(users := users_of(node)) == 1 and users[0].op != "output":
        (user,) = users
        try:
            following = kernels.node(user, {node: kernel})
        except NotFoldableError:
            break
        if not isinstance(following, ConvKernel) or not following.is_channelwise:
            break
        nodes.append(user)
        node, kernel = user, following
    return nodes, kernel


def _common(sequences: Sequence[Sequence[tuple[Link, fx.Node]]]) -> Calls:
    """Return the followers that are the same at every call of a layer."""
    found: Calls = []
    for calls in zip(*sequences, strict=False):
        if len({link for link, _ in calls}) > 1:
            break
        found.append((calls[0][0], {node for _, node in calls}))
    return found


def _covered(chains: Mapping[str, Calls]) -> dict[str, Counter[fx.Node]]:
    """Return, by follower and call, how many of the channels come from layers before it."""
    covered: dict[str, Counter[fx.Node]] = defaultdict(Counter)
    for link, calls in chain.from_iterable(chains.values()):
        covered[link.head.name].update(dict.fromkeys(calls, link.stop - link.start))
    return covered


def _channels(call: fx.Node) -> int:
    (given,) = call.args
    assert isinstance(given, fx.Node)
    return int(given.meta["shape"][1])


def _is_scaling(kernel: Any) -> bool:
    return isinstance(kernel, ConvKernel) and kernel.is_channelwise and not kernel._is_identity


def _is_call(node: fx.Node, given: fx.Node) -> bool:
    """Return whether a node calls a module on one tensor and nothing else."""
    return node.op == "call_module" and node.args == (given,) and not node.kwargs


def _is_own(node: fx.Node, name: str) -> bool:
    """Return whether a node convolves with the weight and bias of the module, as they are."""
    if node.op != "call_function" or node.target not in CONVOLVING:
        return False

    def is_attribute(value: Any, key: str) -> bool:
        path = f"{name}.{key}" if name else key
        return isinstance(value, fx.Node) and (value.op, value.target) == ("get_attr", path)

    bias = argument_of(node, 2, "bias")
    return is_attribute(argument_of(node, 1, "weight"), "weight") and (
        bias is None or is_attribute(bias, "bias")
    )


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _written(node: fx.Node) -> Any:
    """Return what a node does, whatever it reads."""
    return node.op, node.target, repr(map_arg((node.args, node.kwargs), lambda _: None))


def _offset(user: fx.Node, node: fx.Node) -> tuple[int, int] | None:
    """Return where the channels of `node` begin in a concatenation, and how many that has."""
    if user.op == "call_module" or _name(user) not in ("cat", "concat", "concatenate"):
        return None
    parts = list(argument_of(user, 0, "tensors"))
    shape = user.meta["shape"]
    if argument_of(user, 1, "dim", 0) not in (1, 1 - len(shape)) or parts.count(node) != 1:
        return None
    before = parts[: parts.index(node)]
    return sum(part.meta["shape"][1] for part in before), shape[1]


def _rearranges(node: fx.Node, given: fx.Node) -> bool:
    """Return whether a node moves the values of another one and does nothing else."""
    if node.op in ("call_method", "call_function"):
        return _name(node) in REARRANGING and node.args[:1] == (given,)
    frame: Frame | None = node.meta.get("frame")
    if frame is None or not _is_call(node, given):
        return False
    if frame.unclear or frame.decisions or frame.frozen:
        return False
    nodes = [n for n in frame.graph.nodes if n.op not in ("placeholder", "output")]
    moves = [n for n in nodes if "shape" in n.meta and n.target is not getattr]
    return bool(moves) and all(n.op != "call_module" and _name(n) in REARRANGING for n in moves)


def _moves_labels(path: Sequence[fx.Node], axis: int) -> bool:
    shape = path[0].meta["shape"]
    axis_shape = [1] * len(shape)
    axis_shape[axis] = -1
    labels = torch.arange(shape[axis]).reshape(axis_shape).expand(shape)
    values: dict[fx.Node, Tensor] = {path[0]: labels}
    for before, node in pairwise(path):
        try:
            values[node] = _rearrange(node, {node.args[0]: values[before]})  # type: ignore[dict-item]
        except Exception:  # sizes from elsewhere
            return False
    moved = values[path[-1]]
    channels = torch.arange(shape[axis]).reshape(-1, *(1,) * (moved.ndim - 2))
    return moved.ndim > 1 and moved.shape[1] == len(channels) and bool((moved == channels).all())


def _rearrange(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor:
    """Return what a node makes of labels; the sizes that it reads are those of its run."""
    if node.op == "call_module":
        return fx.Interpreter(nn.Module(), graph=node.meta["frame"].graph).run(*values.values())

    def value(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        if "shape" in argument.meta:
            return torch.empty(argument.meta["shape"], device="meta")
        return argument.meta["value"]

    return run(node, *map_arg((node.args, node.kwargs), value))
