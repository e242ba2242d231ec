"""`find_chains`: norms (and scales) that alone consume a convolution, across modules.

A convolution keeps its place in the tree, and takes in the channelwise maps behind it; they become
identities. What stands in between may move values and change none. The two need not be children of
one module: the `tail` of a module is the layer that computes its output, the `head` the
channelwise map that alone consumes its input, and both are looked up through any depth. A norm
behind a concatenation goes in parts into the convolutions in front of it.

A fold has to hold for every call: each call of the convolution must be followed by the norm, and
each call of the norm must follow the convolution, in every way that a forward may take.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.convolution import Layer
from repnet.fold.frame import Frame
from repnet.fold.kernels import CONVOLVING, Kernels
from repnet.fold.record import RecordingError
from repnet.fold.regions import Region
from repnet.fold.survey import Survey, is_identity, users_of
from repnet.kernel import ConvKernel, NotFoldableError

# What moves values and changes none.
REARRANGING = {
    "contiguous", "flatten", "permute", "reshape", "reshape_as", "squeeze", "swapaxes",
    "swapdims", "transpose", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip

UNFED = "no convolution before it feeds it alone"


@dataclass(frozen=True)
class Head:
    """The channelwise map that a module begins with.

    Args:
        name: of the module that holds it.
        axes: spatial axes of its input.
        prefix: whether the module goes on after it.
    """

    name: str
    axes: int
    prefix: bool = False


@dataclass(frozen=True)
class Link:
    """One follower of a convolution, and which of its channels are those of the convolution."""

    head: Head
    start: int
    stop: int


class Chains:
    """Finds the chains of a model.

    Args:
        survey: of the model.
        kernels: without values.
        whole: names of the modules that become one convolution.
        regions: what becomes one convolution already.
    """

    def __init__(
        self, survey: Survey, kernels: Kernels, whole: Iterable[str], regions: Iterable[Region]
    ) -> None:
        self.survey, self.kernels, self.whole = survey, kernels, set(whole)
        self.taken = {node for region in regions for node in region.nodes}
        self.rewritten = {region.frame for region in regions}  # what all calls of these do is known
        self.gone = {str(n.target) for n in self.taken if n.op == "call_module"} | self.whole
        self.reasons: dict[str, str] = {}  # by name, why a norm stays
        self._heads: dict[str, Head | None] = {}
        self._tails: dict[str, str | None] = {}
        self._leads: dict[str, str | None] = {}

    def find(self) -> dict[str, tuple[Link, ...]]:
        """Return the followers of each convolution, by its name."""
        sequences: dict[str, list[tuple[tuple[Link, fx.Node], ...]]] = defaultdict(list)
        heads: dict[str, set[fx.Node]] = defaultdict(set)  # calls of each follower
        barred: dict[str, str] = {}  # layers with a call that is not known
        for name, frames in self.survey.frames.items():
            if self._is_gone(name):
                continue
            for frame in frames[:1] if name in self.rewritten else frames:
                try:
                    paths = self.survey.paths(frame) if self._matters(frame) else []
                except RecordingError as error:
                    for node in frame.graph.nodes:
                        if node.op == "call_module":
                            for name in self._ends(node):
                                barred.setdefault(name, str(error))
                    continue
                for path in paths:
                    self._scan(path, sequences, heads, barred)
        links = {}
        for tail, found in sequences.items():
            common = found[0]
            for other in found[1:]:
                same = [a[0] == b[0] for a, b in zip(common, other, strict=False)]
                length = same.index(False) if False in same else len(same)
                if length < len(common):
                    self._note(common[length:], f"'{tail}' is also used elsewhere")
                common = common[:length]
            links[tail] = tuple(link for link, _ in common)
        nodes = {
            (tail, n): {s[n][1] for s in sequences[tail] if len(s) > n}
            for tail in links
            for n in range(len(links[tail]))
        }
        while True:
            covered: dict[str, dict[fx.Node, int]] = defaultdict(lambda: defaultdict(int))
            for tail, own in links.items():
                for n, link in enumerate(own):
                    for node in nodes[tail, n]:
                        covered[link.head.name][node] += link.stop - link.start
            kept = {}
            for tail, own in links.items():
                reason = barred.get(tail, "") or self._refusal(
                    tail, [link.head.name for link in own]
                )
                length = 0 if reason else len(own)
                for n, link in enumerate(own[:length]):
                    why = barred.get(link.head.name, "")
                    calls = covered[link.head.name]
                    if not why and set(calls) != heads[link.head.name]:
                        why = f"'{link.head.name}' is also used elsewhere"
                    if not why and any(calls[c] != _channels(c) for c in calls):
                        why = UNFED
                    if why:
                        length, reason = n, why
                        break
                if reason:
                    for link in own[length:]:
                        self.reasons.setdefault(link.head.name, reason)
                kept[tail] = own[:length]
            if kept == links:
                return {tail: own for tail, own in kept.items() if own}
            links = kept

    def _is_gone(self, name: str) -> bool:
        """Return whether a module is part of what becomes a convolution."""
        parts = name.split(".")
        return "" in self.gone or any(
            ".".join(parts[:n]) in self.gone for n in range(1, len(parts) + 1)
        )

    def fronts(self, absorbed: set[str]) -> dict[str, Head]:
        """Return the norm that alone feeds a convolution, by the name of the convolution.

        Only where the convolution inserts no zeros behind the norm: those would have to be what
        the norm makes of zero.

        Args:
            absorbed: names of the norms that have gone into a convolution already.
        """
        pairs: dict[str, set[str | None]] = defaultdict(set)  # convolutions by norm
        feeds: dict[str, set[str | None]] = defaultdict(set)  # norms by convolution
        heads: dict[str, Head] = {}
        for name, frames in self.survey.frames.items():
            if self._is_gone(name):
                continue
            for frame in frames[:1] if name in self.rewritten else frames:
                fixed = not (self.survey.distrust(frame) or frame.decisions)
                given = self.survey.tensor_argument(frame)
                for node in frame.graph.nodes:
                    if node.op != "call_module" or node in self.taken:
                        continue
                    head, lead = self.head(str(node.target)), self.lead(str(node.target))
                    if lead is not None and not (node.args == (given,) and self.lead(name) == lead):
                        feeds[lead].add(self._fed_by(node) if fixed else None)
                    if head is not None and head.name == node.target and not head.prefix:
                        heads[head.name] = head
                        users = users_of(node)
                        alone = len(users) == 1 and not node.meta.get("escaped") and fixed
                        target = users[0] if alone and users[0].op == "call_module" else None
                        pairs[head.name].add(
                            self.lead(str(target.target))
                            if target is not None and target.args == (node,)
                            else None
                        )
        found: dict[str, Head] = {}
        for norm, leads in pairs.items():
            (lead,) = leads if len(leads) == 1 else (None,)
            if lead is None or norm in absorbed or feeds[lead] != {norm}:
                continue
            if not self._refusal(norm, (lead,)) and self._is_free(norm, lead):
                found[lead] = heads[norm]
        return found

    def _fed_by(self, node: fx.Node) -> str | None:
        given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        called = isinstance(given, fx.Node) and given.op == "call_module"
        return str(given.target) if called else None  # type: ignore[union-attr]

    def _is_free(self, norm: str, lead: str) -> bool:
        """Return whether a convolution may take in the norm in front of it."""
        kernels = []
        for name in (norm, lead):
            node = self.survey.leaves[name][0][1] if name in self.survey.leaves else None
            if node is None or not isinstance(node.args[0], fx.Node):
                return False
            try:
                identity = self.kernels.identity(node.args[0])
                kernels.append(self.kernels.node(node, {node.args[0]: identity}))
                if len(kernels) == 2:
                    kernels[0].then(kernels[1])
            except NotFoldableError:
                return False
        return True

    def lead(self, name: str) -> str | None:
        """Return the convolution or linear layer that alone consumes the input of a module."""
        survey = self.survey
        if name in survey.leaves:
            return name if isinstance(survey.modules[name], Layer) else None
        if name in self._leads:
            return self._leads[name]
        self._leads[name] = None
        if survey.is_uniform(name) and name not in self.gone and name not in survey.hooked:
            given = survey.tensor_argument(survey.frames[name][0])
            users = users_of(given) if given is not None else []
            if len(users) == 1 and users[0].op == "call_module" and users[0].args == (given,):
                self._leads[name] = self.lead(str(users[0].target))
        return self._leads[name]

    def _note(self, links: Iterable[tuple[Link, fx.Node]], reason: str) -> None:
        for link, _ in links:
            self.reasons.setdefault(link.head.name, reason)

    def _refusal(self, tail: str, others: Sequence[str]) -> str:
        """Return why code outside could see that these layers are gone."""
        if not others:
            return ""
        names = [tail, *others]
        hooks = next((n for n in names if n in self.survey.hooked), None)
        if hooks is not None:
            return f"'{hooks}' has a forward hook; remove it first"
        if reason := self.survey.entanglement(names):
            return reason
        outside = next((o for n in names if (o := self.survey.callers_outside(n))), "")
        return f"'{outside}' is also used elsewhere" if outside else ""

    def _matters(self, frame: Frame) -> bool:
        """Return whether a chain may begin or end in the forward of a frame."""
        nodes = [n for n in frame.graph.nodes if n.op == "call_module"]
        return any(self._ends(node) for node in nodes)

    def _ends(self, node: fx.Node) -> list[str]:
        """Return the layers that a call may begin or end with."""
        name = str(node.target)
        tail, head = self.tail(name), self.head(name)
        return [n for n in (tail, head.name if head else None) if n is not None]

    # One forward

    def _scan(
        self,
        frame: Frame,
        sequences: dict[str, list[tuple[tuple[Link, fx.Node], ...]]],
        heads: dict[str, set[fx.Node]],
        barred: dict[str, str],
    ) -> None:
        result = self.survey.output(frame)
        given = self.survey.tensor_argument(frame)
        own_tail = self.tail(frame.name)
        own_head = self.head(frame.name)
        for node in frame.graph.nodes:
            if node.op != "call_module" or node in self.taken:
                continue
            head = self.head(str(node.target))
            if head is not None:
                first = given is not None and node.args == (given,) and own_head == head
                if not first:
                    heads[head.name].add(node)
            tail = self.tail(str(node.target))
            if tail is None:
                continue
            alone = len(users_of(node)) == 1 and own_tail == tail
            passed_on = alone and node is result and frame.parent
            if not passed_on:
                sequences[tail].append(tuple(self._followers(frame, node)))
        self._bar_undecided(frame, barred)

    def _bar_undecided(self, frame: Frame, barred: dict[str, str]) -> None:
        """Bar the layers whose calls may depend on a number that was not followed.

        What was called before it, and has left nothing that can be used after it, does not.
        """
        for decision in frame.decisions:
            if decision.forced:
                continue
            for node in frame.graph.nodes:
                if node.op != "call_module":
                    continue
                time = node.meta["time"]
                before = time < decision.time and node not in decision.alive
                after = decision.end is not None and time >= decision.end
                if not before and not after and decision.end is None:
                    reason = f"{self.survey.whose(frame)} makes a number of a size"
                elif decision.end is not None and decision.time <= time < decision.end:
                    reason = f"{self.survey.whose(frame)} makes a number of a size around it"
                else:
                    continue
                for name in self._ends(node):
                    barred.setdefault(name, reason)

    def _followers(self, frame: Frame, begin: fx.Node) -> list[tuple[Link, fx.Node]]:
        """Return what alone consumes the output of a layer, one after the other."""
        links: list[tuple[Link, fx.Node]] = []
        channel_axis = -1 if isinstance(self._layer(begin), nn.Linear) else 1
        if "shape" not in begin.meta or len(begin.meta["shape"]) < 2:
            return links
        channels = begin.meta["shape"][channel_axis]
        node, start, path, total = begin, 0, [begin], channels
        while not (node.meta.get("escaped") or node.meta.get("changed")):
            users = users_of(node)
            if len(users) != 1 or users[0] in self.taken:
                break
            (user,) = users
            if user.op == "call_module":
                if user.args != (node,) or user.kwargs:
                    break
                if _rearranges(user) and total == channels:
                    path.append(user)
                elif not is_identity(user):
                    head = self.head(str(user.target))
                    if head is None or not self._keeps_channels(path, channel_axis):
                        break
                    links.append((Link(head, start, start + channels), user))
                    if head.prefix or head.name != str(user.target):
                        break  # the module goes on after it
            elif _name(user) in ("cat", "concat", "concatenate"):
                if len(path) > 1 or channel_axis != 1 or total != channels:
                    break
                offset = _offset(user, node)
                if offset is None:
                    break
                start, total = offset
            elif not (
                user.op in ("call_method", "call_function")
                and _name(user) in REARRANGING
                and user.args[:1] == (node,)
                and total == channels
            ):
                break
            else:
                path.append(user)
            node = user
        return links

    def _layer(self, node: fx.Node) -> nn.Module | None:
        tail = self.tail(str(node.target))
        return None if tail is None else self.survey.modules[tail]

    def _keeps_channels(self, path: list[fx.Node], channel_axis: int) -> bool:
        """Return whether axis 1 at the end is the channel axis of the layer, in every run.

        Judged by labels that are moved like the values, with sizes that hide no movement.
        """
        if len(path) == 1:
            shape = path[0].meta["shape"]
            return channel_axis == 1 or len(shape) == 2
        shape = path[0].meta["shape"]
        if any(
            size == 1 for n, size in enumerate(shape) if n != channel_axis % len(shape)
        ):  # what moves an axis of size 1 cannot be seen
            return self._seen_elsewhere(path, channel_axis)
        return _moves_labels(path, channel_axis)

    def _seen_elsewhere(self, path: list[fx.Node], channel_axis: int) -> bool:
        """Return whether a run with other sizes shows that the channels stay where they are."""
        names = [(n.op, str(n.target)) for n in path]
        for frames in self.survey.frames.values():
            for frame in frames:
                nodes = list(frame.graph.nodes)
                for node in nodes:
                    if (node.op, str(node.target)) != names[0] or node is path[0]:
                        continue
                    other = [node]
                    for _ in names[1:]:
                        users = users_of(other[-1])
                        if len(users) != 1:
                            break
                        other.append(users[0])
                    shape = node.meta.get("shape", (1,))
                    if [(n.op, str(n.target)) for n in other] != names or any(
                        s == 1 for n, s in enumerate(shape) if n != channel_axis % len(shape)
                    ):
                        continue
                    return _moves_labels(other, channel_axis)
        return False

    # What a module begins and ends with

    def head(self, name: str) -> Head | None:
        """Return the channelwise map that alone consumes the input of a module."""
        if name not in self._heads:
            self._heads[name] = None  # of a module that calls itself
            self._heads[name] = self._head(name)
        return self._heads[name]

    def _head(self, name: str) -> Head | None:
        survey = self.survey
        if name in survey.leaves:
            for _, node in survey.leaves[name][:1]:
                if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                    return None
                try:
                    kernel = self.kernels.node(
                        node, {node.args[0]: self.kernels.identity(node.args[0])}
                    )
                except NotFoldableError as error:
                    if isinstance(survey.modules[name], _BatchNorm):
                        self.reasons.setdefault(name, str(error))
                    return None
                return Head(name, kernel.axes) if _is_scaling(kernel) else None
        if not survey.is_uniform(name) or name in self.whole or survey.keeps(name):
            return None
        frame = survey.frames[name][0]
        given = survey.tensor_argument(frame)
        if given is None:
            return None
        try:
            identity = self.kernels.identity(given)
        except NotFoldableError:
            return None
        users = users_of(given)
        if len(users) != 1 or given.meta.get("changed"):
            return None
        (user,) = users
        if user.op == "call_module" and user.args == (given,) and not user.kwargs:
            if name in survey.hooked or user in self.taken:
                return None
            found = self.head(str(user.target))
            if found is not None:
                return found
        try:
            if _is_scaling(self.kernels.frame(frame, identity)):
                return Head(name, identity.axes)
        except NotFoldableError:
            pass
        if name in survey.hooked:
            return None
        nodes, _ = prefix_of(frame, given, identity, self.kernels)
        return Head(name, identity.axes, prefix=True) if nodes and frame.rewritable else None

    def tail(self, name: str) -> str | None:
        """Return the layer whose output a module returns, untouched and unseen."""
        if name not in self._tails:
            self._tails[name] = None
            self._tails[name] = self._tail(name)
        return self._tails[name]

    def _tail(self, name: str) -> str | None:
        survey = self.survey
        if name in self.whole:
            return name
        if name in survey.leaves:
            return name if isinstance(survey.modules[name], Layer) else None
        if name in survey.hooked:
            return None
        found: set[str | None] = set()
        for frame in survey.frames.get(name, ()):
            try:
                paths = survey.paths(frame)
            except RecordingError as error:
                self.reasons.setdefault(name, str(error))
                return None
            for path in paths:
                result = survey.output(path)
                if (
                    result is None
                    or result in self.taken
                    or len(users_of(result)) != 1
                    or result.meta.get("escaped")
                    or result.meta.get("changed")
                ):
                    return None
                if result.op == "call_module":
                    found.add(self.tail(str(result.target)))
                else:
                    own = isinstance(survey.modules[name], Layer) and _is_own(result, name)
                    found.add(name if own else None)
        return found.pop() if len(found) == 1 else None


def prefix_of(
    frame: Frame, given: fx.Node, kernel: ConvKernel, kernels: Kernels
) -> tuple[list[fx.Node], ConvKernel]:
    """Return the nodes that a forward begins with while they scale channels, and their map."""
    nodes: list[fx.Node] = []
    node = given
    while len(users := users_of(node)) == 1 and users[0].op != "output":
        (user,) = users
        if user.op == "call_module" and is_identity(user):
            node = user
            continue
        try:
            following = kernels.node(user, {node: kernel})
        except NotFoldableError:
            break
        if not isinstance(following, ConvKernel) or not following.is_channelwise:
            break
        nodes.append(user)
        node, kernel = user, following
    return nodes, kernel


def _is_scaling(kernel: Any) -> bool:
    return isinstance(kernel, ConvKernel) and kernel.is_channelwise and not kernel._is_identity


def _is_own(node: fx.Node, name: str) -> bool:
    """Return whether a node convolves with the weight and bias of the module, as they are."""
    if node.op != "call_function" or node.target not in CONVOLVING:
        return False
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    prefix = f"{name}." if name else ""
    return (
        isinstance(weight, fx.Node)
        and (weight.op, weight.target) == ("get_attr", f"{prefix}weight")
        and (
            bias is None
            or (
                isinstance(bias, fx.Node)
                and (bias.op, bias.target) == ("get_attr", f"{prefix}bias")
            )
        )
    )


def _channels(call: fx.Node) -> int:
    (given,) = call.args
    assert isinstance(given, fx.Node)
    return int(given.meta["shape"][1])


def _offset(user: fx.Node, node: fx.Node) -> tuple[int, int] | None:
    """Return where the channels of `node` begin in a concatenation, and how many that has."""
    parts: Any = user.args[0] if user.args else user.kwargs.get("tensors")
    dim = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
    shape = user.meta["shape"]
    if dim not in (1, 1 - len(shape)) or list(parts).count(node) != 1:
        return None
    before = parts[: list(parts).index(node)]
    return sum(part.meta["shape"][1] for part in before), shape[1]


def _moves_labels(path: list[fx.Node], channel_axis: int) -> bool:
    shape = path[0].meta["shape"]
    axis_shape = [1] * len(shape)
    axis_shape[channel_axis] = -1
    labels = torch.arange(shape[channel_axis]).reshape(axis_shape).expand(shape)
    values: dict[fx.Node, Tensor] = {path[0]: labels}
    for before, node in pairwise(path):
        try:
            values[node] = _rearrange(node, {node.args[0]: values[before]})  # type: ignore[dict-item]
        except Exception:  # sizes from elsewhere
            return False
    moved = values[path[-1]]
    channels = torch.arange(shape[channel_axis]).reshape(-1, *(1,) * (moved.ndim - 2))
    return moved.ndim > 1 and moved.shape[1] == len(channels) and bool((moved == channels).all())


def _rearranges(call: fx.Node) -> bool:
    """Return whether a module moves values and does nothing else."""
    frame: Frame | None = call.meta.get("frame")
    if frame is None or frame.unclear or frame.decisions or frame.frozen:
        return False
    nodes = [n for n in frame.graph.nodes if n.op not in ("placeholder", "output")]
    moves = [n for n in nodes if "shape" in n.meta and n.target is not getattr]
    return bool(moves) and all(n.op != "call_module" and _name(n) in REARRANGING for n in moves)


def _rearrange(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    if node.op == "call_module":
        (labels,) = values.values()
        inner: dict[fx.Node, Tensor] = {}
        for n in node.meta["frame"].graph.nodes:
            if n.op == "placeholder" and "shape" in n.meta:
                inner[n] = labels
            elif n.op == "output":
                return inner[n.args[0]]
            elif "shape" in n.meta:
                inner[n] = _rearrange(n, inner)

    def value(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        if "shape" in argument.meta:
            return torch.empty(argument.meta["shape"], device="meta")
        return argument.meta["value"]

    args: Any = fx.node.map_arg(node.args, value)
    kwargs: Any = fx.node.map_arg(node.kwargs, value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
