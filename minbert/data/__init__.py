"""Reading, generating, encoding and sampling the tasks data."""
