"""A contributor's tool: builds `questions.jsonl` from tables of facts; only its tests import it."""
