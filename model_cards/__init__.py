"""The templates of cards; installed as `xcllama.templates`."""
