"""Results to characters: text, JSON, Markdown, JUnit, SARIF and HTML.

A renderer takes the JSON document of a result and returns a string. It reads no checkpoint and
works nothing out about the model, so a document that was saved renders as well as a fresh one.
"""
