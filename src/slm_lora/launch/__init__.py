"""Launch commands of this program: on this machine, with Ray, or with Slurm."""
