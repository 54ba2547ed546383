"""The columns of a study's tables, and the values of `tier` and `mask` in their order."""

TIERS = ("high", "medium", "low")
ONE = "all"  # the tier, domain and relation of questions that have none
MASKS = ("none", "concept", "random", "magnitude", "other")

PSS_COLUMNS = {
    "model": "name of the model",
    "concept": "the concept of the mask and of the own questions",
    "domain": "the concept's domain",
    "tier": "the concept's frequency tier: high, medium, low; all without tiers",
    "ratio": "mask ratio; 0 without a mask",
    "mask": "none, concept, random, magnitude, or other",
    "seed": "seed of the mask's random draw and of the general questions",
    "protocol": "paper or holdout",
    "concept_accuracy": "acc_norm on the concept's own questions under the mask",
    "general_accuracy": "acc_norm on unrelated questions under the mask",
    "n_concept": "number of own questions",
    "n_general": "number of unrelated questions",
}
DETAIL_COLUMNS = {
    "model": "name of the model",
    "protocol": "paper or holdout",
    "question_id": "the question answered",
    "concept": "the concept that the question is about",
    "role": "concept (the mask's concept's own) or general (unrelated to it)",
    "mask_concept": "the concept of the mask",
    "ratio": "mask ratio; 0 without a mask",
    "mask": "none, concept, random, magnitude, or other",
    "seed": "seed of the mask's random draw",
    "option_logprobs": "log-likelihood of each option, nats",
    "option_tokens": "tokens of each option",
    "predicted": "option with the highest log-likelihood, the first of those that tie",
    "predicted_norm": "the same of the log-likelihood per character",
    "correct": "1 if predicted is the answer, 0 if not, 1/n if it is one of n that tie (acc)",
    "correct_norm": "the same of predicted_norm (acc_norm)",
}
