"""Conversation files to a token store: read, map fields, render once, tokenize, write. No torch."""
