"""Frozen, typed records that cross a process boundary. No behaviour, no codec.

Events are facts in the past tense, commands are orders in the imperative. The message on the wire
*is* the event a core handles: there is no second set of classes. New fields need defaults.
"""
