"""Hugging Face causal language models, of teachers and students: tokenizer, identity, weights,
final hidden states and Head."""
