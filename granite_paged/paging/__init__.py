"""Who owns which page, and the device's copy of it."""
