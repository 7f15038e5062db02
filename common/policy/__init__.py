"""The pure cores: an event and a time in, commands out. No clock, no IO, no randomness of their own.

Those that run in a scheduler's event are machine code, where they have been compiled (common/compiled.py).
"""

from common import compiled

__path__[:0] = compiled.folders()
