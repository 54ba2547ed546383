"""How `questions.jsonl` is built from tables of facts; nothing else imports it."""
