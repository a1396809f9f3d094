"""Templates that describe families of prompts, and their translation into schemas."""
