"""Model in, model or file out."""
