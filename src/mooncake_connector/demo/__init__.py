"""Run the whole road on one machine: child processes, scenes, report. Also the foundation of tests and benchmarks."""
