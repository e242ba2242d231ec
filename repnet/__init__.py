"""Train multi-branch convnets, deploy each block as one verified convolution.

Public names are imported on first use, so that a command line can show its help without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repnet.block_insertion import overparameterize as overparameterize
    from repnet.checkpoint import load_checkpoint as load_checkpoint
    from repnet.deploy.artifact import load_deployed as load_deployed
    from repnet.deploy.artifact import save_deployed as save_deployed
    from repnet.equivalence import Equivalence as Equivalence
    from repnet.equivalence import FoldMismatchError as FoldMismatchError
    from repnet.equivalence import compare as compare
    from repnet.fold import FoldReport as FoldReport
    from repnet.fold import reparameterize as reparameterize
    from repnet.fold import reparameterize_graph as reparameterize_graph
    from repnet.kernel import ConvKernel as ConvKernel
    from repnet.kernel import NotFoldableError as NotFoldableError
    from repnet.models import create_model as create_model
    from repnet.models import list_models as list_models
    from repnet.symbolic import kernel_of as kernel_of
    from repnet.weights import convert_weights as convert_weights
    from repnet.weights import load_weights as load_weights

__version__ = "0.1.0"

_HOMES = {
    "ConvKernel": "kernel",
    "Equivalence": "equivalence",
    "FoldMismatchError": "equivalence",
    "FoldReport": "fold",
    "NotFoldableError": "kernel",
    "compare": "equivalence",
    "convert_weights": "weights",
    "create_model": "models",
    "kernel_of": "symbolic",
    "list_models": "models",
    "load_checkpoint": "checkpoint",
    "load_deployed": "deploy.artifact",
    "load_weights": "weights",
    "overparameterize": "block_insertion",
    "reparameterize": "fold",
    "reparameterize_graph": "fold",
    "save_deployed": "deploy.artifact",
}
_PACKAGES = (
    "blocks",
    "callbacks",
    "data",
    "hub",
    "layers",
    "models",
    "predict",
    "training",
    "weights",
)

__all__ = [*_HOMES, *_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"repnet.{_HOMES[name]}"), name)
    if name in _PACKAGES:
        return import_module(f"repnet.{name}")
    raise AttributeError(f"module 'repnet' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
