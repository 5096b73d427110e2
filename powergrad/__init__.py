"""PowerGrad: train image classifiers with PowerGrad Transform (arXiv 2111.12495), as a library and as a service.

The package is lazy: `import powergrad` imports no torch, so that the API and the supervisor stay light; the loss is imported when it is
first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powergrad.loss import PowerGradCrossEntropyLoss, power_grad_cross_entropy

__version__ = "0.1.0"
__all__ = ["PowerGradCrossEntropyLoss", "__version__", "power_grad_cross_entropy"]


def __getattr__(name: str) -> Any:
    if name in ("PowerGradCrossEntropyLoss", "power_grad_cross_entropy"):
        from powergrad import loss

        return getattr(loss, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
