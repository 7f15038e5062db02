"""The pure cores: an event and a time in, commands out. No clock, no IO, no randomness of their own."""
