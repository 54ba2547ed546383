"""Parameter specialization of language models: value vectors, masks, scoring, PSS.

    from paramspec import load_model, load_questions, measure_pss
    model = load_model("smollm2-135m")
    table = measure_pss(model, load_questions(concepts=60))

Names are imported on first use, so that the command line answers at once.
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submod_attrs={
        "errors": ["InputError"],
    },
)
