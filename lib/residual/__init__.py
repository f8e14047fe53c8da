"""ResiDual: residual units of vision transformers, their spectra, and their alignment with text.

Public names are imported when they are first used, so that `import residual.spectrum` loads no encoder library.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["alignment", "dimension", "extraction", "heads", "pursuit", "selection", "spectrum", "store", "units"],
    submod_attrs={
        "data.dataset": ["load_dataset"],
        "data.names": ["dataset_names", "task_names"],
        "encoders.encoder": ["Encoder", "load_encoder"],
        "encoders.names": ["encoder_names"],
        "encoders.towers": ["UnsupportedArchitectureError"],
        "extraction": ["extract"],
        "store": ["load_units"],
        "units": ["trace"],
    },
)
