"""`explore`: runs a forward again, with each of its decisions taken the other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repnet.fold.frame import Frame, Shape, mapped
from repnet.fold.record import Recorder, RecordingError

MOST_PATHS = 32  # through one forward, in an exploration
MOST_DECISIONS = 12


def explore(frame: Frame, opaque: Callable[[nn.Module, str], bool]) -> list[Frame]:
    """Return a frame for each way that a forward may take, whatever its sizes and values are.

    A way that ends in a failed assertion is none: such an input is refused by both forms.

    Args:
        frame: of a call that was recorded without values, or can be run so.
        opaque: of `Recorder`.

    Raises:
        RecordingError: not all ways can be run.
    """
    scripts: list[list[Any]] = [[]]
    frames: list[Frame] = []
    first = frame.recorder
    if first.dtype_of_model() != first.dtype:  # another run was in another dtype
        first.model.to(first.dtype)
    while scripts:
        script = scripts.pop()
        recorder = Recorder(
            frame.module, lambda module, name: True, script=script, device=first.device
        )
        recorder.names = dict(first.names)
        recorder.constants = first.constants
        args, kwargs = mapped(frame.inputs, Shape, lambda shape: _empty(shape, first))
        refused = False
        try:
            with torch.device("meta"):
                recorder.run(args, kwargs, gradients=first.gradients)
        except AssertionError:  # forward takes no such input, and will not after folding
            refused = True
        except Exception as error:  # forward is anyone's code
            raise RecordingError(str(error)) from error
        (found,) = recorder.calls[frame.name]
        found.parent = frame.parent
        taken = [d.value for d in found.decisions if d.forced]
        if len(taken) > MOST_DECISIONS or len(frames) > MOST_PATHS:
            raise RecordingError("it branches too often")
        if not refused:
            frames.append(found)
        for n in range(len(script), len(taken)):
            scripts.append([*taken[:n], not taken[n]])
    if not frames:
        raise RecordingError("it asserts that no input is right")
    return frames


def _empty(shape: Shape, recorder: Recorder) -> Tensor:
    dtype = recorder.dtype if shape.dtype.is_floating_point else shape.dtype
    return torch.empty(shape.shape, dtype=dtype, device="meta")
