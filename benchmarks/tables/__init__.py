"""Tables of README.md and docs/, one file a subject; benchmarks/report.py puts them there."""
