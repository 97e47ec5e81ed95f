"""From images to a trained, evaluated and served model, on a laptop or a Ray cluster."""

__version__ = "0.1.0"
