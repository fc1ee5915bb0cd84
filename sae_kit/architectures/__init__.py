"""One file per architecture; importing this folder registers them all.

A new architecture is one file here: a frozen config, a class with `encoding` (how latents switch on) and
`sparsity_losses`, and the decorator that pairs them. The loader, the command line, the docs and the contract tests read
the registry.
"""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_file.name)
