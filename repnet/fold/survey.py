"""`Survey`: what the recorded runs of a model say about its modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from repnet.fold.explore import explore
from repnet.fold.frame import Frame
from repnet.fold.record import Recorder, RecordingError
from repnet.surroundings import has_hooks

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_opaque(module: nn.Module, name: str = "") -> bool:
    """Return whether a module is called as a whole: torch's own layers, but not its containers."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, CONTAINERS)


def is_identity(node: fx.Node) -> bool:
    """Return whether a call of a module returns its argument, as dropout does in evaluation."""
    child: Frame | None = node.meta.get("frame")
    if node.meta.get("hooked"):
        return False
    if child is not None:
        return {n.op for n in child.graph.nodes} <= {"placeholder", "output"} and not child.unclear
    return bool(node.meta.get("identity"))


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node, without calls that returned it and were not used."""
    return [
        user
        for user in node.users
        if not (user.op == "call_module" and not user.users and is_identity(user))
    ]


def users_of(node: fx.Node) -> list[fx.Node]:
    """Return what reads the values of a node, not only its shape."""
    return [
        user
        for user in readers_of(node)
        if not (user.op == "call_function" and user.target is getattr and user.args[1] == "shape")
        and not (
            user.op == "call_method"
            and user.args[0] is not node
            and user.target in ("reshape_as", "view_as", "expand_as")
        )
    ]


def within(name: str, outer: str) -> bool:
    """Return whether a module is `outer` or inside of it."""
    return not outer or name == outer or name.startswith(f"{outer}.")


class Survey:
    """All frames of some runs of one model.

    Args:
        model: the model itself.
        runs: of copies of it; the first one has the sizes of the example.
        sketch: a copy without values.
        reason: why there are none.
    """

    def __init__(
        self, model: nn.Module, runs: Sequence[Recorder], sketch: nn.Module, reason: str = ""
    ) -> None:
        self.model, self.sketch, self.reason = model, sketch, reason
        self.modules = dict(model.named_modules())
        self.every_name = dict(model.named_modules(remove_duplicate=False))
        self.frames: dict[str, list[Frame]] = defaultdict(list)
        self.leaves: dict[str, list[tuple[Frame, fx.Node]]] = defaultdict(list)
        for run in runs:
            for name, frames in run.calls.items():
                self.frames[name] += frames
            for name, calls in run.leaves.items():
                self.leaves[name] += calls
                if isinstance(self.modules[name], nn.Identity | _DropoutNd):
                    for _, node in calls:
                        node.meta["identity"] = not self.modules[name].training or isinstance(
                            self.modules[name], nn.Identity
                        )
        self.hooked = {name for name, module in self.modules.items() if has_hooks(module)}
        for run in runs:
            for frame in chain.from_iterable(run.calls.values()):
                for node in frame.graph.nodes:
                    node.meta["hooked"] = node.op == "call_module" and node.target in self.hooked
        self.owners: dict[int, set[str]] = defaultdict(set)  # modules by their tensors
        for name, module in self.modules.items():
            for tensor in chain(module.parameters(False), module.buffers(False)):
                self.owners[id(tensor)].add(name)
        self.readers: dict[str, set[str]] = defaultdict(set)  # modules whose forward reads a tensor
        for name, frames in self.frames.items():
            for frame in frames:
                for tensor in frame.attributes:
                    self.readers[tensor].add(name)
        self.names = {module: name for name, module in self.modules.items()}
        self._below: dict[str, dict[str, nn.Module]] = {}
        self._trust: dict[Frame, str] = {}
        self._paths: dict[Frame, list[Frame] | str] = {}
        self._uniform: dict[str, bool] = {}

    @property
    def has_state(self) -> bool:
        """Whether a run may leave something behind in the model."""
        frames = chain.from_iterable(self.frames.values())
        return bool(self.reason or self.hooked) or any(f.keeps or f.unclear for f in frames)

    def ran(self, name: str) -> bool:
        return name in self.frames or name in self.leaves

    def calls(self, name: str) -> int:
        return len(self.frames.get(name, ())) + len(self.leaves.get(name, ()))

    def distrust(self, frame: Frame) -> str:
        """Return why a frame may not show what the forward does; "" if it does."""
        if frame not in self._trust:
            self._trust[frame] = self._distrust(frame)
        return self._trust[frame]

    def _distrust(self, frame: Frame) -> str:
        whose = self.whose(frame)
        if frame.unclear:
            return f"{whose} cannot be followed: {frame.unclear}"
        if not frame.frozen:
            return ""
        names = ", ".join(f"'{name}'" for name in frame.frozen)
        parent = frame.parent
        if parent is None or parent.decisions or self.distrust(parent):
            return (
                f"{whose} reads {names}, and may do something else with another value; to fold it "
                "for one value, fold a module whose forward calls it with that value"
            )
        return ""

    @staticmethod
    def whose(frame: Frame) -> str:
        return f"the forward of '{frame.name}'" if frame.name else "the model's own forward"

    def paths(self, frame: Frame) -> list[Frame]:
        """Return a frame for each way that the forward may take.

        Raises:
            RecordingError: they are not all known; the reason is the message.
        """
        if reason := self.distrust(frame):
            raise RecordingError(reason)
        if not any(d.forced for d in frame.decisions):
            return [frame]
        if frame not in self._paths:
            try:
                self._paths[frame] = explore(frame, is_opaque)
            except RecordingError as error:
                whose = self.whose(frame)
                self._paths[frame] = f"{whose} branches on sizes or values of its input ({error})"
        found = self._paths[frame]
        if isinstance(found, str):
            raise RecordingError(found)
        return found

    def is_uniform(self, name: str) -> bool:
        """Return whether every call of a module does the same, whatever the input."""
        if name not in self._uniform:
            frames = self.frames.get(name, [])
            same = bool(frames) and not any(self.distrust(f) or f.decisions for f in frames)
            if same and len(frames) > 1:
                first = frames[0].signature()
                same = all(frame.signature() == first for frame in frames[1:])
            self._uniform[name] = same
        return self._uniform[name]

    def keeps(self, name: str) -> bool:
        """Return whether a module, or one in it, leaves anything behind but its output."""
        return any(f.keeps for inner in self.below(name) for f in self.frames.get(inner, ()))

    def entanglement(self, names: Sequence[str], *, keep_hooks: bool = True) -> str:
        """Return why code outside could see that modules are gone; "" if it could not.

        Args:
            names: of the modules, with all that is in them.
            keep_hooks: whether a hook on one of them is a reason.
        """
        inside = {inner: m for name in names for inner, m in self.below(name).items()}
        for inner, module in inside.items():
            if keep_hooks and inner in self.hooked:
                return f"'{inner or type(module).__name__}' has a forward hook; remove it first"
            tensors = chain(module.named_parameters("", False), module.named_buffers("", False))
            for key, tensor in tensors:
                for owner in self.owners[id(tensor)]:
                    if owner not in inside:
                        return f"'{inner}' shares a tensor with '{owner}'"
                for reader in self.readers.get(f"{inner}.{key}" if inner else key, ()):
                    if reader not in inside:
                        who = f"'{reader}'" if reader else "the model's own forward"
                        return f"{who} also reads '{key}' of '{inner}'"
        return ""

    def below(self, name: str) -> dict[str, nn.Module]:
        """Return a module and what is in it, by their names in the model."""
        if name not in self._below:
            inside = self.every_name[name].modules()
            self._below[name] = {self.names[m]: m for m in inside}
        return self._below[name]

    def callers_outside(self, name: str) -> str:
        """Return a module in `name` that is also called from elsewhere; "" if there is none."""
        for inner in self.below(name):
            if inner == name:
                continue
            for caller in self._callers(inner):
                if caller is None or not within(caller.name, name):
                    return inner
        return ""

    def _callers(self, name: str) -> Iterator[Frame | None]:
        for frame in self.frames.get(name, ()):
            yield frame.parent
        for frame, _ in self.leaves.get(name, ()):
            yield frame

    def tensor_argument(self, frame: Frame) -> fx.Node | None:
        """Return the placeholder of the one tensor that a module takes, None for other calls."""
        found = [n for n in frame.graph.nodes if n.op == "placeholder" and "shape" in n.meta]
        return found[0] if len(found) == 1 and frame.plain_call else None

    def output(self, frame: Frame) -> fx.Node | None:
        """Return the node of the one tensor that a module returns."""
        (result,) = frame.output.args
        return result if isinstance(result, fx.Node) and "shape" in result.meta else None
