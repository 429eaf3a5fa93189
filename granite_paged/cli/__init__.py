"""The command line. Nothing below imports click or rich."""
