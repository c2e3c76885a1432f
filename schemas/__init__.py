"""The one source of column names, dtypes, document fields and format versions."""
