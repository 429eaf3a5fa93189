"""Speed and memory: measured side by side, judged, drawn, and taken apart by kernel."""
