"""Run steps of a model on a device. A runner owns memory and no policy."""
