"""Foundation models: their families, loading, and where to look inside."""
