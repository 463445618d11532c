"""normfree: train, fine-tune, diagnose and deploy image classifiers without normalization layers.

The public API is the table of names in `__init__.pyi`. Names are imported on first use, so `import normfree` and
`normfree --help` stay fast.

Docstrings cite two papers: [A] is arXiv 2101.08692 (NF-ResNets), [B] arXiv 2102.06171 (NFNets). "Reference code" is
DeepMind's released `nfnets`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
