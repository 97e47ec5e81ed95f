"""A published model behind HTTP."""
