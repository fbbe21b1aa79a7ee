"""Ports for the rendezvous of ranks, when several runs start at a time."""

from __future__ import annotations

import random
import socket

_chance = random.Random()  # not the generator that tests seed
BELOW_THE_EPHEMERAL = range(20000, 32000)
"""The kernel gives no such port to an outgoing connection, of which gloo makes many, between our look and
the listening of rank 0; see ``/proc/sys/net/ipv4/ip_local_port_range``."""


def free_port() -> int:
    """A port of this machine on which nobody listens, drawn so that two runs hardly ask for the same."""
    while True:
        port = _chance.choice(BELOW_THE_EPHEMERAL)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) != 0:
                return port
