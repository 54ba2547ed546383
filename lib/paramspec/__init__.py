"""Parameter specialization of language models: value vectors, masks, scoring, PSS.

    from paramspec import load_questions, measure_pss, summarize
    study = measure_pss(["smollm2-135m"], load_questions(concepts=60))
    summarize(study.pss)

Names are imported on first use, so that the command line answers at once.
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submod_attrs={
        "stats.methods": ["measure_methods", "over_seeds", "resample_runs"],
        "studies.causal": ["Run", "causal_runs", "measure_runs", "trained_concepts"],
        "studies.evaluation": ["Evaluation"],
        "errors": ["InputError"],
        "method.generation": ["answer_matches", "generate_answers"],
        "studies.hallucination": [
            "cluster_answers",
            "embedding_judge",
            "entailment_judge",
            "local_intrinsic_dimension",
            "sample_answers",
            "semantic_entropy",
        ],
        "method.hooks": [
            "ValueVectorView",
            "mask_value_vectors",
            "record_coefficients",
            "value_vector_view",
        ],
        "method.masks": [
            "ConceptCoefficients",
            "keep_tensor",
            "load_masks",
            "magnitude_matched_vectors",
            "random_vectors",
            "record_concepts",
            "save_masks",
            "top_vectors",
            "value_vector_scores",
        ],
        "execution.parallel": ["workers"],
        "models.checkpoints": ["find_checkpoints"],
        "models.describe": [
            "comparable_models",
            "describe_models",
            "folds_asked",
            "study_questions",
            "taught",
        ],
        "models.load": ["LoadedModel", "load_model"],
        "models.registry": ["ModelSpec", "expand_models", "find_spec", "load_registry"],
        "method.pss": [
            "Choices",
            "pss_rows",
            "read_mask_name",
        ],
        "method.scoring": [
            "choose",
            "encode",
            "score_options",
        ],
        "specwiki": ["Question", "export_lm_eval", "load_questions", "questions_digest"],
        "execution.store": ["Store"],
        "models.tokens": ["token_ids"],
        "stats.summary": [
            "accuracy_table",
            "best_general_change",
            "peak_pss",
            "sampling_floor",
            "summarize",
            "verdict",
        ],
        "stats.trends": [
            "balance_tiers",
            "contrast",
            "correlations",
            "half_way",
            "interval",
            "like_sized_ends",
            "mean_over",
            "model_table",
            "resample_models",
            "with_interval",
        ],
        "models.zoo": ["load_zoo", "zoo_questions"],
        "models.zoo_training": ["train_zoo", "training_record"],
        "studies.training": ["METHODS", "Training", "choose_vectors"],
        "studies.sweep": [
            "Study",
            "concept_coefficients",
            "measure_pss",
            "score_questions",
            "write_study",
        ],
    },
)
