"""The server of remote runs: `diffsight serve MODEL`. It knows models and lenses; the protocol is in `remote/`."""
