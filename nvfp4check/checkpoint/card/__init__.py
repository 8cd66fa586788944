"""The model card: what it says, which of it the files confirm, and what it leaves unsaid."""
