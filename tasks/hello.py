"""Prints a greeting and the version of Python."""

import os
import platform

print(f"Hello from Python {platform.python_version()}, task {os.environ['TASK_ID']}")
