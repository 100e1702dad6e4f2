"""Stillhouse distils large language models at cluster scale, through exact compressed top-k
logits."""
