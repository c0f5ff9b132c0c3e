"""The Flower ServerApp: strategy, evaluation, checkpoints and the audit trail."""
