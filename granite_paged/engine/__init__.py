"""Running a model: fixed shapes, graphs, and who is served when."""
