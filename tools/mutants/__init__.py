"""Mutation tests: small changes to the code, each of which some test must notice.

The changes are cosmic-ray's. Its own runner starts a process per change, which is ten seconds here,
most of them imports; `forks.py` runs tests in a fork of a process that has imported torch. mutmut 3
forks as well, but it puts every function behind a switch, which `torch.compile` and Triton do not
survive, and leaves out decorated functions and all constants of modules and classes.
"""
