"""What every PecSched process shares. Starts nothing; never imports torch."""
