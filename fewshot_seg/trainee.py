"""What `optimise` trains, as it sees it: parameters, tensors for the checkpoint, and a switch for dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from fewshot_seg.checkpoint import load_part


class Trainee(Protocol):
    """What is trained: its parameters, and its tensors for the checkpoint."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """Those that the optimiser may change, in a fixed order."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """By name, for the checkpoint. No name begins with ``optimiser.``."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """Put `tensors` back. Raises DataError naming the file when they do not fit."""
        ...

    def set_training(self, training: bool) -> None:
        """Switch dropout and the like."""
        ...


class NamedModules:
    """Modules as a `Trainee`: all parameters that require gradients, tensors by ``name.``.

    Args:
        modules: by name; None is left out.
    """

    def __init__(self, **modules: nn.Module | None) -> None:
        self._modules = {name: module for name, module in modules.items() if module is not None}

    def parameters(self) -> Sequence[nn.Parameter]:
        """Those of all modules, in their order."""
        return [one for module in self._modules.values() for one in module.parameters() if one.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {f"{name}.{key}": one for name, part in self._modules.items() for key, one in part.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """Put parameters and buffers back. Raises DataError naming the file when they do not fit."""
        for name, module in self._modules.items():
            load_part(module, tensors, prefix=f"{name}.", where=where)

    def set_training(self, training: bool) -> None:
        """Of all modules."""
        for module in self._modules.values():
            module.train(training)
