"""The door: OpenAI-compatible HTTP and the NATS request subjects. A router owns the requests it accepted
until their last token: it tokenizes, submits to the scheduler, puts the tokens in order, submits again
what was lost, and ends every request in exactly one of: all its tokens, an error, cancelled."""
