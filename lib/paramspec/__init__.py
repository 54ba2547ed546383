"""Parameter specialization of language models: value vectors, masks, scoring, PSS.

    from paramspec import load_questions, measure_pss, summarize
    study = measure_pss(["smollm2-135m"], load_questions(concepts=60))
    summarize(study.details)

These are the names for everyday use, in the order of the paper; the modules have more. Each has an
example in its docstring, where `view` and `tokenizer` are of `load_model("my-checkpoint/")`,
`questions` are ten on each of the concepts alpha, beta and gamma, and `study` is `measure_pss` of
three models on them. Names are imported on first use, so that the command line answers at once.
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

_NAMES = {
    # Questions and models
    "specwiki.schema": ["Question"],
    "specwiki.questions": ["load_questions"],
    "specwiki.prompts": ["with_prompt"],
    "models.describe": ["study_questions", "describe_models", "taught"],
    "models.load": ["load_model"],
    # Value vectors, their masks, answers under masks
    "method.hooks": ["value_vector_view", "record_coefficients", "mask_value_vectors"],
    "method.masks": ["record_concepts", "value_vector_scores", "top_vectors", "keep_tensor"],
    "method.scoring": ["encode", "score_options"],
    "method.generation": ["generate_answers", "answer_matches"],
    "method.pss": ["Choices"],
    # PSS of many models, and its intervals
    "studies.sweep": ["score_questions", "measure_pss"],
    "stats.summary": ["accuracy_table", "summarize", "peak_pss"],
    "stats.estimates": ["with_interval"],
    "stats.trends": ["measure_models", "model_table", "trend", "contrast"],
    "stats.verdicts": ["verdict"],
    # Training chosen value vectors, and hallucination
    "studies.training": ["Training"],
    "studies.evaluation": ["Evaluation"],
    "studies.causal": ["causal_runs", "measure_runs"],
    "stats.methods": ["measure_methods"],
    "studies.hallucination": ["sample_answers", "semantic_entropy"],
    # Running
    "execution.parallel": ["workers"],
    "execution.store": ["Store"],
    "errors": ["InputError"],
}
__getattr__, __dir__, __all__ = _lazy.attach(__name__, submod_attrs=_NAMES)
