"""Many prompts, one folder: jobs that can be broken off, started again, and shared by several runners."""
