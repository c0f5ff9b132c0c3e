"""The same apps between processes and machines that do not trust each other.

A SuperLink with TLS that the operator alone reaches, a gateway for the participants, and SuperNodes
with keys and data of their own: as plain processes on one machine, or in containers.
"""
