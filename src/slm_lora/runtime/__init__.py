"""Process and machine: files, locks, signals, process group, hardware, progress."""
