"""The OpenAI-compatible server, imported as `minidcp_server`. Start reading at `protocol.py`."""
