"""Tools of the project itself, run from a clone. Not in the wheel."""
