"""NONE: a backdoor defence for federated learning that resets compromised neurons."""
