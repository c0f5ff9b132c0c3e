"""What malicious participants do to their data and their updates: one attack a file."""
