"""Which sequence holds which page, and the device's copy of it."""
