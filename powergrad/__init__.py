"""PowerGrad: train image classifiers with PowerGrad Transform (arXiv 2111.12495), as a library and as a service.

The package is lazy: `import powergrad` imports no torch, so that the API and the supervisor stay light.
"""

__version__ = "0.1.0"
