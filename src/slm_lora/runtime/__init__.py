"""The process and its machine: files, locks, signals, peers, hardware, progress."""
