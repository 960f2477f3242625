"""The OpenAI-compatible server, imported as `minidcp_server`. `app.py` has the endpoints."""
