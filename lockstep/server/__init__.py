"""The OpenAI-compatible server: HTTP in, the async engine behind it."""
