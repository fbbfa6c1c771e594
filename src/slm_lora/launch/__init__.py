"""Start commands of this program: on this machine, under Ray, or under Slurm."""
