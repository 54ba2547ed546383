"""Parameter specialization of language models: value vectors, masks, scoring, PSS.

    from paramspec import load_questions, measure_pss, summarize
    study = measure_pss(["smollm2-135m"], load_questions(concepts=60))
    summarize(study.pss)

These are the names for everyday use, in the order of the paper; the modules have more. Each has an
example in its docstring. There `view` and `tokenizer` are those of `load_model("my-checkpoint/")`,
`questions` are ten on each of the concepts alpha, beta and gamma, and `study` is `measure_pss` of
three models on them. Names are imported on first use, so that the command line answers at once.
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

_NAMES = {
    # Questions and models
    "Question": "specwiki.schema",
    "load_questions": "specwiki.load",
    "study_questions": "models.describe",
    "load_model": "models.load",
    "describe_models": "models.describe",
    "taught": "models.describe",
    # Value vectors and their masks
    "value_vector_view": "method.hooks",
    "record_coefficients": "method.hooks",
    "record_concepts": "method.masks",
    "value_vector_scores": "method.masks",
    "top_vectors": "method.masks",
    "keep_tensor": "method.masks",
    "mask_value_vectors": "method.hooks",
    # Answers under masks, and PSS with its intervals
    "encode": "method.scoring",
    "score_options": "method.scoring",
    "score_questions": "studies.sweep",
    "accuracy_table": "stats.summary",
    "generate_answers": "method.generation",
    "answer_matches": "method.generation",
    "Choices": "method.pss",
    "measure_pss": "studies.sweep",
    "summarize": "stats.summary",
    "peak_pss": "stats.summary",
    "verdict": "stats.summary",
    # Many models
    "resample_models": "stats.trends",
    "model_table": "stats.trends",
    "correlations": "stats.trends",
    "contrast": "stats.trends",
    "interval": "stats.bootstrap",
    "with_interval": "stats.bootstrap",
    # Training chosen value vectors, and hallucination
    "Training": "studies.training",
    "Evaluation": "studies.evaluation",
    "causal_runs": "studies.causal",
    "measure_runs": "studies.causal",
    "measure_methods": "stats.methods",
    "sample_answers": "studies.hallucination",
    "semantic_entropy": "studies.hallucination",
    # Running
    "workers": "execution.parallel",
    "Store": "execution.store",
    "InputError": "errors",
}
_MODULES = {
    module: [n for n, home in _NAMES.items() if home == module] for module in _NAMES.values()
}
__getattr__, __dir__, __all__ = _lazy.attach(__name__, submod_attrs=_MODULES)
