"""Runs from servers: the log-probabilities of given tokens, asked over the OpenAI API."""
