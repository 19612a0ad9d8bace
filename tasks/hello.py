"""Says hello, and what it runs on."""

import os
import platform

print(f"Hello from Python {platform.python_version()}, task {os.environ['TASK_ID']}")
