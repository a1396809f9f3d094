"""Conversations: messages, tools and calls, as text and back."""
