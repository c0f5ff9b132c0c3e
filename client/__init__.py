"""The participants: a Flower ClientApp, and the attacks of the malicious ones."""
