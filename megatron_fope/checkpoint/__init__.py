"""Checkpoints: reading, comparing settings, refusing damage, starts from other models.

Whatever refuses something raises a ``UserError`` of one line that names the flag or the file. Everywhere
``folder`` is what ``--save`` or ``--load`` got, and ``step`` the number of an iteration or "release".
"""
