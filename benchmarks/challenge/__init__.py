"""The sections of benchmarks/challenge_task_e.py: some of the challenge's criteria each."""
